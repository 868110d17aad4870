"""Training, from a `Config` to a result: set up, restore, train, validate, save, test."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax

from cnnjax.ahead import prepared_ahead
from cnnjax.config import Config
from cnnjax.errors import check, option
from cnnjax.hosts import current
from cnnjax.inputs import Inputs, load_inputs
from cnnjax.loop import fit
from cnnjax.memory import explain_out_of_memory
from cnnjax.prepare import set_up
from cnnjax.process.console import Report
from cnnjax.process.settings import start_jax
from cnnjax.process.signals import Stop
from cnnjax.runs import manifest
from cnnjax.runs.directory import OpenRun, open_run
from cnnjax.runs.loggers import Logger, Loggers, check_loggers
from cnnjax.runs.profile import FOLDER, Profile, is_range
from cnnjax.runs.progress import Callbacks, OnEpoch, OnStep, Progress, restore, write_progress
from cnnjax.runs.records import data_version, read_record
from cnnjax.runs.result import score_test_set
from cnnjax.runs.run import Run, make_run
from cnnjax.runs.source import SourceCode
from cnnjax.setup import Setup
from cnnjax.sharding import move, parse_mesh
from cnnjax.state import TrainState


def train_and_evaluate(
    config: Config,
    *,
    run_dir: str | os.PathLike[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    resume: bool | Literal["auto"] = False,
    on_step: OnStep | None = None,
    on_epoch: OnEpoch | None = None,
    loggers: Sequence[Logger] = (),
    profile: tuple[int, int] | None = None,
    checkpoint_seconds: float = 60.0,
    devices: Sequence[Any] | None = None,
    mesh: str | None = None,
    report: Report | None = None,
    stream: bool | None = None,
) -> Run:
    """Trains a network and scores it on the test set, in one run directory.

    Example:
      >>> run = train_and_evaluate(
      ...     config,
      ...     run_dir="runs/mine",
      ...     resume="auto",
      ...     on_epoch=lambda row, state: row["validation_accuracy"] > 0.9,
      ...     loggers=[TensorBoard()],
      ...     report=Report(),
      ... )

    An exception in a callback is raised unchanged, and the run can be resumed. A resumed run calls the callbacks for
    all steps and epochs after its checkpoint, some of them for the second time.

    Args:
      config: the configuration of the run.
      run_dir: runs/<name>-seed<k> if None.
      data_dir: the tfds directory; tfds's default if None.
      resume: True and "auto" resume the run in `run_dir` exactly where it stopped, or start it; True says so if there
        was nothing to resume. A finished run is not trained again, except for more epochs if no step depends on their
        number (a constant learning rate, no lookahead). False: `run_dir` must be new.
      on_step: called as `on_step(step, metrics)` with the number of steps so far and, as floats, the means over the
        batch: "loss", "accuracy" (if the labels are class indices), "grad_norm", and the values that the loss or the
        training step names. What it returns is ignored. On an accelerator an epoch of images in memory is one program,
        so the calls for its steps come at its end.
      on_epoch: called as `on_epoch(row, state)` after each epoch, before it is saved. `row` contains the values of the
        epoch in metrics.jsonl and timing.jsonl, and "best_epoch", the epoch with the best validation score so far (see
        `Config.best_by`; the latest if several are equal, or without validation). `state` may be kept, but not donated.
        Returning True stops the run, which is then scored; returning False or None continues. The decision should
        depend on the arguments alone: then a run that was killed, and is resumed with the same `on_epoch`, stops after
        the same epoch. A run that it stopped continues if it is resumed for more epochs.
      loggers: called before `on_step` and `on_epoch`, see `Logger`; they do not change the result.
      profile: trace the steps after the first of these numbers of steps, up to the second, into `run_dir`/profile; no
        bit depends on it. See `Profile`.
      checkpoint_seconds: save during an epoch, too, this long after the last save; no bit depends on it. On an
        accelerator an epoch of images in memory is one program, so only its end is saved.
      devices: the devices that share each batch; all if None.
      mesh: how they do: data=4,model=2 divides each batch among eight, and the large arrays of the state between two;
        None: the largest number of devices that divides the batch, with a copy of the state each.
      report: receives messages and metrics, see `Report`; None: nothing is printed, and a failing logger causes a
        `UserWarning`.
      stream: read the images from the prepared files while training, instead of keeping them in memory; None: if they
        would take more than half of it, and are in ArrayRecord format. On a CPU no bit depends on it, so a run may be
        resumed either way; an accelerator, whose programs are then single steps instead of epochs, may round
        differently.

    Raises:
      UserError: the user has to fix something; see its message.
      NonFiniteLossError: the loss became infinite or nan; earlier checkpoints are kept.
      Interrupted: SIGINT, SIGTERM or SIGHUP arrived; the run can be resumed.
    """
    return train_run(
        config,
        run_dir=run_dir,
        data_dir=data_dir,
        resume=resume,
        on_step=on_step,
        on_epoch=on_epoch,
        loggers=loggers,
        profile=profile,
        checkpoint_seconds=checkpoint_seconds,
        devices=devices,
        mesh=mesh,
        report=report,
        stream=stream,
    )


def train_run(
    config: Config,
    *,
    run_dir: str | os.PathLike[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    resume: bool | Literal["auto"] = False,
    on_step: OnStep | None = None,
    on_epoch: OnEpoch | None = None,
    loggers: Sequence[Logger] = (),
    profile: tuple[int, int] | None = None,
    checkpoint_seconds: float = 60.0,
    devices: Sequence[Any] | None = None,
    mesh: str | None = None,
    report: Report | None = None,
    stream: bool | None = None,
    stop: Stop | None = None,
    inputs: Inputs | None = None,
    code: SourceCode | None = None,
) -> Run:
    """Does what `train_and_evaluate` does, for a caller that trains several runs.

    Args:
      stop: receives signals, for a caller that trains in several threads; None: this function handles them.
      inputs: those of `config`, if the caller has loaded them.
      code: the source code that trains, if the caller has recorded it.
    """
    check("config", "a Config", isinstance(config, Config), repr(config))
    check("report", "a Report or None", report is None or isinstance(report, Report), repr(report))
    check_loggers(loggers)
    _check_options(resume, profile, checkpoint_seconds, devices, mesh, on_step=on_step, on_epoch=on_epoch)
    _check_paths(run_dir=run_dir, data_dir=data_dir)
    start_jax()
    hosts = current()
    say = None if report is None else report.say
    callbacks = Callbacks(on_step, on_epoch, Loggers(loggers if hosts.leads else (), say), hosts)
    report = report if report is not None and hosts.leads else Report(quiet=True)
    run_dir = Path("runs") / config.run_name if run_dir is None else Path(os.path.expanduser(run_dir))
    with (
        hosts.telling(),
        explain_out_of_memory(except_for=lambda: callbacks.raised),
        open_run(run_dir, config, report, resume=bool(resume), stop=stop, code=code, hosts=hosts) as run,
    ):
        if run.finished() is not None:
            if loggers or profile:
                report.say(f"{run_dir} is finished: there is nothing to log, and no step to profile.")
            trained = make_run(run_dir, run.config, read_record(run_dir).data)
        else:
            inputs = inputs or load_inputs(config, data_dir, report.say, version=data_version(run_dir), stream=stream)
            folder = FOLDER if hosts.leads else f"{FOLDER}-{hosts.index}"  # Processes may share a host.
            tracer = Profile(profile, run_dir, report.say, folder)
            # What decides which programs a process runs.
            hosts.check_same("profile", "the same in all processes", profile)
            hosts.check_same("mesh", "the same in all processes", mesh)
            streams = inputs.dataset.streams
            hosts.check_same("stream", f"the same in all processes (give {option('stream')} to all)", streams)
            setup, state, progress = _begin(
                run, inputs, tracer, devices=devices, mesh=mesh, resume=resume, on_epoch=on_epoch
            )
            trained = _train(
                run,
                setup,
                state,
                progress,
                callbacks=callbacks,
                tracer=tracer,
                checkpoint_seconds=checkpoint_seconds,
            )
        run.stop.finished = stop is None
    report.result(trained.finished_result(), run_dir)
    return trained


def _begin(
    run: OpenRun,
    inputs: Inputs,
    tracer: Profile,
    *,
    devices: Sequence[Any] | None,
    mesh: str | None,
    resume: bool | Literal["auto"],
    on_epoch: OnEpoch | None,
) -> tuple[Setup, TrainState, Progress]:
    """Sets up a run and begins a session of it, with its latest checkpoint if there is one."""
    say = run.report.say
    with run.stop.held():  # An exception that interrupts XLA's compiler crashes the process when it ends.
        setup, state = set_up(run.config, inputs, devices, mesh=mesh, title=str(run.run_dir), say=say)
    placement, num_steps = setup.placement, setup.program.num_steps
    tracer.check(0, num_steps)  # Before anything is written.
    streams = inputs.dataset.streams
    environment = manifest.environment(placement.devices, placement.state_mesh, run.hosts.names, stream=streams)
    name = None if on_epoch is None else getattr(on_epoch, "__qualname__", type(on_epoch).__qualname__)
    run.begin(setup.facts, {**environment, "on_epoch": name})
    state, progress = restore(run, state, placement.of_state(state))
    tracer.check(int(state.step), num_steps)
    run.write_config(setup.facts, only_new=True)
    if run.checkpoints.latest() is not None:
        say(f"resuming at step {state.step} of {num_steps}")
    elif resume is True:
        say(f"There is nothing to resume in {run.run_dir}: starting from scratch.")
    return setup, state, progress


def _train(
    run: OpenRun,
    setup: Setup,
    state: TrainState,
    progress: Progress,
    *,
    callbacks: Callbacks,
    tracer: Profile,
    checkpoint_seconds: float,
) -> Run:
    """Trains to the end, and scores the best checkpoint on the test set; `state` is donated."""
    begun = Run(run.run_dir, setup.config, setup.facts, None)
    with (
        callbacks.loggers.started(begun, int(state.step), setup.program.num_steps, run.stop),
        prepared_ahead(setup, state, progress) as ahead,
    ):
        run.write_config(setup.facts)
        write_progress(run, progress)
        with tracer:
            if not progress.stopped and int(state.step) < setup.program.num_steps:  # Else only its score is missing.
                state, progress = fit(
                    setup,
                    state,
                    progress,
                    run,
                    callbacks,
                    ahead=ahead,
                    tracer=tracer,
                    checkpoint_seconds=checkpoint_seconds,
                )
        result, best, test_logits = score_test_set(setup, state, progress, run, ahead.test_set())
        run.checkpoints.wait()
        run.write_result(result)
        callbacks.loggers.result(result)
    # A state that is divided may be too large for one device. It is read from its checkpoint when it is used.
    kept = None if setup.placement.divides_state else move(best, setup.placement.device)
    return replace(begun, result=result, test_logits=test_logits, _trained=(kept, progress.rows, progress.timing))


def _check_options(
    resume: Any, profile: Any, checkpoint_seconds: Any, devices: Any, mesh: Any, **callbacks: Any
) -> None:
    check("resume", "False, True or 'auto'", isinstance(resume, bool) or resume == "auto", repr(resume))
    check("profile", "two numbers of steps, or None", profile is None or is_range(profile), repr(profile))
    seconds = isinstance(checkpoint_seconds, int | float) and checkpoint_seconds >= 0
    check("checkpoint_seconds", "a number of at least 0", seconds, repr(checkpoint_seconds))
    some = [*devices] if hasattr(devices, "__len__") else []
    distinct = all(isinstance(device, jax.Device) for device in some) and len({*some}) == len(some) > 0
    valid = devices is None or distinct
    check("devices", "a sequence of different devices, or None", valid, repr(devices))
    if mesh is not None:
        parse_mesh(mesh)
    for name, callback in callbacks.items():
        check(name, "a function or None", callback is None or callable(callback), repr(callback))


def _check_paths(**paths: Any) -> None:
    for name, path in paths.items():
        valid = path is None or (isinstance(path, (str, os.PathLike)) and os.fspath(path) != "")
        check(name, "a path or None", valid, repr(path))
