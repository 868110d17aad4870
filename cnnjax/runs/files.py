"""Atomic writes, and checksums of files and arrays.

SHA256SUMS has the format of coreutils: `sha256sum -c SHA256SUMS` in the same folder checks the files without cnnjax.
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from jaxtyping import PyTree

from cnnjax.errors import UserError

SUMS = "SHA256SUMS"


@contextmanager
def atomic_write(path: Path, shared: bool = False) -> Iterator[IO[bytes]]:
    """Opens a temporary file that replaces `path` if the block succeeds.

    Readers see the old content or the new content, never a part of it, even after a power failure.

    Args:
      path: the file to replace.
      shared: whether several processes or threads may write `path` at the same time.

    Raises:
      OSError: if the disk is full or cannot be written; `path` is unchanged.
    """
    writer = f".{os.getpid()}.{threading.get_ident()}" if shared else ""
    partial = path.with_name(f"{path.name}{writer}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_file(path: Path, content: str | bytes) -> None:
    """Writes a file atomically (see `atomic_write`)."""
    with atomic_write(path) as file:
        file.write(content.encode(errors="surrogateescape") if isinstance(content, str) else content)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file atomically."""
    write_file(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
      UserError: if it is missing or damaged.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} must be a readable JSON file, got {error}. Restore it or train again.") from error


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested dicts as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        nested = isinstance(value, Mapping) and value
        flat.update(flatten(value, f"{prefix}{name}.") if nested else {prefix + name: value})
    return flat


def changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns the values that differ between two nested dicts: {dotted name: (in a, in b)}."""
    x, y = flatten(a), flatten(b)
    same = {name for name in x.keys() & y.keys() if x[name] == y[name]}
    return {name: (x.get(name), y.get(name)) for name in {**x, **y} if name not in same}


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of the content of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_sha256(tree: PyTree) -> str:
    """Returns the SHA-256 of the path, dtype, shape and bytes of every leaf. Waits for the device."""
    hasher = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(tree)):
        array = np.asarray(leaf)
        hasher.update(f"{jax.tree_util.keystr(path)} {array.dtype} {list(array.shape)}\n".encode())
        hasher.update(array.tobytes())
    return hasher.hexdigest()


def write_sums(folder: Path, names: Iterable[str]) -> None:
    """Writes SHA256SUMS for the files `names` of `folder`, which are relative paths."""
    write_file(folder / SUMS, "".join(f"{file_sha256(folder / name)}  {name}\n" for name in sorted(names)))


def check_sums(folder: Path) -> dict[str, str]:
    """Compares every file below `folder` with SHA256SUMS.

    Returns:
      The status of each file, by its relative path: "ok", "missing", "damaged", "no checksum", or "outside the folder"
      (a link, or a name with ..). SHA256SUMS is "missing" if it cannot be read, and "damaged" if a line is malformed.
    """
    try:
        lines = [re.fullmatch(r"([0-9a-f]{64})  (.+)", line) for line in (folder / SUMS).read_text().splitlines()]
    except (OSError, ValueError):
        return {SUMS: "missing"}
    sums = {line[2]: line[1] for line in lines if line}
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or path.is_file()}
    status = {name: _status(folder, name, sums.get(name)) for name in [*sums, *sorted(present - {*sums, SUMS})]}
    return status | ({} if all(lines) else {SUMS: "damaged"})


def _status(folder: Path, name: str, sha256: str | None) -> str:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        return "outside the folder"
    if sha256 is None:
        return "no checksum"
    try:
        return "ok" if file_sha256(path) == sha256 else "damaged"
    except OSError:
        return "missing"
