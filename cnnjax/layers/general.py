"""A convolution with the signature of `jax.lax.conv_general_dilated`, for any network."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from cnnjax.layers.depthwise import depthwise_conv2d, strided_conv2d
from cnnjax.typing import Padding


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
    """Returns `jax.lax.conv_general_dilated` of the same arguments, faster on a CPU for the usual kinds of convolution.

    These are two-dimensional convolutions in float32, bfloat16 or float16 of images [B H W C] with kernels [I J C K]
    or, depthwise, [I J 1 C], with the same stride in both directions, less padding than kernel, and no dilation.
    Others, and all of them on an accelerator, are computed by XLA. The results are equal up to rounding. The fast kinds
    support neither forward mode nor second derivatives.

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
    if not (isinstance(padding, str) or {*(lhs_dilation or ())} - {1}):
        lhs, padding = _crop(lhs, rhs, padding, dimension_numbers)
    given = {name: value for name, value in options.items() if value not in (None, 1)}
    dilated = {*(lhs_dilation or ()), *(rhs_dilation or ())} - {1}
    pads = None
    if jax.default_backend() == "cpu" and jnp.ndim(lhs) == jnp.ndim(rhs) == 4 and not (given or dilated):
        numbers, groups = dimension_numbers, feature_group_count
        pads = _usual_padding(lhs, rhs, window_strides, padding, numbers=numbers, groups=groups)
    if pads is None:
        others = (lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count)
        return lax.conv_general_dilated(lhs, rhs, window_strides, padding, *others, **options)
    kernel = rhs.astype(jnp.float32)  # Rounded back by the layers; its gradient gets the dtype of `rhs`.
    if feature_group_count > 1:
        return depthwise_conv2d(lhs, kernel[:, :, 0], pads, window_strides[0])
    return strided_conv2d(lhs, kernel, pads, window_strides[0])


def _is_pairs(padding: Any) -> bool:
    """Returns whether padding is a sequence of pairs of integers; jax refuses anything else."""
    kinds = (Sequence, np.ndarray)
    return isinstance(padding, kinds) and all(
        isinstance(pad, kinds) and len(pad) == 2 and all(isinstance(p, Integral) for p in pad) for pad in padding
    )


def _crop(
    lhs: Float[Array, "..."], rhs: Float[Array, "..."], padding: Any, dimension_numbers: Any
) -> tuple[Float[Array, "..."], Any]:
    """Crops images by the negative part of the padding; returns them with the rest of the padding.

    On a CPU XLA reads beyond the end of the images if the padding is negative (seen with jax 0.10).
    """
    if not _is_pairs(padding) or len(padding) != jnp.ndim(lhs) - 2 or min(map(min, padding), default=0) >= 0:
        return lhs, padding
    pads = [*padding]
    axes = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers).lhs_spec[2:]
    removed = dict(zip(axes, [tuple(min(int(p), 0) for p in pad) for pad in pads], strict=True))
    if any(lhs.shape[axis] + sum(pad) < 0 for axis, pad in removed.items()):
        return lhs, padding
    rest = [tuple(max(int(p), 0) for p in pad) for pad in pads]
    config: Any = [(*removed.get(axis, (0, 0)), 0) for axis in range(lhs.ndim)]
    return lax.pad(lhs, jnp.zeros((), lhs.dtype), config), rest


def _usual_padding(
    lhs: Float[Array, "..."], rhs: Float[Array, "..."], strides: Any, padding: Any, *, numbers: Any, groups: int
) -> Padding | None:
    """Returns the padding of a convolution of a usual kind; None for any other, and for arguments that jax refuses."""
    usual_numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, ("NHWC", "HWIO", "NHWC"))
    if lax.conv_dimension_numbers(lhs.shape, rhs.shape, numbers) != usual_numbers:
        return None
    (_, h, w, c), (i, j, per_group, k) = lhs.shape, rhs.shape
    fits = (groups == 1 and per_group == c) or (groups == c == k and per_group == 1)
    fits = fits and lhs.dtype == rhs.dtype and lhs.dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
    some = min(*lhs.shape, *rhs.shape) > 0
    if not (fits and some and len(strides) == 2 and strides[0] == strides[1] >= 1):
        return None
    if isinstance(padding, str):
        padding = lax.padtype_to_pads((h, w), (i, j), strides, padding)
    if not _is_pairs(padding):
        return None
    for n, size, pad in zip((h, w), (i, j), padding, strict=False):
        if not (min(pad) >= 0 and max(pad) < size <= n + sum(pad)):
            return None
    if len(padding) != 2:
        return None
    (top, bottom), (left, right) = padding
    return (int(top), int(bottom)), (int(left), int(right))
