"""What a thread prepares while an accelerator trains: the programs of later epochs, and the score of the test set."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any, NamedTuple

import jax

from cnnjax.compiler import compiler_options
from cnnjax.data.batches import Pixels
from cnnjax.data.feed import StreamedSet, pixels_of
from cnnjax.data.order import plain_plan
from cnnjax.prepare import Setup
from cnnjax.program import compile_evaluation, train_steps
from cnnjax.sharding import put
from cnnjax.step import TrainState

EVALUATION = "evaluation"


class Ahead(NamedTuple):
    """What the thread prepares.

    Attributes:
      open_test: returns the test set.
      programs: the compilations, by the arguments `program` and `frozen` of `train_steps`, and `EVALUATION`.
    """

    open_test: Callable[[], Pixels | StreamedSet]
    programs: dict[Any, Future[None]]

    def wait(self, program: Any) -> None:
        """Waits for a compilation that has begun, and cancels one that has not: the caller then compiles.

        What failed in the thread fails again where it is needed.
        """
        future = self.programs.get(program)
        if future is not None and not future.cancel():
            wait([future])


@contextmanager
def prepared_ahead(setup: Setup, state: TrainState, epochs: Sequence[int]) -> Iterator[Ahead]:
    """Prepares in the context what training needs later, if an epoch is one program, during which the host is idle.

    Args:
      epochs: those to train (from 0).
    """

    def open_test() -> Pixels | StreamedSet:
        return pixels_of(setup.dataset.open("test"), setup.train.standardization)

    if setup.steps_per_dispatch == 1:
        yield Ahead(open_test, {})
        return
    model, placement, tta = setup.config.model, setup.placement, setup.config.tta
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    programs: dict[Any, Future[None]] = {}
    with ThreadPoolExecutor(1, "ahead") as thread:

        def submit(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
            return thread.submit(copy_context().run, function, *arguments)

        def compile_score() -> None:
            compile_evaluation(shapes, test.result(), model=model, tta=tta, placement=placement)

        test = submit(open_test)
        # Otherwise XLA selects kernels by timing them, for which the device must be idle.
        if placement.device.platform != "gpu" or "xla_gpu_deterministic_ops" in compiler_options():
            # The first epoch compiles its own program, which is shorter if the run resumes within it.
            skipped = 0 if int(state.step) % setup.steps_per_epoch else 1
            later = list(dict.fromkeys(setup.statics(shapes, epoch) for epoch in epochs))[skipped:]
            programs |= {statics: submit(compile_steps, setup, shapes, statics) for statics in later}
            programs[EVALUATION] = submit(compile_score)
        try:
            yield Ahead(test.result, programs)
        finally:
            thread.shutdown(wait=False, cancel_futures=True)  # A run that ends early waits for one compilation at most.


def compile_steps(setup: Setup, state: Any, statics: tuple[Any, tuple[str, ...]]) -> None:
    """Compiles the program of a whole epoch.

    Args:
      state: the shapes of the state, with their shardings.
      statics: the arguments `program` and `frozen` of `train_steps`.
    """
    placement, size = setup.placement, setup.steps_per_dispatch * setup.batch_size
    plan = put(plain_plan(size, setup.batch_size), placement.plan_sharding)
    keys = setup.train_key, put(setup.augment_key, placement.replicated)
    program, frozen = statics
    train_steps.lower(state, setup.train_input, plan, *keys, program=program, frozen=frozen).compile()
