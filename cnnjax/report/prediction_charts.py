"""The charts of the predictions for the test images: the confusion matrix and the calibration."""

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from cnnjax.class_scores import Calibration
from cnnjax.report.charts import CONTAINER

TEXT_CLASSES = 20  # A confusion matrix of more classes has no room for numbers.


def confusion(
    matrix: Sequence[Sequence[int]], names: Sequence[str], shown: Sequence[int], width: int | str = CONTAINER
) -> Any:
    """Returns the confusion matrix of the classes `shown`, with true classes as rows.

    Args:
      matrix: the counts of all classes.
      names: of all classes.
    """
    totals = np.array(matrix).sum(axis=1)
    kept = [[i, j] for i in shown for j in shown if matrix[i][j]]
    rows = [
        {
            "true": names[i],
            "predicted": names[j],
            "images": matrix[i][j],
            "share": float(matrix[i][j] / totals[i]),
            "correct": i == j,
        }
        for i, j in kept
    ]
    order, size = [names[k] for k in shown], len(shown)
    labels = {"labelLimit": 110, "labelColor": "var(--ink)"}
    x = alt.X(
        "predicted:N",
        sort=order,
        scale=alt.Scale(domain=order),
        axis=alt.Axis(title="predicted class", labelAngle=-45, **labels),
    )
    y = alt.Y("true:N", sort=order, scale=alt.Scale(domain=order), axis=alt.Axis(title="true class", **labels))
    tooltip = [
        alt.Tooltip("true:N", title="true class"),
        alt.Tooltip("predicted:N", title="predicted"),
        alt.Tooltip("images:Q", format=","),
        alt.Tooltip("share:Q", title="share of the class", format=".1%"),
    ]
    colors = alt.Scale(domain=[True, False], range=["var(--series-0)", "var(--wrong)"])
    opacity = alt.Scale(type="sqrt", domain=[0, 1], range=[0.04, 1])
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, y=y, tooltip=tooltip)
    cells = base.mark_rect(cornerRadius=2).encode(
        color=alt.Color("correct:N", scale=colors, legend=None),
        opacity=alt.Opacity("share:Q", scale=opacity, legend=None),
    )
    layers = [cells]
    if size <= TEXT_CLASSES:
        ink = alt.condition("datum.share > 0.35", alt.value("var(--on-color)"), alt.value("var(--ink)"))
        layers.append(base.mark_text(fontSize=12 if size <= 10 else 9).encode(text=alt.Text("images:Q"), color=ink))
    return alt.layer(*layers).properties(width=width, height=min(max(size * 38, 120), 600))


def reliability(calibration: Calibration, width: int | str = CONTAINER) -> Any:
    """Returns the reliability diagram: the accuracy of each bin of confidence, next to the diagonal."""
    rows = bin_rows(calibration)
    base = alt.Chart(alt.Data(values=rows))
    percent = {"format": ".0%", "tickCount": 6}
    scale = alt.Scale(domain=[0, 1], nice=False)
    x = alt.X("lower:Q", scale=scale, axis=alt.Axis(title="confidence of the prediction", grid=False, **percent))
    y = alt.Axis(title="fraction that is right", **percent)
    tooltip = [
        alt.Tooltip("bin:N", title="confidence"),
        alt.Tooltip("accuracy:Q", title="right", format=".1%"),
        alt.Tooltip("confidence:Q", title="mean confidence", format=".1%"),
        alt.Tooltip("images:Q", format=","),
    ]
    edge = {"stroke": "var(--surface)", "strokeWidth": 1}
    bars = base.mark_bar(color="var(--series-0)", **edge)
    bars = bars.encode(x=x, x2="upper:Q", y=alt.Y("low:Q", scale=scale, axis=y), y2=alt.datum(0), tooltip=tooltip)
    gaps = base.mark_bar(color="var(--gap)", opacity=0.4, **edge)
    gaps = gaps.encode(x=x, x2="upper:Q", y="low:Q", y2="high:Q", tooltip=tooltip)
    tops = base.mark_rule(color="var(--series-0)", strokeWidth=3).encode(x=x, x2="upper:Q", y="accuracy:Q")
    ends = alt.Chart(alt.Data(values=[{"lower": 0, "accuracy": 0}, {"lower": 1, "accuracy": 1}]))
    diagonal = ends.mark_line(color="var(--ink)", strokeDash=[4, 4], strokeWidth=1.5).encode(x=x, y="accuracy:Q")
    return alt.layer(bars, gaps, tops, diagonal).properties(width=width, height=300)


def confidences(calibration: Calibration, width: int | str = CONTAINER) -> Any:
    """Returns a histogram of the confidences."""
    base = alt.Chart(alt.Data(values=bin_rows(calibration)))
    scale, axis = (
        alt.Scale(domain=[0, 1], nice=False),
        alt.Axis(title="confidence of the prediction", format=".0%", grid=False, tickCount=6),
    )
    bars = base.mark_bar(color="var(--series-0)", stroke="var(--surface)", strokeWidth=1).encode(
        x=alt.X("lower:Q", scale=scale, axis=axis),
        x2="upper:Q",
        y=alt.Y("images:Q", axis=alt.Axis(title="images", format="~s", tickCount=4)),
        y2=alt.datum(0),
        tooltip=[alt.Tooltip("bin:N", title="confidence"), alt.Tooltip("images:Q", format=",")],
    )
    return bars.properties(width=width, height=130)


def bin_rows(calibration: Calibration) -> list[dict[str, Any]]:
    """Returns a row per bin that is not empty."""
    columns = zip(*(values.round(4).tolist() for values in calibration[:5]), strict=True)  # Not the last bits.
    return [
        {
            "lower": lower,
            "upper": upper,
            "bin": f"{lower:.0%} to {upper:.0%}",
            "images": count,
            "confidence": confidence,
            "accuracy": accuracy,
            "low": min(confidence, accuracy),
            "high": max(confidence, accuracy),
        }
        for lower, upper, count, confidence, accuracy in columns
        if count
    ]
