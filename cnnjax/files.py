"""Atomic writes, and checksums of files and arrays.

SHA256SUMS has the format of coreutils: `sha256sum -c SHA256SUMS` in the same folder checks the files without cnnjax.
"""

import errno
import hashlib
import itertools
import json
import os
import re
import reprlib
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np
from jaxtyping import PyTree

from cnnjax.errors import UserError
from cnnjax.sharding import fetch

if TYPE_CHECKING:
    from pydantic import TypeAdapter

SUMS = "SHA256SUMS"
RESTORE = "Restore the file, or train again."
T = TypeVar("T")


def cache_dir() -> Path | None:
    """Returns cnnjax's folder for what can be made again, $XDG_CACHE_HOME/cnnjax or ~/.cache/cnnjax.

    A relative $XDG_CACHE_HOME is ignored, as the XDG Base Directory Specification demands. Returns None if there is no
    home directory.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (folder if folder.is_absolute() else Path.home() / ".cache") / "cnnjax"
    except RuntimeError:  # The user is unknown to the system and has no $HOME.
        return None


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
    except OSError as error:
        error.filename = error.filename or str(path)  # For the message.
        raise
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def sync(*paths: Path) -> None:
    """Waits until files and folders (the names in them, not the files) are on the disk, as `fsync` does."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_file(path: Path, content: str | bytes, shared: bool = False) -> None:
    """Writes a file atomically (see `atomic_write`)."""
    with atomic_write(path, shared) as file:
        file.write(content.encode(errors="surrogateescape") if isinstance(content, str) else content)


def write_json(path: Path, content: Any, shared: bool = False) -> None:
    """Writes a JSON file atomically (see `atomic_write`).

    Lone surrogates, as in file names that are not UTF-8, become escapes.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    text = re.sub(r"\[\n[\d,\s]+\]", lambda row: json.dumps(json.loads(row[0])), text)  # Integers share a line.
    write_file(path, re.sub("[\ud800-\udfff]", lambda found: f"\\\\u{ord(found[0]):x}", text), shared)


def check_local(parameter: str, path: Path) -> None:
    """Checks that a path is not a URL such as gs://bucket/folder, of which `Path` makes a folder "gs:".

    Raises:
      UserError: it is one.
    """
    scheme = path.parts[0] if path.parts else ""
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+:", scheme) and not Path(scheme).exists():
        raise UserError(f"`{parameter}` must be a local folder, got {path}. Mount it, or copy the files.")


def open_regular(path: Path) -> BufferedReader:
    """Opens a regular file for reading. Does not wait for a pipe or a device.

    Raises:
      OSError: if it cannot be read, or is not a regular file.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return file


def read_json(path: Path, schema: type[T], fix: str = RESTORE, *, listed: bool = True) -> T:
    """Reads a JSON file, and checks its content: types, bounds, and the SHA-256 if SHA256SUMS in its folder has it.

    Args:
      path: the file.
      schema: a dataclass or `TypedDict`, perhaps with pydantic's annotations. An int may stand for a float; apart from
        that nothing is converted.
      fix: the end of an error message.
      listed: whether to check the SHA-256.

    Raises:
      UserError: if it cannot be read, or has another content; the message names the key, the rule and the value.
    """
    try:
        with open_regular(path) as file:
            content = file.read()
    except OSError as error:
        raise UserError(f"{path} must be a readable JSON file, got {error}. {fix}") from error
    value = parse_json(content, schema, path, fix)
    if listed:
        check_listed(path, content, fix)
    return value


def check_listed(path: Path, content: bytes, fix: str = RESTORE) -> None:
    """Checks the SHA-256 of the content of a file, if SHA256SUMS in its folder has it.

    Raises:
      UserError: it is another one; `fix` ends the message.
    """
    with suppress(OSError, UnicodeDecodeError):
        expected = _read_sums(path.parent)[0].get(path.name)
        if expected in (None, hashlib.sha256(content).hexdigest()):
            return
        if _read_sums(path.parent)[0].get(path.name) == file_sha256(path):
            return  # A session began or ended meanwhile.
        raise UserError(
            f"{path} must match its checksum in {SUMS}, got other bytes: one of the two is damaged. {fix} If it is "
            f"{SUMS}, remove that."
        )


