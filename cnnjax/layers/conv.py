"""Convolution as a pure function, with the fastest gradients for each device, and by plain XLA operations.

The results of both are equal to rounding. Kernels are float32; the computation uses the dtype of the image and
accumulates in float32.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cnnjax.layers import onednn
from cnnjax.layers.derivatives import fast_vjp
from cnnjax.layers.onednn import Padding
from cnnjax.typing import AnyArray


@partial(fast_vjp, nondiff_argnums=(3, 4))
def conv2d(
    image: Float[AnyArray, "B H W C"],
    kernel: Float[AnyArray, "I J C K"],
    bias: Float[AnyArray, " K"] | None,
    padding: Padding,
    relu: bool,
) -> Float[Array, "B H2 W2 K"]:
    """Returns the cross-correlation of stride 1 plus `bias`, followed by a ReLU if `relu` is true.

    Args:
      image: float32, bfloat16 or float16; the result has the same dtype.
      kernel, bias: float32, rounded to the dtype of the image.
      padding: zeros around the image, ((top, bottom), (left, right)).
    """
    dtype = image.dtype
    operands = tuple(jnp.asarray(x, dtype) for x in (image, kernel, bias) if x is not None)

    def by_xla(image: Array, kernel: Array, *bias: Array, convolve=convolution_by_xla) -> Array:
        y = convolve(image, kernel, padding=padding)
        for b in bias:
            y = y + b[None, None, None]  # [K] -> [1 1 1 K]
        return jnp.maximum(y, 0) if relu else y

    cpu = partial(onednn.convolution, padding=padding, relu=relu) if onednn.in_use(dtype) else by_xla
    default = partial(by_xla, convolve=convolution_on_accelerators)
    return lax.platform_dependent(*operands, cpu=cpu, default=default)


def plain_conv2d(
    image: Float[AnyArray, "B H W C"],
    kernel: Float[AnyArray, "I J C K"],
    bias: Float[AnyArray, " K"] | None,
    padding: Padding,
    relu: bool,
) -> Float[Array, "B H2 W2 K"]:
    """Returns `conv2d` of the same arguments, by plain XLA operations."""
    dtype = image.dtype
    y = convolution_by_xla(jnp.asarray(image), jnp.asarray(kernel, dtype), padding=padding)
    if bias is not None:
        y = y + jnp.asarray(bias, dtype)[None, None, None]  # [K] -> [1 1 1 K]
    return nn.relu(y) if relu else y


def convolution_by_xla(
    image: Float[Array, "B H W C"], kernel: Float[Array, "I J C K"], *, padding: Padding
) -> Float[Array, "B H2 W2 K"]:
    """Returns the convolution, computed by the algorithm that XLA selects."""
    return lax.conv_general_dilated(image, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def convolution_on_accelerators(
    image: Float[Array, "B H W C"], kernel: Float[Array, "I J C K"], *, padding: Padding
) -> Float[Array, "B H2 W2 K"]:
    """Returns the convolution, computed in shapes that are fast on a GPU (see BENCHMARKS.md).

    In 16-bit dtypes, patches of at most 16 values become a matrix product; otherwise, 16 or more channels are padded to
    a multiple of 32.
    """
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
    """Pads 16 or more channels with zeros to a multiple of 32 in 16-bit dtypes."""
    channels = x.shape[axis]
    more = -channels % 32 if x.dtype.itemsize == 2 and channels >= 16 else 0
    return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])


def _conv2d_fwd(image, kernel, bias, padding, relu):
    y = conv2d.fun(image, kernel, bias, padding, relu)
    return y, (image, kernel, bias, y if relu else None)


def _conv2d_bwd(padding, relu, residuals, g):
    image, kernel, bias, y = residuals
    if relu:
        g = jnp.where(y > 0, g, 0)
    # The gradient of the image is a convolution of `g` with the kernel rotated by 180° and its channels swapped.
    (i, j), ((top, bottom), (left, right)) = kernel.shape[:2], padding
    back = ((i - 1 - top, i - 1 - bottom), (j - 1 - left, j - 1 - right))

    def cpu(g: Array, kernel: Array) -> Array:
        return conv2d.fun(g, kernel[::-1, ::-1].swapaxes(2, 3), None, back, False)

    default = partial(image_grad_by_xla, size=image.shape[1:3], padding=padding)
    image_grad = lax.platform_dependent(g, kernel.astype(g.dtype), cpu=cpu, default=default)
    return image_grad, kernel_grad(image, g, padding), None if bias is None else _bias_grad(g, relu)


def image_grad_by_xla(
    g: Float[Array, "B H2 W2 K"], kernel: Float[Array, "I J C K"], *, size: tuple[int, ...], padding: Padding
) -> Float[Array, "B H W C"]:
    """Returns the gradient of the image as the transpose of XLA's convolution."""
    filled = _fill(kernel, 2)
    image = jax.ShapeDtypeStruct((g.shape[0], *size, filled.shape[2]), g.dtype)
    (grad,) = jax.linear_transpose(partial(convolution_by_xla, kernel=filled, padding=padding), image)(g)
    return grad[..., : kernel.shape[2]]


