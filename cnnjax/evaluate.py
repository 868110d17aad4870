"""Many steps over a set that lies on the device: what the loop dispatches, and how a set is scored."""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Key

from cnnjax.config import AugmentConfig
from cnnjax.data.batches import Pixels, Plan, make_batch, plain_plan, row
from cnnjax.sharding import Placement
from cnnjax.step import LossFn, Metrics, TrainState, eval_step, softmax_cross_entropy, train_step

# Examples; divisors of the usual test sets. The larger is for images of up to 32 by 32 on an accelerator.
EVAL_BATCH_SIZE, ACCELERATOR_EVAL_BATCH_SIZE = 500, 2000


@partial(jax.jit, static_argnames=("augment", "model", "tx", "loss_fn", "frozen"), donate_argnames="state")
def train_steps(
    state: TrainState,
    pixels: Pixels,
    plan: Plan,
    key: Key[Array, ""],
    *,
    augment: AugmentConfig,
    model: nn.Module,
    tx: optax.GradientTransformation,
    loss_fn: LossFn = softmax_cross_entropy,
    frozen: tuple[str, ...] = (),
) -> tuple[TrainState, Metrics]:
    """Makes a `train_step` of each row of a plan: on an accelerator, as one program that never waits for the host.

    Args:
      state: donated.
      pixels: the training set.
      plan: S rows.
      key: the same for every step, as of `train_step`.
      augment, model, tx, loss_fn, frozen: see `make_batch` and `train_step`.

    Returns:
      The next state, and the metrics of each step [S].
    """

    def step(state: TrainState, plan: Plan) -> tuple[TrainState, Metrics]:
        batch = make_batch(pixels, plan, augment)
        return train_step(state, batch, key, model=model, tx=tx, loss_fn=loss_fn, frozen=frozen)

    if len(plan.example) > 1:
        return lax.scan(step, state, plan)
    # Within a loop XLA does not bring convolutions into the form that its fast CPU kernels need (jax issue 12868).
    state, metrics = step(state, row(plan, 0))
    return state, jax.tree.map(lambda value: value[None], metrics)


@partial(jax.jit, static_argnames=("model", "views"))
def _score(state: TrainState, pixels: Pixels, plan: Plan, *, model: nn.Module, views: str) -> Metrics:
    return eval_step(state, make_batch(pixels, plan, AugmentConfig()), model=model, views=views)


class Totals(NamedTuple):
    """Sums on the host, as Python numbers."""

    loss: float = 0.0
    correct: int = 0
    num_examples: int = 0

    def add(self, metrics: Metrics) -> "Totals":
        """Returns the totals with the metrics of a step more, or of several [S]. Waits for the device."""
        totals = self
        for step in zip(*(np.ravel(values).tolist() for values in jax.device_get(metrics)), strict=True):
            totals = Totals(*(total + value for total, value in zip(totals, step, strict=True)))
        return totals

    def means(self) -> "Scores":
        """Returns the means over all examples."""
        return Scores(self.loss / self.num_examples, self.correct / self.num_examples, self.num_examples)


class Scores(NamedTuple):
    """Means over `num_examples` examples."""

    loss: float
    accuracy: float
    num_examples: int


def evaluate(
    state: TrainState, pixels: Pixels, *, model: nn.Module, views: str = "plain", placement: Placement | None = None
) -> Scores:
    """Scores every example once, by softmax cross-entropy and accuracy. Waits for the device.

    Args:
      pixels: the set, on the device or on the host.
      views: as of `views.mean_logits`.
      placement: how devices share a batch; the first device works alone when None.
    """
    num_examples = len(pixels.label)
    platform = jax.default_backend() if placement is None else placement.devices[0].platform
    small = pixels.image.shape[1] * pixels.image.shape[2] <= 32 * 32
    batch_size = ACCELERATOR_EVAL_BATCH_SIZE if platform != "cpu" and small else EVAL_BATCH_SIZE
    batch_size = min(batch_size, num_examples)
    if placement is not None:
        batch_size = -(-batch_size // placement.num_devices) * placement.num_devices
    plan = plain_plan(num_examples, batch_size)
    rows = [row(plan, i) for i in range(len(plan.example))]
    if placement is not None:
        rows = jax.device_put(rows, placement.batch)
    pixels = jax.device_put(pixels, None if placement is None else placement.state)
    totals, metrics = Totals(), _score(state, pixels, rows[0], model=model, views=views)
    for plan in rows[1:]:  # Two at a time: each that runs has its own scratch memory.
        following = _score(state, pixels, plan, model=model, views=views)
        totals, metrics = totals.add(metrics), following
    return totals.add(metrics).means()
