"""The loop: epochs, each with its validation, on a device that does not wait for the host."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax

from cnnjax.ahead import Ahead
from cnnjax.dispatch import Dispatch, open_dispatches
from cnnjax.evaluation import start_evaluation
from cnnjax.metrics import Metrics, Scores, Totals
from cnnjax.program import train_steps
from cnnjax.runs.directory import OpenRun
from cnnjax.runs.profile import Profile
from cnnjax.runs.progress import (
    Callbacks,
    EndedEpoch,
    Progress,
    add_steps,
    add_user_scores,
    raise_if_stopped,
    record_epoch,
    save_within_epoch,
)
from cnnjax.setup import Setup
from cnnjax.sharding import fetch
from cnnjax.state import TrainState, copy_state
from cnnjax.step import train_step
from cnnjax.throughput import Clock, make_timing, seconds_at_peak

# Longer epochs are not queued: a process that is stopped ends when the device has computed what is queued.
QUEUED_SECONDS = 5.0


def fit(
    setup: Setup,
    state: TrainState,
    progress: Progress,
    run: OpenRun,
    callbacks: Callbacks,
    *,
    ahead: Ahead,
    tracer: Profile,
    checkpoint_seconds: float,
) -> tuple[TrainState, Progress]:
    """Trains to the last epoch, or until `on_epoch` or `Config.patience` stops the run; `state` is donated.

    Returns:
      The last state, and its progress.

    Raises:
      NonFiniteLossError: the loss or a parameter became infinite or nan.
      StorageError: a checkpoint could not be written.
      Interrupted: a signal arrived.
    """
    steps_per_epoch, num_epochs = setup.steps_per_epoch, setup.program.num_epochs
    clock = Clock(progress.seconds)
    knows_flops = setup.program.step_fn is train_step  # A user's step may compute anything.
    at_peak = {
        shape: seconds_at_peak(setup.config.model, shape, setup.placement.devices) if knows_flops else None
        for shape in {setup.train_shape(program) for program in setup.program.distinct_programs()}
    }
    is_due = partial(run.checkpoints.is_due, checkpoint_seconds)
    start = partial(start_steps, setup, ahead=ahead, tracer=tracer)
    ended: EndedEpoch | None = None  # The previous epoch, until it is recorded.
    queued: Metrics | None = None  # Of steps that were started before the metrics of the previous ones were read.
    with (
        open_dispatches(setup, int(state.step)) as dispatches,
        run.report.progress(num_epochs, steps_per_epoch, start=int(state.step)),
    ):
        dispatch = next(dispatches, None)
        clock.start_epoch(progress.totals.num_examples)
        while dispatch is not None and not progress.stopped:
            metrics, queued = queued, None
            if metrics is None:
                state, metrics = start(state, dispatch)
            (first, step), shape = dispatch.steps, setup.train_shape(dispatch.program)
            if ended is not None:  # The device computes meanwhile.
                progress = record_epoch(run, progress, ended, callbacks, must_save=is_due())
                if progress.stopped:
                    return ended.state, progress  # Discards what was dispatched.
                ended = None
            dispatch, validation = next(dispatches, None), None
            # So that the device need not wait for the host at the end of each epoch.
            if setup.queues_validation and not tracer.traces(step, steps_per_epoch):
                validation = start_validation(setup, state, run)
                if dispatch is not None and may_queue(run, clock.epoch_seconds):
                    state, queued = start(state, dispatch)
            metrics = fetch(metrics)  # Waits for the device.
            tracer.end(step)
            callbacks.report_steps(first + 1, metrics)
            progress = add_steps(run, progress, metrics, (first, step), clock.seconds())
            signum, must_save = run.hosts.agreed(stop=run.stop.signum, save=is_due())
            if step % steps_per_epoch:  # The last step of an epoch is saved with its scores, in `record_epoch`.
                if signum is not None or must_save:
                    save_within_epoch(run, state, progress, (first, step), signum)
                continue
            images_per_second = clock.end_steps(progress.totals.num_examples)
            validation = validation or start_validation(setup, state, run)
            scores = validation.wait()
            seconds = clock.seconds()
            ended = EndedEpoch(
                state=validation.state,
                steps=(first, step),
                train=progress.totals.means(),
                grad_norm=progress.grad_norm / steps_per_epoch,
                validation=scores,
                timing=make_timing(step // steps_per_epoch, images_per_second, seconds, at_peak[shape]),
            )
            progress = progress._replace(totals=Totals(), grad_norm=0.0, seconds=seconds)
            signum = signum or run.hosts.agreed(stop=run.stop.signum, save=False)[0]  # It may have arrived now.
            # Steps that are traced must not be timed with this.
            if signum is not None or dispatch is None or tracer.traces(step, setup.steps_per_dispatch):
                progress = record_epoch(run, progress, ended, callbacks, must_save=True)
                raise_if_stopped(run, step, signum)
                ended = None
            clock.start_epoch()
    return state, progress


def may_queue(run: OpenRun, epoch_seconds: float) -> bool:
    """Returns whether the next epoch may be queued on the device before the metrics of this one are read.

    Args:
      epoch_seconds: the duration of the last epoch.
    """
    several = run.hosts.count > 1  # They must agree first whether to stop.
    return epoch_seconds < QUEUED_SECONDS and run.stop.signum is None and not several


def start_steps(
    setup: Setup, state: TrainState, dispatch: Dispatch, *, ahead: Ahead, tracer: Profile
) -> tuple[TrainState, Metrics]:
    """Calls `train_steps`, and marks the steps in the trace if they are traced; does not wait for the device.

    Args:
      state: donated.
    """
    (step, after), program = dispatch.steps, dispatch.program
    num_steps = after - step
    arguments = (dispatch.pixels, dispatch.plan, setup.train_key, dispatch.augment_key)
    if num_steps == setup.steps_per_dispatch:  # Not the rest of an epoch within which the run resumes.
        ahead.wait_for(program)
    if tracer.is_new_program(step, num_steps, program):  # Compiles it outside of what is measured.
        jax.block_until_ready(train_steps(copy_state(state), *arguments, program=program))
    tracer.begin(step, num_steps, step // setup.steps_per_epoch)
    return train_steps(state, *arguments, program=program)


class Validation(NamedTuple):
    """A validation that was started, perhaps before the device has finished the steps of its epoch."""

    state: TrainState  # A copy of the state at the end of the epoch.
    wait: Callable[[], Scores | None]  # Waits for the scores; None without a validation set.


def start_validation(setup: Setup, state: TrainState, run: OpenRun) -> Validation:
    """Copies the state at the end of an epoch, and starts to score the copy.

    Does not wait for the device if the validation set has few batches, see `Setup.queues_validation`.
    """
    snapshot = copy_state(state)
    if not len(setup.validation.label):
        return Validation(snapshot, lambda: None)
    keeps = setup.config.metrics is not None
    finish = start_evaluation(snapshot, setup.validation, setup.config.model, setup.placement, keep_logits=keeps)
    return Validation(snapshot, lambda: add_user_scores(run, finish(), setup.validation.label))
