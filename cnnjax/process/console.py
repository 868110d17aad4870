"""Console output: lines on standard output, and a progress bar on standard error if it is a terminal."""

import copy
import io
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress import track as rich_track

from cnnjax.class_scores import OUR_SCORES, is_uneven, own_scores
from cnnjax.process.streams import Output, reason
from cnnjax.process.tables import accuracies, class_lines, rate, scores_suffix, show_score

T = TypeVar("T")


def track(items: Iterable[T], description: str, total: int | float | None) -> Iterable[T]:
    """Yields `items`, with a progress bar on standard error if it is a terminal."""
    err = _console(Output(sys.stderr))
    return rich_track(items, description, total, console=err, transient=True, disable=not err.file.isatty())


class Report:
    """Shows the progress and the result of a run, in a terminal, a log or a notebook.

    `train_and_evaluate` calls `say`, `progress`, `step`, `epoch` and `result`; a subclass may override some of them. To
    record a run elsewhere, see `Logger`; for an HTML file about it, see `write_report`. If standard output cannot be
    written, it says so once on standard error, and the run continues.

    Example:
      >>> train_and_evaluate(config, report=Report())

    Args:
      quiet: whether to print nothing.
      prefix: starts every line. If it is not empty, no progress bar is shown.
    """

    def __init__(self, quiet: bool = False, prefix: str = ""):
        self._prefix = prefix
        self._one_of_several = False
        self._out = _console(Output(sys.stdout, self._lose), quiet=quiet)
        self._err = _console(Output(sys.stderr), quiet=quiet)
        self._bar: Progress | None = None
        self._cell: _Cell | None = None

    def say(self, line: str) -> None:
        """Prints a line."""
        self._out.print(self._prefix + line, markup=False)

    def with_prefix(self, prefix: str) -> "Report":
        """Returns a report with this prefix, for one of several runs, that shows no table of the classes."""
        report = copy.copy(self)
        report._prefix, report._one_of_several = prefix, True
        return report

    def _lose(self, error: Exception) -> None:
        self._err.print(f"Standard output cannot be written ({reason(error)}): the run continues without it.")

    @contextmanager
    def progress(self, num_epochs: int, steps_per_epoch: int, start: int) -> Iterator[None]:
        """Shows a progress bar over the steps of all epochs inside the context, which contains the training.

        Args:
          start: the number of steps that are done.
        """
        columns = (
            TextColumn("{task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[scores]}  {task.fields[images_per_second]} images/s  left"),
            TimeRemainingColumn(),
        )
        # Lines must scroll above the bar, so both use the same console if both streams are terminals.
        out, wanted = self._out, not self._err.quiet and not self._prefix
        shown, in_notebook = wanted and self._err.file.isatty(), wanted and Console().is_jupyter
        if shown and out.file.isatty():
            self._out = self._err
        fields: Any = {"epoch": "compiling", "scores": "", "images_per_second": "0"}
        fields |= {"num_epochs": num_epochs, "steps_per_epoch": steps_per_epoch}
        with Progress(*columns, console=self._err, disable=not shown, transient=True, speed_estimate_period=10) as bar:
            bar.add_task("train", total=num_epochs * steps_per_epoch, completed=start, **fields)
            self._bar = bar if shown or in_notebook else None
            self._cell = _Cell() if in_notebook else None
            try:
                yield
            finally:
                if self._cell is not None:
                    self._cell.show(bar)
                self._out, self._bar, self._cell = out, None, None

    def step(self, step: int, means: Any) -> None:
        """Shows the mean metrics of an epoch so far.

        On an accelerator an epoch of images in memory is one program, so this is called once per epoch.

        Args:
          step: the number of steps that are done.
          means: its fields `loss`, `num_examples` and `values`, such as {"accuracy": 0.9}.
        """
        if self._bar is None:
            return
        task = self._bar.tasks[0]
        epoch, index = divmod(step - 1, task.fields["steps_per_epoch"])
        self._bar.update(
            task.id,
            completed=step,
            epoch=f"epoch {epoch + 1}/{task.fields['num_epochs']}",
            scores=_scores({"loss": means.loss, **means.values}),
            images_per_second=rate((task.speed or 0.0) * means.num_examples / (index + 1)),
        )
        if self._cell is not None and self._cell.is_due():
            self._cell.show(self._bar)

    def epoch(self, row: Mapping[str, Any], num_epochs: int) -> None:
        """Prints the metrics and the timing of an epoch; the balanced accuracy if it differs from accuracy by a point.

        Args:
          row: see `on_epoch` of `train_and_evaluate`.
          num_epochs: of the configuration.
        """
        train = {name.removeprefix("train_"): value for name, value in row.items() if name.startswith("train_")}
        train.pop("grad_norm", None)
        validation = {name.replace("_", " "): row.get(f"validation_{name}") for name in OUR_SCORES}
        accuracy, balanced = row.get("validation_accuracy"), validation["balanced accuracy"]
        if accuracy is None or balanced is None or abs(accuracy - balanced) < 0.01:
            del validation["balanced accuracy"]
        validation |= own_scores(row)
        self.say(
            f"epoch {row['epoch']:>{len(str(num_epochs))}}/{num_epochs}  {_scores(train)}  "
            + (f"validation {_scores(validation)}  " if "validation_loss" in row else "")
            + f"{rate(row['images_per_second'])} images/s  "
            + (f"{row['flops_utilization']:.0%} of peak FLOP/s  " if "flops_utilization" in row else "")
            + f"{row['seconds']:.0f} s"
        )

    def result(self, result: Mapping[str, Any], run_dir: Path) -> None:
        """Prints the content of result.json: a table of the classes, except for one of several runs, and a sentence."""
        classes, best = result["classes"], result["best_validation_accuracy"]
        uneven = is_uneven([row["count"] for row in classes])
        if not self._one_of_several:
            means = {name: result[f"test_macro_{name}"] for name in ("precision", "recall", "f1")}
            for line in class_lines(classes, result["confusion_matrix"], means, f"All are in {run_dir}/result.json."):
                self.say(line)
        test = accuracies(result["test_accuracy"], result["test_balanced_accuracy"], uneven)
        validation = "no validation"
        if best is not None:
            validation = f"validation {accuracies(best, result['best_validation_balanced_accuracy'], uneven)}"
            validation += scores_suffix(result.get("best_validation_metrics", {}))
        stopped = result["stopped_epoch"]
        early = "" if stopped is None else f", stopped after epoch {stopped}"
        self.say(
            f"Test {test} (loss {result['test_loss']:z.4f}{scores_suffix(result.get('test_metrics', {}))}) on all "
            f"{result['num_test_examples']:,} test images, with the parameters of epoch {result['best_epoch']} of "
            f"{result['num_epochs']} ({validation}{early}); seed {result['seed']}, {result['num_params']:,} "
            f"parameters, {result['training_seconds']:.0f} s of training on {result['device']}. All of it is in "
            f"{run_dir}."
        )


class _Cell:
    """A progress bar as text in the output of a notebook's cell, without widgets."""

    def __init__(self) -> None:
        from IPython.display import display  # There is one in a notebook.

        handle: Any = display({"text/plain": "compiling"}, raw=True, display_id=True)
        self._update = handle.update
        self._shown_at = time.monotonic()

    def is_due(self) -> bool:
        return time.monotonic() - self._shown_at > 0.2

    def show(self, bar: Progress) -> None:
        text = io.StringIO()
        _console(text, width=120, color_system=None).print(bar.get_renderable())
        self._update({"text/plain": text.getvalue().rstrip()}, raw=True)
        self._shown_at = time.monotonic()


def _scores(values: Mapping[str, Any]) -> str:
    formats = {"loss": "z.4f", "accuracy": ".2%", "balanced accuracy": ".2%"}
    shown = {name: format(x, formats[name]) if name in formats else show_score(x) for name, x in values.items()}
    return "  ".join(f"{name} {value}" for name, value in shown.items())


def _console(file: Any, **options: Any) -> Console:
    # In a notebook rich would ignore `file`.
    return Console(file=file, highlight=False, soft_wrap=True, force_jupyter=False, **options)
