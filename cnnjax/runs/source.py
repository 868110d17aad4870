"""The source code of a run: the commit, and a diff from it to the files of the working tree.

`git apply` turns a clean checkout of the commit into these files (into the line ends that .gitattributes declares). The
diff depends on their content and modes, and on what git ignores, but on nothing else that a user configures: it comes
from a temporary repository without configuration, which borrows the user's objects. The user's repository is only read.
"""

import hashlib
import os
import stat
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from cnnjax.config import Config
from cnnjax.runs.codec import check_complete, source_files
from cnnjax.runs.git import Git, join, plain_git, show, split, user_git

SOURCE = b".py"  # The untracked files that the diff includes; others may hold secrets.
FILE_LIMIT = 1 << 20  # Bytes; a larger untracked file is data.
NUM_FILES = 500  # If more files are untracked, they are no longer the user's own.
DIFF_LIMIT = 16 << 20  # Bytes of all files before and after the change; the diff has at most about twice as many.
UNREADABLE = "unreadable"
TIMEOUT = 30.0  # Seconds for all calls of git.


class SourceCode(NamedTuple):
    """The source code of a run.

    Attributes:
      facts: for a session of manifest.json.
      diff: from the commit to the working tree.
    """

    facts: dict[str, Any]
    diff: bytes

    def warnings(self) -> list[str]:
        """Returns the line that names what is not recorded, or none."""
        left_out = self.facts.get("left_out")
        return [f"The record of this run's source code lacks {'; '.join(left_out)}."] if left_out else []


NO_SOURCE = SourceCode({"files": {}}, b"")  # For a run that records nothing.


class _Code(NamedTuple):
    commit: str | None = None
    diff: bytes = b""
    left_out: tuple[str, ...] = ()


class _File(NamedTuple):
    """A file that differs from the commit. `id` and `mode` are those of the commit; empty for a new file."""

    name: bytes
    untracked: bool = False
    id: bytes = b""
    mode: bytes = b""
    deleted: bool = False


def source_code(*run_dirs: Path) -> SourceCode:
    """Returns the commit of the code and, if the working tree differs from it, the diff.

    "commit" belongs to the repository of the working directory; None if there is none, or no commit yet (then the diff
    starts from an empty folder). The diff covers its tracked files, and small untracked .py files that git does not
    ignore. If the package lies in another repository, "package_commit" names that one's commit, and the SHA-256 of
    its diff. "left_out" says what is missing and why: files beyond the limits, of a submodule, or converted by a filter
    as git-lfs does; or all, because git failed. "dirty": whether the code is, or may be, another than the commit's.

    Args:
      *run_dirs: not recorded, even if they are tracked.
    """
    deadline = time.monotonic() + TIMEOUT
    here, package = _repository(Path()), _repository(Path(__file__).parent)
    code = _read(here, run_dirs, deadline)
    left_out = code.left_out
    facts: dict[str, Any] = {"commit": code.commit}
    if package != here:
        other = _read(package, run_dirs, deadline)
        changed = f" and a diff, SHA-256 {_sha256(other.diff)}" if other.diff else ""
        if other.commit or changed:
            facts["package_commit"] = f"{other.commit or 'no commit'}{changed}"
        left_out += tuple(f"{what} in {show(os.fsencode(str(package)))}" for what in other.left_out)
    facts["dirty"] = bool(code.diff or left_out)
    if code.diff:
        facts["diff_sha256"] = _sha256(code.diff)
    if left_out:
        facts["left_out"] = [*left_out]
    return SourceCode(facts, code.diff)


def source_of(config: Config, *run_dirs: Path) -> SourceCode:
    """Returns `source_code`, and as "files" the SHA-256 of the files that define the user's classes and functions.

    Raises:
      UserError: a part of the configuration is missing, see `codec.check_complete`.
    """
    check_complete(config)
    code = source_code(*run_dirs)
    return code._replace(facts={**code.facts, "files": source_files(config)})


def _repository(folder: Path) -> Path | None:
    """Returns the folder that contains `folder` and .git, which git may refuse."""
    with suppress(OSError):  # The working directory may be deleted.
        folder = Path(os.path.realpath(folder))
        return next((path for path in (folder, *folder.parents) if os.path.lexists(path / ".git")), None)
    return None


