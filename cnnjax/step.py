"""The step: gradient, update and apply in one jitted function; many steps as one program; evaluation."""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key, PyTree

from cnnjax.data.augment import Augment
from cnnjax.data.batches import Pixels, make_batch
from cnnjax.data.order import Plan, plain_plan
from cnnjax.data.tta import mean_logits
from cnnjax.losses import softmax_cross_entropy
from cnnjax.optim.optimizer import Optimizer
from cnnjax.sharding import Placement, place
from cnnjax.typing import AnyArray, Batch, LossFn

# Examples; divisors of the usual test sets. The larger one is for images of up to 32 by 32 on an accelerator.
EVAL_BATCH_SIZE, ACCELERATOR_EVAL_BATCH_SIZE = 500, 2000


class Metrics(NamedTuple):
    """Sums over the unmasked examples; divide by `num_examples` once, on the host."""

    loss: Float[Array, ""]
    correct: Int[Array, ""]
    num_examples: Int[Array, ""]


class TrainState(NamedTuple):
    """Everything that training changes, as arrays.

    Attributes:
      step: number of updates, int32.
      params: trainable parameters.
      batch_stats: running statistics of normalization layers, the whitening kernel; empty for a model without any.
      opt_state: state of the optimizer.
    """

    step: Int[Array, ""]
    params: PyTree
    batch_stats: PyTree
    opt_state: Any


@partial(jax.jit, static_argnames=("model", "tx"))
def init_state(
    key: Key[Array, ""], image: Float[AnyArray, "B H W C"], *, model: nn.Module, tx: optax.GradientTransformation
) -> TrainState:
    """Returns the initial state of `model` and `tx`.

    Args:
      key: consumed; draws the initial parameters.
      image: images of the shape to train on; their values do not matter.
      model: a Flax module, called as `model(image, train=bool)`.
      tx: an optax optimizer.
    """
    variables = model.init(key, image, train=False)
    params = variables["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, variables.get("batch_stats", {}), tx.init(params))


def init_from_data(
    state: TrainState, image: Float[AnyArray, "N H W C"], *, model: nn.Module, tx: optax.GradientTransformation
) -> TrainState:
    """Initializes a model from data, by its method `init_from_data(variables, image) -> variables`.

    Args:
      image: standardized training images.
    """
    before = jax.tree.leaves(state.params)
    variables = model.init_from_data({"params": state.params, "batch_stats": state.batch_stats}, image)
    params = variables["params"]
    unchanged = [*map(id, before)] == [*map(id, jax.tree.leaves(params))]
    opt_state = state.opt_state if unchanged else tx.init(params)
    return TrainState(state.step, params, variables.get("batch_stats", {}), opt_state)


@jax.jit
def copy_state(state: TrainState) -> TrainState:
    """Returns a copy that stays valid after `state` is donated."""
    return jax.tree.map(jnp.copy, state)


@partial(jax.jit, static_argnames=("model", "tx", "loss_fn", "frozen"), donate_argnames="state")
def train_step(
    state: TrainState,
    batch: Batch,
    key: Key[Array, ""],
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    loss_fn: LossFn = softmax_cross_entropy,
    frozen: tuple[str, ...] = (),
) -> tuple[TrainState, Metrics]:
    """Updates the parameters once, with the gradient of the mean loss over the unmasked examples.

    Args:
      state: donated; use the returned one instead.
      batch: at least one example must be unmasked.
      key: the same for every step; `state.step` is folded into it.
      model: a Flax module, called as `model(image, train=True)` with a "dropout" key and mutable "batch_stats".
      tx: an optax optimizer that needs only the gradient. Build it once: another one retraces the step.
      loss_fn: `(logits [B K], label [B]) -> loss [B]`. Build it once, too.
      frozen: top-level names in `state.params` whose gradients are zero and are not computed. Weight decay and momentum
        may still move these parameters: mask them in `tx` to keep them fixed.

    Returns:
      The next state, and the metrics of this batch before the update.

    Raises:
      ValueError: `frozen` is not a tuple of top-level names in `state.params`.
    """
    if unknown := {frozen} if isinstance(frozen, str) else {name for name in frozen if name not in state.params}:
        names, got = sorted(state.params), sorted(map(str, unknown))
        raise ValueError(f"`frozen` must be a tuple of top-level names in `state.params` ({names}), got {got}.")
    dropout_key = jax.random.fold_in(key, state.step)

    def mean_loss(params: PyTree) -> tuple[Float[Array, ""], tuple[Metrics, PyTree]]:
        if frozen:
            params = {name: lax.stop_gradient(part) if name in frozen else part for name, part in params.items()}
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, mutated = model.apply(
            variables, batch.image, train=True, rngs={"dropout": dropout_key}, mutable=["batch_stats"]
        )
        metrics = _sum_metrics(logits, batch, loss_fn)
        return metrics.loss / metrics.num_examples, (metrics, mutated.get("batch_stats", {}))

    grads, (metrics, batch_stats) = jax.grad(mean_loss, has_aux=True)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, batch_stats, opt_state), metrics


