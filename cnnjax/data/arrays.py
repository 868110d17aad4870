"""Arrays in memory as a data set."""

import hashlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from cnnjax.data.stored import Examples, StoredSet, digest
from cnnjax.errors import UserError, check
from cnnjax.typing import AnyArray

MAX_CLASSES = 1 << 20  # A label that exceeds this is an identifier, not a class.


def store_arrays(name: str, arrays: Any) -> StoredSet:
    """Wraps `(x_train, y_train, x_test, y_test)`, perhaps with `x_validation, y_validation`, see `load_dataset`.

    Raises:
      UserError: they are no such arrays.
    """
    is_tuple = isinstance(arrays, tuple)
    got = f"a tuple of {len(arrays)}" if is_tuple else type(arrays).__name__
    rule = "a tuple of arrays `(x_train, y_train, x_test, y_test)` or `(x_train, y_train, x_validation, y_validation, "
    check("dataset", f"{rule}x_test, y_test)`", is_tuple and len(arrays) in (4, 6), got)
    names = ("train", "test") if len(arrays) == 4 else ("train", "validation", "test")
    splits = {split: _examples(split, *arrays[2 * i : 2 * i + 2]) for i, split in enumerate(names)}
    train = splits["train"].image.shape[1:]
    for split, examples in splits.items():
        shape = examples.image.shape[1:]
        check(f"x_{split}", f"images of the same shape {train} as `x_train`", shape == train, shape)
    num_classes = max(2, *(int(examples.label.max()) + 1 for examples in splits.values()))
    sha256 = {split: digest(examples) for split, examples in splits.items()}
    return StoredSet(
        name=name,
        source="arrays in memory",
        class_names=tuple(map(str, range(num_classes))),
        image_shape=train,
        sha256=sha256,
        version=hashlib.sha256("".join(sha256.values()).encode()).hexdigest()[:12],
        load=splits.__getitem__,
        splits=names,
    )


def _how_to_convert(name: str, image: np.ndarray) -> str:
    """Returns the end of a message: the range of an array, and how it becomes uint8."""
    image = image.astype(np.float32) if image.dtype == jnp.bfloat16 else image
    if image.dtype.kind not in "iufb" or not image.size:
        return "."
    low, high = image.min(), image.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        return " with nan or infinite values. Remove them."
    is_float = image.dtype.kind == "f"
    if image.dtype.kind == "b" or (is_float and low >= -0.01 and high <= 1.01):  # Resizing may exceed the range.
        return f" between 0 and 1. Convert it with `(255 * {name}.clip(0, 1)).round().astype(np.uint8)`."
    if low > -0.5 and 16 < high < 255.5:
        return f" from {low} to {high}. Convert it with `{name}{'.round()' if is_float else ''}.astype(np.uint8)`."
    fix = "Undo its standardization, or scale it" if is_float else "Scale it"
    return f" from {low} to {high}. {fix}, so that it is between 0 and 255, and convert it."


def own_images(name: str, images: Any) -> UInt8[np.ndarray, "N H W C"]:
    """Returns images in the layout of a decoded set: a copy, unless they are a mapped file.

    Raises:
      UserError: they are not uint8 [N H W C] or [N H W].
    """
    check_plain(name, images)
    image = np.asarray(images)
    if image.dtype != np.uint8:
        raise UserError(f"`{name}` must be images of dtype uint8, got {image.dtype}{_how_to_convert(name, image)}")
    check(name, "of shape [N, H, W, C] or [N, H, W]", image.ndim in (3, 4), image.shape)
    check(name, "at least one image", image.size > 0, f"the shape {image.shape}")
    image = image if image.ndim == 4 else image[..., None]  # [N H W] -> [N H W 1]
    own = np.ascontiguousarray(image)
    # The caller may change the memory, even that of a JAX array. A mapped file may be larger than the memory.
    return own.copy() if not _is_mapped(image) and np.may_share_memory(own, image) else own


def check_images(name: str, images: Any, image_shape: tuple[int, ...]) -> UInt8[np.ndarray, "N H W C"]:
    """Returns images as an array with a channel axis.

    Args:
      name: what messages call them.
      images: uint8 [N H W C], or [N H W] if C is 1.
      image_shape: (H, W, C), that of the training images.

    Raises:
      UserError: they have another dtype or shape.
    """
    check(name, "an array without a mask", not isinstance(images, np.ma.MaskedArray), "a masked one")
    try:
        images = np.asarray(images)
    except ValueError as error:
        raise UserError(f"`{name}` must be one array, or of one size, got {error}.") from error
    height, width, channels = image_shape
    if images.ndim == 3 and channels == 1 and images.shape[1:] == (height, width):
        images = images[..., None]
    if images.dtype != np.uint8 or images.shape[1:] != image_shape:
        gray = f" or [N {height} {width}]" if channels == 1 else ""
        one = f" For one image: {name}[None]." if images.shape == image_shape else ""
        raise UserError(
            f"`{name}` must be uint8 [N {height} {width} {channels}]{gray}, with values from 0 to 255 as in the "
            f"training images, got {images.dtype} {[*images.shape]}.{one}"
        )
    return images


def check_plain(name: str, array: Any) -> None:
    """Raises a `UserError` unless a value is a NumPy or JAX array, without a mask."""
    check(name, "a NumPy or JAX array", isinstance(array, AnyArray), type(array).__name__)
    masked, got = isinstance(array, np.ma.MaskedArray), "a masked one. Remove the examples that are masked"
    check(name, "an array without a mask", not masked, got)


def _examples(split: str, x: Any, y: Any) -> Examples:
    """Validates the images and labels of a split, and returns them in the layout of a decoded set."""
    y_name = f"y_{split}"
    image = own_images(f"x_{split}", x)
    check_plain(y_name, y)
    label = np.asarray(y)
    fix = f"Use `{y_name}.argmax(-1)` for one-hot labels, `{y_name}.ravel()` for a column"
    check(y_name, "of shape [N]", label.ndim == 1, f"{label.shape}. {fix}")
    fix = f". Number the classes: names, {y_name} = np.unique({y_name}, return_inverse=True)"
    check(y_name, "integers", label.dtype.kind in "iu", f"{label.dtype}{fix if label.dtype.kind in 'USO' else ''}")
    check(y_name, f"one label for each of the {len(image)} images", len(label) == len(image), len(label))
    low, high = int(label.min()), int(label.max())
    check(y_name, f"between 0 and K - 1, K <= {MAX_CLASSES}", low >= 0 and high < MAX_CLASSES, f"{low} to {high}")
    return Examples(image, label.astype(np.int32))


def _is_mapped(array: np.ndarray) -> bool:
    """Returns whether an array is a view of an `np.memmap`; other mapped memory may be shared with the caller."""
    base: Any = array
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    return isinstance(base, np.memmap)
