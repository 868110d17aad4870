"""Fast operations with a gradient of their own, and the two switches to plain operations.

The field `plain` of a network is for derivatives; `plain_operations` is for exports and analyses.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import update_wrapper
from typing import Any

import jax
from jaxtyping import Array

_MESSAGE = (
    "`model` must use plain XLA operations to be differentiated twice or in forward mode, got fast kernels. Build it "
    "with `plain=True`, or without `conv_general_dilated`."
)


_PLAIN = jax.make_user_context(False)


def plain_operations() -> AbstractContextManager[None]:
    """Makes every layer, also of a network without `plain`, trace one standard operation of XLA, in this thread.

    A convolution becomes a convolution, also if it is depthwise, has strides or a 1×1 kernel; a max-pool becomes a
    reduction over windows. The program has no kernel of oneDNN and no branch per platform. Its results are equal to
    rounding, and it may be slow on a CPU. The switch is a part of the keys of JAX's caches, so a jitted function that
    was traced without it is traced again.
    """
    return _PLAIN(True)


def in_plain_operations() -> bool:
    """Returns whether the program is traced in `plain_operations`."""
    return _PLAIN.value


class fast_vjp:  # noqa: N801  A decorator.
    """`jax.custom_vjp` whose error in forward mode names the switch.

    JAX raises its own error, "can't apply forward-mode autodiff (jvp) to a custom_vjp function", if it notices only
    after the call: in `jax.linearize`, and if the derivative, or the function in it, is jitted.

    Attributes:
      fun: the operation without its gradient, for `fwd` and `bwd`: a second derivative then reaches a kernel
        `without_derivative`, or is exact.

    Raises:
      TypeError: the call is differentiated in forward mode.
    """

    def __init__(self, fun: Callable[..., Any], nondiff_argnums: tuple[int, ...] = ()) -> None:
        self.fun = fun
        self._with_gradient = jax.custom_vjp(fun, nondiff_argnums=nondiff_argnums)
        update_wrapper(self, fun)

    def defvjp(self, fwd: Callable[..., Any], bwd: Callable[..., Any]) -> None:
        """Sets the gradient, as `jax.custom_vjp.defvjp` does."""
        self._with_gradient.defvjp(fwd, bwd)

    def defplain(self, plain: Callable[..., Any]) -> None:
        """Sets the same operation for `plain_operations`."""
        self._plain = plain

    def __call__(self, *args: Any) -> Any:
        """Calls the operation."""
        if in_plain_operations():
            return self._plain(*args)
        try:
            return self._with_gradient(*args)
        except (TypeError, NotImplementedError) as error:
            if "forward-mode" not in str(error) and "custom_lin" not in str(error):
                raise
            raise TypeError(_MESSAGE) from error


def without_derivative(f: Callable[..., Array]) -> Callable[..., Array]:
    """Makes the derivative of a kernel raise an error that names the switch.

    Raises:
      TypeError: a gradient that uses the kernel is differentiated.
    """
    f = jax.custom_jvp(f)

    @f.defjvp
    def jvp(primals: Any, tangents: Any) -> Any:
        raise TypeError(_MESSAGE)

    return f
