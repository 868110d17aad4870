"""The progress of a run: records, reports and saves it after steps and epochs, and decides whether the run stops."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from cnnjax.class_scores import OUR_SCORES
from cnnjax.config import Config
from cnnjax.errors import NonFiniteLossError, UserError, option
from cnnjax.files import tree_sha256
from cnnjax.hosts import Hosts, alone
from cnnjax.metrics import Metrics, Scores, Totals, with_metrics
from cnnjax.process.signals import Interrupted
from cnnjax.runs.checkpoints import all_finite
from cnnjax.runs.directory import OpenRun
from cnnjax.runs.loggers import Loggers
from cnnjax.runs.records import write_rows
from cnnjax.runs.schema import Row, Timing
from cnnjax.state import TrainState, copy_state

OnStep = Callable[[int, dict[str, float]], object]
OnEpoch = Callable[[dict[str, Any], TrainState], object]


class Progress(NamedTuple):
    """Progress on the host; saved in every checkpoint."""

    rows: list[Row]  # The rows of metrics.jsonl: one per epoch, the same bits for the same seed.
    timing: list[Timing]
    totals: Totals = Totals()  # The sums of the current epoch.
    grad_norm: float = 0.0  # The sum over the steps of the current epoch.
    seconds: float = 0.0  # The duration of training, in all sessions.
    stopped_within: int | None = None  # See `SavedProgress`.

    @property
    def stopped(self) -> bool:
        """Whether `on_epoch` or `Config.patience` stopped the run."""
        return self.stopped_within is not None


class EndedEpoch(NamedTuple):
    """An epoch that is saved and reported while the device trains the next one."""

    state: TrainState  # A copy: the next step reuses the memory of the original.
    steps: tuple[int, int]  # Before and after the last dispatch.
    train: Scores
    grad_norm: float  # The mean of the steps.
    validation: Scores | None
    timing: Timing


@dataclass
class Callbacks:
    """Functions of the user, and loggers, see `train_and_evaluate`.

    Attributes:
      hosts: all processes call the functions; the decision of process 0 counts.
      raised: the exception that a function raised.
    """

    on_step: OnStep | None = None
    on_epoch: OnEpoch | None = None
    loggers: Loggers = field(default_factory=Loggers)
    hosts: Hosts = field(default_factory=alone)
    raised: BaseException | None = None

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except BaseException as error:
            self.raised = error
            raise

    def report_steps(self, first: int, metrics: Metrics) -> None:
        """Reports the means over the batch of each of several steps, the first of which has this number.

        Args:
          metrics: arrays [S] on the host.

        Raises:
          UserError: all examples of a batch are masked.
        """
        if not np.all(metrics.num_examples):
            step = first + int(np.argmin(metrics.num_examples))
            raise UserError(
                "`augment.transform` (or a `train_step` of your own) must leave at least one example of each batch "
                f"unmasked, got none in step {step}."
            )
        if self.on_step is None and not self.loggers.active:
            return
        sums: dict[str, Any] = {"loss": metrics.loss, **metrics.values}
        for i, num_examples in enumerate(metrics.num_examples.tolist()):
            means = {name: float(values[i]) / num_examples for name, values in sums.items()}
            means["grad_norm"] = float(metrics.grad_norm[i])
            self.loggers.on_step(first + i, means)
            if self.on_step is not None:
                self._call(self.on_step, first + i, means)

    def report_epoch(self, row: dict[str, Any], state: TrainState) -> bool:
        """Reports an epoch; returns the decision of `on_epoch`.

        Raises:
          UserError: it returned something else than True, False or None, or donated the state.
        """
        self.loggers.on_epoch(row, state)
        own = jax.tree.map(lambda leaf: leaf, state)  # Other containers: what it changes in them is not saved.
        decision = None if self.on_epoch is None else self._call(self.on_epoch, row, own)
        if decision is not None and not isinstance(decision, (bool, np.bool_)):
            raise UserError(
                f"`on_epoch` must return True to stop, or False or None to continue, got {decision!r} of type "
                f"{type(decision).__name__}. Convert it: bool(...)."
            )
        decision = None if self.on_epoch is None else self.hosts.share(lambda: bool(decision))
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
            raise UserError(
                "`on_epoch` must keep its state, got one that was donated. Pass donate=False to `train_step`."
            )
        return bool(decision)


def ranking_score(row: Mapping[str, Any], by: str) -> float:
    """Returns the score by which an epoch is ranked, the higher the better.

    It is 0 without validation, and nan if the row lacks the score.

    Args:
      row: of metrics.jsonl.
      by: see `Config.best_by`.
    """
    if not any(name.startswith("validation_") for name in row):
        return 0.0
    score = row.get(f"validation_{by}", math.nan)
    return -score if by == "loss" else score


def best_row(rows: Sequence[Row], by: str) -> Row | None:
    """Returns the row with the best validation score: the latest if several are equal, or without validation.

    Args:
      by: see `Config.best_by`.
    """
    return max(rows, key=lambda row: (ranking_score(row, by), row["epoch"]), default=None)


def is_out_of_patience(rows: Sequence[Row], config: Config) -> bool:
    """Returns whether `Config.patience` epochs have passed since the first one with the best validation score."""
    if config.patience is None or not rows:
        return False
    scores = [ranking_score(row, config.best_by) for row in rows]
    return len(scores) - 1 - scores.index(max(scores)) >= config.patience


def restore(run: OpenRun, state: TrainState, sharding: PyTree) -> tuple[TrainState, Progress]:
    """Returns the latest checkpoint, or `state` and no progress if there is none.

    A run that stopped early continues if it now has more epochs, unless it is out of patience.
    """
    if (latest := run.checkpoints.latest()) is None:
        return state, Progress([], [])
    state, saved = run.checkpoints.restore(latest, state, sharding)
    known: Any = {name: saved[name] for name in Progress._fields}
    progress, num_epochs = Progress(**known | {"totals": Totals(**saved["totals"])}), run.config.num_epochs
    stopped = progress.stopped_within == num_epochs
    stopped |= len(progress.rows) < num_epochs and is_out_of_patience(progress.rows, run.config)
    if progress.stopped and not stopped:
        run.report.say(
            f"`on_epoch` or `patience` stopped the run after epoch {len(progress.rows)} of {progress.stopped_within}. "
            f"It continues, because `num_epochs` is now {num_epochs}."
        )
    return state, progress._replace(stopped_within=num_epochs if stopped else None)


def add_user_scores(run: OpenRun, scores: Scores, label: Any) -> Scores:
    """Returns scores with those of `Config.metrics`, which process 0 computes.

    Args:
      scores: with logits, if there are such metrics.

    Raises:
      UserError: the user's function failed.
    """
    try:
        return with_metrics(scores, run.config.metrics, label, run.hosts.share)
    except UserError as error:
        raise UserError(f"{error} {_how_to_correct(run)}") from error


def _how_to_correct(run: OpenRun) -> str:
    """Returns the end of a message about the user's function; waits for the last save."""
    run.checkpoints.wait()
    latest = run.checkpoints.latest()
    where = "" if latest is None else f", from step {latest} on"
    return f"Correct the function, and resume the run{where}: {option('resume')}."


