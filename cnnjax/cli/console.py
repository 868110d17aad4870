"""What a person sees: lines on standard output, and a progress bar on standard error where that is a terminal."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import track as rich_track

T = TypeVar("T")


def track(items: Iterable[T], description: str, total: int | float) -> Iterable[T]:
    """Yields `items`, with a progress bar on standard error where that is a terminal."""
    hidden = not sys.stderr.isatty()
    return rich_track(items, description, total, console=Console(stderr=True), transient=True, disable=hidden)


class Bar:
    """The progress of training, over all epochs."""

    def __init__(self, progress: Progress, task: TaskID, num_epochs: int, steps: int):
        self._progress = progress
        self._task = task
        self._num_epochs = num_epochs
        self._steps = steps

    def update(self, step: int, means: Any) -> None:
        """Shows the step, and the mean loss and accuracy of the epoch so far."""
        speed = self._progress.tasks[self._task].speed or 0.0
        self._progress.update(
            self._task,
            completed=step,
            epoch=f"epoch {(step - 1) // self._steps + 1}/{self._num_epochs}",
            loss=means.loss,
            accuracy=means.accuracy,
            images_per_second=speed * means.num_examples / ((step - 1) % self._steps + 1),
        )


class Report:
    """Tells a person what happens.

    Args:
      quiet: tell nothing (for callers that are programs).
      prefix: of every line; with one, there is no progress bar.
    """

    def __init__(self, quiet: bool = False, prefix: str = ""):
        self._quiet = quiet
        self._prefix = prefix
        self._out = Console(quiet=quiet, highlight=False, soft_wrap=True)
        self._err = Console(quiet=quiet, stderr=True, highlight=False, soft_wrap=True)

    def say(self, line: str) -> None:
        """Prints a line."""
        self._out.print(self._prefix + line, markup=False)

    def of(self, prefix: str) -> "Report":
        """Returns a report for one of several runs at a time."""
        return Report(self._quiet, prefix)

    @contextmanager
    def progress(self, num_epochs: int, steps: int, start: int) -> Iterator[Bar]:
        """Shows a bar of all training steps while the context lasts, from step `start` on."""
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
        # The lines of `say` and `epoch` must scroll above the bar: on a terminal both go through the same console.
        out, shown = self._out, sys.stderr.isatty() and not self._err.quiet and not self._prefix
        if shown and sys.stdout.isatty():
            self._out = self._err
        with Progress(*columns, console=self._err, disable=not shown, transient=True, speed_estimate_period=10) as bar:
            fields = {"epoch": "compiling", "loss": float("nan"), "accuracy": 0.0, "images_per_second": 0.0}
            task = bar.add_task("train", total=num_epochs * steps, completed=start, **fields)
            try:
                yield Bar(bar, task, num_epochs, steps)
            finally:
                self._out = out

    def epoch(self, row: dict[str, Any], num_epochs: int) -> None:
        """Prints a row of metrics.jsonl."""
        validation = ""
        if "validation_loss" in row:
            validation = f"validation loss {row['validation_loss']:.4f}  accuracy {row['validation_accuracy']:.2%}  "
        self.say(
            f"epoch {row['epoch']:>{len(str(num_epochs))}}/{num_epochs}  "
            f"loss {row['train_loss']:.4f}  accuracy {row['train_accuracy']:.2%}  {validation}"
            f"{row['images_per_second']:,.0f} images/s  {row['seconds']:.0f} s"
        )

    def result(self, result: dict[str, Any], run_dir: Path) -> None:
        """Prints result.json in words: the last line that a person sees."""
        best = result["best_validation_accuracy"]
        validation = "no validation" if best is None else f"validation accuracy {best:.2%}"
        self.say(
            f"Test accuracy {result['test_accuracy']:.2%} (loss {result['test_loss']:.4f}) on all "
            f"{result['num_test_examples']:,} test images, with the parameters of epoch {result['best_epoch']} of "
            f"{result['num_epochs']} ({validation}); seed {result['seed']}, {result['num_params']:,} parameters, "
            f"{result['training_seconds']:.0f} s of training on {result['device']}. All of it is in {run_dir}."
        )
