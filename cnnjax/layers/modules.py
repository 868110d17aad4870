"""The operations of the networks, as pure functions and as Flax modules: each with the gradient that its device does
fastest.

Flax's modules of the same names compute the same; the tests hold these against them. What differs: the kernels on a
CPU, and that derivatives are of first order and by reverse mode alone. Parameters are float32; what is computed in is
the image's dtype, with sums in float32.
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.initializers import Initializer
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, UInt8

from cnnjax.layers import onednn
from cnnjax.layers.conv import conv2d
from cnnjax.typing import AnyArray

GLOROT_UNIFORM = nn.initializers.glorot_uniform()

# --- Functions ------------------------------------------------------------------------------------------------------


@jax.custom_vjp
def dense(x: Float[Array, "B N"], kernel: Float[Array, "N P"]) -> Float[Array, "B P"]:
    """Returns x · kernel, in the dtype of `x`; the kernel is float32."""
    return _matmul(x, kernel.astype(x.dtype))


def _dense_bwd(residuals, g):
    x, kernel = residuals
    kernel = kernel.astype(x.dtype)
    return _matmul(g, kernel, transpose_b=True), _matmul(x, g, transpose_a=True, dtype=jnp.float32)


def _matmul(
    a: Float[Array, "_ _"],
    b: Float[Array, "_ _"],
    transpose_a: bool = False,
    transpose_b: bool = False,
    dtype: DTypeLike | None = None,
) -> Float[Array, "_ _"]:
    def by_xla(a: Array, b: Array) -> Array:
        axes = ((0 if transpose_a else 1,), (1 if transpose_b else 0,))
        return lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=dtype or a.dtype)

    fast = partial(onednn.matmul, transpose_a=transpose_a, transpose_b=transpose_b, dtype=dtype)
    return onednn.on_cpu(fast, by_xla, a, b)


dense.defvjp(lambda x, kernel: (dense(x, kernel), (x, kernel)), _dense_bwd)


@jax.custom_vjp
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns GELU by its tanh formula, in float32 within: a CPU is slow at rounding each term to bfloat16.

    The backward pass keeps `x` alone and computes the rest again, which is faster than reading it from memory.
    """
    return _gelu(x)


def _gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return nn.gelu(x.astype(jnp.float32)).astype(x.dtype)


gelu.defvjp(lambda x: (_gelu(x), x), lambda x, g: jax.vjp(_gelu, lax.optimization_barrier(x))[1](g))


@jax.custom_vjp
def max_pool_2x2(x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
    """Returns the maximum of each 2×2 window; a last odd row or column is left out.

    Equals `nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))`. The gradient uses no scatter. In a process
    without an accelerator it compares values, and ties share it; otherwise one byte per window marks the first maximum.
    """
    b, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2 * c)  # [B H W C] -> [B H/2 2 W/2 2C]
    rows = jnp.maximum(x[:, :, 0], x[:, :, 1])  # [B H/2 W/2 2C]
    return jnp.maximum(rows[..., :c], rows[..., c:])


def _corners(x: Float[Array, "B H W C"]) -> list[Float[Array, "B H2 W2 C"]]:
    b, h, w, c = x.shape
    windows = x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c)
    return [windows[:, :, i, :, j] for i in range(2) for j in range(2)]


def _spread(windows: Float[Array, "B H2 2 W2 2 C"], h: int, w: int) -> Float[Array, "B H W C"]:
    b, c = windows.shape[0], windows.shape[-1]
    x = windows.reshape(b, h // 2 * 2, w // 2 * 2, c)
    return jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))


