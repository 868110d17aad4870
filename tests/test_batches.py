import hashlib

import numpy as np
import pytest

from cnnjax.batches import (
    epoch_order,
    eval_batches,
    pixel_statistics,
    split_validation,
    standardize,
    steps_per_epoch,
    train_batch,
)
from cnnjax.data import Examples
from cnnjax.errors import UserError

RNG = np.random.default_rng(0)
EXAMPLES = Examples(RNG.integers(0, 256, (10, 4, 6, 3), np.uint8), np.arange(10, dtype=np.int32))
STATISTICS = pixel_statistics(EXAMPLES.image)


def batch_of(step, **kwargs):
    return train_batch(EXAMPLES, STATISTICS, **{"seed": 0, "step": step, "batch_size": 4, **kwargs})


def test_epoch_order_is_a_permutation_that_depends_on_seed_and_epoch():
    orders = [epoch_order(seed, epoch, 1000) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    assert len({order.tobytes() for order in orders}) == 4


def test_epoch_order_is_pinned():
    # A seed is a promise: these values may never change, on any version of NumPy or any machine.
    np.testing.assert_array_equal(epoch_order(0, 0, 8), [3, 7, 4, 2, 1, 6, 5, 0])
    digest = hashlib.sha256(epoch_order(3, 5, 50_000).astype("<i8").tobytes()).hexdigest()
    assert digest == "211a75903b637a0a24448f66f5031cc4aad4bd7ba414a8ece9892de770a5d160"


def test_an_epoch_counts_every_example_once():
    batches = [batch_of(step) for step in range(3)]
    counted = np.concatenate([batch.label[batch.mask] for batch in batches])
    np.testing.assert_array_equal(np.sort(counted), np.arange(10))
    assert [batch.mask.sum() for batch in batches] == [4, 4, 2]
    assert all(batch.image.shape == (4, 4, 6, 3) and batch.image.dtype == np.float32 for batch in batches)


def test_a_batch_is_a_function_of_seed_and_step():
    later = batch_of(7)  # The third epoch's second batch, without any of those before.
    order = epoch_order(0, 2, 10)[4:8]
    np.testing.assert_array_equal(later.label, order)
    np.testing.assert_array_equal(later.image, standardize(EXAMPLES.image[order], STATISTICS))
    assert not np.array_equal(batch_of(7, seed=1).label, later.label)


def test_flip_mirrors_left_to_right_about_half_of_the_images():
    plain, flipped = (
        [train_batch(EXAMPLES, STATISTICS, seed=0, step=step, batch_size=10, flip=flip) for step in range(40)]
        for flip in (False, True)
    )
    mirrored = 0
    for a, b in zip(plain, flipped, strict=True):
        for i in range(10):
            is_mirrored = np.array_equal(a.image[i, :, ::-1], b.image[i])
            assert is_mirrored or np.array_equal(a.image[i], b.image[i])
            mirrored += is_mirrored
    assert 150 < mirrored < 250  # Five standard deviations about 200 of 400.


def test_evaluation_batches_hold_every_example_once_in_order():
    batches = list(eval_batches(EXAMPLES, STATISTICS, 4))
    np.testing.assert_array_equal(np.concatenate([b.label[b.mask] for b in batches]), np.arange(10))
    assert [len(b.label) for b in batches] == [4, 4, 4]


def test_validation_is_class_balanced_seeded_and_apart():
    label = np.repeat(np.arange(3), [50, 30, 20])
    train, validation = split_validation(0, label, 0.1)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, validation])), np.arange(100))
    np.testing.assert_array_equal(np.bincount(label[validation]), [5, 3, 2])
    np.testing.assert_array_equal(validation, split_validation(0, label, 0.1)[1])
    assert not np.array_equal(validation, split_validation(1, label, 0.1)[1])


def test_a_small_class_gives_one_example_to_validation():
    label = np.repeat(np.arange(2), [100, 2])
    _, validation = split_validation(0, label, 0.1)
    np.testing.assert_array_equal(np.bincount(label[validation]), [10, 1])


def test_validation_fraction_that_leaves_nothing_to_train_on():
    with pytest.raises(UserError, match=r"`validation_fraction` must leave a training example of each class, got 0.1"):
        split_validation(0, np.array([0, 0, 0, 1]), 0.1)


@pytest.mark.parametrize("batch_size", [0, 11])
def test_batch_size_out_of_range(batch_size):
    message = f"`batch_size` must be between 1 and the 10 training examples, got {batch_size}"
    with pytest.raises(UserError, match=message):
        steps_per_epoch(10, batch_size)


def test_standardization_equals_numpy():
    pixels = EXAMPLES.image.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(STATISTICS.mean, pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(STATISTICS.std, pixels.std(0), rtol=1e-6)
    scaled = standardize(EXAMPLES.image, STATISTICS).reshape(-1, 3)
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(scaled.std(0), 1, rtol=1e-6)


def test_standardization_of_a_constant_channel():
    image = np.full((2, 2, 2, 1), 7, np.uint8)
    np.testing.assert_array_equal(standardize(image, pixel_statistics(image)), np.zeros_like(image))
