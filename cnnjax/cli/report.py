"""The command `cnnjax report`, and the report at the end of `cnnjax train`."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from cnnjax.errors import UserError
from cnnjax.process.tables import printable

if TYPE_CHECKING:
    from cnnjax.config import Config
    from cnnjax.runs.run import Run


@dataclass(frozen=True)
class WriteReport:
    """Write a report on a run, or on several side by side, as one HTML file that works offline.

    Runs that differ only in their seed are shown as one group. Prints the path of the file.
    """

    runs: Positional[Annotated[tuple[Path, ...], arg(metavar="RUN ...", help_behavior_hint="(required)")]]
    """The run directories."""
    path: Path | None = None
    """The .html file; RUN/report.html for one run, report.html in the working directory for several, by default."""
    figures: Path | None = None
    """A folder that receives every chart as an SVG file."""
    data_dir: Path | None = None
    """The tfds directory; $TFDS_DATA_DIR or ~/tensorflow_datasets by default."""
    experiment: str | None = None
    """The experiment file, if the runs have classes or data of their own."""

    def __call__(self) -> None:
        """Writes the report."""
        from cnnjax.cli.inspection import config_of
        from cnnjax.report.write import write_report
        from cnnjax.runs.run import load_run

        runs = [load_run(run, config_of(run, self.experiment)) for run in self.runs]
        path = write_report(
            runs,
            self.path,
            figures=self.figures,
            data_dir=self.data_dir,
            experiment=self.experiment,
            warn=_warn,
        )
        print(f"Report: {printable(path)}")
        if self.figures is not None:
            print(f"Figures: {printable(self.figures)}")


def report_on_run(run: "Run", data_dir: Path | None, say: Callable[[str], None]) -> None:
    """Writes the report on a run that this process has trained, and says where it is.

    A run that was finished before is not scored again: `cnnjax train --resume` must end at once.
    """
    path = run.run_dir / "report.html"
    with _never_fails():
        from cnnjax.report.commands import command_for
        from cnnjax.report.write import write_report

        if run.test_logits is None:
            is_new = path.exists() and path.stat().st_mtime_ns >= (run.run_dir / "result.json").stat().st_mtime_ns
            return say(f"Report: {path}" if is_new else f"Report: run {command_for(run, 'report', data_dir)}")
        say(f"Report: {write_report(run, path, data_dir=data_dir, warn=_warn)}")


def report_on_seeds(
    config: "Config", seeds: Sequence[int], folder: Path | None, data_dir: Path | None, say: Callable[[str], None]
) -> None:
    """Writes one report on the seeds that were trained, next to their run directories, and says where it is."""
    with _never_fails():
        from cnnjax.report.write import write_report
        from cnnjax.runs.run import load_run
        from cnnjax.seeds import run_dir_of

        runs = [load_run(run_dir_of(replace(config, seed=seed), folder), config) for seed in seeds]
        name = config.run_name.removesuffix(f"-seed{config.seed}")
        path = write_report(runs, (folder or Path("runs")) / f"{name}.html", data_dir=data_dir, warn=_warn)
        say(f"Report: {path}")


def _warn(line: str) -> None:
    print(printable(line), file=sys.stderr)


@contextmanager
def _never_fails() -> Iterator[None]:
    """Turns any error into a line on standard error: the training has succeeded, and its result is on the disk.

    Signals are ignored by now, see `process.signals.Stop.finished`.
    """
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, (UserError, OSError)) else f"{type(error).__name__}: "
        _warn(f"The report cannot be written: {kind}{' '.join(str(error).split())}")