def max_pool_grad_by_comparison(
    x: Float[Array, "B H W C"], y: Float[Array, "B H2 W2 C"], g: Float[Array, "B H2 W2 C"]
) -> Float[Array, "B H W C"]:
    """Returns the gradient of `max_pool_2x2` of `x`, whose result was `y`."""
    b, h, w, c = x.shape

    def spread(y: Array) -> Array:
        return _spread(jnp.broadcast_to(y[:, :, None, :, None], (b, h // 2, 2, w // 2, 2, c)), h, w)

    ties = sum((corner == y).astype(g.dtype) for corner in _corners(x))
    share = lax.optimization_barrier(g / ties)  # Once a window, not once a pixel.
    return jnp.where(x == spread(y), spread(share), 0)


def max_pool_with_index(x: Float[Array, "B H W C"]) -> tuple[Float[Array, "B H2 W2 C"], UInt8[Array, "B H2 W2 C"]]:
    """Returns `max_pool_2x2`, and which of the four values of each window it is: the first of equal ones."""
    y = max_pool_2x2(x)
    index = jnp.full(y.shape, 3, jnp.uint8)
    for i, corner in list(enumerate(_corners(x)))[2::-1]:
        index = jnp.where(corner == y, jnp.uint8(i), index)
    return lax.optimization_barrier((y, index))  # Else XLA reads `x` again for the second.


def max_pool_grad_by_index(
    index: UInt8[Array, "B H2 W2 C"], g: Float[Array, "B H2 W2 C"], h: int, w: int
) -> Float[Array, "B H W C"]:
    """Returns the gradient of `max_pool_2x2` of images of h × w."""
    corner = jnp.arange(4, dtype=jnp.uint8).reshape(1, 1, 2, 1, 2, 1)
    return _spread(jnp.where(index[:, :, None, :, None] == corner, g[:, :, None, :, None], 0), h, w)


def _max_pool_fwd(x):
    if jax.default_backend() == "cpu":  # What the gradient needs must be kept before the platform is known.
        y = max_pool_2x2(x)
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


def dropout(key: Key[Array, ""], x: Float[Array, "..."], rate: float) -> Float[Array, "..."]:
    """Sets units to 0 with probability `rate`, rounded to a 256th, and scales the others to keep the mean.

    A random byte a unit decides instead of a random float: a quarter of the bits to draw.

    Args:
      key: consumed.
    """
    dropped = round(rate * 256)
    if dropped == 0:
        return x
    words = jax.random.bits(key, (math.ceil(x.size / 4),), jnp.uint32)
    byte = lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[: x.size].reshape(x.shape)
    return jnp.where(byte >= dropped, x * (256 / (256 - dropped)), 0).astype(x.dtype)


# --- Modules --------------------------------------------------------------------------------------------------------


class Conv(nn.Module):
    """A convolution of stride 1 that keeps the size, and a ReLU where asked for; computes in the image's dtype.

    With `even`, a last odd row or column of features is left out: a 2×2 pool after it would not read them.
    """

    features: int
    taps: int = 3
    use_bias: bool = True
    relu: bool = False
    even: bool = False
    kernel_init: Initializer = GLOROT_UNIFORM

    @nn.compact
    def __call__(self, image: Float[AnyArray, "B H W C"]) -> Float[Array, "B H2 W2 K"]:
        """Returns the features."""
        kernel = self.param("kernel", self.kernel_init, (self.taps, self.taps, image.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,)) if self.use_bias else None
        low, high = (self.taps - 1) // 2, self.taps // 2
        odd = [size % 2 if self.even else 0 for size in image.shape[1:3]]
        if self.taps == 1:  # Without padding that could be left out.
            image, odd = image[:, : image.shape[1] - odd[0], : image.shape[2] - odd[1]], [0, 0]
        top_bottom, left_right = ((low, high - n) for n in odd)
        return conv2d(image, kernel, bias, (top_bottom, left_right), self.relu)


class Dense(nn.Module):
    """A dense layer; computes in the dtype of its input."""

    features: int
    kernel_init: Initializer = GLOROT_UNIFORM

    @nn.compact
    def __call__(self, x: Float[Array, "B N"]) -> Float[Array, "B P"]:
        """Returns the features."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        return dense(x, kernel) + bias.astype(x.dtype)[None]  # [P] -> [1 P]


class Dropout(nn.Module):
    """`dropout` in training."""

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "..."], *, train: bool) -> Float[Array, "..."]:
        """Returns `x` with units dropped; consumes the "dropout" key where `train` is true."""
        return dropout(self.make_rng("dropout"), x, self.rate) if train and self.rate else x
