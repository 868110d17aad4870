import hashlib

import jax
import numpy as np
import pytest

from cnnjax import AugmentConfig
from cnnjax.data.batches import (
    Pixels,
    epoch_order,
    epoch_plan,
    make_batch,
    pixel_statistics,
    plain_plan,
    row,
    split_validation,
    standardize,
    steps_per_epoch,
)
from cnnjax.errors import UserError

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (10, 4, 6, 3), np.uint8)
STATISTICS = pixel_statistics(IMAGE)
PIXELS = Pixels(IMAGE, np.arange(10, dtype=np.int32), STATISTICS)


def plan_of(seed=0, epoch=0, num_examples=10, batch_size=4, **augment):
    config = AugmentConfig(**augment)
    return epoch_plan(seed, epoch, num_examples, batch_size=batch_size, augment=config, image_size=(4, 6))


def batches_of(seed=0, epoch=0, batch_size=4, **augment):
    plan = plan_of(seed, epoch, batch_size=batch_size, **augment)
    step = jax.jit(make_batch, static_argnums=2)
    return [step(PIXELS, row(plan, i), AugmentConfig(**augment)) for i in range(len(plan.example))]


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


def test_a_plan_is_pinned():
    config = AugmentConfig(flip="alternating", translate=2, cutout=12)
    plan = epoch_plan(3, 5, 50_000, batch_size=1000, augment=config, image_size=(32, 32))
    hasher = hashlib.sha256()
    for values in plan:
        hasher.update(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes())
    assert hasher.hexdigest() == "5d626d9b05b85e501ec1914d2cba083811246eb0507839c66dfdb00eed79756e"


def test_an_epoch_counts_every_example_once():
    batches = batches_of()
    counted = np.concatenate([batch.label[batch.mask] for batch in batches])
    np.testing.assert_array_equal(np.sort(counted), np.arange(10))
    assert [batch.mask.sum() for batch in batches] == [4, 4, 2]
    assert all(batch.image.shape == (4, 4, 6, 3) and batch.image.dtype == np.float32 for batch in batches)


def test_batches_without_augmentation_are_the_examples_in_the_order_of_the_epoch():
    order = epoch_order(0, 2, 10)[4:8]
    batch = batches_of(epoch=2)[1]
    np.testing.assert_array_equal(batch.label, order)
    np.testing.assert_allclose(batch.image, standardize(IMAGE[order], STATISTICS), rtol=1e-6)  # Compiled division.
    assert not np.array_equal(batches_of(seed=1, epoch=2)[1].label, batch.label)


def test_random_flips_mirror_left_to_right_about_half_of_the_images():
    mirrored = 0
    for epoch in range(40):
        (plain,), (flipped,) = batches_of(epoch=epoch, batch_size=10), batches_of(0, epoch, 10, flip="random")
        for a, b in zip(plain.image, flipped.image, strict=True):
            is_mirrored = np.array_equal(a[:, ::-1], b)
            assert is_mirrored or np.array_equal(a, b)
            mirrored += is_mirrored
    assert 150 < mirrored < 250  # Five standard deviations about 200 of 400.


def test_alternating_flips_show_each_example_and_its_mirror_image_in_turn():
    def flips(epoch):
        plan = plan_of(epoch=epoch, num_examples=1000, batch_size=100, flip="alternating")
        return plan.mirrored.ravel()[np.argsort(plan.example.ravel())]

    first = flips(0)
    assert 420 < first.sum() < 580
    for epoch in range(1, 5):
        np.testing.assert_array_equal(flips(epoch), first ^ (epoch % 2 == 1))


def test_shifts_equal_numpy_s_reflecting_pad_and_reach_everywhere():
    seen = set()
    for epoch in range(20):
        plan = row(plan_of(epoch=epoch, batch_size=10, flip="random", translate=2), 0)
        (batch,) = batches_of(epoch=epoch, batch_size=10, flip="random", translate=2)
        for i, example in enumerate(plan.example):
            down, right = plan.shift[i]
            image = IMAGE[example, :, ::-1] if plan.mirrored[i] else IMAGE[example]
            image = np.pad(image, ((2, 2), (2, 2), (0, 0)), "reflect")[2 - down : 6 - down, 2 - right : 8 - right]
            np.testing.assert_allclose(batch.image[i], standardize(image, STATISTICS), rtol=1e-6)
            seen.add((int(down), int(right)))
    assert seen == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}


def test_a_cutout_is_a_square_of_the_mean_wholly_within_the_image():
    corners = set()
    for epoch in range(30):
        (batch,), (plain,) = batches_of(epoch=epoch, batch_size=10, cutout=3), batches_of(epoch=epoch, batch_size=10)
        for image, whole in zip(np.asarray(batch.image), np.asarray(plain.image), strict=True):
            rows, columns = np.nonzero((image == 0).all(-1))
            y, x = rows.min(), columns.min()
            assert len(rows) == 9 and rows.max() == y + 2 and columns.max() == x + 2
            outside = np.ones((4, 6), bool)
            outside[y : y + 3, x : x + 3] = False
            np.testing.assert_array_equal(image[outside], whole[outside])
            corners.add((y, x))
    assert corners == {(y, x) for y in range(2) for x in range(4)}


def test_a_plain_plan_holds_every_example_once_in_order():
    plan = plain_plan(10, 4)
    np.testing.assert_array_equal(plan.example[plan.mask], np.arange(10))
    assert plan.example.shape == (3, 4)


def test_validation_is_class_balanced_seeded_and_apart():
    label = np.repeat(np.arange(3), [50, 30, 20])
    train, validation = split_validation(0, label, 0.1)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, validation])), np.arange(100))
    np.testing.assert_array_equal(np.bincount(label[validation]), [5, 3, 2])
    np.testing.assert_array_equal(validation, split_validation(0, label, 0.1)[1])
    assert not np.array_equal(validation, split_validation(1, label, 0.1)[1])


def test_without_validation_all_examples_are_trained_on():
    train, validation = split_validation(0, np.zeros(7, np.int32), 0.0)
    np.testing.assert_array_equal(train, np.arange(7))
    assert len(validation) == 0


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


@pytest.mark.parametrize(
    ("augment", "message"), [({"translate": 4}, "`augment.translate`"), ({"cutout": 5}, "`augment.cutout`")]
)
def test_augmentation_larger_than_the_image(augment, message):
    with pytest.raises(UserError, match=f"{message} must be .* of 4×6 pixels, got "):
        plan_of(**augment)


def test_standardization_equals_numpy():
    pixels = IMAGE.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(STATISTICS.mean, pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(STATISTICS.std, pixels.std(0), rtol=1e-6)
    scaled = standardize(IMAGE, STATISTICS).reshape(-1, 3)
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(scaled.std(0), 1, rtol=1e-6)


def test_standardization_of_a_constant_channel():
    image = np.full((2, 2, 2, 1), 7, np.uint8)
    np.testing.assert_array_equal(standardize(image, pixel_statistics(image)), np.zeros_like(image))


def test_statistics_of_many_images_equal_numpy_s():
    image = np.random.default_rng(0).integers(0, 256, (2100, 3, 2, 3), np.uint8)
    mean, std = pixel_statistics(image)
    np.testing.assert_allclose(mean, image.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, image.std((0, 1, 2)), rtol=1e-6)


def test_a_plan_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        plan_of().example[0] = 1
