"""Image classification sets, identified by their digests: tfds sets (decoded once and cached) and arrays in memory."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import tokenize
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cnnjax.data.named import NAMED_SETS
from cnnjax.data.sources import NamedSet, fetch
from cnnjax.data.tfds_format import Examples, class_names, decode, write_tfds
from cnnjax.errors import UserError, check, unknown_name
from cnnjax.runs.files import atomic_write
from cnnjax.typing import AnyArray

CACHE = "cnnjax_arrays"  # The folder of the decoded arrays, next to the shards of the prepared version.
MAX_CLASSES = 1 << 20  # A label that exceeds this is an identifier, not a class.


@dataclass(frozen=True)
class ImageDataset:
    """An image classification set with the splits "train" and "test".

    Attributes:
      name: the tfds name; for arrays in memory "arrays", or the name of the function that returned them.
      source: where the pixels came from, in words.
      class_names: the name of each label, in order.
      sha256: for each split, the `digest` of its images and labels.
      folder: the prepared tfds directory, or None.
      arrays: the splits of a set in memory; a tfds set is read by `load`.
    """

    name: str
    source: str
    class_names: tuple[str, ...]
    sha256: dict[str, str]
    folder: Path | None = None
    arrays: dict[str, Examples] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_classes(self) -> int:
        """The number of classes, K."""
        return len(self.class_names)

    @property
    def version(self) -> str:
        """The tfds version; for arrays in memory, 12 hexadecimal digits that identify both splits."""
        if self.folder is None:
            return hashlib.sha256("".join(self.sha256.values()).encode()).hexdigest()[:12]
        return self.folder.name

    def load(self, split: str) -> Examples:
        """Returns a split ("train" or "test"); verifies the digest of a tfds set.

        If the cached arrays are missing or damaged, decodes the shards and writes the arrays again.

        Raises:
          UserError: the shards hold different images or labels than before.
        """
        if self.folder is None:
            return self.arrays[split]
        examples = _read_arrays(self.folder, split, self.sha256[split])
        if examples is None:
            examples = decode(self.folder, split)
            got = digest(examples)
            if got != self.sha256[split]:
                raise _mismatch(self.name, split, f"{self.folder}, from {self.source}", self.sha256[split], got)
            _write_arrays(self.folder, split, examples)
        return examples


def default_data_dir() -> Path:
    """Returns the folder that tfds uses: $TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def load_dataset(
    dataset: str | tuple[Any, ...] | Callable[[], Any],
    data_dir: Path | None = None,
    say: Callable[[str], None] = print,
) -> ImageDataset:
    """Finds a tfds set in `data_dir`, downloading and preparing it if necessary, or wraps arrays.

    Example:
      >>> load_dataset("fashion_mnist").load("train").image.shape
      (60000, 28, 28, 1)

    Args:
      dataset: a tfds name such as "cifar10" or "name/config"; or the arrays `(x_train, y_train, x_test, y_test)` with
        images uint8 [N H W C] or [N H W] and integer labels [N] from 0 to K - 1; or a function that returns them. K is
        the largest label + 1. The arrays are not copied.
      data_dir: the tfds directory; `default_data_dir()` if None.
      say: receives progress messages, one line each.

    Raises:
      UserError: the name is unknown, no source is available, a digest does not match, the set does not consist of
        labeled images, or `data_dir` cannot be written.
    """
    if not isinstance(dataset, str):
        if not callable(dataset):
            return _from_arrays("arrays", dataset)
        return _from_arrays(getattr(dataset, "__name__", type(dataset).__name__), dataset())
    name = dataset.strip("/")
    data_dir = default_data_dir() if data_dir is None else data_dir.expanduser().absolute()
    named = NAMED_SETS.get(name)
    folder, source = prepared_folder(name, data_dir), None
    if folder is None:
        folder, source = _prepare(name, named, data_dir, say)
    elif (cached := _read_facts(name, folder)) and (named is None or named.sha256 in ({}, cached.sha256)):
        return cached
    try:
        return _decode_all(name, named, folder, source or f"the prepared tfds directory {folder}", say)
    except UserError:
        if named is not None and source is not None:  # Remove what this call fetched.
            shutil.rmtree(folder)
        raise


