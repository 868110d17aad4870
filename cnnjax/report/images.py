"""The pictures of the report: thumbnails, filters and feature maps, as PNG files in data URIs."""

import base64
import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

THUMBNAIL = 64  # Pixels of the longer side; smaller images keep their size.
NUM_FILTERS = 64
SIDE = 48  # Pixels of a feature map, at least.
GAP = 255  # The palette's index of the space between maps.
# Five colors of Matplotlib's viridis, between which the colors of a feature map are interpolated.
VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def to_picture(image: UInt8[np.ndarray, "H W C"]) -> Image.Image:
    """Returns an image of any number of channels as one that can be shown: gray, RGB or RGBA."""
    channels = image.shape[-1]
    if channels in (3, 4):
        return Image.fromarray(image)
    return Image.fromarray(image[..., 0] if channels == 1 else image.mean(axis=-1).astype(np.uint8))


def thumbnail(image: UInt8[np.ndarray, "H W C"]) -> str:
    """Returns a data URI of an image, reduced to at most `THUMBNAIL` pixels per side."""
    picture = to_picture(image)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return _data_uri(picture)


def filter_pictures(kernel: Float[np.ndarray, "h w C F"]) -> list[str]:
    """Returns the first filters of a convolution as data URIs: in color if they see RGB, else gray.

    Zero is middle gray, and all filters share one scale.
    """
    kernel = np.asarray(kernel, np.float32)[..., :NUM_FILTERS]
    kernel = kernel if kernel.shape[2] in (1, 3) else kernel.mean(axis=2, keepdims=True)
    scale = float(np.abs(kernel).max()) or 1.0
    pixels = np.round(127.5 + 127.5 * kernel / scale).astype(np.uint8)
    return [_data_uri(to_picture(pixels[..., i])) for i in range(pixels.shape[-1])]


def maps_picture(maps: Float[np.ndarray, "h w c"]) -> str:
    """Returns the feature maps of a layer, eight in a row, as a data URI.

    Dark is the lowest value of all of them, bright the highest. A vector, 1 by 1 by c, becomes one row of c squares.
    """
    maps = np.nan_to_num(np.asarray(maps, np.float32))
    maps = maps.transpose(0, 2, 1) if maps.shape[:2] == (1, 1) else maps
    low, high = float(maps.min()), float(maps.max())
    pixels = np.round((maps - low) / ((high - low) or 1.0) * 254).astype(np.uint8)
    scale = max(1, SIDE // pixels.shape[1])
    pixels = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    height, width, count = pixels.shape
    gap = 2 if count > 1 else 0
    columns = min(count, 8)
    rows = -(-count // columns)
    padding = ((0, gap), (0, gap), (0, rows * columns - count))
    cells = np.pad(pixels, padding, constant_values=GAP).reshape(height + gap, width + gap, rows, columns)
    sheet = cells.transpose(2, 0, 3, 1).reshape(rows * (height + gap), columns * (width + gap))
    picture = Image.fromarray(np.ascontiguousarray(sheet[: len(sheet) - gap, : sheet.shape[1] - gap]))
    picture.putpalette(palette())
    return _data_uri(picture, transparency=GAP)


def palette() -> Sequence[int]:
    """Returns the 256 colors of a feature map; the last one is the space between maps."""
    anchors = np.array(VIRIDIS)
    at = np.linspace(0, len(anchors) - 1, GAP)
    colors = np.stack([np.interp(at, np.arange(len(anchors)), anchors[:, i]) for i in range(3)], axis=1)
    return [*np.round(colors).astype(int).ravel().tolist(), 255, 255, 255]


def _data_uri(picture: Image.Image, **options: int) -> str:
    picture.save(file := io.BytesIO(), "PNG", **options)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
