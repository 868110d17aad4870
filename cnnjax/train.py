"""Training, from a `Config` to a result: set up, restore, train, validate, save, test."""

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Key

from cnnjax.cli.console import Report
from cnnjax.cli.process import start_jax
from cnnjax.cli.signals import Interrupted, Stop
from cnnjax.config import Config
from cnnjax.data.batches import Pixels
from cnnjax.data.datasets import ImageDataset, load_dataset
from cnnjax.data.order import Plan, epoch_plan
from cnnjax.errors import NonFiniteLossError, UserError
from cnnjax.memory import explain_out_of_memory
from cnnjax.prepare import Setup, count_params, device_name, set_up
from cnnjax.runs import manifest
from cnnjax.runs.checkpoints import all_finite
from cnnjax.runs.directory import OpenRun, open_run
from cnnjax.runs.files import file_sha256, tree_sha256, write_json
from cnnjax.runs.records import data_version, write_rows
from cnnjax.runs.schema import Result, Row, Timing
from cnnjax.runs.source import SourceCode
from cnnjax.step import Scores, Totals, TrainState, copy_state, evaluate, train_steps


class Progress(NamedTuple):
    """Progress on the host; saved in every checkpoint."""

    rows: list[Row]  # Of metrics.jsonl: one per epoch, the same bits for the same seed.
    timing: list[Timing]
    totals: Totals = Totals()  # Of the current epoch.
    seconds: float = 0.0  # Of training, in all sessions.

    def best(self) -> Row | None:
        """Returns the row with the best validation accuracy, the latest of equals; without validation, the latest."""
        return max(self.rows, key=lambda row: (row.get("validation_accuracy", 0.0), row["epoch"]), default=None)


class EndedEpoch(NamedTuple):
    """An epoch that is saved and reported while the device trains the next one."""

    state: TrainState  # A copy: the next step reuses the memory of the original.
    steps: tuple[int, int]  # Before and after the last dispatch.
    train: Scores
    validation: Scores | None
    timing: Timing


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
    dataset: ImageDataset | None = None,
    code: SourceCode | None = None,
) -> Result:
    """Trains a network and scores it on the test set, in one run directory.

    Args:
      config: what to train.
      run_dir: runs/<name>-seed<k> if None.
      data_dir: the tfds directory; tfds's default if None.
      resume: resume the run in `run_dir` exactly where it stopped. A finished run is not trained again, except for more
        epochs if no step depends on their number (a constant learning rate, no lookahead).
      checkpoint_seconds: save during an epoch, too, this long after the last save; no bit depends on it. On an
        accelerator an epoch is one program, so only its end is saved.
      devices: share each batch; all devices if None.
      report: receives messages and metrics; None: nothing is printed.
      stop: receives signals, for a caller that trains in several threads; None: this function handles them.
      dataset: the data set, if the caller has loaded it.
      code: what trains, if the caller has recorded it.

    Returns:
      The content of result.json.

    Raises:
      UserError: the user has to fix something; see its message.
      NonFiniteLossError: the loss became infinite or nan; earlier checkpoints are kept.
      Interrupted: SIGINT, SIGTERM or SIGHUP arrived; the run can be resumed.
    """
    start_jax()
    report = report or Report(quiet=True)
    run_dir = Path(run_dir or Path("runs") / config.run_name)
    with explain_out_of_memory(), open_run(run_dir, config, report, resume=resume, stop=stop, code=code) as run:
        if (result := run.finished()) is None:
            dataset = dataset or load_dataset(config.dataset, data_dir, report.say, version=data_version(run_dir))
            with run.stop.held():  # An exception that interrupts XLA's compiler crashes the process when it ends.
                setup, state = set_up(run, dataset, devices)
            run.begin(setup.facts, manifest.environment(setup.placement.devices))
            state, progress = restore(setup, state, run)
            run.write_config(setup.facts)
            if run.checkpoints.latest() is not None:
                report.say(f"resuming at step {state.step} of {setup.program.num_steps}")
            elif resume:
                report.say(f"There is nothing to resume in {run_dir}: starting from scratch.")
            state, progress = fit(setup, state, progress, run, checkpoint_seconds)
            result = score_test_set(setup, state, progress, run)
            write_json(run_dir / "result.json", result)
        run.stop.finished = stop is None
    report.result(result, run_dir)
    return result


def restore(setup: Setup, state: TrainState, run: OpenRun) -> tuple[TrainState, Progress]:
    """Returns the latest checkpoint, or `state` and no progress if there is none."""
    if (latest := run.checkpoints.latest()) is None:
        return state, Progress([], [])
    state, saved = run.checkpoints.restore(latest, state, setup.placement.state_sharding)
    return state, Progress(saved["rows"], saved["timing"], Totals(*saved["totals"]), saved["seconds"])


