"""Depthwise convolution, and convolution with strides, in forms that are fast on a CPU.

XLA's own depthwise convolution is slow on a CPU: 40 to 100 times slower than sums of shifted images for the layers of
EfficientNet.
"""

from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cnnjax.layers.conv import conv2d, plain_conv2d
from cnnjax.layers.derivatives import fast_vjp, in_plain_operations
from cnnjax.onednn import calls as onednn
from cnnjax.typing import Padding


@partial(fast_vjp, nondiff_argnums=(2, 3))
def depthwise_conv2d(
    image: Float[Array, "B H W C"], kernel: Float[Array, "I J C"], padding: Padding, stride: int
) -> Float[Array, "B H2 W2 C"]:
    """Returns the cross-correlation of each channel with its own filter.

    Args:
      image: float32, bfloat16 or float16; the result has the same dtype. Sums are accumulated in float32.
      kernel: float32, rounded to the dtype of the image.
      padding: zeros around the image, ((top, bottom), (left, right)).
      stride: of both height and width.
    """
    options = {"padding": padding, "stride": stride}
    cpu = _by_onednn if onednn.convolves(image, kernel, padding) else _by_shifts
    cpu, default = partial(cpu, **options), partial(_by_xla, **options)
    return lax.platform_dependent(image, kernel.astype(image.dtype), cpu=cpu, default=default)


def plain_depthwise_conv2d(
    image: Float[Array, "B H W C"], kernel: Float[Array, "I J C"], padding: Padding, stride: int
) -> Float[Array, "B H2 W2 C"]:
    """Returns `depthwise_conv2d` of the same arguments, by plain XLA operations."""
    by_shifts = jax.default_backend() == "cpu" and not in_plain_operations()
    convolve = _by_shifts if by_shifts else _by_xla
    return convolve(image, kernel.astype(image.dtype), padding=padding, stride=stride)


def _by_onednn(image, kernel, *, padding, stride):
    groups = image.shape[-1]
    return onednn.convolution(image, kernel[:, :, None], padding=padding, stride=stride, groups=groups)


def _by_xla(image, kernel, *, padding, stride):
    numbers, groups = ("NHWC", "HWIO", "NHWC"), image.shape[-1]
    kernel = kernel[:, :, None]  # [I J C] -> [I J 1 C]
    return lax.conv_general_dilated(
        image, kernel, (stride, stride), padding, dimension_numbers=numbers, feature_group_count=groups
    )


def _shifts(image, size, *, padding, stride):
    """Returns the I*J parts of the padded image that meet one value of the kernel each, float32 [B H2 W2 C]."""
    (b, h, w, c), (i, j) = image.shape, size
    (top, bottom), (left, right) = padding
    h2, w2 = (h + top + bottom - i) // stride + 1, (w + left + right - j) // stride + 1
    image = jnp.pad(image, ((0, 0), *padding, (0, 0)))

    def part(y: int, x: int) -> Array:
        end = (b, y + (h2 - 1) * stride + 1, x + (w2 - 1) * stride + 1, c)
        return lax.slice(image, (0, y, x, 0), end, (1, stride, stride, 1)).astype(jnp.float32)

    return [part(y, x) for y in range(i) for x in range(j)]


def _by_shifts(image, kernel, *, padding, stride):
    parts = _shifts(image, kernel.shape[:2], padding=padding, stride=stride)
    values = kernel.astype(jnp.float32).reshape(-1, 1, 1, 1, kernel.shape[-1])  # [I J C] -> [I*J 1 1 1 C]
    return reduce(jnp.add, map(jnp.multiply, parts, values)).astype(image.dtype)


