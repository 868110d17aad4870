"""The run directory: config.json, metrics.jsonl and timing.jsonl (a line an epoch), checkpoints/, manifest.json (see
`manifest`) and, at the end, result.json. What it holds is read as data; none of it is executed.
"""

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from cnnjax.data.batches import Standardization
from cnnjax.config import AugmentConfig, Config, ModelConfig, OptimConfig
from cnnjax.data.datasets import ImageDataset
from cnnjax.errors import UserError
from cnnjax.runs.files import read_json, write_json, write_whole

FILES = ("config.json", "metrics.jsonl", "timing.jsonl", "result.json")  # Besides manifest.json and what it names.
LOCK = "lock"
_BEGUN = rf"{LOCK}|manifest\.json|session-\d+\.diff|.*\.partial"  # What a kill leaves before config.json is written.


@dataclass(frozen=True)
class DataFacts:
    """What a trained network has to know of its data.

    Attributes:
      image_shape: (H, W, C).
      class_names: of each label, in order.
      sha256: of each split (see `data.digest`).
      version: of the set, as tfds numbers it.
      source: where the pixels came from, in words.
      mean, std: of the training images' channels, in units of a pixel (0 to 255).
    """

    image_shape: tuple[int, ...]
    class_names: tuple[str, ...]
    sha256: dict[str, str]
    version: str
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
        version=dataset.folder.name,
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
      UserError: the directory is in use and `resume` is off, or holds a run of another configuration or version.
    """
    if not (run_dir / "config.json").exists():
        strangers = [path.name for path in run_dir.iterdir() if not re.fullmatch(_BEGUN, path.name)]
        if strangers:
            raise UserError(
                f"`run_dir` must be empty or hold a run, got {run_dir} with {min(strangers)}. Name another by "
                "--run-dir DIR."
            )
        return
    if (run_dir / "checkpoints").exists() and not (run_dir / "manifest.json").exists():
        raise UserError(
            f"{run_dir} must have a manifest.json, got none: another version of cnnjax wrote it. Use that version, or "
            "name another by --run-dir DIR."
        )
    saved, _ = read_run(run_dir)
    fits = saved == config or _is_longer(config, saved)
    if not resume:
        hint = "Go on with that run by --resume, or name" if fits else "It holds another configuration. Name"
        raise UserError(f"`run_dir` {run_dir} exists already. {hint} another by --run-dir DIR.")
    if not fits:
        changed = [
            f"`{name}` is {old!r} there and {new!r} here" for name, (old, new) in config_changes(saved, config).items()
        ]
        raise UserError(
            f"{run_dir} must be resumed with its own configuration: {'; '.join(changed)}. "
            f"Give the same values, or name another directory by --run-dir DIR."
        )


def config_changes(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Returns the values that differ: {dotted name: (old, new)}."""
    a, b = flatten(asdict(old)), flatten(asdict(new))
    return {name: (a[name], b[name]) for name in a if a[name] != b[name]}


@contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Makes the directory, and keeps other processes out of it while the context lasts.

    The system frees the lock when the process ends, however it ends. A directory that stayed empty is removed.

    Raises:
      UserError: another process trains in it, or it cannot be written.
    """
    if not run_dir.is_dir() and run_dir.exists():
        raise UserError(f"`run_dir` must be a directory, got the file {run_dir}.")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / LOCK).open("a")
    except OSError as error:
        raise UserError(
            f"`run_dir` must be a directory that can be written, got {run_dir} ({error}). Give another: --run-dir DIR."
        ) from error
    with file:
        if not _take_lock(file, run_dir / LOCK):
            raise UserError(f"`run_dir` {run_dir} is in use by another process. Name another by --run-dir DIR.")
        try:
            yield
        finally:
            if [path.name for path in run_dir.iterdir()] == [LOCK]:
                (run_dir / LOCK).unlink()
                run_dir.rmdir()


def _take_lock(file: IO[str], path: Path) -> bool:
    """Returns whether this process has the lock now; tries for a second, since `is_locked` holds it for an instant."""
    for _ in range(10):
        if _try_lock(file.fileno()):
            with suppress(OSError):  # Another process may have removed the folder since the file was opened.
                return os.path.samestat(os.fstat(file.fileno()), path.stat())
            return False
        time.sleep(0.1)
    return False


def is_locked(run_dir: Path) -> bool:
    """Returns whether a process trains in the directory now."""
    try:
        with (run_dir / LOCK).open() as file:
            return not _try_lock(file.fileno(), fcntl.LOCK_SH)
    except OSError:
        return False


def _try_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_longer(config: Config, saved: Config) -> bool:
    """Returns whether `config` is `saved` with more epochs, which changes nothing of the steps that were made.

    With a schedule it would, and with lookahead: what a step does depends on the number of all.
    """
    optim = saved.optim
    fixed = optim.schedule == "constant" and optim.lookahead == 0 and (optim.accumulate == 1 or not optim.whiten_epochs)
    return fixed and config.num_epochs > saved.num_epochs and config == replace(saved, num_epochs=config.num_epochs)


def check_data(run_dir: Path, facts: DataFacts) -> None:
    """Checks that a run that is there was on these data.

    Raises:
      UserError: it was on other data.
    """
    if (run_dir / "config.json").exists():
        _, old = read_run(run_dir)
        if (old.sha256, old.mean, old.std) != (facts.sha256, facts.mean, facts.std):
            raise UserError(
                f"{run_dir} must be resumed with its own data, SHA-256 {old.sha256}, mean {old.mean} and deviation "
                f"{old.std}, got {facts.sha256}, {facts.mean} and {facts.std} from {facts.source}. Give the same "
                "--data-dir."
            )


def write_run(run_dir: Path, config: Config, facts: DataFacts) -> None:
    """Writes config.json, or renews that of a shorter run. The directory must be locked."""
    path = run_dir / "config.json"
    if path.exists():
        if read_run(run_dir)[0] == config:
            return
        (run_dir / "result.json").unlink(missing_ok=True)  # Of the shorter run.
    write_json(path, {"config": asdict(config), "data": asdict(facts)})


def read_run(run_dir: Path) -> tuple[Config, DataFacts]:
    """Reads what `write_run` wrote.

    Raises:
      UserError: there is no readable config.json, or a link leads out of the directory.
    """
    check_links(run_dir)
    try:
        content = json.loads((run_dir / "config.json").read_bytes())
        config = content["config"]
        kinds: Any = {"model": ModelConfig, "optim": OptimConfig, "augment": AugmentConfig}
        parts = {name: kind(**_tuples(config[name])) for name, kind in kinds.items()}
        data: Any = _tuples(content["data"])
        return Config(**{**config, **parts}), DataFacts(**data)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"`run` must be the directory of a run of this version, with a config.json, got {run_dir} ({error!r})."
        ) from error


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def check_links(run_dir: Path) -> None:
    """Checks that nothing in a run directory leads out of it.

    Raises:
      UserError: a link does.
    """
    for path in run_dir.glob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(run_dir.resolve()):
            raise UserError(f"A run directory must hold no link that leads out of it, got {path}. Remove the link.")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of metrics.jsonl or timing.jsonl, one an epoch (none before the first).

    Raises:
      UserError: a line is no JSON.
    """
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    except ValueError as error:
        raise UserError(
            f"{path} must hold a JSON object a line, got {error}. A run that is not finished writes it again: "
            "--resume. A finished one is made again: cnnjax reproduce."
        ) from error


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes metrics.jsonl or timing.jsonl whole: an epoch that is trained again must not stand there twice."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """Returns the content of result.json, or None while the run has not ended."""
    path = run_dir / "result.json"
    return read_json(path) if path.exists() else None


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested dicts as one, with dotted names."""
    flat = {}
    for name, value in tree.items():
        flat.update(flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat
