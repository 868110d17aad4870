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

from cnnjax.layers.derivatives import fast_vjp
from cnnjax.onednn import calls as onednn
from cnnjax.typing import AnyArray, Padding


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
      kernel: float32, rounded to the dtype of the image.
      bias: float32, rounded to the dtype of the image except by oneDNN.
      padding: zeros around the image, ((top, bottom), (left, right)).
    """
    operands = (image, kernel) if bias is None else (image, kernel, bias)

    def by_xla(image: Array, kernel: Array, *bias: Array, convolve=convolution_by_xla) -> Array:
        y = convolve(image, kernel.astype(image.dtype), padding=padding)
        for b in bias:
            y = y + b.astype(image.dtype)[None, None, None]  # [K] -> [1 1 1 K]
        return jnp.maximum(y, 0) if relu else y

    cpu = (
        partial(onednn.convolution, padding=padding, relu=relu) if onednn.convolves(image, kernel, padding) else by_xla
    )
    default = partial(by_xla, convolve=convolution_on_accelerators)
    return lax.platform_dependent(*map(jnp.asarray, operands), cpu=cpu, default=default)


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
    by_onednn, size = onednn.convolves(image, kernel, padding), image.shape[1:3]
    (i, j), ((top, bottom), (left, right)) = kernel.shape[:2], padding

    def image_grad_on_cpu(g: Array, kernel: Array) -> Array:
        if by_onednn:
            return onednn.image_grad(g, kernel, size=size, padding=padding)
        # A convolution of `g` with the kernel rotated by 180° and its channels swapped.
        back = ((i - 1 - top, i - 1 - bottom), (j - 1 - left, j - 1 - right))
        return convolution_by_xla(g, kernel.astype(g.dtype)[::-1, ::-1].swapaxes(2, 3), padding=back)

    def image_grad_on_accelerators(g: Array, kernel: Array) -> Array:
        return image_grad_by_xla(g, kernel.astype(g.dtype), size=size, padding=padding)

    def kernel_grads_on_cpu(image: Array, g: Array) -> list[Array]:
        if by_onednn:
            return onednn.kernel_grad(image, g, size=(i, j), padding=padding, bias=bias is not None)
        return kernel_grads(image.astype(jnp.float32), g.astype(jnp.float32))

    def kernel_grads(image: Array, g: Array) -> list[Array]:
        grad = kernel_grad_by_xla(image, g, padding=padding)
        return [grad] if bias is None else [grad, g.sum((0, 1, 2), dtype=jnp.float32)]

    grads = lax.platform_dependent(image, g, cpu=kernel_grads_on_cpu, default=kernel_grads)
    image_grad = lax.platform_dependent(g, kernel, cpu=image_grad_on_cpu, default=image_grad_on_accelerators)
    return image_grad, grads[0], None if bias is None else grads[1]


def image_grad_by_xla(
    g: Float[Array, "B H2 W2 K"], kernel: Float[Array, "I J C K"], *, size: tuple[int, ...], padding: Padding
) -> Float[Array, "B H W C"]:
    """Returns the gradient of the image as the transpose of XLA's convolution."""
    filled = _fill(kernel, 2)
    image = jax.ShapeDtypeStruct((g.shape[0], *size, filled.shape[2]), g.dtype)
    (grad,) = jax.linear_transpose(partial(convolution_by_xla, kernel=filled, padding=padding), image)(g)
    return grad[..., : kernel.shape[2]]


def kernel_grad_by_xla(
    image: Float[Array, "B H W C"], g: Float[Array, "B H2 W2 K"], *, padding: Padding
) -> Float[Array, "I J C K"]:
    """Returns the float32 gradient of the kernel, as a convolution that sums over the batch instead of the channels.

    It is first rounded to the dtype of the image, as in JAX's own gradient.
    """
    numbers, channels = ("CHWN", "IHWO", "HWNC"), image.shape[3]
    grad = lax.conv_general_dilated(_fill(image, 3), g, (1, 1), padding, dimension_numbers=numbers)
    return grad[:, :, :channels].astype(jnp.float32)


conv2d.defvjp(_conv2d_fwd, _conv2d_bwd)
conv2d.defplain(plain_conv2d)
