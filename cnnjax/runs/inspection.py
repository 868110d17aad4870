"""What run directories say about runs: their state, whether their files are intact, how two of them differ.

A run directory is data, perhaps from someone else: it is parsed and compared, and a path that leads out of it is not
followed.
"""

import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from cnnjax.class_scores import own_scores
from cnnjax.config import Config
from cnnjax.errors import UserError, check, check_name, suggest, unknown_name
from cnnjax.files import SUMS, changes, check_local, check_sums, file_sha256, is_inside, show
from cnnjax.inputs import load_inputs
from cnnjax.process.console import Report
from cnnjax.runs import directory, loggers, manifest, profile, records, recovery
from cnnjax.runs.run import make_run
from cnnjax.runs.schema import EncodedConfig, Result, Row, Session, own_metrics
from cnnjax.runs.source import source_of
from cnnjax.runs.statistics import CLASS_METRICS, METRICS
from cnnjax.state import TrainState
from cnnjax.train import train_run

NOT_LISTED = "not listed in SHA256SUMS"  # A file that we list when we write it.


class RunInfo(NamedTuple):
    """A run as `cnnjax runs` shows it.

    Attributes:
      state: running, finished, interrupted, failed, or killed (the process ended without a record; it can be resumed).
      config: the configuration as JSON.
      rows: of metrics.jsonl.
      result: of result.json, or None.
      seconds: of training, up to the last epoch in timing.jsonl.
    """

    folder: Path
    state: str
    config: EncodedConfig
    rows: list[Row]
    result: Result | None
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
    """Returns the run directories in `folder` and its subfolders by name, broken ones too, without following links."""
    found = {path for pattern in ("*", "*/*") for path in folder.glob(pattern) if _is_run(path)}
    return sorted(path for path in found if is_inside(path, folder))


def _is_run(path: Path) -> bool:
    """Returns whether a folder has a config.json, which may be a broken link, or has lost it."""
    has = {name for name in ("config.json", "manifest.json", "checkpoints") if os.path.lexists(path / name)}
    return "config.json" in has or len(has) == 2


def read_info(run_dir: Path) -> RunInfo:
    """Reads what `cnnjax runs` shows of a run.

    Raises:
      UserError: it holds no run, or one of another version.
    """
    config = records.read_record(run_dir).config
    sessions = manifest.read_manifest(run_dir)["sessions"]
    state = sessions[-1]["state"]
    if state == "running" and not directory.is_locked(run_dir):
        state = "killed"
    timing, rows = records.read_timing(run_dir), records.read_rows(run_dir)
    seconds = timing[-1]["seconds"] if timing else 0.0
    return RunInfo(run_dir, state, config, rows, records.read_result(run_dir), seconds)


def verify(run_dir: Path) -> dict[str, str]:
    """Compares every file of a run with its checksum.

    Returns:
      For each file, by its path in the run directory: "ok"; "no checksum" (it is not ours, or the run was killed before
      it could write one); or what is wrong, see `files.check_sums`.

    Raises:
      UserError: `run_dir` holds no run, or a process is training in it.
    """
    own = (*directory.FILES, "manifest.json")
    names = [name for name in own if os.path.lexists(run_dir / name)]
    if not names:
        check_local("run", run_dir)
        records.check_readable(run_dir)
        raise UserError(f"`run` must be the directory of a run, got {run_dir}.{records.hint_at_runs(run_dir)}")
    if directory.is_locked(run_dir):
        raise UserError(f"`run` must not be training while it is verified, got {run_dir}. Wait until it ends.")
    records.check_links(run_dir)
    last = _last_session(run_dir)
    killed = last is not None and last["state"] == "running"
    folders = ("checkpoints", "damaged", *loggers.FOLDERS, profile.FOLDER)
    others = ("report.html", directory.LOCK, *(f"{name}/" for name in folders))
    found = {name: what for name, what in check_sums(run_dir).items() if not name.startswith(others)}
    if killed and found == {SUMS: "missing"}:
        found = dict.fromkeys(names, "no checksum")
    elif found.get(SUMS) != "missing":
        found |= {name: NOT_LISTED for name in names if found.get(name) == "no checksum"}
        if last is not None and last["state"] == "finished":
            found |= {name: "missing" for name in own if name not in names}
    folder = run_dir / "checkpoints"
    steps = [] if last is None else last.get("checkpoints", [])
    found |= {f"checkpoints/{step}": "missing" for step in steps if not os.path.lexists(folder / str(step))}
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        name = f"checkpoints/{path.name}"
        if path.is_symlink():
            found[name] = "outside the folder"
        elif path.name.isdecimal():
            status = recovery.check(path)
            found |= {f"{name}/{file}": NOT_LISTED if x == "no checksum" else x for file, x in status.items()}
    return found