@partial(jax.jit, static_argnames=("model", "loss_fn", "tta"))
def eval_step(
    state: TrainState,
    batch: Batch,
    *,
    model: nn.Module,
    loss_fn: LossFn = softmax_cross_entropy,
    tta: str = "none",
) -> Metrics:
    """Returns the metrics of a batch, without dropout and with running statistics.

    Args:
      tta: test-time augmentation, see `cnnjax.data.tta.mean_logits`.
    """

    def logits_fn(image: Float[AnyArray, "B H W C"]) -> Any:
        return model.apply({"params": state.params, "batch_stats": state.batch_stats}, image, train=False)

    return _sum_metrics(mean_logits(logits_fn, batch.image, tta, batch.mask), batch, loss_fn)


def _sum_metrics(logits: Float[Array, "B K"], batch: Batch, loss_fn: LossFn) -> Metrics:
    loss = jnp.where(batch.mask, loss_fn(logits, batch.label), 0.0)
    label = batch.label if batch.label.ndim == 1 else jnp.argmax(batch.label, axis=-1)
    correct = batch.mask & (jnp.argmax(logits, axis=-1) == label)
    return Metrics(jnp.sum(loss), jnp.sum(correct, dtype=jnp.int32), jnp.sum(batch.mask, dtype=jnp.int32))


# --- Many steps as one program --------------------------------------------------------------------------------------


class Program(NamedTuple):
    """The static arguments of `train_steps`: compared by value, so that many seeds share one compilation."""

    model: nn.Module
    optim: Optimizer
    augment: Augment
    loss_fn: LossFn
    num_steps: int  # Of the whole run.
    num_epochs: int

    def make_tx(self) -> optax.GradientTransformation:
        """Returns the optimizer."""
        return self.optim.make_tx(self.num_steps, self.num_epochs)

    def frozen_names(self, params: PyTree, step: int) -> tuple[str, ...]:
        """Returns the names in `params` whose gradients affect no update from `step` on."""
        return self.optim.frozen(params, step, self.num_steps, self.num_epochs)


@partial(jax.jit, static_argnames="program")
def init_run(key: Key[Array, ""], image: Float[AnyArray, "B H W C"], *, program: Program) -> TrainState:
    """Returns the initial state; see `init_state`."""
    return init_state(key, image, model=program.model, tx=program.make_tx())


@partial(jax.jit, static_argnames=("program", "frozen"), donate_argnames="state")
def train_steps(
    state: TrainState,
    pixels: Pixels,
    plan: Plan,
    key: Key[Array, ""],
    augment_key: Key[Array, ""],
    *,
    program: Program,
    frozen: tuple[str, ...] = (),
) -> tuple[TrainState, Metrics]:
    """Applies `train_step` to each row of a plan; on an accelerator, one program that never waits for the host.

    Args:
      state: donated.
      pixels: the training set.
      plan: S rows of one epoch.
      key: the same for every step, see `train_step`.
      augment_key: the key of the epoch, see `make_batch`.
      program: what to compile.
      frozen: see `train_step`.

    Returns:
      The next state, and the metrics of each step [S].
    """
    tx = program.make_tx()

    def step(state: TrainState, plan: Plan) -> tuple[TrainState, Metrics]:
        batch = make_batch(pixels, plan, program.augment, augment_key)
        return train_step(state, batch, key, model=program.model, tx=tx, loss_fn=program.loss_fn, frozen=frozen)

    if len(plan.example) > 1:
        return lax.scan(step, state, plan)
    # Inside a loop XLA does not lay out convolutions for its fast CPU kernels (jax issue 12868).
    state, metrics = step(state, plan.row(0))
    return state, jax.tree.map(lambda value: value[None], metrics)


@partial(jax.jit, static_argnames=("model", "tta"))
def _score(state: TrainState, pixels: Pixels, plan: Plan, *, model: nn.Module, tta: str) -> Metrics:
    return eval_step(state, make_batch(pixels, plan), model=model, tta=tta)


class Totals(NamedTuple):
    """Sums of metrics on the host, as Python numbers."""

    loss: float = 0.0
    correct: int = 0
    num_examples: int = 0

    def add(self, metrics: Metrics) -> "Totals":
        """Returns the totals plus the metrics of one step, or of several [S]. Waits for the device."""
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
    state: TrainState, pixels: Pixels, *, model: nn.Module, tta: str = "none", placement: Placement | None = None
) -> Scores:
    """Scores every example once, by softmax cross-entropy and accuracy. Waits for the device.

    Args:
      pixels: the data set, on the device or on the host.
      tta: see `eval_step`.
      placement: how devices share a batch; None: the first device works alone.
    """
    num_examples = len(pixels.label)
    placement = placement or place(1)
    platform = placement.devices[0].platform
    small = pixels.image.shape[1] * pixels.image.shape[2] <= 32 * 32
    batch_size = ACCELERATOR_EVAL_BATCH_SIZE if platform != "cpu" and small else EVAL_BATCH_SIZE
    batch_size = -(-min(batch_size, num_examples) // placement.num_devices) * placement.num_devices
    plan = plain_plan(num_examples, batch_size)
    rows = jax.device_put([plan.row(i) for i in range(len(plan.example))], placement.batch_sharding)
    pixels = jax.device_put(pixels, placement.state_sharding)
    totals, metrics = Totals(), _score(state, pixels, rows[0], model=model, tta=tta)
    for row in rows[1:]:  # At most two at a time: each running batch has its own scratch memory.
        upcoming = _score(state, pixels, row, model=model, tta=tta)
        totals, metrics = totals.add(metrics), upcoming
    return totals.add(metrics).means()
