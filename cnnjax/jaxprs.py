"""The programs and kernels that the equations of a jaxpr call."""

from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr  # pyright: ignore[reportPrivateImportUsage]  In jax 0.12, another name of Jaxpr.

CALLS = ("jit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "checkpoint")
LOOPS = ("scan", "while", "cond")  # They execute their programs several times, or one of them.


def programs_in(equation: Any) -> Iterator[Any]:
    """Yields the programs that an equation of a jaxpr calls, such as the branches of `jax.lax.cond`."""
    for parameter in jax.tree.leaves([*equation.params.values()], is_leaf=lambda x: hasattr(x, "jaxpr")):
        inner = getattr(parameter, "jaxpr", parameter)
        if hasattr(inner, "eqns"):
            yield inner


def calls_kernels(program: Any) -> bool:
    """Returns whether a program calls kernels that are not XLA's own, such as those of oneDNN."""
    equations = getattr(program, "jaxpr", program).eqns
    return any(x.primitive.name == "ffi_call" or any(map(calls_kernels, programs_in(x))) for x in equations)


def constants_of(program: ClosedJaxpr) -> Iterator[Any]:
    """Yields the arrays that a program does not compute or receive, with those of the programs that it calls."""
    yield from program.consts
    for equation in program.jaxpr.eqns:
        for parameter in jax.tree.leaves([*equation.params.values()], is_leaf=lambda x: isinstance(x, ClosedJaxpr)):
            if isinstance(parameter, ClosedJaxpr):
                yield from constants_of(parameter)


def called_program(equation: Any) -> Any:
    """Returns the program that an equation calls, with its constants.

    None if it is no call: one of `LOOPS`, or a reduction with a function of its own.
    """
    inner: Any = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    if equation.primitive.name not in CALLS or inner is None:
        return None
    return inner if hasattr(inner, "jaxpr") else ClosedJaxpr(inner, [])
