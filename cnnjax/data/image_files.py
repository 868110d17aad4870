"""Image files of any format, as input of a network."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cnnjax.cli.streams import reason
from cnnjax.errors import UserError
from cnnjax.runs.files import open_regular

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # Of Pillow, for each number of channels.


def read_image(path: Path, image_shape: tuple[int, ...]) -> np.ndarray:
    """Reads an image file, or the first frame of an animation, as uint8 [H W C].

    It is rotated by its EXIF orientation, put on a white background if it is transparent and C is 1 or 3, converted to
    gray or color, and scaled to H×W with a center crop of the longer side. If C is 2 or 4, the last channel is alpha.

    Raises:
      UserError: `path` is not an image that Pillow can read, or C is above 4.
    """
    height, width, channels = image_shape
    if channels not in MODES:
        raise UserError(f"`image` must have 1 to 4 channels to be read from a file, got a network of {channels}.")
    try:
        # Pillow warns of large images, up to twice that size, and of metadata.
        with warnings.catch_warnings(action="ignore"), open_regular(path) as stream, Image.open(stream) as file:
            if file.mode in ("I", "F"):
                raise UserError(f"`image` must have 8 or 16 bits per channel, got {path} with 32 (mode {file.mode}).")
            ImageOps.exif_transpose(file, in_place=True)
            image: Image.Image = file
            if image.mode.startswith("I;16"):  # Pillow would clip 16-bit gray instead of scaling it.
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode not in ("L", "RGB") or image.has_transparency_data:  # A copy of a photograph is large.
                image = image.convert("RGBA")
                if channels in (1, 3):
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            if image.mode != MODES[channels]:
                image = image.convert(MODES[channels])
            fitted = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    except UserError:
        raise
    except Exception as error:  # The decoders of Pillow raise errors of many types.
        unknown = isinstance(error, UnidentifiedImageError)
        why = "of an unknown format" if unknown else reason(error) or type(error).__name__
        raise UserError(f"`image` must be an image file (PNG, JPEG, WebP, ...), got {path} ({why}).") from error
    return np.array(fitted).reshape(image_shape)