def _read(repository: Path | None, run_dirs: Sequence[Path], deadline: float) -> _Code:
    if repository is None:
        return _Code()
    what, commit = "the commit and the changes since", None
    try:
        git = user_git(repository, deadline)
        head = git("rev-parse", "--quiet", "--verify", "HEAD", expected=(0, 1)).strip().decode()
        if not head:
            _check_unborn(git)
        what, commit = "the changes since the commit", head or None
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            diff, left_out = _diff(git, plain_git(git, Path(folder)), commit, run_dirs)
        return _Code(commit, diff, left_out)
    except (OSError, ValueError) as error:
        return _Code(commit, left_out=(f"{what} ({error})",))


def _check_unborn(git: Git) -> None:
    """Raises an OSError if HEAD is damaged, rather than without a commit."""
    try:
        git("log", "-1")
    except OSError as error:
        if "any commits yet" not in str(error):
            raise


def _diff(git: Git, plain: Git, commit: str | None, run_dirs: Sequence[Path]) -> tuple[bytes, tuple[str, ...]]:
    """Returns the diff, and what it lacks.

    Args:
      git, plain: run git in the user's repository, and in the one without configuration.
    """
    tree = commit or plain("hash-object", "-t", "tree", "--stdin").strip().decode()
    entries = {x.split(b"\t", 1)[1]: x for x in split(plain("ls-tree", "-r", "-z", "--full-tree", tree))}
    listed = [(x[:1], x[2:]) for x in split(git("ls-files", "-z", "-t", "--cached", "--others", "--exclude-standard"))]
    own = tuple(os.path.relpath(os.path.realpath(os.fsencode(path)), git.folder) + b"/" for path in run_dirs)
    new = {
        name: _File(name, untracked=tag == b"?")
        for tag, name in listed
        if name not in entries and not name.startswith(own) and (tag != b"?" or name.endswith((SOURCE, b"/")))
    }
    filtered = _filtered(git, [*entries, *new])
    sizes = {name: _size(git, name) for name in entries if not name.startswith(own)}
    unread = {name for name, size in sizes.items() if name in filtered or (isinstance(size, int) and size > DIFF_LIMIT)}
    unreadable = {name for name, size in sizes.items() if size == UNREADABLE}
    sparse = {name for tag, name in listed if tag == b"S" and not os.path.lexists(os.path.join(git.folder, name))}
    unseen = unread | unreadable | (sparse & entries.keys()) | (entries.keys() - sizes.keys())

    left_out: dict[str, list[bytes]] = defaultdict(list)
    changed = unread & _changed_by_time(git, plain, tree) if unread else set()
    left_out[f"above {DIFF_LIMIT >> 20} MiB"] += sorted(changed - filtered)
    left_out["converted by a filter of git"] += sorted((changed | new.keys()) & filtered)
    left_out[UNREADABLE] += sorted(unreadable)
    modules = [name for name, entry in entries.items() if entry.startswith(b"160000 ")]
    left_out["changes in a submodule"] += [name for name in modules if _is_dirty(git, name)]

    _add_entries(plain, (entry for name, entry in entries.items() if name not in unseen))
    plain("update-index", "-q", "--refresh", expected=(0, 1))  # Compares the contents.
    files = [*_changed(plain), *(file for name, file in new.items() if name not in filtered)]
    chosen = _choose(plain, files, left_out)

    # An entry with any ID stands for a new file: its content is read from the working tree.
    any_id = next(iter(entries.values())).split()[2].decode() if entries else tree
    added = (f"100644 blob {any_id}\t".encode() + file.name for file in chosen if not file.mode)
    _add_entries(plain, (*(entries[name] for name in unseen), *added))
    unseen |= {file.name for file in files if file.mode} - {file.name for file in chosen}
    plain("update-index", "-z", "--skip-worktree", "--stdin", stdin=join(unseen))
    options = ("--patch", "--binary", "--full-index", "--no-renames", "--ignore-submodules=dirty")
    diff = plain("diff-index", *options, tree) if chosen else b""
    return diff, tuple(f"{_names(names)} ({reason})" for reason, names in left_out.items() if names)


