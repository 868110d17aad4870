"""Loggers: TensorBoard, Weights & Biases, MLflow, and the base class of a user's own."""

import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from cnnjax.errors import UserError

if TYPE_CHECKING:
    from cnnjax.config import Config
    from cnnjax.runs.run import Run
    from cnnjax.step import TrainState

FOLDERS = ("tensorboard", "wandb", "mlflow")  # In the run directory.


class Logger:
    """Records a run elsewhere: the base class of loggers, whose methods do nothing.

    A logger changes no bit of the run. An exception in `start` ends the run before its first step; one in another
    method is reported once, and the run continues without the logger. A subclass in an experiment file that can be made
    without arguments is a word of --log.

    Example:
      >>> class Csv(Logger):
      ...     def start(self, run, step):
      ...         self.file = open(run.run_dir / "loss.csv", "a")
      ...
      ...     def on_step(self, step, metrics):
      ...         print(step, metrics["loss"], sep=",", file=self.file)
      ...
      ...     def finish(self, result):
      ...         self.file.close()
      >>> train_and_evaluate(config, loggers=[Csv()])
    """

    def start(self, run: "Run", step: int) -> None:
        """Begins a session of a run.

        Args:
          run: has `run_dir`, `config` and `facts`, and no result yet.
          step: the number of steps that are done, above 0 in a resumed run. The later steps are reported, some of them
            for the second time.
        """

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        """Receives the means over a batch, see `on_step` of `train_and_evaluate`."""

    def on_epoch(self, row: dict[str, Any], state: "TrainState") -> None:
        """Receives the values of an epoch, see `on_epoch` of `train_and_evaluate`."""

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """Ends the session.

        Args:
          result: the content of result.json, or None if the run was stopped or failed.
        """


class TensorBoard(Logger):
    """Writes event files to RUN/tensorboard. To see them: pip install tensorboard; tensorboard --logdir runs."""

    def start(self, run: "Run", step: int) -> None:
        """Opens an event file. TensorBoard drops what an earlier session has written about later steps."""
        from tensorboardX.record_writer import masked_crc32c
        from tensorboardX.summary import hparams, text

        self._crc = masked_crc32c
        self._event: Any = import_module("tensorboardX.proto.event_pb2")
        self._summary: Any = import_module("tensorboardX.proto.summary_pb2")
        self._config, self._last_step = run.config, step
        folder = run.run_dir / "tensorboard"
        folder.mkdir(exist_ok=True)
        # TensorBoard reads files by name. Unbuffered: a record that is written survives SIGKILL.
        index, host = len([*folder.iterdir()]), socket.gethostname()
        self._file = (folder / f"events.out.tfevents.{index:010}.{host}").open("xb", buffering=0)
        self._write(0, file_version="brain.Event:2")
        self._write(step + 1, session_log=self._event.SessionLog(status=1))
        values = _config_values(run.config)
        _, session_start, self._session_end = hparams(values, {})
        self._write(step, summary=session_start)
        lines = [f"| {name} | {_cell(value)} |" for name, value in values.items()]
        self._write(step, summary=text("config", "\n".join(["| option | value |", "| --- | --- |", *lines])))

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        """Writes a point per metric."""
        self._write_scalars(step, _step_values(metrics))

    def on_epoch(self, row: dict[str, Any], state: "TrainState") -> None:
        """Writes a point per value, at the last step of the epoch."""
        self._last_step = row["step"]
        self._write_scalars(row["step"], _epoch_values(row, self._config))

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """Writes the test scores and the confusion matrix, and closes the file."""
        from tensorboardX.summary import text

        if result is not None:
            self._write_scalars(self._last_step, _test_values(result))
            if (matrix := result["confusion_matrix"]) is not None:
                names = [_cell(row["name"]) for row in result["classes"]]
                rows = [["true \\ predicted", *names], ["---"] * (len(names) + 1)]
                rows += [[name, *map(str, counts)] for name, counts in zip(names, matrix, strict=True)]
                table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
                self._write(self._last_step, summary=text("test/confusion_matrix", table))
            self._write(self._last_step, summary=self._session_end)
        self._file.close()

    def _write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        make = self._summary.Summary
        self._write(step, summary=make(value=[make.Value(tag=k, simple_value=v) for k, v in values.items()]))

    def _write(self, step: int, **content: Any) -> None:
        """Appends a record. Not with tensorboardX's `SummaryWriter`, which waits without end if the disk is full."""
        data = self._event.Event(step=step, wall_time=time.time(), **content).SerializeToString()
        length = struct.pack("<Q", len(data))
        crc = self._crc
        self._file.write(length + struct.pack("<I", crc(length)) + data + struct.pack("<I", crc(data)))


