"""What run directories say about runs: their state, whether their files are intact, how two of them differ.

A run directory is data, perhaps from someone else: it is parsed and compared, and a path that leads out of it is not
followed.
"""

import os
import re
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from cnnjax.cli.console import Report
from cnnjax.config import Config
from cnnjax.errors import UserError
from cnnjax.runs import directory, manifest
from cnnjax.runs.codec import source_files
from cnnjax.runs.files import SUMS, changes, check_sums, file_sha256
from cnnjax.runs.trained import restore_best
from cnnjax.train import train_and_evaluate


class RunInfo(NamedTuple):
    """A run as `cnnjax runs` shows it.

    Attributes:
      state: running, finished, interrupted, failed, or killed (the process ended without a record; it can be resumed).
      config: the configuration as JSON.
      rows: of metrics.jsonl.
      result: of result.json, or None.
      seconds: of all sessions that ended.
    """

    folder: Path
    state: str
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    result: dict[str, Any] | None
    seconds: float


class Reproduction(NamedTuple):
    """Compares a run with its reproduction.

    Attributes:
      same: whether parameters, optimizer state, batch statistics and metrics have the same bits.
      environment, data: the differences, {name: (old, new)}.
      first_epoch: the first epoch after which the parameters differ, or None.
      moved: how much the numbers differ, in words.
    """

    same: bool
    environment: dict[str, tuple[Any, Any]]
    data: dict[str, tuple[Any, Any]]
    first_epoch: int | None
    moved: dict[str, str]


def find_runs(folder: Path) -> list[Path]:
    """Returns the run directories in `folder` and its subfolders by name, without following links."""
    found = (path.parent for pattern in ("*/config.json", "*/*/config.json") for path in folder.glob(pattern))
    return sorted(path for path in found if path.resolve().is_relative_to(folder.resolve()))


def read_info(run_dir: Path) -> RunInfo:
    """Reads what `cnnjax runs` shows of a run.

    Raises:
      UserError: it holds no run, or one of another version.
    """
    config = directory.read_record(run_dir).config
    sessions = manifest.read_manifest(run_dir)["sessions"]
    state = sessions[-1]["state"]
    if state == "running" and not directory.is_locked(run_dir):
        state = "killed"
    seconds = sum(session.get("seconds", 0.0) for session in sessions)
    rows = directory.read_rows(run_dir / "metrics.jsonl")
    return RunInfo(run_dir, state, config, rows, directory.read_result(run_dir), seconds)


def verify(run_dir: Path) -> dict[str, str]:
    """Compares every file of a run with its checksum.

    Returns:
      For each file, by its path in the run directory: "ok"; "no checksum" (it is not ours, or the run was killed before
      it could write one); or what is wrong, see `files.check_sums`.

    Raises:
      UserError: `run_dir` holds no run, or a process is training in it.
    """
    names = [name for name in (*directory.FILES, "manifest.json") if (run_dir / name).exists()]
    if not names:
        raise UserError(f"`run` must be the directory of a run, got {run_dir}.")
    if directory.is_locked(run_dir):
        raise UserError(f"`run` must not be training while it is verified, got {run_dir}. Wait until it ends.")
    directory.check_links(run_dir)
    killed = _was_killed(run_dir)
    own = ("checkpoints/", "damaged/", directory.LOCK)
    found = {name: what for name, what in check_sums(run_dir).items() if not name.startswith(own)}
    if killed and found == {SUMS: "missing"}:
        found = dict.fromkeys(names, "no checksum")
    for path in sorted((run_dir / "checkpoints").glob("*")):
        name = f"checkpoints/{path.name}"
        if path.is_symlink():
            found[name] = "outside the folder"
        elif path.name.isdecimal() and killed and not (path / SUMS).exists():
            found[name] = "no checksum"
        elif path.name.isdecimal():
            found |= {f"{name}/{file}": what for file, what in check_sums(path).items()}
    return found


def _was_killed(run_dir: Path) -> bool:
    """Returns whether the last session ended without a record; False if the manifest cannot tell."""
    try:
        return manifest.read_manifest(run_dir)["sessions"][-1]["state"] == "running"
    except UserError:
        return False


def diff(a: Path, b: Path) -> dict[str, dict[str, tuple[Any, Any]]]:
    """Compares two runs; returns {"configuration" | "data" | "environment" | "outcome": {name: (a, b)}}."""
    x, y = (directory.read_record(run_dir) for run_dir in (a, b))
    last_a, last_b = (manifest.read_manifest(run_dir)["sessions"][-1] for run_dir in (a, b))
    return {
        "configuration": changes(x.config, y.config),
        "data": changes(asdict(x.data), asdict(y.data)),
        "environment": manifest.differences(last_a, last_b),
        "outcome": changes(_outcome(a), _outcome(b)),
    }


