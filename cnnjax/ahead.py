"""What a thread prepares while an accelerator trains: the programs of later epochs, and the score of the test set."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import jax

from cnnjax.compiler import compiler_options
from cnnjax.data.batches import Pixels
from cnnjax.data.feed import StreamedSet, pixels_of
from cnnjax.data.order import plain_plan
from cnnjax.prepare import Setup
from cnnjax.program import compile_evaluation, train_steps
from cnnjax.sharding import put
from cnnjax.step import TrainState


@contextmanager
def prepared_ahead(setup: Setup, state: TrainState) -> Iterator[Callable[[], Pixels | StreamedSet]]:
    """Prepares in the context what training needs later, if an epoch is one program, during which the host is idle.

    Yields:
      A function that returns the test set.
    """

    def open_test() -> Pixels | StreamedSet:
        return pixels_of(setup.dataset.open("test"), setup.train.standardization)

    if setup.steps_per_dispatch == 1:
        yield open_test
        return
    first, model, placement = int(state.step) // setup.steps_per_epoch, setup.config.model, setup.placement
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    with ThreadPoolExecutor(1, "ahead") as thread:
        test = thread.submit(open_test)
        # Otherwise XLA selects kernels by timing them, for which the device must be idle.
        if placement.device.platform != "gpu" or "xla_gpu_deterministic_ops" in compiler_options():
            # What fails here fails again when it is needed.
            thread.submit(compile_later_steps, setup, shapes, first)
            tta = setup.config.tta
            thread.submit(lambda: compile_evaluation(shapes, test.result(), model=model, tta=tta, placement=placement))
        yield test.result


def compile_later_steps(setup: Setup, state: Any, first: int) -> None:
    """Compiles those programs of `train_steps` that differ from that of the first epoch, which compiles its own.

    Args:
      state: the shapes of the state, with their shardings.
      first: the number of the first epoch (from 0).
    """
    placement, size = setup.placement, setup.steps_per_dispatch * setup.batch_size
    plan = put(plain_plan(size, setup.batch_size), placement.plan_sharding)
    keys = setup.train_key, put(setup.augment_key, placement.replicated)
    programs = dict.fromkeys(setup.statics(state, epoch) for epoch in range(first, setup.config.num_epochs))
    for program, frozen in list(programs)[1:]:
        train_steps.lower(state, setup.train_input, plan, *keys, program=program, frozen=frozen).compile()
