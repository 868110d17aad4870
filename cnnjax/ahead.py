"""Prepares in a thread, while an accelerator trains, the programs of later epochs and the score of the test set."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any, NamedTuple

import jax

from cnnjax.compiler import compiler_options
from cnnjax.data.batches import Pixels
from cnnjax.data.feed import StreamedSet, pixels_of
from cnnjax.evaluation import compile_evaluation
from cnnjax.program import Program
from cnnjax.runs.progress import Progress
from cnnjax.setup import Setup, trace_steps
from cnnjax.state import TrainState

EVALUATION = "evaluation"


class Ahead(NamedTuple):
    """The preparations of the thread.

    Attributes:
      open_test: returns the test set.
      programs: the compilations, by the argument of `train_steps`, and `EVALUATION`, in the order in which they are
        needed. What fails here fails again where it is needed.
    """

    open_test: Callable[[], Pixels | StreamedSet]
    programs: dict[Any, Future[None]]

    def wait_for(self, program: Any) -> None:
        """Waits for the compilation of a program, if there is one: otherwise the caller would compile it, too."""
        if program in self.programs:
            wait([self.programs[program]])

    def test_set(self) -> Pixels | StreamedSet:
        """Returns the test set when the program that scores it is compiled."""
        self.wait_for(EVALUATION)
        return self.open_test()


@contextmanager
def prepared_ahead(setup: Setup, state: TrainState, progress: Progress) -> Iterator[Ahead]:
    """Prepares in the context what training needs later, if an epoch is one program, during which the host is idle."""

    def open_test() -> Pixels | StreamedSet:
        return pixels_of(setup.dataset.open("test"), setup.train.standardization)

    if setup.steps_per_dispatch == 1:
        yield Ahead(open_test, {})
        return
    model, placement, tta = setup.config.model, setup.placement, setup.config.tta
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    programs: dict[Any, Future[None]] = {}
    with ThreadPoolExecutor(1, "ahead") as thread:
        settings: Any = jax.config
        default_device = settings.jax_default_device  # It belongs to a thread, and to the key of a program.

        def submit(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
            def call() -> Any:
                with jax.default_device(default_device):
                    return function(*arguments)

            return thread.submit(copy_context().run, call)

        def compile_steps(program: Program) -> None:
            trace_steps(setup, shapes, program).lower().compile()

        def compile_score() -> None:
            pixels: Any = test.result()  # In memory, as the training set.
            compile_evaluation(shapes, pixels, model=model, tta=tta, placement=placement)

        test = submit(open_test)
        # Otherwise XLA selects kernels by timing them, for which the device must be idle.
        if placement.device.platform != "gpu" or "xla_gpu_deterministic_ops" in compiler_options():
            first, within = divmod(int(state.step), setup.steps_per_epoch)
            epochs = range(first, first if progress.stopped else setup.config.num_epochs)
            # The first epoch compiles its own program, which is shorter if the run resumes within it.
            later = list(dict.fromkeys(setup.program_at(epoch) for epoch in epochs))[0 if within else 1 :]
            programs |= {program: submit(compile_steps, program) for program in later}
            programs[EVALUATION] = submit(compile_score)
        try:
            yield Ahead(test.result, programs)
        finally:
            thread.shutdown(wait=False, cancel_futures=True)  # A run that ends early waits for one compilation at most.
