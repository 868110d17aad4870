"""RandAugment on the device, in units of pixels: random operations with one magnitude.

Each image gets its own operations. All are computed for all images, and one is selected, because an accelerator
computes a batch at once; they share one warp and one blend.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

OPS = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "auto_contrast",
    "equalize",
)
MAX_MAGNITUDE = 30
GRAY = 128.0  # Fills what a warp leaves empty.


def rand_augment(
    key: Key[Array, " B"], image: Float[Array, "B H W C"], *, num_ops: int, magnitude: float
) -> Float[Array, "B H W C"]:
    """Applies `num_ops` random operations to each image, one after the other; see `apply_op`.

    Args:
      key: one key per example.
      image: pixels from 0 to 255; C is 1 or 3.
      num_ops: N of the paper.
      magnitude: M of the paper, from 0 to 30.

    Source: Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search space" (2019), with
    the ranges of torchvision.
    """

    def of_one(key: Key[Array, ""], image: Float[Array, "H W C"]) -> Float[Array, "H W C"]:
        for op_key in jax.random.split(key, num_ops):
            which, way = jax.random.split(op_key)
            op = jax.random.randint(which, (), 0, len(OPS), jnp.int32)
            sign = jnp.where(jax.random.bernoulli(way, jnp.float32(0.5)), jnp.float32(1), jnp.float32(-1))
            image = apply_op(image, op, sign, magnitude)
        return image

    return jax.vmap(of_one)(key, image)


def apply_op(
    image: Float[Array, "H W C"], op: Int[Array, ""], sign: Float[Array, ""], magnitude: float
) -> Float[Array, "H W C"]:
    """Applies one of `OPS` to an image of pixels from 0 to 255.

    Shears and translations by up to 0.3 and 150 / 331 of the side, rotations by up to 30 degrees, take the nearest
    pixel; outside is gray (128). Brightness, color, contrast and sharpness are multiplied by 1 ± up to 0.9. Posterize
    keeps 8 to 4 bits, and solarize inverts pixels that are at least 255 down to 0.

    Args:
      op: the index in `OPS`.
      sign: 1 or -1, the direction.
      magnitude: from 0 to 30.
    """
    level = magnitude / MAX_MAGNITUDE

    def chosen(*names: str) -> Bool[Array, ""]:
        return jnp.any(jnp.stack([op == OPS.index(name) for name in names]))

    image = _warp(image, *_affine(image.shape, chosen, sign * level))
    gray = _gray(image)  # [H W 1]
    mean = jnp.floor(jnp.round(gray).mean() + 0.5)
    dull = jnp.where(chosen("color"), gray, jnp.where(chosen("contrast"), mean, 0.0))
    dull = jnp.where(chosen("sharpness"), _smooth(image), dull)
    blended = jnp.clip(dull + (1 + 0.9 * sign * level) * (image - dull), 0, 255)
    image = jnp.where(chosen("brightness", "color", "contrast", "sharpness"), blended, image)
    step = 2 ** round(4 * level)
    image = jnp.where(chosen("posterize"), jnp.floor(image / step) * step, image)
    image = jnp.where(chosen("solarize") & (image >= 255 * (1 - level)), 255 - image, image)
    image = jnp.where(chosen("auto_contrast"), _auto_contrast(image), image)
    return jnp.where(chosen("equalize"), _equalize(image), image)


def _affine(
    shape: tuple[int, ...], chosen: Callable[..., Array], level: Float[Array, ""]
) -> tuple[Float[Array, "2 2"], Array]:
    """Returns the matrix and the offset that map places (x, y) of the new image to those of the old one."""
    height, width, _ = shape
    angle = jnp.where(chosen("rotate"), jnp.deg2rad(30.0) * level, 0.0)
    shear_x = jnp.where(chosen("shear_x"), 0.3 * level, 0.0)
    shear_y = jnp.where(chosen("shear_y"), 0.3 * level, 0.0)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    matrix = jnp.stack([jnp.stack([cos, shear_x - sin]), jnp.stack([shear_y + sin, cos])])
    size = jnp.asarray([width, height], jnp.float32)
    center = jnp.where(chosen("rotate"), size / 2, 0.0)  # Shears keep the top left corner.
    shift = jnp.trunc(150 / 331 * level * size)
    shift = jnp.where(jnp.stack([chosen("translate_x"), chosen("translate_y")]), shift, 0.0)
    return matrix, center - matrix @ center + shift


def _warp(image: Float[Array, "H W C"], matrix: Float[Array, "2 2"], offset: Float[Array, "2"]) -> Array:
    height, width, channels = image.shape
    y, x = (jnp.arange(side, dtype=jnp.float32) + 0.5 for side in (height, width))
    y, x = jnp.meshgrid(y, x, indexing="ij")  # [H W]
    old_x = jnp.floor(matrix[0, 0] * x + matrix[0, 1] * y + offset[0]).astype(jnp.int32)
    old_y = jnp.floor(matrix[1, 0] * x + matrix[1, 1] * y + offset[1]).astype(jnp.int32)
    inside = (old_x >= 0) & (old_x < width) & (old_y >= 0) & (old_y < height)
    index = jnp.clip(old_y, 0, height - 1) * width + jnp.clip(old_x, 0, width - 1)
    return jnp.where(inside[..., None], image.reshape(-1, channels)[index], GRAY)


def _gray(image: Float[Array, "H W C"]) -> Float[Array, "H W 1"]:
    """Source: ITU-R 601-2, as in Pillow's mode L."""
    if image.shape[-1] == 1:
        return image
    return (image * jnp.asarray([[[0.299, 0.587, 0.114]]], jnp.float32)).sum(-1, keepdims=True)


def _smooth(image: Float[Array, "H W C"]) -> Float[Array, "H W C"]:
    """Returns the mean of 3×3 pixels, that in the middle with weight 5; at the edges, the image. Source: Pillow."""
    height, width, _ = image.shape
    if min(height, width) < 3:
        return image
    rows = image[:-2] + image[1:-1] + image[2:]
    total = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    return image.at[1:-1, 1:-1].set((total + 4 * image[1:-1, 1:-1]) / 13)


def _auto_contrast(image: Float[Array, "H W C"]) -> Float[Array, "H W C"]:
    """Spreads each channel over 0 to 255."""
    low, high = image.min((0, 1), keepdims=True), image.max((0, 1), keepdims=True)
    spread = (image - low) * (255 / jnp.where(high > low, high - low, 255.0))
    return jnp.where(high > low, spread, image)


def _equalize(image: Float[Array, "H W C"]) -> Float[Array, "H W C"]:
    """Gives each channel a flat histogram, as Pillow does."""
    pixel = jnp.round(image).astype(jnp.int32)

    def of_channel(pixel: Int[Array, "H W"]) -> Float[Array, "H W"]:
        count = jnp.zeros(256, jnp.int32).at[pixel.ravel()].add(1)
        step = (pixel.size - count[pixel.max()]) // 255
        before = jnp.cumsum(count) - count  # Darker pixels.
        table = jnp.minimum((step // 2 + before) // jnp.maximum(step, 1), 255)
        return jnp.where(step > 0, table, jnp.arange(256, dtype=jnp.int32))[pixel].astype(jnp.float32)

    return jax.vmap(of_channel, in_axes=-1, out_axes=-1)(pixel)
