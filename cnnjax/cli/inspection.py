"""The commands about runs: cnnjax runs | verify | reproduce | diff | compare. Imports jax only if a command runs."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from cnnjax.errors import UserError, check
from cnnjax.process.streams import reason
from cnnjax.process.tables import printable, show_score, table

if TYPE_CHECKING:
    from cnnjax.config import Config


RunDir = Annotated[Path, arg(metavar="RUN")]


def config_of(run_dir: Path, experiment: str | None) -> "Config":
    """Returns the configuration of a run.

    Args:
      experiment: the experiment file that defines its classes, functions and data; None: they are cnnjax's own, or
        not needed, see `codec.decode`.
    """
    from cnnjax.cli.experiment import load_experiment
    from cnnjax.files import file_changes
    from cnnjax.runs.codec import source_files
    from cnnjax.runs.records import read_record

    record = read_record(run_dir)
    config = record.decode({} if experiment is None else load_experiment(experiment).names)
    if experiment is not None and (changed := file_changes(record.files, source_files(config))):
        names = ", ".join(changed)
        print(
            f"{names} has changed since this run was trained, so that its network may compute something else.",
            file=sys.stderr,
        )
    return config


def expand(path: Path | None) -> Path | None:
    """Replaces ~ by the home directory, which most shells do not do in --run-dir=~/runs."""
    return None if path is None else Path(os.path.expanduser(path))


@dataclass(frozen=True)
class Runs:
    """List the runs of a folder: state, seed, epochs, accuracy, time of training up to the last epoch.

    A run that cannot be read has a line on standard error, and does not change the exit code.
    """

    folder: Positional[Path] = Path("runs")
    """The folder of the run directories, or one of them."""

    def __call__(self) -> None:
        """Prints the table."""
        from cnnjax.files import check_local
        from cnnjax.runs.inspection import find_runs, read_info
        from cnnjax.runs.progress import best_row

        try:
            folders = [path for path in sorted(self.folder.iterdir()) if path.is_dir() and not path.is_symlink()]
        except OSError as error:
            check_local("folder", self.folder)
            raise UserError(
                f"`folder` must be a folder of runs that can be read, got {self.folder} ({reason(error)})."
            ) from error
        found = [self.folder] if os.path.exists(self.folder / "config.json") else find_runs(self.folder)
        closed = [path for path in folders if not os.access(path, os.R_OK | os.X_OK)]
        rows, others = [], [f"{path} cannot be read: Permission denied." for path in closed]
        for run_dir in found:
            name = self.folder.resolve().name if run_dir == self.folder else str(run_dir.relative_to(self.folder))
            try:
                info = read_info(run_dir)
            except (UserError, OSError) as error:  # OSError: it was moved away a moment ago.
                others.append(str(error) if str(run_dir) in str(error) else f"{run_dir}: {error}")
                continue
            by = info.config.get("best_by", "accuracy")
            best: Any = best_row(info.rows, by) or {}
            test = info.result["test_accuracy"] if info.result else None
            scores = ["" if x is None else f"{x:.2%}" for x in (best.get("validation_accuracy"), test)]
            if by != "accuracy" and f"validation_{by}" in best:
                scores[0] += f", {by} {show_score(best[f'validation_{by}'])}"
            epochs = f"{len(info.rows)}/{info.config['num_epochs']}"
            rows.append([name, info.state, str(info.config["seed"]), epochs, *scores, f"{info.seconds:.0f} s"])
        if rows:
            for line in table([["run", "state", "seed", "epoch", "validation", "test", "time"], *rows]):
                print(line)
        for line in others if found or others else [f"There are no runs in {self.folder} yet."]:
            print(printable(line), file=sys.stderr)


@dataclass(frozen=True)
class Verify:
    """Check every file of a run against its checksum. Exits with 1 if one is missing or damaged."""

    run: Positional[RunDir]
    """The run directory."""

    def __call__(self) -> int:
        """Prints what is wrong, and a count."""
        from cnnjax.runs.inspection import verify

        found = verify(self.run)
        wrong = {name: what for name, what in found.items() if what not in ("ok", "no checksum")}
        for name, what in found.items():
            if what != "ok":
                print(f"{self.run / name}: {what}")
        print(f"{sum(what == 'ok' for what in found.values())} of {len(found)} files agree with their checksums.")
        if wrong:
            print(_advice(self.run, {*wrong}, finished=found.get("result.json") == "ok"))
        return int(bool(wrong))


def _advice(run: Path, wrong: set[str], finished: bool) -> str:
    """Returns what to do about wrong files of a run."""
    checkpoints = {name for name in wrong if name.startswith("checkpoints/")}
    rewritten = wrong & {"metrics.jsonl", "timing.jsonl", "result.json", "SHA256SUMS"}
    if lost := wrong - checkpoints - rewritten:
        names = ", ".join(sorted(lost))
        return f"{names} cannot be computed again. Restore it from a backup, or train again in another directory."
    if rewritten:
        return f"Resume the run with --resume, which writes {', '.join(sorted(rewritten))} again."
    if finished:
        return f"The result of the run is intact. Train it again for its checkpoints: cnnjax reproduce {run}"
    return "Resume the run with --resume: it starts from the latest intact checkpoint."


@dataclass(frozen=True)
class Reproduce:
    """Train a run again from its configuration, and compare the two bit for bit. Exits with 1 if they differ."""

    run: Positional[RunDir]
    """The run directory."""
    run_dir: Path | None = None
    """The run directory of the new run; reproduced-RUN next to it by default."""
    data_dir: Path | None = None
    """The tfds directory; $TFDS_DATA_DIR or ~/tensorflow_datasets by default."""
    resume: bool = False
    """Resume a reproduction that was stopped."""
    experiment: str | None = None
    """The experiment file, if the run has classes or data of its own."""

    def __call__(self) -> int:
        """Trains, and prints the verdict."""
        from cnnjax.process.console import Report
        from cnnjax.process.settings import use_compilation_cache
        from cnnjax.runs.inspection import reproduce, take_cores

        take_cores(self.run)
        use_compilation_cache(Report().say)
        run = self.run if self.run.name not in ("", "..") else self.run.resolve()
        into = expand(self.run_dir) or run.parent / f"reproduced-{run.name}"
        config = config_of(self.run, self.experiment)
        found = reproduce(self.run, config, into=into, data_dir=self.data_dir, resume=self.resume, report=Report())
        verdict = "the same, bit for bit" if found.same else "not the same"
        print(f"{self.run} and {into} are {verdict}: parameters, optimizer state, batch statistics and metrics.")
        if found.first_epoch is not None:
            print(f"The parameters differ from epoch {found.first_epoch} on.")
        for name, moved in found.moved.items():
            print(f"  {name}: {moved}")
        differences = {**found.data, **found.environment}
        if differences:
            print("What differs between the two:")
            _print_changes(differences)
        if "metrics" in found.moved:
            print("The parameters of all epochs are the same: `metrics` does not return the same numbers twice.")
        elif not found.same and not differences:
            print(
                "Neither data, source code, versions nor device differ: the device does not give the same bits twice."
            )
        return int(not found.same)


@dataclass(frozen=True)
class Diff:
    """Show the differences between two runs: configuration, data, environment and outcome. Exits with 1 if any."""

    a: Positional[RunDir]
    """A run directory."""
    b: Positional[RunDir]
    """Another."""

    def __call__(self) -> int:
        """Prints the differences."""
        from cnnjax.runs.inspection import diff

        found = diff(self.a, self.b)
        for part, changes in found.items():
            print(f"{part}:" if changes else f"{part}: the same")
            _print_changes(changes)
        return int(any(found.values()))


@dataclass(frozen=True)
class Compare:
    """Compare experiments over their seeds: whether they differ; for two, how many more seeds would show it.

    Uses Student's paired t test if their seeds are the same, Welch's t test otherwise, and Holm's correction for more
    than two experiments.
    """

    experiments: Positional[
        Annotated[tuple[str, ...], arg(metavar="EXPERIMENT EXPERIMENT ...", help_behavior_hint="(required)")]
    ]
    """At least two: the name before -seed<k> in runs/, or a folder of runs."""
    metric: str = "test_accuracy"
    """The metric to compare: test_accuracy, test_balanced_accuracy (the mean recall of the classes), test_loss,
    test_macro_precision, test_macro_recall, test_macro_f1; precision:CLASS, recall:CLASS or f1:CLASS, of a class in the
    test set; test_NAME, of a score that `metrics` returns. Make choices with best_validation_accuracy,
    best_validation_balanced_accuracy, best_validation_loss or best_validation_NAME."""

    def __call__(self) -> None:
        """Prints the means, their differences and the verdicts."""
        from cnnjax.runs.inspection import runs_of, scores
        from cnnjax.runs.records import read_record
        from cnnjax.runs.statistics import describe, verdicts

        got = " ".join(self.experiments) or "none"
        check("experiment", "the names of at least two experiments", len(self.experiments) > 1, got)
        for a, b in combinations(self.experiments, 2):
            same = {path.resolve() for path in runs_of(a)} & {path.resolve() for path in runs_of(b)}
            shared = f"{a} and {b}, which share {', '.join(map(str, sorted(same)))}"
            check("experiment", "experiments without a common run", not same, shared)
        found = {}
        for target in self.experiments:
            found[target], unfinished = scores(target, self.metric)
            if unfinished:
                print(f"Not finished, so left out: {', '.join(map(str, unfinished))}", file=sys.stderr)
            print(f"{target}: {describe(list(found[target].values()), self.metric)}")
        for (a, b), lines in verdicts(found, self.metric).items():
            for line in lines:
                print(line)
            if read_record(runs_of(a)[0]).data.sha256 != read_record(runs_of(b)[0]).data.sha256:
                print("Their images or labels have different digests.")


def _print_changes(changes: Mapping[str, tuple[Any, Any]]) -> None:
    from cnnjax.files import show

    for name, (old, new) in changes.items():
        print(f"  {name}: {show(old)} | {show(new)}")
