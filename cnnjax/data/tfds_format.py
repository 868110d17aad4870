"""Reads and writes the on-disk format of TensorFlow Datasets without TensorFlow.

The stock builders need TensorFlow for its file system and its PNG encoder. A builder with the same name, version,
features and integer keys that is given PNG bytes writes the same records in the same order.
"""

import contextlib
import errno
import io
import os
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cnnjax.data.image_files import decode_image, fit_array, on_all_cores
from cnnjax.data.sources import NamedSet, RawSet
from cnnjax.data.stored import Examples, Fit
from cnnjax.errors import UserError, option
from cnnjax.files import open_regular
from cnnjax.process.console import track
from cnnjax.process.settings import num_cores, raise_file_limit
from cnnjax.process.streams import Output

# Errors of the system that say nothing about a file, and what helps.
_NO_DAMAGE = {
    errno.ENFILE: "Close other programs.",  # Its text begins with that of EMFILE, so it is looked for first.
    errno.EMFILE: "Raise the number of files that a process may open (ulimit -n).",
    errno.EACCES: "Fix its permissions.",
    errno.EPERM: "Fix its permissions.",
    errno.EIO: "Check the disk.",
}

_LARGE = 10_000  # Mean number of bytes of a record; threads were slower with 2,300, and faster with 44,000.

# The functions import tfds, which takes 1.1 s: a set whose arrays are cached does not need it.


# --- Reading --------------------------------------------------------------------------------------------------------


class SplitFeatures(NamedTuple):
    """The features of a split, of `check_split`."""

    builder: Any
    features: Any
    image_name: str
    label_name: str
    num_classes: int
    channels: int | None  # None: as many as each image has.


def inspect_set(folder: Path) -> tuple[dict[str, int], bool]:
    """Returns the number of examples of each split of a prepared set, and whether it states the size of its images."""
    builder = open_builder(folder)
    features = builder.info.features
    image_name, _ = _image_and_label(builder)
    shape = getattr(features[image_name], "shape", ()) if image_name in features else ()
    counts = {name: split.num_examples for name, split in builder.info.splits.items()}
    return counts, None not in (shape or ())[:2]


def decode(
    folder: Path,
    split: str,
    fit: Fit = Fit(),  # noqa: B008  Immutable.
    files: list[str] | None = None,
) -> Examples:
    """Decodes a split of a prepared tfds directory, in record order, and brings its images to one shape by `fit`.

    Args:
      files: receives the feature "file" of each example, if there is one.

    Raises:
      UserError: the split is missing or damaged, or does not hold images of one shape with one class label each.
    """
    builder = open_builder(folder)
    found = check_split(builder, split)
    image_name, label_name, num_classes = found.image_name, found.label_name, found.num_classes
    count = builder.info.splits[split].num_examples
    image, label, read = None, _empty(folder, (count,), np.int32), 0
    for row in track(_rows(found, split, fit), f"decoding {split}", total=count):
        if files is not None and isinstance(row.get("file"), bytes):
            files.append(row["file"].decode())
        if image is None:
            image = _empty(folder, (count, *row[image_name].shape), np.uint8)
            if 0 in image.shape[1:]:
                raise UserError(f"{folder} must hold images of at least one pixel, got {image.shape[1:]}.")
        if row[image_name].shape != image.shape[1:]:
            raise UserError(
                f"{folder} must hold images of one shape, got {image.shape[1:]} and {row[image_name].shape} "
                f"(record {read}). Bring them to one size: {option('image_size', 'SIZE')}."
            )
        if read < count:
            image[read], label[read] = row[image_name], row[label_name]
        read += 1
    if image is None or read != count:
        raise UserError(f"{folder} must hold {count or 'some'} examples in its split {split!r}, got {read}.")
    if label.min() < 0 or label.max() >= num_classes:
        raise UserError(
            f"{folder} must label each image of its split {split!r} with one of {num_classes} classes, got labels from "
            f"{label.min()} to {label.max()}."
        )
    return Examples(image, label)


def check_split(builder: Any, split: str) -> SplitFeatures:
    """Checks that a split of a prepared tfds directory holds images with one class label each.

    Raises:
      UserError: it does not, or there is no such split.
    """
    import tensorflow_datasets as tfds

    folder, splits, features = Path(builder.data_dir), builder.info.splits, builder.info.features
    named: Any = features if isinstance(features, tfds.features.FeaturesDict) else {"": features}
    if split not in splits:
        raise UserError(f"{folder} must have a split {split!r}, got {sorted(splits)}.")
    image_name, label_name = _image_and_label(builder)
    expected = {image_name: tfds.features.Image, label_name: tfds.features.ClassLabel}
    if not all(name in named and isinstance(named[name], kind) for name, kind in expected.items()):
        raise UserError(f"{folder} must hold images with one class label each, got the features {sorted(named)}.")
    if named[image_name].np_dtype != np.uint8:
        raise UserError(f"{folder} must hold 8-bit images, got {np.dtype(named[image_name].np_dtype)}.")
    num_classes = named[label_name].num_classes
    if num_classes is None or num_classes < 2:
        raise UserError(f"{folder} must state the number of its classes, at least 2, got {num_classes}.")
    channels = named[image_name].shape[-1]
    return SplitFeatures(builder, features, image_name, label_name, num_classes, channels)


