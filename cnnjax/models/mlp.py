"""The tutorial's first network."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnnjax.errors import check, check_name
from cnnjax.fields import check_fields
from cnnjax.layers.modules import GLOROT_UNIFORM, Dense, Dropout
from cnnjax.typing import AnyArray

DTYPES = ("float32", "bfloat16", "float16")
# Built once: two initializers with the same arguments are not equal, and modules are static arguments of the step.
INITIALIZERS = {"glorot_uniform": GLOROT_UNIFORM, "he_normal": nn.initializers.he_normal()}


class MLP(nn.Module):
    """Two hidden layers of 512 units with dropout.

    Source: Petar Veličković, "Deep learning for complete beginners: recognising handwritten digits" (2017).
    """

    image_size = 32  # For a folder of images.

    num_classes: int = 10
    """Number of classes; set from the data."""
    dense_dropout: float = 0.5
    """Dropout rate after each hidden layer, rounded to a multiple of 1/256."""
    kernel_init: str = "glorot_uniform"
    """Initializer of the hidden layers: glorot_uniform (as in Keras) or he_normal."""
    dtype: str = "float32"
    """float32, bfloat16 or float16: dtype of the activations. Parameters, sums and logits are float32.
    Gradients are not scaled, so small ones underflow in float16: prefer bfloat16."""
    plain: bool = False
    """Use plain XLA operations, which every transformation of JAX supports, instead of faster kernels."""

    def __post_init__(self) -> None:
        check_fields(self, "model")
        check_name("model.dtype", self.dtype, DTYPES)
        check_name("model.kernel_init", self.kernel_init, INITIALIZERS)
        check("model.dense_dropout", "between 0 and 0.99", 0 <= self.dense_dropout <= 0.99, self.dense_dropout)
        super().__post_init__()

    @nn.compact
    def __call__(self, image: Float[AnyArray, "B H W C"], *, train: bool) -> Float[Array, "B K"]:
        """Returns logits; consumes the "dropout" key if `train` is true."""
        x = jnp.asarray(image, self.dtype).reshape(image.shape[0], -1)  # [B H W C] -> [B H*W*C]
        for _ in range(2):
            x = nn.relu(Dense(512, kernel_init=INITIALIZERS[self.kernel_init], plain=self.plain)(x))
            x = Dropout(self.dense_dropout)(x, train=train)
        return Dense(self.num_classes, plain=self.plain)(x).astype(jnp.float32)
