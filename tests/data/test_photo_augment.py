"""Augmentation of photos: random resized crops and RandAugment equal Pillow's; sizes that grow during a run."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from cnnjax import Augment, Batch, CutMix, Mixup, PhotoAugment, UserError
from cnnjax.data.batches import Pixels, make_batch, pixel_statistics
from cnnjax.data.crop import crop_and_resize, draw_crop
from cnnjax.data.order import epoch_plan, plain_plan
from cnnjax.data.rand_augment import OPS, apply_op, rand_augment

pytestmark = pytest.mark.usefixtures("quick_compilation")


def photo(height=60, width=80, channels=3, seed=0):
    """Returns a smooth image with noise, of contrast 40 to 200 so that it can be stretched."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(40, 200, (6, 8, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    image = np.clip(np.asarray(small) + rng.integers(-8, 9, (height, width, 3)), 0, 255)
    return image[..., :channels].astype(np.uint8)


# --- Random resized crop ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(24, 24), (96, 64)])
def test_resized_crops_equal_those_of_pillow(size):
    """Smaller and larger than the crop, and both at once: within the rounding of 8 bits in each direction."""
    crops = np.int32([[0, 0, 60, 80], [7, 5, 50, 31], [10, 60, 12, 20], [59, 79, 1, 1]])
    images = np.stack([photo(seed=i) for i in range(4)])
    resized = crop_and_resize(jnp.asarray(images), jnp.asarray(crops), size)
    for image, got, (top, left, height, width) in zip(images, resized, crops.tolist(), strict=True):
        part = Image.fromarray(image).crop((left, top, left + width, top + height))
        expected = np.asarray(part.resize(size[::-1], Image.Resampling.BILINEAR))
        np.testing.assert_allclose(got, expected, atol=1.1)


def test_a_crop_of_its_own_size_keeps_the_pixels():
    got = crop_and_resize(jnp.asarray(photo()[None]), jnp.asarray([[10, 20, 32, 48]]), (32, 48))
    np.testing.assert_array_equal(got[0], photo()[10:42, 20:68])


def test_crops_have_the_area_and_ratio_that_are_drawn_and_lie_anywhere():
    """Crops of up to a quarter of a square always fit, so that no draw is repeated."""
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = partial(draw_crop, image_size=(400, 400), scale=(0.05, 0.25), ratio=(0.5, 2.0))
    top, left, height, width = np.asarray(jax.vmap(draw)(keys)).T
    area, log_ratio = height * width / 400**2, np.log2(width / height)
    for value, low, high in ((area, 0.05, 0.25), (log_ratio, -1, 1)):  # Both uniform.
        assert low - 0.01 < value.min() and value.max() < high + 0.01
        assert value.mean() == pytest.approx((low + high) / 2, abs=5 * (high - low) / np.sqrt(12 * 4000))
        assert value.var() == pytest.approx((high - low) ** 2 / 12, rel=0.06)
    for start, length in ((top, height), (left, width)):
        place = start / (400 - length)
        assert start.min() >= 0 and np.all(start + length <= 400)
        assert np.histogram(place, 4, (0, 1))[0] == pytest.approx(1000, abs=150)


@pytest.mark.parametrize(
    ("image_size", "expected"),
    [((50, 400), (0, 166, 50, 67)), ((400, 50), (166, 0, 67, 50)), ((60, 70), (0, 0, 60, 70))],
)
def test_an_image_into_which_no_crop_fits_is_cropped_in_the_middle(image_size, expected):
    """As in torchvision: the whole image, if its ratio is allowed."""
    draw = partial(draw_crop, image_size=image_size, scale=(1.5, 2.0), ratio=(3 / 4, 4 / 3))
    assert tuple(jax.jit(draw)(jax.random.key(0)).tolist()) == expected


# --- RandAugment ------------------------------------------------------------------------------------------------------


def by_pillow(op, image, level, sign):
    """Applies an operation with the level (magnitude / 30) by Pillow."""

    def warp(a, b, c, d, e, f):
        data = (a, b, c, d, e, f)
        return image.transform(image.size, Image.Transform.AFFINE, data, fillcolor=(128,) * 3)

    def enhance(enhancer):
        return enhancer(image).enhance(1 + sign * 0.9 * level)

    level_x, level_y = (sign * int(150 / 331 * level * side) for side in image.size)
    return {
        "identity": lambda: image,
        "shear_x": lambda: warp(1, sign * 0.3 * level, 0, 0, 1, 0),
        "shear_y": lambda: warp(1, 0, 0, sign * 0.3 * level, 1, 0),
        "translate_x": lambda: warp(1, 0, level_x, 0, 1, 0),
        "translate_y": lambda: warp(1, 0, 0, 0, 1, level_y),
        "rotate": lambda: image.rotate(sign * 30 * level, fillcolor=(128,) * 3),
        "brightness": lambda: enhance(ImageEnhance.Brightness),
        "color": lambda: enhance(ImageEnhance.Color),
        "contrast": lambda: enhance(ImageEnhance.Contrast),
        "sharpness": lambda: enhance(ImageEnhance.Sharpness),
        "posterize": lambda: ImageOps.posterize(image, 8 - round(4 * level)),
        "solarize": lambda: ImageOps.solarize(image, 255 * (1 - level)),
        "auto_contrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
    }[op]()