def add_steps(run: OpenRun, progress: Progress, metrics: Metrics, steps: tuple[int, int], seconds: float) -> Progress:
    """Returns the progress after some steps of an epoch, and reports it.

    Args:
      metrics: of each step, on the host.
      steps: the numbers of steps before and after.
      seconds: of training, in all sessions.

    Raises:
      NonFiniteLossError: the loss became infinite or nan.
    """
    totals = progress.totals.add(metrics)
    if not math.isfinite(totals.loss):
        raise make_non_finite_error(f"The loss became {totals.loss}", steps, run)
    run.report.step(steps[1], totals.means())
    grad_norm = sum(metrics.grad_norm.tolist(), progress.grad_norm)
    return progress._replace(totals=totals, grad_norm=grad_norm, seconds=seconds)


def record_epoch(
    run: OpenRun, progress: Progress, ended: EndedEpoch, callbacks: Callbacks, *, must_save: bool
) -> Progress:
    """Reports an epoch and saves it, unless the disk is busy; returns the progress with its rows.

    Args:
      callbacks: decide whether the run stops, as does `Config.patience`. The checkpoint contains the decision.
      must_save: if False, an epoch without validation is not saved if it follows the previous save too soon, see
        `Checkpoints.is_busy`: without validation only the latest checkpoint matters.
    """
    check_finite(run, ended.state, ended.steps)
    if ended.validation is not None and not math.isfinite(ended.validation.loss):
        raise make_non_finite_error(f"The validation loss became {ended.validation.loss}", ended.steps, run)
    rows, timing = [*progress.rows, metrics_row(ended)], [*progress.timing, ended.timing]
    if not math.isfinite(ranking_score(rows[-1], run.config.best_by)):
        name = run.config.best_by
        got: Any = "none" if ended.validation is None else ended.validation.metrics.get(name, "none")
        raise UserError(
            f"`metrics` must return a finite {name}, by which the best checkpoint is selected, got {got} after epoch "
            f"{rows[-1]['epoch']}. {_how_to_correct(run)}"
        )
    progress = progress._replace(rows=rows, timing=timing)
    row: Any = {**rows[-1], **ended.timing}
    row["best_epoch"] = (best_row(progress.rows, run.config.best_by) or row)["epoch"]
    stops = callbacks.report_epoch(dict(row), ended.state)
    if (stops or is_out_of_patience(rows, run.config)) and row["epoch"] < run.config.num_epochs:
        progress, must_save = progress._replace(stopped_within=run.config.num_epochs), True
    if must_save or ended.validation is not None or not run.checkpoints.is_busy():
        scores = ended.validation
        validation = {"num_examples": 0} if scores is None else {"score": ranking_score(rows[-1], run.config.best_by)}
        save(run, ended.state, progress, validation)
    write_progress(run, progress)
    run.report.epoch(row, run.config.num_epochs)
    return progress


