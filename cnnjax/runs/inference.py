"""The outputs of a trained network for images in memory, in batches of one size: one program for any number."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from cnnjax.compiler import jit
from cnnjax.config import word
from cnnjax.data.batches import Standardization, standardize
from cnnjax.errors import UserError
from cnnjax.network import Network, layers_of, logits_of
from cnnjax.state import TrainState, eval_params
from cnnjax.step import apply_views
from cnnjax.typing import AnyArray, Batch

BATCH_SIZE, LARGE_BATCH_SIZE = 128, 8  # Images per call of a network; the latter above 64 by 64 pixels.


def batch_size_of(image_shape: tuple[int, ...]) -> int:
    """Returns the number of images (H, W, C) per call of a network."""
    return BATCH_SIZE if image_shape[0] * image_shape[1] <= 64 * 64 else LARGE_BATCH_SIZE


def in_batches(
    fn: Callable[[UInt8[np.ndarray, "B H W C"], Bool[np.ndarray, " B"]], Float[Array, "B ..."]],
    images: UInt8[np.ndarray, "N H W C"],
) -> Float[np.ndarray, "N ..."]:
    """Returns the results of `fn(image, mask)` for all images; `mask` is False for the padding of the last batch."""
    batch_size, parts = batch_size_of(images.shape[1:]), []
    for i in range(0, max(len(images), 1), batch_size):
        part = images[i : i + batch_size]
        padding = [(0, batch_size - len(part)), (0, 0), (0, 0), (0, 0)]
        mask = np.arange(batch_size) < len(part)
        parts.append(np.asarray(fn(np.pad(part, padding), mask))[: len(part)])
    return np.concatenate(parts)


@jit(static_argnames=("model", "tta", "softmax"))
def outputs_of(
    state: TrainState,
    standardization: Standardization,
    image: UInt8[AnyArray, "B H W C"],
    mask: Bool[AnyArray, " B"],
    *,
    model: Network,
    tta: str,
    softmax: bool,
) -> Float[Array, "B K"]:
    """Returns the logits, or with `softmax` the probability of each class; see `Run.predict`.

    Args:
      mask: False for padding.
    """
    batch = Batch(standardize(image, standardization), jnp.zeros(len(image), jnp.int32), mask)
    logits = logits_of(apply_views(state, batch, model, tta)).astype(jnp.float32)
    return jax.nn.softmax(logits) if softmax else logits


@jit(static_argnames=("model", "layer"))
def features_of(
    state: TrainState,
    standardization: Standardization,
    image: UInt8[AnyArray, "B H W C"],
    mask: Bool[AnyArray, " B"],
    *,
    model: Network,
    layer: str,
) -> Float[Array, "B ..."]:
    """Returns the output of a layer; see `Run.features`."""
    if not isinstance(model, nn.Module):
        raise UserError(f"`layer` must be a part of a Linen module, got a run of {word(type(model))}.")
    found = layers_of(model, eval_params(state), state.model_state, standardize(image, standardization))
    if layer not in found:
        raise UserError(f"`layer` must be one of {', '.join(found)}, got {layer!r}.")
    return found[layer].astype(jnp.float32)
