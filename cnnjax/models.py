"""The networks: Flax modules used as pure `init` and `apply` functions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.initializers import Initializer
from jaxtyping import Array, Float

from cnnjax.config import ModelConfig
from cnnjax.step import AnyArray

# Built once: a module is a static argument of the step, and two equal initializers built twice are not equal.
INITIALIZERS = {"glorot_uniform": nn.initializers.glorot_uniform(), "he_normal": nn.initializers.he_normal()}


class CNN(nn.Module):
    """The tutorial's network: two groups of two 3×3 convolutions and a max-pool, a hidden layer of 512, the classes.

    Source: Petar Veličković, "Deep learning for complete beginners: convolutional neural networks with keras" (2017).
    """

    num_classes: int
    conv_dropout: float = 0.25
    dense_dropout: float = 0.5
    kernel_init: Initializer = INITIALIZERS["glorot_uniform"]

    @nn.compact
    def __call__(self, image: Float[AnyArray, "B H W C"], *, train: bool) -> Float[Array, "B K"]:
        """Returns logits; consumes the "dropout" key where `train` is true."""
        x = image
        for features in (32, 64):
            x = nn.relu(nn.Conv(features, (3, 3), kernel_init=self.kernel_init)(x))
            x = nn.relu(nn.Conv(features, (3, 3), kernel_init=self.kernel_init)(x))
            x = max_pool_2x2(x)  # [B H W C] -> [B H/2 W/2 C]
            x = Dropout(self.conv_dropout)(x, train=train)
        x = x.reshape(x.shape[0], -1)  # [B H/4 W/4 64] -> [B H/4*W/4*64]
        x = nn.relu(nn.Dense(512, kernel_init=self.kernel_init)(x))
        x = Dropout(self.dense_dropout)(x, train=train)
        return nn.Dense(self.num_classes, kernel_init=INITIALIZERS["glorot_uniform"])(x)


class MLP(nn.Module):
    """The tutorial's first network: two hidden layers of 512, each with dropout.

    Source: Petar Veličković, "Deep learning for complete beginners: recognising handwritten digits" (2017).
    """

    num_classes: int
    dense_dropout: float = 0.5
    kernel_init: Initializer = INITIALIZERS["glorot_uniform"]

    @nn.compact
    def __call__(self, image: Float[AnyArray, "B H W C"], *, train: bool) -> Float[Array, "B K"]:
        """Returns logits; consumes the "dropout" key where `train` is true."""
        x = image.reshape(image.shape[0], -1)  # [B H W C] -> [B H*W*C]
        for _ in range(2):
            x = nn.relu(nn.Dense(512, kernel_init=self.kernel_init)(x))
            x = Dropout(self.dense_dropout)(x, train=train)
        return nn.Dense(self.num_classes, kernel_init=INITIALIZERS["glorot_uniform"])(x)


def make_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """Returns the network that `config` names, for `num_classes` classes and images of any size."""
    kernel_init = INITIALIZERS[config.kernel_init]
    if config.name == "mlp":
        return MLP(num_classes, config.dense_dropout, kernel_init)
    return CNN(num_classes, config.conv_dropout, config.dense_dropout, kernel_init)


def max_pool_2x2(x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
    """Returns the maximum of each 2×2 window; a last odd row or column is left out.

    Equals `nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))`. Its gradient is two comparisons instead of a scatter,
    which CPUs do faster (see experiments/BENCHMARKS.md); where values tie, they share the gradient.
    """
    b, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2 * c)  # [B H W C] -> [B H/2 2 W/2 2C]
    rows = jnp.maximum(x[:, :, 0], x[:, :, 1])  # [B H/2 W/2 2C]
    return jnp.maximum(rows[..., :c], rows[..., c:])


class Dropout(nn.Module):
    """Sets units to 0 with probability `rate`, rounded to a 256th, and scales the others to keep the mean.

    A random byte a unit decides instead of a random float: a quarter of the bits to draw.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "..."], *, train: bool) -> Float[Array, "..."]:
        """Returns `x` with units dropped; consumes the "dropout" key where `train` is true."""
        dropped = round(self.rate * 256)
        if dropped == 0 or not train:
            return x
        keep = jax.random.bits(self.make_rng("dropout"), x.shape, jnp.uint8) >= dropped
        return jnp.where(keep, x * (256 / (256 - dropped)), 0.0)