def check_finite(run: OpenRun, state: TrainState, steps: tuple[int, int]) -> None:
    """Raises `NonFiniteLossError` if a parameter became infinite or nan between steps[0] and steps[1]."""
    if not all_finite(state.params):
        raise make_non_finite_error("The parameters became infinite or nan", steps, run)


def save(run: OpenRun, state: TrainState, progress: Progress, validation: dict[str, Any] | None = None) -> None:
    """Starts to save a state, which must not be donated; `validation` are the scores at the end of an epoch."""
    best = best_row(progress.rows, run.config.best_by)
    if best is None or "validation_accuracy" not in best:  # Only the latest matters.
        best = {"step": None}
    kept = {**progress._asdict(), "totals": progress.totals._asdict(), "best_step": best["step"]}
    run.checkpoints.save(state, kept, validation)


def save_within_epoch(
    run: OpenRun, state: TrainState, progress: Progress, steps: tuple[int, int], signum: int | None
) -> None:
    """Saves a copy of a state; after a signal, then raises `Interrupted`.

    Args:
      steps: the numbers of steps before and after the last dispatch.
      signum: see `raise_if_stopped`.

    Raises:
      NonFiniteLossError: a parameter became infinite or nan.
      Interrupted: a signal arrived.
    """
    snapshot = copy_state(state)
    check_finite(run, snapshot, steps)
    save(run, snapshot, progress)
    raise_if_stopped(run, steps[1], signum)


def raise_if_stopped(run: OpenRun, step: int, signum: int | None) -> None:
    """Raises `Interrupted` once the checkpoint of `step` is on disk, unless `signum` is None.

    Args:
      signum: the signal for which all processes stop at this step.
    """
    if signum is not None:
        run.checkpoints.wait()
        run.stop.signum = signum  # Another process may have received it.
        raise Interrupted(signum, step)


def make_non_finite_error(problem: str, steps: tuple[int, int], run: OpenRun) -> NonFiniteLossError:
    """Returns the error for a run that diverged between two steps."""
    run.checkpoints.wait()
    latest = run.checkpoints.latest()
    kept = "there is no checkpoint yet" if latest is None else f"last finite checkpoint: step {latest}"
    cause = (
        "Check `loss` and the images" if steps[0] == 0 else "Check `model` and `loss` for values that are not finite"
    )
    return NonFiniteLossError(
        f"{problem} between steps {steps[0]} and {steps[1]}; {kept}. Try a lower `optim.learning_rate` "
        f"(now {run.config.optim.learning_rate}), in another run directory. {cause} if that does not help."
    )


def metrics_row(ended: EndedEpoch) -> Row:
    """Returns a row of metrics.jsonl, with the keys in the order of `Row`: a restored one must have the same bytes."""
    values = dict(ended.train.values)
    row: Any = {"epoch": ended.timing["epoch"], "step": ended.steps[1], "train_loss": ended.train.loss}
    if "accuracy" in values:
        row["train_accuracy"] = values.pop("accuracy")
    row["train_grad_norm"] = ended.grad_norm
    if ended.validation is not None:
        row |= {f"validation_{name}": getattr(ended.validation, name) for name in OUR_SCORES}
    row["params_sha256"] = tree_sha256(ended.state.params)
    row |= {f"train_{name}": value for name, value in values.items()}
    own = {} if ended.validation is None else ended.validation.metrics
    return row | {f"validation_{name}": value for name, value in own.items()}


def write_progress(run: OpenRun, progress: Progress) -> None:
    """Writes metrics.jsonl and timing.jsonl."""
    if run.hosts.leads:
        run.check_in_place()
        write_rows(run.run_dir / "metrics.jsonl", progress.rows)
        write_rows(run.run_dir / "timing.jsonl", progress.timing)
