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

from cnnjax import onednn
from cnnjax.onednn import Padding
from cnnjax.step import AnyArray

GLOROT_UNIFORM = nn.initializers.glorot_uniform()

# --- Convolution ----------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def conv2d(
    image: Float[AnyArray, "B H W C"],
    kernel: Float[AnyArray, "I J C K"],
    bias: Float[AnyArray, " K"] | None,
    padding: Padding,
    relu: bool,
) -> Float[Array, "B H2 W2 K"]:
    """Returns the convolution (cross-correlation) of stride 1, plus `bias`; negative values become 0 with `relu`.

    Args:
      image: float32 or bfloat16; decides the dtype of the result.
      kernel, bias: float32, rounded to the image's dtype.
      padding: zeros around the image, ((top, bottom), (left, right)).
    """
    return _forward(image, kernel, bias, padding, relu)


def _forward(
    image: Float[AnyArray, "B H W C"],
    kernel: Float[AnyArray, "I J C K"],
    bias: Float[AnyArray, " K"] | None,
    padding: Padding,
    relu: bool,
) -> Float[Array, "B H2 W2 K"]:
    dtype = image.dtype
    operands = tuple(jnp.asarray(x, dtype) for x in (image, kernel, bias) if x is not None)

    def by_xla(image: Array, kernel: Array, *bias: Array, convolve=convolution_by_xla) -> Array:
        y = convolve(image, kernel, padding=padding)
        for b in bias:
            y = y + b[None, None, None]  # [K] -> [1 1 1 K]
        return jnp.maximum(y, 0) if relu else y

    on_cpu = partial(onednn.convolution, padding=padding, relu=relu) if onednn.in_use(dtype) else by_xla
    elsewhere = partial(by_xla, convolve=convolution_on_accelerators)
    return lax.platform_dependent(*operands, cpu=on_cpu, default=elsewhere)


def convolution_by_xla(
    image: Float[Array, "B H W C"], kernel: Float[Array, "I J C K"], *, padding: Padding
) -> Float[Array, "B H2 W2 K"]:
    """As XLA chooses."""
    return lax.conv_general_dilated(image, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def convolution_on_accelerators(
    image: Float[Array, "B H W C"], kernel: Float[Array, "I J C K"], *, padding: Padding
) -> Float[Array, "B H2 W2 K"]:
    """In 16 bits, the shapes that cuDNN is fast at: 16 values of a patch as a matrix product, else channels by 32."""
    (i, j, c, k), bits = kernel.shape, 8 * image.dtype.itemsize
    if bits != 16 or i * j * c > 16:
        return convolution_by_xla(_fill(image, 3), _fill(kernel, 2), padding=padding)
    image = jnp.pad(image, ((0, 0), *padding, (0, 0)))
    h, w = image.shape[1] - i + 1, image.shape[2] - j + 1
    patches = [image[:, y : y + h, x : x + w] for y in range(i) for x in range(j)]
    patches.append(jnp.zeros((*patches[0].shape[:3], 16 - i * j * c), image.dtype))
    kernel = jnp.pad(kernel.reshape(-1, k), ((0, 16 - i * j * c), (0, 0)))  # [I J C K] -> [16 K]
    return jnp.concatenate(patches, axis=-1) @ kernel  # [B H2 W2 16] · [16 K]


def _fill(x: Array, axis: int) -> Array:
    """Fills 16 or more channels in 16 bits with zeros, up to a multiple of 32."""
    channels = x.shape[axis]
    more = -channels % 32 if x.dtype.itemsize == 2 and channels >= 16 else 0
    return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])


def _conv2d_fwd(image, kernel, bias, padding, relu):
    y = _forward(image, kernel, bias, padding, relu)
    return y, (image, kernel, bias, y if relu else None)


def _conv2d_bwd(padding, relu, residuals, g):
    image, kernel, bias, y = residuals
    if relu:
        g = jnp.where(y > 0, g, 0)
    # The image's gradient is a convolution again: of `g`, with the kernel turned by half and its channels exchanged.
    (i, j), ((top, bottom), (left, right)) = kernel.shape[:2], padding
    back = ((i - 1 - top, i - 1 - bottom), (j - 1 - left, j - 1 - right))

    def on_cpu(g: Array, kernel: Array) -> Array:
        return _forward(g, kernel[::-1, ::-1].swapaxes(2, 3), None, back, False)

    elsewhere = partial(image_grad_by_xla, size=image.shape[1:3], padding=padding)
    image_grad = lax.platform_dependent(g, kernel.astype(g.dtype), cpu=on_cpu, default=elsewhere)
    return image_grad, kernel_grad(image, g, padding), None if bias is None else _bias_grad(g, relu)


