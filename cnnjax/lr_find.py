"""The learning-rate range test: the loss while the learning rate of a run rises from step to step."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import optax
from jaxtyping import Float

from cnnjax.config import Config, word
from cnnjax.dispatch import Dispatch, open_dispatches
from cnnjax.errors import UserError
from cnnjax.inputs import load_inputs
from cnnjax.memory import explain_out_of_memory
from cnnjax.metrics import Totals
from cnnjax.optim.optimizer import Optimizer
from cnnjax.prepare import set_up
from cnnjax.process.console import Report, track
from cnnjax.process.settings import start_jax
from cnnjax.program import train_steps
from cnnjax.setup import Setup
from cnnjax.state import TrainState

RANGE = 1e4  # From 1e-7 to 10 for the usual 1e-3, as in fastai.
NUM_UPDATES, HALF_DECADE = 161, 10  # 20 per factor of 10. More than an epoch of a small data set, less of a large one.
SMOOTHING = 0.9  # Delays the curve by about 10 updates.
# For a suggestion the loss must fall by this fraction, or, if that is less, by this many deviations of the first losses
# (and by `LEAST_FALL`): a bounded loss may begin near its largest value.
FALL, DEVIATIONS, LEAST_FALL = 0.05, 4, 0.001


class RangeTest(NamedTuple):
    """The result of `find_learning_rate`.

    Attributes:
      learning_rate: of each update, rising exponentially.
      loss: the training loss of the batch after each update.
      diverged: whether the loss rose to twice the first one, or became infinite or nan, at the end.
    """

    learning_rate: Float[np.ndarray, " U"]
    loss: Float[np.ndarray, " U"]
    diverged: bool

    @property
    def smoothed(self) -> Float[np.ndarray, " U"]:
        """The mean of the losses so far, with weights that fall by 10% per update."""
        average, values = 0.0, []
        for i, loss in enumerate(self.loss.tolist(), 1):
            average = SMOOTHING * average + (1 - SMOOTHING) * loss
            values.append(average / (1 - SMOOTHING**i))
        return np.array(values)

    @property
    def lowest(self) -> float:
        """The learning rate with the lowest smoothed loss."""
        return float(self.learning_rate[self.smoothed.argmin()])

    @property
    def steepest(self) -> float:
        """The learning rate below `lowest` around which the smoothed loss falls most, over half a factor of 10."""
        n = HALF_DECADE
        falling = self.smoothed[n : self.smoothed.argmin() + 1]  # The first means are of few losses.
        fall = falling[:-n] - falling[n:]
        return float(self.learning_rate[n + n // 2 + fall.argmax()]) if len(fall) else self.lowest

    @property
    def suggestion(self) -> float | None:
        """A tenth of `lowest`, or `steepest` if `is_flat`, with two digits; None if the loss hardly fell.

        Source: fastai's `lr_find`, its functions `minimum` and `steep`; the test is of Smith, "Cyclical Learning Rates
        for Training Neural Networks" (2017), section 3.3.
        """
        if not len(self.loss):
            return None
        early = self.loss[: max(1, len(self.loss) // 10)]
        first = float(np.median(early))
        noise = DEVIATIONS * float(np.std(early)) if len(early) > 2 else math.inf
        if not self.smoothed.min() < first - min(FALL * abs(first), max(noise, LEAST_FALL * abs(first))):
            return None
        return float(f"{self.steepest if self.is_flat else self.lowest / 10:.1e}")

    @property
    def is_flat(self) -> bool:
        """Whether `lowest` is above 100 times `steepest`: all was learned before, so `lowest` tells nothing."""
        return self.lowest > 100 * self.steepest


def find_learning_rate(
    config: Config, *, data_dir: str | os.PathLike[str] | None = None, report: Report | None = None
) -> RangeTest:
    """Raises the learning rate from 1/10,000 of the configured one to 10,000 times that, until the loss diverges.

    It makes the steps of the run: the same network, data, augmentation and optimizer, in which only the schedule
    differs. Factors of parameter groups are kept, and what is frozen in the first epoch stays frozen. It writes no
    file, except for data that it has to prepare, and does not change a later run.

    Args:
      config: the configuration of a run.
      data_dir: the tfds directory; tfds's default if None.
      report: receives messages; None: nothing is printed.

    Raises:
      UserError: the user has to fix something, see `train_and_evaluate`; or the optimizer does not use the schedule.
    """
    start_jax()
    say = (report or Report(quiet=True)).say
    inputs = load_inputs(config, data_dir, say)
    with explain_out_of_memory():
        used, low = [], config.optim.learning_rate / RANGE
        rising = optax.exponential_decay(low, NUM_UPDATES - 1, RANGE**2)

        def schedule(update: Any) -> Any:
            used.append(True)
            return rising(update)

        swept = dataclasses.replace(config, optim=_with_schedule(_as_in_first_epoch(config), schedule))
        setup, state = set_up(swept, inputs, None, title="learning-rate range test", say=say)
        if not used:
            raise UserError(
                f"`optim` must use the argument `learning_rate` of its `transform`, got {word(type(config.optim))}, "
                "which does not."
            )
        # A lookahead holds the parameters back towards the end of a run, so the sweep must be far from it.
        num_steps = 10 * (NUM_UPDATES + 1) * config.optim.accumulate_steps
        num_epochs = max(config.num_epochs, -(-num_steps // setup.steps_per_epoch))
        program = setup.program_at(0)  # Of the run: an augmentation may depend on its number of epochs.
        program = program._replace(num_steps=num_epochs * setup.steps_per_epoch, num_epochs=num_epochs)
        setup = setup._replace(program=program, steps_per_dispatch=1)
        with open_dispatches(setup, 0, lambda epoch: program) as dispatches:
            return _sweep(setup, state, dispatches, low * RANGE ** np.linspace(0, 2, NUM_UPDATES))


def _as_in_first_epoch(config: Config) -> Optimizer:
    """Returns the optimizer of a run, in which all epochs freeze what the first one does."""
    optim, groups = config.optim.for_network(config.model), []
    for group in optim.groups:
        frozen = group.start_epoch > 0 or group.num_epochs == 0
        groups.append(dataclasses.replace(group, start_epoch=0, num_epochs=0 if frozen else None))
    return dataclasses.replace(optim, groups=tuple(groups))


def _with_schedule(optim: Optimizer, schedule: Callable[[Any], Any]) -> Optimizer:
    """Returns an optimizer of a new class, which therefore shares no compiled program with the run's own."""
    cls: Any = type(optim)
    members = {"make_schedule": lambda self, num_updates: schedule, "__module__": cls.__module__}
    values = {f.name: getattr(optim, f.name) for f in dataclasses.fields(optim) if f.init}
    return type(cls.__name__, (cls,), members)(**values)


def _sweep(
    setup: Setup, state: TrainState, dispatches: Iterator[Dispatch], rates: Float[np.ndarray, " U"]
) -> RangeTest:
    found, first = RangeTest(rates[:0], rates[:0], False), math.nan
    # The loss of the first batches precedes every update.
    for i in track(range(len(rates) + 1), "learning rates", total=len(rates) + 1):
        totals = Totals()
        for _ in range(setup.config.optim.accumulate_steps):
            dispatch = next(dispatches)
            arguments = (dispatch.pixels, dispatch.plan, setup.train_key, dispatch.augment_key)
            state, metrics = train_steps(state, *arguments, program=dispatch.program)
            totals = totals.add(metrics)  # Waits for the device.
        loss = totals.means().loss
        if i == 0:
            if not math.isfinite(loss):
                raise UserError(f"`loss` must be finite before the first update, got {loss}. Check it and the images.")
            first = loss
            continue
        if not math.isfinite(loss):
            return found._replace(diverged=True)
        found = RangeTest(rates[:i], np.append(found.loss, loss), False)
        if found.smoothed[-1] - first > abs(first):
            return found._replace(diverged=True)
    return found