def _bwd(padding, stride, residuals, g):
    image, kernel = residuals
    (_, h, w, _), (_, h2, w2, _), (i, j, _) = image.shape, g.shape, kernel.shape
    (top, _), (left, _) = padding
    low, wide = (i - 1 - top, j - 1 - left), ((h2 - 1) * stride + 1, (w2 - 1) * stride + 1)
    # As in `conv2d`, the kernel rotated by 180°; zeros between the values of `g` take the place of the stride.
    back = tuple((a, n + k - 1 - m - a) for a, n, k, m in zip(low, (h, w), (i, j), wide, strict=True))

    def image_grad(g: Array, kernel: Array) -> Array:  # oneDNN's is slow in bfloat16 with strides.
        between = (0, 0, stride - 1)
        g = lax.pad(g, jnp.zeros((), g.dtype), ((0, 0, 0), between, between, (0, 0, 0)))
        return depthwise_conv2d.fun(g, kernel[::-1, ::-1], back, 1)

    def kernel_grad(image: Array, g: Array) -> Array:
        # oneDNN's takes 50 ms instead of 5 for a kernel [5 5 1152] and an image [32 4 4 1152] (AMD EPYC).
        if i * j <= 9 and onednn.convolves(image, kernel, padding):
            options = {"size": (i, j), "padding": padding, "stride": stride, "groups": image.shape[-1]}
            return onednn.kernel_grad(image, g, **options)[0][:, :, 0]  # [I J 1 C] -> [I J C]
        parts = _shifts(image, (i, j), padding=padding, stride=stride)
        return jnp.stack([(part * g.astype(jnp.float32)).sum((0, 1, 2)) for part in parts]).reshape(kernel.shape)

    convolve = partial(_by_xla, padding=padding, stride=stride)

    def image_grad_by_xla(g: Array, kernel: Array) -> Array:
        return jax.linear_transpose(lambda x: convolve(x, kernel), image)(g)[0]

    def kernel_grad_by_xla(image: Array, g: Array) -> Array:
        k = jax.ShapeDtypeStruct(kernel.shape, image.dtype)
        return jax.linear_transpose(lambda kernel: convolve(image, kernel), k)(g)[0].astype(jnp.float32)

    return (
        lax.platform_dependent(g, kernel.astype(g.dtype), cpu=image_grad, default=image_grad_by_xla),
        lax.platform_dependent(image, g, cpu=kernel_grad, default=kernel_grad_by_xla),
    )


def _fwd(image, kernel, padding, stride):
    return depthwise_conv2d.fun(image, kernel, padding, stride), (image, kernel)


depthwise_conv2d.defvjp(_fwd, _bwd)
depthwise_conv2d.defplain(plain_depthwise_conv2d)


def strided_conv2d(
    image: Float[Array, "B H W C"],
    kernel: Float[Array, "I J C K"],
    padding: Padding,
    stride: int,
    *,
    plain: bool = False,
) -> Float[Array, "B H2 W2 K"]:
    """Returns the cross-correlation, in the dtype of the image.

    On a CPU without oneDNN, blocks of stride × stride pixels become channels, so that `conv2d` of stride 1 computes it:
    XLA's gradient of a convolution with strides can take a hundred times as long as the convolution.
    """
    convolve = plain_conv2d if plain else conv2d
    if stride == 1:
        return convolve(image, kernel, None, padding, False)
    if plain or in_plain_operations() or jax.default_backend() != "cpu":
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            image, kernel.astype(image.dtype), (stride, stride), padding, dimension_numbers=numbers
        )
    if onednn.convolves(image, kernel, padding):
        return _strided_by_onednn(image, kernel, padding, stride)
    (b, h, w, c), (i, j, _, k), s = image.shape, kernel.shape, stride
    rows, columns = -(-i // s), -(-j // s)  # The size of the new kernel.
    (top, bottom), (left, right) = padding
    h2, w2 = (h + top + bottom - i) // s + 1, (w + left + right - j) // s + 1
    tall, wide = h2 + rows - 1, w2 + columns - 1  # The size of the new image.
    pads = (top, tall * s - h - top, 0), (left, wide * s - w - left, 0)  # May remove what no filter reaches.
    image = lax.pad(image, jnp.zeros((), image.dtype), ((0, 0, 0), *pads, (0, 0, 0)))
    image = image.reshape(b, tall, s, wide, s, c).swapaxes(2, 3).reshape(b, tall, wide, -1)
    kernel = jnp.pad(kernel, ((0, rows * s - i), (0, columns * s - j), (0, 0), (0, 0)))
    kernel = kernel.reshape(rows, s, columns, s, c, k).swapaxes(1, 2).reshape(rows, columns, -1, k)
    return convolve(image, kernel, None, ((0, 0), (0, 0)), False)


@partial(fast_vjp, nondiff_argnums=(2, 3))
def _strided_by_onednn(image, kernel, padding, stride):
    return onednn.convolution(image, kernel, padding=padding, stride=stride)


def _strided_fwd(image, kernel, padding, stride):
    return _strided_by_onednn.fun(image, kernel, padding, stride), (image, kernel)


def _strided_bwd(padding, stride, residuals, g):
    image, kernel = residuals
    image_grad = onednn.image_grad(g, kernel, size=image.shape[1:3], padding=padding, stride=stride)
    return image_grad, *onednn.kernel_grad(image, g, size=kernel.shape[:2], padding=padding, stride=stride)


_strided_by_onednn.defvjp(_strided_fwd, _strided_bwd)
