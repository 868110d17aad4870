"""The run directory: config.json, metrics.jsonl (a line an epoch), checkpoints/ and, at the end, result.json."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cnnjax.batches import Standardization
from cnnjax.config import Config, ModelConfig, OptimConfig
from cnnjax.data import ImageDataset
from cnnjax.errors import UserError


@dataclass(frozen=True)
class DataFacts:
    """What a trained network has to know of its data.

    Attributes:
      image_shape: (H, W, C).
      class_names: of each label, in order.
      sha256: of each split (see `data.digest`).
      source: where the pixels came from, in words.
      mean, std: of the training images' channels, in units of a pixel (0 to 255).
    """

    image_shape: tuple[int, ...]
    class_names: tuple[str, ...]
    sha256: dict[str, str]
    source: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def standardization(self) -> Standardization:
        """The mean and deviation as arrays."""
        return Standardization(np.array(self.mean, np.float32), np.array(self.std, np.float32))


def make_facts(dataset: ImageDataset, image_shape: tuple[int, ...], standardization: Standardization) -> DataFacts:
    """Returns what config.json keeps of a set, and of the training part's statistics."""
    return DataFacts(
        image_shape=image_shape,
        class_names=dataset.class_names,
        sha256=dataset.sha256,
        source=dataset.source,
        mean=tuple(standardization.mean.tolist()),
        std=tuple(standardization.std.tolist()),
    )


def default_run_dir(config: Config) -> Path:
    """Returns runs/<experiment>-seed<k>."""
    name = config.experiment or f"{config.dataset.replace('/', '-')}_{config.model.name}"
    return Path("runs") / f"{name}-seed{config.seed}"


def check_run(run_dir: Path, config: Config, resume: bool) -> None:
    """Checks that a run may start, or go on, in `run_dir`.

    Raises:
      UserError: the directory is in use and `resume` is off, or holds a run of another configuration.
    """
    if not run_dir.is_dir() and run_dir.exists():
        raise UserError(f"`run_dir` must be a directory, got the file {run_dir}.")
    if not run_dir.exists() or not any(run_dir.iterdir()):
        return
    if not (run_dir / "config.json").exists():
        raise UserError(f"`run_dir` must be empty or hold a run, got {run_dir}. Name another by --run-dir DIR.")
    saved, _ = read_run(run_dir)
    fits = saved == config or _is_longer(config, saved)
    if not resume:
        hint = "Go on with that run by --resume, or name" if fits else "It holds another configuration. Name"
        raise UserError(f"`run_dir` {run_dir} exists already. {hint} another by --run-dir DIR.")
    old, new = _flatten(asdict(saved)), _flatten(asdict(config))
    changed = [f"`{name}` is {old[name]!r} there and {new[name]!r} here" for name in new if old[name] != new[name]]
    if not fits:
        raise UserError(
            f"{run_dir} must be resumed with its own configuration: {'; '.join(changed)}. "
            f"Give the same values, or name another directory by --run-dir DIR."
        )


@contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Keeps other processes out of the run directory while the context lasts; the system frees it when a process ends.

    Raises:
      UserError: another process trains in it.
    """
    descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UserError(f"`run_dir` {run_dir} is in use by another process. Name another by --run-dir DIR.") from error
    finally:
        os.close(descriptor)


def _is_longer(config: Config, saved: Config) -> bool:
    """Returns whether `config` is `saved` with more epochs, which changes nothing of the steps that were made.

    With a schedule it would: the learning rate of each step depends on the number of all.
    """
    more = config.num_epochs > saved.num_epochs and config.optim.schedule == "constant"
    return more and config == replace(saved, num_epochs=config.num_epochs)


def create_run(run_dir: Path, config: Config, facts: DataFacts) -> None:
    """Makes the directory and writes config.json, or checks the one that is there (a longer run renews it).

    Raises:
      UserError: the directory cannot be written, is in use, or holds a run of another configuration or on other data.
    """
    path = run_dir / "config.json"
    if path.exists():
        saved, old = read_run(run_dir)
        if (old.sha256, old.mean, old.std) != (facts.sha256, facts.mean, facts.std):
            raise UserError(
                f"{run_dir} must be resumed with its own data, SHA-256 {old.sha256}, mean {old.mean} and deviation "
                f"{old.std}, got {facts.sha256}, {facts.mean} and {facts.std} from {facts.source}. Give the same "
                "--data-dir."
            )
        if saved == config:
            return
        if not _is_longer(config, saved):  # Another process has begun a run here since `check_run`.
            raise UserError(f"`run_dir` {run_dir} holds another configuration by now. Name another by --run-dir DIR.")
        with lock(run_dir):  # A run that goes on keeps its files.
            (run_dir / "result.json").unlink(missing_ok=True)  # Of the shorter run.
            _write_json(path, {"config": asdict(config), "data": asdict(facts)})
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        _write_json(path, {"config": asdict(config), "data": asdict(facts)})
    except OSError as error:
        raise UserError(
            f"`run_dir` must be a directory that can be written, got {run_dir} ({error}). Give another: --run-dir DIR."
        ) from error


def read_run(run_dir: Path) -> tuple[Config, DataFacts]:
    """Reads what `create_run` wrote.

    Raises:
      UserError: there is no readable config.json.
    """
    try:
        content = json.loads((run_dir / "config.json").read_text())
        config = content["config"]
        parts = {"model": ModelConfig(**config["model"]), "optim": OptimConfig(**config["optim"])}
        data: Any = {
            name: tuple(value) if isinstance(value, list) else value for name, value in content["data"].items()
        }
        return Config(**{**config, **parts}), DataFacts(**data)
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(
            f"`run` must be the directory of a run of this version, with a config.json, got {run_dir} ({error!r})."
        ) from error


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the rows of metrics.jsonl, one an epoch (none before the first)."""
    path = run_dir / "metrics.jsonl"
    return [_parse(path, line) for line in path.read_text().splitlines()] if path.exists() else []


def write_metrics(run_dir: Path, rows: list[dict[str, Any]]) -> None:
    """Writes metrics.jsonl whole: an epoch that is trained again after a resume must not stand there twice."""
    partial = run_dir / "metrics.jsonl.partial"
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partial.replace(run_dir / "metrics.jsonl")


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """Returns the content of result.json, or None while the run has not ended."""
    path = run_dir / "result.json"
    return _parse(path, path.read_text()) if path.exists() else None


def write_result(run_dir: Path, result: dict[str, Any]) -> None:
    """Writes result.json."""
    _write_json(run_dir / "result.json", result)


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        message = f"{path} must hold JSON, got {text[:80]!r}. Restore it, or train in another directory."
        raise UserError(message) from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat.update(_flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat
