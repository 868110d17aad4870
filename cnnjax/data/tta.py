"""Test-time augmentation: an image is scored by several views of it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from cnnjax.config import VIEWS
from cnnjax.errors import unknown_name
from cnnjax.typing import AnyArray


def mean_logits(
    logits_fn: Callable[[Any], Float[Array, "B K"]],
    image: Float[AnyArray, "B H W C"],
    views: str,
    mask: Bool[AnyArray, " B"] | None = None,
) -> Float[Array, "B K"]:
    """Returns the mean of the logits over views of each image.

    Args:
      logits_fn: of a batch of images.
      image: standardized.
      views: "plain", the image alone; "mirrored", it and its mirror image; "shifted", those two (a half of the mean),
        and those two moved by a pixel to the bottom right (a quarter) and to the top left (a quarter); "uncertain",
        these for the quarter of the batch (rounded up) whose most probable class is least probable, else "plain".
      mask: images that count; padding gets extra views only after all of them. All count when None.

    Raises:
      UserError: there are no such views.

    Source: Keller Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU" (2024), section 3.5; the last is of
    hiverge/cifar10-speedrun (2025).
    """
    if views not in VIEWS:
        raise unknown_name("views", views, VIEWS)
    if views == "plain":
        return logits_fn(image)
    if views == "uncertain":
        logits = logits_fn(image)
        doubt = -jnp.max(jax.nn.log_softmax(logits), axis=-1)
        doubt = doubt if mask is None else jnp.where(mask, doubt, -1.0)
        _, least = lax.top_k(doubt, -(-len(image) // 4))
        return logits.at[least].set(mean_logits(logits_fn, jnp.asarray(image)[least], "shifted"), unique_indices=True)

    def mirrored(image: Float[AnyArray, "B H W C"]) -> Float[Array, "B K"]:
        return (logits_fn(image) + logits_fn(image[:, :, ::-1])) / 2

    if views == "mirrored":
        return mirrored(image)
    _, h, w, _ = image.shape
    padded = jnp.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)), "reflect")
    return mirrored(image) / 2 + mirrored(padded[:, :h, :w]) / 4 + mirrored(padded[:, 2:, 2:]) / 4
