"""Losses: functions of logits and a batch that return the loss of each example."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from cnnjax.errors import ArgumentError, check, describe_shapes
from cnnjax.fields import check_fields
from cnnjax.typing import BatchLike


def softmax_cross_entropy(logits: Float[Array, "B K"] | PyTree, batch: BatchLike) -> Float[Array, " B"]:
    """Returns the cross-entropy of each example in nats.

    Args:
      logits: of the classes.
      batch: its `label` holds class indices, int [B], or probabilities of the classes, float [B K]. The loss of an
        index outside of the classes is nan: mask what should not count.

    Raises:
      ValueError: logits or labels have another shape or dtype.
    """
    label = _check_label(logits, batch.label)
    if label.ndim == 2:
        return optax.softmax_cross_entropy(logits, label.astype(logits.dtype))
    outside = logits.shape[1]  # Its loss is nan, while -1 would be the last class.
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(label < 0, outside, label))


def _check_label(logits: Any, label: Any) -> Array:
    shape, of_label = getattr(logits, "shape", None), getattr(label, "shape", None)
    if shape is None or len(shape) != 2:
        raise ArgumentError(
            f"`logits` must be an array [B K] for the cross-entropy, got {describe_shapes(logits)}. Pass a `loss_fn` "
            "that accepts it."
        )
    indices = of_label == shape[:1] and jnp.issubdtype(label.dtype, jnp.integer)
    if not indices and not (of_label == shape and jnp.issubdtype(label.dtype, jnp.floating)):
        raise ArgumentError(
            f"`batch.label` must be class indices, int [B], or probabilities, float [B K], for the cross-entropy with "
            f"logits [B K] of shape {shape}, got {describe_shapes(label)}."
        )
    return jnp.asarray(label, jnp.int32) if indices else jnp.asarray(label)


@dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy."""

    label_smoothing: float = 0.0
    """Fraction of the target probability that is spread evenly over all classes, in training only."""

    def __post_init__(self) -> None:
        check_fields(self, "loss")
        check("loss.label_smoothing", "at least 0 and below 1", 0 <= self.label_smoothing < 1, self.label_smoothing)

    def __call__(self, logits: Float[Array, "B K"] | PyTree, batch: BatchLike) -> Float[Array, " B"]:
        """Returns the loss of each example, as `softmax_cross_entropy` does."""
        if not self.label_smoothing:
            return softmax_cross_entropy(logits, batch)
        label = _check_label(logits, batch.label)
        target = label if label.ndim == 2 else jax.nn.one_hot(label, logits.shape[-1])
        target = optax.smooth_labels(target.astype(logits.dtype), self.label_smoothing)
        loss = optax.softmax_cross_entropy(logits, target)
        return loss if label.ndim == 2 else jnp.where((label < 0) | (label >= logits.shape[1]), jnp.nan, loss)
