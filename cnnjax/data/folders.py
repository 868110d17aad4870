"""The tfds directory: the versions that it holds, and the atomic publication of a new one."""

import difflib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path

from filelock import FileLock, Timeout

from cnnjax.errors import UserError, option
from cnnjax.files import check_local

_VERSION = re.compile(r"\d+\.\d+\.\d+", re.ASCII)
_INFO = "dataset_info.json"  # The last file that tfds writes.
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


def default_data_dir() -> Path:
    """Returns the folder that tfds uses: $TFDS_DATA_DIR, or ~/tensorflow_datasets.

    Raises:
      UserError: there is no home directory, or it is not a local folder.
    """
    return absolute(Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"))


def absolute(data_dir: Path) -> Path:
    """Returns the absolute path of a tfds directory.

    Raises:
      UserError: there is no home directory for its ~, or it is not a local folder.
    """
    check_local("data_dir", data_dir)
    try:
        return data_dir.expanduser().absolute()
    except RuntimeError as error:
        raise UserError(
            f"`data_dir` must be without ~ for a user without a home directory, got {data_dir}. Name a folder with "
            f"{option('data_dir', 'DIR')} or $TFDS_DATA_DIR."
        ) from error


# --- What a directory holds -----------------------------------------------------------------------------------------


def prepared_folder(name: str, data_dir: Path, version: str | None = None, *, exact: bool = False) -> Path | None:
    """Returns `version` of a set if it is prepared in `data_dir`, else the newest prepared one unless `exact`, or None.

    Raises:
      UserError: the folder of the set cannot be read.
    """
    found = versions(name, data_dir)
    if not found or (exact and version not in found):
        return None
    return data_dir / name / (version if version in found else found[-1])


def versions(name: str, data_dir: Path) -> list[str]:
    """Returns the versions of a set that are prepared in `data_dir`, from the oldest to the newest.

    Raises:
      UserError: the folder of the set cannot be read.
    """
    folders = [folder for folder in _entries(data_dir / name) if _VERSION.fullmatch(folder.name) and _is_there(folder)]
    return sorted((folder.name for folder in folders), key=lambda name: [int(number) for number in name.split(".")])


def _is_there(folder: Path) -> bool:
    with _unreadable(folder):
        (folder / _INFO).lstat()
        return True
    return False


def _entries(folder: Path) -> list[Path]:
    with _unreadable(folder):
        return list(folder.iterdir())
    return []


@contextmanager
def _unreadable(folder: Path) -> Iterator[None]:
    """Ignores that `folder` does not exist; turns other errors into one that names it."""
    try:
        yield
    except ValueError:  # A zero byte in the name.
        pass
    except OSError as error:
        if error.errno not in _ABSENT:
            raise UserError(
                f"`data_dir` must be a directory that can be read, got {folder} ({error.strerror}). Fix this, or "
                f"choose another one: {option('data_dir', 'DIR')}."
            ) from error


def describe(name: str, data_dir: Path) -> str:
    """Returns a sentence that says why `data_dir` has no set `name`."""
    if not data_dir.exists():
        return f"The folder {data_dir} (`data_dir`) does not exist."
    if not data_dir.is_dir():
        return f"{data_dir} is not a folder."
    if unfinished := sorted(path.name for path in _entries(data_dir / name)):
        return f"{data_dir / name} holds no finished version, only {', '.join(unfinished[:5])}."
    return f"{data_dir} holds {', '.join(_prepared_names(data_dir)[:20]) or 'no prepared set'}."


def _prepared_names(data_dir: Path) -> list[str]:
    """Returns the names of the sets in `data_dir`, such as "mnist" or "name/config". Ignores what cannot be read."""
    infos = [info for pattern in ("*/*", "*/*/*") for info in glob(f"{pattern}/{_INFO}", root_dir=data_dir)]
    folders = {Path(info).parent for info in infos}
    return sorted(folder.parent.as_posix() for folder in folders if _VERSION.fullmatch(folder.name))


def unknown_set(name: str, data_dir: Path, known: Iterable[str]) -> UserError:
    """Returns the error for a set that `data_dir` does not hold, and that is not one of the `known` ones.

    It suggests similar names, including those of folders in the working directory.
    """
    folders = {folder.rstrip("/") for folder in glob("*/")}
    near = difflib.get_close_matches(name.lower(), {*known, *_prepared_names(data_dir), *folders}, n=3, cutoff=0.75)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    here = f"There is no folder {name} here, either."
    return UserError(f"`dataset` must be a known name, got {name!r}. {hint}{describe(name, data_dir)} {here}")


# --- How a version gets there ---------------------------------------------------------------------------------------


@contextmanager
def exclusive(name: str, data_dir: Path, say: Callable[[str], None]) -> Iterator[bool]:
    """Locks a set in `data_dir`, so that one process at a time prepares or decodes it, and yields whether it is locked.

    Waits for another process, and says so. Continues without a lock if the file system has none or cannot be written.
    """
    lock = FileLock(data_dir / f"{_prefix(name)}lock", fallback_to_soft=False)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"waiting for another process, which prepares {name} in {data_dir}")
            lock.acquire()
    except (OSError, NotImplementedError):
        pass
    try:
        yield lock.is_locked
    finally:
        lock.release()


@contextmanager
def staging(name: str, data_dir: Path, locked: bool) -> Iterator[Path]:
    """Makes a tfds directory inside `data_dir` in which to prepare a set, and removes it at the end.

    Removes those of killed processes, too, if the set is `locked`: nobody can be working in them.

    Raises:
      OSError: `data_dir` cannot be written.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    for left in data_dir.iterdir() if locked else ():
        if re.fullmatch(re.escape(_prefix(name)) + r"[a-z0-9_]{8}", left.name):  # The names of `mkdtemp`.
            shutil.rmtree(left, ignore_errors=True)
    try:
        folder = Path(tempfile.mkdtemp(prefix=_prefix(name), dir=data_dir))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(data_dir)) from error  # mkdtemp's names its own folder.
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _prefix(name: str) -> str:
    return f".cnnjax-{name.replace('/', '-')}."


def check_free(folder: Path) -> None:
    """Checks that the folder of a version, which is not prepared, is absent or empty.

    Raises:
      UserError: it holds something else.
    """
    if (held := _entries(folder)) or (folder.exists() and not folder.is_dir()):
        got = f"a folder with {held[0].name}" if held else "a file"
        raise UserError(f"{folder} must be a prepared set, empty or absent, got {got}. Move it away.")


def publish(folder: Path, stage: Path, data_dir: Path) -> Path:
    """Moves a version from a staging directory to `data_dir`, unless another process has already published it.

    Raises:
      OSError: `data_dir` cannot be written.
    """
    target = data_dir / folder.relative_to(stage)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.rename(target)
    except OSError:
        if not (target / _INFO).exists():
            raise
    return target
