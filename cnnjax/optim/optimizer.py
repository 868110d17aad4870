"""The optimizer and the loss that a configuration names. Built once a run: another one traces the step again."""

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from cnnjax.config import OptimConfig
from cnnjax.errors import UserError
from cnnjax.step import LossFn, softmax_cross_entropy
from cnnjax.typing import AnyArray


def make_schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step, for a run of `num_steps`."""
    peak = config.learning_rate
    if config.schedule == "constant":
        return optax.constant_schedule(peak)
    rise = round(config.warmup * num_steps)
    up = optax.linear_schedule(config.start * peak, peak, rise)
    down = optax.linear_schedule(peak, config.end * peak, num_steps - rise)
    return optax.join_schedules([up, down], [rise])


@cache  # Of several seeds: a rebuilt optimizer or loss is compiled again.
def make_tx(config: OptimConfig, num_steps: int, num_epochs: int = 1) -> optax.GradientTransformation:
    """Returns the optimizer of a run of `num_steps` in `num_epochs`.

    Raises:
      UserError: the run has too few steps for `accumulate` or `lookahead` to act.
    """
    updates = num_steps // config.accumulate
    if updates == 0:
        raise UserError(
            f"`optim.accumulate` must be at most the {num_steps} steps of the run, got {config.accumulate}."
        )
    if config.lookahead > updates:
        raise UserError(f"`optim.lookahead` must be at most the {updates} updates of the run, got {config.lookahead}.")
    schedule = make_schedule(config, updates)
    if config.name == "adam":
        decay = config.weight_decay
        tx = optax.adamw(schedule, weight_decay=decay, mask=_is_kernel) if decay else optax.adam(schedule)
    else:
        filters = _muon(config, schedule) if config.name == "muon" else _sgd(config, schedule)
        groups: Any = {
            "filter": filters,
            "head": _sgd(config, schedule, config.head_scale),
            "bias": _sgd(config, schedule, config.bias_scale),
            "whiten": _sgd(config, _until(schedule, config, updates, num_epochs), config.whiten_scale),
            "other": _sgd(config, schedule),
        }
        tx = optax.partition(groups, group_of)
    if config.clip_norm:
        tx = optax.chain(optax.clip_by_global_norm(config.clip_norm), tx)
    if config.lookahead:
        tx = lookahead(tx, config.lookahead, updates)
    if config.accumulate > 1:
        tx = optax.MultiSteps(tx, config.accumulate).gradient_transformation()
    return tx


def group_of(params: PyTree) -> PyTree:
    """Returns of each parameter what learns alike: "filter", or one of "whiten", "bias" and "head" of a `SpeedNet`.

    Whatever else a network has is "other".
    """

    def name(path: Any, leaf: Array) -> str:
        module = path[0].key
        if module in ("whiten", "head"):
            return module
        if module.startswith("NormGelu"):
            return "bias"
        return "filter" if leaf.ndim == 4 else "other"

    return jax.tree.map_with_path(name, params)


def _is_kernel(params: PyTree) -> PyTree:
    """Marks the leaves to decay: biases and scales are vectors."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _until(schedule: optax.Schedule, config: OptimConfig, updates: int, num_epochs: int) -> optax.Schedule:
    """Returns the schedule, 0 after `whiten_epochs`."""
    if config.whiten_epochs == 0:
        return schedule
    end = _whiten_end(config, updates, num_epochs)
    return lambda step: jnp.where(jnp.asarray(step) < end, schedule(step), 0.0)


def _whiten_end(config: OptimConfig, updates: int, num_epochs: int) -> int:
    return round(updates * config.whiten_epochs / num_epochs)


def frozen_parts(config: OptimConfig, params: PyTree, step: int, num_steps: int, num_epochs: int) -> tuple[str, ...]:
    """Returns the top-level names in `params` whose gradients affect no update from `step` on."""
    if config.name == "adam" or config.whiten_epochs == 0 or config.clip_norm:
        return ()
    end = _whiten_end(config, num_steps // config.accumulate, num_epochs)
    return ("whiten",) if "whiten" in params and step // config.accumulate >= end else ()


def _sgd(config: OptimConfig, schedule: optax.Schedule, scale: float = 1.0) -> optax.GradientTransformation:
    """Nesterov momentum, `scale` times the learning rate; weight decay by the learning rate without `scale`."""
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay / scale if scale else 0.0),
        optax.trace(config.momentum, nesterov=True),
        optax.scale_by_learning_rate(lambda step: scale * schedule(step)),
    )


