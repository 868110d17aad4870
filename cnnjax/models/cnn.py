"""The tutorial's convolutional network."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnnjax.errors import UserError, check, check_name
from cnnjax.fields import check_fields
from cnnjax.layers.modules import Conv, Dense, Dropout
from cnnjax.layers.ops import max_pool_2x2, plain_max_pool_2x2
from cnnjax.models.mlp import DTYPES, INITIALIZERS
from cnnjax.typing import AnyArray


class CNN(nn.Module):
    """Two groups of two 3×3 convolutions and a max-pool, a hidden layer of 512 units, and the logits.

    Source: Petar Veličković, "Deep learning for complete beginners: convolutional neural networks with keras" (2017).
    """

    image_size = 32  # For a folder of images.

    num_classes: int = 10
    """Number of classes; set from the data."""
    conv_dropout: float = 0.25
    """Dropout rate after each group of convolutions, rounded to a multiple of 1/256."""
    dense_dropout: float = 0.5
    """Dropout rate after the hidden layer, rounded to a multiple of 1/256."""
    kernel_init: str = "glorot_uniform"
    """Initializer of all kernels except the last: glorot_uniform (as in Keras) or he_normal."""
    dtype: str = "float32"
    """float32, bfloat16 or float16: dtype of the activations. Parameters, sums and logits are float32.
    Gradients are not scaled, so small ones underflow in float16: prefer bfloat16."""
    plain: bool = False
    """Use plain XLA operations, which every transformation of JAX supports, instead of faster kernels."""

    def __post_init__(self) -> None:
        check_fields(self, "model")
        check_name("model.dtype", self.dtype, DTYPES)
        check_name("model.kernel_init", self.kernel_init, INITIALIZERS)
        check("model.conv_dropout", "between 0 and 0.99", 0 <= self.conv_dropout <= 0.99, self.conv_dropout)
        check("model.dense_dropout", "between 0 and 0.99", 0 <= self.dense_dropout <= 0.99, self.dense_dropout)
        super().__post_init__()

    @nn.compact
    def __call__(self, image: Float[AnyArray, "B H W C"], *, train: bool) -> Float[Array, "B K"]:
        """Returns logits; consumes the "dropout" key if `train` is true."""
        if min(image.shape[1:3]) < 4:
            raise UserError(f"Images must have at least 4×4 pixels for CNN, got {image.shape[1]}×{image.shape[2]}.")
        kernel_init = INITIALIZERS[self.kernel_init]
        x = jnp.asarray(image, self.dtype)
        for features in (32, 64):
            x = Conv(features, relu=True, kernel_init=kernel_init, plain=self.plain)(x)
            x = Conv(features, relu=True, kernel_init=kernel_init, plain=self.plain)(x)
            x = (plain_max_pool_2x2 if self.plain else max_pool_2x2)(x)  # [B H W C] -> [B H/2 W/2 C]
            x = Dropout(self.conv_dropout)(x, train=train)
        x = x.reshape(x.shape[0], -1)  # [B H/4 W/4 64] -> [B H/4*W/4*64]
        self.sow("intermediates", "pooled", x)
        x = nn.relu(Dense(512, kernel_init=kernel_init, plain=self.plain)(x))
        x = Dropout(self.dense_dropout)(x, train=train)
        return Dense(self.num_classes, plain=self.plain)(x).astype(jnp.float32)
