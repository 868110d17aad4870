"""The command `cnnjax lr-find`, with the options of `cnnjax train` that determine the configuration."""

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from cnnjax.cli.inspection import expand
from cnnjax.cli.tables import table
from cnnjax.config import Config
from cnnjax.errors import UserError, check
from cnnjax.runs.files import atomic_write

if TYPE_CHECKING:
    from cnnjax.lr_find import RangeTest

_ROW, _WIDTH = 8, 40  # Updates per line of the table, characters of its longest bar.


@dataclass(frozen=True)
class LrFind:
    """Find a learning rate: raise it from step to step until the loss diverges, and plot the loss.

    `cnnjax lr-find EXPERIMENT` takes the options of `cnnjax train`. It writes the plot, makes no run, and changes no
    bit of a later one.
    """

    config: Annotated[Config, arg(name="")] = field(default_factory=Config)
    data_dir: Path | None = None
    """The tfds directory; $TFDS_DATA_DIR or ~/tensorflow_datasets by default."""
    plot: Path = Path("lr-find.svg")
    """The file of the plot, .svg or .html; the latter shows values under the pointer. It is overwritten."""

    def __post_init__(self) -> None:
        check("plot", "a file .svg or .html", self.plot.suffix in (".svg", ".html"), self.plot)

    def __call__(self) -> None:
        """Prints the losses and the suggestion, and writes the plot."""
        from cnnjax.cli.console import Report
        from cnnjax.lr_find import find_learning_rate

        found, report = find_learning_rate(self.config, data_dir=self.data_dir, report=Report()), Report()
        if not len(found.loss):
            raise UserError(
                f"`optim.learning_rate` must be at most {self.config.optim.learning_rate:g}, from which the loss "
                "diverges at 1/10,000. Lower it."
            )
        for line in (*_table(found), *_advice(found)):
            report.say(line)
        path = expand(self.plot) or self.plot
        _save(_chart(found, self.config.run_name), path)
        report.say(f"The plot is in {path}.")


def _table(found: "RangeTest") -> Iterator[str]:
    smoothed, rates = found.smoothed, found.learning_rate
    low, first = smoothed.min(), max(smoothed[0], smoothed.min() + 1e-9)
    rows = [["learning rate", "loss", ""]]
    for i in range(0, len(rates), _ROW):
        bar = "#" * round(_WIDTH * min((smoothed[i] - low) / (first - low), 1.2))
        rows.append([f"{rates[i]:.1e}", f"{smoothed[i]:.4f}", bar])
    yield from table(rows)


def _advice(found: "RangeTest") -> Iterator[str]:
    end = f"{'diverges' if found.diverged else 'was last measured'} at {found.learning_rate[-1]:.1e}"
    if found.suggestion is None:
        yield f"The smoothed loss hardly falls, and {end}: there is no suggestion. Check the network and its labels."
        return
    why = "At the lowest point the steps are already too large for long training, so a tenth of it is suggested"
    if found.is_flat:
        why = "All was learned long before the lowest point, so the rate of the fastest fall is suggested"
    yield (
        f"The smoothed loss falls fastest at {found.steepest:.1e}, is lowest at {found.lowest:.1e}, and {end}. {why}, "
        "for a constant rate or the peak of a schedule:"
    )
    yield f"  --optim.learning-rate {found.suggestion:g}"


def _chart(found: "RangeTest", name: str) -> Any:
    import altair as alt

    smoothed = found.smoothed
    rows = [
        {"learning rate": rate, "loss": loss, "smoothed loss": mean}
        for rate, loss, mean in zip(found.learning_rate.tolist(), found.loss.tolist(), smoothed.tolist(), strict=True)
    ]
    margin = 0.1 * float(smoothed[0] - smoothed.min()) + 1e-9
    y = alt.Scale(domain=[float(smoothed.min()) - margin, float(smoothed[0]) + 2 * margin])  # Not where it diverges.
    x = alt.X("learning rate:Q", scale=alt.Scale(type="log"), axis=alt.Axis(format=".0e"))
    base = alt.Chart(alt.Data(values=rows)).encode(x=x)
    losses = base.mark_point(size=12, color="#999", clip=True).encode(alt.Y("loss:Q", scale=y))
    tooltip = [alt.Tooltip(f"{column}:Q", format=".3g") for column in rows[0]]
    means = base.mark_line(color="#1764ab", clip=True).encode(alt.Y("smoothed loss:Q", scale=y), tooltip=tooltip)
    layers: list[Any] = [losses, means]
    if found.suggestion is not None:
        mark = alt.Chart(alt.Data(values=[{"learning rate": found.suggestion}])).encode(x=x)
        text = f"suggested: {found.suggestion:g}"
        layers += [
            mark.mark_rule(color="#b4451f"),
            mark.mark_text(text=text, y=10, dx=4, align="left", color="#b4451f"),
        ]
    return alt.layer(*layers).properties(title=f"Learning-rate range test of {name}", width=640, height=360)


def _save(chart: Any, path: Path) -> None:
    text = io.StringIO()
    chart.save(text, format=path.suffix[1:], inline=path.suffix == ".html")
    os.makedirs(path.parent, exist_ok=True)
    with atomic_write(path, shared=True) as file:
        file.write(text.getvalue().encode())
