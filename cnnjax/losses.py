"""Losses: functions of logits and a batch that return the loss of each example."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
    logits = _at_least_float32(logits)
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


def _at_least_float32(logits: Array) -> Array:
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


@dataclass(frozen=True)
class ClassWeighted:
    """Multiplies the loss of each example by the weight of its class.

    Labels are class indices, or probabilities of the classes: then the weight is the mean over the classes.
    """

    loss: Any
    """The loss, see `train_step`."""
    weights: tuple[float, ...]
    """One weight per class, see `balanced_weights`."""

    def __call__(self, logits: PyTree, batch: BatchLike) -> Any:
        """Returns what the loss returns, weighted."""
        weights, label = jnp.asarray(self.weights, jnp.float32), batch.label
        if getattr(label, "ndim", None) not in (1, 2):
            raise ArgumentError(
                "`class_weights` must be none unless the labels are class indices [B] or probabilities [B K], got "
                f"labels {describe_shapes(label)}."
            )
        weight = label @ weights if label.ndim == 2 else weights[label]
        result = self.loss(logits, batch)
        loss, *values = result if isinstance(result, tuple) else (result,)
        loss = loss * weight.astype(loss.dtype)
        return (loss, *values) if isinstance(result, tuple) else loss


def balanced_weights(label: np.ndarray, num_classes: int) -> tuple[float, ...]:
    """Returns the weight of each class, N / (K n): n of the N examples belong to it, and K classes have examples.

    The mean weight of the examples is 1, and all classes with examples have the same total weight. A class without
    examples has the weight 0.

    Args:
      label: class indices, int [N].

    Source: King and Zeng, "Logistic Regression in Rare Events Data" (2001); scikit-learn's `class_weight="balanced"`.
    """
    counts = np.bincount(label, minlength=num_classes)
    present = np.count_nonzero(counts)
    return tuple(len(label) / (present * count) if count else 0.0 for count in counts.tolist())


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
        logits = _at_least_float32(logits)
        target = label if label.ndim == 2 else jax.nn.one_hot(label, logits.shape[-1])
        target = optax.smooth_labels(target.astype(logits.dtype), self.label_smoothing)
        loss = optax.softmax_cross_entropy(logits, target)
        return loss if label.ndim == 2 else jnp.where((label < 0) | (label >= logits.shape[1]), jnp.nan, loss)
