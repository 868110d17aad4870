"""The network of the CIFAR-10 speed records, with its whitening."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from cnnjax.compiler import jit
from cnnjax.errors import ArgumentError, UserError, check, check_name
from cnnjax.fields import check_fields
from cnnjax.layers.conv import conv2d, plain_conv2d
from cnnjax.layers.modules import Conv
from cnnjax.layers.norm import NormGelu
from cnnjax.layers.ops import gelu, max_pool_2x2, plain_gelu, plain_max_pool_2x2
from cnnjax.models.mlp import DTYPES
from cnnjax.typing import AnyArray

EPSILON = 5e-4  # Keller Jordan (2024), "94% on CIFAR-10 in 3.29 seconds", section 3.1.
BLOCK = 500  # Number of images whose patches, which are large, are in memory at a time.


class SpeedNet(nn.Module):
    """A whitening convolution, three groups of convolutions, and the logits.

    Convolutions have no bias if a norm follows, and are initialized to the identity on their first channels. The
    whitening kernel is a statistic of the training images, not a parameter: `init` returns it without filters, and
    `init_from_data` sets it.

    Source: Keller Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU" (2024), sections 3 and A.
    """

    image_size = 32  # For a folder of images.

    num_classes: int = 10
    """Number of classes; set from the data."""
    widths: tuple[int, ...] = (64, 256, 256)
    """Channels of each group of convolutions."""
    depth: int = 2
    """Convolutions per group: 2, or 3 with a residual connection around the last two."""
    dtype: str = "float32"
    """float32, bfloat16 or float16: dtype of the activations. Parameters, statistics and logits are float32.
    Gradients are not scaled, so small ones underflow in float16: prefer bfloat16."""
    plain: bool = False
    """Use plain XLA operations, which every transformation of JAX supports, instead of faster kernels."""

    def __post_init__(self) -> None:
        check_fields(self, "model")
        check_name("model.dtype", self.dtype, DTYPES)
        valid = len(self.widths) == 3 and min(self.widths) >= 1
        check("model.widths", "3 numbers of at least 1", valid, self.widths)
        check("model.widths", "below 2**31", max(self.widths) < 2**31, self.widths)
        check("model.depth", "2 or 3", self.depth in (2, 3), self.depth)
        super().__post_init__()

    @nn.compact
    def __call__(self, image: Float[AnyArray, "B H W C"], *, train: bool) -> Float[Array, "B K"]:
        """Returns logits; needs no key.

        Raises:
          ValueError: `init_from_data` has not set the whitening kernel.
        """
        if min(image.shape[1:3]) < 9:
            size = f"{image.shape[1]}×{image.shape[2]}"
            raise UserError(f"Images must have at least 9×9 pixels for SpeedNet, got {size}.")
        activate, pool = (plain_gelu, plain_max_pool_2x2) if self.plain else (gelu, max_pool_2x2)
        conv, norm = partial(SpeedConv, plain=self.plain), partial(NormGelu, plain=self.plain)
        x = Whiten(plain=self.plain, name="whiten")(jnp.asarray(image, self.dtype))  # [B H W C] -> [B H-1 W-1 8C]
        x = activate(x)
        for width in self.widths:
            x = pool(conv(width, even=True)(x))
            x = residual = norm()(x, train=train)
            for i in range(1, self.depth):
                x = norm()(conv(width)(x), residual if i == 2 else None, train=train)
        x = x.max(axis=(1, 2))  # [B 3 3 K] -> [B K], at CIFAR's size
        self.sow("intermediates", "pooled", x)
        kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # As in PyTorch's linear layers.
        head = self.param("head", kernel_init, (x.shape[-1], self.num_classes), jnp.float32)
        return x.astype(jnp.float32) @ head / 9

    def init_from_data(self, variables: dict[str, Any], image: Float[AnyArray, "N H W C"]) -> dict[str, Any]:
        """Returns the initial variables with the whitening kernel of `image`, standardized training images.

        Raises:
          UserError: the images have other channels than the network was initialized with.
        """
        statistics = variables["batch_stats"]
        if image.shape[-1] != (expected := statistics["whiten"]["kernel"].shape[2]):
            raise UserError(f"`image` must have the network's {expected} channels, got shape {image.shape}.")
        kernel = jnp.asarray(whitening_kernel(image))  # [2 2 C 8C]
        return {**variables, "batch_stats": {**statistics, "whiten": {"kernel": kernel}}}


class Whiten(nn.Module):
    """The whitening convolution: 2×2, without padding, with a fixed kernel and a trainable bias."""

    plain: bool = False

    @nn.compact
    def __call__(self, image: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 K"]:
        """Returns the features, K = 8C."""
        channels = image.shape[-1]
        shape = (2, 2, channels, 8 * channels)
        kernel = self.variable("batch_stats", "kernel", jnp.zeros, (2, 2, channels, 0), jnp.float32).value
        if self.is_initializing():
            kernel = jnp.zeros(shape, jnp.float32)
        elif kernel.shape != shape:
            raise ArgumentError(
                f"`model` must be whitened: the shape of its whitening kernel must be {shape} for these images, got "
                f"{kernel.shape}. Call `init_from_data(state, images, model=model, tx=tx)`."
            )
        bias = self.param("bias", nn.initializers.zeros_init(), shape[-1:], jnp.float32)
        return (plain_conv2d if self.plain else conv2d)(image, kernel, bias, ((0, 0), (0, 0)), False)


def identity_init(key: Key[Array, ""], shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Initializes a kernel [I J C K]: its first C filters are the identity, the others uniform as in PyTorch.

    Source: Keller Jordan (2024), section 3.2.
    """
    i, j, c, k = shape
    kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")(key, shape, dtype)
    n = min(c, k)
    identity = jnp.zeros((i, j, c, n), dtype).at[i // 2, j // 2, jnp.arange(n), jnp.arange(n)].set(1)
    return kernel.at[..., :n].set(identity)


SpeedConv = partial(Conv, use_bias=False, kernel_init=identity_init)


@jit
def patch_covariance(image: Float[AnyArray, "N H W C"]) -> Float[Array, "P P"]:
    """Returns the mean product of each two of the P = 4C values of a 2×2 patch, flattened like a kernel [2 2 C]."""
    h, w = image.shape[1] - 1, image.shape[2] - 1

    def of_one(image: Float[Array, "H W C"]) -> Float[Array, "P P"]:
        patches = jnp.concatenate([image[i : i + h, j : j + w] for i in range(2) for j in range(2)], axis=-1)
        patches = patches.reshape(h * w, -1)  # [H-1 W-1 4C] -> [(H-1)*(W-1) 4C]
        return jnp.matmul(patches.T, patches, precision="highest") / len(patches)

    return lax.map(of_one, jnp.asarray(image), batch_size=BLOCK).mean(0)


def whitening_kernel(image: Float[AnyArray, "N H W C"]) -> Float[AnyArray, "2 2 C K"]:
    """Returns 2×2 filters, K = 8C: the eigenvectors of the patches' covariance, and their negatives.

    Each is scaled so that its feature has variance 1. The eigenvectors are computed on the host, in float64. Waits for
    the device, except if `image` is traced.
    """
    channels = image.shape[-1]

    def of_covariance(covariance: Float[AnyArray, "P P"]) -> Float[np.ndarray, "2 2 C K"]:
        values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))
        filters = vectors / np.sqrt(values + EPSILON)  # [4C 4C], one filter per column
        filters = filters.reshape(2, 2, channels, -1)
        return np.concatenate([filters, -filters], axis=-1).astype(np.float32)

    covariance = patch_covariance(image)
    if not isinstance(covariance, Tracer):
        return of_covariance(covariance)
    result = jax.ShapeDtypeStruct((2, 2, channels, 8 * channels), jnp.float32)
    return jax.pure_callback(of_covariance, result, covariance, vmap_method="sequential")
