"""The convolution of the networks of this package for any network: with the signature of `lax.conv_general_dilated`."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cnnjax.layers.depthwise import depthwise_conv2d, strided_conv2d

_NHWC = ("NHWC", "HWIO", "NHWC")


def conv_general_dilated(  # noqa: PLR0917  As in jax.
    lhs: Float[Array, "..."],
    rhs: Float[Array, "..."],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    **options: Any,
) -> Float[Array, "..."]:
    """Returns `jax.lax.conv_general_dilated` of the same arguments, faster on a CPU if it is one of the usual kinds.

    These are, in float32, bfloat16 or float16: two-dimensional convolutions of images [B H W C] with kernels [I J C K]
    or, depthwise, [I J 1 C], with the same stride in both directions and without dilation. Others, and all of them on
    an accelerator, are computed by XLA. The result is equal to rounding. The fast ones have gradients of first order in
    reverse mode only.

    Example:
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, image):
      ...         x = nn.Conv(32, (3, 3), conv_general_dilated=conv_general_dilated)(image)
      ...         return nn.Dense(10)(nn.relu(x).mean((1, 2)))

    Args:
      lhs: the images.
      rhs: the kernel, of the same dtype.
      window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count, options: see
        `jax.lax.conv_general_dilated`.
    """
    dilations = {*(lhs_dilation or (1,)), *(rhs_dilation or (1,))}
    given = {name: value for name, value in options.items() if value not in (None, 1)}
    usual = (
        jax.default_backend() == "cpu"
        and jnp.ndim(lhs) == 4
        and lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        == lax.conv_dimension_numbers(lhs.shape, rhs.shape, _NHWC)
        and lhs.dtype == rhs.dtype
        and lhs.dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
        and dilations == {1}
        and len({*window_strides}) == 1
        and not given
    )
    depthwise = usual and feature_group_count > 1 and feature_group_count == lhs.shape[3] == rhs.shape[3]
    if not usual or not (feature_group_count == 1 or depthwise):
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            dimension_numbers,
            feature_group_count,
            **options,
        )
    stride = int(window_strides[0])
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], window_strides, padding)
    (top, bottom), (left, right) = padding
    pads = ((int(top), int(bottom)), (int(left), int(right)))
    kernel = rhs.astype(jnp.float32)  # Rounded back by the layers; its gradient gets the dtype of `rhs`.
    if depthwise:
        return depthwise_conv2d(lhs, kernel[:, :, 0], pads, stride)
    return strided_conv2d(lhs, kernel, pads, stride)
