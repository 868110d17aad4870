"""The index of a streamed data set: labels, sums of pixels and digests, found by one pass over its records."""

import hashlib
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from jaxtyping import Int
from pydantic import Field

from cnnjax.data.batches import image_sums
from cnnjax.data.cache import Facts, remove_cache
from cnnjax.data.records import Records, Shard
from cnnjax.data.stored import Digest, Fit
from cnnjax.data.stream import FEW, Streamed, StreamedImages, read_ahead
from cnnjax.errors import UserError
from cnnjax.files import atomic_write, file_sha256, open_regular, read_json, write_json, write_sums
from cnnjax.process.console import track
from cnnjax.process.settings import num_cores
from cnnjax.runs.schema import Sha256

INDEX = "cnnjax_index"  # The name of its folder begins with this.


@dataclass(frozen=True)
class Index:
    """The content of facts.json in the folder of an index.

    Attributes:
      facts: see `Facts`.
      shards: the files of each split, as they were.
      arrays: the SHA-256 of each file of arrays.
    """

    facts: Facts
    shards: dict[str, Annotated[tuple[Shard, ...], Field(min_length=1)]]
    arrays: dict[str, Sha256]


class IndexedSplit(NamedTuple):
    """The result of the pass over a split."""

    label: Int[np.ndarray, " N"]
    sums: Int[np.ndarray, "N 2 C"]  # See `image_sums`; of images in the shape that a network gets.
    sha256: str
    files: tuple[str, ...]


def index_folder(folder: Path, fit: Fit) -> Path:
    """Returns the folder of the index of a set, beside its shards."""
    size = "x".join(map(str, (*(fit.image_size or ()), fit.channels or "")))
    return folder / "_".join([INDEX, *filter(None, [size]), fit.resize, fit.interpolation])


def read_index(path: Path) -> Index | None:
    """Returns the index in a folder, or None if it is missing or damaged."""
    try:
        return read_json(path / "facts.json", Index)
    except UserError:
        return None


def write_index(path: Path, index: Index, found: Mapping[str, IndexedSplit]) -> Index:
    """Writes the arrays of some splits, and then the index; returns it with the digests of the arrays.

    Raises:
      OSError: the disk is full or cannot be written.
    """
    path.mkdir(exist_ok=True)
    arrays = dict(index.arrays)
    for split, one in found.items():
        for name in ("label", "sums"):
            with atomic_write(path / f"{split}_{name}.npy", shared=True) as file:
                np.save(file, getattr(one, name))
            arrays[f"{split}_{name}"] = file_sha256(path / f"{split}_{name}.npy")
    index = replace(index, arrays=arrays)
    write_json(path / "facts.json", asdict(index), shared=True)
    write_sums(path, ["facts.json"], shared=True)
    return index


def read_split(path: Path, index: Index, split: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the labels and the sums of a split, or None if they are missing or damaged."""
    arrays = []
    with suppress(OSError, ValueError):
        for name in ("label", "sums"):
            with open_regular(path / f"{split}_{name}.npy") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != index.arrays.get(f"{split}_{name}"):
                    return None
                file.seek(0)
                arrays.append(np.lib.format.read_array(file, allow_pickle=False))
        return arrays[0], arrays[1]
    return None


def stream_splits(
    path: Path,
    splits: Mapping[str, Records],
    facts: Facts,
    check: Callable[[str, str, str], None],
    say: Callable[[str], None],
) -> tuple[Facts, dict[str, Streamed]]:
    """Returns the facts of a set and its splits, whose images stay on disk; reads all records if that was not done.

    Args:
      path: the folder of the index.
      splits: the splits that are needed.
      facts: what is known without reading; the digests, from when the set was decoded in memory.
      check: called with a split, its known digest and the one that was found now.
      say: receives a line for each pass.

    Raises:
      UserError: a record is damaged or has another shape, or `check` raised it.
    """
    index, found, streamed = read_index(path), {}, {}
    for split, records in splits.items():
        known = read_split(path, index, split) if index and index.shards.get(split) == records.shards else None
        if known is None:
            say(f"reading all {len(records):,} {split} images of {records.folder} (once)")
            found[split] = one = index_split(records)
            for expected in (facts.sha256.get(split), index and index.facts.sha256.get(split)):
                check(split, expected or one.sha256, one.sha256)
            known = one.label, one.sums
        label, sums = known
        streamed[split] = Streamed(StreamedImages(records, np.arange(len(records)), sums), label)
    if index is not None:
        facts = replace(facts, sha256={**index.facts.sha256, **facts.sha256}, files=index.facts.files or facts.files)
    facts = replace(facts, sha256={**facts.sha256, **{split: one.sha256 for split, one in found.items()}})
    if "train" in found:
        facts = replace(facts, files=found["train"].files)
    if found:
        shards = {**(index.shards if index else {}), **{split: splits[split].shards for split in found}}
        try:
            write_index(path, Index(facts, shards, index.arrays if index else {}), found)
        except OSError as error:
            remove_cache(path)
            say(f"the index cannot be kept ({error}): every start will read all images once")
    return facts, streamed


class _Chunks:
    """Element i is chunk i of the records, for Grain: its images as they are stored, its labels, and its sums."""

    def __init__(self, records: Records):
        self._records = records
        self.nbytes = records.chunk * int(np.prod(records.stored_shape))

    def __len__(self) -> int:
        return math.ceil(len(self._records) / self._records.chunk)

    def __getitem__(self, index: int) -> dict[str, Any]:
        records, first = self._records, int(index) * self._records.chunk
        numbers = range(first, min(first + records.chunk, len(records)))
        rows = records.read(numbers)
        for k, row in zip(numbers, rows, strict=True):
            records.check_shape(row.image, k)
        image = np.stack([row.image for row in rows])
        fitted = image if records.image_shape == image.shape[1:] else np.stack([records.fit(x) for x in image])
        files = np.array([row.file for row in rows], object)
        return {
            "image": image,
            "label": np.array([row.label for row in rows]),
            "sums": image_sums(fitted),
            "file": files,
        }

    def __repr__(self) -> str:  # Grain shows it in its own messages.
        return f"chunks of {self._records.split}"


def index_split(records: Records) -> IndexedSplit:
    """Reads all records of a split, in order; keeps no image.

    Raises:
      UserError: a record is damaged, or has another shape or an impossible label.
    """
    chunks, digest = _Chunks(records), Digest((len(records), *records.stored_shape))
    label, sums, files = [], [], []
    workers = 0 if len(records) < FEW else num_cores()  # This process only hashes.
    with read_ahead(chunks, 0, workers) as found:
        for chunk in track(found, f"reading {records.split}", total=len(chunks)):
            digest.add(chunk["image"])
            label.append(np.array(chunk["label"], np.int32))
            sums.append(np.array(chunk["sums"]))
            files += [file for file in chunk["file"] if file is not None]
    labels = np.concatenate(label)
    if labels.min() < 0 or labels.max() >= records.num_classes:
        raise UserError(
            f"{records.folder} must label each image of its split {records.split!r} with one of {records.num_classes} "
            f"classes, got labels from {labels.min()} to {labels.max()}."
        )
    return IndexedSplit(labels, np.concatenate(sums), digest.finish(labels), tuple(files))