def _last_session(run_dir: Path) -> Session | None:
    """Returns the last session, or None if the manifest cannot tell."""
    try:
        return manifest.read_manifest(run_dir)["sessions"][-1]
    except UserError:
        return None


def diff(a: Path, b: Path) -> dict[str, dict[str, tuple[Any, Any]]]:
    """Compares two runs; returns {"configuration" | "data" | "environment" | "outcome": {name: (a, b)}}."""
    x, y = (records.read_record(run_dir) for run_dir in (a, b))
    last_a, last_b = (manifest.read_manifest(run_dir)["sessions"][-1] for run_dir in (a, b))
    return {
        "configuration": changes(x.config, y.config),
        "data": changes(x.data.decisive(), y.data.decisive()),
        "environment": manifest.differences(last_a, last_b),
        "outcome": changes(_outcome(a), _outcome(b)),
    }


def take_cores(run_dir: Path) -> None:
    """Limits this process to the number of cores of a run: XLA divides sums among them, so the bits depend on it.

    Call it before jax starts, which makes XLA's threads.

    Raises:
      UserError: `run_dir` holds no run.
    """
    records.read_record(run_dir)  # Its errors name the directory.
    count = manifest.read_manifest(run_dir)["sessions"][-1]["cores"]
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


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
    old = records.read_result(run_dir)
    if old is None:
        raise UserError(f"`run` must be finished, got {run_dir}. Resume it with --resume first.")
    metrics = run_dir / "metrics.jsonl"
    if not metrics.exists() or file_sha256(metrics) != old["sha256"]["metrics"]:
        raise UserError(
            f"{metrics} must be the one that result.json names, SHA-256 {old['sha256']['metrics']}. {records.rewrite()}"
        )
    take_cores(run_dir)
    sessions = manifest.read_manifest(run_dir)["sessions"]
    devices = jax.local_devices()[: sessions[-1]["num_devices"]]
    mesh: Any = sessions[-1].get("mesh")  # Set if the run divided its state.
    stream = sessions[-1].get("stream")  # None on a CPU.
    now = manifest.environment(devices, mesh, stream=stream) | source_of(config).facts
    environment = manifest.environment_changes(sessions, now)
    for name, (there, here) in environment.items():
        report.say(f"{name} is {show(there)} there and {show(here)} here: the bits may differ")
    version = records.data_version(run_dir)
    inputs = load_inputs(config, data_dir, report.say, version=version, stream=stream)
    began_with = records.read_record(run_dir).data.weights_sha256
    if inputs.weights is not None and (got := inputs.weights.sha256) != began_with:
        raise UserError(f"`model.weights` must be the file of {run_dir}, SHA-256 {began_with}, got {got}.")
    last = old["stopped_epoch"]

    def on_epoch(row: Mapping[str, Any], state: TrainState) -> bool:
        return row["epoch"] == last  # A callback had stopped the run here.

    new = train_run(
        config,
        run_dir=into,
        resume=resume,
        on_epoch=on_epoch,
        devices=devices,
        mesh=mesh,
        report=report,
        inputs=inputs,
    ).finished_result()
    both = [records.read_rows(folder) for folder in (run_dir, into)]
    rows = list(zip(*both, strict=False))  # With `patience` the new run may end in another epoch.
    epochs = [x["epoch"] for x, y in rows if x["params_sha256"] != y["params_sha256"]]
    moved: dict[str, str] = {}
    if len(both[0]) != len(both[1]):
        moved["epochs"] = f"{len(both[0])} there, {len(both[1])} here"
    own = [(f"epoch {x['epoch']}", own_scores(x), own_scores(y)) for x, y in rows]
    own += [("the result", own_metrics(old), own_metrics(new))]
    if not epochs and (found := [(place, changes(x, y)) for place, x, y in own if changes(x, y)]):
        place, different = found[0]
        pairs = ((name, show(there), show(here)) for name, (there, here) in different.items())
        listed = ", ".join(f"{name} {there} there, {here} here" for name, there, here in pairs)
        moved["metrics"] = f"{listed} in {place}, with the same parameters"
    same = new["sha256"] == old["sha256"] and not moved
    if new["sha256"] != old["sha256"]:
        change = max(abs(x["train_loss"] - y["train_loss"]) for x, y in rows)
        moved |= {
            "test accuracy": f"{old['test_accuracy']:.2%} there, {new['test_accuracy']:.2%} here",
            "test loss": f"{old['test_loss']:.6g} there, {new['test_loss']:.6g} here",
            "training loss": f"by at most {change:.6g} over all epochs",
        }
        with suppress(UserError):  # The checkpoint may be gone.
            moved["best parameters"] = f"by {_distance(run_dir, into, config):.1e} of their norm"
    return Reproduction(
        same=same,
        environment=environment,
        data=diff(run_dir, into)["data"],
        first_epoch=epochs[0] if epochs else None,
        moved=moved,
    )


