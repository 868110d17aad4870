"""Flax modules of `conv2d`, `dense` and `dropout`, with float32 parameters named as in Flax's own modules.

With `plain`, they use plain XLA operations, which every transformation of JAX supports.
"""

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.initializers import Initializer
from jaxtyping import Array, Float

from cnnjax.layers.conv import conv2d, plain_conv2d
from cnnjax.layers.ops import dense, dropout, plain_dense
from cnnjax.typing import AnyArray

GLOROT_UNIFORM = nn.initializers.glorot_uniform()


class Conv(nn.Module):
    """A size-preserving convolution of stride 1 with an optional ReLU, in the dtype of its input.

    With `even`, an odd last row or column of the output is not computed: a 2×2 pool would ignore it.
    """

    features: int
    kernel_size: int = 3  # Height and width.
    use_bias: bool = True
    relu: bool = False
    even: bool = False
    kernel_init: Initializer = GLOROT_UNIFORM
    plain: bool = False

    @nn.compact
    def __call__(self, image: Float[AnyArray, "B H W C"]) -> Float[Array, "B H2 W2 K"]:
        """Returns the features."""
        size = self.kernel_size
        kernel = self.param("kernel", self.kernel_init, (size, size, image.shape[-1], self.features), jnp.float32)
        zeros = nn.initializers.zeros_init()
        bias = self.param("bias", zeros, (self.features,), jnp.float32) if self.use_bias else None
        low, high = (size - 1) // 2, size // 2
        odd = [n % 2 if self.even else 0 for n in image.shape[1:3]]
        if size == 1:  # No padding that could be reduced: crop the image instead.
            image, odd = image[:, : image.shape[1] - odd[0], : image.shape[2] - odd[1]], [0, 0]
        top_bottom, left_right = ((low, high - n) for n in odd)
        convolve = plain_conv2d if self.plain else conv2d
        return convolve(image, kernel, bias, (top_bottom, left_right), self.relu)


class Dense(nn.Module):
    """A dense layer in the dtype of its input."""

    features: int
    kernel_init: Initializer = GLOROT_UNIFORM
    plain: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B N"]) -> Float[Array, "B P"]:
        """Returns the features."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
        return (plain_dense if self.plain else dense)(x, kernel) + bias.astype(x.dtype)[None]  # [P] -> [1 P]


class Dropout(nn.Module):
    """Applies `dropout` in training."""

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "..."], *, train: bool) -> Float[Array, "..."]:
        """Returns `x` with dropped units; consumes the "dropout" key if `train` is true and `rate` is not 0."""
        return dropout(self.make_rng("dropout"), x, self.rate) if train and self.rate else x
