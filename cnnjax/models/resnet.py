"""Residual networks."""

from functools import partial, reduce
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cnnjax.errors import check_name
from cnnjax.fields import check_fields
from cnnjax.layers.blocks import ConvNorm, Head
from cnnjax.layers.derivatives import in_plain_operations
from cnnjax.models.mlp import DTYPES
from cnnjax.models.torch_names import Names, conv_norm_names, head_names, variables_from_torch
from cnnjax.typing import AnyArray, Preprocessing, PublishedWeights

WIDTHS = (64, 128, 256, 512)
RESNET18_DEPTH, RESNET50_DEPTH = (2, 2, 2, 2), (3, 4, 6, 3)  # Blocks of each width.
# The values of torchvision and timm, in units of pixels.
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


class ResNet18(nn.Module):
    """A 7×7 convolution, a max-pool, eight residual blocks of two 3×3 convolutions, and the logits.

    Sources: He et al., "Deep residual learning for image recognition" (2015); torchvision's resnet18.
    """

    num_classes: int = 10
    """Number of classes; set from the data."""
    weights: str | None = None
    """Initial weights: imagenet, the path of a .safetensors or .pth file, or hf:OWNER/NAME of the Hugging Face hub."""
    update_stats: bool = True
    """Normalize by the statistics of each batch in training, and average them; false: keep and use the averages."""
    dtype: str = "float32"
    """float32, bfloat16 or float16: dtype of the activations. Parameters, statistics and logits are float32.
    Gradients are not scaled, so small ones underflow in float16: prefer bfloat16."""
    plain: bool = False
    """Use plain XLA operations, which every transformation of JAX supports, instead of faster kernels."""
    zero_init: bool = False
    """Initialize the last scale of each block with 0, so that blocks begin as the identity (Goyal et al. 2017)."""

    image_size: ClassVar[int] = 224
    preprocessing: ClassVar[Preprocessing] = Preprocessing(224, IMAGENET_MEAN, IMAGENET_STD, "bilinear")
    imagenet: ClassVar[PublishedWeights] = PublishedWeights("hf:timm/resnet18.tv_in1k", "BSD-3-Clause")
    timm_name: ClassVar[str] = "resnet18"

    def __post_init__(self) -> None:
        check_fields(self, "model")
        check_name("model.dtype", self.dtype, DTYPES)
        super().__post_init__()

    @nn.compact
    def __call__(self, image: Float[AnyArray, "B H W C"], *, train: bool) -> Float[Array, "B K"]:
        """Returns logits; needs no key."""
        return _logits(self, BasicBlock, RESNET18_DEPTH, image, train)

    def depths(self) -> tuple[str, ...]:
        """Returns the top-level names of the parameters, from the input to the head."""
        return _depths(RESNET18_DEPTH)

    def variables_from_torch(self, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
        """Returns the variables that hold torchvision's or timm's tensors, see `torch_names.variables_from_torch`."""
        return variables_from_torch(self, tensors, _torch_names(RESNET18_DEPTH, 2))


class ResNet50(nn.Module):
    """A 7×7 convolution, a max-pool, sixteen residual blocks of 1×1, 3×3 and 1×1 convolutions, and the logits.

    The 3×3 convolutions have the stride, as in torchvision (version 1.5), not the first 1×1 convolutions.

    Sources: He et al., "Deep residual learning for image recognition" (2015); torchvision's resnet50.
    """

    num_classes: int = 10
    """Number of classes; set from the data."""
    weights: str | None = None
    """Initial weights: imagenet, the path of a .safetensors or .pth file, or hf:OWNER/NAME of the Hugging Face hub."""
    update_stats: bool = True
    """Normalize by the statistics of each batch in training, and average them; false: keep and use the averages."""
    dtype: str = "float32"
    """float32, bfloat16 or float16: dtype of the activations. Parameters, statistics and logits are float32.
    Gradients are not scaled, so small ones underflow in float16: prefer bfloat16."""
    plain: bool = False
    """Use plain XLA operations, which every transformation of JAX supports, instead of faster kernels."""
    zero_init: bool = False
    """Initialize the last scale of each block with 0, so that blocks begin as the identity (Goyal et al. 2017)."""

    image_size: ClassVar[int] = 224
    preprocessing: ClassVar[Preprocessing] = Preprocessing(224, IMAGENET_MEAN, IMAGENET_STD, "bilinear")
    imagenet: ClassVar[PublishedWeights] = PublishedWeights("hf:timm/resnet50.tv_in1k", "BSD-3-Clause")
    timm_name: ClassVar[str] = "resnet50"

    def __post_init__(self) -> None:
        check_fields(self, "model")
        check_name("model.dtype", self.dtype, DTYPES)
        super().__post_init__()

    @nn.compact
    def __call__(self, image: Float[AnyArray, "B H W C"], *, train: bool) -> Float[Array, "B K"]:
        """Returns logits; needs no key."""
        return _logits(self, Bottleneck, RESNET50_DEPTH, image, train)

    def depths(self) -> tuple[str, ...]:
        """Returns the top-level names of the parameters, from the input to the head."""
        return _depths(RESNET50_DEPTH)

    def variables_from_torch(self, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
        """Returns the variables that hold torchvision's or timm's tensors, see `torch_names.variables_from_torch`."""
        return variables_from_torch(self, tensors, _torch_names(RESNET50_DEPTH, 3))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with a residual connection."""

    width: int
    stride: int
    update_stats: bool
    plain: bool
    zero_init: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], *, train: bool) -> Float[Array, "B H2 W2 K"]:
        """Returns the features, K = width."""
        conv = partial(ConvNorm, self.width, update_stats=self.update_stats, plain=self.plain)
        y = conv(stride=self.stride, name="conv_0")(x, train=train)
        y = conv(relu=None, zero_init=self.zero_init, name="conv_1")(y, train=train)
        if x.shape != y.shape:
            x = conv(1, self.stride, relu=None, name="shortcut")(x, train=train)
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions with a residual connection."""

    width: int
    stride: int
    update_stats: bool
    plain: bool
    zero_init: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], *, train: bool) -> Float[Array, "B H2 W2 K"]:
        """Returns the features, K = 4 · width."""
        conv = partial(ConvNorm, update_stats=self.update_stats, plain=self.plain)
        y = conv(self.width, 1, name="conv_0")(x, train=train)
        y = conv(self.width, 3, self.stride, name="conv_1")(y, train=train)
        y = conv(4 * self.width, 1, relu=None, zero_init=self.zero_init, name="conv_2")(y, train=train)
        if x.shape != y.shape:
            x = conv(4 * self.width, 1, self.stride, relu=None, name="shortcut")(x, train=train)
        return nn.relu(x + y)


