"""Losses: functions of logits and labels that return the loss of each example."""

from dataclasses import dataclass

import jax
import optax
from jaxtyping import Array, Float, Int

from cnnjax.errors import check
from cnnjax.fields import check_fields
from cnnjax.typing import AnyArray


def softmax_cross_entropy(
    logits: Float[Array, "B K"], label: Int[AnyArray, " B"] | Float[AnyArray, "B K"]
) -> Float[Array, " B"]:
    """Returns the cross-entropy of each example in nats, for class indices or for probabilities of the classes."""
    if label.ndim == 2:
        return optax.softmax_cross_entropy(logits, label)
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


@dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy."""

    label_smoothing: float = 0.0
    """Fraction of the target probability that is spread evenly over all classes, in training only."""

    def __post_init__(self) -> None:
        check_fields(self, "loss")
        check("loss.label_smoothing", "at least 0 and below 1", 0 <= self.label_smoothing < 1, self.label_smoothing)

    def __call__(
        self, logits: Float[Array, "B K"], label: Int[AnyArray, " B"] | Float[AnyArray, "B K"]
    ) -> Float[Array, " B"]:
        """Returns the loss of each example, as `softmax_cross_entropy` does."""
        if self.label_smoothing:
            target = jax.nn.one_hot(label, logits.shape[-1]) if label.ndim == 1 else label
            label = optax.smooth_labels(target, self.label_smoothing)
        return softmax_cross_entropy(logits, label)
