"""The commands that use trained networks: cnnjax predict | eval. Imports jax only if a command runs."""

import csv
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from cnnjax.cli.inspection import RunDir, config_of
from cnnjax.errors import UserError, check
from cnnjax.process.tables import accuracies, class_lines, printable, scores_suffix

if TYPE_CHECKING:
    from cnnjax.metrics import Scores
    from cnnjax.runs.predictions import FilePrediction
    from cnnjax.runs.run import Run


Tta = Literal["none", "flip", "flip_translate", "uncertain"]
_STDIN = 0  # Its descriptor.


@dataclass(frozen=True)
class Eval:
    """Score a trained network on every image of a split, or of a labelled folder, and on those of each class.

    Files of the folder that cannot be read are reported on standard error; the others are scored, and the exit code
    is 2, as it is if your own `metrics` fail. With --data or --ensemble these receive the logarithms of the
    probabilities as logits.
    """

    run: Positional[RunDir]
    """The run directory."""
    split: Literal["test", "validation"] = "test"
    """The split; validation is the validation split of the data, or else the part of the training split that was held
    out."""
    data: Path | None = None
    """Score the images of this folder instead, with a folder per class, or of a .csv or .jsonl file with the columns
    path and label. The names of its classes must be those of the run. If it has several splits, the test split is
    scored."""
    tta: Tta | None = None
    """The test-time augmentation; by default that of each run, and none for validation."""
    ensemble: tuple[Path, ...] = ()
    """More run directories: score the mean of the probabilities of all runs."""
    json: bool = False
    """Print a JSON object instead: the accuracy with its 95% interval, balanced accuracy, loss and your own metrics
    (each null if it is not finite), the scores of each class, and the confusion matrix (null above 300 classes)."""
    data_dir: Path | None = None
    """The tfds directory; $TFDS_DATA_DIR or ~/tensorflow_datasets by default."""
    experiment: str | None = None
    """The experiment file, if the run has classes or data of its own."""

    def __call__(self) -> int:
        """Prints the scores of the classes, accuracy and loss."""
        check("split", "left out with `data`", self.data is None or self.split == "test", self.split)
        alone = not self.ensemble or self.split == "test"
        check("split", "test for an ensemble: the other runs may have been trained on it", alone, self.split)
        from cnnjax.metrics import with_metrics

        runs, failed = _load([self.run, *self.ensemble], self.experiment), False
        with redirect_stdout(sys.stderr) if self.json else nullcontext():  # Lines about the data.
            scores, label, unreadable = self._score(runs)
            try:
                scores = with_metrics(scores, runs[0].config.metrics, label)
            except UserError as error:  # Unknown without --experiment, or undefined for the images of a folder.
                print(printable(error), file=sys.stderr)
                failed = True
        self._show(runs, scores, unreadable)
        return 2 if unreadable or failed else 0

    def _score(self, runs: Sequence["Run"]) -> tuple["Scores", Any, int]:
        """Returns the scores, the labels, and the number of files that cannot be read."""
        from cnnjax.runs.predictions import evaluate_ensemble
        from cnnjax.runs.run import evaluate_ours

        if self.data is not None:
            return self._score_files(runs, Path(os.path.expanduser(self.data)))
        if self.ensemble:
            return *evaluate_ensemble(runs, tta=self.tta, data_dir=self.data_dir), 0
        return *evaluate_ours(runs[0], self.split, tta=self.tta, data_dir=self.data_dir), 0

    def _score_files(self, runs: Sequence["Run"], data: Path) -> tuple["Scores", Any, int]:
        """Returns the scores, the labels, and the number of files that cannot be read."""
        import numpy as np

        from cnnjax.data.image_paths import find_labelled
        from cnnjax.process.console import track
        from cnnjax.runs.predictions import predict_files, scores_of

        names = runs[0].facts.class_names
        files = find_labelled(data, names)
        if files.split is not None:
            print(f"Scoring the {files.split} split of {data}.")
        missing = [printable(name) for k, name in enumerate(names) if k not in {*files.labels}]
        if missing:
            more = f" and {len(missing) - 10:,} more" if missing[10:] else ""
            print(f"{data} has no image of {', '.join(missing[:10])}{more}.", file=sys.stderr)
        label, probabilities = [], []
        found = track(predict_files(runs, files.paths, tta=self.tta), "images", total=len(files.paths))
        for k, prediction in zip(files.labels, found, strict=True):
            if prediction.probabilities is None:
                print(printable(prediction.error), file=sys.stderr)
                continue
            label.append(k)
            probabilities.append(prediction.probabilities)
        check("data", "a folder with an image that can be read", bool(label), f"{data} without one")
        labels = np.array(label)
        return scores_of(np.array(probabilities), labels), labels, len(files.paths) - len(label)

    def _show(self, runs: Sequence["Run"], scores: "Scores", unreadable: int) -> None:
        from cnnjax.class_scores import class_scores, confusion_matrix, is_uneven
        from cnnjax.runs.statistics import wilson_interval

        names = runs[0].facts.class_names
        classes, matrix = class_scores(scores.confusion, len(names)), confusion_matrix(scores.confusion, len(names))
        low, high = wilson_interval(scores.accuracy, scores.num_examples)
        what = self.split if self.data is None else os.path.expanduser(self.data)
        if self.json:
            values = {
                "runs": [str(run.run_dir) for run in runs],
                "unfinished": [str(run.run_dir) for run in runs if run.result is None],
                "data": what,
                "num_examples": scores.num_examples,
                "num_unreadable": unreadable,
                "accuracy": scores.accuracy,
                "accuracy_interval": [low, high],
                "balanced_accuracy": scores.balanced_accuracy,
                "loss": _finite(scores.loss),
                "metrics": {name: _finite(value) for name, value in scores.metrics.items()},
                "classes": classes.rows(names),
                "confusion_matrix": matrix,
            }
            print(json.dumps(values))
            return
        in_python = f"load_run({str(self.run)!r}).evaluate({self.split!r})"
        rest = "" if self.data or self.ensemble or self.tta else f"In Python, {in_python} counts all of them."
        for line in class_lines(classes.rows(names), matrix, classes.means(), rest):
            print(line)
        uneven = is_uneven(classes.num_examples.tolist())
        total = scores.num_examples + unreadable
        lost = f"{scores.num_examples:,} of {total:,} images ({unreadable:,} cannot be read)"
        images = lost if unreadable else f"all {total:,} images"
        of_runs = ", ".join(f"{run.run_dir}{'' if run.result else ', which is not finished'}" for run in runs)
        score = accuracies(scores.accuracy, scores.balanced_accuracy, uneven)
        print(
            f"{printable(what)} {score}, loss {scores.loss:z.4f}{scores_suffix(scores.metrics)}, on {images}; "
            f"95% interval of the accuracy {low:.2%} to {high:.2%} ({of_runs})"
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Predict:
    """Print the most probable classes of image files of any size and format, in the order of the arguments.

    Files that cannot be read are reported on standard error; the others are classified, and the exit code is 2. The
    first frame of an animation counts.
    """

    run: Positional[RunDir]
    """The run directory."""
    images: Positional[Annotated[tuple[str, ...], arg(metavar="IMAGE ...", help_behavior_hint="(required)")]]
    """Image files; folders, which are searched at any depth; quoted patterns, such as "photos/**/*.jpg"; - reads names
    of files from standard input, one per line or each ended by NUL. Put -- before a name that begins with a hyphen."""
    top: int = 3
    """Number of classes to print; 0 prints all."""
    json: bool = False
    """Print a JSON object per file: file, classes and probabilities, the most probable first; or file and error."""
    csv: bool = False
    """Print a table in CSV: file, class_1, probability_1, ..., error."""
    tta: Tta | None = None
    """The test-time augmentation; by default that of the test score of each run, or flip_translate for uncertain, with
    which the prediction for a file would depend on others."""
    ensemble: tuple[Path, ...] = ()
    """More run directories, after the images: print the mean of the probabilities of all runs."""
    invert: bool = False
    """Swap dark and bright first: for dark digits on white paper, if the training images are the reverse."""
    experiment: str | None = None
    """The experiment file, if the run has classes or data of its own."""

    def __call__(self) -> int:
        """Prints one line per file."""
        if not self.images and self.ensemble:
            raise UserError(
                "`images` must be at least one file, got none: --ensemble takes all names after it. Put the images "
                "first: cnnjax predict RUN IMAGES --ensemble RUN ..."
            )
        check("images", "at least one file", bool(self.images), "none")
        check("top", "at least 0", self.top >= 0, self.top)
        if self.csv and self.json:
            raise UserError("`--json` and `--csv` exclude each other. Use one of them.")
        from cnnjax.runs.predictions import predict_files

        paths, total, failed = self._find()
        runs = _load([self.run, *self.ensemble], self.experiment)
        write = self._writer(runs[0].facts.class_names)
        bright = count = 0
        for found in _with_bar(predict_files(runs, paths, tta=self.tta, invert=self.invert), total):
            if found.error is not None:
                print(printable(found.error), file=sys.stderr)
                failed += 1
            if found.is_bright and not self.invert:
                if not bright:
                    print(
                        f"{printable(found.path)} is much brighter than the training images; try --invert",
                        file=sys.stderr,
                    )
                bright += 1
            write(found)
            count += 1
        if not count:
            print("Standard input names no file.", file=sys.stderr)
        if bright > 1:
            print(f"{bright:,} files are that bright", file=sys.stderr)
        return 2 if failed else 0

    def _find(self) -> tuple[Iterable[str], int | None, int]:
        """Returns the files, their number (None: standard input tells), and that of folders and patterns without any.

        Raises:
          UserError: there is no file at all.
        """
        from cnnjax.data.image_paths import find_images, read_names

        names = self.images
        check("images", "names of files", all(names), "an empty one")
        if (times := names.count("-")) > 1:
            raise UserError(f"`images` must contain - at most once, got {times} times.")
        parts, errors = [], []
        for name in names:
            try:
                parts.append(None if name == "-" else find_images(name))
            except UserError as error:
                errors.append(error)
        if not parts:
            raise errors[0]
        for error in errors:
            print(printable(error), file=sys.stderr)
        total = None if None in parts else sum(len(part) for part in parts if part)
        found = chain.from_iterable(read_names(_STDIN) if part is None else part for part in parts)
        return found, total, len(errors)

    def _writer(self, class_names: Sequence[str]) -> Callable[["FilePrediction"], None]:
        """Returns a function that prints a prediction."""
        out, top = sys.stdout, self.top or len(class_names)  # A progress bar replaces `sys.stdout`.
        rows = csv.writer(out, lineterminator="\n")
        width = min(top, len(class_names))
        if self.csv:
            columns = (name for k in range(1, width + 1) for name in (f"class_{k}", f"probability_{k}"))
            rows.writerow(["file", *columns, "error"])

        def write(found: "FilePrediction") -> None:
            file, ranked = str(found.path), []
            if found.probabilities is not None:
                order = (-found.probabilities).argsort(kind="stable")[:top]
                ranked = [(class_names[k], found.probabilities[k]) for k in order]
            if self.json:
                values = {
                    "classes": [name for name, _ in ranked],
                    "probabilities": [float(str(value)) for _, value in ranked],  # The digits of float32.
                }
                out.write(json.dumps({"file": file, **(values if ranked else {"error": str(found.error)})}) + "\n")
            elif self.csv:
                cells = [x for pair in ranked for x in pair] if ranked else [""] * (2 * width)
                rows.writerow([file, *cells, "" if ranked else str(found.error)])
            elif ranked:
                classes = ", ".join(f"{name} {value:.1%}" for name, value in ranked)
                out.write(f"{printable(file)}: {classes}\n")

        return write


def _load(run_dirs: Sequence[Path], experiment: str | None) -> list["Run"]:
    from cnnjax.runs.predictions import check_ensemble
    from cnnjax.runs.run import load_run

    different = len({run_dir.resolve() for run_dir in run_dirs}) == len(run_dirs)
    check("ensemble", "different runs", different, ", ".join(map(str, run_dirs)))
    runs = []
    for run_dir in run_dirs:
        try:
            runs.append(load_run(run_dir, config_of(run_dir, experiment)))
        except UserError as error:
            if not runs:
                raise
            raise UserError(str(error).replace("`run`", "`ensemble`")) from error
    check_ensemble(runs)
    return runs


def _with_bar(predictions: Iterable["FilePrediction"], total: int | None) -> Iterable["FilePrediction"]:
    """Shows a progress bar, unless the predictions themselves appear in the terminal."""
    from cnnjax.process.console import track

    return predictions if sys.stdout.isatty() else track(predictions, "images", total=total)
