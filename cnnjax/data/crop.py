"""Random resized crops on the device, with the pixels of Pillow."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key, Num

ATTEMPTS = 10  # To draw a crop that is inside the image, as in torchvision.


def random_resized_crop(
    key: Key[Array, " B"],
    image: Num[Array, "B H W C"],
    *,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Float[Array, "B H2 W2 C"]:
    """Crops a random rectangle of each image, and resizes it, see `draw_crop` and `crop_and_resize`.

    Args:
      key: one key per example.
      image: of any unit.
      size: (H2, W2).
    """
    _, height, width, _ = image.shape
    draw = partial(draw_crop, image_size=(height, width), scale=scale, ratio=ratio)
    return crop_and_resize(image, jax.vmap(draw)(key), size)


def draw_crop(
    key: Key[Array, ""], *, image_size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> Int[Array, "4"]:
    """Draws a rectangle: its area is uniform, the logarithm of its width / height, too, and then its place.

    A rectangle that is not inside the image is drawn again. If that fails ten times, it is the largest one in the
    middle of the image whose width / height is within `ratio`.

    Args:
      key: consumed.
      image_size: (H, W), in pixels.
      scale: the smallest and the largest area, as fractions of the image's.
      ratio: the smallest and the largest width / height.

    Returns:
      Top, left, height and width, in pixels.

    Source: Szegedy et al., "Going deeper with convolutions" (2014), section 6, as in torchvision's RandomResizedCrop.
    """
    height, width = image_size
    area_key, ratio_key, top_key, left_key = jax.random.split(key, 4)
    area = height * width * jax.random.uniform(area_key, (ATTEMPTS,), jnp.float32, *scale)
    log_ratio = jax.random.uniform(ratio_key, (ATTEMPTS,), jnp.float32, *jnp.log(jnp.asarray(ratio, jnp.float32)))
    w = jnp.round(jnp.sqrt(area * jnp.exp(log_ratio))).astype(jnp.int32)
    h = jnp.round(jnp.sqrt(area / jnp.exp(log_ratio))).astype(jnp.int32)
    inside = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first, found = jnp.argmax(inside), jnp.any(inside)
    whole_h, whole_w = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
    h, w = jnp.where(found, h[first], whole_h), jnp.where(found, w[first], whole_w)
    top = jax.random.randint(top_key, (), 0, height - h + 1, jnp.int32)
    left = jax.random.randint(left_key, (), 0, width - w + 1, jnp.int32)
    top, left = jnp.where(found, top, (height - h) // 2), jnp.where(found, left, (width - w) // 2)
    return jnp.stack([top, left, h, w])


def crop_and_resize(
    image: Num[Array, "B H W C"], crop: Int[Array, "B 4"], size: tuple[int, int]
) -> Float[Array, "B H2 W2 C"]:
    """Resizes a rectangle of each image bilinearly, with antialiasing, by two matrix products.

    Pixels outside of the rectangle have no influence. Pillow's `crop` and `resize`, with rounding, give the same.

    Args:
      image: of any unit.
      crop: top, left, height and width.
      size: (H2, W2).
    """
    image = image.astype(jnp.float32)
    rows, columns = (
        jax.vmap(partial(_weights, in_size=image.shape[1 + i], out_size=size[i]))(crop[:, i], crop[:, 2 + i])
        for i in range(2)
    )
    image = jnp.einsum("bih,bhwc->biwc", rows, image, precision=lax.Precision.HIGHEST)
    return jnp.einsum("bjw,biwc->bijc", columns, image, precision=lax.Precision.HIGHEST)


def _weights(
    start: Int[Array, ""], length: Int[Array, ""], *, in_size: int, out_size: int
) -> Float[Array, "{out_size} {in_size}"]:
    """Returns the weight of each pixel of a line in each pixel of the resized part of `length` from `start` on.

    A triangle around the center of the new pixel, as wide as two pixels of the coarser of both grids.
    """
    start, length = start.astype(jnp.float32), length.astype(jnp.float32)
    scale = length / out_size  # Old pixels per new one.
    center = start + (jnp.arange(out_size, dtype=jnp.float32) + 0.5) * scale
    pixel = jnp.arange(in_size, dtype=jnp.float32)
    distance = jnp.abs((pixel + 0.5)[None] - center[:, None]) / jnp.maximum(scale, 1)
    weight = jnp.where(((pixel >= start) & (pixel < start + length))[None], jnp.maximum(1 - distance, 0), 0)
    return weight / weight.sum(1, keepdims=True)
