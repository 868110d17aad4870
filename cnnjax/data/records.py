"""The examples of a prepared tfds directory as records that are read in any order, by several processes."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from cnnjax.data.image_files import MODES, fit_array
from cnnjax.data.stored import Fit
from cnnjax.data.tfds_format import check_split, damage, fit_row, open_builder, parse_row
from cnnjax.errors import UserError, check, option
from cnnjax.process.settings import raise_file_limit
from cnnjax.process.streams import reason

CHUNK = 2**24  # Bytes of images, see `Records.chunk`.


class Shard(NamedTuple):
    """A file of records, as it was when it was read."""

    name: str
    num_records: int
    size: int  # Bytes.
    time: int  # Nanoseconds since the epoch, of its last change.


class Record(NamedTuple):
    """A decoded record."""

    image: UInt8[np.ndarray, "H W C"]
    label: int
    file: str | None  # The feature "file", if there is one.


class Records:
    """A split of a prepared tfds directory in the format array_record. Each process opens the files for itself.

    Args:
      folder: the prepared directory.
      split: the name of a split.
      stored: how images of several sizes are brought to the shape of the stored set; `Fit()`: they have one.
      fit: how the stored images are brought to the shape that a network gets, see `ImageDataset.fit`.

    Raises:
      UserError: see `check_split`; the set has another format, or a file has another number of records.
    """

    def __init__(self, folder: Path, split: str, stored: Fit, fit: Fit):
        self.folder, self.split, self._stored, self._fit = folder, split, stored, fit
        info = self._split.builder.info
        if (kind := info.file_format.value) != "array_record":
            raise UserError(
                f"`stream` must be False for {folder}, whose format is {kind} instead of array_record. Leave "
                f"{option('stream')} out, or let tfds write it again with file_format='array_record'."
            )
        self.paths = tuple(map(str, info.splits[split].filepaths))
        counts = info.splits[split].shard_lengths
        try:
            self.shards = tuple(
                Shard(Path(path).name, count, (stat := Path(path).stat()).st_size, stat.st_mtime_ns)
                for path, count in zip(self.paths, counts, strict=True)
            )
        except OSError as error:
            raise self._damage(str(error)) from error
        if len(self._source) != len(self):
            raise self._damage(f"it holds {len(self._source)} records in place of {len(self)}")
        self.stored_shape = self.read([0])[0].image.shape
        self.image_shape = self._final_shape()

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a worker process needs, without open files."""
        return {name: value for name, value in vars(self).items() if name not in ("_split", "_source")}

    def __len__(self) -> int:
        return sum(shard.num_records for shard in self.shards)

    @property
    def chunk(self) -> int:
        """The number of records that may be in memory at a time, in each of a few places."""
        return int(np.clip(CHUNK // np.prod(self.stored_shape), 1, 512))

    @property
    def num_classes(self) -> int:
        """The number of classes, K."""
        return self._split.num_classes

    @cached_property
    def _split(self) -> Any:
        return check_split(open_builder(self.folder), self.split)

    @cached_property
    def _source(self) -> Any:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        raise_file_limit()
        try:
            return ArrayRecordDataSource(list(self.paths))
        except Exception as error:  # Its own types.
            raise self._damage(reason(error)) from error

    def _final_shape(self) -> tuple[int, ...]:
        channels = self.stored_shape[-1]
        fit = self._fit if self._fit.channels or channels != 4 else self._fit._replace(channels=3)
        shape = fit.shape_of(self.stored_shape)
        same = shape == self.stored_shape
        rule = "None for images of another number of channels than 1 to 4"
        check("image_size", rule, same or channels in MODES, self._fit.image_size)
        return shape

    def read(self, index: Sequence[int] | Int[np.ndarray, " M"]) -> list[Record]:
        """Returns records in the shape of the stored set.

        Raises:
          UserError: a record is damaged; the message names its file and its index there.
        """
        index = [int(i) for i in index]
        try:
            rows = self._source.__getitems__(index)
        except Exception:
            rows = [self._read_one(i) for i in index]  # Finds the damaged one.
        return [self._decode(i, row) for i, row in zip(index, rows, strict=True)]

    def _read_one(self, index: int) -> bytes:
        try:
            return self._source[index]
        except Exception as error:
            raise self._damage(reason(error), index) from error

    def _decode(self, index: int, row: bytes) -> Record:
        info = self._split
        try:
            example = parse_row(info, row)
            image = fit_row(example[info.image_name], self._stored, info.channels)
            file = example.get("file")
            return Record(image, int(example[info.label_name]), file.decode() if isinstance(file, bytes) else None)
        except Exception as error:  # Protocol buffers and Pillow raise their own types.
            raise self._damage(reason(error), index) from error

    def fit(self, image: UInt8[np.ndarray, "H W C"]) -> UInt8[np.ndarray, "H2 W2 C2"]:
        """Brings a stored image to `image_shape`."""
        if image.shape == self.image_shape:
            return image
        return fit_array(image, self.image_shape, self._fit.resize, self._fit.interpolation)

    def check_shape(self, image: UInt8[np.ndarray, "H W C"], index: int) -> None:
        """Checks that a stored image has the shape of the others.

        Raises:
          UserError: it has not.
        """
        if image.shape != self.stored_shape:
            raise UserError(
                f"{self.folder} must hold images of one shape, got {self.stored_shape} and {image.shape} (record "
                f"{index} of its split {self.split!r}). Bring them to one size: {option('image_size', 'SIZE')}."
            )

    def _damage(self, why: str, index: int | None = None) -> UserError:
        part = f"its split {self.split!r}"
        if index is not None:
            left = index
            for shard in self.shards:
                if left < shard.num_records:
                    part = f"record {left} of {shard.name} (record {index} of its split {self.split!r})"
                    break
                left -= shard.num_records
        return damage(self.folder, part, why)
