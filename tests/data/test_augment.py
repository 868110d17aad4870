"""Augmentation of a batch on the device: Mixup, CutMix, and user-defined transformations."""

from dataclasses import dataclass
from functools import partial
from math import gamma

import jax
import numpy as np
import pytest

from cnnjax import Augment, Batch, CutMix, Mixup, PhotoAugment, UserError
from cnnjax.data.batches import Pixels, make_batch, pixel_statistics, standardize
from cnnjax.data.order import epoch_plan, plain_plan

pytestmark = pytest.mark.usefixtures("quick_compilation")
RNG = np.random.default_rng(0)
ALPHA = 0.4  # Of Mixup and CutMix; not their default.
SIZE = 2000  # Of one batch, which is large enough for statistics.
BATCH = Batch(
    RNG.normal(size=(SIZE, 6, 8, 2)).astype(np.float32), np.arange(SIZE, dtype=np.int32) % 5, np.arange(SIZE) < SIZE - 1
)
KEYS = jax.random.split(jax.random.key(0), SIZE)
IMAGE = RNG.integers(0, 256, (10, 4, 6, 1), np.uint8)
PIXELS = Pixels(IMAGE, np.arange(10, dtype=np.int32), pixel_statistics(IMAGE))


@partial(jax.jit, static_argnums=0)
def transform(augment, keys, batch):
    return augment.transform(keys, batch)


@jax.jit
def draw_beta(keys, alpha):
    """Draws a weight with the key of each example."""
    return jax.vmap(lambda key: jax.random.beta(key, alpha, alpha))(keys)


def mix_with_previous(x, weight):
    """Mixes each row with the previous row of the batch, and the first one with the last."""
    previous = np.concatenate([x[-1:], x[:-1]])
    weight = weight.reshape(-1, *[1] * (x.ndim - 1))
    return weight * x + (1 - weight) * previous


# --- Mixup ------------------------------------------------------------------------------------------------------------


def test_mixup_equals_numpy_with_the_same_weights():
    """Image and label of an example are mixed by the weight of its key."""
    weight = np.asarray(draw_beta(KEYS, ALPHA))
    mixed = transform(Mixup(alpha=ALPHA, num_classes=5), KEYS, BATCH)
    np.testing.assert_allclose(mixed.image, mix_with_previous(BATCH.image, weight), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mixed.label, mix_with_previous(np.eye(5)[BATCH.label], weight), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mixed.label.sum(1), 1, rtol=1e-6)
    np.testing.assert_array_equal(mixed.mask, BATCH.mask)


def test_the_weights_of_mixup_are_distributed_as_beta():
    """Beta(alpha, alpha) has the mean 1/2 and the variance 1 / (4 (2 alpha + 1))."""
    mixed = transform(Mixup(alpha=ALPHA, num_classes=5), KEYS, BATCH)
    weight = np.asarray(mixed.label)[np.arange(SIZE), BATCH.label]
    variance = 1 / (4 * (2 * ALPHA + 1))
    assert weight.mean() == pytest.approx(0.5, abs=5 * np.sqrt(variance / SIZE))
    assert weight.var() == pytest.approx(variance, rel=0.1)


# --- CutMix -----------------------------------------------------------------------------------------------------------


def boxes_by_numpy(height, width):
    """Returns the corners [B 4]: sides are sqrt(1 - share) of the image's, around the center, clipped at the edges."""
    keys = jax.vmap(jax.random.split)(KEYS)
    side = np.sqrt(1 - np.asarray(draw_beta(keys[:, 0], ALPHA)))[:, None]
    center = np.asarray(jax.vmap(partial(jax.random.uniform, shape=(2,)))(keys[:, 1]))
    size = np.float32([height, width])
    top_left, bottom_right = (np.clip(np.round(size * (center + sign * side / 2)), 0, size) for sign in (-1, 1))
    return np.stack([top_left[:, 0], bottom_right[:, 0], top_left[:, 1], bottom_right[:, 1]], 1).astype(int)


def test_cutmix_equals_numpy_with_the_same_boxes():
    """A box of the previous image replaces that of an image, and the label is mixed by its area."""
    mixed = jax.device_get(transform(CutMix(alpha=ALPHA, num_classes=5), KEYS, BATCH))
    image, label, one_hot = BATCH.image.copy(), np.empty((SIZE, 5)), np.eye(5)[BATCH.label]
    for i, (top, bottom, left, right) in enumerate(boxes_by_numpy(6, 8)):
        image[i, top:bottom, left:right] = BATCH.image[i - 1, top:bottom, left:right]
        share = (bottom - top) * (right - left) / 48
        label[i] = (1 - share) * one_hot[i] + share * one_hot[i - 1]
    np.testing.assert_array_equal(mixed.image, image)
    np.testing.assert_allclose(mixed.label, label, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mixed.label.sum(1), 1, rtol=1e-6)
    np.testing.assert_array_equal(mixed.mask, BATCH.mask)


def test_the_boxes_of_cutmix_have_the_expected_size_and_are_anywhere():
    """The side is s = sqrt(1 - share) of the image's, with share from Beta(alpha, alpha): the mean of s² is 1/2.

    At the edges a box around a uniform center loses s²/4 of its side on average.
    """
    side = gamma(ALPHA + 0.5) * gamma(2 * ALPHA) / (gamma(ALPHA) * gamma(2 * ALPHA + 0.5))  # The mean of s.
    mixed = transform(CutMix(alpha=ALPHA, num_classes=5), KEYS, BATCH)
    box = (np.asarray(mixed.image) != BATCH.image).all(-1)  # [B H W]
    for axis in (1, 2):
        assert box.any(axis).mean() == pytest.approx(side - 1 / 8, abs=0.03)
        np.testing.assert_allclose(box.mean(0), np.flip(box.mean(0), axis - 1), atol=0.06)
    assert np.all(box.mean(0) > 0.1)


