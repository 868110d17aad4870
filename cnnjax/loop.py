"""The loop: epochs, each with its validation, on a device that does not wait for the host."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from itertools import repeat
from typing import Any

import jax
from jaxtyping import Array, Key

from cnnjax.ahead import Ahead
from cnnjax.data.feed import StreamedSet
from cnnjax.data.order import Plan, epoch_plan
from cnnjax.metrics import Metrics, Scores, Totals
from cnnjax.prepare import Setup
from cnnjax.program import Program, start_evaluation, train_steps
from cnnjax.runs.directory import OpenRun
from cnnjax.runs.profile import Profile
from cnnjax.runs.progress import (
    Callbacks,
    EndedEpoch,
    Progress,
    add_steps,
    end_epoch,
    raise_if_stopped,
    save_within_epoch,
    score_own,
)
from cnnjax.sharding import fetch, put
from cnnjax.step import TrainState, copy_state
from cnnjax.throughput import make_timing, seconds_at_peak

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
    config, steps = setup.config, setup.steps_per_epoch
    step = int(state.step)
    begin = time.perf_counter() - progress.seconds  # When a run without interruptions would have begun.
    at_peak = {
        shape: seconds_at_peak(config.model, shape, setup.placement.devices)
        for shape in {setup.train_shape(program) for program in setup.program.distinct()}
    }
    progress = progress._replace(stopped_within=None)
    # The previous epoch, until it is reported; the metrics of steps that are queued on the device.
    ended = queued = None
    start = partial(start_steps, setup, ahead=ahead, tracer=tracer)
    statics = cache(setup.statics)
    with training_input(setup, step) as inputs, run.report.progress(config.num_epochs, steps, start=step):
        dispatches = zip(inputs, plan_dispatches(setup, step), strict=True)
        next_dispatch = next(dispatches)
        epoch_start, epoch_seconds, examples_before = time.perf_counter(), math.inf, progress.totals.num_examples
        while step < setup.program.num_steps and progress.stopped_within is None:
            metrics, queued, epoch = queued, None, step // steps
            if metrics is None:
                state, metrics = start(state, next_dispatch, step=step, statics=statics(epoch))
            first, step = step, step + len(next_dispatch[1][0].example)
            if ended is not None:  # The device computes meanwhile.
                progress = end_epoch(
                    run, progress, ended, callbacks, must_save=run.checkpoints.is_due(checkpoint_seconds)
                )
                if progress.stopped_within is not None:
                    return ended.state, progress  # Discards what was dispatched.
                ended = None
            next_dispatch, snapshot = next(dispatches), None
            # So that the device need not wait for the host at the end of each epoch.
            if setup.queues_validation and not tracer.traces(step, steps):
                snapshot = start_validation(setup, state, run)
                if step < setup.program.num_steps and may_queue(run, epoch_seconds):
                    state, queued = start(state, next_dispatch, step=step, statics=statics(epoch + 1))
            metrics = fetch(metrics)  # Waits for the device.
            tracer.end(step)
            callbacks.report_steps(first + 1, metrics)
            progress = add_steps(run, progress, metrics, (first, step), time.perf_counter() - begin)
            is_due = run.checkpoints.is_due(checkpoint_seconds)
            signum, is_due = run.hosts.agreed(stop=run.stop.signum, save=is_due)
            if step % steps:  # The last step of an epoch is saved with its scores, in `end_epoch`.
                if signum is not None or is_due:
                    save_within_epoch(run, state, progress, (first, step), signum)
                continue
            epoch_seconds = time.perf_counter() - epoch_start
            images_per_second = (progress.totals.num_examples - examples_before) / epoch_seconds
            snapshot, validate = snapshot or start_validation(setup, state, run)
            scores = validate()
            seconds = time.perf_counter() - begin
            ended = EndedEpoch(
                state=snapshot,
                steps=(first, step),
                train=progress.totals.means(),
                grad_norm=progress.grad_norm / steps,
                validation=scores,
                timing=make_timing(
                    epoch + 1, images_per_second, seconds, at_peak[setup.train_shape(statics(epoch)[0])]
                ),
            )
            progress = progress._replace(totals=Totals(), grad_norm=0.0, seconds=seconds)
            signum = signum or run.hosts.agreed(stop=run.stop.signum, save=False)[0]  # It may have arrived now.
            # Steps that are traced must not be timed with this.
            if signum is not None or step == setup.program.num_steps or tracer.traces(step, setup.steps_per_dispatch):
                progress = end_epoch(run, progress, ended, callbacks, must_save=True)
                raise_if_stopped(run, step, signum)
                ended = None
            epoch_start, examples_before = time.perf_counter(), 0
    return state, progress


def may_queue(run: OpenRun, epoch_seconds: float) -> bool:
    """Returns whether the next epoch may be queued on the device before the metrics of this one are read.

    Args:
      epoch_seconds: the duration of the last epoch.
    """
    several = run.hosts.count > 1  # They must agree first whether to stop.
    return epoch_seconds < QUEUED_SECONDS and run.stop.signum is None and not several


def start_steps(
    setup: Setup,
    state: TrainState,
    dispatch: tuple[Any, tuple[Plan, Key[Array, ""]]],
    *,
    step: int,
    statics: tuple[Program, tuple[str, ...]],
    ahead: Ahead,
    tracer: Profile,
) -> tuple[TrainState, Metrics]:
    """Calls `train_steps`, and marks the steps in the trace if they are traced; does not wait for the device.

    Args:
      state: donated.
      dispatch: what `training_input` and `plan_dispatches` yield.
      step: the number of steps that are done.
      statics: the arguments `program` and `frozen` of `train_steps`.
    """
    pixels, (plan, augment_key) = dispatch
    arguments, (program, frozen) = (pixels, plan, setup.train_key, augment_key), statics
    options: Any = {"program": program, "frozen": frozen}
    if len(plan.example) == setup.steps_per_dispatch:  # Not the rest of an epoch within which the run resumes.
        ahead.wait_for(statics)
    if tracer.is_new_program(step, len(plan.example), statics):  # Compiles it outside of what is measured.
        jax.block_until_ready(train_steps(copy_state(state), *arguments, **options))
    tracer.begin(step, len(plan.example), step // setup.steps_per_epoch)
    return train_steps(state, *arguments, **options)


def start_validation(setup: Setup, state: TrainState, run: OpenRun) -> tuple[TrainState, Callable[[], Scores | None]]:
    """Copies the state at the end of an epoch, and starts to score the copy.

    Does not wait for the device if the validation set has few batches, see `Setup.queues_validation`.

    Returns:
      The copy, and a function that waits for its scores (None without validation).
    """
    snapshot = copy_state(state)
    if not len(setup.validation.label):
        return snapshot, lambda: None
    keeps = setup.config.metrics is not None
    finish = start_evaluation(snapshot, setup.validation, setup.config.model, setup.placement, keep_logits=keeps)
    return snapshot, lambda: score_own(run, finish(), setup.validation.label)


def training_input(setup: Setup, step: int) -> AbstractContextManager[Iterator[Any]]:
    """Opens the argument `pixels` of each call of `train_steps` from `step` on, without end.

    It is the training set every time, or one streamed batch after another.
    """
    train, batch_size = setup.train, setup.batch_size
    if isinstance(train, StreamedSet):
        return train.training_batches(setup.config.seed, step, batch_size, setup.balanced_label, setup.placement)
    return nullcontext(repeat(train))


def plan_dispatches(setup: Setup, step: int, program: Program | None = None) -> Iterator[tuple[Plan, Key[Array, ""]]]:
    """Yields what each call of `train_steps` needs from `step` on, without end: a plan, and the key of its epoch.

    Args:
      program: the program of all epochs; None: each epoch has its own.
    """
    config, train, placement = setup.config, setup.train, setup.placement
    epoch, first = divmod(step, setup.steps_per_epoch)
    while True:
        used = program or setup.program.at_epoch(epoch)
        height, width, _ = setup.train_shape(used)
        plan = epoch_plan(
            config.seed,
            epoch,
            len(train.label),
            batch_size=setup.batch_size,
            augment=used.augment,
            image_size=(height, width),
            balanced_label=setup.balanced_label,
        )
        key = put(jax.random.fold_in(setup.augment_key, epoch), placement.replicated)
        for i in range(first, setup.steps_per_epoch, setup.steps_per_dispatch):
            yield put(plan.row(slice(i, i + setup.steps_per_dispatch)), placement.plan_sharding), key
        epoch, first = epoch + 1, 0