def prepared_folder(name: str, data_dir: Path) -> Path | None:
    """Returns the newest prepared version of `name` in `data_dir`, or None."""
    versions = [
        (tuple(map(int, info.parent.name.split("."))), info.parent)
        for info in (data_dir / name).glob("*/dataset_info.json")
        if re.fullmatch(r"\d+\.\d+\.\d+", info.parent.name)
    ]
    return max(versions)[1] if versions else None


def digest(examples: Examples) -> str:
    """Returns the SHA-256 of the images' dtype, shape and bytes, followed by the labels as little-endian int32."""
    image = np.ascontiguousarray(examples.image)
    hasher = hashlib.sha256(f"{image.dtype}{list(image.shape)}".encode())
    hasher.update(image.data)
    hasher.update(np.ascontiguousarray(examples.label, "<i4").data)
    return hasher.hexdigest()


# --- Arrays in memory -----------------------------------------------------------------------------------------------


def _from_arrays(name: str, arrays: Any) -> ImageDataset:
    is_tuple = isinstance(arrays, tuple)
    got = f"a tuple of {len(arrays)}" if is_tuple else type(arrays).__name__
    check("dataset", "a tuple `(x_train, y_train, x_test, y_test)` of arrays", is_tuple and len(arrays) == 4, got)
    splits = {"train": _examples("train", *arrays[:2]), "test": _examples("test", *arrays[2:])}
    train, test = (examples.image.shape[1:] for examples in splits.values())
    check("x_test", f"images of the same shape {train} as `x_train`", test == train, test)
    num_classes = max(2, *(int(examples.label.max()) + 1 for examples in splits.values()))
    return ImageDataset(
        name=name,
        source="arrays in memory",
        class_names=tuple(map(str, range(num_classes))),
        sha256={split: digest(examples) for split, examples in splits.items()},
        arrays=splits,
    )


def _examples(split: str, x: Any, y: Any) -> Examples:
    """Validates the images and labels of a split, and returns them in the layout of a decoded set."""
    x_name, y_name = f"x_{split}", f"y_{split}"
    for name, array in ((x_name, x), (y_name, y)):
        check(name, "a NumPy or JAX array", isinstance(array, AnyArray), type(array).__name__)
    image, label = np.asarray(x), np.asarray(y)
    fix = f"Convert values between 0 and 1 with `(255 * {x_name}).round().astype(np.uint8)`"
    check(x_name, "images of dtype uint8", image.dtype == np.uint8, f"{image.dtype}. {fix}")
    check(x_name, "of shape [N, H, W, C] or [N, H, W]", image.ndim in (3, 4), image.shape)
    check(x_name, "at least one image", image.size > 0, f"the shape {image.shape}")
    fix = f"Use `{y_name}.argmax(-1)` for one-hot labels, `{y_name}.ravel()` for a column"
    check(y_name, "of shape [N]", label.ndim == 1, f"{label.shape}. {fix}")
    check(y_name, "integers", label.dtype.kind in "iu", label.dtype)
    check(y_name, f"one label for each of the {len(image)} images", len(label) == len(image), len(label))
    low, high = int(label.min()), int(label.max())
    check(y_name, f"between 0 and K - 1, K <= {MAX_CLASSES}", low >= 0 and high < MAX_CLASSES, f"{low} to {high}")
    image = image if image.ndim == 4 else image[..., None]  # [N H W] -> [N H W 1]
    return Examples(np.ascontiguousarray(image), label.astype(np.int32))


# --- Preparing ------------------------------------------------------------------------------------------------------


