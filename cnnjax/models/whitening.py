"""Whitening initialisation: the first convolution of a `SpeedNet` decorrelates the patches of the training images."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from cnnjax.errors import UserError
from cnnjax.step import TrainState
from cnnjax.typing import AnyArray

NUM_IMAGES, EPSILON = 5000, 5e-4  # Keller Jordan (2024), "94% on CIFAR-10 in 3.29 seconds", section 3.1.
BLOCK = 500  # Images whose patches, which are large, are in memory at a time.


@jax.jit
def patch_covariance(image: Float[AnyArray, "N H W C"]) -> Float[Array, "P P"]:
    """Returns the mean product of any two of the P = 4C values of a 2×2 patch, flattened as a kernel [2 2 C] is."""
    h, w = image.shape[1] - 1, image.shape[2] - 1

    def of_one(image: Float[Array, "H W C"]) -> Float[Array, "P P"]:
        patches = jnp.concatenate([image[i : i + h, j : j + w] for i in range(2) for j in range(2)], axis=-1)
        patches = patches.reshape(h * w, -1)  # [H-1 W-1 4C] -> [(H-1)*(W-1) 4C]
        return jnp.matmul(patches.T, patches, precision="highest") / len(patches)

    return lax.map(of_one, jnp.asarray(image), batch_size=BLOCK).mean(0)


def whitening_kernel(image: Float[AnyArray, "N H W C"]) -> Float[np.ndarray, "2 2 C K"]:
    """Returns 2×2 filters, K = 8C: the eigenvectors of the patches' covariance, and their negatives.

    Each is scaled so that its feature has deviation 1. Waits for the device: the eigenvectors are found on the host.
    """
    values, vectors = np.linalg.eigh(np.asarray(patch_covariance(image), np.float64))
    filters = vectors / np.sqrt(values + EPSILON)  # [4C 4C], a filter a column
    filters = filters.reshape(2, 2, image.shape[-1], -1)
    return np.concatenate([filters, -filters], axis=-1).astype(np.float32)


def whiten(state: TrainState, image: Float[AnyArray, "N H W C"]) -> TrainState:
    """Returns the first state of a `SpeedNet` with its whitening kernel set.

    Args:
      image: standardized training images, of the channels that the network was made for; the first 5,000 count.

    Raises:
      UserError: the state is of another network, or of images with other channels.
    """
    if "whiten" not in state.batch_stats:
        raise UserError(f"`state` must be of a SpeedNet, got one with batch_stats of {sorted(state.batch_stats)}.")
    kernel: Array = jnp.asarray(whitening_kernel(image[:NUM_IMAGES]))
    if kernel.shape != (wanted := state.batch_stats["whiten"]["kernel"]).shape:
        channels = wanted.shape[2]
        raise UserError(f"`image` must have the {channels} channels of the network, got shape {image.shape}.")
    return state._replace(batch_stats={**state.batch_stats, "whiten": {"kernel": kernel}})
