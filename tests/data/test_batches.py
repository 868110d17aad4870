"""Batches made on the device from a plan, against NumPy."""

from functools import partial

import jax
import numpy as np
import pytest

from cnnjax import Augment
from cnnjax.data.batches import Pixels, make_batch, pixel_statistics, standardize
from cnnjax.data.order import epoch_plan

pytestmark = pytest.mark.usefixtures("quick_compilation")
RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (50, 4, 6, 3), np.uint8)
STATISTICS = pixel_statistics(IMAGE)
PIXELS = Pixels(IMAGE, RNG.integers(0, 10, 50, np.int32), STATISTICS)


def assert_equals_numpy(augment, transform):
    """Compares a batch with `transform(plan, i, image)` of the image of each example [H W C], in uint8."""
    plan = epoch_plan(0, 1, 50, batch_size=40, augment=augment, image_size=(4, 6)).row(1)  # 10 examples, and padding.
    batch = jax.jit(partial(make_batch, augment=augment))(PIXELS, plan)
    expected = np.stack([transform(plan, i, IMAGE[example]) for i, example in enumerate(plan.example)])
    assert batch.image.dtype == np.float32
    np.testing.assert_allclose(batch.image, expected, rtol=1e-6, atol=1e-6)  # XLA compiles the division.
    np.testing.assert_array_equal(batch.label, PIXELS.label[plan.example])
    np.testing.assert_array_equal(batch.mask, np.arange(40) < 10)


def scale(image):
    pixels = IMAGE.reshape(-1, 3).astype(np.float64)
    return (image - pixels.mean(0)) / pixels.std(0)


def test_a_batch_without_augmentation_holds_the_examples_of_the_plan():
    assert_equals_numpy(Augment(), lambda plan, i, image: scale(image))


def test_mirrored_images_are_flipped_left_to_right():
    def flip(plan, i, image):
        return scale(image[:, ::-1] if plan.mirrored[i] else image)

    assert_equals_numpy(Augment(flip="random"), flip)


def test_shifted_images_equal_a_crop_of_numpys_reflecting_pad():
    """The image is mirrored first, then shifted."""

    def shift(plan, i, image):
        down, right = plan.shift[i]
        image = image[:, ::-1] if plan.mirrored[i] else image
        return scale(np.pad(image, ((3, 3), (3, 3), (0, 0)), "reflect")[3 - down : 7 - down, 3 - right : 9 - right])

    assert_equals_numpy(Augment(flip="random", translate=3), shift)


def test_a_cutout_is_a_square_of_the_mean_after_the_shift():
    def cut(plan, i, image):
        (down, right), (y, x) = plan.shift[i], plan.cutout[i]
        image = np.pad(image, ((1, 1), (1, 1), (0, 0)), "reflect")[1 - down : 5 - down, 1 - right : 7 - right]
        image = scale(image)
        image[y : y + 3, x : x + 3] = 0
        return image

    assert_equals_numpy(Augment(translate=1, cutout=3), cut)


def test_standardization_equals_numpy():
    pixels = IMAGE.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(STATISTICS.mean, pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(STATISTICS.std, pixels.std(0), rtol=1e-6)
    np.testing.assert_allclose(standardize(IMAGE, STATISTICS), scale(IMAGE), rtol=1e-5, atol=1e-6)


def test_standardization_of_a_constant_channel():
    image = np.full((2, 2, 2, 1), 7, np.uint8)
    np.testing.assert_array_equal(standardize(image, pixel_statistics(image)), np.zeros_like(image))


@pytest.mark.parametrize("num_images", [1000, 2100])
def test_statistics_of_many_images_equal_numpys(num_images):
    """They are counted in blocks of 1,000 images."""
    image = np.random.default_rng(1).integers(0, 256, (num_images, 3, 2, 3), np.uint8)
    mean, std = pixel_statistics(image)
    np.testing.assert_allclose(mean, image.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, image.std((0, 1, 2)), rtol=1e-6)
