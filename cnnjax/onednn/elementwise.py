"""Operations of elementwise.c: loops over images in which XLA reads memory more often than necessary.

Operands and results of one value per channel are float32.
"""

from collections.abc import Callable
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from cnnjax.layers.derivatives import without_derivative
from cnnjax.onednn.calls import in_use
from cnnjax.onednn.library import required_kernels
from cnnjax.onednn.partition import divided

KINDS = ("norm_sums", "norm_gelu", "norm_gelu_grad", "norm_grad", "gelu", "gelu_grad")  # As in elementwise.c.


def on_cpu(fast: Callable[..., Any], plain: Callable[..., Any], *operands: Array) -> Any:
    """Computes `fast` if oneDNN is in use and the program is lowered for a CPU, and `plain` otherwise.

    In a process with an accelerator, it is always `plain`: the programs for the accelerator contain no branches.
    """
    x = operands[0]
    if jax.default_backend() != "cpu" or not in_use(x.dtype) or x.ndim < 2 or x.size == 0:
        return plain(*operands)
    return lax.platform_dependent(*operands, cpu=fast, default=plain)


def norm_sums(x: Float[Array, "B *N C"]) -> Float[Array, "2 C"]:
    """Returns the sums of each channel and of its squares."""
    return _call("norm_sums", x, results=["sums"])[0]


def norm_gelu(
    x: Float[Array, "B *N C"],
    mean: Float[Array, " C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    *residual: Float[Array, "B *N C"],
) -> Float[Array, "B *N C"]:
    """Returns GELU of (x - mean) · scale + bias + residual, in the dtype of `x`, to which a residual is rounded."""
    return _call("norm_gelu", x, mean, scale, bias, *(r.astype(x.dtype) for r in residual))


def norm_gelu_grad(
    x: Float[Array, "B *N C"],
    g: Float[Array, "B *N C"],
    mean: Float[Array, " C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    *residual: Float[Array, "B *N C"],
) -> tuple[Float[Array, "B *N C"], Float[Array, "2 C"]]:
    """Returns h, the gradient of the argument of GELU in `norm_gelu`, and the sums of h and h · (x - mean) · scale."""
    operands = (x, g, mean, scale, bias, *(r.astype(x.dtype) for r in residual))
    h, sums = _call("norm_gelu_grad", *operands, results=["image", "sums"])
    return h, sums


def norm_grad(
    x: Float[Array, "B *N C"],
    h: Float[Array, "B *N C"],
    mean: Float[Array, " C"],
    scale: Float[Array, " C"],
    *means: Float[Array, " C"],
) -> Float[Array, "B *N C"]:
    """Returns the gradient of `x`; h and the two `means` are the results of `norm_gelu_grad`, per example and pixel."""
    return _call("norm_grad", x, h, mean, scale, *means)


def gelu(x: Float[Array, "B *N C"]) -> Float[Array, "B *N C"]:
    """Returns the tanh approximation of GELU."""
    return _call("gelu", x)


def gelu_grad(x: Float[Array, "B *N C"], g: Float[Array, "B *N C"]) -> Float[Array, "B *N C"]:
    """Returns the gradient of `gelu`."""
    return _call("gelu_grad", x, g)


def _call(kind: str, *operands: Array, results: Any = "image") -> Any:
    """Calls the handler of elementwise.c.

    Operands of rank 1 and sums have no batch. An image in the results has the shape and dtype of the first operand.

    Raises:
      RuntimeError: oneDNN is not available.
    """
    required_kernels()
    config = np.array([KINDS.index(kind)], np.int64)
    names = (f"d{i}" for i in count())

    def dims(rank: int, batch: bool) -> str:
        return " ".join(["b"] * batch + [next(names) for _ in range(rank - batch)])

    of_operands = [dims(x.ndim, x.ndim > 1) for x in operands]
    of_results = [dims(operands[0].ndim, True) if r == "image" else dims(2, False) for r in jax.tree.leaves(results)]

    def call(*operands: Array) -> Any:
        x = operands[0]
        shapes = {
            "image": jax.ShapeDtypeStruct(x.shape, x.dtype),
            "sums": jax.ShapeDtypeStruct((2, x.shape[-1]), jnp.float32),
        }
        shape = jax.tree.map(shapes.get, results)
        return jax.ffi.ffi_call("cnnjax_elementwise", shape)(*operands, config=config)

    f = divided(call, f"{', '.join(of_operands)} -> {', '.join(of_results)}", config)
    wide = (x.astype(jnp.float32) if x.ndim == 1 else x for x in operands)  # With JAX_ENABLE_X64.
    return without_derivative(f)(*wide)