def reproduce(
    run_dir: Path,
    config: Config,
    *,
    into: Path,
    data_dir: Path | None = None,
    resume: bool = False,
    report: Report | None = None,
) -> Reproduction:
    """Trains a run again, and compares the two.

    Args:
      run_dir: a finished run.
      config: its configuration.
      into: the run directory of the new one.
      data_dir, resume, report: see `train_and_evaluate`.

    Raises:
      UserError: the run is not finished; see also `train_and_evaluate`.
    """
    report = report or Report(quiet=True)
    old = directory.read_result(run_dir)
    if old is None:
        raise UserError(f"`run` must be finished, got {run_dir}. Resume it with --resume first.")
    metrics = run_dir / "metrics.jsonl"
    if not metrics.exists() or file_sha256(metrics) != old["sha256"]["metrics"]:
        raise UserError(
            f"{metrics} must be the one that result.json names, SHA-256 {old['sha256']['metrics']}. Restore it."
        )
    sessions = manifest.read_manifest(run_dir)["sessions"]
    _take_cores(sessions[-1]["cores"])
    devices = jax.local_devices()[: sessions[-1]["num_devices"]]
    now = manifest.environment(devices) | {"files": source_files(config)}
    environment = manifest.environment_changes(sessions, now)
    for name, (there, here) in environment.items():
        report.say(f"{name} is {there} there and {here} here: the bits may differ")
    new = train_and_evaluate(config, run_dir=into, data_dir=data_dir, resume=resume, devices=devices, report=report)
    rows = list(zip(*(directory.read_rows(folder / "metrics.jsonl") for folder in (run_dir, into)), strict=True))
    epochs = [x["epoch"] for x, y in rows if x["params_sha256"] != y["params_sha256"]]
    moved = {}
    if new["sha256"] != old["sha256"]:
        change = max(abs(x["train_accuracy"] - y["train_accuracy"]) for x, y in rows)
        moved = {
            "test accuracy": f"{old['test_accuracy']:.2%} there, {new['test_accuracy']:.2%} here",
            "test loss": f"{old['test_loss']:.6g} there, {new['test_loss']:.6g} here",
            "training accuracy": f"by at most {change:.2%} over all epochs",
        }
        with suppress(UserError):  # The checkpoint may be gone.
            moved["best parameters"] = f"by {_distance(run_dir, into, config):.1e} of their norm"
    return Reproduction(
        same=new["sha256"] == old["sha256"],
        environment=environment,
        data=diff(run_dir, into)["data"],
        first_epoch=epochs[0] if epochs else None,
        moved=moved,
    )


def scores(target: str, metric: str) -> tuple[str, dict[int, float]]:
    """Returns the name of an experiment, and the score of each of its finished seeds.

    Args:
      target: a folder of runs, or the name (or path) before -seed<k>.
      metric: a key of result.json.

    Raises:
      UserError: there is no such run, they differ in more than the seed, or a seed occurs twice.
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
    first: dict[str, Any] | None = None
    for folder in folders:
        config = directory.read_record(folder).config
        result = directory.read_result(folder)
        first, seed = first or config, config["seed"]
        if changed := changes({**first, "seed": seed}, config):
            name, (x, y) = next(iter(changed.items()))
            raise UserError(
                f"The runs of {target} must differ only in their seed, got `{name}` {x!r} and {y!r}. Pass a folder or "
                "a name that only the runs of one configuration share."
            )
        if result is not None:
            if seed in found:
                raise UserError(
                    f"The runs of {target} must have different seeds, got seed {seed} in {of_seed[seed]} and "
                    f"in {folder}. Pass a folder, or a name, that holds one of them."
                )
            if result[metric] is None:
                raise UserError(f"`metric` must be one that every run has, got {metric}, which {folder} lacks.")
            found[seed], of_seed[seed] = result[metric], folder
    if not found:
        raise UserError(
            f"`experiment` must be a folder of finished runs, or the name before -seed<k> in runs/, got {target!r}."
        )
    return target, found


def _take_cores(count: int) -> None:
    """Limits this process to `count` cores: XLA divides sums among them, so the bits depend on their number.

    Has no effect once jax has made its first array.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def _outcome(run_dir: Path) -> dict[str, Any]:
    info = read_info(run_dir)
    result = {k: v for k, v in (info.result or {}).items() if k not in ("training_seconds", "device", "seed")}
    return {"state": info.state, **result}


def _distance(a: Path, b: Path, config: Config) -> float:
    """Returns the norm of the difference of the best parameters, relative to the norm of those of `a`."""
    facts = directory.read_record(a).data
    x, y = (jax.tree.leaves(restore_best(run_dir, config, facts).state.params) for run_dir in (a, b))
    square = sum(float(np.sum((np.asarray(p, np.float64) - q) ** 2)) for p, q in zip(x, y, strict=True))
    return float(np.sqrt(square / sum(float(np.sum(np.asarray(p, np.float64) ** 2)) for p in x)))
