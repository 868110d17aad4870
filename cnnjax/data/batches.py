"""Batches made on the device, where the data set stays as bytes."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from cnnjax.data.augment import Augment
from cnnjax.data.order import Plan
from cnnjax.typing import AnyArray, Batch

PIXEL_STREAM = 2**32 - 1  # Folded into the key of an epoch for `transform_pixels`; no draw has this number.


class Standardization(NamedTuple):
    """Mean and standard deviation of the training images, per channel, in pixel units (0 to 255)."""

    mean: Float[AnyArray, " C"]
    std: Float[AnyArray, " C"]


class Pixels(NamedTuple):
    """A data set on the device, with its standardization."""

    image: UInt8[AnyArray, "N H W C"]
    label: Int[AnyArray, " N"] | PyTree  # A pytree only in a `DataLoader`.
    standardization: Standardization


class StreamedPixels(NamedTuple):
    """The images of one batch on the device, in the order of the batch, with the standardization of the data set."""

    image: UInt8[AnyArray, "B H W C"]
    label: Int[AnyArray, " B"]
    standardization: Standardization


def make_batch(
    pixels: Pixels | StreamedPixels, plan: Plan, augment: Augment | None = None, key: Key[Array, ""] | None = None
) -> Batch:
    """Makes the batch of one row of a plan. Pure; jit it.

    A single gather reads the examples in order, shifted (with reflect padding) and mirrored. Then follow
    `augment.transform_pixels`, cutout, which sets pixels to 0, the mean of the training images, and
    `augment.transform`.

    Args:
      pixels: a data set, of which the plan selects examples; or the examples of this batch, which it numbers.
      augment: no augmentation if None.
      key: the key of the epoch; `plan.draw` is folded in. Needed by these two methods only.

    Returns:
      Standardized images, float32.
    """
    augment = augment or Augment()
    _, h, w, _ = pixels.image.shape
    streamed = isinstance(pixels, StreamedPixels)
    label = pixels.label if streamed else jax.tree.map(lambda values: values[plan.example], pixels.label)
    if augment.translate == 0 and augment.flip == "none":
        image = pixels.image if streamed else pixels.image[plan.example]
    else:
        y = _reflect(jnp.arange(h, dtype=jnp.int32)[None] - plan.shift[:, :1], h)  # [B H]
        x = _reflect(jnp.arange(w, dtype=jnp.int32)[None] - plan.shift[:, 1:], w)  # [B W]
        x = jnp.where(plan.mirrored[:, None], w - 1 - x, x)
        if streamed:
            image = jax.vmap(lambda image, y, x: image[y[:, None], x])(pixels.image, y, x)  # [B H W C]
        else:
            image = pixels.image[plan.example[:, None, None], y[:, :, None], x[:, None, :]]
    if type(augment).transform_pixels is not Augment.transform_pixels:
        image = augment.transform_pixels(_keys(key, plan, augment, stream=PIXEL_STREAM), jnp.asarray(image))
        _, h, w, _ = image.shape
    image = standardize(image, pixels.standardization)
    if augment.cutout:
        rows, columns = (jnp.arange(n, dtype=jnp.int32)[None] for n in (h, w))
        y, x = rows - plan.cutout[:, 0, None], columns - plan.cutout[:, 1, None]  # [B H], [B W]
        inside = ((y >= 0) & (y < augment.cutout))[:, :, None] & ((x >= 0) & (x < augment.cutout))[:, None, :]
        image = jnp.where(inside[..., None], 0.0, image)
    batch = Batch(image, label, plan.mask)
    if type(augment).transform is Augment.transform:
        return batch
    return augment.transform(_keys(key, plan, augment), batch)


def _keys(key: Key[Array, ""] | None, plan: Plan, augment: Augment, *, stream: int | None = None) -> Key[Array, " B"]:
    """Returns a key for each example; those of two streams are independent."""
    if key is None:
        raise ValueError(f"`key` must be a key for {type(augment).__name__}, got None.")
    key = key if stream is None else jax.random.fold_in(key, stream)
    return jax.vmap(partial(jax.random.fold_in, key))(plan.draw)


def _reflect(i: Int[Array, "B N"], size: int) -> Int[Array, "B N"]:
    """Returns indices in [0, size): those outside are reflected at the edges, which are not repeated."""
    i = jnp.abs(i)
    return size - 1 - jnp.abs(size - 1 - i)


def standardize(image: AnyArray, standardization: Standardization) -> Float[AnyArray, "..."]:
    """Returns float32 [... C] with mean 0 and standard deviation 1 over the training images."""
    mean, std = (s.reshape((1,) * (image.ndim - 1) + s.shape) for s in standardization)
    return (image.astype(np.float32) - mean) / std


def pixel_statistics(image: np.ndarray) -> Standardization:
    """Returns the mean and standard deviation of each channel of uint8 [N H W C] (a deviation of 0 becomes 1)."""
    counts, value = np.zeros((image.shape[-1], 256), np.int64), np.arange(256)
    for i in range(0, len(image), 1000):  # `bincount` needs eight times the memory of its input.
        pixels = image[i : i + 1000].reshape(-1, image.shape[-1])
        counts += [np.bincount(channel, minlength=256) for channel in pixels.T]
    return statistics_of_sums(np.stack([counts @ value, counts @ value**2]), int(counts[0].sum()))


def image_sums(image: np.ndarray) -> Int[np.ndarray, "N 2 C"]:
    """Returns, for each image and channel of uint8 [N H W C], the sums over the pixels, and over their squares."""
    pixels = image.reshape(len(image), -1, image.shape[-1])
    return np.stack([pixels.sum(1, np.int64), np.square(pixels, dtype=np.uint16).sum(1, np.int64)], axis=1)


def statistics_of_sums(sums: Int[np.ndarray, "2 C"], num_pixels: int) -> Standardization:
    """Returns mean and deviation from the sums over all pixels, and over their squares.

    The sums are exact, so the same images give the same bits, whatever they were added up from.
    """
    mean, mean_square = sums / num_pixels
    std = np.sqrt(mean_square - mean**2)
    return Standardization(mean.astype(np.float32), np.where(std > 0, std, 1.0).astype(np.float32))