apply_op_jit = jax.jit(apply_op, static_argnames="magnitude")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("sign", [1, -1])
def test_an_operation_equals_that_of_pillow(op, sign):
    """Within the two roundings of 8 bits; a place between two pixels may belong to either of them."""
    image, magnitude = photo(), 24.0
    got = apply_op_jit(jnp.asarray(image, jnp.float32), jnp.asarray(OPS.index(op)), jnp.float32(sign), magnitude)
    expected = np.asarray(by_pillow(op, Image.fromarray(image), magnitude / 30, sign)).astype(float)
    close = np.abs(got - expected).max(-1) <= (2 if op in ("color", "sharpness") else 1)
    assert close.mean() > (0.999 if op in ("rotate", "shear_x", "shear_y") else 0.9999)
    assert (np.abs(expected - image).max() > 5) == (op != "identity")  # It does something.


def test_operations_of_gray_images_and_of_flat_ones():
    """Gray images are Pillow's mode L; a flat image has no contrast to be stretched."""
    gray = photo(channels=1)
    for op in ("contrast", "equalize", "auto_contrast"):
        got = apply_op_jit(jnp.asarray(gray, jnp.float32), jnp.asarray(OPS.index(op)), jnp.float32(1), 24.0)
        expected = np.asarray(by_pillow(op, Image.fromarray(gray[..., 0]), 0.8, 1))
        np.testing.assert_allclose(got[..., 0], expected, atol=1)
    flat = jnp.full((8, 8, 3), 77.0)
    for op in ("equalize", "auto_contrast", "sharpness"):
        np.testing.assert_allclose(
            apply_op_jit(flat, jnp.asarray(OPS.index(op)), jnp.float32(1), 24.0), flat, rtol=1e-6
        )


def test_each_image_gets_its_own_operations():
    """The images of a batch are equal, and the results are those of every operation, in both directions."""
    image, count = photo(20, 26), 400
    images = jnp.asarray(np.broadcast_to(image, (count, *image.shape)), jnp.float32)
    keys = jax.random.split(jax.random.key(1), count)
    got = np.asarray(jax.jit(partial(rand_augment, num_ops=1, magnitude=20.0))(keys, images))
    ways = [(op, sign) for op in range(len(OPS)) for sign in (1, -1)]
    known = np.stack([apply_op_jit(images[0], jnp.asarray(op), jnp.float32(sign), 20.0) for op, sign in ways])
    differences = [np.abs(known - x).max((1, 2, 3)) for x in got]  # The two programs may round differently.
    assert max(x.min() for x in differences) < 1e-3
    counts = np.bincount([ways[x.argmin()][0] for x in differences], minlength=len(OPS))
    assert counts.min() > 10 and counts.max() < 60  # 29 are expected.


# --- The class --------------------------------------------------------------------------------------------------------

IMAGES = np.stack([photo(20, 24, seed=i) for i in range(8)])
PIXELS = Pixels(IMAGES, np.arange(8, dtype=np.int32), pixel_statistics(IMAGES))
make_batch_jit = jax.jit(make_batch, static_argnums=2)


def test_an_example_is_cropped_alike_anywhere_in_a_batch():
    augment, key = PhotoAugment(train_sizes=(12,), flip="random", num_ops=2), jax.random.key(0)
    plan = epoch_plan(0, 0, 8, batch_size=8, augment=augment, image_size=(12, 12))
    rolled = type(plan)(*(np.roll(values, 3, axis=1) for values in plan))
    one, other = (make_batch_jit(PIXELS, p.row(0), augment, key) for p in (plan, rolled))
    assert one.image.shape == (8, 12, 12, 3)
    np.testing.assert_allclose(np.roll(one.image, 3, axis=0), other.image, atol=1e-5)
    np.testing.assert_array_equal(np.roll(one.label, 3), other.label)


def test_each_draw_of_a_repeated_example_is_cropped_anew():
    augment, label = PhotoAugment(train_sizes=(12,)), (np.arange(8) == 7).astype(np.int32)
    plan = epoch_plan(0, 0, 8, batch_size=8, augment=augment, image_size=(12, 12), balanced_label=label)
    image = make_batch_jit(PIXELS, plan.row(0), augment, jax.random.key(0)).image[plan.example[0] == 7]
    assert len(image) == len(np.unique(image, axis=0)) == 4


