"""Files that are whole or not there, and whose bytes can be checked: atomic writes and SHA256SUMS.

SHA256SUMS is the format of coreutils: `sha256sum -c SHA256SUMS` in the same folder checks it without this package.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from cnnjax.errors import UserError

SUMS = "SHA256SUMS"


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader sees the old content or the new, also after a power cut, never a part.

    Raises:
      OSError: a full disk, a missing permission; what was there before is still there.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content.encode(errors="surrogateescape") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file whole."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
      UserError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} must be a readable JSON file, got {error}. Restore it, or train anew.") from error


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_sha256(tree: PyTree) -> str:
    """Returns the SHA-256 of the leaves' paths, dtypes, shapes and bytes. Waits for the device."""
    hasher = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(tree)):
        array = np.asarray(leaf)
        hasher.update(f"{jax.tree_util.keystr(path)} {array.dtype} {list(array.shape)}\n".encode())
        hasher.update(array.tobytes())
    return hasher.hexdigest()


def write_sums(folder: Path, names: Iterable[str]) -> None:
    """Writes SHA256SUMS of the files of `folder` that are named (as relative paths)."""
    lines = [f"{file_sha256(folder / name)}  {name}\n" for name in sorted(names)]
    write_whole(folder / SUMS, "".join(lines))


def check_sums(folder: Path) -> dict[str, str]:
    """Compares every file below `folder` with SHA256SUMS.

    Returns:
      Of each file, by its relative path: "ok", or what is wrong: "missing", "damaged", "no checksum", "leads out of the
      folder" (a link, or a name with ..). A SHA256SUMS that cannot be read counts as a file that is damaged.
    """
    try:
        lines = (folder / SUMS).read_text().splitlines()
    except (OSError, ValueError):
        return {SUMS: "missing"}
    found: dict[str, str] = {}
    for line in lines:
        parsed = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
        if parsed is None:
            found[SUMS] = "damaged"
            continue
        sha256, name = parsed.groups()
        found[name] = _check(folder, name, sha256)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in found and name != SUMS and (path.is_symlink() or path.is_file()):
            found[name] = "leads out of the folder" if _leads_out(folder, path) else "no checksum"
    return found


def _check(folder: Path, name: str, sha256: str) -> str:
    path = folder / name
    if _leads_out(folder, path):
        return "leads out of the folder"
    try:
        return "ok" if file_sha256(path) == sha256 else "damaged"
    except OSError:
        return "missing"


def _leads_out(folder: Path, path: Path) -> bool:
    return not path.resolve().is_relative_to(folder.resolve())
