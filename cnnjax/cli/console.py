"""Console output: lines on standard output, and a progress bar on standard error if it is a terminal."""

import copy
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress import track as rich_track

from cnnjax.cli.streams import Output, reason

T = TypeVar("T")


def track(items: Iterable[T], description: str, total: int | float) -> Iterable[T]:
    """Yields `items`, with a progress bar on standard error if it is a terminal."""
    err = _console(Output(sys.stderr))
    return rich_track(items, description, total, console=err, transient=True, disable=not err.file.isatty())


class Report:
    """Prints the progress and the result of a run.

    If standard output cannot be written, it says so once on standard error, and the run continues.

    Args:
      quiet: whether to print nothing, for use as a library.
      prefix: starts every line. If it is not empty, no progress bar is shown.
    """

    def __init__(self, quiet: bool = False, prefix: str = ""):
        self._prefix = prefix
        self._out = _console(Output(sys.stdout, self._lose), quiet=quiet)
        self._err = _console(Output(sys.stderr), quiet=quiet)
        self._bar: Progress | None = None

    def say(self, line: str) -> None:
        """Prints a line."""
        self._out.print(self._prefix + line, markup=False)

    def with_prefix(self, prefix: str) -> "Report":
        """Returns a report with this prefix, for one of several simultaneous runs."""
        report = copy.copy(self)
        report._prefix = prefix
        return report

    def _lose(self, error: Exception) -> None:
        self._err.print(f"Standard output cannot be written ({reason(error)}): the run continues without it.")

    @contextmanager
    def progress(self, num_epochs: int, steps_per_epoch: int, start: int) -> Iterator[None]:
        """Shows a progress bar over the steps of all epochs, which starts at step `start`."""
        columns = (
            TextColumn("{task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(
                "loss {task.fields[loss]:.3f}  accuracy {task.fields[accuracy]:.1%}  "
                "{task.fields[images_per_second]:,.0f} images/s  left"
            ),
            TimeRemainingColumn(),
        )
        # Lines must scroll above the bar, so both use the same console if both streams are terminals.
        out, shown = self._out, self._err.file.isatty() and not self._err.quiet and not self._prefix
        if shown and out.file.isatty():
            self._out = self._err
        fields = {"epoch": "compiling", "loss": float("nan"), "accuracy": 0.0, "images_per_second": 0.0}
        fields |= {"num_epochs": num_epochs, "steps_per_epoch": steps_per_epoch}
        with Progress(*columns, console=self._err, disable=not shown, transient=True, speed_estimate_period=10) as bar:
            bar.add_task("train", total=num_epochs * steps_per_epoch, completed=start, **fields)
            self._bar = bar
            try:
                yield
            finally:
                self._out, self._bar = out, None

    def step(self, step: int, means: Any) -> None:
        """Shows `step` and the mean loss and accuracy of its epoch in the progress bar, if there is one."""
        if self._bar is None:
            return
        task = self._bar.tasks[0]
        epoch, index = divmod(step - 1, task.fields["steps_per_epoch"])
        self._bar.update(
            task.id,
            completed=step,
            epoch=f"epoch {epoch + 1}/{task.fields['num_epochs']}",
            loss=means.loss,
            accuracy=means.accuracy,
            images_per_second=(task.speed or 0.0) * means.num_examples / (index + 1),
        )

    def epoch(self, row: Mapping[str, Any], num_epochs: int) -> None:
        """Prints the metrics and the timing of an epoch."""
        validation = ""
        if "validation_loss" in row:
            validation = f"validation loss {row['validation_loss']:.4f}  accuracy {row['validation_accuracy']:.2%}  "
        self.say(
            f"epoch {row['epoch']:>{len(str(num_epochs))}}/{num_epochs}  "
            f"loss {row['train_loss']:.4f}  accuracy {row['train_accuracy']:.2%}  {validation}"
            f"{row['images_per_second']:,.0f} images/s  {row['seconds']:.0f} s"
        )

    def result(self, result: Mapping[str, Any], run_dir: Path) -> None:
        """Prints the content of result.json as a sentence."""
        best = result["best_validation_accuracy"]
        validation = "no validation" if best is None else f"validation accuracy {best:.2%}"
        self.say(
            f"Test accuracy {result['test_accuracy']:.2%} (loss {result['test_loss']:.4f}) on all "
            f"{result['num_test_examples']:,} test images, with the parameters of epoch {result['best_epoch']} of "
            f"{result['num_epochs']} ({validation}); seed {result['seed']}, {result['num_params']:,} parameters, "
            f"{result['training_seconds']:.0f} s of training on {result['device']}. All of it is in {run_dir}."
        )


def _console(file: Any, quiet: bool = False) -> Console:
    return Console(file=file, quiet=quiet, highlight=False, soft_wrap=True)
