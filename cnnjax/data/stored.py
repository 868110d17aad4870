"""A data set as it is stored, before it is divided into the parts of a run and brought to one image size."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int, UInt8

RESIZE, INTERPOLATIONS = ("crop", "pad", "stretch"), ("lanczos", "bicubic", "bilinear")  # See `image_files.fit_image`.
MAX_SIDE = 4096  # Pixels.
LISTS = (".csv", ".jsonl")  # Suffixes of files that list images.


E = TypeVar("E", bound=Any)


class Examples(NamedTuple):
    """Images and labels in memory."""

    image: UInt8[np.ndarray, "N H W C"]
    label: Int[np.ndarray, " N"]


def select(examples: E, index: Int[np.ndarray, " M"]) -> E:
    """Returns some of the examples, which may be `stream.Streamed`."""
    return type(examples)(examples.image[index], examples.label[index])


def digest(examples: Examples) -> str:
    """Returns the SHA-256 of the images' dtype, shape and bytes, followed by the labels as little-endian int32."""
    hasher = Digest(examples.image.shape)
    hasher.add(examples.image)
    return hasher.finish(examples.label)


class Digest:
    """The `digest` of examples whose images, uint8, come one after another; `shape` is [N H W C]."""

    def __init__(self, shape: tuple[int, ...]):
        self._hasher = hashlib.sha256(f"uint8{list(shape)}".encode())

    def add(self, image: UInt8[np.ndarray, "M H W C"]) -> None:
        """Adds the next images."""
        self._hasher.update(np.ascontiguousarray(image).data)

    def finish(self, label: Int[np.ndarray, " N"]) -> str:
        """Adds all labels, and returns the digest."""
        self._hasher.update(np.ascontiguousarray(label, "<i4").data)
        return self._hasher.hexdigest()


class Fit(NamedTuple):
    """How images are brought to one shape, see `image_files.fit_image`; None: unchanged."""

    image_size: tuple[int, int] | None = None
    channels: int | None = None
    resize: str = "crop"
    interpolation: str = "lanczos"

    def shape_of(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape (H, W, C) that images of the shape `image_shape` get."""
        return (*(self.image_size or image_shape[:2]), self.channels or image_shape[2])


@dataclass(frozen=True)
class StoredSet:
    """A data set as it is stored.

    Attributes:
      name: the tfds name or the path; for arrays in memory "arrays", or the name of the function that returned them.
      source: where the pixels came from, in words.
      class_names: the name of each label, in order.
      image_shape: (H, W, C), of all splits.
      sha256: for each split, the `digest` of its images and labels.
      version: the tfds version; for folders and arrays 12 hexadecimal digits that identify the content.
      load: returns a split, and verifies its digest.
      folder: the prepared tfds directory, or None.
      splits: the names of all its splits; `sha256` and `load` know those that were needed.
      pixels: identifies each training image as it was before it was resized; empty: the images are as they were.
      stream: returns a split whose images stay on disk, `stream.Streamed`; None: the set is used in memory.
    """

    name: str
    source: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, ...]
    sha256: dict[str, str]
    version: str
    load: Callable[[str], Examples] = field(repr=False, compare=False)
    folder: Path | None = None
    splits: tuple[str, ...] = ("train", "test")
    pixels: tuple[bytes, ...] = field(default=(), repr=False)
    stream: Callable[[str], Any] | None = field(default=None, repr=False, compare=False)
