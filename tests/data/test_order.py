"""Plans: the order of the examples and their geometric augmentation, drawn on the host."""

import hashlib

import numpy as np
import pytest

from cnnjax import Augment, UserError
from cnnjax.data.order import (
    CUTOUT,
    FLIP,
    ORDER,
    SHIFT,
    SPLIT,
    balanced_order,
    epoch_order,
    epoch_plan,
    plain_plan,
    random_bits,
    split_test,
    split_validation,
    steps_per_epoch,
)


def make_plan(num_examples=1000, batch_size=100, *, seed=0, epoch=0, image_size=(10, 12), **augment):
    augment = Augment(**augment)
    return epoch_plan(seed, epoch, num_examples, batch_size=batch_size, augment=augment, image_size=image_size)


def sha256(*arrays):
    hasher = hashlib.sha256()
    for array in arrays:
        hasher.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
    return hasher.hexdigest()


# --- Random bits ------------------------------------------------------------------------------------------------------
# The same seed must give the same values forever: with any version of NumPy, on any machine.


def test_the_order_of_an_epoch_is_pinned():
    np.testing.assert_array_equal(epoch_order(0, 0, 8), [3, 7, 4, 2, 1, 6, 5, 0])
    expected = "211a75903b637a0a24448f66f5031cc4aad4bd7ba414a8ece9892de770a5d160"
    assert sha256(epoch_order(3, 5, 50_000)) == expected


@pytest.mark.parametrize(
    ("flip", "expected"),
    [
        ("random", "abd21a91cb42694aadc2837ebad80c624f8379910a7ac3ef824afdb60f15e4bf"),
        ("alternating", "5d626d9b05b85e501ec1914d2cba083811246eb0507839c66dfdb00eed79756e"),
    ],
)
def test_a_plan_is_pinned(flip, expected):
    plan = make_plan(50_000, 1000, seed=3, epoch=5, image_size=(32, 32), flip=flip, translate=2, cutout=12)
    *values, draw = plan
    assert sha256(*values) == expected
    np.testing.assert_array_equal(draw, plan.example)


def test_the_validation_split_is_pinned():
    np.testing.assert_array_equal(split_validation(3, np.repeat([0, 1], [20, 10]), 0.2)[1], [0, 1, 2, 16, 20, 21])
    _, validation = split_validation(3, np.arange(50_000) % 10, 0.1)
    assert sha256(validation) == "4b7d82ba91cd4a78e07fa728db8602f934a34d05a717b211e9e1cb701d89d555"


def test_random_streams_share_no_bits():
    """Neither seeds, nor purposes, nor epochs."""
    purposes = (SPLIT, ORDER, FLIP, SHIFT, CUTOUT)
    streams = [random_bits(seed, purpose, epoch, 100) for seed in (0, 1) for purpose in purposes for epoch in (0, 1)]
    assert len(np.unique(streams)) == 2000


def test_held_out_examples_are_not_those_that_an_epoch_would_show_first():
    """Half of the examples are held out: independently of the order, 250 ± 40 (five standard deviations) per half."""
    _, validation = split_validation(0, np.zeros(1000, np.int32), 0.5)
    for part in np.split(epoch_order(0, 0, 1000), 2):
        assert 210 < len(np.intersect1d(validation, part)) < 290


def test_flips_shifts_and_cutouts_are_drawn_independently():
    """Each pair takes the same number of values, so that shared bits would make them equal."""
    shape = {"num_examples": 1000, "batch_size": 1000, "image_size": (10, 10)}
    plan = make_plan(**shape, flip="random", translate=2, cutout=6).row(0)  # Five shifts, five corners.
    for axis in (0, 1):
        assert 137 < (plan.shift[:, axis] + 2 == plan.cutout[:, axis]).sum() < 263  # 200 ± five standard deviations.
    for values, span in ((plan.shift + 2, 5), (plan.cutout, 5)):
        assert 137 < (values[:, 0] == values[:, 1]).sum() < 263  # Vertical and horizontal ones, too.
        counts = np.bincount(values.ravel(), minlength=span)
        assert np.abs(counts - 400).max() < 90
    half = make_plan(**shape, flip="random", cutout=9).row(0)  # Two corners per axis.
    for axis in (0, 1):
        assert 420 < (half.mirrored == half.cutout[:, axis]).sum() < 580


# --- Order ------------------------------------------------------------------------------------------------------------