conv2d.defvjp(_conv2d_fwd, _conv2d_bwd)
conv2d.defplain(plain_conv2d)


def _bias_grad(g: Float[Array, "B H W K"], relu: bool) -> Float[Array, " K"]:
    def by_matmul(g: Array) -> Array:
        g = g.reshape(-1, g.shape[-1])  # [B H W K] -> [B*H*W K]
        return onednn.matmul(jnp.ones((1, g.shape[0]), g.dtype), g, dtype=jnp.float32)[0]

    by_sum = partial(jnp.sum, axis=(0, 1, 2), dtype=jnp.float32)
    # XLA fuses the computation of `g` into the sum: fast for a ReLU, slow for the activation of a later layer.
    return by_sum(g) if relu else onednn.on_cpu(by_matmul, by_sum, g)


def kernel_grad(
    image: Float[Array, "B H W C"], g: Float[Array, "B H2 W2 K"], padding: Padding
) -> Float[Array, "I J C K"]:
    """Returns the gradient of the kernel: the products of image and `g`, summed over all positions.

    The result is float32. On an accelerator it is first rounded to the dtype of the image, as in JAX's own gradient.
    """
    if not onednn.in_use(image.dtype) or not onednn.has_avx512() or image.shape[3] < 16:  # XLA is faster for these.
        cpu = _kernel_grad_by_xla_in_float32
    elif image.dtype == jnp.bfloat16 and onednn.has_bfloat16():
        cpu = _kernel_grad_by_convolution
    elif image.shape[1] * image.shape[2] <= 16:  # The product has I*J parts, most of them of padding.
        cpu = _kernel_grad_by_xla_in_float32
    else:
        cpu = _kernel_grad_by_matmul
    cpu, default = (partial(f, padding=padding) for f in (cpu, kernel_grad_by_xla))
    return lax.platform_dependent(image, g, cpu=cpu, default=default)


def kernel_grad_by_xla(
    image: Float[Array, "B H W C"], g: Float[Array, "B H2 W2 K"], *, padding: Padding
) -> Float[Array, "I J C K"]:
    """Returns the gradient of the kernel as a convolution that sums over the batch instead of the channels."""
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
    """Multiplies J copies of the image, shifted in width, by I copies of `g`, shifted in height."""
    (_, h, w, c), (_, h2, w2, k) = image.shape, g.shape
    (top, bottom), (left, right) = padding
    rows, columns = h + top + bottom - h2 + 1, w + left + right - w2 + 1  # Of the kernel.
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
    halves = 2 - images.size // (columns * c) % 2  # Two sums of equal length are faster than one.
    images, gs = images.reshape(halves, -1, columns * c), gs.reshape(halves, -1, rows * k)
    product = onednn.matmul(images, gs, transpose_a=True, dtype=jnp.float32).sum(0)
    return product.reshape(columns, c, rows, k).transpose(2, 0, 1, 3)  # [J*C I*K] -> [I J C K]


def _kernel_grad_by_convolution(
    image: Float[Array, "B H W C"], g: Float[Array, "B H2 W2 K"], *, padding: Padding
) -> Float[Array, "I J C K"]:
    """Computes J convolutions with `g` as the kernel.

    Their width is the image's channels, and their channels are its width and batch, which are summed over. `g` slides
    over the height only, so each convolution returns all I rows.
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
    ]  # J arrays [1 I C K]
    return jnp.concatenate(grads).swapaxes(0, 1)  # [J I C K] -> [I J C K]
