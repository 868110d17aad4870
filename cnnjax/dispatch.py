"""Dispatches: the arguments of each call of `train_steps` except the state, drawn on the host."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import repeat
from typing import NamedTuple

import jax
from jaxtyping import Array, Key

from cnnjax.data.batches import Pixels, StreamedPixels
from cnnjax.data.feed import StreamedSet
from cnnjax.data.order import Plan, epoch_plan
from cnnjax.program import Program
from cnnjax.setup import Setup
from cnnjax.sharding import put


class Dispatch(NamedTuple):
    """The steps of one call of `train_steps`: one step, or the rest of an epoch."""

    steps: tuple[int, int]  # The numbers of steps before and after this call.
    pixels: Pixels | StreamedPixels  # The training set, or the images of one step.
    plan: Plan
    augment_key: Key[Array, ""]  # The key of the epoch.
    program: Program  # The program of the epoch.


@contextmanager
def open_dispatches(
    setup: Setup, step: int, program_at: Callable[[int], Program] | None = None
) -> Iterator[Iterator[Dispatch]]:
    """Opens the dispatches of a run, from `step` on to its end.

    Args:
      program_at: returns the program of an epoch (from 0); None: `Setup.program_at`.
    """
    with _open_pixels(setup, step) as pixels:
        yield _dispatches(setup, step, pixels, program_at or setup.program_at)


def _open_pixels(setup: Setup, step: int) -> AbstractContextManager[Iterator[Pixels | StreamedPixels]]:
    train, batch_size = setup.train, setup.batch_size
    if isinstance(train, StreamedSet):
        return train.training_batches(setup.config.seed, step, batch_size, setup.balanced_label, setup.placement)
    return nullcontext(repeat(train))


def _dispatches(
    setup: Setup, step: int, pixels: Iterator[Pixels | StreamedPixels], program_at: Callable[[int], Program]
) -> Iterator[Dispatch]:
    placement, num_examples = setup.placement, len(setup.train.label)
    first_epoch, within = divmod(step, setup.steps_per_epoch)
    for epoch in range(first_epoch, setup.program.num_epochs):
        program = program_at(epoch)
        height, width, _ = setup.train_shape(program)
        plan = epoch_plan(
            setup.config.seed,
            epoch,
            num_examples,
            batch_size=setup.batch_size,
            augment=program.augment,
            image_size=(height, width),
            balanced_label=setup.balanced_label,
        )
        key = put(jax.random.fold_in(setup.augment_key, epoch), placement.replicated)
        for i in range(within, setup.steps_per_epoch, setup.steps_per_dispatch):
            rows = put(plan.row(slice(i, i + setup.steps_per_dispatch)), placement.plan_sharding)
            before = epoch * setup.steps_per_epoch + i
            yield Dispatch((before, before + len(rows.example)), next(pixels), rows, key, program)
        within = 0
