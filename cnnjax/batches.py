"""The order of the data: pure functions of (seed, epoch), on the host.

Random bits come from a counter-based generator's raw stream and a stable sort. NumPy promises that raw stream for ever;
the algorithms behind `Generator.permutation` may change, and a seed is a promise.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from cnnjax.data import Examples
from cnnjax.errors import UserError
from cnnjax.step import Batch

# What a random stream is for: no two purposes share bits.
SPLIT, ORDER, FLIP = range(3)


class Standardization(NamedTuple):
    """The statistics of the training images, in units of a pixel (0 to 255)."""

    mean: np.ndarray  # float32 [C]
    std: np.ndarray  # float32 [C]


def random_bits(seed: int, purpose: int, epoch: int, size: int) -> np.ndarray:
    """Returns uint64 [size]: the Philox stream of (seed, purpose, epoch)."""
    return np.random.Philox(np.random.SeedSequence([seed, purpose, epoch])).random_raw(size)


@lru_cache(maxsize=64)  # A step asks for the order of its whole epoch; many seeds may train at a time.
def epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """Returns a permutation, int64 [num_examples]: the order in which epoch `epoch` (from 0) sees the examples."""
    order = np.argsort(random_bits(seed, ORDER, epoch, num_examples), kind="stable")
    order.setflags(write=False)
    return order


@lru_cache(maxsize=64)
def epoch_flips(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """Returns bool [num_examples]: which of the examples, in the order of the epoch, are mirrored."""
    flips = random_bits(seed, FLIP, epoch, num_examples) % 2 == 1
    flips.setflags(write=False)
    return flips


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Returns how many batches hold every example once.

    Raises:
      UserError: `batch_size` is not between 1 and `num_examples`.
    """
    if not 1 <= batch_size <= num_examples:
        raise UserError(f"`batch_size` must be between 1 and the {num_examples} training examples, got {batch_size}.")
    return -(-num_examples // batch_size)


def split_validation(seed: int, label: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Holds out a class-balanced part of the training examples.

    Args:
      seed: picks which examples.
      label: int [N].
      fraction: of each class, in (0, 1); rounded to whole examples, at least one of each class.

    Returns:
      The indices of the training and of the validation part, each sorted.

    Raises:
      UserError: `fraction` leaves nothing of a class to train on.
    """
    shuffled = np.argsort(random_bits(seed, SPLIT, 0, len(label)), kind="stable")
    held_out = np.zeros(len(label), bool)
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


def pixel_statistics(image: np.ndarray) -> Standardization:
    """Returns the mean and deviation of each channel of uint8 [N H W C] (a deviation of 0 becomes 1)."""
    pixels = image.reshape(-1, image.shape[-1])
    counts = np.stack([np.bincount(channel, minlength=256) for channel in pixels.T])  # [C 256], exact and small
    value = np.arange(256.0)
    mean = counts @ value / len(pixels)
    std = np.sqrt(counts @ value**2 / len(pixels) - mean**2)
    return Standardization(mean.astype(np.float32), np.where(std > 0, std, 1.0).astype(np.float32))


def standardize(image: np.ndarray, standardization: Standardization) -> np.ndarray:
    """Returns float32 [... C] of mean 0 and deviation 1 over the training images."""
    return (image.astype(np.float32) - standardization.mean) / standardization.std


def train_batch(
    examples: Examples, standardization: Standardization, *, seed: int, step: int, batch_size: int, flip: bool = False
) -> Batch:
    """Returns the batch of training step `step`: a pure function of (seed, step).

    An epoch goes through a permutation of all examples. Its last batch is filled up to `batch_size` from the epoch's
    beginning, and masks what it has filled up with: every example counts once an epoch.

    Args:
      flip: mirror each image, left to right, with probability 1/2.
    """
    num_examples = len(examples.label)
    epoch, index = divmod(step, steps_per_epoch(num_examples, batch_size))
    position = np.arange(index * batch_size, (index + 1) * batch_size)
    which = epoch_order(seed, epoch, num_examples)[position % num_examples]
    image = standardize(examples.image[which], standardization)
    if flip:
        mirrored = epoch_flips(seed, epoch, num_examples)[position % num_examples]
        image = np.where(mirrored[:, None, None, None], image[:, :, ::-1], image)
    return Batch(image, examples.label[which], position < num_examples)


def eval_batches(examples: Examples, standardization: Standardization, batch_size: int) -> Iterator[Batch]:
    """Yields every example once, in order; the last batch is filled up, and masks what it has filled up with."""
    num_examples = len(examples.label)
    for start in range(0, num_examples, batch_size):
        position = np.arange(start, start + batch_size)
        which = position % num_examples
        yield Batch(standardize(examples.image[which], standardization), examples.label[which], position < num_examples)
