"""The command `cnnjax lr-find`, with the options of `cnnjax train` that determine the configuration."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from cnnjax.config import Config
from cnnjax.errors import UserError, check
from cnnjax.process.tables import table

if TYPE_CHECKING:
    from cnnjax.lr_find import RangeTest

_ROW, _WIDTH = 8, 40  # Updates per line of the table, characters of its longest bar.


@dataclass(frozen=True)
class LrFind:
    """Find a learning rate: raise it from step to step until the loss diverges, and plot the loss.

    The options are those of `cnnjax train` that determine the configuration, and an experiment may precede them. The
    command writes the plot, makes no run, and does not affect later ones.
    """

    config: Annotated[Config, arg(name="")] = field(default_factory=Config)
    data_dir: Path | None = None
    """The tfds directory; $TFDS_DATA_DIR or ~/tensorflow_datasets by default."""
    plot: Path = Path("lr-find.svg")
    """The file of the plot, .svg or .html; the latter shows values under the pointer. It is overwritten."""

    def __post_init__(self) -> None:
        path = Path(os.path.expanduser(self.plot))
        check("plot", "a file .svg or .html", path.suffix in (".svg", ".html") and not path.is_dir(), self.plot)

    def __call__(self) -> None:
        """Prints the losses and the suggestion, and writes the plot."""
        from cnnjax.lr_find import find_learning_rate
        from cnnjax.process.console import Report
        from cnnjax.report.range_test import write_range_test

        report = Report()
        found = find_learning_rate(self.config, data_dir=self.data_dir, report=report)
        if not len(found.loss):
            raise UserError(
                "`optim.learning_rate` must be lower: the loss diverges even at 1/10,000 of it, got "
                f"{self.config.optim.learning_rate:g}."
            )
        for line in (*_table(found), *_advice(found)):
            report.say(line)
        path = write_range_test(found, self.plot, f"Learning-rate range test of {self.config.run_name}")
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
