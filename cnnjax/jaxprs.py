"""The programs that the equations of a jaxpr call."""

from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr

LOOPS = ("scan", "while", "cond")  # They execute their programs several times, or one of them.


def programs_in(equation: Any) -> Iterator[Any]:
    """Yields the programs that an equation of a jaxpr calls, such as the branches of `jax.lax.cond`."""
    for parameter in jax.tree.leaves([*equation.params.values()], is_leaf=lambda x: hasattr(x, "jaxpr")):
        inner = getattr(parameter, "jaxpr", parameter)
        if hasattr(inner, "eqns"):
            yield inner


def called_program(equation: Any) -> Any:
    """Returns the program that an equation calls, with its constants, or None; also None for `LOOPS`."""
    inner: Any = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    if equation.primitive.name in LOOPS or inner is None:
        return None
    return inner if hasattr(inner, "jaxpr") else ClosedJaxpr(inner, [])
