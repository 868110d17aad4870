"""`jax.jit` with the XLA options that cnnjax's programs need: fast convolutions on a CPU, determinism on a GPU."""

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property, partial, update_wrapper
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar, overload

import jax
from jax.core import Tracer
from jax.extend.core import get_opaque_trace_state
from jax.stages import Lowered, Traced

from cnnjax.errors import ArgumentError

P = ParamSpec("P")
R = TypeVar("R")


def compiler_options(*, runs_once: bool = False) -> dict[str, bool | int | str]:
    """Returns the options with which cnnjax compiles its programs, except those that XLA_FLAGS sets.

    JAX accepts options only for a whole program. If a program of your own calls a function of cnnjax, pass them to it:
    `jax.jit(f, compiler_options=cnnjax.compiler_options())`.

    Args:
      runs_once: for a program that makes an initial state, which is compiled quickly instead of for speed. That
        changes no bit of Flax's initializers.
    """
    return dict(_options(runs_once))


@cache  # XLA reads XLA_FLAGS once per process, too.
def _options(runs_once: bool) -> dict[str, bool | int | str]:
    if jax.default_backend() not in ("cpu", "gpu"):  # Other compilers refuse these options.
        return {}
    # Makes GPU kernels deterministic; XLA then no longer selects kernels by timing them.
    ours: dict[str, bool | int | str] = {"xla_gpu_deterministic_ops": True}
    # An unknown option is an error, so the others are only set for versions that were tested.
    if version("jaxlib").startswith(("0.10.", "0.11.", "0.12.")):
        # jaxlib's default without INDIVIDUAL_CONVOLUTION: selects XLA's older convolutions, which are faster. See
        # BENCHMARKS.md.
        kept = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
        # It makes some sums faster, whose order then depends on the number of cores. Processes may have few each.
        kept += "" if jax.distributed.is_initialized() else ",LIBRARY_FUSION_TYPE_REDUCE"
        ours["xla_cpu_experimental_ynn_fusion_type"] = kept
        if runs_once and jax.default_backend() == "cpu":
            # Compiling an initial state at full optimization takes longer than using it. Level 0 would round
            # differently, because it does not fuse a product with a sum.
            ours["xla_backend_optimization_level"] = 1
            if version("jaxlib").startswith("0.10."):  # Later ones have no such option.
                ours["xla_cpu_use_fusion_emitters"] = False
    if version("jaxlib").startswith("0.10."):
        # Reduces the number of operations that run concurrently, because they slow each other down.
        ours["xla_cpu_scheduler_type"] = "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if flags and not flags.startswith("-"):  # XLA then reads them from this file.
        flags = Path(flags).read_text()
    users = re.findall(r"--(\w+)", flags)
    return {name: value for name, value in ours.items() if name not in users}


class Jitted(Generic[P, R]):
    """A function that `jit` compiles."""

    def __init__(
        self, fun: Callable[P, R], static_argnames: tuple[str, ...], donate_argnames: tuple[str, ...], runs_once: bool
    ) -> None:
        update_wrapper(self, fun)
        self._static_argnames = static_argnames
        self._jit = partial(jax.jit, fun, static_argnames=static_argnames, donate_argnames=donate_argnames)
        self._runs_once = runs_once

    @cached_property
    def _program(self) -> Any:
        return self._jit(compiler_options=compiler_options(runs_once=self._runs_once))

    @cached_property
    def _program_in_trace(self) -> Any:
        # A derivative needs the arguments.
        return self._jit(compiler_options=compiler_options(runs_once=self._runs_once), donate_argnames=())

    @cached_property
    def _part(self) -> Any:
        return self._jit(donate_argnames=())

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Calls the function: as a program of its own, or as a part of the program that is being traced.

        Raises:
          ValueError: a static argument is not hashable.
        """
        for name in self._static_argnames:
            _check_hashable(name, kwargs.get(name))
        if get_opaque_trace_state(convention="cnnjax") == _top_level():
            return self._program(*args, **kwargs)
        try:  # vmap and jvp accept options; jit, scan and linearize do not; grad does since jax 0.12.
            _identity()([x for x in jax.tree.leaves((args, kwargs)) if isinstance(x, Tracer)])
            return self._program_in_trace(*args, **kwargs)
        except ValueError as error:
            if "`compiler_options` can only be passed" not in str(error):
                raise
        return self._part(*args, **kwargs)

    def trace(self, *args: P.args, **kwargs: P.kwargs) -> Traced:
        """Traces the program. The first call with such arguments uses the trace."""
        return self._program.trace(*args, **kwargs)

    def lower(self, *args: P.args, **kwargs: P.kwargs) -> Lowered:
        """Lowers the program to StableHLO."""
        return self._program.lower(*args, **kwargs)

    def _cache_size(self) -> int:
        """Returns the number of its compiled programs."""
        return self._program._cache_size()


@overload
def jit(
    fun: Callable[P, R],
    *,
    static_argnames: tuple[str, ...] = ...,
    donate_argnames: tuple[str, ...] = ...,
    runs_once: bool = ...,
) -> Jitted[P, R]: ...


@overload
def jit(
    *, static_argnames: tuple[str, ...] = ..., donate_argnames: tuple[str, ...] = ..., runs_once: bool = ...
) -> Callable[[Callable[P, R]], Jitted[P, R]]: ...


def jit(
    fun: Callable[P, R] | None = None,
    *,
    static_argnames: tuple[str, ...] = (),
    donate_argnames: tuple[str, ...] = (),
    runs_once: bool = False,
) -> Jitted[P, R] | Callable[[Callable[P, R]], Jitted[P, R]]:
    """Compiles a function like `jax.jit`, with `compiler_options`; inside another program, without them."""
    if fun is None:
        return lambda fun: Jitted(fun, static_argnames, donate_argnames, runs_once)
    return Jitted(fun, static_argnames, donate_argnames, runs_once)


def _check_hashable(name: str, value: Any) -> None:
    try:
        hash(value)
    except TypeError as error:
        got = f"{type(value).__name__} ({' '.join(str(error).split())})"
        raise ArgumentError(
            f"`{name}` must be hashable, got {got}. Use tuples instead of lists, no arrays, and "
            "@dataclass(frozen=True) for a class."
        ) from error


@cache
def _top_level() -> Any:
    with ThreadPoolExecutor(1) as thread:  # A new thread traces nothing, whatever this one traces.
        return thread.submit(get_opaque_trace_state, convention="cnnjax").result()


@cache
def _identity() -> Any:
    return jax.jit(lambda tree: tree, compiler_options=compiler_options())
