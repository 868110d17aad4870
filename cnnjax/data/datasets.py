"""Image classification sets, identified by their digests: which examples a run sees, in which shape."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnnjax.data.arrays import store_arrays
from cnnjax.data.folders import absolute, default_data_dir, versions
from cnnjax.data.image_files import MODES, fit_images
from cnnjax.data.named import NAMED_SETS
from cnnjax.data.order import split_test, split_validation
from cnnjax.data.prepared import load_folder, load_tfds
from cnnjax.data.stored import INTERPOLATIONS, LISTS, MAX_SIDE, RESIZE, Examples, Fit, StoredSet, select
from cnnjax.errors import UserError, check, check_name, option, user_code

if TYPE_CHECKING:
    from cnnjax.data.stream import Streamed


@dataclass(frozen=True)
class ImageDataset:
    """An image classification set with the splits "train", "test", and perhaps "validation", in one image shape.

    Attributes:
      stored: the set as it is stored: its name, source, class names and digests.
      fit: how its images are brought to `image_shape`.
      test_split: the stored split that is the test set; None: a part of the training split.
      test_fraction: the size of this part, of each class.
      test_seed: selects it.
    """

    stored: StoredSet
    fit: Fit
    test_split: str | None = "test"
    test_fraction: float = 0.2
    test_seed: int = 0

    @property
    def name(self) -> str:
        """The tfds name, the path, or the name of a function; "arrays" for arrays."""
        return self.stored.name

    @property
    def source(self) -> str:
        """Where the pixels came from, in words."""
        return self.stored.source

    @property
    def folder(self) -> Path | None:
        """The prepared tfds directory, or None."""
        return self.stored.folder

    @property
    def version(self) -> str:
        """The tfds version; for folders and arrays 12 hexadecimal digits that identify the content."""
        return self.stored.version

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each label, in order."""
        return self.stored.class_names

    @property
    def num_classes(self) -> int:
        """The number of classes, K."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(H, W, C), of all splits."""
        return self.fit.shape_of(self.stored.image_shape)

    @property
    def sha256(self) -> dict[str, str]:
        """For each stored split that is used, the `digest` of its images and labels."""
        used = {"train", self.test_split} | {*self.splits} - {"test"}
        return {split: sha256 for split, sha256 in self.stored.sha256.items() if split in used}

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits that `load` accepts."""
        has_validation = "validation" in self.stored.sha256 and self.test_split != "validation"
        return ("train", *(["validation"] if has_validation else []), "test")

    def load(self, split: str) -> Examples:
        """Returns a split; verifies the digest of a tfds set.

        Raises:
          UserError: the shards hold different images or labels than before, or a class is too small to be divided.
        """
        examples = self._part(split, self.stored.load)
        if examples.image.shape[1:] == self.image_shape:
            return examples
        image = fit_images(examples.image, self.image_shape, self.fit.resize, self.fit.interpolation, split)
        return Examples(image, examples.label)

    @property
    def streams(self) -> bool:
        """Whether training reads the images from disk while it uses them."""
        return self.stored.stream is not None

    def open(self, split: str) -> "Examples | Streamed":
        """Returns a split as training uses it: on disk if the set `streams`, else in memory, see `load`."""
        return self.load(split) if self.stored.stream is None else self._part(split, self.stored.stream)

    def _part(self, split: str, read: Callable[[str], Any]) -> Any:
        """Returns a split, of the stored split or of the part of it that `read` returns."""
        check_name("split", split, self.splits)
        stored = self.test_split if split == "test" and self.test_split is not None else split
        examples = read("train" if stored == "test" and self.test_split is None else stored)
        if self.test_split is None and split in ("train", "test"):
            image, names = examples.image, self.class_names
            pixels = self.stored.pixels or (row.tobytes() for row in getattr(image, "stored", image))
            parts = split_test(self.test_seed, pixels, examples.label, self.test_fraction, names)
            examples = select(examples, parts[split == "test"])
        return examples

    def load_parts(self, seed: int, validation_fraction: float) -> tuple[Examples, Examples]:
        """Returns the examples to train on, and those of the validation, in memory.

        The latter are the split "validation" if the set has one; else a part of each class that `seed` selects.

        Args:
          validation_fraction: the size of this part; 0: no validation.

        Raises:
          UserError: a class is too small to be divided.
        """
        return self._parts(self.load, seed, validation_fraction)

    def open_parts(
        self, seed: int, validation_fraction: float
    ) -> "tuple[Examples, Examples] | tuple[Streamed, Streamed]":
        """Returns what `load_parts` returns, as `open` does."""
        return self._parts(self.open, seed, validation_fraction)

    def _parts(self, read: Callable[[str], Any], seed: int, validation_fraction: float) -> Any:
        train = read("train")
        if validation_fraction and "validation" in self.splits:
            return train, read("validation")
        kept, held_out = split_validation(seed, train.label, validation_fraction, self.class_names)
        return (select(train, kept) if len(held_out) else train), select(train, held_out)


def load_dataset(
    dataset: str | os.PathLike[str] | tuple[Any, ...] | Callable[[], Any],
    data_dir: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] = print,
    *,
    version: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    default_size: int | tuple[int, int] = 64,
    resize: str = "crop",
    interpolation: str = "lanczos",
    channels: int | None = None,
    skip_unreadable: bool = False,
    test_split: str | None = None,
    test_fraction: float = 0.2,
    test_seed: int = 0,
    stream: bool | None = None,
) -> ImageDataset:
    """Finds a tfds set in `data_dir`, prepares it if necessary, reads a folder of images, or wraps arrays.

    Example:
      >>> load_dataset("fashion_mnist").load("train").image.shape
      (60000, 28, 28, 1)
      >>> load_dataset("photos", image_size=(96, 128)).class_names
      ('cat', 'dog')

    Args:
      dataset: a tfds name such as "cifar10", "name/config" or "name:1.0.0"; or the path of a folder of images with a
        folder per class, or of a .csv or .jsonl file; or the arrays `(x_train, y_train, x_test, y_test)` with images
        uint8 [N H W C] or [N H W] and integer labels [N] from 0 to K - 1, perhaps with `x_validation, y_validation`
        before `x_test`; or a function that returns them. K is the largest label + 1. The arrays are not copied.
      data_dir: the tfds directory; `default_data_dir()` if None. Created only for a set that can be fetched.
      say: receives progress messages and the report on a folder, one line each.
      version: the version of the set to use if it is prepared; the newest one otherwise.
      image_size: height and width to which images are brought; None: `default_size` for a folder, else unchanged.
      default_size: see `image_size`.
      resize, interpolation: see `fit_image`.
      channels: 1, 3 or 4, see `fit_image`; None: 3 for a folder or a tfds set of 4 channels, else unchanged.
      skip_unreadable: leaves out the files of a folder that cannot be read, instead of refusing the folder.
      test_split: the split to score; None: "test", or a part of the training split if there is none.
      test_fraction: the size of this part, of each class.
      test_seed: selects it.
      stream: whether training reads the images from disk while it uses them, instead of keeping them in memory; None:
        if they would take more than half of it, and are in ArrayRecord format. `ImageDataset.load` returns arrays in
        any case.

    Raises:
      UserError: the name is unknown, no source is available, a digest does not match, the set does not consist of
        labeled images, of one shape if `image_size` is None, a file of a folder cannot be used, or `data_dir` is no
        local directory, or cannot be read or written.
    """
    check_name("resize", resize, RESIZE)
    check_name("interpolation", interpolation, INTERPOLATIONS)
    check("channels", "1, 3 or 4", channels in (None, 1, 3, 4), channels)
    check("test_fraction", "above 0 and below 1", 0 < test_fraction < 1, test_fraction)
    check("test_seed", "between 0 and 2**32 - 1", 0 <= test_seed < 2**32, test_seed)
    fit = Fit(_pair("image_size", image_size), channels, resize, interpolation)
    directory = default_data_dir() if data_dir is None else absolute(Path(data_dir))
    of_folder = re.fullmatch("[0-9a-f]{12}", version or "") is not None  # A folder may have been moved.
    if isinstance(dataset, os.PathLike) or (
        isinstance(dataset, str) and (of_folder or is_path(dataset, directory, say))
    ):
        size = fit.image_size or _pair("default_size", default_size)
        fit = fit._replace(image_size=size, channels=channels or 3)
        path = Path(os.path.expanduser(dataset))
        stored = load_folder(
            path,
            directory,
            say,
            version=version,
            fit=fit,
            skip_unreadable=skip_unreadable,
            test_split=test_split,
            stream=stream,
        )
    elif isinstance(dataset, str):
        stored = load_tfds(
            dataset.strip("/"), directory, say, version=version, fit=fit, test_split=test_split, stream=stream
        )
        if channels is None and stored.image_shape[-1] == 4:
            fit = fit._replace(channels=3)
    elif callable(dataset):
        with user_code("`dataset`"):
            arrays = dataset()
        stored = store_arrays(getattr(dataset, "__name__", type(dataset).__name__), arrays)
    else:
        stored = store_arrays("arrays", dataset)
    if stream and stored.stream is None:
        raise UserError(f"`stream` must be False for arrays in memory, got True. Leave {option('stream')} out.")
    if (given := stored.image_shape[-1]) > 4:
        say(f"{stored.name} has images of {given} channels: `cnnjax predict` cannot read such images from files")
    found = ImageDataset(stored, fit, test_split, test_fraction, test_seed)
    if found.image_shape != stored.image_shape:
        check("image_size", "None for images of another number of channels than 1 to 4", given in MODES, image_size)
    if test_split is None and "test" in stored.sha256:
        found = replace(found, test_split="test")
    elif test_split is None and version is None:
        say(
            f"{stored.name} has no test split: {test_fraction:.0%} of each class of its training images, drawn with "
            f"`test_seed` {test_seed}, are the test set"
        )
    elif test_split is not None and (test_split == "train" or test_split not in stored.sha256):
        others = ", ".join(sorted({*stored.splits} - {"train"})) or "none besides train"
        raise UserError(f"`test_split` must be a split of {stored.name} ({others}), got {test_split!r}.")
    return found


def _pair(name: str, size: int | tuple[int, int] | None) -> Any:
    pair: Any = size if isinstance(size, (tuple, list)) else (size, size)
    valid = len(pair) == 2 and all(isinstance(n, Integral) and 1 <= int(n) <= MAX_SIDE for n in pair)
    rule = f"a height and a width from 1 to {MAX_SIDE}, or one integer for both"
    check(name, rule, valid or size is None, size)
    return None if size is None else tuple(map(int, pair))


def is_path(dataset: str, data_dir: Path, say: Callable[[str], None]) -> bool:
    """Returns whether a data set is named by its path.

    Raises:
      UserError: a folder and a prepared set have this name, or it is a URL.
    """
    check("dataset", "a name or a local path", "://" not in dataset, f"{dataset!r}. Mount it, or copy the files")
    if re.match(r"[~/.]", dataset) or dataset.lower().endswith((*LISTS, "/")):
        return True
    if not os.path.lexists(dataset):
        return False
    if dataset in NAMED_SETS:
        say(f"{dataset} is the data set of this name; for the folder, write ./{dataset}")
        return False
    if versions(dataset, data_dir):
        raise UserError(
            f"`dataset` must be unambiguous, got {dataset!r}: a path here, and a set in {data_dir}. Write ./{dataset} "
            f"for the path, or {dataset}:VERSION for the set."
        )
    return True
