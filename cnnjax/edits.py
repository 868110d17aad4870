"""Notices that code was edited since an earlier training in the same process, as in a notebook."""

import itertools
import re
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import jax
import numpy as np

from cnnjax.files import tree_sha256
from cnnjax.jaxprs import constants_of

_TRACES: dict[Hashable, str] = {}  # The SHA-256 of the last trace of each function. Of a process, as JAX's caches are.
_ANEW, _NUMBERS = jax.make_user_context(0), itertools.count()
# They change what a function computes, but not its code. JAX keeps its programs for each of their values.
_OPTIONS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion", "jax_default_prng_impl")


def tracing_anew() -> AbstractContextManager[None]:
    """Returns a context in which JAX uses no earlier trace, except the first such context of a process: it is free."""
    return _ANEW(next(_NUMBERS))


def notice_edits(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Returns the shapes that a function returns, like `jax.eval_shape`, and makes JAX forget programs of old code.

    JAX traces a function once for equal arguments. What the function calls may be edited later, as in a cell of a
    notebook, and would not be used. This traces the function each time. If it does not compute what it computed the
    last time, the caches of JAX are cleared, so that every program of the process is traced and compiled again.

    The rules of a `jax.custom_jvp` or `jax.custom_vjp`, and what a callback calls on the host, are not noticed; nor is,
    outside of `tracing_anew`, what functions call that JAX traces on their own, such as the body of a `lax.scan`.

    Args:
      function: of a module, or a `partial` of one with arguments that are compared by value.
    """
    return trace_and_notice_edits(function, *args, **kwargs)[1]


def trace_and_notice_edits(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Does what `notice_edits` does; returns the jaxpr, too."""
    function = partial(function)
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*args, **kwargs)
    options = (getattr(jax.config, name) for name in _OPTIONS)
    inputs = jax.tree.structure((args, kwargs)), f"{jaxpr.in_avals}"
    key = (function.func, function.args, *sorted(function.keywords.items()), *inputs, *options)
    trace = trace_sha256(jaxpr)
    if _TRACES.setdefault(key, trace) != trace:
        jax.clear_caches()
        _TRACES[key] = trace
    return jaxpr, shapes


def trace_sha256(jaxpr: Any) -> str:
    """Returns the SHA-256 of what a jaxpr computes, and of its constants."""
    text = re.sub("0x[0-9a-f]+", "", f"{jaxpr}")  # Without the addresses of functions.
    return tree_sha256([np.frombuffer(text.encode(), np.uint8), *constants_of(jaxpr)])