def _prepare(name: str, named: NamedSet | None, data_dir: Path, say: Callable[[str], None]) -> tuple[Path, str]:
    """Prepares a set in `data_dir`; returns its folder and the source that served it."""
    if named is None:
        return _prepare_with_tensorflow(name, data_dir, say), "tfds's own download"
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        raw, source = fetch(named, data_dir / "downloads" / "cnnjax" / name, say)
        folder = write_tfds(named, raw, data_dir, say)
    except OSError as error:
        raise UserError(
            f"`data_dir` must be a directory that can be written, got {data_dir} ({error}). "
            "Fix this, or choose another one with --data-dir DIR."
        ) from error
    say(f"{name} was served by {source}")
    return folder, source


def _prepare_with_tensorflow(name: str, data_dir: Path, say: Callable[[str], None]) -> Path:
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)  # Listing the community sets needs the network.
    if name.split("/", 1)[0] not in known:
        prepared = {info.parent.parent.name for info in data_dir.glob("*/*/dataset_info.json")}
        raise unknown_name("dataset", name, {*NAMED_SETS, *prepared, *known})
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"`dataset` {name!r} is not prepared in {data_dir}, and only TensorFlow can prepare it. Either run "
            f"`pip install tensorflow` and repeat the command, or copy a directory that was prepared elsewhere to "
            f"{data_dir / name}."
        )
    say(f"tfds is preparing {name} in {data_dir}")
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # tfds raises many types: no network, files to download manually, a full disk.
        raise UserError(f"tfds could not prepare {name!r} in {data_dir}: {error}") from error
    return Path(builder.data_dir)


def _decode_all(
    name: str, named: NamedSet | None, folder: Path, source: str, say: Callable[[str], None]
) -> ImageDataset:
    """Decodes and verifies both splits, and caches the arrays and the facts next to the shards."""
    say(f"decoding {name} from {folder} (once)")
    sha256, cached = {}, True
    for split in ("train", "test"):
        examples = decode(folder, split)
        sha256[split] = digest(examples)
        pinned = named.sha256.get(split) if named else None
        if pinned not in (None, sha256[split]):
            raise _mismatch(name, split, source, pinned, sha256[split])
        cached = _write_arrays(folder, split, examples) and cached
    dataset = ImageDataset(name, source, class_names(folder), sha256, folder)
    if not (cached and _write_facts(dataset, folder)):
        say(f"{folder} cannot be written, so the decoded arrays are not cached: every start will decode {name} again")
    return dataset


def _mismatch(name: str, split: str, source: str, expected: str | None, got: str) -> UserError:
    return UserError(
        f"The {split} split of {name!r} from {source} is not the known one: the SHA-256 of its images and labels "
        f"must be {expected}, got {got}. Move the prepared directory away if it exists, and run the command again to "
        "fetch the set again."
    )


# --- The cache ------------------------------------------------------------------------------------------------------


def _read_facts(name: str, folder: Path) -> ImageDataset | None:
    try:
        facts = json.loads((folder / CACHE / "facts.json").read_text())
        return ImageDataset(name, facts["source"], tuple(facts["class_names"]), facts["sha256"], folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_arrays(folder: Path, split: str, sha256: str) -> Examples | None:
    """Returns the decoded arrays, or None if they are missing or have another digest."""
    try:
        examples = Examples(*(np.load(folder / CACHE / f"{split}_{name}.npy") for name in Examples._fields))
    except (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError):  # The last two: a damaged header.
        return None
    return examples if digest(examples) == sha256 else None


def _write_facts(dataset: ImageDataset, folder: Path) -> bool:
    facts = {name: getattr(dataset, name) for name in ("name", "source", "class_names", "sha256")}  # Folders may move.
    return _write(folder / CACHE / "facts.json", lambda file: file.write(json.dumps(facts, indent=2).encode()))


def _write_arrays(folder: Path, split: str, examples: Examples) -> bool:
    return all(
        _write(folder / CACHE / f"{split}_{name}.npy", lambda file, array=array: np.save(file, array))
        for name, array in examples._asdict().items()
    )


def _write(path: Path, write: Callable[[Any], object]) -> bool:
    """Writes a file of the cache; returns whether this succeeded."""
    try:
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path, shared=True) as file:
            write(file)
    except OSError:
        return False
    return True
