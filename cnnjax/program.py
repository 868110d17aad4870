"""Many steps as one program."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Key, PyTree

from cnnjax.compiler import jit
from cnnjax.data.augment import Augment, augment_of_epoch
from cnnjax.data.batches import Pixels, StreamedPixels, make_batch
from cnnjax.data.order import Plan
from cnnjax.metrics import Metrics
from cnnjax.network import Network
from cnnjax.optim.optimizer import Optimizer
from cnnjax.pretrained import VariablePath
from cnnjax.sharding import Placement
from cnnjax.state import TrainState, init_state, replace_variables, strong_type
from cnnjax.step import train_step
from cnnjax.typing import AnyArray, BatchLike, LossFn, StepFn


class Program(NamedTuple):
    """The static arguments of `train_steps`: compared by value, so that many seeds share one compilation."""

    model: Network
    optim: Optimizer
    augment: Augment
    loss_fn: LossFn
    num_steps: int  # In the whole run.
    num_epochs: int
    step_fn: StepFn = train_step
    placement: Placement | None = None  # Only if it divides the state.
    frozen: tuple[str, ...] = ()  # See `train_step`.

    def make_tx(self) -> optax.GradientTransformation:
        """Returns the optimizer."""
        return self.optim.make_tx(self.num_steps, self.num_epochs)

    def options(self) -> dict[str, Any]:
        """Returns the keyword arguments of the training step."""
        return {
            "model": self.model,
            "tx": self.make_tx(),
            "loss_fn": self.loss_fn,
            "frozen": self.frozen,
            "placement": self.placement,
        }

    def call_step(self, state: TrainState, batch: BatchLike, key: Key[Array, ""]) -> Any:
        """Calls the training step, `train_step` or the user's, on a batch."""
        return self.step_fn(state, batch, key, **self.options())

    @property
    def divides_initial_state(self) -> bool:
        """Whether the state is divided among devices from the start, so that none of them ever holds all of it."""
        return self.placement is not None and not hasattr(self.model, "init_from_data")

    def at_epoch(self, epoch: int) -> "Program":
        """Returns the program of an epoch (from 0), with its augmentation."""
        return self._replace(augment=augment_of_epoch(self.augment, epoch, self.num_epochs))

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
    """Applies the step to each row of a plan; one program that never waits for the host.

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

    def step(state: TrainState, plan: Plan) -> tuple[TrainState, Metrics]:
        batch = make_batch(pixels, plan, program.augment, augment_key)
        after, metrics = program.call_step(state, batch, jax.random.clone(key))
        after = after._replace(step=state.step + 1)  # A user's step need not increment it.
        after = jax.tree.map(strong_type, after)
        if program.placement is not None:
            after = lax.with_sharding_constraint(after, program.placement.of_state(after))
        return after, metrics

    if len(plan.example) > 1:
        return lax.scan(step, state, plan)
    # Inside a loop XLA does not lay out convolutions for its fast CPU kernels (jax issue 12868).
    state, metrics = step(state, plan.row(0))
    return state, jax.tree.map(lambda value: jnp.asarray(value)[None], metrics)