class WandB(Logger):
    """Logs to Weights & Biases; a resumed run continues its run there.

    Args:
      options: of `wandb.init`. Without them the project is $WANDB_PROJECT, or else cnnjax, and the name is that of the
        run directory.

    Raises:
      UserError: wandb is not installed.
    """

    def __init__(self, **options: Any):
        _check_installed("wandb")
        self._options = options

    def start(self, run: "Run", step: int) -> None:
        """Starts or resumes the run of W&B whose id is in RUN/wandb/id."""
        wandb = self._wandb = import_module("wandb")
        options: dict[str, Any] = {"project": os.environ.get("WANDB_PROJECT", "cnnjax"), "name": run.run_dir.name}
        options |= {"settings": wandb.Settings(console="off"), **self._options}
        self._config = run.config
        self._run = wandb.init(
            id=_kept(run.run_dir / "wandb" / "id", lambda: uuid4().hex),
            dir=run.run_dir,
            config=_config_values(run.config),
            resume="allow",
            reinit="create_new",  # --seeds trains several at a time.
            **options,
        )
        self._first = self._run.step  # It refuses a step that it has.

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        """Logs the metrics."""
        self._log(step, _step_values(metrics))

    def on_epoch(self, row: dict[str, Any], state: "TrainState") -> None:
        """Logs the values, at the last step of the epoch."""
        self._log(row["step"], _epoch_values(row, self._config))

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """Adds the test scores to the summary, and the confusion matrix as a table; waits until all is sent."""
        if result is not None:
            self._run.summary.update(_test_values(result))
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

    Args:
      experiment: the name of the experiment; by default $MLFLOW_EXPERIMENT_NAME, or else cnnjax.

    Raises:
      UserError: mlflow is not installed.
    """

    SECONDS = 5.0  # Between two writes: one takes some milliseconds, like a step.

    def __init__(self, experiment: str | None = None):
        _check_installed("mlflow")
        self._experiment = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME", "cnnjax")

    def start(self, run: "Run", step: int) -> None:
        """Starts or resumes the run of MLflow whose id is in RUN/mlflow/id."""
        self._mlflow = import_module("mlflow")
        self._client, self._config, self._last_step = self._mlflow.MlflowClient(), run.config, step
        self._buffer: list[Any] = []
        self._written_at = time.monotonic()
        self._id = _kept(run.run_dir / "mlflow" / "id", lambda: self._create(run))
        self._client.update_run(self._id, status="RUNNING")
        self._logged = {
            name: max((point.step for point in self._client.get_metric_history(self._id, name)), default=0)
            for name in ("batch/loss", "epoch")
        }

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        """Logs the metrics, some seconds later."""
        if step > self._logged["batch/loss"]:
            self._add(step, _step_values(metrics))
        if time.monotonic() - self._written_at > self.SECONDS:
            self._flush()

    def on_epoch(self, row: dict[str, Any], state: "TrainState") -> None:
        """Logs the values, at the last step of the epoch."""
        self._last_step = row["step"]
        if row["step"] > self._logged["epoch"]:
            self._add(row["step"], _epoch_values(row, self._config))
        self._flush()

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """Logs the test scores, and the result with the confusion matrix as the artifact result.json."""
        if result is not None:
            self._add(self._last_step, _test_values(result))
            self._client.log_dict(self._id, dict(result), "result.json")
        self._flush()
        self._client.set_terminated(self._id, "KILLED" if result is None else "FINISHED")

    def _create(self, run: "Run") -> str:
        with _CREATING:
            found = self._client.get_experiment_by_name(self._experiment)
            number = found.experiment_id if found else self._client.create_experiment(self._experiment)
        created = self._client.create_run(number, run_name=run.run_dir.name).info.run_id
        values, param = _config_values(run.config), self._mlflow.entities.Param
        self._client.log_batch(created, params=[param(name, str(value)[:6000]) for name, value in values.items()])
        return created

    def _add(self, step: int, values: Mapping[str, float]) -> None:
        now = time.time_ns() // 10**6
        self._buffer += [self._mlflow.entities.Metric(name, value, now, step) for name, value in values.items()]

    def _flush(self) -> None:
        for i in range(0, len(self._buffer), 1000):  # MLflow's limit.
            self._client.log_batch(self._id, metrics=self._buffer[i : i + 1000])
        self._buffer, self._written_at = [], time.monotonic()


BUILT_IN: tuple[type[Logger], ...] = (TensorBoard, WandB, MLflow)
_CREATING = threading.Lock()  # Two seeds must not create one experiment.


def _kept(path: Path, make: Callable[[], str]) -> str:
    """Returns the id in a file of the run directory; makes and writes it if there is none."""
    from cnnjax.runs.files import write_file

    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_file(path, make())
    return path.read_text()


def _check_installed(name: str) -> None:
    if find_spec(name) is None:
        raise UserError(f"`log` must name what is installed, got {name}. Install it: pip install 'cnnjax[{name}]'")


def _config_values(config: "Config") -> dict[str, str | int | float | bool]:
    """Returns the options of a configuration by their dotted names."""
    from cnnjax.runs.codec import encode
    from cnnjax.runs.files import flatten

    flat = flatten(encode(config))
    return {k: v if isinstance(v, (str, int, float)) else json.dumps(v) for k, v in flat.items()}


def _step_values(metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"batch/{name}": value for name, value in metrics.items()}


def _epoch_values(row: Mapping[str, Any], config: "Config") -> dict[str, float]:
    """Returns the numbers of an epoch: train/loss, validation/accuracy, images_per_second, learning_rate and so on."""
    numbers = {name: float(value) for name, value in row.items() if name not in ("step", "params_sha256")}
    renamed = {name: name.replace("_", "/", 1) for name in row if name.startswith(("train_", "validation_"))}
    optim, updates = config.optim, row["step"] // config.optim.accumulate_steps
    of_run = row["step"] // row["epoch"] * config.num_epochs // optim.accumulate_steps
    schedule: Any = optim.make_schedule(of_run)
    learning_rate = float(schedule(max(updates - 1, 0)))  # Of the last update.
    return {renamed.get(name, name): value for name, value in numbers.items()} | {"learning_rate": learning_rate}


def _test_values(result: Mapping[str, Any]) -> dict[str, float]:
    return {name.replace("_", "/", 1): value for name, value in result.items() if name.startswith("test_")}


def _cell(value: Any) -> str:
    """Returns a value as text in a cell of a Markdown table."""
    return " ".join(str(value).replace("|", "\\|").split())