def fit_row(image: np.ndarray, fit: Fit, channels: int | None) -> np.ndarray:
    """Brings the image of a record to one shape, if `fit` states its size.

    Args:
      channels: of the set's images, as it states them: an image with transparency may have more. 4 become 3 unless
        `fit` states a number.
    """
    if fit.image_size is None:
        return image
    channels = channels or image.shape[-1]
    fit = fit if fit.channels else fit._replace(channels=3 if channels == 4 else channels)
    return fit_array(image, fit.shape_of(image.shape), fit.resize, fit.interpolation)


def class_names(folder: Path) -> tuple[str, ...]:
    """Returns the name of each label of a prepared tfds directory, in order: a number if the set names none.

    Raises:
      UserError: the file of the names is damaged.
    """
    builder = open_builder(folder)
    label_name = _image_and_label(builder)[1]
    num_classes = builder.info.features[label_name].num_classes
    path = folder / f"{label_name}.labels.txt"
    if not path.exists():
        return tuple(map(str, range(num_classes)))
    with _damage_as_user_error(folder, path.name):  # tfds would ignore an error.
        with open_regular(path) as file:
            names = tuple(name.strip() for name in file.read().decode().split("\n") if name.strip())
        if len(names) != num_classes:
            raise ValueError(f"{len(names)} names for {num_classes} classes")
    return names


