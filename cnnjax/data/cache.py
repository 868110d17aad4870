"""The decoded arrays of a prepared tfds directory, and what is known about them, in a folder next to its shards.

Whatever is damaged counts as missing: the caller decodes the shards again.
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from cnnjax.data.stored import Examples
from cnnjax.errors import UserError
from cnnjax.files import atomic_write, open_regular, read_json, write_sums
from cnnjax.runs.schema import ImageShape, Splits

CACHE = "cnnjax_arrays"  # The name of the folder of arrays.


@dataclass(frozen=True)
class Facts:
    """The content of facts.json, see `StoredSet`. It does not name the folder, which may move."""

    source: str
    class_names: Annotated[tuple[str, ...], Field(min_length=1)]
    image_shape: ImageShape
    sha256: Splits
    splits: tuple[str, ...]
    files: tuple[str, ...] = ()  # The training images of a folder, in order.


def read_facts(cache: Path) -> Facts | None:
    """Returns the facts of a set whose splits have been decoded and checked, or None."""
    try:
        return read_json(cache / "facts.json", Facts)
    except UserError:
        return None


def write_facts(cache: Path, facts: Facts) -> None:
    """Writes the facts, after the arrays.

    Raises:
      OSError: the disk is full or cannot be written.
    """
    with atomic_write(cache / "facts.json", shared=True) as file:
        file.write(json.dumps(asdict(facts), indent=2).encode())
    write_sums(cache, ["facts.json"], shared=True)  # `read_json` checks it.


def read_arrays(cache: Path, split: str) -> Examples | None:
    """Returns the decoded arrays of a split, or None. The caller verifies their digest."""
    try:
        image, label = (_read_array(cache / f"{split}_{name}.npy") for name in Examples._fields)
    except Exception:  # A damaged header raises a dozen types, among them MemoryError for a huge shape.
        return None
    intact = (image.dtype, label.dtype) == (np.uint8, np.int32) and label.shape == image.shape[:1] and image.ndim == 4
    return Examples(image, label) if intact else None


def _read_array(path: Path) -> np.ndarray:
    with open_regular(path) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def write_arrays(cache: Path, split: str, examples: Examples) -> None:
    """Writes the decoded arrays of a split.

    Raises:
      OSError: the disk is full or cannot be written.
    """
    cache.mkdir(exist_ok=True)
    for name, array in examples._asdict().items():
        with atomic_write(cache / f"{split}_{name}.npy", shared=True) as file:
            np.save(file, array)


def remove_cache(cache: Path) -> None:
    """Removes incomplete arrays, which would take room."""
    shutil.rmtree(cache, ignore_errors=True)


def remove_partial_files(folder: Path) -> None:
    """Removes what killed processes left of files that `atomic_write` shares. No other process may write there."""
    for path in folder.glob("*.partial"):
        if re.fullmatch(r".+\.\d+\.\d+\.partial", path.name):
            path.unlink(missing_ok=True)
