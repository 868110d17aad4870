"""The programs and kernels that the equations of a jaxpr call, and the random numbers that they draw."""

from collections.abc import Iterator, Sequence
from functools import reduce
from operator import or_
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Literal  # pyright: ignore[reportPrivateImportUsage]  In jax 0.12, another name of Jaxpr.

CALLS = ("jit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat2")
LOOPS = ("scan", "while", "cond")  # They execute their programs several times, or one of them.
_DRAWS = ("random_bits", "random_gamma")
_KEY, _OTHER = 1, 2  # Bits: depends on the key; on another input.


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


def repeats_draws(program: ClosedJaxpr, is_key: Sequence[bool]) -> bool:
    """Returns whether a program draws random numbers that depend on a key among its inputs, and on no other input.

    Args:
      is_key: for each input, whether it is such a key.
    """
    return _trace_draws(program, [_KEY if key else _OTHER for key in is_key])[0]


def _trace_draws(program: Any, inputs: list[int]) -> tuple[bool, list[int]]:
    """Returns whether there is such a draw, and on which kinds of inputs, as bits, each output depends.

    Args:
      inputs: for each input of the program, the kinds on which it depends.
    """
    jaxpr = getattr(program, "jaxpr", program)
    kinds, found = dict(zip(jaxpr.invars, inputs, strict=True)), False
    for equation in jaxpr.eqns:
        given = [0 if isinstance(x, Literal) else kinds.get(x, 0) for x in equation.invars]
        found |= equation.primitive.name in _DRAWS and given[0] == _KEY
        inner, results = called_program(equation), [reduce(or_, given, 0)] * len(equation.outvars)
        if inner is not None:
            inside, results = _trace_draws(inner, given)
            found |= inside
        else:  # The first passage through a loop; after it, all results depend on all inputs.
            for inner, inputs_of_inner in _loop_inputs(equation, given):
                found |= _trace_draws(inner, inputs_of_inner)[0]
        kinds.update(zip(equation.outvars, results, strict=True))
    return found, [0 if isinstance(x, Literal) else kinds.get(x, 0) for x in jaxpr.outvars]


def _loop_inputs(equation: Any, given: list[int]) -> Iterator[tuple[Any, list[int]]]:
    """Yields each program that an equation of `LOOPS`, or another one, calls, with its first inputs among `given`."""
    if equation.primitive.name == "while":
        of_cond, of_body = (equation.params[f"{part}_nconsts"] for part in ("cond", "body"))
        carried = given[of_cond + of_body :]
        yield equation.params["cond_jaxpr"], given[:of_cond] + carried
        yield equation.params["body_jaxpr"], given[of_cond : of_cond + of_body] + carried
        return
    for inner in programs_in(equation):
        given_to_inner = given[1:] if equation.primitive.name == "cond" else given
        same = len(inner.invars) == len(given_to_inner)
        yield inner, given_to_inner if same else [reduce(or_, given, 0)] * len(inner.invars)


def called_program(equation: Any) -> Any:
    """Returns the program that an equation calls, with its constants.

    None if it is no call: one of `LOOPS`, or a reduction with a function of its own.
    """
    inner: Any = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    if equation.primitive.name not in CALLS or inner is None:
        return None
    return inner if hasattr(inner, "jaxpr") else ClosedJaxpr(inner, [])
