"""Dense layers, activations, pooling and dropout as pure functions.

Most of them exist twice: with the fastest gradients for each device, and by plain XLA operations. The results of both
equal Flax's to rounding. Parameters are float32; the computation uses the dtype of the input and accumulates in
float32.
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, UInt8

from cnnjax.layers.derivatives import fast_vjp, in_plain_operations
from cnnjax.onednn import calls as onednn
from cnnjax.onednn import elementwise


@fast_vjp
def dense(x: Float[Array, "B N"], kernel: Float[Array, "N P"]) -> Float[Array, "B P"]:
    """Returns x · kernel in the dtype of `x`; the kernel is float32."""
    return _matmul(x, kernel.astype(x.dtype), "b n, n p -> b p")


def plain_dense(x: Float[Array, "B N"], kernel: Float[Array, "N P"]) -> Float[Array, "B P"]:
    """Returns `dense` of the same arguments, by plain XLA operations."""
    return x @ kernel.astype(x.dtype)


def _dense_bwd(residuals, g):
    x, kernel = residuals
    x_grad = _matmul(g, kernel.astype(x.dtype), "b p, n p -> b n", transpose_b=True)
    return x_grad, _matmul(x, g, "b n, b p -> n p", transpose_a=True, dtype=jnp.float32)


def _matmul(
    a: Float[Array, "_ _"],
    b: Float[Array, "_ _"],
    dims: str,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    dtype: DTypeLike | None = None,
) -> Float[Array, "_ _"]:
    def by_xla(a: Array, b: Array) -> Array:
        axes = ((0 if transpose_a else 1,), (1 if transpose_b else 0,))
        return lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=dtype or a.dtype)

    by_onednn = partial(onednn.matmul, dims=dims, transpose_a=transpose_a, transpose_b=transpose_b, dtype=dtype)
    return lax.platform_dependent(a, b, cpu=by_onednn if onednn.in_use(a.dtype) else by_xla, default=by_xla)


dense.defvjp(lambda x, kernel: (dense.fun(x, kernel), (x, kernel)), _dense_bwd)
dense.defplain(plain_dense)


@fast_vjp
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes the tanh approximation of GELU in float32 and rounds it to the dtype of `x`.

    On a CPU, rounding each term to bfloat16 is slow. The backward pass keeps only `x` and recomputes the rest, which is
    faster than reading it from memory.
    """
    return elementwise.on_cpu(elementwise.gelu, plain_gelu, x)