def _muon(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Muon of convolution kernels [I J C K] as matrices [I*J*C K], each kept at the norm sqrt(K).

    Source: Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024), and airbench94_muon.
    """
    return optax.chain(
        optax.trace(config.muon_momentum, nesterov=True),
        orthogonalize(),
        optax.scale_by_learning_rate(schedule),
        keep_norm(),
    )


def orthogonalize() -> optax.GradientTransformation:
    """Orthogonalizes each kernel [I J C K], as a matrix [I*J*C K], by three Newton-Schulz steps.

    On an accelerator all kernels are one batch of matrices in bfloat16, padded with zeros, which change nothing: a few
    large products instead of many small ones.
    """

    def each(*matrices: Array) -> tuple[Array, ...]:
        return tuple(_newton_schulz(matrix) for matrix in matrices)

    def together(*matrices: Array) -> tuple[Array, ...]:
        rows, columns = (max(matrix.shape[i] for matrix in matrices) for i in range(2))
        filled = [jnp.pad(m, ((0, rows - m.shape[0]), (0, columns - m.shape[1]))) for m in matrices]
        x = _newton_schulz(jnp.stack(filled), jnp.bfloat16)  # [N rows columns]
        return tuple(x[i, : m.shape[0], : m.shape[1]] for i, m in enumerate(matrices))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        leaves, tree = jax.tree.flatten(updates)
        matrices = [leaf.reshape(-1, leaf.shape[-1]) for leaf in leaves]
        matrices = lax.platform_dependent(*matrices, cpu=each, default=together) if leaves else ()
        return tree.unflatten([m.reshape(leaf.shape) for m, leaf in zip(matrices, leaves, strict=True)]), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _newton_schulz(x: Float[Array, "*N R C"], dtype: DTypeLike = jnp.float32) -> Float[Array, "*N R C"]:
    """Source: Keller Jordan, "Muon" (2024): a quintic that makes small singular values grow fast."""
    a, b, c = 3.4445, -4.7750, 2.0315
    norm = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
    x = (x / (norm + 1e-8)).astype(dtype)
    for _ in range(3):
        gram = x.mT @ x
        x = a * x + x @ (b * gram + c * (gram @ gram))
    return x.astype(jnp.float32)


def keep_norm() -> optax.GradientTransformation:
    """Brings each convolution kernel [I J C K] to the norm sqrt(K) before the update is added; the last of a chain."""

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        def add(u: Array, p: Array) -> Array:
            return u + p * (p.shape[-1] ** 0.5 / jnp.linalg.norm(p.ravel()) - 1)

        return jax.tree.map(add, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class LookaheadState(NamedTuple):
    """Attributes: step: the updates made, int32. slow: the average, as the parameters. inner: of the optimizer."""

    step: Int[Array, ""]
    slow: PyTree
    inner: Any


def lookahead(tx: optax.GradientTransformation, every: int, num_updates: int) -> optax.GradientTransformation:
    """Every `every` updates, moves a slow average towards the parameters, and the parameters onto it.

    What remains of the average then is 0.95**every * (t / num_updates)**3 at update t: little at first, most at the
    end. The last update leaves the average itself as the parameters.

    Source: Zhang et al., "Lookahead Optimizer" (2019), with the decay of Keller Jordan's airbench94.
    """

    def init(params: PyTree) -> LookaheadState:
        return LookaheadState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), tx.init(params))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, LookaheadState]:
        updates, inner = tx.update(updates, state.inner, params)
        count = state.step + 1
        meet = count % every == 0
        decay = jnp.where(meet, 0.95**every * (count / num_updates) ** 3, 1.0)
        meet |= count == num_updates

        def slow_of(s: Array, p: Array, u: Array) -> Array:
            return jnp.where(meet, decay * s + (1 - decay) * (p + u), s)

        slow = jax.tree.map(slow_of, state.slow, params, updates)
        updates = jax.tree.map(lambda u, s, p: jnp.where(meet, s - p, u), updates, slow, params)
        return updates, LookaheadState(count, slow, inner)

    return optax.GradientTransformation(init, update)


@cache
def make_loss(label_smoothing: float) -> LossFn:
    """Returns softmax cross-entropy against labels smoothed towards the uniform distribution."""
    if label_smoothing == 0:
        return softmax_cross_entropy

    def smoothed_cross_entropy(logits: Float[Array, "B K"], label: Int[AnyArray, " B"]) -> Float[Array, " B"]:
        target = optax.smooth_labels(jax.nn.one_hot(label, logits.shape[-1]), label_smoothing)
        return optax.softmax_cross_entropy(logits, target)

    return smoothed_cross_entropy
