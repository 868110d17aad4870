"""The optimizer and the loss that a configuration names. Built once a run: another one traces the step again."""

from functools import cache

import jax
import optax
from jaxtyping import Array, Float, Int, PyTree

from cnnjax.config import OptimConfig
from cnnjax.step import AnyArray, LossFn, softmax_cross_entropy


def make_schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step, for a run of `num_steps`."""
    if config.schedule == "constant":
        return optax.constant_schedule(config.learning_rate)
    rise = round(config.warmup * num_steps)
    up = optax.linear_schedule(0.0, config.learning_rate, rise)
    down = optax.linear_schedule(config.learning_rate, 0.0, num_steps - rise)
    return optax.join_schedules([up, down], [rise])


@cache  # Of several seeds: a rebuilt optimizer or loss is compiled again.
def make_tx(config: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    """Returns Adam with the schedule, and decoupled weight decay of the kernels where it is not 0."""
    schedule = make_schedule(config, num_steps)
    if config.weight_decay == 0:
        return optax.adam(schedule)
    return optax.adamw(schedule, weight_decay=config.weight_decay, mask=_is_kernel)


def _is_kernel(params: PyTree) -> PyTree:
    """Marks the leaves to decay: biases and scales are vectors."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


@cache
def make_loss(label_smoothing: float) -> LossFn:
    """Returns softmax cross-entropy against labels smoothed towards the uniform distribution."""
    if label_smoothing == 0:
        return softmax_cross_entropy

    def smoothed_cross_entropy(logits: Float[Array, "B K"], label: Int[AnyArray, " B"]) -> Float[Array, " B"]:
        target = optax.smooth_labels(jax.nn.one_hot(label, logits.shape[-1]), label_smoothing)
        return optax.softmax_cross_entropy(logits, target)

    return smoothed_cross_entropy