def parse_json(content: str | bytes, schema: type[T], source: object, fix: str = RESTORE) -> T:
    """Returns the JSON value in `content`; see `read_json`. The message of an error begins with `source`."""
    from pydantic import ValidationError  # `cnnjax --help` does not need it.

    try:
        return _adapter(schema).validate_json(content, strict=True)
    except UserError as error:  # Raised by a dataclass.
        raise UserError(f"{source}: {error} {fix}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        rule, got = first["msg"].partition(" should ")[2] or first["msg"], reprlib.repr(first["input"])
        if first["type"] == "missing":
            rule, got = "be there", "nothing"
        elif first["type"] == "json_invalid":
            rule, got = "be JSON", first["msg"].removeprefix("Invalid JSON: ")
        subject = f"`{key}` in {source}" if key else str(source)
        raise UserError(f"{subject} must {rule}, got {got}. {fix}") from error


@cache
def _adapter(schema: type[T]) -> "TypeAdapter[T]":
    """Returns pydantic's compiled form of a schema, which takes a millisecond to make."""
    from pydantic import TypeAdapter

    return TypeAdapter(schema)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested dicts as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        nested = isinstance(value, Mapping) and value
        flat.update(flatten(value, f"{prefix}{name}.") if nested else {prefix + name: value})
    return flat


def changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns the values that differ between two nested dicts: {dotted name: (in a, in b)}. Nan equals nan."""
    x, y = flatten(a), flatten(b)
    same = {name for name in x.keys() & y.keys() if x[name] == y[name] or (x[name] != x[name] and y[name] != y[name])}
    return {name: (x.get(name), y.get(name)) for name in {**x, **y} if name not in same}


def file_changes(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Returns the `changes` between two dicts, without files that have the same SHA-256 under another path.

    Paths are relative to the working directory, which another session may not share.

    Args:
      prefix: begins the dotted names of the SHA-256 of files.
    """
    found = changes(a, b)
    one_sided = {name: pair for name, pair in found.items() if name.startswith(prefix) and None in pair}
    old, new = ({pair[i] for pair in one_sided.values()} for i in (0, 1))
    moved = {name for name, (x, y) in one_sided.items() if (x or y) in old & new}
    return {name: pair for name, pair in found.items() if name not in moved}


def show(value: Any) -> str:
    """Returns a value in words, with the first 8 digits of each digest."""
    return re.sub(r"\b([0-9a-f]{8})[0-9a-f]{32,}\b", r"\1", str(value))


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of the content of a regular file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_key(leaf: Any) -> bool:
    """Returns whether a leaf of a state holds PRNG keys, such as those of `optax.noisy_sgd`."""
    return jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def raw_keys(tree: PyTree) -> PyTree:
    """Returns the tree with the bits of PRNG keys, uint32, in place of the keys."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree)


def tree_sha256(tree: PyTree) -> str:
    """Returns the SHA-256 of the path, dtype, shape and bytes of every leaf. Waits for the device."""
    hasher = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(raw_keys(tree)):
        array = np.asarray(fetch(leaf))  # One after another: together they may not fit.
        hasher.update(f"{jax.tree_util.keystr(path)} {array.dtype} {list(array.shape)}\n".encode())
        hasher.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return hasher.hexdigest()


def write_sums(folder: Path, names: Iterable[str], shared: bool = False) -> None:
    """Writes SHA256SUMS for the files `names` of `folder`, which are relative paths; `shared`: see `atomic_write`."""
    lines = [f"{file_sha256(folder / name)}  {name}\n" for name in sorted(names)]
    write_file(folder / SUMS, "".join(lines), shared)


def check_sums(folder: Path) -> dict[str, str]:
    """Compares every file below `folder` with SHA256SUMS.

    Returns:
      The status of each file, by its relative path: "ok", "missing", "damaged", "no checksum", "outside the folder" (a
      link, or a name with ..), or "unreadable" with the reason. SHA256SUMS is "damaged" if a line is malformed. If it
      is not "ok" itself, the status of other files may be unknown.
    """
    try:
        sums, is_whole = _read_sums(folder)
    except UnicodeDecodeError:
        return {SUMS: "damaged"}
    except OSError as error:
        return {SUMS: _status_of(error)}
    present = set()
    for root, folders, names in os.walk(folder):
        names += [name for name in folders if Path(root, name).is_symlink()]
        present |= {Path(root, name).relative_to(folder).as_posix() for name in names}
    status = {name: _status(folder, name, sums.get(name)) for name in [*sums, *sorted(present - {*sums, SUMS})]}
    return status | ({} if is_whole else {SUMS: "damaged"})


def _read_sums(folder: Path) -> tuple[dict[str, str], bool]:
    """Returns the SHA-256 of each file that SHA256SUMS names, and whether all of its lines are well-formed."""
    with open_regular(folder / SUMS) as file:
        lines = file.read().decode().split("\n")
    parsed = [re.fullmatch(r"([0-9a-f]{64})  ([^\0]+)", line) for line in lines]
    return {line[2]: line[1] for line in parsed if line}, all(parsed[:-1]) and not lines[-1]


def is_inside(path: Path, folder: Path) -> bool:
    """Returns whether a path stays in a folder when all links are followed."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _status(folder: Path, name: str, sha256: str | None) -> str:
    path = folder / name
    if not is_inside(path, folder):
        return "outside the folder"
    if sha256 is None:
        return "no checksum"
    try:
        return "ok" if file_sha256(path) == sha256 else "damaged"
    except OSError as error:
        return _status_of(error)


def _status_of(error: OSError) -> str:
    missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
    return "missing" if missing else f"unreadable ({error.strerror})"


def move_into(folder: Path, path: Path) -> Path:
    """Moves `path` into `folder`, under a name that is free; returns the new path."""
    folder.mkdir(exist_ok=True)
    targets = (folder / (f"{path.name}.{i}" if i else path.name) for i in itertools.count())
    return path.rename(next(target for target in targets if not os.path.lexists(target)))
