"""The loop: epochs of training steps, validation, checkpoints, and the test set once at the end."""

import math
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax

from cnnjax.cli.console import Report
from cnnjax.cli.signals import Interrupted, Stop, stop_signals
from cnnjax.config import Config
from cnnjax.data.batches import Pixels
from cnnjax.errors import NonFiniteLossError, UserError
from cnnjax.evaluate import Scores, Totals
from cnnjax.experiment import Run, count_params, device, set_up
from cnnjax.runs import directory as rundir
from cnnjax.runs import manifest
from cnnjax.runs.checkpoints import Checkpoints, all_finite, recover
from cnnjax.runs.files import file_sha256, tree_sha256, write_json
from cnnjax.step import TrainState


class Progress(NamedTuple):
    """What the loop knows besides the state, on the host; a checkpoint keeps it, so that no metric line can be lost."""

    rows: list[dict[str, Any]]  # Of metrics.jsonl: one an epoch, the same bits for the same seed.
    timing: list[dict[str, Any]]  # Of timing.jsonl.
    totals: Totals = Totals()  # Of the epoch so far.
    seconds: float = 0.0  # Of training, all sessions together.

    def best(self) -> dict[str, Any] | None:
        """Returns the row with the best validation accuracy, the latest of equals; without validation, the latest."""
        return max(self.rows, key=lambda row: (row.get("validation_accuracy", 0.0), row["epoch"]), default=None)