def fit(
    setup: Setup, state: TrainState, progress: Progress, run: OpenRun, checkpoint_seconds: float
) -> tuple[TrainState, Progress]:
    """Trains to the last epoch; `state` is donated. Returns the last state and its progress.

    Raises:
      NonFiniteLossError: the loss or a parameter became infinite or nan.
      StorageError: a checkpoint could not be written.
      Interrupted: a signal arrived.
    """
    config, steps = setup.config, setup.steps_per_epoch
    first = step = int(state.step)
    on_cpu = setup.placement.devices[0].platform == "cpu"
    dispatches = plan_dispatches(setup, step)
    next_dispatch = next(dispatches)
    start = time.perf_counter() - progress.seconds  # When a run without interruptions would have begun.
    write_progress(run.run_dir, progress)
    ended = None  # The previous epoch, until it is reported.
    with run.report.progress(config.num_epochs, steps, start=step):
        for epoch in range(step // steps, config.num_epochs):
            epoch_start, examples_before = time.perf_counter(), progress.totals.num_examples
            while step < (epoch + 1) * steps:
                plan, augment_key = next_dispatch
                # Without frozen parameters it is another program. On a CPU compiling it takes longer than it saves.
                frozen = () if on_cpu else setup.program.frozen_names(state.params, step)
                keys = setup.train_key, augment_key
                state, metrics = train_steps(state, setup.train, plan, *keys, program=setup.program, frozen=frozen)
                first, step = step, step + len(plan.example)
                if ended is not None:  # The device computes meanwhile.
                    must_save = time.perf_counter() - run.checkpoints.saved_at >= checkpoint_seconds
                    progress, ended = end_epoch(run, progress, ended, must_save=must_save), None
                next_dispatch = next(dispatches)
                totals = progress.totals.add(metrics)  # Waits for the device.
                if not math.isfinite(totals.loss):
                    raise make_non_finite_error(f"The loss became {totals.loss}", (first, step), run)
                run.report.step(step, totals.means())
                now = time.perf_counter()
                progress = progress._replace(totals=totals, seconds=now - start)
                # The last step of an epoch is saved with its scores, in `end_epoch`.
                due = now - run.checkpoints.saved_at >= checkpoint_seconds
                if step % steps and (run.stop.signum is not None or due):
                    snapshot = copy_state(state)
                    check_finite(run, snapshot, (first, step))
                    save(run, snapshot, progress)
                    raise_if_stopped(run, step)
            images_per_second = (progress.totals.num_examples - examples_before) / (time.perf_counter() - epoch_start)
            scores = None
            if len(setup.validation.label):
                scores = evaluate(state, setup.validation, model=config.model, placement=setup.placement)
            seconds = time.perf_counter() - start
            timing: Timing = {"epoch": epoch + 1, "images_per_second": images_per_second, "seconds": seconds}
            ended = EndedEpoch(copy_state(state), (first, step), progress.totals.means(), scores, timing)
            progress = progress._replace(totals=Totals(), seconds=seconds)
            if run.stop.signum is not None or epoch + 1 == config.num_epochs:
                progress = end_epoch(run, progress, ended, must_save=True)
                raise_if_stopped(run, step)
        run.checkpoints.wait()
    return state, progress


def end_epoch(run: OpenRun, progress: Progress, ended: EndedEpoch, *, must_save: bool) -> Progress:
    """Reports an epoch and saves it, unless the disk is busy; returns the progress with its rows.

    Args:
      must_save: if False, an epoch without validation is not saved while the previous save is running, so that training
        does not wait for a slow disk: without validation only the latest checkpoint matters.
    """
    check_finite(run, ended.state, ended.steps)
    if ended.validation is not None and not math.isfinite(ended.validation.loss):
        raise make_non_finite_error(f"The validation loss became {ended.validation.loss}", ended.steps, run)
    rows, timing = [*progress.rows, metrics_row(ended)], [*progress.timing, ended.timing]
    progress = progress._replace(rows=rows, timing=timing)
    if must_save or ended.validation is not None or not run.checkpoints.is_saving():
        validation = {"num_examples": 0} if ended.validation is None else ended.validation._asdict()
        save(run, ended.state, progress, validation)
    write_progress(run.run_dir, progress)
    run.report.epoch({**rows[-1], **ended.timing}, run.config.num_epochs)
    return progress


def plan_dispatches(setup: Setup, step: int) -> Iterator[tuple[Plan, Key[Array, ""]]]:
    """Yields what each call of `train_steps` needs from `step` on, without end: a plan, and the key of its epoch."""
    config, train, placement = setup.config, setup.train, setup.placement
    _, height, width, _ = train.image.shape
    epoch, first = divmod(step, setup.steps_per_epoch)
    while True:
        plan = epoch_plan(
            config.seed,
            epoch,
            len(train.label),
            batch_size=config.batch_size,
            augment=config.augment,
            image_size=(height, width),
        )
        key = jax.device_put(jax.random.fold_in(setup.augment_key, epoch), placement.state_sharding)
        for i in range(first, setup.steps_per_epoch, setup.steps_per_dispatch):
            yield jax.device_put(plan.row(slice(i, i + setup.steps_per_dispatch)), placement.plan_sharding), key
        epoch, first = epoch + 1, 0


def check_finite(run: OpenRun, state: TrainState, steps: tuple[int, int]) -> None:
    """Raises `NonFiniteLossError` if a parameter became infinite or nan between steps[0] and steps[1]."""
    if not all_finite(state.params):
        raise make_non_finite_error("The parameters became infinite or nan", steps, run)


def save(run: OpenRun, state: TrainState, progress: Progress, validation: dict[str, Any] | None = None) -> None:
    """Starts to save a state, which must not be donated; `validation` are the scores at the end of an epoch."""
    best = progress.best()
    if best is None or "validation_accuracy" not in best:  # Only the latest matters.
        best = {"step": None}
    kept = {**progress._asdict(), "best_step": best["step"]}
    run.checkpoints.save(state, kept, validation)


def raise_if_stopped(run: OpenRun, step: int) -> None:
    """Raises `Interrupted` after a signal, once the checkpoint of `step` is on disk."""
    if run.stop.signum is not None:
        run.checkpoints.wait()
        raise Interrupted(run.stop.signum, step)


def make_non_finite_error(problem: str, steps: tuple[int, int], run: OpenRun) -> NonFiniteLossError:
    """Returns the error for a run that diverged between two steps."""
    run.checkpoints.wait()
    latest = run.checkpoints.latest()
    kept = "there is no checkpoint yet" if latest is None else f"last finite checkpoint: step {latest}"
    cause = "Check `loss` and the images, or try" if steps[0] == 0 else "Try"
    return NonFiniteLossError(
        f"{problem} between steps {steps[0]} and {steps[1]}; {kept}. {cause} a lower `optim.learning_rate` "
        f"(now {run.config.optim.learning_rate}), in another run directory."
    )


def metrics_row(ended: EndedEpoch) -> Row:
    """Returns a row of metrics.jsonl."""
    row: Any = {"epoch": ended.timing["epoch"], "step": ended.steps[1]}
    row |= {"train_loss": ended.train.loss, "train_accuracy": ended.train.accuracy}
    if ended.validation is not None:
        row |= {"validation_loss": ended.validation.loss, "validation_accuracy": ended.validation.accuracy}
    return row | {"params_sha256": tree_sha256(ended.state.params)}


def write_progress(run_dir: Path, progress: Progress) -> None:
    """Writes metrics.jsonl and timing.jsonl."""
    write_rows(run_dir / "metrics.jsonl", progress.rows)
    write_rows(run_dir / "timing.jsonl", progress.timing)


def score_test_set(setup: Setup, last: TrainState, progress: Progress, run: OpenRun) -> Result:
    """Scores the best checkpoint on the test split; returns the content of result.json."""
    best, config = progress.best(), setup.config
    if best is None:
        raise UserError(f"The checkpoints in {run.run_dir} must include the end of an epoch, got none. Train again.")
    state, _ = run.checkpoints.restore(best["step"], last, setup.placement.state_sharding)
    pixels = Pixels(*setup.dataset.load("test"), setup.train.standardization)
    scores = evaluate(state, pixels, model=config.model, tta=config.tta, placement=setup.placement)
    if not math.isfinite(scores.loss):
        raise NonFiniteLossError(f"The test loss must be finite, got {scores.loss}. Try a lower `optim.learning_rate`.")
    return {
        "test_accuracy": scores.accuracy,
        "test_loss": scores.loss,
        "num_test_examples": scores.num_examples,
        "best_validation_accuracy": best.get("validation_accuracy"),
        "best_epoch": best["epoch"],
        "num_epochs": config.num_epochs,
        "training_seconds": progress.timing[-1]["seconds"],
        "num_params": count_params(state),
        "seed": config.seed,
        "device": device_name(setup.placement.devices[0]),
        "sha256": {
            "params": tree_sha256(last.params),
            "batch_stats": tree_sha256(last.batch_stats),
            "opt_state": tree_sha256(last.opt_state),
            "best_params": tree_sha256(state.params),
            "metrics": file_sha256(run.run_dir / "metrics.jsonl"),
        },
    }
