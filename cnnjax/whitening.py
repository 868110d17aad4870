"""Whitening initialisation: the first convolution of a `SpeedNet` decorrelates the patches of the training images."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cnnjax.step import TrainState

NUM_IMAGES, EPSILON = 5000, 5e-4  # Keller Jordan (2024), "94% on CIFAR-10 in 3.29 seconds", section 3.1.


def whitening_kernel(image: Float[np.ndarray, "N H W C"]) -> Float[np.ndarray, "2 2 C K"]:
    """Returns 2×2 filters, K = 8C: the eigenvectors of the patches' covariance, and their negatives.

    Each is scaled so that its feature has deviation 1. In float64 on the host: the same on every device.
    """
    windows = np.lib.stride_tricks.sliding_window_view(image, (2, 2), axis=(1, 2))  # [N H-1 W-1 C 2 2]
    patches = windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, 4 * image.shape[-1]).astype(np.float64)  # [.. 2*2*C]
    values, vectors = np.linalg.eigh(patches.T @ patches / len(patches))
    filters = vectors / np.sqrt(values + EPSILON)  # [4C 4C], a filter a column
    filters = filters.reshape(2, 2, image.shape[-1], -1)
    return np.concatenate([filters, -filters], axis=-1).astype(np.float32)


def whiten(state: TrainState, image: Float[np.ndarray, "N H W C"]) -> TrainState:
    """Returns the first state of a `SpeedNet` with its whitening kernel set.

    Args:
      image: standardized training images; the first 5,000 count.
    """
    kernel: Array = jnp.asarray(whitening_kernel(image[:NUM_IMAGES]))
    return state._replace(params={**state.params, "whiten": {**state.params["whiten"], "kernel": kernel}})