def test_the_order_is_a_permutation_that_depends_on_seed_and_epoch():
    orders = [epoch_order(seed, epoch, 1000) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    assert len({order.tobytes() for order in orders}) == 4


def test_an_epoch_counts_every_example_once():
    """The first examples of the epoch fill the last batch up; masked, they do not count."""
    plan, order = make_plan(10, 4, epoch=2), epoch_order(0, 2, 10)
    np.testing.assert_array_equal(plan.example, [order[:4], order[4:8], [*order[8:], *order[:2]]])
    np.testing.assert_array_equal(plan.mask, [[True] * 4, [True] * 4, [True, True, False, False]])


def test_padding_repeats_the_augmentation_of_its_example():
    plan = make_plan(10, 4, flip="random", translate=2, cutout=3)
    for values in plan._replace(mask=plan.example):
        np.testing.assert_array_equal(values[2, 2:], values[0, :2])


def test_a_plain_plan_holds_every_example_once_in_order_and_unchanged():
    plan = plain_plan(10, 4)
    np.testing.assert_array_equal(plan.example, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]])
    np.testing.assert_array_equal(plan.mask, [[True] * 4, [True] * 4, [True, True, False, False]])
    assert not any(np.any(values) for values in (plan.mirrored, plan.shift, plan.cutout))
    assert plan.shift.shape == plan.cutout.shape == (3, 4, 2)


def test_a_row_of_a_plan():
    plan = make_plan(10, 4, translate=2)
    np.testing.assert_array_equal(plan.row(1).shift, plan.shift[1])
    np.testing.assert_array_equal(plan.row(slice(1, 3)).example, plan.example[1:])


@pytest.mark.parametrize("batch_size", [0, 11])
def test_batch_size_out_of_range(batch_size):
    message = f"`batch_size` must be between 1 and the 10 training examples, got {batch_size}"
    with pytest.raises(UserError, match=message):
        make_plan(10, batch_size)


def test_the_number_of_steps_per_epoch():
    assert [steps_per_epoch(10, batch_size) for batch_size in (1, 3, 5, 9, 10)] == [10, 4, 2, 2, 1]


# --- Geometry ---------------------------------------------------------------------------------------------------------


def test_without_augmentation_images_keep_their_place():
    plan = make_plan()
    assert not plan.mirrored.any() and not plan.shift.any()


def test_random_flips_mirror_half_of_the_images_anew_in_each_epoch():
    first, second = (make_plan(epoch=epoch, flip="random").mirrored for epoch in (0, 1))
    for mirrored in (first, second, first ^ second):
        assert 420 < mirrored.sum() < 580  # Five standard deviations.


def test_alternating_flips_show_each_example_and_its_mirror_image_in_turn():
    def flips(epoch):
        plan = make_plan(epoch=epoch, flip="alternating")
        return plan.mirrored.ravel()[np.argsort(plan.example.ravel())]

    first = flips(0)
    assert 420 < first.sum() < 580
    for epoch in range(1, 5):
        np.testing.assert_array_equal(flips(epoch), first ^ (epoch % 2 == 1))


def test_shifts_reach_every_offset_and_are_drawn_anew_in_each_epoch():
    first, second = (make_plan(epoch=epoch, translate=2).shift.reshape(-1, 2) for epoch in (0, 1))
    for shift in (first, second):
        assert {*map(tuple, shift.tolist())} == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}
    assert 9 < (first == second).all(1).sum() < 71  # 40 ± five standard deviations.


@pytest.mark.parametrize(("cutout", "rows", "columns"), [(3, 8, 10), (10, 1, 3)])
def test_cutouts_reach_every_position_inside_the_image(cutout, rows, columns):
    """The image has 10 rows and 12 columns."""
    first, second = (make_plan(epoch=epoch, cutout=cutout).cutout.reshape(-1, 2) for epoch in (0, 1))
    for corner in (first, second):
        assert {*map(tuple, corner.tolist())} == {(y, x) for y in range(rows) for x in range(columns)}
    assert np.any(first != second)


# --- Validation -------------------------------------------------------------------------------------------------------


def test_the_validation_split_is_class_balanced_seeded_and_disjoint():
    label = np.repeat(np.arange(3), [50, 30, 20])
    train, validation = split_validation(0, label, 0.1)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, validation])), np.arange(100))
    np.testing.assert_array_equal(np.bincount(label[validation]), [5, 3, 2])
    for part in (train, validation):
        assert np.all(np.diff(part) > 0)
    np.testing.assert_array_equal(validation, split_validation(0, label, 0.1)[1])
    assert not np.array_equal(validation, split_validation(1, label, 0.1)[1])


def test_without_validation_all_examples_are_for_training():
    train, validation = split_validation(0, np.zeros(7, np.int32), 0.0)
    np.testing.assert_array_equal(train, np.arange(7))
    assert len(validation) == 0


def test_a_small_class_gives_one_example_to_validation():
    label = np.repeat(np.arange(2), [100, 2])
    _, validation = split_validation(0, label, 0.1)
    np.testing.assert_array_equal(np.bincount(label[validation]), [10, 1])