def runs_of(target: str) -> list[Path]:
    """Returns the run directories of an experiment, see `scores`."""
    path = Path(target)
    is_folder = target != "" and os.path.isdir(path)
    folders = [path] if os.path.exists(path / "config.json") else find_runs(path) if is_folder else []
    if folders:
        return folders
    base = path if path.parent.name else Path("runs") / path
    of_name: dict[str, list[Path]] = {}
    for folder in sorted(p.parent for p in base.parent.glob("*/config.json")):
        if match := re.fullmatch(r"(.+)-seed\d+", folder.name, re.DOTALL):
            of_name.setdefault(match[1], []).append(folder)
    if base.name not in of_name and of_name and not is_folder:
        raise unknown_name("experiment", base.name, of_name)
    return of_name.get(base.name, [])


def scores(target: str, metric: str) -> tuple[dict[int, float], list[Path]]:
    """Returns the score of each finished seed of an experiment, and the runs that have not finished.

    Args:
      target: a folder of runs, or the name (or path) before -seed<k>.
      metric: one of `METRICS`; precision:CLASS, recall:CLASS or f1:CLASS; or test_NAME or best_validation_NAME, for a
        score of `Config.metrics`.

    Raises:
      UserError: there is no such run or metric, none has finished, they differ in more than the seed, or a seed occurs
        twice.
    """
    found: dict[int, float] = {}
    of_seed: dict[int, Path] = {}
    unfinished = []
    first: EncodedConfig | None = None
    of_config: Path | None = None
    data: dict[str, str] | None = None
    for folder in runs_of(target):
        record = records.read_record(folder)
        config, data = record.config, data or record.data.sha256
        if record.data.sha256 != data:
            raise UserError(f"The runs of {target} must be on the same images, got others in {folder}.")
        result = records.read_result(folder)
        first, of_config, seed = first or config, of_config or folder, config["seed"]
        if changed := changes({**first, "seed": seed}, config):
            name, (x, y) = next(iter(changed.items()))
            raise UserError(
                f"The runs of {target} must differ only in their seed, got `{name}` {x!r} in {of_config} and {y!r} in "
                f"{folder}. Pass a folder or a name that only the runs of one configuration share."
            )
        if result is None:
            unfinished.append(folder)
        else:
            if seed in found:
                raise UserError(
                    f"The runs of {target} must have different seeds, got seed {seed} in {of_seed[seed]} and "
                    f"in {folder}. Pass a folder, or a name, that holds one of them."
                )
            score = _score(result, metric, folder)
            if score is None:
                raise UserError(f"`metric` must be one that every run has, got {metric}, which {folder} lacks.")
            check("metric", "finite in every run", math.isfinite(score), f"{metric} {score} in {folder}")
            found[seed], of_seed[seed] = score, folder
    if not found:
        listed = ", ".join(map(str, unfinished))
        lacking = f" with unfinished runs only: {listed}. Resume them with --resume" if listed else " without a run"
        raise UserError(
            "`experiment` must be a folder of finished runs, or the name before -seed<k> in runs/, got "
            f"{target!r}{lacking}."
        )
    return found, unfinished


def _score(result: Result, metric: str, folder: Path) -> float | None:
    """Returns a metric of a run, see `scores`."""
    kind, colon, name = metric.partition(":")
    of_class = {row["name"]: row for row in result["classes"]}
    if colon and kind in CLASS_METRICS:
        check_name(f"{kind}:CLASS", name, of_class)
        return of_class[name][kind]
    known = {**dict.fromkeys(METRICS), **{f"{kind}:CLASS": None for kind in CLASS_METRICS}, **own_metrics(result)}
    if metric not in known:
        raise UserError(f"`metric` must be a score of {folder}, got {metric!r}. {suggest(metric, known, 'Its scores')}")
    return known[metric] if metric not in METRICS else result.get(metric)


def _outcome(run_dir: Path) -> dict[str, Any]:
    info = read_info(run_dir)
    # Runs of an earlier version did not record the last one; metrics.jsonl has it.
    left_out = ("training_seconds", "device", "seed", "classes", "confusion_matrix", "best_validation_loss")
    result = {k: v for k, v in (info.result or {}).items() if k not in left_out}
    return {"state": info.state, **result}


def _distance(a: Path, b: Path, config: Config) -> float:
    """Returns the norm of the difference of the best parameters, relative to the norm of those of `a`."""
    facts = records.read_record(a).data
    x, y = (jax.tree.leaves(make_run(run_dir, config, facts).state.params) for run_dir in (a, b))
    square = sum(float(np.sum((np.asarray(p, np.float64) - q) ** 2)) for p, q in zip(x, y, strict=True))
    return float(np.sqrt(square / sum(float(np.sum(np.asarray(p, np.float64) ** 2)) for p in x)))
