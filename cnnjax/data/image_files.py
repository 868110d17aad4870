"""Images of any size and format, as input of a network."""

import io
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from cnnjax.errors import UserError
from cnnjax.files import open_regular
from cnnjax.process.console import track
from cnnjax.process.settings import num_cores
from cnnjax.process.streams import reason

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # Pillow's mode for each number of channels.
AHEAD = 64  # Number of images in work at a time: an interruption waits for few, and few are in memory.
T = TypeVar("T")
R = TypeVar("R")


def read_image(
    path: Path, image_shape: tuple[int, ...], resize: str = "crop", interpolation: str = "lanczos"
) -> UInt8[np.ndarray, "H W C"]:
    """Reads an image file as `open_image` does, and brings it to a shape as `fit_image` does."""
    check_channels(image_shape)
    return fit_image(open_image(path), image_shape, resize, interpolation)


def open_image(path: Path) -> Image.Image:
    """Reads an image file, or the first frame of an animation.

    Returns:
      The image, upright by its EXIF orientation, with 8 bits per channel in the mode L, RGB, or RGBA if it has
      transparency.

    Raises:
      UserError: `path` is not an image that Pillow can read.
    """
    try:
        # Pillow warns of large images, up to twice that size, and of metadata.
        with warnings.catch_warnings(action="ignore"), open_regular(path) as stream, Image.open(stream) as file:
            if file.mode in ("I", "F"):
                raise UserError(f"`image` must have 8 or 16 bits per channel, got {path} (32 bits, mode {file.mode}).")
            ImageOps.exif_transpose(file, in_place=True)
            image = _with_8_bits(file)
            image.load()  # It stays in memory when the file is closed.
            return image
    except UserError:
        raise
    except Exception as error:  # The decoders of Pillow raise errors of many types.
        unknown = isinstance(error, UnidentifiedImageError)
        why = "of an unknown format" if unknown else reason(error) or type(error).__name__
        raise UserError(f"`image` must be an image file (PNG, JPEG, WebP, ...), got {path} ({why}).") from error


def _with_8_bits(image: Image.Image) -> Image.Image:
    """Converts an image to 8 bits per channel in the mode L, RGB, or RGBA if it has transparency."""
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit gray instead of scaling it.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        return image.convert("RGBA")
    if image.mode not in ("L", "RGB"):
        return image.convert("L" if image.mode == "1" else "RGB")
    return image


def decode_image(content: bytes, channels: int | None) -> UInt8[np.ndarray, "H W C"]:
    """Decodes the image of a tfds set, which is an image file, and ignores its EXIF orientation, as tfds does.

    Images in the modes of `MODES` keep their pixels. Others, such as those with a palette, are converted as
    `open_image` does: tfds would return their numbers as they are stored.

    Args:
      content: of the file.
      channels: of the set's images, as it states them: gray is repeated, and opaque; None: as many as the image has.

    Raises:
      ValueError: the image has 32 bits per channel.
      Exception: of the decoders of Pillow, of many types.
    """
    with Image.open(io.BytesIO(content)) as file:
        if file.mode in ("I", "F"):
            raise ValueError(f"32 bits per channel, mode {file.mode}")
        opaque_gray = file.mode == MODES[1] and channels == 4  # Has to get an alpha.
        if file.mode in MODES.values() and "transparency" not in file.info and not opaque_gray:
            pixels = np.asarray(file)
            return np.repeat(pixels[..., None], channels or 1, axis=-1) if pixels.ndim == 2 else pixels
        image = _with_8_bits(file)
        return fit_image(image, (image.height, image.width, channels or len(image.getbands())))


def fit_image(
    image: Image.Image, image_shape: tuple[int, ...], resize: str = "crop", interpolation: str = "lanczos"
) -> UInt8[np.ndarray, "H W C"]:
    """Brings an image to a shape (H, W, C).

    Args:
      image: in the mode L, LA, RGB or RGBA. It is put on a white background if it is transparent and C is 1 or 3, and
        converted to gray or color. If C is 2 or 4, the last channel is alpha.
      image_shape: C is 1 to 4.
      resize: "crop": the shorter side is scaled to fit, and the center is kept; "pad": the longer side is scaled to
        fit, and the rest is black, or transparent; "stretch": both sides are scaled.
      interpolation: "lanczos", "bicubic" or "bilinear", each with antialiasing. An image of the right size keeps its
        pixels.
    """
    height, width, channels = image_shape
    if channels in (1, 3) and image.mode in ("LA", "RGBA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != MODES[channels]:
        image = image.convert(MODES[channels])
    method = Image.Resampling[interpolation.upper()]
    match resize:
        case "crop":
            image = ImageOps.fit(image, (width, height), method)
        case "pad":
            if image.width >= 2 * width * image.height:  # Pillow would round the height to 0, and leave it all black.
                image = image.resize((width, 1), method)
            elif image.height >= 2 * height * image.width:
                image = image.resize((1, height), method)
            image = ImageOps.pad(image, (width, height), method)
        case _:
            image = image.resize((width, height), method)
    return np.array(image).reshape(image_shape)


def fit_array(
    image: UInt8[np.ndarray, "H W C"], image_shape: tuple[int, ...], resize: str, interpolation: str
) -> UInt8[np.ndarray, "H2 W2 C2"]:
    """Brings an image of 1 to 4 channels to a shape as `fit_image` does."""
    pixels = image.squeeze(-1) if image.shape[-1] == 1 else image
    return fit_image(Image.fromarray(pixels), image_shape, resize, interpolation)


def fit_images(
    images: UInt8[np.ndarray, "N H W C"], image_shape: tuple[int, ...], resize: str, interpolation: str, name: str
) -> UInt8[np.ndarray, "N H2 W2 C2"]:
    """Brings images of 1 to 4 channels to a shape as `fit_image` does, on all cores.

    Args:
      name: what they are, for the progress bar.
    """
    result = np.empty((len(images), *image_shape), np.uint8)

    def fit(i: int) -> None:
        result[i] = fit_array(images[i], image_shape, resize, interpolation)

    for _ in track(on_all_cores(fit, range(len(images))), f"resizing {name}", total=len(images)):
        pass
    return result


def on_all_cores(fn: Callable[[T], R], items: Iterable[T], ahead: int = AHEAD) -> Generator[R, None, None]:
    """Yields the results of a function in order, computed in threads: Pillow releases the interpreter's lock.

    Args:
      ahead: the largest number of items that are in work, or done and not yet yielded.
    """
    threads, results = ThreadPoolExecutor(num_cores()), deque[Future[R]]()
    try:
        for item in items:
            results.append(threads.submit(fn, item))
            if len(results) >= ahead:
                yield results.popleft().result()
        while results:
            yield results.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)


def check_channels(image_shape: tuple[int, ...]) -> None:
    """Checks that images of a shape (H, W, C) can be made of files.

    Raises:
      UserError: C is above 4.
    """
    if (channels := image_shape[-1]) not in MODES:
        raise UserError(f"`image` must have 1 to 4 channels to be read from a file, got a network of {channels}.")
