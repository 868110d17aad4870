"""The figures of the report: a chart, the sentence that describes it, and the table of its numbers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cnnjax.class_scores import Calibration, own_scores
from cnnjax.report import charts, prediction_charts
from cnnjax.report.analysis import Band, Fit, band
from cnnjax.runs.schema import Result
from cnnjax.runs.statistics import Summary

MATRIX_CLASSES = 30  # If there are more, those with the most mistakes are shown.
METRICS = ("loss", "accuracy")
PARTS = {charts.TRAINING: "train", charts.VALIDATION: "validation"}


class Figure(NamedTuple):
    """A figure of the page.

    Attributes:
      name: identifies it in the page.
      title: its caption.
      draw: returns the chart of a width in pixels, or "container".
      description: the text alternative, with the most important numbers.
      header, rows: the table of its numbers.
    """

    name: str
    title: str
    draw: Callable[[int | str], Any]
    description: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]

    @property
    def json(self) -> str:
        """The Vega-Lite specification."""
        return charts.to_json(charts.configured(self.draw(charts.CONTAINER), self.description))


def learning_curves(history: Mapping[str, np.ndarray], fit: Fit) -> list[Figure]:
    """Returns loss, accuracy and the user's own scores over the epochs, as far as the history has them."""
    found = []
    for metric in _metrics([history]):
        bands = {part: band([history], f"{prefix}_{metric}") for part, prefix in PARTS.items()}
        bands = {part: values for part, values in bands.items() if values is not None}
        if bands:
            percent = metric == "accuracy"
            draw = _curves(metric, bands, metric, percent=percent, fit=fit)
            lines = [f"{part} from {_ends(values, percent)}" for part, values in bands.items()]
            title, header = _title(metric), ("epoch", *bands)
            description = f"{title} over the epochs: {'; '.join(lines)}."
            found.append(Figure(_id(metric), title, draw, description, header, _curve_rows(bands, percent)))
    return found


def overlaid_curves(histories: Mapping[str, Sequence[Mapping[str, np.ndarray]]]) -> list[Figure]:
    """Returns each metric over the epochs, for several groups of runs.

    Args:
      histories: those of the runs of each group, by its label.
    """
    found = []
    for metric in _metrics([history for group in histories.values() for history in group]):
        for part, prefix in PARTS.items():
            bands = {label: band(group, f"{prefix}_{metric}") for label, group in histories.items()}
            bands = {label: values for label, values in bands.items() if values is not None}
            if bands:
                percent, name = metric == "accuracy", f"{part.capitalize()} {metric}"
                lines = [f"{label} from {_ends(values, percent)}" for label, values in bands.items()]
                description = f"{name} over the epochs: {'; '.join(lines)}."
                rows = _curve_rows(bands, percent)
                draw = _curves(f"{part}_{metric}", bands, metric, percent=percent)
                found.append(Figure(f"{part}-{_id(metric)}", name, draw, description, ("epoch", *bands), rows))
    return found


def _metrics(histories: Sequence[Mapping[str, np.ndarray]]) -> list[str]:
    """Returns the metrics that are drawn: ours, and those of `Config.metrics`."""
    return [*dict.fromkeys([*METRICS, *(name for history in histories for name in own_scores(history))])]


def _title(metric: str) -> str:
    return metric.capitalize() if metric in METRICS else metric


def _id(metric: str) -> str:
    """Returns the part of a name in the page: that of a user's score may also be the name of a section."""
    return metric if metric in METRICS else f"metric-{metric}"


def _curves(
    key: str, bands: Mapping[str, Band], title: str, *, percent: bool, fit: Fit | None = None
) -> Callable[[int | str], Any]:
    return lambda width: charts.curves(key, bands, title, percent=percent, fit=fit, width=width)


def _ends(values: Band, percent: bool) -> str:
    first, last = (_show(value, percent) for value in (values.mean[0], values.mean[-1]))
    return f"{first} in epoch {values.epoch[0]} to {last} in epoch {values.epoch[-1]}"


def _show(value: float, percent: bool) -> str:
    return f"{value:.2%}" if percent else f"{value:.4f}"


def _curve_rows(bands: Mapping[str, Band], percent: bool) -> list[tuple[str, ...]]:
    columns = [dict(zip(values.epoch.tolist(), values.mean.tolist(), strict=True)) for values in bands.values()]
    epochs = sorted({epoch for column in columns for epoch in column})
    cells = [[_show(column[e], percent) if e in column else "" for column in columns] for e in epochs]
    return [(str(epoch), *row) for epoch, row in zip(epochs, cells, strict=True)]


def confusion(result: Result) -> tuple[Figure, str] | None:
    """Returns the confusion matrix, and what it leaves out; None if there are too many classes for result.json."""
    matrix, classes = result["confusion_matrix"], result["classes"]
    if matrix is None:
        return None
    names = [row["name"] for row in classes]
    wrong = np.array(matrix).sum(axis=1) - np.diag(matrix)
    shown = sorted(np.argsort(-wrong, kind="stable")[:MATRIX_CLASSES].tolist())
    left_out = ""
    if len(shown) < len(names):
        left_out = f"The {len(shown)} of {len(names):,} classes with the most mistakes. result.json has all of them."
    correct = int(np.trace(matrix))
    total = int(np.sum(matrix))
    description = f"Confusion matrix: {correct:,} of {total:,} test images are classified correctly (the diagonal)."
    rows = [(names[i], *(f"{matrix[i][j]:,}" for j in shown)) for i in shown]
    header = ("true class \\ predicted", *(names[j] for j in shown))

    def draw(width: int | str) -> Any:
        return prediction_charts.confusion(matrix, names, shown, width)

    return Figure("confusion", "Confusion matrix", draw, description, header, rows), left_out


def calibration(found: Calibration) -> list[Figure]:
    """Returns the reliability diagram, and the histogram of the confidences."""
    bins = prediction_charts.bin_rows(found)
    rows = [(row["bin"], f"{row['images']:,}", f"{row['confidence']:.1%}", f"{row['accuracy']:.1%}") for row in bins]
    description = (
        f"Reliability diagram: the expected calibration error is {found.error:.2%}; predictions are "
        f"{found.mean_confidence:.1%} confident on average, and {found.mean_accuracy:.1%} of them are right."
    )
    header = ("confidence", "images", "mean confidence", "right")
    most = max(bins, key=lambda row: row["images"])
    total = sum(row["images"] for row in bins)
    counts = f"Histogram: {most['images'] / total:.1%} of the images have a confidence of {most['bin']}."
    return [
        Figure(
            "reliability", "Reliability", lambda w: prediction_charts.reliability(found, w), description, header, rows
        ),
        Figure(
            "confidences",
            "How often each confidence occurs",
            lambda w: prediction_charts.confidences(found, w),
            counts,
            header[:2],
            [row[:2] for row in rows],
        ),
    ]


def seed_scores(scores: Mapping[str, Mapping[int, float]], summaries: Mapping[str, Summary]) -> Figure:
    """Returns the test accuracy of every run, by its group and seed."""
    lines = [f"{label} {summary.mean:.2%} on average" for label, summary in summaries.items()]
    rows = [(label, str(seed), f"{value:.2%}") for label, of in scores.items() for seed, value in of.items()]
    description = f"Test accuracy of each run: {'; '.join(lines)}."
    header = ("runs", "seed", "test accuracy")
    title = "Test accuracy of each seed"
    return Figure("scores", title, lambda w: charts.seed_scores(scores, summaries, w), description, header, rows)
