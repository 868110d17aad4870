"""Image classification sets, identified by their digests: tfds sets (decoded once and cached) and arrays in memory."""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cnnjax.data.cache import (
    CACHE,
    Facts,
    read_arrays,
    read_facts,
    remove_partial_files,
    write_arrays,
    write_cache,
)
from cnnjax.data.folders import absolute, check_free, default_data_dir, exclusive, prepared_folder, publish, staging
from cnnjax.data.named import NAMED_SETS
from cnnjax.data.sources import NamedSet, fetch
from cnnjax.data.tfds_format import (
    Examples,
    check_tensorflow,
    class_names,
    decode,
    prepare_with_tensorflow,
    write_tfds,
)
from cnnjax.errors import UserError, check, option, user_code
from cnnjax.typing import AnyArray

MAX_CLASSES = 1 << 20  # A label that exceeds this is an identifier, not a class.


@dataclass(frozen=True)
class ImageDataset:
    """An image classification set with the splits "train" and "test".

    Attributes:
      name: the tfds name; for arrays in memory "arrays", or the name of the function that returned them.
      source: where the pixels came from, in words.
      class_names: the name of each label, in order.
      image_shape: (H, W, C), of both splits.
      sha256: for each split, the `digest` of its images and labels.
      folder: the prepared tfds directory, or None.
      arrays: the splits of a set in memory; a tfds set is read by `load`.
    """

    name: str
    source: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, ...]
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
        examples = read_arrays(self.folder, split)
        if examples is None or digest(examples) != self.sha256[split]:
            examples = decode(self.folder, split)
            got = digest(examples)
            if got != self.sha256[split]:
                raise _mismatch(self.name, split, f"{self.folder}, from {self.source}", self.sha256[split], got)
            if read_facts(self.folder) is not None:  # Without them, the arrays would not be used.
                with suppress(OSError):
                    write_arrays(self.folder, split, examples)
        return examples


def load_dataset(
    dataset: str | tuple[Any, ...] | Callable[[], Any],
    data_dir: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] = print,
    *,
    version: str | None = None,
) -> ImageDataset:
    """Finds a tfds set in `data_dir`, downloading and preparing it if necessary, or wraps arrays.

    Example:
      >>> load_dataset("fashion_mnist").load("train").image.shape
      (60000, 28, 28, 1)

    Args:
      dataset: a tfds name such as "cifar10" or "name/config"; or the arrays `(x_train, y_train, x_test, y_test)` with
        images uint8 [N H W C] or [N H W] and integer labels [N] from 0 to K - 1; or a function that returns them. K is
        the largest label + 1. The arrays are not copied.
      data_dir: the tfds directory; `default_data_dir()` if None. Created only for a set that can be fetched.
      say: receives progress messages, one line each.
      version: the version of a tfds set to use if it is prepared; the newest one otherwise.

    Raises:
      UserError: the name is unknown, no source is available, a digest does not match, the set does not consist of
        labeled images of one shape, or `data_dir` is no local directory, or cannot be read or written.
    """
    if isinstance(dataset, str):
        found = _load_tfds(
            dataset.strip("/"), default_data_dir() if data_dir is None else absolute(Path(data_dir)), version, say
        )
    elif callable(dataset):
        with user_code("`dataset`"):
            arrays = dataset()
        found = _from_arrays(getattr(dataset, "__name__", type(dataset).__name__), arrays)
    else:
        found = _from_arrays("arrays", dataset)
    if (channels := found.image_shape[-1]) > 4:
        say(f"{found.name} has images of {channels} channels: `cnnjax predict` cannot read such images from files")
    return found


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
        image_shape=train,
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


# --- tfds sets ------------------------------------------------------------------------------------------------------


def _load_tfds(name: str, data_dir: Path, version: str | None, say: Callable[[str], None]) -> ImageDataset:
    named = NAMED_SETS.get(name)
    folder = prepared_folder(name, data_dir, version)
    if folder is not None and (cached := _cached(name, named, folder)):
        return cached
    if folder is None:
        if named is None:
            check_tensorflow(name, data_dir)
        if not data_dir.exists():
            say(f"{data_dir} does not exist yet, so {name} is prepared there")
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _not_writable(data_dir, error) from error
    with exclusive(name, data_dir, say) as locked:
        folder = prepared_folder(name, data_dir, version)  # Perhaps by the process that had the lock.
        if folder is None:
            return _prepare(name, named, data_dir, locked, say)
        if cached := _cached(name, named, folder):
            return cached
        if locked:
            remove_partial_files(folder / CACHE)
        return _decode_all(name, named, folder, f"the prepared tfds directory {folder}", say)


def _cached(name: str, named: NamedSet | None, folder: Path) -> ImageDataset | None:
    """Returns a set whose splits have been decoded and checked, or None."""
    if (facts := read_facts(folder)) is None:
        return None
    if named is not None and named.sha256 not in ({}, facts.sha256):
        return None
    return ImageDataset(name, facts.source, facts.class_names, facts.image_shape, facts.sha256, folder)


def _prepare(
    name: str, named: NamedSet | None, data_dir: Path, locked: bool, say: Callable[[str], None]
) -> ImageDataset:
    """Prepares a set in `data_dir`; what was fetched gets its place there after its digests are verified."""
    try:
        with staging(name, data_dir, locked) as stage:
            if named is None:
                folder = prepare_with_tensorflow(name, data_dir, stage, say)
                return _cached(name, None, folder) or _decode_all(name, None, folder, "tfds's own download", say)
            check_free(data_dir / name / named.version)
            downloads = data_dir / "downloads" / "cnnjax" / name
            if locked:
                remove_partial_files(downloads)
            raw, source = fetch(named, downloads, say)
            folder = write_tfds(named, raw, stage, say)
            del raw
            say(f"{name} was served by {source}")
            dataset = _decode_all(name, named, folder, source, say)
            return replace(dataset, folder=publish(folder, stage, data_dir))
    except OSError as error:
        raise _not_writable(data_dir, error) from error


def _not_writable(data_dir: Path, error: OSError) -> UserError:
    return UserError(
        f"`data_dir` must be a directory that can be written, got {data_dir} ({error}). "
        f"Fix this, or choose another one: {option('data_dir', 'DIR')}."
    )


def _decode_all(
    name: str, named: NamedSet | None, folder: Path, source: str, say: Callable[[str], None]
) -> ImageDataset:
    """Decodes and verifies both splits, and caches the arrays and the facts next to the shards."""
    say(f"decoding {name} {folder.name} (once)")
    splits = {split: decode(folder, split) for split in ("train", "test")}
    sha256 = {split: digest(examples) for split, examples in splits.items()}
    for split, pinned in (named.sha256 if named else {}).items():
        if sha256[split] != pinned:
            raise _mismatch(name, split, source, pinned, sha256[split])
    train, test = (examples.image.shape[1:] for examples in splits.values())
    if test != train:
        raise UserError(f"{folder} must hold test images of the same shape {train} as its training images, got {test}.")
    facts = Facts(source, class_names(folder), train, sha256)
    try:
        write_cache(folder, splits, facts)
    except OSError as error:
        say(f"the decoded arrays cannot be cached ({error}): every start will decode {name} again")
    return ImageDataset(name, source, facts.class_names, train, sha256, folder)


def _mismatch(name: str, split: str, source: str, expected: str | None, got: str) -> UserError:
    return UserError(
        f"The {split} split of {name!r} from {source} is not the known one: the SHA-256 of its images and labels "
        f"must be {expected}, got {got}. Move the prepared directory away if it exists, and run the command again to "
        "fetch the set again."
    )