@pytest.mark.parametrize("augment", [Mixup(alpha=ALPHA, num_classes=5), CutMix(alpha=ALPHA, num_classes=5)])
def test_a_batch_of_one_class_keeps_its_label(augment):
    batch = BATCH._replace(label=np.full(SIZE, 2, np.int32))
    np.testing.assert_allclose(transform(augment, KEYS, batch).label, np.eye(5)[batch.label], atol=1e-6)


# --- Keys -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise(Augment):
    """A user-defined augmentation: adds noise that the key of each example draws."""

    scale: float = 1.0

    def transform(self, key, batch):
        noise = jax.vmap(lambda key: jax.random.normal(key, batch.image.shape[1:]))(key)
        return batch._replace(image=batch.image + self.scale * noise)


make_batch_jit = jax.jit(make_batch, static_argnums=2)


def test_an_example_gets_the_same_transformation_anywhere_in_a_batch():
    """Its key depends on the epoch and on its index in the training set."""
    key, augment = jax.random.key(0), Noise(scale=2.0)
    plain = standardize(IMAGE, PIXELS.standardization)
    noise = [2 * jax.random.normal(jax.random.fold_in(key, i), (4, 6, 1)) for i in range(10)]
    for epoch in (0, 1):  # Two orders, with the same key.
        plan = epoch_plan(0, epoch, 10, batch_size=4, augment=augment, image_size=(4, 6))
        for i in range(3):  # The last two examples of the third batch are padding.
            row = plan.row(i)
            image = make_batch_jit(PIXELS, row, augment, key).image
            expected = np.stack([plain[example] + noise[example] for example in row.example])
            np.testing.assert_allclose(image, expected, rtol=1e-5, atol=1e-5)


def test_the_key_of_the_epoch_and_the_example_change_the_transformation():
    row = plain_plan(10, 10).row(0)
    noise = [
        make_batch_jit(PIXELS, row, Noise(), jax.random.key(seed)).image - make_batch(PIXELS, row).image
        for seed in (0, 1)
    ]
    assert len({np.asarray(image).tobytes() for images in noise for image in images}) == 20


def test_the_transformation_follows_the_geometry():
    """A user-defined augmentation sees the flipped, shifted and cut image."""

    @dataclass(frozen=True)
    class Negative(Augment):
        def transform(self, key, batch):
            return batch._replace(image=-batch.image)

    options = {"flip": "random", "translate": 2, "cutout": 2}
    row = epoch_plan(0, 0, 10, batch_size=10, augment=Augment(**options), image_size=(4, 6)).row(0)
    geometric = make_batch_jit(PIXELS, row, Augment(**options), jax.random.key(0))
    negative = make_batch_jit(PIXELS, row, Negative(**options), jax.random.key(0))
    np.testing.assert_array_equal(negative.image, -geometric.image)
    assert np.any(geometric.image != make_batch(PIXELS, row).image)


def test_without_a_transformation_no_key_is_needed():
    """The program is the same with a key, and draws nothing."""
    row, augment = plain_plan(10, 4).row(0), Augment(flip="random", translate=1, cutout=2)

    def program(**key):
        return jax.jit(lambda pixels, plan: make_batch(pixels, plan, augment, **key)).lower(PIXELS, row).as_text()

    assert program() == program(key=jax.random.key(0))
    assert "threefry" not in program()
    assert "threefry" in make_batch_jit.lower(PIXELS, row, Noise(), jax.random.key(0)).as_text()


def test_a_transformation_without_a_key():
    with pytest.raises(ValueError, match=r"`key` must be a key for Mixup, got None\."):
        make_batch(PIXELS, plain_plan(10, 4).row(0), Mixup())


@pytest.mark.parametrize("augment", [Mixup(), CutMix(), PhotoAugment(mixup=0.2)])
@pytest.mark.usefixtures("no_type_checks")
def test_one_key_for_all_examples(augment):
    with pytest.raises(ValueError, match=r"`key` must be one key per example, of shape \(10,\), got key<fry>\[\]"):
        augment.transform(jax.random.key(0), make_batch(PIXELS, plain_plan(10, 10).row(0)))


# --- Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Augment(flip="rando"), "`augment.flip` must be a known name, got 'rando'. Did you mean random"),
        (lambda: Augment(translate=-1), "`augment.translate` must be at least 0, got -1"),
        (lambda: Augment(cutout=-1), "`augment.cutout` must be at least 0, got -1"),
        (lambda: Mixup(alpha=0.0), "`augment.alpha` must be above 0 and finite, got 0.0"),
        (lambda: Mixup(alpha=float("inf")), "`augment.alpha` must be finite, and 0 or .*, got inf"),
        (lambda: CutMix(alpha=-1.0), "`augment.alpha` must be above 0 and finite, got -1.0"),
        (lambda: CutMix(flip="x"), "`augment.flip` must be a known name"),
    ],
)
def test_invalid_options(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_images_too_small_for_the_augmentation():
    Augment(translate=3, cutout=4).check_size((4, 6))
    rule = r"`augment.translate` must be at most 3 for images of 4×6 pixels, got 4\."
    with pytest.raises(UserError, match=rule):
        Augment(translate=4).check_size((4, 6))
    with pytest.raises(UserError, match=r"`augment.cutout` must be at most 4 for images of 6×4 pixels, got 5\."):
        CutMix(cutout=5).check_size((6, 4))
