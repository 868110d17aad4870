"""oneDNN's operations on images, for programs on a CPU.

Operands are float32 or bfloat16, and sums are accumulated in float32. On a processor without bfloat16 instructions,
bfloat16 operands are widened to float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cnnjax.layers.derivatives import in_plain_operations, without_derivative
from cnnjax.onednn.library import KINDS, kernels, required_kernels
from cnnjax.onednn.partition import divided
from cnnjax.typing import AnyArray, Padding

DTYPES = (jnp.float32, jnp.bfloat16)


def in_use(dtype: DTypeLike = jnp.float32) -> bool:
    """Returns whether the layers use oneDNN on a CPU for operands of `dtype`; read at trace time."""
    return dtype in DTYPES and not in_plain_operations() and kernels().version is not None


def convolves(image: AnyArray, kernel: AnyArray, padding: Padding) -> bool:
    """Returns whether the layers use oneDNN on a CPU for this convolution.

    oneDNN 3.2 computes wrong gradients if the padding is not smaller than the kernel.
    """
    sides = list(zip(image.shape[1:3], padding, kernel.shape[:2], strict=True))
    inside = all(0 <= pad < k for _, pads, k in sides for pad in pads)
    some = min(*image.shape, *kernel.shape) > 0 and all(n + sum(pads) >= k for n, pads, k in sides)
    return inside and some and in_use(image.dtype)


def convolution(
    image: Float[Array, "B H W C"],
    kernel: Float[Array, "I J C2 K"],
    bias: Float[Array, " K"] | None = None,
    *,
    padding: Padding,
    stride: int = 1,
    groups: int = 1,
    relu: bool = False,
) -> Float[Array, "B H2 W2 K"]:
    """Returns the cross-correlation plus `bias`, followed by a ReLU if `relu` is true, in the dtype of the image.

    The ReLU of nan is 0, unlike XLA's.

    Args:
      image: float32 or bfloat16.
      kernel: float32 or bfloat16, rounded to the dtype of the image.
      bias: float32 or bfloat16.
      padding: zeros around the image.
      groups: see `feature_group_count` of `jax.lax.conv_general_dilated`.
    """
    sides = zip(image.shape[1:3], padding, kernel.shape[:2], strict=True)
    size = [(n + sum(pad) - k) // stride + 1 for n, pad, k in sides]
    result = jax.ShapeDtypeStruct((image.shape[0], *size, kernel.shape[3]), image.dtype)
    operands, dims = (image, kernel), "b h w c, i j d k -> b y x n"
    if bias is not None:  # oneDNN has no bfloat16 bias for float32 images.
        bias = bias if bias.dtype == jnp.float32 else bias.astype(image.dtype)
        operands, dims = (image, kernel, bias), "b h w c, i j d k, m -> b y x n"
    return _call("convolution", dims, result, *operands, padding=padding, stride=stride, groups=groups, relu=relu)


def image_grad(
    g: Float[Array, "B H2 W2 K"],
    kernel: Float[Array, "I J C2 K"],
    *,
    size: tuple[int, int],
    padding: Padding,
    stride: int = 1,
    groups: int = 1,
) -> Float[Array, "B H W C"]:
    """Returns the gradient of the image of `convolution`, whose height and width are `size`, in the dtype of `g`."""
    result = jax.ShapeDtypeStruct((g.shape[0], *size, groups * kernel.shape[2]), g.dtype)
    dims = "b y x n, i j d k -> b h w c"
    return _call("image_grad", dims, result, g, kernel, padding=padding, stride=stride, groups=groups)


def kernel_grad(
    image: Float[Array, "B H W C"],
    g: Float[Array, "B H2 W2 K"],
    *,
    size: tuple[int, int],
    padding: Padding,
    stride: int = 1,
    groups: int = 1,
    bias: bool = False,
) -> list[Array]:
    """Returns the float32 gradient of the kernel of `convolution`, [I J C2 K], and with `bias` that of the bias, [K].

    Without groups, kernel_grad.c computes it instead of oneDNN in two cases:
    - on a processor with AVX2 but without AVX-512, if J * C2 is at least 6;
    - on a processor with AMX, for bfloat16 and a stride of 1, if C is at least 32, K at least 16, and the output has
      rows of at most 24 pixels, and at least a quarter of the image's pixels.

    Args:
      image, g: of one dtype.
      size: I and J.
    """
    c, k = image.shape[3] // groups, g.shape[3]
    result = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((*size, c, k), (k,))[: 1 + bias]]
    dims = "b h w c, b y x n -> i j d k" + (", m" if bias else "")
    return _call("kernel_grad", dims, result, image, g, padding=padding, stride=stride, groups=groups)


def matmul(
    a: Float[Array, "_ _"],
    b: Float[Array, "_ _"],
    dims: str,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    dtype: DTypeLike | None = None,
) -> Float[Array, "_ _"]:
    """Returns a · b, with each operand optionally transposed first.

    Args:
      a, b: of one dtype, float32 or bfloat16.
      dims: names of the dimensions, see `divided`, such as "b n, n p -> b p".
      dtype: dtype of the result; by default that of the operands.
    """
    shape = (a.shape[1 if transpose_a else 0], b.shape[0 if transpose_b else 1])
    result = jax.ShapeDtypeStruct(shape, dtype or a.dtype)
    return _call("matmul", dims, result, a, b, transpose_a=transpose_a, transpose_b=transpose_b)


def _call(kind: str, dims: str, result: Any, *operands: Array, **config: Any) -> Any:
    """Calls the handler `kind` of kernels.c. For `dims` see `divided`.

    Raises:
      RuntimeError: oneDNN is not available.
    """
    found = required_kernels()
    if any(x.size == 0 for x in operands):  # Sums over nothing.
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), result)
    operands = tuple(x if x.dtype in DTYPES else x.astype(jnp.float32) for x in operands)
    if operands[0].dtype == jnp.bfloat16 and not found.bfloat16:
        wide = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), result)
        y = _call(kind, dims, wide, *(x.astype(jnp.float32) for x in operands), **config)
        return jax.tree.map(lambda y, x: y.astype(x.dtype), y, result)
    (top, bottom), (left, right) = config.get("padding", ((0, 0), (0, 0)))
    values = [KINDS.index(kind), config.get("stride", 1), config.get("groups", 1), top, bottom, left, right]
    values += [config.get(name, False) for name in ("relu", "transpose_a", "transpose_b")]
    numbers = np.array(values, np.int64)  # As in kernels.c.

    def call(*operands: Array) -> Any:
        shapes = result
        if "-> b" in dims:  # A part of the batch, or more than one.
            shapes = jax.ShapeDtypeStruct((operands[0].shape[0], *result.shape[1:]), result.dtype)
        return jax.ffi.ffi_call(f"cnnjax_{kind}", shapes)(*operands, config=numbers)

    return without_derivative(divided(call, dims, numbers))(*operands)
