"""The loggers that send a run to an experiment tracker: Weights & Biases and MLflow."""

import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from cnnjax.errors import UserError, check
from cnnjax.files import write_file
from cnnjax.runs.loggers import Logger, config_values, epoch_values, step_values, test_values
from cnnjax.state import TrainState

if TYPE_CHECKING:
    from cnnjax.runs.run import Run

_CREATING = threading.Lock()  # Two seeds must not create one experiment.


class WandB(Logger):
    """Logs to Weights & Biases; a resumed run continues its run there.

    Args:
      options: of `wandb.init`. Without them the project is $WANDB_PROJECT, or else cnnjax, and the name is that of the
        run directory. A dict `config` is added to that of the run; `id`, `dir`, `resume` and `reinit` cannot be given.

    Raises:
      UserError: wandb is not installed, or an option cannot be given.
    """

    libraries = ("wandb",)

    def __init__(self, **options: Any):
        _check_installed("wandb")
        config = options.get("config") or {}
        check("config", "a dict", isinstance(config, Mapping), repr(config))
        own = [name for name in ("id", "dir", "resume", "reinit") if name in options]
        rule = "without the options id, dir, resume and reinit, which cnnjax sets to resume a run of W&B"
        check("WandB", rule, not own, ", ".join(own))
        self._options = options

    def start(self, run: "Run", step: int) -> None:
        """Starts or resumes the run of W&B whose id is in RUN/wandb/id."""
        wandb = self._wandb = import_module("wandb")
        options: dict[str, Any] = {"project": os.environ.get("WANDB_PROJECT", "cnnjax"), "name": _name(run)}
        options |= {"settings": wandb.Settings(console="off"), **self._options}
        options["config"] = {**(options.get("config") or {}), **config_values(run.config)}
        self._run = wandb.init(
            id=_kept(run.run_dir / "wandb" / "id", lambda: uuid4().hex),
            dir=run.run_dir,
            resume="allow",
            reinit="create_new",  # --seeds trains several at a time.
            **options,
        )
        self._first = self._run.step  # It refuses a step that it has.

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        """Logs the metrics."""
        self._log(step, step_values(metrics))

    def on_epoch(self, row: dict[str, Any], state: TrainState) -> None:
        """Logs the values, at the last step of the epoch."""
        self._log(row["step"], epoch_values(row))

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """Adds the test scores to the summary, and the confusion matrix as a table; waits until all is sent."""
        if result is not None:
            self._run.summary.update(test_values(result))
            if (matrix := result["confusion_matrix"]) is not None:
                names = [row["name"] for row in result["classes"]]
                table = [[name, *counts] for name, counts in zip(names, matrix, strict=True)]
                self._run.summary["test/confusion_matrix"] = self._wandb.Table(["true class", *names], table)
        self._run.finish(exit_code=int(result is None))

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self._first:
            self._run.log(dict(values), step=step)


class MLflow(Logger):
    """Logs to the MLflow store of $MLFLOW_TRACKING_URI, or MLflow's default; a resumed run continues its run there.

    If the server refuses connections, training waits for about 12 seconds (4 attempts, with pauses of 0, 4 and 8); if
    it does not answer, for about 52 (10 more per attempt). Then the run continues without it. `start` sets these limits
    for the whole process, unless $MLFLOW_HTTP_REQUEST_MAX_RETRIES (3) and $MLFLOW_HTTP_REQUEST_TIMEOUT (10) are set.

    Args:
      experiment: the name of the experiment; by default $MLFLOW_EXPERIMENT_NAME, or else cnnjax.

    Raises:
      UserError: mlflow is not installed.
    """

    SECONDS = 5.0  # Between two writes: one takes some milliseconds, like a step.

    def __init__(self, experiment: str | None = None):
        _check_installed("mlflow")
        # MLflow imports its default store later. mlflow-skinny, for servers, comes without SQLAlchemy.
        store = ("mlflow.store.tracking.sqlalchemy_store",) if find_spec("sqlalchemy") else ()
        self.libraries = ("mlflow", *store)
        self._experiment = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME", "cnnjax")

    def start(self, run: "Run", step: int) -> None:
        """Starts or resumes the run of MLflow whose id is in RUN/mlflow/id."""
        # By default MLflow, and training with it, would wait for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        self._mlflow = import_module("mlflow")
        self._client, self._last_step = self._mlflow.MlflowClient(), step
        self._buffer: list[Any] = []
        self._written_at = time.monotonic()
        self._id = _kept(run.run_dir / "mlflow" / "id", lambda: self._create(run))
        try:
            self._logged = {
                name: max((point.step for point in self._client.get_metric_history(self._id, name)), default=0)
                for name in ("batch/loss", "train/loss")
            }
            self._client.update_run(self._id, status="RUNNING")  # Last: a start that is interrupted is not finished.
        except self._mlflow.MlflowException as error:
            store = self._mlflow.get_tracking_uri()
            raise UserError(
                f"`MLFLOW_TRACKING_URI` must name the store that holds this run, {self._id}, got {store} ({error}). "
                "MLflow's default is a store in the current folder."
            ) from error

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        """Logs the metrics, some seconds later."""
        if step > self._logged["batch/loss"]:
            self._add(step, step_values(metrics))
        if time.monotonic() - self._written_at > self.SECONDS:
            self._flush()

    def on_epoch(self, row: dict[str, Any], state: TrainState) -> None:
        """Logs the values, at the last step of the epoch."""
        self._last_step = row["step"]
        if row["step"] > self._logged["train/loss"]:
            self._add(row["step"], epoch_values(row))
        self._flush()

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """Logs the test scores, and the result with the confusion matrix as the artifact result.json."""
        if result is not None:
            self._add(self._last_step, test_values(result))
            self._client.log_dict(self._id, dict(result), "result.json")
        self._flush()
        self._client.set_terminated(self._id, "KILLED" if result is None else "FINISHED")

    def _create(self, run: "Run") -> str:
        with _CREATING:
            found = self._client.get_experiment_by_name(self._experiment)
            number = found.experiment_id if found else self._client.create_experiment(self._experiment)
        created = self._client.create_run(number, run_name=_name(run)).info.run_id
        values, param = config_values(run.config), self._mlflow.entities.Param
        self._client.log_batch(created, params=[param(name, str(value)[:6000]) for name, value in values.items()])
        return created

    def _add(self, step: int, values: Mapping[str, float]) -> None:
        now = time.time_ns() // 10**6
        self._buffer += [self._mlflow.entities.Metric(name, value, now, step) for name, value in values.items()]

    def _flush(self) -> None:
        for i in range(0, len(self._buffer), 1000):  # MLflow's limit.
            self._client.log_batch(self._id, metrics=self._buffer[i : i + 1000])
        self._buffer, self._written_at = [], time.monotonic()


def _name(run: "Run") -> str:
    """Returns the name of the run directory, for one of several seeds with that of the folder in which it is."""
    path = run.run_dir.absolute()
    return f"{path.parent.name}/{path.name}" if re.fullmatch(r"seed\d+", path.name) else path.name


def _kept(path: Path, make: Callable[[], str]) -> str:
    """Returns the id in a file of the run directory; makes and writes it if there is none."""
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_file(path, make())
    return path.read_text()


def _check_installed(name: str) -> None:
    if find_spec(name) is None:
        raise UserError(f"`log` must name what is installed, got {name}. Install it: pip install 'cnnjax[{name}]'")