def _empty(folder: Path, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    try:
        return np.empty(shape, dtype)
    except (MemoryError, ValueError) as error:
        raise UserError(f"{folder} must fit into memory, got arrays of shape {shape} ({error}).") from error


@contextlib.contextmanager
def _damage_as_user_error(folder: Path, part: str) -> Iterator[None]:
    """Turns the errors of the parsers into one that names the damaged part of a prepared directory."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # JSON, protocol buffers, each record format and Pillow raise their own types.
        raise damage(folder, part, str(error)) from error


def damage(folder: Path, part: str, why: str) -> UserError:
    """Returns the error for a part of a prepared directory that cannot be read, perhaps although it is intact."""
    for number, fix in _NO_DAMAGE.items():
        if os.strerror(number) in why:  # The readers of array_record raise no OSError.
            return UserError(f"{folder} must be readable, got {why}. {fix}")
    return UserError(
        f"{folder} is damaged: {part} cannot be read ({why}). Move it away, and run the command again to prepare the "
        "set again."
    )


def open_builder(folder: Path) -> Any:
    """Opens a prepared tfds directory.

    Raises:
      UserError: its description is damaged.
    """
    import tensorflow_datasets as tfds

    with _damage_as_user_error(folder, "its description"):
        for path in folder.iterdir():  # tfds would wait for a pipe, and do without class names that it cannot read.
            if not path.is_dir() and not path.name.startswith("."):
                open_regular(path).close()
        return tfds.builder_from_directory(folder)


def _image_and_label(builder: Any) -> tuple[str, str]:
    """Returns the names of the input feature and the target feature."""
    match builder.info.supervised_keys:
        case (str(image), str(label)):
            return image, label
        case _:
            return "image", "label"


def parse_row(found: SplitFeatures, row: bytes) -> dict[str, Any]:
    """Returns the features of a record, with its image decoded."""
    import tensorflow_datasets as tfds

    example = found.features.deserialize_example_np(row, decoders={found.image_name: tfds.decode.SkipDecoding()})
    return {**example, found.image_name: decode_image(example[found.image_name], found.channels)}


def _rows(found: SplitFeatures, split: str, fit: Fit) -> Iterator[dict[str, Any]]:
    """Yields the examples of a split, in record order, with images that are decoded and brought to one shape."""
    folder, info = found.builder.data_dir, found.builder.info
    stated = info.splits[split]

    def read(record: bytes) -> dict[str, Any]:
        row = parse_row(found, record)
        return {**row, found.image_name: fit_row(row[found.image_name], fit, found.channels)}

    # Threads do not help with small images: parsing takes longer than decoding, and only one of them at a time parses.
    # Few images are in work, because each may be large.
    in_threads = partial(on_all_cores, ahead=2 * num_cores())
    read_all: Any = in_threads if stated.num_bytes > _LARGE * stated.num_examples else map
    with _damage_as_user_error(Path(folder), f"its split {split!r}"):
        match info.file_format.value:
            case "tfrecord":
                yield from read_all(read, _tfrecords(stated.filepaths))
            case "array_record":
                from array_record.python.array_record_data_source import ArrayRecordDataSource

                raise_file_limit()
                with ArrayRecordDataSource(list(map(str, stated.filepaths))) as shards:
                    if len(shards) != stated.num_examples:  # tfds would ignore the rest.
                        raise ValueError(f"{len(shards)} examples in place of {stated.num_examples}")
                    yield from read_all(read, shards)
            case other:
                raise UserError(f"{folder} must be in the format tfrecord or array_record, got {other}.")


def _tfrecords(paths: Sequence[Any]) -> Iterator[bytes]:
    """Yields the records of TFRecord files, which tfds reads only with TensorFlow.

    A record consists of its length (uint64), a checksum of the length (4 bytes), the data, and a checksum of the data
    (4 bytes). The checksums are ignored: PNG has its own, and the digest of the decoded set is verified on later loads.
    """
    for path in paths:
        with open_regular(Path(path)) as file:
            size = os.fstat(file.fileno()).st_size
            while header := file.read(12):
                (length,) = struct.unpack("<Q", header[:8])
                if length > size - file.tell():
                    raise ValueError(f"a record of {length} bytes in a file of {size}")
                yield file.read(length)
                file.read(4)


# --- Writing --------------------------------------------------------------------------------------------------------


def write_tfds(named: NamedSet, raw: RawSet, data_dir: Path, say: Callable[[str], None]) -> Path:
    """Writes `raw` as the prepared tfds set `named` in `data_dir`.

    Returns:
      The folder of the prepared version, `data_dir/name/version`.

    Raises:
      OSError: the disk is full or cannot be written.
    """
    import tensorflow_datasets as tfds

    stock = tfds.builder_cls(named.name)
    say(f"writing {named.name} in the format of TensorFlow Datasets")

    def info(builder: Any) -> Any:
        info: Any = stock._info(builder)  # The stock description, features and citation; downloads nothing.
        for feature, names in raw.label_names.items():
            info.features[feature].names = list(names)
        return info

    def examples(split: str, features: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        images, labels = raw.splits[split]
        for key, image in enumerate(images):
            example: dict[str, Any] = {feature: int(label[key]) for feature, label in labels.items()}
            if "id" in features:
                example["id"] = f"{split}_{key:05d}"
            yield key, {**example, "image": io.BytesIO(png(image))}

    splits = {split: partial(examples, split) for split in raw.splits}
    return write_examples(named.name, named.version, info, splits, data_dir, pkg_dir_path=stock.pkg_dir_path)


def write_examples(
    name: str,
    version: str,
    info: Callable[[Any], Any],
    splits: Mapping[str, Callable[[Any], Iterator[tuple[int | str, dict[str, Any]]]]],
    data_dir: Path,
    *,
    pkg_dir_path: Any = None,
) -> Path:
    """Writes a prepared tfds set in `data_dir`.

    Args:
      name: of the set.
      version: of the set.
      info: returns the `tfds.core.DatasetInfo` of a builder.
      splits: for each split, a function of the set's features that yields a key and the values of each example.
      data_dir: the tfds directory.
      pkg_dir_path: the folder of a stock builder, with its metadata.

    Returns:
      The folder of the prepared version, `data_dir/name/version`.

    Raises:
      OSError: the disk is full or cannot be written.
    """
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)

        def _info(self) -> tfds.core.DatasetInfo:
            described = info(self)
            described.initialize_from_bucket = lambda: None  # It reads nothing and leaves an empty temporary folder.
            return described

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {split: examples(self.info.features) for split, examples in splits.items()}

        def _generate_examples(self) -> Any:
            raise NotImplementedError

    Builder.name, Builder.pkg_dir_path = name, pkg_dir_path
    if not Output(sys.stderr).isatty():
        tfds.disable_progress_bar()
    builder = Builder(data_dir=data_dir)
    with contextlib.redirect_stdout(io.StringIO()):  # tfds announces a download, but nothing is downloaded.
        try:
            builder.download_and_prepare(
                file_format="array_record",
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
        except RuntimeError as error:  # From the writer of array_record.
            raise OSError(error) from error
    return Path(builder.data_dir)


def png(image: np.ndarray) -> bytes:
    """Returns an image, uint8 [H W C], as a PNG file."""
    from PIL import Image

    file = io.BytesIO()
    image_file = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    image_file.save(file, "PNG", compress_level=1, compress_type=zlib.Z_RLE)  # Faster and smaller for photos.
    return file.getvalue()
