"""Reads and writes config.json, metrics.jsonl, timing.jsonl and result.json of a run directory.

They are data, perhaps from someone else: what is read is checked against `schema`, and none of it is executed.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cnnjax.config import Config
from cnnjax.data.batches import Standardization
from cnnjax.data.datasets import ImageDataset
from cnnjax.errors import UserError, check, for_reader, option, suggest
from cnnjax.files import (
    check_listed,
    check_local,
    is_inside,
    open_regular,
    parse_json,
    read_json,
    write_file,
    write_json,
)
from cnnjax.runs.codec import decode
from cnnjax.runs.manifest import check_format
from cnnjax.runs.schema import DataFacts, EncodedConfig, Result, Row, Timing

T = TypeVar("T")


def rewrite() -> str:
    """Returns the end of a message about a file that a resumed run writes again."""
    return f"Resume the run, which writes it again: {option('resume')}."


def run_argument() -> str:
    """Returns what a message calls the directory of a run that is read."""
    return for_reader("run", "run_dir")


@dataclass(frozen=True)
class Record:
    """The content of config.json.

    Attributes:
      config: the configuration as JSON, see `codec.encode`.
      data: what a trained network has to know about its data.
      files: the SHA-256 of each file that defines classes or functions of the configuration.
    """

    config: EncodedConfig
    data: DataFacts
    files: dict[str, str] = field(default_factory=dict)

    def decode(self, names: Mapping[str, Any]) -> Config:
        """Returns the configuration; `names` are the user's classes and functions, see `codec.decode`."""
        return decode(self.config, names, self.files)


def read_record(run_dir: Path) -> Record:
    """Reads config.json.

    Raises:
      UserError: it is missing, damaged or of another version, or a link leads out of the directory.
    """
    path = run_dir / "config.json"
    if not os.path.lexists(path):
        check_local(run_argument(), run_dir)
        check_readable(run_dir)
        rule = f"`{run_argument()}` must be the directory of a run, with a config.json"
        raise UserError(f"{rule}, got {run_dir}.{hint_at_runs(run_dir)}")
    check_links(run_dir)
    if os.path.lexists(run_dir / "manifest.json"):
        check_format(run_dir / "manifest.json")  # A run of another version may have other keys.
    return read_json(path, Record)


def check_readable(run_dir: Path) -> None:
    """Checks the permissions of a run directory.

    Raises:
      UserError: it cannot be read.
    """
    readable = not os.path.isdir(run_dir) or os.access(run_dir, os.R_OK | os.X_OK)
    check(run_argument(), "a directory that can be read", readable, f"{run_dir} (Permission denied)")


def hint_at_runs(run_dir: Path) -> str:
    """Returns the end of a message, with runs that may be meant: in `run_dir`, beside it, and in runs/."""
    folders = {run_dir, run_dir.parent, Path("runs")}
    runs = {str(path.parent) for folder in folders if folder.is_dir() for path in folder.glob("*/config.json")}
    return f" {suggest(str(run_dir), runs, 'Runs')}" if runs else ""


def make_facts(
    dataset: ImageDataset,
    standardization: Standardization,
    weights_sha256: str | None,
    *,
    num_train_examples: int,
    num_validation_examples: int,
) -> DataFacts:
    """Returns the facts of a data set, of the standardization and numbers of its images, and of pretrained weights."""
    return DataFacts(
        image_shape=dataset.image_shape,
        class_names=dataset.class_names,
        sha256=dataset.sha256,
        version=dataset.version,
        source=dataset.source,
        mean=tuple(standardization.mean.tolist()),
        std=tuple(standardization.std.tolist()),
        resize=dataset.fit.resize,
        interpolation=dataset.fit.interpolation,
        weights_sha256=weights_sha256,
        num_train_examples=num_train_examples,
        num_validation_examples=num_validation_examples,
    )


def data_version(run_dir: Path) -> str | None:
    """Returns the version of the data set of an existing run, or None."""
    return read_record(run_dir).data.version if (run_dir / "config.json").exists() else None


def write_record(run_dir: Path, record: Record) -> None:
    """Writes config.json, which names the source files of the last session. The directory must be locked."""
    path = run_dir / "config.json"
    old = read_record(run_dir) if path.exists() else None
    if old is not None and old.config != record.config:
        (run_dir / "result.json").unlink(missing_ok=True)  # The result of the shorter run.
    if old != record:
        write_json(path, asdict(record))


def check_links(run_dir: Path) -> None:
    """Checks that nothing in a run directory leads out of it.

    Raises:
      UserError: a link does.
    """
    for path in run_dir.iterdir() if run_dir.is_dir() else ():
        if path.is_symlink() and not is_inside(path, run_dir):
            raise UserError(f"A run directory must not contain a link that leads out of it, got {path}. Remove it.")


def read_rows(run_dir: Path) -> list[Row]:
    """Returns the rows of metrics.jsonl, one per epoch (none before the first).

    Raises:
      UserError: it cannot be read, or a line is not a `Row`.
    """
    path = run_dir / "metrics.jsonl"
    rows = _read_lines(path, Row)
    for i, row in enumerate(rows, 1):
        for name, value in row.items():  # The schema does not know the names of the user's own scores.
            if name.startswith(("train_", "validation_")) and type(value) not in (int, float):
                raise UserError(f"`{name}` in {path}, line {i} must be a number, got {value!r}. {rewrite()}")
    return rows


def read_timing(run_dir: Path) -> list[Timing]:
    """Returns the rows of timing.jsonl, see `read_rows`."""
    return _read_lines(run_dir / "timing.jsonl", Timing)


def _read_lines(path: Path, schema: type[T]) -> list[T]:
    if not os.path.lexists(path):
        return []
    try:
        with open_regular(path) as file:
            content = file.read()
    except OSError as error:
        raise UserError(f"{path} must be readable, got {error}. {rewrite()}") from error
    rows = [parse_json(line, schema, f"{path}, line {i}", rewrite()) for i, line in enumerate(content.splitlines(), 1)]
    check_listed(path, content, rewrite())
    return rows


def write_rows(path: Path, rows: Sequence[Row | Timing]) -> None:
    """Writes all of metrics.jsonl or timing.jsonl: an epoch that is trained again must not appear twice."""
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_result(run_dir: Path) -> Result | None:
    """Returns the content of result.json, or None if the run has not finished."""
    path = run_dir / "result.json"
    return read_json(path, Result, rewrite()) if os.path.lexists(path) else None
