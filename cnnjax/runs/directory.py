"""The run directory: config.json, metrics.jsonl and timing.jsonl (one line per epoch), checkpoints/, manifest.json (see
`manifest`) and, at the end, result.json. Its content is data; none of it is executed.
"""

import fcntl
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from cnnjax.cli.console import Report
from cnnjax.cli.signals import Stop, stop_signals
from cnnjax.config import Config
from cnnjax.data.batches import Standardization
from cnnjax.data.datasets import ImageDataset
from cnnjax.errors import UserError
from cnnjax.runs import manifest
from cnnjax.runs.checkpoints import Checkpoints, recover
from cnnjax.runs.codec import decode, encode, source_files
from cnnjax.runs.files import changes, read_json, write_file, write_json

FILES = ("config.json", "metrics.jsonl", "timing.jsonl", "result.json")  # Besides manifest.json and its diffs.
LOCK = "lock"
_BEGUN = rf"{LOCK}|manifest\.json|session-\d+\.diff|.*\.partial"  # What a kill leaves before config.json is written.


@dataclass(frozen=True)
class DataFacts:
    """What a trained network has to know about its data.

    Attributes:
      image_shape: (H, W, C).
      class_names: the name of each label, in order.
      sha256: for each split, see `data.datasets.digest`.
      version: the tfds version.
      source: where the pixels came from, in words.
      mean, std: of the training images' channels, in pixel units (0 to 255).
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
        """Mean and standard deviation as arrays."""
        return Standardization(np.array(self.mean, np.float32), np.array(self.std, np.float32))


def make_facts(dataset: ImageDataset, image_shape: tuple[int, ...], standardization: Standardization) -> DataFacts:
    """Returns the facts of a data set and of its training images' statistics."""
    return DataFacts(
        image_shape=image_shape,
        class_names=dataset.class_names,
        sha256=dataset.sha256,
        version=dataset.version,
        source=dataset.source,
        mean=tuple(standardization.mean.tolist()),
        std=tuple(standardization.std.tolist()),
    )


@dataclass(frozen=True)
class Record:
    """The content of config.json.

    Attributes:
      config: the configuration as JSON, see `codec.encode`.
      data: what a trained network has to know about its data.
      files: the SHA-256 of each file that defines classes or functions of the configuration.
    """

    config: dict[str, Any]
    data: DataFacts
    files: dict[str, str] = field(default_factory=dict)

    def decode(self, names: Mapping[str, Any]) -> Config:
        """Returns the configuration; `names` are the user's classes and functions, see `codec.decode`."""
        return decode(self.config, names, self.files)


def read_record(run_dir: Path) -> Record:
    """Reads config.json.

    Raises:
      UserError: it is missing or of another version, or a link leads out of the directory.
    """
    check_links(run_dir)
    try:
        content = json.loads((run_dir / "config.json").read_bytes())
        data: Any = {name: tuple(x) if isinstance(x, list) else x for name, x in content["data"].items()}
        record = Record(content["config"], DataFacts(**data), content["files"])
        if not {"seed", "num_epochs", "dataset"} <= record.config.keys():
            raise KeyError("seed, num_epochs or dataset")
        return record
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"`run` must be the directory of a run of this version, with a config.json, got {run_dir} ({error!r})."
        ) from error


@dataclass
class OpenRun:
    """A run directory that this process has locked.

    Attributes:
      run_dir: the directory.
      config: the configuration of the run.
      report: receives messages and metrics.
      stop: the signal that asks to stop, if one arrived.
      checkpoints: those of the run, after `begin`.
    """

    run_dir: Path
    config: Config
    report: Report
    stop: Stop
    checkpoints: Checkpoints = field(init=False)
    _stack: ExitStack = field(default_factory=ExitStack)

    def finished(self) -> dict[str, Any] | None:
        """Returns the content of result.json if nothing is left to do."""
        result = read_result(self.run_dir)
        done = result is not None and result["num_epochs"] >= self.config.num_epochs
        return result if done and manifest.is_closed(self.run_dir) else None

    def begin(self, facts: DataFacts, environment: dict[str, Any]) -> None:
        """Begins a session: checks the data, writes manifest.json and config.json, and sets damaged checkpoints aside.

        From here on a signal waits until the loop looks at `stop`: inside Orbax it would turn into a failure. When the
        context of `open_run` ends, the manifest records how the session ended.

        Raises:
          UserError: the directory holds a run on other data.
        """
        check_data(self.run_dir, facts)
        files = source_files(self.config)
        environment = environment | {"files": files}
        for line in manifest.changes_since_last_session(self.run_dir, environment):
            self.report.say(line)
        self._stack.enter_context(self.stop.held())
        about = environment | {"seed": self.config.seed, "resumed_from": None}
        session = self._stack.enter_context(manifest.session(self.run_dir, about, FILES))
        write_record(self.run_dir, Record(encode(self.config), facts, files))
        recover(self.run_dir / "checkpoints", self.report.say)
        self.checkpoints = self._stack.enter_context(closing(Checkpoints(self.run_dir / "checkpoints")))
        session["resumed_from"] = self.checkpoints.latest()