def image_grad_by_xla(
    g: Float[Array, "B H2 W2 K"], kernel: Float[Array, "I J C K"], *, size: tuple[int, ...], padding: Padding
) -> Float[Array, "B H W C"]:
    """The transpose of the convolution, as XLA knows it; for accelerators."""
    filled = _fill(kernel, 2)
    image = jax.ShapeDtypeStruct((g.shape[0], *size, filled.shape[2]), g.dtype)
    (grad,) = jax.linear_transpose(partial(convolution_by_xla, kernel=filled, padding=padding), image)(g)
    return grad[..., : kernel.shape[2]]


conv2d.defvjp(_conv2d_fwd, _conv2d_bwd)


def _bias_grad(g: Float[Array, "B H W K"], relu: bool) -> Float[Array, " K"]:
    def by_matmul(g: Array) -> Array:
        g = g.reshape(-1, g.shape[-1])  # [B H W K] -> [B*H*W K]
        return onednn.matmul(jnp.ones((1, g.shape[0]), g.dtype), g, dtype=jnp.float32)[0]

    by_sum = partial(jnp.sum, axis=(0, 1, 2), dtype=jnp.float32)
    # XLA computes what makes `g` within the sum: fast for a ReLU, slow for the activation of a layer above.
    return by_sum(g) if relu else _on_cpu(by_matmul, by_sum, g)


def kernel_grad(
    image: Float[Array, "B H W C"], g: Float[Array, "B H2 W2 K"], padding: Padding
) -> Float[Array, "I J C K"]:
    """Returns the gradient of a convolution's kernel: over all positions, image values times those of `g`.

    It is float32; on an accelerator a float32 sum that was rounded to the image's dtype, as in JAX's own gradient.
    """
    if not onednn.in_use(image.dtype) or not onednn.HAS_AVX512 or image.shape[3] < 16:  # XLA's is faster there.
        on_cpu = _kernel_grad_by_xla_in_float32
    elif image.dtype == jnp.bfloat16 and onednn.HAS_BFLOAT16:
        on_cpu = _kernel_grad_by_convolution
    else:
        on_cpu = _kernel_grad_by_matmul
    on_cpu, elsewhere = (partial(f, padding=padding) for f in (on_cpu, kernel_grad_by_xla))
    return lax.platform_dependent(image, g, cpu=on_cpu, default=elsewhere)


def kernel_grad_by_xla(
    image: Float[Array, "B H W C"], g: Float[Array, "B H2 W2 K"], *, padding: Padding
) -> Float[Array, "I J C K"]:
    """The batch is summed over, as channels are in a convolution, and `g` moves over the image."""
    numbers, channels = ("CHWN", "IHWO", "HWNC"), image.shape[3]
    grad = lax.conv_general_dilated(_fill(image, 3), g, (1, 1), padding, dimension_numbers=numbers)
    return grad[:, :, :channels].astype(jnp.float32)


def _kernel_grad_by_xla_in_float32(
    image: Float[Array, "B H W C"], g: Float[Array, "B H2 W2 K"], *, padding: Padding
) -> Float[Array, "I J C K"]:
    return kernel_grad_by_xla(image.astype(jnp.float32), g.astype(jnp.float32), padding=padding)


def _kernel_grad_by_matmul(
    image: Float[Array, "B H W C"], g: Float[Array, "B H2 W2 K"], *, padding: Padding
) -> Float[Array, "I J C K"]:
    """A matrix product of J copies of the image, each moved in width, and I of `g`, each moved in height."""
    (_, h, w, c), (_, h2, w2, k) = image.shape, g.shape
    (top, bottom), (left, right) = padding
    rows, columns = h + top + bottom - h2 + 1, w + left + right - w2 + 1  # The kernel's.
    zero = jnp.zeros((), image.dtype)
    images = sum(
        lax.pad(
            image,
            zero,
            ((0, 0, 0), (top, bottom, 0), (left - j, w2 + j - left - w, 0), (j * c, (columns - 1 - j) * c, 0)),
        )
        for j in range(columns)
    )  # [B H+pads W2 J*C]
    gs = sum(
        lax.pad(g, zero, ((0, 0, 0), (i, rows - 1 - i, 0), (0, 0, 0), (i * k, (rows - 1 - i) * k, 0)))
        for i in range(rows)
    )  # [B H+pads W2 I*K]
    images, gs = lax.optimization_barrier((images, gs))
    halves = 2 - images.size // (columns * c) % 2  # Two shorter sums, where they are as long, are faster than one.
    images, gs = images.reshape(halves, -1, columns * c), gs.reshape(halves, -1, rows * k)
    product = onednn.matmul(images, gs, transpose_a=True, dtype=jnp.float32).sum(0)
    return product.reshape(columns, c, rows, k).transpose(2, 0, 1, 3)  # [J*C I*K] -> [I J C K]


def _kernel_grad_by_convolution(
    image: Float[Array, "B H W C"], g: Float[Array, "B H2 W2 K"], *, padding: Padding
) -> Float[Array, "I J C K"]:
    """J convolutions in which channels are the image's width, and width and batch, which are summed over, are channels.

    `g` is the kernel: it moves over the height alone, and so gives the I rows at once.
    """
    (b, h, w, c), (_, h2, w2, k) = image.shape, g.shape
    (top, bottom), (left, right) = padding
    columns = w + left + right - w2 + 1
    image = lax.optimization_barrier(image.transpose(1, 3, 2, 0))  # [B H W C] -> [H C W B]
    image = jnp.pad(image, ((0, 0), (0, 0), (left, right), (0, 0)))
    kernel = g.transpose(1, 2, 0, 3).reshape(h2, 1, w2 * b, k)  # [B H2 W2 K] -> [H2 1 W2*B K]
    grads = [
        onednn.convolution(
            lax.optimization_barrier(image[:, :, j : j + w2].reshape(1, h, c, w2 * b)),
            kernel,
            padding=((top, bottom), (0, 0)),
            dtype=jnp.float32,
        )
        for j in range(columns)
    ]  # J times [1 I C K]
    return jnp.concatenate(grads).swapaxes(0, 1)  # [J I C K] -> [I J C K]


def _on_cpu(fast, plain, *operands):
    """Computes by `fast` where the program is lowered for a CPU that has it, by `plain` elsewhere."""
    if not onednn.in_use(operands[0].dtype):
        return plain(*operands)
    return lax.platform_dependent(*operands, cpu=fast, default=plain)


# --- Dense, activation, pooling, dropout ----------------------------------------------------------------------------


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
    return _on_cpu(fast, by_xla, a, b)


dense.defvjp(lambda x, kernel: (dense(x, kernel), (x, kernel)), _dense_bwd)


@jax.custom_vjp
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns GELU by its tanh formula, in float32 within: a CPU is slow at rounding each term to bfloat16.

    Its gradient keeps `x` alone: to compute the rest again is faster than to write it to memory and read it.
    """
    return _gelu(x)


def _gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return nn.gelu(x.astype(jnp.float32)).astype(x.dtype)


gelu.defvjp(lambda x: (_gelu(x), x), lambda x, g: jax.vjp(_gelu, lax.optimization_barrier(x))[1](g))


@jax.custom_vjp
def max_pool_2x2(x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
    """Returns the maximum of each 2×2 window; a last odd row or column is left out.

    Equals `nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))`. Its gradient is no scatter. In a process
    without an accelerator it is a comparison, and values that tie share it; else a byte a window says where it goes, to
    the first of equal values.
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
    if jax.default_backend() == "cpu":
        y = max_pool_2x2(x)
        return y, (x, y)
    y, index = max_pool_with_index(x)
    return y, (index, jnp.zeros((x.shape[1] % 2, x.shape[2] % 2, 0)))


def _max_pool_bwd(residuals, g):
    if residuals[0].dtype != jnp.uint8:
        return (max_pool_grad_by_comparison(*residuals, g),)
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
