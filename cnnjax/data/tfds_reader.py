"""Decodes the shards of a prepared tfds directory, ArrayRecord or TFRecord, without TensorFlow."""

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cnnjax.cli.console import track
from cnnjax.errors import UserError


class Examples(NamedTuple):
    """Images and labels in memory."""

    image: np.ndarray  # uint8 [N H W C]
    label: np.ndarray  # int32 [N]


def decode(folder: Path, split: str) -> Examples:
    """Decodes a split of a prepared tfds directory, in record order.

    Raises:
      UserError: there is no such split, no image and label, or images of different shapes.
    """
    import tensorflow_datasets as tfds

    builder = _builder(folder)
    features, splits = builder.info.features, builder.info.splits
    if split not in splits:
        raise UserError(f"{folder} must have a split {split!r}, got {sorted(splits)}.")
    image_name, label_name = _image_and_label(builder)
    kinds = (tfds.features.Image, tfds.features.ClassLabel)
    if not all(
        name in features and isinstance(features[name], kind)
        for name, kind in zip((image_name, label_name), kinds, strict=True)
    ):
        raise UserError(f"{folder} must hold images with one class label each, got the features {sorted(features)}.")
    if features[image_name].np_dtype != np.uint8:
        raise UserError(f"{folder} must hold 8-bit images, got {np.dtype(features[image_name].np_dtype)}.")

    count = splits[split].num_examples
    image, label, read = None, np.empty(count, np.int32), 0
    for row in track(_rows(builder, split), f"decoding {split}", total=count):
        if image is None:
            image = np.empty((count, *row[image_name].shape), np.uint8)
        if row[image_name].shape != image.shape[1:]:
            raise UserError(
                f"{folder} must hold images of one shape, got {image.shape[1:]} and {row[image_name].shape} "
                f"(record {read})."
            )
        if read < count:
            image[read], label[read] = row[image_name], row[label_name]
        read += 1
    if image is None or read != count:
        raise UserError(f"{folder} must hold {count or 'some'} examples in its split {split!r}, got {read}.")
    num_classes = features[label_name].num_classes
    if label.min() < 0 or label.max() >= num_classes:
        raise UserError(
            f"{folder} must label each image of its split {split!r} with one of {num_classes} classes, got labels from "
            f"{label.min()} to {label.max()}."
        )
    return Examples(image, label)


def _builder(folder: Path) -> Any:
    """Returns the builder of a prepared directory.

    Raises:
      UserError: dataset_info.json or features.json is damaged.
    """
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(folder)
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # Parsers of protocol buffers and of JSON have errors of their own.
        raise UserError(
            f"{folder} is damaged: its description cannot be read ({error}). Move it away, and run the command again "
            "to prepare the set anew."
        ) from error


def _rows(builder: Any, split: str) -> Iterator[dict[str, Any]]:
    """Yields the decoded examples of a split, in record order.

    Raises:
      UserError: the shards are damaged.
    """
    import tensorflow_datasets as tfds

    info = builder.info
    try:
        if info.file_format not in (tfds.core.FileFormat.TFRECORD, tfds.core.FileFormat.ARRAY_RECORD):
            raise UserError(
                f"{builder.data_dir} must be in the format tfrecord or array_record, got {info.file_format.value}."
            )
        if info.file_format == tfds.core.FileFormat.TFRECORD:
            paths = [Path(path) for path in info.splits[split].filepaths]
            yield from map(info.features.deserialize_example_np, _tfrecords(paths))
        else:
            yield from builder.as_data_source(split=split)
    except (MemoryError, PermissionError, UserError):
        raise
    except Exception as error:  # Each format's reader, and Pillow, has errors of its own.
        raise UserError(
            f"{builder.data_dir} is damaged: its split {split!r} cannot be read ({error}). Move it away, and run the "
            "command again to prepare the set anew."
        ) from error


def _tfrecords(paths: Sequence[Path]) -> Iterator[bytes]:
    """Yields the records of TFRecord files, which tfds reads only with TensorFlow.

    A record is its length (uint64), a checksum of the length (4 bytes), the data, a checksum of the data (4 bytes). The
    checksums are not looked at: PNG has its own, and the digest of the decoded set is checked at every later start.
    """
    for path in paths:
        with path.open("rb") as file:
            while header := file.read(12):
                (length,) = struct.unpack("<Q", header[:8])
                yield file.read(length)
                file.read(4)


def class_names(folder: Path) -> tuple[str, ...]:
    """Returns the name of each label of a prepared tfds directory."""
    builder = _builder(folder)
    return tuple(builder.info.features[_image_and_label(builder)[1]].names)


def _image_and_label(builder: Any) -> tuple[str, str]:
    """Returns the names of the features to learn from, and to learn."""
    keys = builder.info.supervised_keys
    return keys if keys is not None and len(keys) == 2 else ("image", "label")
