"""Many steps as one program, and the evaluation of a data set."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import repeat
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key, PyTree

from cnnjax.class_scores import count_pairs
from cnnjax.compiler import jit
from cnnjax.data.augment import Augment
from cnnjax.data.batches import Pixels, StreamedPixels, make_batch
from cnnjax.data.feed import StreamedSet
from cnnjax.data.order import Plan, plain_plan
from cnnjax.losses import softmax_cross_entropy
from cnnjax.metrics import Metrics, Scores, Totals, sum_metrics
from cnnjax.network import Network, logits_of
from cnnjax.optim.optimizer import Optimizer
from cnnjax.pretrained import VariablePath
from cnnjax.sharding import Placement, fetch, place, put
from cnnjax.state import TrainState, init_state, replace_variables
from cnnjax.step import apply_views, train_step
from cnnjax.typing import AnyArray, LossFn

# Examples; divisors of the usual test sets. The larger one is for images of up to 32 by 32 on an accelerator.
EVAL_BATCH_SIZE, ACCELERATOR_EVAL_BATCH_SIZE = 500, 2000


class Program(NamedTuple):
    """The static arguments of `train_steps`: compared by value, so that many seeds share one compilation."""

    model: Network
    optim: Optimizer
    augment: Augment
    loss_fn: LossFn
    num_steps: int  # In the whole run.
    num_epochs: int
    placement: Placement | None = None  # Only if it divides the state.
    frozen: tuple[str, ...] = ()  # See `train_step`.

    def make_tx(self) -> optax.GradientTransformation:
        """Returns the optimizer."""
        return self.optim.make_tx(self.num_steps, self.num_epochs)

    @property
    def divides_initial_state(self) -> bool:
        """Whether the state is divided among devices from the start, so that none of them ever holds all of it."""
        return self.placement is not None and not hasattr(self.model, "init_from_data")

    def at_epoch(self, epoch: int) -> "Program":
        """Returns the program of an epoch (from 0), with its augmentation."""
        return self._replace(augment=self.augment.at_epoch(epoch, self.num_epochs))

    def distinct_programs(self) -> "list[Program]":
        """Returns the distinct programs of the epochs, in the order of their first use."""
        if type(self.augment).at_epoch is Augment.at_epoch:
            return [self]
        return [*dict.fromkeys(self.at_epoch(epoch) for epoch in range(self.num_epochs))]

    def frozen_names(self, params: PyTree, step: int) -> tuple[str, ...]:
        """Returns the names in `params` whose gradients affect no update from `step` on."""
        return self.optim.frozen(params, step, self.num_steps, self.num_epochs)


@jit(static_argnames=("program",), runs_once=True)
def init_train_state(
    key: Key[Array, ""],
    image: Float[AnyArray, "B H W C"],
    loaded: dict[VariablePath, Array] | None = None,
    *,
    program: Program,
) -> TrainState:
    """Returns the initial state, see `init_state`. Equal programs share one compilation, unlike equal optimizers.

    Args:
      loaded: pretrained weights, of `replacements`. XLA removes the initialization of the parameters that they replace,
        whose compilation takes many seconds for a deep network.
    """
    tx = program.make_tx()
    state = init_state(key, image, model=program.model, tx=tx)
    state = state if loaded is None else replace_variables(state, loaded, tx=tx)
    if program.placement is None or not program.divides_initial_state:
        return state
    return lax.with_sharding_constraint(state, program.placement.of_state(state))


@jit(static_argnames=("program",), donate_argnames=("state",))
def train_steps(
    state: TrainState,
    pixels: Pixels | StreamedPixels,
    plan: Plan,
    key: Key[Array, ""],
    augment_key: Key[Array, ""],
    *,
    program: Program,
) -> tuple[TrainState, Metrics]:
    """Applies `train_step` to each row of a plan; one program that never waits for the host.

    Args:
      state: donated.
      pixels: the training set, or the images of a single step.
      plan: S rows of one epoch.
      key: the same for every step, see `train_step`.
      augment_key: the key of the epoch, see `make_batch`.
      program: the static arguments.

    Returns:
      The next state, and the metrics of each step [S].
    """
    tx = program.make_tx()

    def step(state: TrainState, plan: Plan) -> tuple[TrainState, Metrics]:
        batch = make_batch(pixels, plan, program.augment, augment_key)
        return train_step(
            state,
            batch,
            key,
            model=program.model,
            tx=tx,
            loss_fn=program.loss_fn,
            frozen=program.frozen,
            placement=program.placement,
        )

    if len(plan.example) > 1:
        return lax.scan(step, state, plan)
    # Inside a loop XLA does not lay out convolutions for its fast CPU kernels (jax issue 12868).
    state, metrics = step(state, plan.row(0))
    return state, jax.tree.map(lambda value: value[None], metrics)


@jit(static_argnames=("model", "tta", "placement"))
def _score(
    state: TrainState,
    pixels: Pixels | StreamedPixels,
    plan: Plan,
    *,
    model: Network,
    tta: str,
    placement: Placement | None,
) -> tuple[Metrics, Int[Array, " B"], Float[Array, "B K"]]:
    """Returns the metrics of a batch, the predicted classes, and the logits."""
    batch = make_batch(pixels, plan)
    if placement is not None:  # It divides the state.
        state = lax.with_sharding_constraint(state, placement.replicated)  # What is not used is not gathered.
    logits = logits_of(apply_views(state, batch, model, tta))
    return sum_metrics(logits, batch, softmax_cross_entropy), jnp.argmax(logits, axis=-1).astype(jnp.int32), logits


def evaluate(
    state: TrainState,
    pixels: Pixels | StreamedSet,
    *,
    model: Network,
    tta: str = "none",
    placement: Placement | None = None,
    keep_logits: bool = False,
) -> Scores:
    """Scores every example once: cross-entropy, accuracy and the confusion of classes. Waits for the device.

    Args:
      pixels: the data set, on the device, on the host or on disk.
      tta: see `eval_step`.
      placement: how devices share a batch; None: the first device works alone.
      keep_logits: whether to return the logits, too.
    """
    placement = placement or place(1, jax.local_devices())
    return start_evaluation(state, pixels, model, placement, tta=tta, keep_logits=keep_logits)()


def start_evaluation(
    state: TrainState,
    pixels: Pixels | StreamedSet,
    model: Network,
    placement: Placement,
    *,
    tta: str = "none",
    keep_logits: bool = False,
) -> Callable[[], Scores]:
    """Starts to `evaluate`; the function that it returns waits for the device, and returns the scores."""
    num_examples = len(pixels.label)
    plan = plain_plan(num_examples, evaluation_batch_size(pixels, placement))
    options = _score_options(model, tta, placement)
    rows = put([plan.row(i) for i in range(len(plan.example))], placement.batch_sharding)
    few_at_a_time = placement.device.platform == "cpu" or isinstance(pixels, StreamedSet)
    batches: list[tuple[Metrics, Array, Array | None]] = []
    with _inputs(pixels, plan.example.shape[1], placement) as inputs:
        for row in rows:
            metrics, predicted, logits = _score(state, next(inputs), row, **options)
            if batches and few_at_a_time:
                # At most two at a time: each has its own scratch memory or images.
                jax.block_until_ready(batches[-1])
            batches.append((metrics, predicted, logits if keep_logits else None))

    def finish() -> Scores:
        totals, (metrics, predicted, logits) = Totals(), zip(*fetch(batches), strict=True)
        for sums in metrics:
            totals = totals.add(sums)
        confusion = count_pairs(fetch(pixels.label), np.concatenate(predicted)[:num_examples])  # Without the padding.
        scores = totals.means()._replace(confusion=confusion)
        return scores._replace(logits=np.concatenate(logits)[:num_examples]) if keep_logits else scores

    return finish


def compile_evaluation(state: Any, pixels: Pixels, *, model: Network, tta: str, placement: Placement) -> None:
    """Compiles the program with which `evaluate` scores a data set.

    Args:
      state: the shapes of the state, with their shardings.
    """
    plan = plain_plan(len(pixels.label), evaluation_batch_size(pixels, placement))
    shapes: Any = jax.tree.map(lambda x: x.update(sharding=placement.replicated), jax.eval_shape(lambda x: x, pixels))
    row = put(plan.row(0), placement.batch_sharding)
    _score.lower(state, shapes, row, **_score_options(model, tta, placement)).compile()


def evaluation_batch_size(pixels: Pixels | StreamedSet, placement: Placement) -> int:
    """Returns the number of examples that `evaluate` scores at a time."""
    size = pixels.image.shape[1] * pixels.image.shape[2]
    on_cpu = placement.device.platform == "cpu"
    batch_size = ACCELERATOR_EVAL_BATCH_SIZE if not on_cpu and size <= 32 * 32 else EVAL_BATCH_SIZE
    batch_size = min(batch_size, max(8, EVAL_BATCH_SIZE * 64 * 64 // size))  # Large images need much memory.
    return -(-min(batch_size, max(1, len(pixels.label))) // placement.num_devices) * placement.num_devices


def _score_options(model: Network, tta: str, placement: Placement) -> Any:
    return {"model": model, "tta": tta, "placement": placement if placement.divides_state else None}


def _inputs(
    pixels: Pixels | StreamedSet, batch_size: int, placement: Placement
) -> AbstractContextManager[Iterator[Any]]:
    """Opens the input of each `_score`: the whole data set every time, or one batch after another."""
    if isinstance(pixels, StreamedSet):
        return pixels.plain_batches(batch_size, placement)
    return nullcontext(repeat(put(pixels, placement.replicated)))
