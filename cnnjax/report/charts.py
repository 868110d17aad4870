"""The charts of the report, as Vega-Lite: built with Altair, drawn by the browser, or by vl-convert as SVG files.

Colors are CSS variables of page.css, so that a chart follows the page into dark mode and print without being drawn
again. `to_svg` replaces them by the colors of the light mode.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from cnnjax.report.analysis import Band, Fit
from cnnjax.runs.statistics import Summary

NUM_COLORS = 8  # The variables --series-0, ... in page.css.
FONT = "system-ui, sans-serif"
CONTAINER = "container"  # The width of a chart in the page. Those in files are not interactive.
TRAINING, VALIDATION = "training", "validation"
# Pans with a mouse only, so that a finger scrolls the page; a plain wheel scrolls it, too. A trackpad's pinch is a
# wheel with ctrlKey.
PAN = "[pointerdown[event.pointerType === 'mouse'], window:pointerup] > window:pointermove!"
ZOOM = "wheel![event.ctrlKey]"


def configured(chart: Any, description: str) -> Any:
    """Returns a chart in the style of the page, with its text alternative."""
    return chart.properties(description=description, background="transparent").configure(
        font=FONT,
        padding=4,
        aria=False,  # The page describes the chart, and has a table of its numbers.
        view=alt.ViewConfig(stroke=None),
        axis=alt.AxisConfig(
            domain=False,
            ticks=False,
            gridColor="var(--line)",
            labelColor="var(--muted)",
            titleColor="var(--muted)",
            titleFontWeight="normal",
            labelFontSize=12,
            titleFontSize=12,
            labelPadding=6,
            titlePadding=8,
        ),
        legend=alt.LegendConfig(
            orient="top",
            title=None,
            labelColor="var(--ink)",
            labelFontSize=12,
            symbolStrokeWidth=2,
            labelLimit=320,
            symbolOpacity=1,
        ),
    )


def to_json(chart: Any) -> str:
    """Returns the Vega-Lite specification of a chart, for a <script> element."""
    text = json.dumps(chart.to_dict(), ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def to_svg(chart: Any, colors: Mapping[str, str]) -> str:
    """Returns a chart as the content of an SVG file.

    Args:
      colors: the value of each CSS variable.
    """
    import vl_convert

    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    svg = vl_convert.vegalite_to_svg(chart.to_dict(), vl_version=version)
    return re.sub(r"var\((--[\w-]+)\)", lambda found: colors[found[1]], svg)


def _zoom(name: str, *encodings: Any) -> Any:
    return alt.selection_interval(
        name, encodings=encodings or ["x", "y"], bind="scales", on=PAN, translate=PAN, zoom=ZOOM
    )


def _epochs(last: int) -> Any:
    margin = 0.02 * max(last - 1, 1)  # For the points of the first and the last epoch.
    whole = "datum.value === floor(datum.value) ? format(datum.value, 'd') : ''"  # tickMinStep allows halves.
    ticks = {"tickMinStep": 1, "labelExpr": whole, "grid": False, "tickCount": 8}
    return alt.X(
        "epoch:Q",
        axis=alt.Axis(title="epoch", **ticks),
        scale=alt.Scale(domain=[1 - margin, max(last, 2) + margin], nice=False),
    )


def _hover(key: str, rows: list[dict[str, Any]], x: Any, names: Sequence[str], format_: str) -> Any:
    """Returns a vertical line at the epoch nearest to the pointer, whose tooltip has the values of all series."""
    nearest = alt.selection_point(f"hover_{key}", on="pointerover", nearest=True, fields=["epoch"], empty=False)
    tooltip = [alt.Tooltip("epoch:Q", format="d")]
    tooltip += [alt.Tooltip(f"s{i}:Q", title=name, format=format_) for i, name in enumerate(names)]
    line = alt.Chart(alt.Data(values=rows)).mark_rule(color="var(--muted)", clip=True, strokeWidth=1)
    shown = alt.condition(nearest, alt.value(0.6), alt.value(0))
    return line.encode(x=x, opacity=shown, tooltip=tooltip).add_params(nearest)


def curves(
    key: str,
    bands: Mapping[str, Band],
    title: str,
    *,
    percent: bool,
    fit: Fit | None = None,
    width: int | str = CONTAINER,
) -> Any:
    """Returns lines over the epochs, one per series.

    Args:
      key: makes the names of the chart's parameters unique in a page.
      bands: of each series, by its name; drawn as a line, and as a band if it is of several seeds.
      title: of the vertical axis.
      percent: whether the values are fractions.
      fit: of a single run: marks the epoch from which it is over-fitted, and the gap between training and validation.
      width: in pixels, or "container".
    """
    names, format_ = [*bands], ".2%" if percent else ".4f"
    last = max(int(band.epoch[-1]) for band in bands.values())
    rows, wide = [], {}
    for i, (name, band) in enumerate(bands.items()):
        for epoch, mean, low, high in zip(*(values.tolist() for values in band), strict=True):
            rows.append({"epoch": epoch, "series": name, "mean": mean, "low": low, "high": high})
            wide.setdefault(epoch, {"epoch": epoch})[f"s{i}"] = mean
    base, x = alt.Chart(alt.Data(values=rows)), _epochs(last)
    digits = (".0%" if _span(rows) > 0.05 else ".1%") if percent else "~g"
    axis, y = alt.Axis(title=title, format=digits, tickCount=6), alt.Scale(zero=False, nice=True)
    scale = alt.Scale(domain=names, range=[series_color(name, i) for i, name in enumerate(names)])
    color = alt.Color("series:N", scale=scale, legend=alt.Legend())
    layers = []
    if percent and fit is not None and len(names) == 2:  # The gap, where training is the better one.
        gap = [
            {"epoch": e, "s1": row["s1"], "top": max(row["s0"], row["s1"])} for e, row in wide.items() if len(row) == 3
        ]
        area = alt.Chart(alt.Data(values=gap)).mark_area(color="var(--gap)", opacity=0.22, clip=True)
        layers.append(area.encode(x=x, y=alt.Y("s1:Q", scale=y, axis=axis), y2="top:Q"))
    if any((band.low != band.high).any() for band in bands.values()):
        area = base.mark_area(opacity=0.18, clip=True)
        layers.append(area.encode(x=x, y=alt.Y("low:Q", scale=y, axis=axis), y2="high:Q", color=color))
    points = alt.OverlayMarkDef(size=28, filled=True) if last <= 30 else False
    line = base.mark_line(strokeWidth=2, clip=True, point=points)
    line = line.encode(x=x, y=alt.Y("mean:Q", scale=y, axis=axis), color=color)
    if len(names) > NUM_COLORS:  # The colors repeat.
        dashes = [[1, 0] if i < NUM_COLORS else [5, 3] for i in range(len(names))]
        line = line.encode(strokeDash=alt.StrokeDash("series:N", scale=alt.Scale(domain=names, range=dashes)))
    layers.append(line.add_params(_zoom(f"zoom_{key}")) if width == CONTAINER else line)
    if fit is not None and fit.over_fitted and fit.lowest is not None:
        mark = alt.Chart(alt.Data(values=[{"epoch": fit.lowest, "text": "over-fitting →"}]))
        layers.append(mark.mark_rule(color="var(--gap)", strokeDash=[4, 4], strokeWidth=1.5, clip=True).encode(x=x))
        text = mark.mark_text(align="left", dx=5, dy=6, color="var(--gap-text)", fontSize=12, clip=True)
        layers.append(text.encode(x=x, y=alt.value(0), text="text:N"))
    if width == CONTAINER:
        layers.append(_hover(key, [*wide.values()], x, names, format_))
    return alt.layer(*layers).properties(width=width, height=260)


def series_color(name: str, i: int) -> str:
    """Returns the color of a series."""
    return {TRAINING: "var(--series-0)", VALIDATION: "var(--series-1)"}.get(name, f"var(--series-{i % NUM_COLORS})")


def _span(rows: Sequence[Mapping[str, Any]]) -> float:
    return max(row["high"] for row in rows) - min(row["low"] for row in rows)


def seed_scores(
    scores: Mapping[str, Mapping[int, float]], summaries: Mapping[str, Summary], width: int | str = CONTAINER
) -> Any:
    """Returns the test accuracy of each seed, and the mean and its interval, of each group of runs."""
    order = [*scores]
    rows = [{"group": name, "seed": seed, "value": value} for name, of in scores.items() for seed, value in of.items()]
    means = [{"group": name, "mean": s.mean, **_interval(s)} for name, s in summaries.items()]
    y = alt.Y("group:N", sort=order, axis=alt.Axis(title=None, labelLimit=240, labelColor="var(--ink)", grid=True))
    axis = alt.Axis(title="test accuracy", format=".2~%", tickCount=5)
    x, scale = (
        alt.Scale(zero=False, nice=True),
        alt.Scale(domain=order, range=[series_color("", i) for i in range(len(order))]),
    )
    color = alt.Color("group:N", scale=scale, legend=None)
    points = (
        alt.Chart(alt.Data(values=rows))
        .mark_circle(size=70, opacity=0.75)
        .encode(
            x=alt.X("value:Q", scale=x, axis=axis),
            y=y,
            color=color,
            tooltip=["group:N", "seed:Q", alt.Tooltip("value:Q", title="test accuracy", format=".2%")],
        )
    )
    layers = [points.add_params(_zoom("zoom_scores", "x")) if width == CONTAINER else points]
    tooltip = ["group:N", *(alt.Tooltip(f"{name}:Q", format=".2%") for name in ("mean", "low", "high"))]
    if intervals := [row for row in means if "low" in row]:
        rule = alt.Chart(alt.Data(values=intervals)).mark_rule(strokeWidth=2, color="var(--ink)", yOffset=14)
        layers.append(rule.encode(x=alt.X("low:Q", scale=x, axis=axis), x2="high:Q", y=y, tooltip=tooltip))
    tick = alt.Chart(alt.Data(values=means)).mark_tick(thickness=3, size=16, color="var(--ink)", yOffset=14)
    layers.append(
        tick.encode(x=alt.X("mean:Q", scale=x, axis=axis), y=y, tooltip=tooltip if intervals else tooltip[:2])
    )
    return alt.layer(*layers).properties(width=width, height=56 * len(order))


def _interval(summary: Summary) -> dict[str, float]:
    return {"low": summary.low, "high": summary.high} if summary.deviation > 0 else {}


def pictures(cells: Sequence[tuple[str, str]], columns: int, width: int, height: int) -> Any:
    """Returns a grid of images with a caption below each, for an SVG file.

    Args:
      cells: the data URI and the caption of each.
      width, height: of the space of an image, in pixels.
    """
    rows = [{"url": url, "text": text, "x": i % columns, "y": i // columns} for i, (url, text) in enumerate(cells)]
    base = alt.Chart(alt.Data(values=rows)).encode(x=alt.X("x:O", axis=None), y=alt.Y("y:O", axis=None))
    images = base.mark_image(width=width, height=height, smooth=False).encode(url="url:N")
    text = base.mark_text(dy=height / 2 + 10, fontSize=11, color="var(--ink)", limit=width + 24).encode(text="text:N")
    size = {"width": alt.Step(width + 28), "height": alt.Step(height + 30)}
    return alt.layer(images, text).properties(**size)
