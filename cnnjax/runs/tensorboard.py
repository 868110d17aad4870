"""The logger that writes event files for TensorBoard."""

import socket
import struct
import time
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from cnnjax.runs.loggers import Logger, config_values, epoch_values, step_values, test_values
from cnnjax.state import TrainState

if TYPE_CHECKING:
    from cnnjax.runs.run import Run


class TensorBoard(Logger):
    """Writes event files to RUN/tensorboard. To see them: pip install tensorboard; tensorboard --logdir runs."""

    def start(self, run: "Run", step: int) -> None:
        """Opens an event file. TensorBoard drops what an earlier session has written about later steps."""
        from tensorboardX.record_writer import masked_crc32c
        from tensorboardX.summary import hparams, text

        self._crc = masked_crc32c
        self._event: Any = import_module("tensorboardX.proto.event_pb2")
        self._summary: Any = import_module("tensorboardX.proto.summary_pb2")
        self._last_step = step
        folder = run.run_dir / "tensorboard"
        folder.mkdir(exist_ok=True)
        # TensorBoard reads files by name. Unbuffered: a record that is written survives SIGKILL.
        index, host = len([*folder.iterdir()]), socket.gethostname()
        self._file = (folder / f"events.out.tfevents.{index:010}.{host}").open("xb", buffering=0)
        self._write(0, file_version="brain.Event:2")
        self._write(step + 1, session_log=self._event.SessionLog(status=1))
        values = config_values(run.config)
        _, session_start, self._session_end = hparams(values, {})
        self._write(step, summary=session_start)
        lines = [f"| {name} | {_cell(value)} |" for name, value in values.items()]
        self._write(step, summary=text("config", "\n".join(["| option | value |", "| --- | --- |", *lines])))

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        """Writes a point per metric."""
        self._write_scalars(step, step_values(metrics))

    def on_epoch(self, row: dict[str, Any], state: TrainState) -> None:
        """Writes a point per value, at the last step of the epoch."""
        self._last_step = row["step"]
        self._write_scalars(row["step"], epoch_values(row))

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """Writes the test scores and the confusion matrix, and closes the file."""
        from tensorboardX.summary import text

        if result is not None:
            self._write_scalars(self._last_step, test_values(result))
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
        """Appends a record.

        tensorboardX's RecordWriter would call fsync each time; its SummaryWriter waits without end if the disk is full.
        """
        data = self._event.Event(step=step, wall_time=time.time(), **content).SerializeToString()
        length = struct.pack("<Q", len(data))
        crc = self._crc
        self._file.write(length + struct.pack("<I", crc(length)) + data + struct.pack("<I", crc(data)))


def _cell(value: Any) -> str:
    """Returns a value as text in a cell of a Markdown table."""
    return " ".join(str(value).replace("|", "\\|").split())