def test_a_validation_fraction_that_leaves_nothing_to_train_on():
    message = r"`validation_fraction` must leave a training example of each class, got 0\.1 with 1 of class 1\."
    with pytest.raises(UserError, match=message):
        split_validation(0, np.array([0, 0, 0, 1]), 0.1)


# --- A test set of part of the training images ------------------------------------------------------------------------


def make_pixels(num_examples):
    return [*map(bytes, np.random.default_rng(0).integers(0, 256, (num_examples, 6), np.uint8))]


def test_the_test_part_is_class_balanced_and_follows_the_images_and_not_their_order():
    pixels, label = make_pixels(100), np.repeat(np.arange(3), [50, 30, 20])
    kept, held_out = split_test(0, pixels, label, 0.2)
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held_out])), np.arange(100))
    np.testing.assert_array_equal(np.bincount(label[held_out]), [10, 6, 4])
    shuffled = np.random.default_rng(1).permutation(100)
    _, moved = split_test(0, [pixels[i] for i in shuffled], label[shuffled], 0.2)
    np.testing.assert_array_equal(np.sort(shuffled[moved]), held_out)
    assert not np.array_equal(split_test(1, pixels, label, 0.2)[1], held_out)
    assert not np.array_equal(held_out, np.concatenate([np.arange(10), np.arange(50, 56), np.arange(80, 84)]))


def test_the_test_part_is_pinned():
    pixels, label = make_pixels(40), np.arange(40) % 2
    np.testing.assert_array_equal(split_test(3, pixels, label, 0.2)[1], [6, 7, 14, 15, 30, 31, 34, 35])


def test_identical_images_are_on_the_same_side_even_under_two_labels():
    pixels, label = [x for x in make_pixels(60) for _ in range(3)], np.tile([0, 0, 1], 60)
    for seed in range(5):
        kept, held_out = split_test(seed, pixels, label, 0.3)
        assert not {pixels[i] for i in kept} & {pixels[i] for i in held_out}
        assert np.all(np.bincount(label[held_out]) >= [36, 18])


def test_a_class_without_two_different_images_cannot_be_divided():
    pixels, label = make_pixels(12), np.repeat([0, 1], [10, 2])
    assert np.bincount(label[split_test(0, pixels, label, 0.2)[1]]).tolist() == [2, 1]
    pixels[11] = pixels[10]
    rule = "`test_fraction` must leave a training image of each class, got 0.2 with 2 images of class dog, of which 1 "
    with pytest.raises(UserError, match=rule):
        split_test(0, pixels, label, 0.2, ["cat", "dog"])


# --- Balanced sampling ------------------------------------------------------------------------------------------------


def test_each_class_is_drawn_equally_often():
    label = np.repeat([0, 2, 3], [90, 7, 4])
    counts = np.stack([np.bincount(balanced_order(0, epoch, label), minlength=101) for epoch in range(20)])
    drawn = np.stack([counts[:, label == k].sum(1) for k in (0, 2, 3)])
    assert {*drawn.ravel().tolist()} == {33, 34}
    np.testing.assert_array_equal(drawn.sum(0), 101)
    assert np.all(drawn.min(1) == 33) and np.all(drawn.max(1) == 34)  # Another class has the rest.
    for k in (0, 2, 3):
        assert np.all(np.ptp(counts[:, label == k], axis=1) <= 1)
    assert counts.sum(0).min() > 0  # No example is forgotten.


def test_balanced_draws_depend_on_seed_and_epoch_and_are_shuffled():
    label = np.repeat([0, 1], [90, 10])
    order = balanced_order(3, 5, label)
    np.testing.assert_array_equal(order, balanced_order(3, 5, label))
    for other in ((3, 6), (4, 5)):
        assert not np.array_equal(order, balanced_order(*other, label))
    assert 20 < np.count_nonzero(np.diff(label[order])) < 80  # About 50 changes of the class.
    assert sha256(order) == "a029101ef02cd8a9ba27cbed2acc556abd0e5bf414c57cffe0b7eabb3ad08664"


def test_a_plan_of_balanced_draws():
    label = np.repeat([0, 1], [90, 10])
    options = {"batch_size": 30, "augment": Augment(flip="alternating", translate=1), "image_size": (8, 8)}
    plan = epoch_plan(3, 5, 100, **options, balanced_label=label)
    assert (plan.example.shape, plan.mask.sum()) == ((4, 30), 100)
    np.testing.assert_array_equal(plan.example.ravel()[:100], balanced_order(3, 5, label))
    assert len({*plan.draw.ravel()[:100].tolist()}) == 100
    plain = epoch_plan(3, 5, 100, **options)
    flipped = dict(zip(plain.example.ravel().tolist(), plain.mirrored.ravel().tolist(), strict=True))
    assert plan.mirrored.ravel().tolist() == [flipped[i] for i in plan.example.ravel().tolist()]
