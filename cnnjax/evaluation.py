"""Scores of a network on a set: every example counts exactly once."""

from typing import NamedTuple

import flax.linen as nn
import jax
from jax.sharding import NamedSharding

from cnnjax.batches import Standardization, eval_batches
from cnnjax.data import Examples
from cnnjax.step import Metrics, TrainState, eval_step

EVAL_BATCH_SIZE = 500  # Examples; a divisor of the usual test sets, large enough for any device's full speed.


class Totals(NamedTuple):
    """Sums on the host, as Python numbers."""

    loss: float = 0.0
    correct: int = 0
    num_examples: int = 0

    def add(self, metrics: Metrics) -> "Totals":
        """Returns the totals with a batch more. Waits for the device."""
        loss, correct, num_examples = (value.item() for value in jax.device_get(metrics))
        return Totals(self.loss + loss, self.correct + correct, self.num_examples + num_examples)

    def means(self) -> "Scores":
        """Returns the means over all examples."""
        return Scores(self.loss / self.num_examples, self.correct / self.num_examples, self.num_examples)


class Scores(NamedTuple):
    """Means over `num_examples` examples."""

    loss: float
    accuracy: float
    num_examples: int


def evaluate(
    state: TrainState,
    examples: Examples,
    standardization: Standardization,
    *,
    model: nn.Module,
    sharding: NamedSharding | None = None,
) -> Scores:
    """Scores every example once, by softmax cross-entropy and accuracy. Waits for the device.

    Args:
      sharding: how devices share a batch; the first device works alone when None.
    """
    batch_size = min(EVAL_BATCH_SIZE, len(examples.label))
    if sharding is not None:
        batch_size = -(-batch_size // sharding.mesh.size) * sharding.mesh.size
    totals = Totals()
    for batch in eval_batches(examples, standardization, batch_size):
        totals = totals.add(eval_step(state, jax.device_put(batch, sharding), model=model))
    return totals.means()
