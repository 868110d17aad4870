"""What each step of an epoch sees, drawn on the host: the order of the examples, and their geometric augmentation.

A plan is a pure function of (seed, epoch). Its random bits come from the raw stream of a counter-based generator and a
stable sort: NumPy guarantees that stream forever, while the algorithms behind `Generator.permutation` may change.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt32

from cnnjax.data.augment import Augment
from cnnjax.errors import UserError
from cnnjax.typing import AnyArray

# The purposes of random streams, which share no bits. BALANCE must stay last: class i uses BALANCE + 1 + i.
SPLIT, ORDER, FLIP, SHIFT, CUTOUT, BALANCE = range(6)


class Plan(NamedTuple):
    """The content of batches: one row per step (S of them), or a single row."""

    example: Int[AnyArray, "*S B"]  # Index in the training set.
    mask: Bool[AnyArray, "*S B"]  # False for padding.
    mirrored: Bool[AnyArray, "*S B"]
    shift: Int[AnyArray, "*S B 2"]  # Down and to the right, in pixels.
    cutout: Int[AnyArray, "*S B 2"]  # Top left corner of the square.
    draw: UInt32[AnyArray, "*S B"]  # Folded into the keys: the index of the example, another number if it is repeated.

    def row(self, step: int | slice) -> "Plan":
        """Returns one row, or the rows of a slice."""
        return Plan(*(values[step] for values in self))


def random_bits(seed: int, purpose: int, epoch: int, size: int) -> np.ndarray:
    """Returns uint64 [size]: the Philox stream of (seed, purpose, epoch)."""
    return np.random.Philox(np.random.SeedSequence([seed, purpose, epoch])).random_raw(size)


def epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """Returns the order of the examples in an epoch (from 0): a permutation, int64 [num_examples]."""
    return np.argsort(random_bits(seed, ORDER, epoch, num_examples), kind="stable")


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Returns the number of batches that hold every example once.

    Raises:
      UserError: `batch_size` is not between 1 and `num_examples`.
    """
    if not 1 <= batch_size <= num_examples:
        raise UserError(f"`batch_size` must be between 1 and the {num_examples} training examples, got {batch_size}.")
    return -(-num_examples // batch_size)


def balanced_order(seed: int, epoch: int, label: np.ndarray) -> np.ndarray:
    """Returns the examples of an epoch that draws equally often from each class, int64 [N].

    In a class with more examples than draws, each is drawn at most once per epoch; in a smaller class, examples repeat,
    and their counts differ by at most 1. If N is not a multiple of the number of classes, some classes, different ones
    in each epoch, get one draw more.

    Args:
      label: int [N].
    """
    classes = np.unique(label)
    share, rest = divmod(len(label), len(classes))
    extra = {*np.argsort(random_bits(seed, BALANCE, epoch, len(classes)), kind="stable")[:rest].tolist()}
    drawn = []
    for i, k in enumerate(classes):
        members, draws = np.flatnonzero(label == k), share + (i in extra)
        bits = random_bits(seed, BALANCE + 1 + i, epoch, len(members) * -(-draws // len(members)))
        cycles = np.argsort(bits.reshape(-1, len(members)), axis=1, kind="stable")
        drawn.append(members[cycles.ravel()[:draws]])
    return np.concatenate(drawn)[epoch_order(seed, epoch, len(label))]


def order_of_epoch(seed: int, epoch: int, num_examples: int, balanced_label: np.ndarray | None) -> np.ndarray:
    """Returns the order of the examples in an epoch, int64 [num_examples]; see `epoch_plan`."""
    if balanced_label is None:
        return epoch_order(seed, epoch, num_examples)
    return balanced_order(seed, epoch, balanced_label)


def epoch_plan(
    seed: int,
    epoch: int,
    num_examples: int,
    *,
    batch_size: int,
    augment: Augment,
    image_size: tuple[int, int],
    balanced_label: np.ndarray | None = None,
) -> Plan:
    """Returns the plan of an epoch (from 0), S = `steps_per_epoch` rows.

    An epoch is a permutation of all examples. Its last batch is padded to `batch_size` with the first examples of the
    epoch, which are masked: every example counts once per epoch.

    Args:
      augment: alternating flips mirror one half of the examples in even epochs and the other half in odd ones.
      image_size: height and width.
      balanced_label: of the training examples, to draw equally often from every class, see `balanced_order`.

    Raises:
      UserError: see `steps_per_epoch`.
    """
    steps = steps_per_epoch(num_examples, batch_size)
    position = np.arange(steps * batch_size)
    order = order_of_epoch(seed, epoch, num_examples, balanced_label)
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
    index = position % num_examples
    draw = order.astype(np.uint32)
    if balanced_label is not None:
        repeated = np.setdiff1d(np.arange(num_examples), np.unique(order, return_index=True)[1])
        draw[repeated] = num_examples + repeated  # Their positions: distinct.
    rows = (order.astype(np.int32), mirrored, shift, cutout, draw)
    example, *rest = (a[index].reshape(steps, batch_size, *a.shape[1:]) for a in rows)
    return Plan(example, (position < num_examples).reshape(steps, batch_size), *rest)


def _pairs(seed: int, purpose: int, epoch: int, size: int, below: tuple[int, int]) -> np.ndarray:
    """Returns int32 [size, 2], each uniform in [0, below), up to 2**-32."""
    if below == (1, 1):
        return np.zeros((size, 2), np.int32)
    bits = random_bits(seed, purpose, epoch, size)
    return np.stack([(bits >> np.uint64(32)) % below[0], (bits & np.uint64(2**32 - 1)) % below[1]], 1).astype(np.int32)


def plain_plan(num_examples: int, batch_size: int) -> Plan:
    """Returns the plan that visits every example once, in order and unchanged; it pads as `epoch_plan` does."""
    steps = -(-num_examples // batch_size)
    position = np.arange(steps * batch_size, dtype=np.int32).reshape(steps, batch_size)
    zeros, example = np.zeros((*position.shape, 2), np.int32), position % num_examples
    mask, mirrored = position < num_examples, np.zeros(position.shape, bool)
    return Plan(example, mask, mirrored, zeros, zeros, example.astype(np.uint32))


def split_validation(
    seed: int, label: np.ndarray, fraction: float, class_names: Sequence[str] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Holds out a class-balanced part of the training examples.

    Args:
      seed: selects the examples.
      label: int [N].
      fraction: of each class, in [0, 1); rounded to whole examples, at least one per class. 0 holds out none.
      class_names: of the labels, for messages.

    Returns:
      The indices of the training part and of the validation part, each sorted.

    Raises:
      UserError: `fraction` leaves no training example of some class.
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
                f"{len(members)} of class {class_names[k] if class_names else k}. Add images, or set it to 0."
            )
        held_out[members[:count]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def split_test(
    seed: int, pixels: Iterable[bytes], label: np.ndarray, fraction: float, class_names: Sequence[str] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Holds out a class-balanced test set, whose examples depend on their pixels and not on the order of the examples.

    Identical images are on the same side, even under several labels. If images are added later, the others stay on
    their sides, except for a few at the boundary.

    Args:
      seed: selects the examples.
      pixels: identifies each image, of N.
      label: int [N].
      fraction: of each class, in (0, 1); rounded to whole examples, at least one per class.
      class_names: of the labels, for messages.

    Returns:
      The indices of the training part and of the test part, each sorted.

    Raises:
      UserError: `fraction` leaves no training example of some class.
    """
    salt = seed.to_bytes(16, "little")
    digests = [hashlib.blake2b(x, digest_size=8, salt=salt).digest() for x in pixels]
    rank = np.frombuffer(b"".join(digests), "<u8")
    chosen = []
    for k in np.unique(label):
        ranks, counts = np.unique(rank[label == k], return_counts=True)  # Sorted.
        target = max(1, round(fraction * counts.sum()))
        chosen.append(ranks[np.cumsum(counts) - counts < target])
    held_out = np.isin(rank, np.concatenate(chosen))
    if (lost := np.setdiff1d(label, label[~held_out])).size:
        k = int(lost[0])
        raise UserError(
            f"`test_fraction` must leave a training image of each class, got {fraction} with {np.sum(label == k)} "
            f"images of class {class_names[k] if class_names else k}, of which {len(np.unique(rank[label == k]))} "
            "differ. Add images."
        )
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
