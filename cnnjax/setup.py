"""The constants of a run, and descriptions of them."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Key, PyTree

from cnnjax.config import Config
from cnnjax.data.batches import Pixels
from cnnjax.data.datasets import ImageDataset
from cnnjax.data.feed import StreamedSet
from cnnjax.data.order import plain_plan
from cnnjax.evaluation import evaluation_batch_size
from cnnjax.process.settings import num_cores
from cnnjax.program import Program, train_steps
from cnnjax.runs.schema import DataFacts
from cnnjax.sharding import Placement, put
from cnnjax.state import TrainState


class Setup(NamedTuple):
    """Everything that a run does not change."""

    config: Config
    dataset: ImageDataset
    facts: DataFacts
    batch_size: int
    balanced_label: np.ndarray | None  # The training labels, if classes are drawn equally often.
    train: Pixels | StreamedSet  # On every device, or on disk.
    validation: Pixels | StreamedSet
    program: Program
    steps_per_epoch: int
    steps_per_dispatch: int
    train_key: Key[Array, ""]
    augment_key: Key[Array, ""]
    placement: Placement
    params: PyTree = None  # The shapes of the parameters, once they are known.

    def train_shape(self, program: Program) -> tuple[int, ...]:
        """Returns the shape (H, W, C) of the images that the network is trained on by a program."""
        height, width, channels = self.facts.image_shape
        return *program.augment.output_size((height, width)), channels

    @property
    def train_input(self) -> Any:
        """The data set, or the shapes of a batch of it, with which `train_steps` is traced."""
        if isinstance(self.train, StreamedSet):
            return self.train.spec(self.batch_size, self.placement)
        return self.train

    def frozen_names(self, epoch: int) -> tuple[str, ...]:
        """Returns the top-level names in the parameters whose gradients need not be computed in an epoch (from 0).

        Without them it is another program. On a CPU compiling it takes longer than it saves, except for parameters that
        are frozen from the start, as in fine-tuning.
        """
        first = epoch * self.steps_per_epoch
        # The last step, too: a layer may thaw within an epoch if batches are accumulated.
        steps = [first, first + self.steps_per_epoch - 1]
        steps += [0] if self.placement.device.platform == "cpu" else []
        frozen = [self.program.frozen_names(self.params, step) for step in steps]
        return tuple(name for name in frozen[0] if all(name in names for names in frozen))

    @property
    def queues_validation(self) -> bool:
        """Whether the score of the validation set can wait on the device for the steps of its epoch.

        XLA queues at most 32 programs on a GPU, each of which scores a batch.
        """
        if self.steps_per_dispatch == 1:
            return False
        return len(self.validation.label) <= 16 * evaluation_batch_size(self.validation, self.placement)

    def program_at(self, epoch: int) -> Program:
        """Returns the program of an epoch (from 0), with its augmentation and its frozen parameters."""
        return self.program.at_epoch(epoch)._replace(frozen=self.frozen_names(epoch))


def trace_steps(setup: Setup, state: TrainState, program: Program) -> Any:
    """Traces `train_steps` for a dispatch, without computing anything.

    Args:
      state: its shapes, with their shardings.
    """
    placement, batch_size = setup.placement, setup.batch_size
    plan = put(plain_plan(setup.steps_per_dispatch * batch_size, batch_size), placement.plan_sharding)
    augment_key = put(setup.augment_key, placement.replicated)
    return train_steps.trace(state, setup.train_input, plan, setup.train_key, augment_key, program=program)


def count_params(state: TrainState) -> int:
    """Returns the number of trainable parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))


def device_name(device: Any) -> str:
    """Describes a device of jax in words."""
    if device.platform == "cpu":
        count = num_cores()
        return f"cpu, {count} core{'s' if count != 1 else ''}"
    return f"{device.platform}, {device.device_kind}"
