"""The networks: Flax modules used as pure `init` and `apply` functions."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from cnnjax.config import ModelConfig
from cnnjax.errors import UserError
from cnnjax.layers.conv import conv2d
from cnnjax.layers.modules import GLOROT_UNIFORM, Conv, Dense, Dropout, gelu, max_pool_2x2
from cnnjax.layers.norm import NormGelu
from cnnjax.typing import AnyArray

# Built once: a module is a static argument of the step, and two equal initializers built twice are not equal.
INITIALIZERS = {"glorot_uniform": GLOROT_UNIFORM, "he_normal": nn.initializers.he_normal()}


class CNN(nn.Module):
    """The tutorial's network: two groups of two 3×3 convolutions and a max-pool, a hidden layer of 512, the classes.

    Source: Petar Veličković, "Deep learning for complete beginners: convolutional neural networks with keras" (2017).
    """

    num_classes: int
    conv_dropout: float = 0.25
    dense_dropout: float = 0.5
    kernel_init: Initializer = GLOROT_UNIFORM
    dtype: str = "float32"  # Of the activations; parameters and logits are float32.

    @nn.compact
    def __call__(self, image: Float[AnyArray, "B H W C"], *, train: bool) -> Float[Array, "B K"]:
        """Returns logits; consumes the "dropout" key where `train` is true."""
        x = jnp.asarray(image, self.dtype)
        for features in (32, 64):
            x = Conv(features, relu=True, kernel_init=self.kernel_init)(x)
            x = Conv(features, relu=True, kernel_init=self.kernel_init)(x)
            x = max_pool_2x2(x)  # [B H W C] -> [B H/2 W/2 C]
            x = Dropout(self.conv_dropout)(x, train=train)
        x = x.reshape(x.shape[0], -1)  # [B H/4 W/4 64] -> [B H/4*W/4*64]
        x = nn.relu(Dense(512, kernel_init=self.kernel_init)(x))
        x = Dropout(self.dense_dropout)(x, train=train)
        return Dense(self.num_classes)(x).astype(jnp.float32)


class MLP(nn.Module):
    """The tutorial's first network: two hidden layers of 512, each with dropout.

    Source: Petar Veličković, "Deep learning for complete beginners: recognising handwritten digits" (2017).
    """

    num_classes: int
    dense_dropout: float = 0.5
    kernel_init: Initializer = GLOROT_UNIFORM
    dtype: str = "float32"  # Of the activations; parameters and logits are float32.

    @nn.compact
    def __call__(self, image: Float[AnyArray, "B H W C"], *, train: bool) -> Float[Array, "B K"]:
        """Returns logits; consumes the "dropout" key where `train` is true."""
        x = jnp.asarray(image, self.dtype).reshape(image.shape[0], -1)  # [B H W C] -> [B H*W*C]
        for _ in range(2):
            x = nn.relu(Dense(512, kernel_init=self.kernel_init)(x))
            x = Dropout(self.dense_dropout)(x, train=train)
        return Dense(self.num_classes)(x).astype(jnp.float32)


class SpeedNet(nn.Module):
    """The network of the CIFAR-10 speed records: a whitening convolution, and three groups of convolutions.

    Convolutions have no bias where a norm follows, and begin as the identity of their first channels. The whitening
    kernel is a statistic of the training images, no parameter; `whitening.whiten` sets it.

    Source: Keller Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU" (2024), sections 3 and A.
    """

    num_classes: int
    widths: tuple[int, ...] = (64, 256, 256)
    depth: int = 2
    dtype: str = "float32"  # Of the activations; parameters, statistics and logits are float32.

    @nn.compact
    def __call__(self, image: Float[AnyArray, "B H W C"], *, train: bool) -> Float[Array, "B K"]:
        """Returns logits; needs no key."""
        x = Whiten(name="whiten")(jnp.asarray(image, self.dtype))  # [B H W C] -> [B H-1 W-1 8C]
        x = gelu(x)
        for width in self.widths:
            x = max_pool_2x2(SpeedConv(width, even=True)(x))
            x = residual = NormGelu()(x, train=train)
            for i in range(1, self.depth):
                x = NormGelu()(SpeedConv(width)(x), residual if i == 2 else None, train=train)
        x = x.max(axis=(1, 2))  # [B 3 3 K] -> [B K], at CIFAR's size
        kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # As PyTorch's linear layers.
        head = self.param("head", kernel_init, (x.shape[-1], self.num_classes))
        return x.astype(jnp.float32) @ head / 9


class Whiten(nn.Module):
    """The whitening convolution, 2×2 without padding: the kernel of `whitening.whitening_kernel`, a bias to train."""

    @nn.compact
    def __call__(self, image: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 K"]:
        """Returns the features, K = 8C."""
        features = 8 * image.shape[-1]
        kernel = self.variable("batch_stats", "kernel", jnp.zeros, (2, 2, image.shape[-1], features))
        bias = self.param("bias", nn.initializers.zeros_init(), (features,))
        return conv2d(image, kernel.value, bias, ((0, 0), (0, 0)), False)


def identity_init(key: Key[Array, ""], shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Initializes a kernel [I J C K]: its first C filters are the identity, the others uniform as PyTorch's.

    Source: Keller Jordan (2024), section 3.2.
    """
    i, j, c, k = shape
    kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")(key, shape, dtype)
    n = min(c, k)
    identity = jnp.zeros((i, j, c, n), dtype).at[i // 2, j // 2, jnp.arange(n), jnp.arange(n)].set(1)
    return kernel.at[..., :n].set(identity)


SpeedConv = partial(Conv, use_bias=False, kernel_init=identity_init)


def check_size(config: ModelConfig, image_shape: tuple[int, ...]) -> None:
    """Checks that images [H W C] are large enough for what the network that `config` names pools.

    Raises:
      UserError: they are not.
    """
    least = {"cnn": 4, "speednet": 9}.get(config.name, 1)
    if min(image_shape[:2]) < least:
        size = "×".join(map(str, image_shape[:2]))
        raise UserError(f"Images must have {least}×{least} pixels at least for `model.name` {config.name}, got {size}.")


def make_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """Returns the network that `config` names, for `num_classes` classes (see `check_size` for its images)."""
    if config.name == "speednet":
        return SpeedNet(num_classes, config.widths, config.depth, config.dtype)
    kernel_init = INITIALIZERS[config.kernel_init]
    if config.name == "mlp":
        return MLP(num_classes, config.dense_dropout, kernel_init, config.dtype)
    return CNN(num_classes, config.conv_dropout, config.dense_dropout, kernel_init, config.dtype)
