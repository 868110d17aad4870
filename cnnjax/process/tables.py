"""Tables as text: aligned columns, and the scores of each class."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.cells import cell_len, set_cell_size

MANY_CLASSES, WORST = 20, 10  # If there are more classes, only the worst are shown.
MATRIX_CLASSES = 10  # A larger confusion matrix is not shown.
NAME_WIDTH, WIDTH = 40, 100  # Columns of a terminal.


def printable(text: object) -> str:
    """Returns `text` with the characters escaped that would break a line or control a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def rate(value: float) -> str:
    """Returns a rate, such as of images per second, with at least two significant digits."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yields `rows` as lines with aligned columns, however wide they are."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def class_lines(
    classes: Sequence[Mapping[str, Any]], matrix: Sequence[Sequence[int]] | None, means: Mapping[str, float], rest: str
) -> Iterator[str]:
    """Yields a table of the scores of each class, or of the classes with the lowest recall; and the confusion matrix.

    Args:
      classes: see `class_scores.ClassScores.rows`.
      matrix: see `class_scores.confusion_matrix`. It is shown for few classes.
      means: the macro means of "precision", "recall" and "f1".
      rest: says where all classes are, if there are too many to show.
    """
    shown = sorted(range(len(classes)), key=lambda k: (classes[k]["recall"] is None, classes[k]["recall"] or 0.0))
    shown = sorted(shown) if len(classes) <= MANY_CLASSES else shown[:WORST]
    scores = ("precision", "recall", "f1")
    rows = [["class", "", "images", "precision", "recall", "F1"]]
    for k in shown:
        row, name = classes[k], _cut(classes[k]["name"], NAME_WIDTH)
        rows.append([str(k), name, f"{row['count']:,}", *(_percent(row[score]) for score in scores)])
    rows.append(["mean", "", "", *(_percent(means[score]) for score in scores)])
    yield from _right_aligned(rows)
    if len(shown) < len(classes):
        yield f"These are the {len(shown)} of {len(classes):,} classes with the lowest recall. {rest}"
    if matrix is not None and len(classes) <= MATRIX_CLASSES:
        yield "Images of each class (rows), by predicted class (columns):"
        counts = [[str(count) for count in row] for row in matrix]
        numbers = [str(k) for k in range(len(classes))]
        used = sum(2 + max(map(len, column)) for column in zip(numbers, *counts, strict=True)) + len("class  ")
        names = [_cut(row["name"], min(max(WIDTH - used, 10), NAME_WIDTH)) for row in classes]
        yield from _right_aligned(
            [["class", "", *numbers], *([k, name, *row] for k, name, row in zip(numbers, names, counts, strict=True))]
        )


def accuracies(accuracy: float, balanced_accuracy: float, uneven: bool) -> str:
    """Returns the accuracy in words, and the balanced accuracy if the classes are uneven."""
    return f"accuracy {accuracy:.2%}" + (f", balanced accuracy {balanced_accuracy:.2%}" if uneven else "")


def scores_suffix(scores: Mapping[str, float]) -> str:
    """Returns `, name 0.1234` for each of the user's own scores."""
    return "".join(f", {name} {show_score(value)}" for name, value in scores.items())


def show_score(value: float) -> str:
    """Returns a number of any size with four decimals, or four digits if these would be too few or too many."""
    return f"{value:z.4f}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.4g}"


def _right_aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yields `rows` as lines, whose columns from the third on are aligned at the right, see `table`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    yield from table([[*row[:2], *(x.rjust(n) for x, n in zip(row[2:], widths[2:], strict=True))] for row in rows])


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.2%}"


def _cut(name: str, width: int) -> str:
    """Returns a name that takes at most `width` columns of a terminal."""
    name = printable(name)
    return name if cell_len(name) <= width else set_cell_size(name, width - 1).rstrip() + "…"
