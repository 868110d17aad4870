"""ImageNet (ILSVRC 2012) from its official archives, which users have to fetch themselves, without TensorFlow.

The records are those of the stock builder of TensorFlow Datasets, which needs TensorFlow: the same JPEG files with the
same keys, hence in the same order. Only the few files that are no RGB or gray JPEG are encoded again, by Pillow.
"""

import io
import re
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from cnnjax.data.tfds_format import write_examples
from cnnjax.errors import UserError
from cnnjax.files import open_regular

NAME = "imagenet2012"
ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}
JPEG_QUALITY = 100  # As tfds writes these files.


def archive_folder(data_dir: Path) -> Path:
    """Returns the folder where tfds expects files that users have to fetch."""
    return data_dir / "downloads" / "manual"


def check_archives(data_dir: Path) -> None:
    """Checks that the official archives are there.

    Raises:
      UserError: one is not; the message says where to get it.
    """
    folder = archive_folder(data_dir)
    if missing := [name for name in ARCHIVES.values() if not (folder / name).exists()]:
        raise UserError(
            f"`dataset` {NAME!r} is not prepared in {data_dir}, and its archives must be fetched by hand: register on "
            f"https://image-net.org/download-images, put {' and '.join(missing)} into {folder}, and repeat the command."
            f" TensorFlow is not needed. Or copy a directory that was prepared elsewhere to {data_dir / NAME}."
        )


def write_imagenet(data_dir: Path, stage: Path, say: Callable[[str], None]) -> Path:
    """Writes the archives in `data_dir` as the prepared tfds set in `stage`.

    Returns:
      The folder of the prepared version.

    Raises:
      UserError: an archive cannot be read.
      OSError: the disk is full or cannot be written.
    """
    import tensorflow_datasets as tfds

    stock, folder = tfds.builder_cls(NAME), archive_folder(data_dir)
    labels = (files("tensorflow_datasets") / "datasets" / NAME / "validation_labels.txt").read_text().split()
    say(f"writing {NAME} in the format of TensorFlow Datasets")
    splits = {
        "train": partial(_examples, folder / ARCHIVES["train"], _train_files),
        "validation": partial(_examples, folder / ARCHIVES["validation"], partial(_validation_files, labels)),
    }
    info: Any = stock._info  # The stock description, features and citation; downloads nothing.
    return write_examples(NAME, str(stock.VERSION), info, splits, stage, pkg_dir_path=stock.pkg_dir_path)


def _examples(
    path: Path, read: Callable[[tarfile.TarFile], Iterator[tuple[str, str, bytes]]], features: Any
) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with open_regular(path) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            known, empty = {*features["label"].names}, True
            for name, label, data in read(tar):
                if label not in known:
                    raise ValueError(f"the class {label!r}")
                yield name, {"file_name": name, "label": label, "image": io.BytesIO(_as_jpeg(name, data))}
                empty = False
            if empty:
                raise ValueError("no images")
    except (tarfile.TarError, EOFError, LookupError, ValueError) as error:
        raise UserError(f"{path} must be the official archive of ImageNet, got {error}. Fetch it again.") from error


def _train_files(tar: tarfile.TarFile) -> Iterator[tuple[str, str, bytes]]:
    """Yields name, class and content of each file in the archives of the classes."""
    for member in tar:
        with tarfile.open(fileobj=_content(tar, member), mode="r:") as of_class:
            for image in of_class:
                yield image.name, Path(member.name).stem, _content(of_class, image).read()


def _validation_files(labels: list[str], tar: tarfile.TarFile) -> Iterator[tuple[str, str, bytes]]:
    """Yields name, class and content of each file; the number in its name selects the class."""
    for member in tar:
        match = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", member.name)
        if match is None or not 1 <= int(match[1]) <= len(labels):
            raise ValueError(f"the file {member.name!r}")
        yield member.name, labels[int(match[1]) - 1], _content(tar, member).read()


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Any:
    if (file := tar.extractfile(member)) is None:
        raise ValueError(f"{member.name!r}, which is no file")
    return file


def _as_jpeg(name: str, data: bytes) -> bytes:
    """Returns the file itself if it is an RGB or gray JPEG, else the image as an RGB JPEG."""
    from PIL import Image, UnidentifiedImageError

    try:
        opened = Image.open(io.BytesIO(data))  # Reads the header only.
    except UnidentifiedImageError as error:
        raise ValueError(f"the file {name!r}, which is no image") from error
    with opened as image:
        if image.format == "JPEG" and image.mode in ("L", "RGB"):
            return data
        file = io.BytesIO()
        image.convert("RGB").save(file, "JPEG", quality=JPEG_QUALITY)
        return file.getvalue()