def plain_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `gelu` of the same argument, by plain XLA operations."""
    return nn.gelu(x.astype(jnp.float32)).astype(x.dtype)


def _gelu_grad(x: Float[Array, "..."], g: Float[Array, "..."]) -> Float[Array, "..."]:
    return jax.vjp(plain_gelu, lax.optimization_barrier(x))[1](g)[0]


gelu.defvjp(lambda x: (gelu.fun(x), x), lambda x, g: (elementwise.on_cpu(elementwise.gelu_grad, _gelu_grad, x, g),))
gelu.defplain(plain_gelu)


@fast_vjp
def max_pool_2x2(x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
    """Returns the maximum of each 2×2 window; an odd last row or column is ignored.

    Equals `nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))`, but its gradient needs no scatter. In a process
    without an accelerator, the gradient compares values and is shared between ties; otherwise, one byte per window
    keeps the position of the first maximum.
    """
    b, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2 * c)  # [B H W C] -> [B H/2 2 W/2 2C]
    rows = jnp.maximum(x[:, :, 0], x[:, :, 1])  # [B H/2 W/2 2C]
    return jnp.maximum(rows[..., :c], rows[..., c:])


def plain_max_pool_2x2(x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
    """Returns `max_pool_2x2` of the same argument, with the same gradient at ties, by plain XLA operations."""
    if in_plain_operations():
        return nn.max_pool(x, (2, 2), (2, 2))
    h, w = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    corners = [x[:, i:h:2, j:w:2] for i in range(2) for j in range(2)]  # Four arrays [B H/2 W/2 C]
    if jax.default_backend() == "cpu":
        return jnp.stack(corners).max(0)  # Its gradient is shared between ties.
    y = corners[0]
    for corner in corners[1:]:
        y = jnp.where((corner > y) | jnp.isnan(corner), corner, y)
    return y


def _corners(x: Float[Array, "B H W C"]) -> list[Float[Array, "B H2 W2 C"]]:
    b, h, w, c = x.shape
    windows = x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c)
    return [windows[:, :, i, :, j] for i in range(2) for j in range(2)]


def _from_windows(windows: Float[Array, "B H2 2 W2 2 C"], h: int, w: int) -> Float[Array, "B H W C"]:
    b, c = windows.shape[0], windows.shape[-1]
    x = windows.reshape(b, h // 2 * 2, w // 2 * 2, c)
    return jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))


def max_pool_grad_by_comparison(
    x: Float[Array, "B H W C"], y: Float[Array, "B H2 W2 C"], g: Float[Array, "B H2 W2 C"]
) -> Float[Array, "B H W C"]:
    """Returns the gradient of `y = max_pool_2x2(x)` with respect to `x`, shared equally between ties."""
    b, h, w, c = x.shape

    def repeat(y: Array) -> Array:
        return _from_windows(jnp.broadcast_to(y[:, :, None, :, None], (b, h // 2, 2, w // 2, 2, c)), h, w)

    g = lax.optimization_barrier(g)  # Without it XLA computes `g` in the slow loop over windows.
    ties = sum((corner == y).astype(jnp.float32) for corner in _corners(x))
    share = (g.astype(jnp.float32) / ties).astype(g.dtype)
    share = lax.optimization_barrier(share)  # Divides once per window, not once per pixel.
    return jnp.where(x == repeat(y), repeat(share), 0)


def max_pool_with_index(x: Float[Array, "B H W C"]) -> tuple[Float[Array, "B H2 W2 C"], UInt8[Array, "B H2 W2 C"]]:
    """Returns `max_pool_2x2(x)` and the position (0 to 3, row by row) of the first maximum in each window."""
    y = max_pool_2x2.fun(x)
    index = jnp.full(y.shape, 3, jnp.uint8)
    corners = _corners(x)
    for i in (2, 1, 0):
        index = jnp.where(corners[i] == y, jnp.uint8(i), index)
    return lax.optimization_barrier((y, index))  # Without it XLA reads `x` a second time for the index.


def max_pool_grad_by_index(
    index: UInt8[Array, "B H2 W2 C"], g: Float[Array, "B H2 W2 C"], h: int, w: int
) -> Float[Array, "B H W C"]:
    """Returns the gradient of `max_pool_2x2` with respect to its h × w input."""
    corner = jnp.arange(4, dtype=jnp.uint8).reshape(1, 1, 2, 1, 2, 1)
    return _from_windows(jnp.where(index[:, :, None, :, None] == corner, g[:, :, None, :, None], 0), h, w)


def _max_pool_fwd(x):
    if jax.default_backend() == "cpu":  # The residuals must be chosen before the platform of the program is known.
        y = max_pool_2x2.fun(x)
        return y, (x, y)
    y, index = max_pool_with_index(x)
    return y, (index, jnp.zeros((x.shape[1] % 2, x.shape[2] % 2, 0)))


def _max_pool_bwd(residuals, g):
    if residuals[0].dtype != jnp.uint8:
        x, y = residuals
        return (max_pool_grad_by_comparison(x, y, g),)
    index, odd = residuals
    return (max_pool_grad_by_index(index, g, 2 * g.shape[1] + odd.shape[0], 2 * g.shape[2] + odd.shape[1]),)


max_pool_2x2.defvjp(_max_pool_fwd, _max_pool_bwd)
max_pool_2x2.defplain(plain_max_pool_2x2)


def dropout(key: Key[Array, ""], x: Float[Array, "..."], rate: float) -> Float[Array, "..."]:
    """Zeroes units with probability `rate`, rounded to a multiple of 1/256, and scales the others to keep the mean.

    One random byte per unit decides, not a random float, which needs four times as many random bits. Consumes `key`.
    """
    dropped = round(rate * 256)
    if dropped == 0:
        return x
    words = jax.random.bits(key, (math.ceil(x.size / 4),), jnp.uint32)
    byte = lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[: x.size].reshape(x.shape)
    return jnp.where(byte >= dropped, x * (256 / (256 - dropped)), 0).astype(x.dtype)