def test_whole_images_are_not_changed():
    """Without anything random the batch is the stored one."""
    augment = PhotoAugment(scale=(1.0, 1.0), ratio=(24 / 20, 24 / 20))
    got = make_batch_jit(PIXELS, plain_plan(8, 8).row(0), augment, jax.random.key(0))
    np.testing.assert_allclose(got.image, make_batch(PIXELS, plain_plan(8, 8).row(0)).image, atol=1e-4)


def test_cutout_follows_the_crop():
    """The square is inside of the crop, which may be larger than the stored images."""
    augment = PhotoAugment(train_sizes=(32,), cutout=30)
    augment.check_size((20, 24))
    plan = epoch_plan(0, 0, 8, batch_size=8, augment=augment, image_size=augment.output_size((20, 24)))
    image = make_batch_jit(PIXELS, plan.row(0), augment, jax.random.key(0)).image
    assert np.all((np.asarray(image) == 0).all(-1).sum((1, 2)) == 900)
    with pytest.raises(UserError, match=r"`augment.cutout` must be at most 16 for images of 16×16 pixels, got 30\."):
        replace(augment, train_sizes=(16,)).check_size((20, 24))


def test_mixup_and_cutmix_are_those_of_their_classes():
    """Each image of a batch gets one of the two."""
    image = np.random.default_rng(0).normal(size=(64, 6, 8, 3)).astype(np.float32)
    batch = Batch(image, np.arange(64, dtype=np.int32) % 5, np.ones(64, bool))

    @jax.jit
    def batches(keys):
        mixup_key, cutmix_key, _ = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)
        expected = [
            Mixup(alpha=0.3, num_classes=5).transform(mixup_key, batch),
            CutMix(alpha=1.5, num_classes=5).transform(cutmix_key, batch),
        ]
        return expected, PhotoAugment(num_classes=5, mixup=0.3, cutmix=1.5).transform(keys, batch)

    expected, both = jax.device_get(batches(jax.random.split(jax.random.key(0), 64)))
    kind = [next(i for i in (0, 1) if np.allclose(both.image[n], expected[i].image[n], atol=1e-5)) for n in range(64)]
    np.testing.assert_allclose(both.label, [expected[i].label[n] for n, i in enumerate(kind)], atol=1e-5)
    assert 20 < sum(kind) < 44
    assert PhotoAugment().transform(jax.random.split(jax.random.key(0), 64), batch) is batch


def test_the_image_grows_in_equal_parts_of_the_epochs():
    sizes = [PhotoAugment(train_sizes=(16, 24, 32)).at_epoch(epoch, 7).train_sizes for epoch in range(7)]
    assert sizes == [(16,), (16,), (24,), (24,), (32,), (32,), (32,)]
    assert PhotoAugment(train_sizes=(16, 32)).at_epoch(0, 1).train_sizes == (32,)  # The last epoch has the last size.
    assert PhotoAugment().at_epoch(0, 3) == PhotoAugment()
    assert PhotoAugment(train_sizes=(16, 32)).depends_on_length()
    assert not PhotoAugment(train_sizes=(16,)).depends_on_length()
    assert not Augment().depends_on_length()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_sizes": (0,)}, r"`augment.train_sizes` must be from 1 to 4096, got \(0,\)"),
        (
            {"scale": (0.5, 1.5)},
            r"`augment.scale` must be two numbers above 0 and at most 1, the smaller one first, got",
        ),
        ({"scale": (0.5, 0.2)}, r"`augment.scale` must be two numbers .* got \(0.5, 0.2\)"),
        ({"ratio": (0.0, 1.0)}, r"`augment.ratio` must be two numbers above 0 and finite, the smaller one first, got"),
        ({"num_ops": -1}, "`augment.num_ops` must be at least 0, got -1"),
        ({"magnitude": 31.0}, "`augment.magnitude` must be from 0 to 30, got 31.0"),
        ({"mixup": -0.1}, "`augment.mixup` must be at least 0 and finite, got -0.1"),
        ({"cutmix": -1.0}, "`augment.cutmix` must be at least 0 and finite, got -1.0"),
    ],
)
def test_invalid_options_of_photos(options, message):
    with pytest.raises(UserError, match=message):
        PhotoAugment(**options)


def test_operations_need_gray_or_color_images():
    keys, image = jax.random.split(jax.random.key(0), 2), jnp.zeros((2, 8, 8, 4), jnp.uint8)
    with pytest.raises(UserError, match=r"`augment.num_ops` must be 0 for images of 4 channels, got 2\."):
        jax.eval_shape(PhotoAugment(num_ops=2).transform_pixels, keys, image)