def _logits(model: Any, block: Any, depth: tuple[int, ...], image: AnyArray, train: bool) -> Array:
    """Applies a residual network with `depth` blocks of each width."""
    options = {"update_stats": model.update_stats, "plain": model.plain}
    x = jnp.asarray(image, model.dtype)
    x = ConvNorm(64, 7, 2, **options, name="stem")(x, train=train)  # [B H W C] -> [B H/2 W/2 64]
    x = max_pool_3x3(x)  # [B H/4 W/4 64]
    for i, (width, stride) in enumerate(_blocks(depth)):
        x = block(width, stride, **options, zero_init=model.zero_init, name=f"block_{i}")(x, train=train)
    x = x.astype(jnp.float32).mean((1, 2))  # [B H/32 W/32 N] -> [B N]
    model.sow("intermediates", "pooled", x)
    return Head(model.num_classes, model.plain, name="head")(x)


def _blocks(depth: tuple[int, ...]) -> list[tuple[int, int]]:
    """Returns the width and the stride of each block."""
    first = [(width, 1 if width == 64 else 2) for width in WIDTHS]
    return [(width, stride if j == 0 else 1) for (width, stride), n in zip(first, depth, strict=True) for j in range(n)]


def _depths(depth: tuple[int, ...]) -> tuple[str, ...]:
    return ("stem", *(f"block_{i}" for i in range(sum(depth))), "head")


def _torch_names(depth: tuple[int, ...], convolutions: int) -> Names:
    names = conv_norm_names(("stem",), "conv1", "bn1")
    places = [(group, j) for group, n in enumerate(depth, 1) for j in range(n)]
    for i, (group, j) in enumerate(places):
        torch = f"layer{group}.{j}."
        for k in range(convolutions):
            names |= conv_norm_names((f"block_{i}", f"conv_{k}"), f"{torch}conv{k + 1}", f"{torch}bn{k + 1}")
        if j == 0 and (group > 1 or convolutions == 3):  # The number of channels changes.
            names |= conv_norm_names((f"block_{i}", "shortcut"), f"{torch}downsample.0", f"{torch}downsample.1")
    return names | head_names(("head",), "fc")


def max_pool_3x3(x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
    """Returns the maximum of 3×3 windows with stride 2, and one pixel of padding on each side.

    Maxima of slices, in float32, because the gradient of `nn.max_pool` is slow on a CPU.
    """
    if in_plain_operations():
        padding: Any = ((1, 1), (1, 1))  # Flax's annotation only has its names.
        return nn.max_pool(x, (3, 3), (2, 2), padding)
    dtype = x.dtype
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    h, w = (x.shape[1] - 1) // 2, (x.shape[2] - 1) // 2
    x = reduce(jnp.maximum, (x[:, i : i + 2 * h - 1 : 2] for i in range(3)))  # [B H+2 W+2 C] -> [B H/2 W+2 C]
    return reduce(jnp.maximum, (x[:, :, i : i + 2 * w - 1 : 2] for i in range(3))).astype(dtype)