@contextmanager
def open_run(
    run_dir: Path, config: Config, report: Report, *, resume: bool, stop: Stop | None = None
) -> Iterator[OpenRun]:
    """Locks a run directory, which is created, and turns SIGINT and SIGTERM into `Interrupted`.

    The system releases the lock when the process ends, however it ends. A directory that stayed empty is removed.

    Args:
      stop: receives signals, for a caller that trains in several threads; None: this context handles them.

    Raises:
      UserError: another process trains in the directory, it cannot be written, or `check_run` fails.
    """
    if not run_dir.is_dir() and run_dir.exists():
        raise UserError(f"`run_dir` must be a directory, got the file {run_dir}.")
    encode(config)  # Nothing is written for a configuration that cannot be.
    lock = FileLock(run_dir / LOCK, timeout=1, fallback_to_soft=False)  # `is_locked` holds it for an instant.
    with ExitStack() as stack:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            in_use = "is in use by another process" if isinstance(error, Timeout) else f"cannot be written ({error})"
            raise UserError(f"`run_dir` {run_dir} {in_use}. Choose another: --run-dir DIR.") from error
        stack.callback(_release, lock, run_dir)
        stop = stop or stack.enter_context(stop_signals())
        check_run(run_dir, config, resume)
        yield OpenRun(run_dir, config, report, stop, stack)


def _release(lock: FileLock, run_dir: Path) -> None:
    if [path.name for path in run_dir.iterdir()] in ([], [LOCK]):
        (run_dir / LOCK).unlink(missing_ok=True)
        run_dir.rmdir()
    lock.release()


def is_locked(run_dir: Path) -> bool:
    """Returns whether a process trains in the directory now."""
    if not (run_dir / LOCK).exists():
        return False
    with (run_dir / LOCK).open() as file:  # Shared, so that it works in a directory that is not ours.
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def check_run(run_dir: Path, config: Config, resume: bool) -> None:
    """Checks that a run may start, or resume, in `run_dir`.

    Raises:
      UserError: the directory is in use and `resume` is off, or holds a run of another configuration or version.
    """
    if not (run_dir / "config.json").exists():
        others = [path.name for path in run_dir.iterdir() if not re.fullmatch(_BEGUN, path.name)]
        if others:
            raise UserError(
                f"`run_dir` must be empty or hold a run, got {run_dir} with {min(others)}. Choose another: "
                "--run-dir DIR."
            )
        return
    if (run_dir / "checkpoints").exists() and not (run_dir / "manifest.json").exists():
        raise UserError(
            f"{run_dir} must have a manifest.json, got none: another version of cnnjax wrote it. Use that version, or "
            "choose another directory: --run-dir DIR."
        )
    saved = read_record(run_dir).config
    changed = changes(saved, encode(config))
    if _is_longer(config, saved):
        changed = {}
    if not resume:
        hint = "It holds another configuration. Choose" if changed else "Resume that run with --resume, or choose"
        raise UserError(f"`run_dir` {run_dir} exists already. {hint} another: --run-dir DIR.")
    if changed:
        listed = "; ".join(f"`{name}` is {old!r} there and {new!r} here" for name, (old, new) in changed.items())
        raise UserError(
            f"{run_dir} must be resumed with its own configuration: {listed}. Pass the same values, or choose another "
            "directory: --run-dir DIR."
        )


def _is_longer(config: Config, saved: dict[str, Any]) -> bool:
    """Returns whether `config` is `saved` with more epochs, none of whose steps depends on their number."""
    if config.optim.depends_on_length() or not config.num_epochs > saved["num_epochs"]:
        return False
    return encode(replace(config, num_epochs=saved["num_epochs"])) == saved


def check_data(run_dir: Path, facts: DataFacts) -> None:
    """Checks that an existing run was on these data.

    Raises:
      UserError: it was on other data.
    """
    if (run_dir / "config.json").exists():
        old = read_record(run_dir).data
        if (old.sha256, old.mean, old.std) != (facts.sha256, facts.mean, facts.std):
            raise UserError(
                f"{run_dir} must be resumed with its own data, SHA-256 {old.sha256}, mean {old.mean} and deviation "
                f"{old.std}, got {facts.sha256}, {facts.mean} and {facts.std} from {facts.source}. Pass the same "
                "--data-dir."
            )


def write_record(run_dir: Path, record: Record) -> None:
    """Writes config.json, or renews that of a shorter run. The directory must be locked."""
    path = run_dir / "config.json"
    if path.exists():
        if read_record(run_dir).config == record.config:
            return
        (run_dir / "result.json").unlink(missing_ok=True)  # Of the shorter run.
    write_json(path, asdict(record))


def check_links(run_dir: Path) -> None:
    """Checks that nothing in a run directory leads out of it.

    Raises:
      UserError: a link does.
    """
    for path in run_dir.glob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(run_dir.resolve()):
            raise UserError(f"A run directory must not contain a link that leads out of it, got {path}. Remove it.")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of metrics.jsonl or timing.jsonl, one per epoch (none before the first).

    Raises:
      UserError: a line is not JSON.
    """
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    except ValueError as error:
        raise UserError(
            f"{path} must hold one JSON object per line, got {error}. An unfinished run rewrites it: resume it with "
            "--resume. Train a finished one again: cnnjax reproduce."
        ) from error


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes all of metrics.jsonl or timing.jsonl: an epoch that is trained again must not appear twice."""
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """Returns the content of result.json, or None if the run has not finished."""
    path = run_dir / "result.json"
    return read_json(path) if path.exists() else None