def _changed(plain: Git) -> list[_File]:
    """Returns the entries of the index that differ from the working tree."""
    fields = split(plain("diff-files", "--raw", "-z", "--no-abbrev", "--no-renames", "--ignore-submodules=dirty"))
    files = []
    for raw, name in zip(fields[::2], fields[1::2], strict=True):
        mode, _, before, _, status = raw.removeprefix(b":").split(b" ")
        files.append(_File(name, id=before, mode=mode, deleted=status == b"D"))
    return files


def _choose(plain: Git, files: list[_File], left_out: dict[str, list[bytes]]) -> list[_File]:
    """Returns the files that the diff covers: tracked ones first, then those near the root. Notes the others."""
    blobs = [file.id for file in files if file.mode not in (b"", b"160000")]
    found = plain("cat-file", "--batch-check", stdin=b"".join(x + b"\n" for x in blobs)).splitlines()
    sizes = dict(zip(blobs, found, strict=True))
    chosen, total, num_untracked = [], 0, 0
    for file in sorted(files, key=lambda file: (file.untracked, file.name.count(b"/"), file.name)):
        before = sizes.get(file.id, b"0").split()[-1]
        after = 0 if file.deleted or file.mode == b"160000" else _size(plain, file.name)
        if not before.isdigit():
            left_out["whose old content is missing from git's objects"].append(file.name)
        elif isinstance(after, str):
            left_out[after].append(file.name)
        elif file.untracked and after > FILE_LIMIT:
            left_out[f"untracked and above {FILE_LIMIT >> 10} KiB"].append(file.name)
        elif (file.untracked and num_untracked == NUM_FILES) or total + int(before) + after > DIFF_LIMIT:
            left_out[f"beyond {NUM_FILES} untracked files or {DIFF_LIMIT >> 20} MiB"].append(file.name)
        else:
            chosen.append(file)
            total += int(before) + after
            num_untracked += file.untracked
    return chosen


def _size(git: Git, name: bytes) -> int | str:
    """Returns the bytes that a file has in the working tree, or why it cannot be recorded."""
    path = os.path.join(git.folder, name)
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError:
        return UNREADABLE
    if stat.S_ISDIR(status.st_mode):
        return "another repository"
    if not stat.S_ISLNK(status.st_mode) and not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    return status.st_size if stat.S_ISLNK(status.st_mode) or os.access(path, os.R_OK) else UNREADABLE


def _filtered(git: Git, names: Iterable[bytes]) -> set[bytes]:
    """Returns the names whose content a filter, such as git-lfs, converts between the working tree and git."""
    fields = split(git("check-attr", "-z", "--stdin", "filter", stdin=join(names)))
    values = zip(fields[::3], fields[2::3], strict=True)
    return {name for name, value in values if value not in (b"unspecified", b"unset", b"set")}


def _changed_by_time(git: Git, plain: Git, tree: str) -> set[bytes]:
    """Returns the files that differ from `tree` in the user's index, or from the file times there. Reads no content."""
    index = os.fsdecode(git.path("--git-path", "index"))
    with_index = replace(plain, environment={**plain.environment, "GIT_INDEX_FILE": index})
    return {*split(with_index("diff-index", "--name-only", "-z", "--ignore-submodules=all", tree))}


def _is_dirty(git: Git, name: bytes) -> bool:
    """Returns whether the files of a submodule differ, or may differ, from its commit."""
    folder = os.path.join(git.folder, name)
    if not os.path.lexists(os.path.join(folder, b".git")):
        return False
    try:
        return bool(replace(git, folder=folder)("status", "--porcelain", "--untracked-files=normal"))
    except OSError:
        return True


def _add_entries(plain: Git, entries: Iterable[bytes]) -> None:
    plain("update-index", "-z", "--index-info", stdin=join(entries))


def _names(names: list[bytes]) -> str:
    """Returns the first names, and the number of others."""
    shown = ", ".join(map(show, names[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _sha256(diff: bytes) -> str:
    return hashlib.sha256(diff).hexdigest()
