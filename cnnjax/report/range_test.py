"""The plot of a learning-rate range test."""

import os
from pathlib import Path
from typing import Any

import altair as alt

from cnnjax.errors import check
from cnnjax.files import atomic_write
from cnnjax.lr_find import RangeTest
from cnnjax.report.charts import CONTAINER
from cnnjax.report.figures import Figure
from cnnjax.report.write import render, svg


def write_range_test(found: RangeTest, path: str | os.PathLike[str], title: str) -> Path:
    """Writes a chart of the losses of a range test, their smoothed curve, and the suggested learning rate.

    Args:
      found: the result of `find_learning_rate`, with at least one loss.
      path: the file, .svg or .html; the latter shows values under the pointer. It is overwritten.
      title: of the chart.

    Returns:
      The path of the file.

    Raises:
      UserError: the file has another suffix, or there is no loss.
      OSError: the file cannot be written.
    """
    path = Path(os.path.expanduser(path))
    check("path", "a file .svg or .html", path.suffix in (".svg", ".html") and not path.is_dir(), path)
    check("found", "a range test with a loss", len(found.loss) > 0, "none")
    if path.suffix == ".svg":
        text = svg(_chart(found, 640).properties(title=title), title)
    else:
        text = render("chart.html", {"title": title, "figure": _figure(found)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, shared=True) as file:
        file.write(text.encode(errors="backslashreplace"))
    return path


def _figure(found: RangeTest) -> Figure:
    columns = (found.learning_rate.tolist(), found.loss.tolist(), found.smoothed.tolist())
    rows = [(f"{rate:.1e}", f"{loss:.4f}", f"{mean:.4f}") for rate, loss, mean in zip(*columns, strict=True)]
    suggestion = "no rate is suggested" if found.suggestion is None else f"{found.suggestion:g} is suggested"
    description = (
        f"Loss over the learning rate: the smoothed loss starts at {rows[0][2]}, and is lowest, "
        f"{found.smoothed.min():.4f}, at {found.lowest:.1e}; {suggestion}."
    )
    header = ("learning rate", "loss", "smoothed loss")
    return Figure("range-test", "Loss over the learning rate", lambda w: _chart(found, w), description, header, rows)


def _chart(found: RangeTest, width: int | str) -> Any:
    smoothed = found.smoothed
    rows = [
        {"learning rate": rate, "loss": loss, "smoothed loss": mean}
        for rate, loss, mean in zip(found.learning_rate.tolist(), found.loss.tolist(), smoothed.tolist(), strict=True)
    ]
    margin = 0.1 * float(smoothed[0] - smoothed.min()) + 1e-9
    y = alt.Scale(domain=[float(smoothed.min()) - margin, float(smoothed[0]) + 2 * margin])  # Not where it diverges.
    x = alt.X("learning rate:Q", scale=alt.Scale(type="log"), axis=alt.Axis(format=".0e", grid=False, tickCount=8))
    base = alt.Chart(alt.Data(values=rows)).encode(x=x)
    losses = base.mark_point(size=12, color="var(--muted)", clip=True).encode(alt.Y("loss:Q", scale=y))
    tooltip = [alt.Tooltip(f"{column}:Q", format=".3g") for column in rows[0]]
    means = base.mark_line(color="var(--series-0)", clip=True)
    layers: list[Any] = [losses, means.encode(alt.Y("smoothed loss:Q", scale=y), tooltip=tooltip)]
    if found.suggestion is not None:
        mark = alt.Chart(alt.Data(values=[{"learning rate": found.suggestion}])).encode(x=x)
        words = ["suggested:", f"{found.suggestion:g}"]
        text = words if width == CONTAINER else " ".join(words)  # A phone is too narrow for one line.
        low, high = found.learning_rate[[0, -1]]
        right = found.suggestion**2 < low * high  # The line is in the left half.
        side = {"align": "left", "dx": 4} if right else {"align": "right", "dx": -4}
        layers += [
            mark.mark_rule(color="var(--gap)"),
            mark.mark_text(text=text, y=10, color="var(--gap-text)", fontSize=12, **side),
        ]
    return alt.layer(*layers).properties(width=width, height=360)