def train_and_evaluate(
    config: Config,
    *,
    run_dir: Path | None = None,
    data_dir: Path | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 60.0,
    devices: Sequence[Any] | None = None,
    report: Report | None = None,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Trains a network and scores it on the test set, in one run directory.

    Args:
      config: what to train.
      run_dir: runs/<experiment>-seed<k> when None.
      data_dir: the tfds directory; tfds's own default when None.
      resume: go on with the run in `run_dir`, exactly where it stopped. A run that ended is not run again, but for more
        epochs where no step depends on their number (a constant learning rate, no lookahead).
      checkpoint_seconds: save within an epoch, too, this long after the last save; no bit depends on it.
      devices: that share each batch; all when None.
      report: told what happens; a quiet one when None.
      stop: where signals arrive, for a caller that trains in several threads; this function handles them when None.

    Returns:
      The content of result.json.

    Raises:
      UserError: what the user can mend; see its message.
      NonFiniteLossError: the loss became infinite or not a number; the checkpoints before that are kept.
      Interrupted: SIGINT or SIGTERM came; the run can be resumed.
    """
    report = report or Report(quiet=True)
    run_dir = rundir.default_run_dir(config) if run_dir is None else run_dir
    with rundir.lock(run_dir), nullcontext(stop) if stop else stop_signals() as stopped:
        rundir.check_run(run_dir, config, resume)
        result = rundir.read_result(run_dir)
        if result is None or result["num_epochs"] < config.num_epochs or not manifest.is_closed(run_dir):
            run, state, facts = set_up(config, run_dir, data_dir, devices, report)
            environment = manifest.environment(run.placement.devices)
            for line in manifest.changes_since_last_session(run_dir, environment):
                report.say(line)
            about = environment | {"seed": config.seed, "resumed_from": None}
            # A signal waits for the loop, which saves: Orbax would turn one that arrives within it into a failure.
            with stopped.held(), manifest.session(run_dir, about, rundir.FILES) as session:
                rundir.write_run(run_dir, config, facts)
                recover(run_dir / "checkpoints", report.say)
                with closing(Checkpoints(run_dir / "checkpoints")) as checkpoints:
                    session["resumed_from"] = checkpoints.latest()
                    if resume and checkpoints.latest() is None:
                        report.say(f"There is nothing to resume in {run_dir}: starting anew.")
                    state, progress = fit(
                        run, state, checkpoints, stopped, report, checkpoint_seconds=checkpoint_seconds
                    )
                    result = _test(run, state, progress, checkpoints)
                    write_json(run_dir / "result.json", result)
    report.result(result, run_dir)
    return result


def fit(
    run: Run, state: TrainState, checkpoints: Checkpoints, stop: Stop, report: Report, *, checkpoint_seconds: float
) -> tuple[TrainState, Progress]:
    """Trains from the latest checkpoint, or from `state` where there is none, to the last epoch.

    Args:
      run: what stays the same.
      state: donated.
      checkpoints: of this run.
      stop: held; as soon as it has a signal, the loop saves and raises.
      report: told what happens.
      checkpoint_seconds: save within an epoch, too, this long after the last save.

    Returns:
      The last state, and what it leaves in metrics.jsonl and timing.jsonl.

    Raises:
      NonFiniteLossError: the loss or a parameter became infinite or not a number.
      StorageError: a checkpoint could not be written.
      Interrupted: a signal came.
    """
    config, steps = run.config, run.steps_per_epoch
    progress = Progress([], [])
    if (latest := checkpoints.latest()) is not None:
        state, saved = checkpoints.restore(latest, state, run.placement.state)
        progress = Progress(saved["rows"], saved["timing"], Totals(*saved["totals"]), saved["seconds"])
        report.say(f"resuming at step {latest} of {steps * config.num_epochs}")
    _write_progress(run.folder, progress)
    step, (rows, timing, totals, seconds) = int(state.step), progress
    last_save = time.perf_counter()
    clock = last_save - seconds  # The instant at which a run without interruptions would have begun.

    def save(validation: dict[str, Any] | None = None) -> None:
        nonlocal last_save
        if not all_finite(state):
            made = (step - run.steps_per_dispatch, step)
            raise _not_finite("the parameters became infinite or nan", made, config, checkpoints)
        progress = Progress(list(rows), list(timing), totals, time.perf_counter() - clock)
        best = progress.best()
        kept = {**progress._asdict(), "best_step": None if best is None else best["step"]}
        checkpoints.save(state, kept, validation)
        last_save = time.perf_counter()

    plan = run.plan(step)
    with report.progress(config.num_epochs, steps, start=step) as bar:
        for epoch in range(step // steps, config.num_epochs):
            lap, already = time.perf_counter(), totals.num_examples
            while step < (epoch + 1) * steps:
                made = len(plan.example)
                state, metrics = run.train_steps(state, plan, step)
                step += made
                plan = run.plan(step)  # The host draws the next plan while the device works on this one.
                totals = totals.add(metrics)  # Waits for the device.
                if not math.isfinite(totals.loss):
                    raise _not_finite(f"the loss became {totals.loss}", (step - made, step), config, checkpoints)
                bar.update(step, totals.means())
                if step % steps == 0:  # Saved with its scores, below.
                    break
                if stop.signum is not None or time.perf_counter() - last_save >= checkpoint_seconds:
                    save()
                _leave_if_asked(stop, step, checkpoints)
            images_per_second = (totals.num_examples - already) / (time.perf_counter() - lap)
            scores = run.evaluate(state, run.validation) if len(run.validation.label) else None
            rows.append(_row(epoch + 1, step, totals.means(), scores, state))
            timing.append(
                {
                    "epoch": epoch + 1,
                    "images_per_second": images_per_second,
                    "seconds": time.perf_counter() - clock,
                }
            )
            totals = Totals()
            save({"num_examples": 0} if scores is None else scores._asdict())
            _write_progress(run.folder, Progress(rows, timing))
            report.epoch({**rows[-1], **timing[-1]}, config.num_epochs)
            _leave_if_asked(stop, step, checkpoints)
        checkpoints.wait()
    return state, Progress(rows, timing, totals, time.perf_counter() - clock)


def _leave_if_asked(stop: Stop, step: int, checkpoints: Checkpoints) -> None:
    if stop.signum is not None:
        checkpoints.wait()
        raise Interrupted(stop.signum, step)


def _row(epoch: int, step: int, train: Scores, validation: Scores | None, state: TrainState) -> dict[str, Any]:
    """Returns a row of metrics.jsonl."""
    row: dict[str, Any] = {"epoch": epoch, "step": step, "train_loss": train.loss, "train_accuracy": train.accuracy}
    if validation is not None:
        row |= {"validation_loss": validation.loss, "validation_accuracy": validation.accuracy}
    return row | {"params_sha256": tree_sha256(state.params)}


def _write_progress(run_dir: Path, progress: Progress) -> None:
    rundir.write_rows(run_dir / "metrics.jsonl", progress.rows)
    rundir.write_rows(run_dir / "timing.jsonl", progress.timing)


def _test(run: Run, last: TrainState, progress: Progress, checkpoints: Checkpoints) -> dict[str, Any]:
    """Scores the best checkpoint on the test split; returns the content of result.json."""
    best = progress.best()
    if best is None:
        raise UserError(f"The checkpoints in {run.folder} must have one at the end of an epoch, got none. Train anew.")
    state, _ = checkpoints.restore(best["step"], last, run.placement.state)
    test = Pixels(*run.dataset.load("test"), run.train.standardization)
    scores = run.evaluate(state, jax.device_put(test, run.placement.state), run.config.views)
    return {
        "test_accuracy": scores.accuracy,
        "test_loss": scores.loss,
        "num_test_examples": scores.num_examples,
        "best_validation_accuracy": best.get("validation_accuracy"),
        "best_epoch": best["epoch"],
        "num_epochs": run.config.num_epochs,
        "training_seconds": progress.timing[-1]["seconds"],
        "num_params": count_params(state),
        "seed": run.config.seed,
        "device": device(run.placement.devices[0]),
        "sha256": {
            "params": tree_sha256(last.params),
            "batch_stats": tree_sha256(last.batch_stats),
            "opt_state": tree_sha256(last.opt_state),
            "best_params": tree_sha256(state.params),
            "metrics": file_sha256(run.folder / "metrics.jsonl"),
        },
    }


def _not_finite(what: str, steps: tuple[int, int], config: Config, checkpoints: Checkpoints) -> NonFiniteLossError:
    checkpoints.wait()
    latest = checkpoints.latest()
    kept = "there is no checkpoint yet" if latest is None else f"the last finite checkpoint is of step {latest}"
    return NonFiniteLossError(
        f"{what} between steps {steps[0]} and {steps[1]}; {kept}. Try a lower `optim.learning_rate` "
        f"(now {config.optim.learning_rate}), in another run directory."
    )
