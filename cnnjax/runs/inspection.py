"""What is known of runs from their directories: their state, whether their files are intact, how two of them differ.

A run directory is data, perhaps from someone else: it is parsed and compared, and a path that leads out of it is not
followed.
"""

import os
import re
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from cnnjax.runs import manifest
from cnnjax.runs import directory as rundir
from cnnjax.config import Config
from cnnjax.errors import UserError
from cnnjax.runs.files import SUMS, check_sums, file_sha256
from cnnjax.train import train_and_evaluate
from cnnjax.cli.console import Report
from cnnjax.runs.trained import load_trained


class RunInfo(NamedTuple):
    """A run as `cnnjax runs` shows it.

    Attributes:
      state: running, finished, interrupted, failed, or killed (the process ended without a word; --resume goes on).
      rows: of metrics.jsonl.
      result: of result.json, or None.
      seconds: of all sessions that ended.
    """

    folder: Path
    state: str
    config: Config
    rows: list[dict[str, Any]]
    result: dict[str, Any] | None
    seconds: float


class Reproduction(NamedTuple):
    """How a run that was made again compares with the first.

    Attributes:
      same: whether parameters, optimizer state, batch statistics and metrics are the same bits.
      environment, data: what differs, {name: (old, new)}.
      first_epoch: the first one after which the parameters differ, or None.
      moved: how far the numbers moved, in words.
    """

    same: bool
    environment: dict[str, tuple[Any, Any]]
    data: dict[str, tuple[Any, Any]]
    first_epoch: int | None
    moved: dict[str, str]


def find_runs(folder: Path) -> list[Path]:
    """Returns the run directories in `folder` and in its folders (but not through links), by name."""
    found = (path.parent for pattern in ("*/config.json", "*/*/config.json") for path in folder.glob(pattern))
    return sorted(path for path in found if path.resolve().is_relative_to(folder.resolve()))


def read_info(run_dir: Path) -> RunInfo:
    """Reads what `cnnjax runs` shows of a run.

    Raises:
      UserError: it holds no run, or one of another version.
    """
    config, _ = rundir.read_run(run_dir)
    sessions = manifest.read_manifest(run_dir)["sessions"]
    state = sessions[-1]["state"]
    if state == "running" and not rundir.is_locked(run_dir):
        state = "killed"
    seconds = sum(session.get("seconds", 0.0) for session in sessions)
    rows = rundir.read_rows(run_dir / "metrics.jsonl")
    return RunInfo(run_dir, state, config, rows, rundir.read_result(run_dir), seconds)


def verify(run_dir: Path) -> dict[str, str]:
    """Compares every file of a run with its checksum.

    Returns:
      Of each file, by its path in the run directory: "ok"; "no checksum" (it is not ours, or the run was killed
      before it could write one); or what is wrong, as `files.check_sums` says it.

    Raises:
      UserError: `run_dir` holds no run, or a process is training in it.
    """
    names = [name for name in (*rundir.FILES, "manifest.json") if (run_dir / name).exists()]
    if not names:
        raise UserError(f"`run` must be the directory of a run, got {run_dir}.")
    if rundir.is_locked(run_dir):
        raise UserError(f"`run` must not be training while it is verified, got {run_dir}. Wait for its end.")
    rundir.check_links(run_dir)
    killed = _was_killed(run_dir)
    own = ("checkpoints/", "damaged/", rundir.LOCK)
    found = {name: what for name, what in check_sums(run_dir).items() if not name.startswith(own)}
    if killed and found == {SUMS: "missing"}:
        found = dict.fromkeys(names, "no checksum")
    for path in sorted((run_dir / "checkpoints").glob("*")):
        name = f"checkpoints/{path.name}"
        if path.is_symlink():
            found[name] = "leads out of the folder"
        elif path.name.isdecimal() and killed and not (path / SUMS).exists():
            found[name] = "no checksum"
        elif path.name.isdecimal():
            found |= {f"{name}/{file}": what for file, what in check_sums(path).items()}
    return found


def _was_killed(run_dir: Path) -> bool:
    """Returns whether the last session ended without a word; False where the manifest cannot tell."""
    try:
        return manifest.read_manifest(run_dir)["sessions"][-1]["state"] == "running"
    except UserError:
        return False


def diff(a: Path, b: Path) -> dict[str, dict[str, tuple[Any, Any]]]:
    """Returns what differs between two runs: {"configuration" | "data" | "environment" | "outcome": {name: (a, b)}}."""
    (config_a, facts_a), (config_b, facts_b) = rundir.read_run(a), rundir.read_run(b)
    last_a, last_b = (manifest.read_manifest(run_dir)["sessions"][-1] for run_dir in (a, b))
    return {
        "configuration": rundir.config_changes(config_a, config_b),
        "data": _changes(asdict(facts_a), asdict(facts_b)),
        "environment": manifest.differences(last_a, last_b),
        "outcome": _changes(_outcome(a), _outcome(b)),
    }


def reproduce(
    run_dir: Path, *, into: Path, data_dir: Path | None = None, resume: bool = False, report: Report | None = None
) -> Reproduction:
    """Makes a run again from its configuration, and compares the two.

    Args:
      run_dir: a run that ended.
      into: the run directory of the new one; its configuration is the old one's.
      data_dir, resume, report: as of `train_and_evaluate`.

    Raises:
      UserError: the run did not end; else as of `train_and_evaluate`.
    """
    report = report or Report(quiet=True)
    config, _ = rundir.read_run(run_dir)
    old = rundir.read_result(run_dir)
    if old is None:
        raise UserError(f"`run` must have ended, got {run_dir}. Finish it by --resume first.")
    metrics = run_dir / "metrics.jsonl"
    if not metrics.exists() or file_sha256(metrics) != old["sha256"]["metrics"]:
        raise UserError(
            f"{metrics} must be the one that result.json names, SHA-256 {old['sha256']['metrics']}. Restore it."
        )
    sessions = manifest.read_manifest(run_dir)["sessions"]
    _take_cores(sessions[-1]["cores"])
    devices = jax.local_devices()[: sessions[-1]["num_devices"]]
    environment = manifest.changes(sessions, manifest.environment(devices))
    for name, (there, here) in environment.items():
        report.say(f"{name} is {there} there and {here} here: the bits may differ")
    new = train_and_evaluate(config, run_dir=into, data_dir=data_dir, resume=resume, devices=devices, report=report)
    rows = list(zip(*(rundir.read_rows(folder / "metrics.jsonl") for folder in (run_dir, into)), strict=True))
    epochs = [x["epoch"] for x, y in rows if x["params_sha256"] != y["params_sha256"]]
    moved = {}
    if new["sha256"] != old["sha256"]:
        change = max(abs(x["train_accuracy"] - y["train_accuracy"]) for x, y in rows)
        moved = {
            "test accuracy": f"{old['test_accuracy']:.2%} there, {new['test_accuracy']:.2%} here",
            "test loss": f"{old['test_loss']:.6g} there, {new['test_loss']:.6g} here",
            "training accuracy": f"by {change:.2%} at most, over all epochs",
        }
        with suppress(UserError):  # The checkpoint there may be gone.
            moved["best parameters"] = f"by {_distance(run_dir, into):.1e} of their norm"
    return Reproduction(
        same=new["sha256"] == old["sha256"],
        environment=environment,
        data=diff(run_dir, into)["data"],
        first_epoch=epochs[0] if epochs else None,
        moved=moved,
    )


def scores(target: str, metric: str) -> tuple[str, dict[int, float]]:
    """Returns the name and, of each seed that ended, the score of an experiment.

    Args:
      target: a folder of runs, or the name (or path) that comes before -seed<k>.
      metric: a key of result.json.

    Raises:
      UserError: there is no such run, they differ in more than the seed, or a seed comes twice.
    """
    path = Path(target)
    if path.is_dir():
        folders = find_runs(path) if not (path / "config.json").exists() else [path]
    else:
        base = path if path.parent.name else Path("runs") / path
        named = re.compile(rf"{re.escape(base.name)}-seed\d+")
        folders = sorted(p.parent for p in base.parent.glob("*/config.json") if named.fullmatch(p.parent.name))
    found: dict[int, float] = {}
    of_seed: dict[int, Path] = {}
    like: Config | None = None
    for folder in folders:
        config, _ = rundir.read_run(folder)
        result = rundir.read_result(folder)
        like = like or config
        if changes := rundir.config_changes(replace(like, seed=config.seed), config):
            name, (x, y) = next(iter(changes.items()))
            raise UserError(
                f"The runs of {target} must differ in their seed alone, got `{name}` {x!r} and {y!r}. Name a folder, "
                "or a beginning, that only the runs of one configuration share."
            )
        if result is not None:
            if config.seed in found:
                raise UserError(
                    f"The runs of {target} must have a seed each, got seed {config.seed} in {of_seed[config.seed]} and "
                    f"in {folder}. Name a folder, or a beginning, that holds one of them."
                )
            if result[metric] is None:
                raise UserError(f"`metric` must be one that every run has, got {metric}, which {folder} has not.")
            found[config.seed], of_seed[config.seed] = result[metric], folder
    if not found:
        raise UserError(
            f"`experiment` must be a folder of runs that ended, or the name before -seed<k> in runs/, got {target!r}."
        )
    return target, found


def _take_cores(count: int) -> None:
    """Leaves this process `count` cores, where it has more: XLA divides sums among them, so bits depend on how many.

    Without effect once jax has made its first array.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def _outcome(run_dir: Path) -> dict[str, Any]:
    info = read_info(run_dir)
    result = {k: v for k, v in (info.result or {}).items() if k not in ("training_seconds", "device", "seed")}
    return {"state": info.state, **result}


def _changes(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    flat_a, flat_b = rundir.flatten(a), rundir.flatten(b)
    names = dict.fromkeys((*flat_a, *flat_b))
    return {name: (flat_a.get(name), flat_b.get(name)) for name in names if flat_a.get(name) != flat_b.get(name)}


def _distance(a: Path, b: Path) -> float:
    """Returns the norm of the difference of the best parameters, relative to the norm of those of `a`."""
    x, y = (jax.tree.leaves(load_trained(run_dir).state.params) for run_dir in (a, b))
    square = sum(float(np.sum((np.asarray(p, np.float64) - q) ** 2)) for p, q in zip(x, y, strict=True))
    return float(np.sqrt(square / sum(float(np.sum(np.asarray(p, np.float64) ** 2)) for p in x)))
