"""What each step of an epoch sees: plans drawn on the host, and batches made from them on the device.

A plan (order, mirrors, shifts, cutouts) is a pure function of (seed, epoch). Its random bits come from a counter-based
generator's raw stream and a stable sort: NumPy promises that stream for ever; the algorithms behind
`Generator.permutation` may change, and a seed is a promise. The pixels stay on the device, as bytes.
"""

from functools import lru_cache
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from cnnjax.config import AugmentConfig
from cnnjax.errors import UserError
from cnnjax.step import Batch
from cnnjax.typing import AnyArray

# What a random stream is for: no two purposes share bits.
SPLIT, ORDER, FLIP, SHIFT, CUTOUT = range(5)


class Standardization(NamedTuple):
    """The statistics of the training images, in units of a pixel (0 to 255)."""

    mean: Float[AnyArray, " C"]
    std: Float[AnyArray, " C"]


class Pixels(NamedTuple):
    """A set on the device, and what its pixels are standardized by."""

    image: UInt8[AnyArray, "N H W C"]
    label: Int[AnyArray, " N"]
    standardization: Standardization


class Plan(NamedTuple):
    """What batches are made of: a row a step (S of them), or one row."""

    example: Int[AnyArray, "*S B"]  # Its index in the set.
    mask: Bool[AnyArray, "*S B"]  # Whether it counts, or fills the batch up.
    mirrored: Bool[AnyArray, "*S B"]
    shift: Int[AnyArray, "*S B 2"]  # Down and to the right, in pixels.
    cutout: Int[AnyArray, "*S B 2"]  # The top left corner of the square.


def random_bits(seed: int, purpose: int, epoch: int, size: int) -> np.ndarray:
    """Returns uint64 [size]: the Philox stream of (seed, purpose, epoch)."""
    return np.random.Philox(np.random.SeedSequence([seed, purpose, epoch])).random_raw(size)


def epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """Returns a permutation, int64 [num_examples]: the order in which epoch `epoch` (from 0) sees the examples."""
    return np.argsort(random_bits(seed, ORDER, epoch, num_examples), kind="stable")


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Returns how many batches hold every example once.

    Raises:
      UserError: `batch_size` is not between 1 and `num_examples`.
    """
    if not 1 <= batch_size <= num_examples:
        raise UserError(f"`batch_size` must be between 1 and the {num_examples} training examples, got {batch_size}.")
    return -(-num_examples // batch_size)


def check_augment(augment: AugmentConfig, image_size: tuple[int, int]) -> None:
    """Checks that images are large enough for what is done to them.

    Raises:
      UserError: `augment` moves images by their size or more, or cuts out more than the image.
    """
    for name, value, most in (
        ("translate", augment.translate, min(image_size) - 1),
        ("cutout", augment.cutout, min(image_size)),
    ):
        if value > most:
            size = "×".join(map(str, image_size))
            raise UserError(f"`augment.{name}` must be at most {most} for images of {size} pixels, got {value}.")


@lru_cache(maxsize=64)  # A step asks for the plan of its whole epoch; many seeds may train at a time.
def epoch_plan(
    seed: int, epoch: int, num_examples: int, *, batch_size: int, augment: AugmentConfig, image_size: tuple[int, int]
) -> Plan:
    """Returns the plan of an epoch (from 0), S = `steps_per_epoch` rows.

    An epoch goes through a permutation of all examples. Its last batch is filled up to `batch_size` from the epoch's
    beginning, and masks what it has filled up with: every example counts once an epoch.

    Args:
      augment: "alternating" flips mirror a half of the examples, drawn once, in even epochs, and the others in odd
        ones.
      image_size: height and width.

    Raises:
      UserError: as `check_augment`.
    """
    check_augment(augment, image_size)
    steps = steps_per_epoch(num_examples, batch_size)
    position = np.arange(steps * batch_size)
    order = epoch_order(seed, epoch, num_examples)
    if augment.flip == "none":
        mirrored = np.zeros(num_examples, bool)
    elif augment.flip == "random":
        mirrored = random_bits(seed, FLIP, epoch, num_examples) % 2 == 1
    else:
        mirrored = (random_bits(seed, FLIP, 0, num_examples)[order] + np.uint64(epoch)) % 2 == 1
    span = 2 * augment.translate + 1
    shift = _pairs(seed, SHIFT, epoch, num_examples, (span, span)) - augment.translate
    corners = (image_size[0] - augment.cutout + 1, image_size[1] - augment.cutout + 1)
    cutout = _pairs(seed, CUTOUT, epoch, num_examples, corners)
    which = position % num_examples
    rows = (order.astype(np.int32), mirrored, shift, cutout)
    example, mirrored, shift, cutout = (a[which].reshape(steps, batch_size, *a.shape[1:]) for a in rows)
    mask = (position < num_examples).reshape(steps, batch_size)
    for values in (example, mask, mirrored, shift, cutout):
        values.setflags(write=False)  # The next caller gets the same arrays.
    return Plan(example, mask, mirrored, shift, cutout)


def _pairs(seed: int, purpose: int, epoch: int, size: int, below: tuple[int, int]) -> np.ndarray:
    """Returns int32 [size, 2], each uniform from 0 up to `below` (to 2**-32)."""
    if below == (1, 1):
        return np.zeros((size, 2), np.int32)
    bits = random_bits(seed, purpose, epoch, size)
    return np.stack([(bits >> np.uint64(32)) % below[0], (bits & np.uint64(2**32 - 1)) % below[1]], 1).astype(np.int32)


def plain_plan(num_examples: int, batch_size: int) -> Plan:
    """Returns the plan that sees every example once, in order and as it is; it fills up as `epoch_plan` does."""
    steps = -(-num_examples // batch_size)
    position = np.arange(steps * batch_size, dtype=np.int32).reshape(steps, batch_size)
    zeros = np.zeros((*position.shape, 2), np.int32)
    return Plan(position % num_examples, position < num_examples, np.zeros(position.shape, bool), zeros, zeros)


def row(plan: Plan, step: int | slice) -> Plan:
    """Returns one row of a plan, or the rows of a slice."""
    return Plan(*(values[step] for values in plan))


def make_batch(pixels: Pixels, plan: Plan, augment: AugmentConfig) -> Batch:
    """Makes the batch of a plan's row: one gather takes the examples in their order, moved and mirrored. Pure; jit it.

    Pixels that a shift brings in from outside are those of the image, mirrored at its edge (which is not repeated). A
    cutout is set to 0, the mean of the training images.

    Returns:
      Standardized images, float32.
    """
    _, h, w, _ = pixels.image.shape
    if augment.translate == 0 and augment.flip == "none":
        image = pixels.image[plan.example]
    else:
        y = _reflect(jnp.arange(h)[None] - plan.shift[:, :1], h)  # [B H]
        x = _reflect(jnp.arange(w)[None] - plan.shift[:, 1:], w)  # [B W]
        x = jnp.where(plan.mirrored[:, None], w - 1 - x, x)
        image = pixels.image[plan.example[:, None, None], y[:, :, None], x[:, None, :]]  # [B H W C]
    image = standardize(image, pixels.standardization)
    if augment.cutout:
        y, x = (jnp.arange(n)[None] - plan.cutout[:, i, None] for i, n in enumerate((h, w)))  # [B H], [B W]
        inside = ((y >= 0) & (y < augment.cutout))[:, :, None] & ((x >= 0) & (x < augment.cutout))[:, None, :]
        image = jnp.where(inside[..., None], 0.0, image)
    return Batch(image, pixels.label[plan.example], plan.mask)


def _reflect(i: Int[Array, "B N"], size: int) -> Int[Array, "B N"]:
    """Returns indices in [0, size): those outside are mirrored at the first and the last."""
    i = jnp.abs(i)
    return size - 1 - jnp.abs(size - 1 - i)


def standardize(image: AnyArray, standardization: Standardization) -> Float[AnyArray, "..."]:
    """Returns float32 [... C] of mean 0 and deviation 1 over the training images."""
    mean, std = (s.reshape((1,) * (image.ndim - 1) + s.shape) for s in standardization)
    return (image.astype(np.float32) - mean) / std


def pixel_statistics(image: np.ndarray) -> Standardization:
    """Returns the mean and deviation of each channel of uint8 [N H W C] (a deviation of 0 becomes 1)."""
    counts, value = np.zeros((image.shape[-1], 256), np.int64), np.arange(256.0)
    for i in range(0, len(image), 1000):  # NumPy widens what it counts eightfold.
        pixels = image[i : i + 1000].reshape(-1, image.shape[-1])
        counts += [np.bincount(channel, minlength=256) for channel in pixels.T]
    num_pixels = counts[0].sum()
    mean = counts @ value / num_pixels
    std = np.sqrt(counts @ value**2 / num_pixels - mean**2)
    return Standardization(mean.astype(np.float32), np.where(std > 0, std, 1.0).astype(np.float32))


def split_validation(seed: int, label: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Holds out a class-balanced part of the training examples.

    Args:
      seed: picks which examples.
      label: int [N].
      fraction: of each class, in [0, 1); rounded to whole examples, at least one of each class. 0 holds out none.

    Returns:
      The indices of the training and of the validation part, each sorted.

    Raises:
      UserError: `fraction` leaves nothing of a class to train on.
    """
    held_out = np.zeros(len(label), bool)
    if fraction == 0:
        return np.arange(len(label)), np.flatnonzero(held_out)
    shuffled = np.argsort(random_bits(seed, SPLIT, 0, len(label)), kind="stable")
    for k in np.unique(label):
        members = shuffled[label[shuffled] == k]
        count = max(1, round(fraction * len(members)))
        if count == len(members):
            raise UserError(
                f"`validation_fraction` must leave a training example of each class, got {fraction} with "
                f"{len(members)} of class {k}."
            )
        held_out[members[:count]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
