"""`DataLoader`: the batches of a run in a loop of one's own."""

from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from programs.research import Noise, make_arrays

from cnnjax import (
    Adam,
    Augment,
    Config,
    CutMix,
    DataLoader,
    Mixup,
    PhotoAugment,
    UserError,
    evaluate,
    init_state,
    load_dataset,
    load_run,
    train_and_evaluate,
    train_step,
)
from cnnjax.loader import _make_batch
from cnnjax.step import _donating_step

IMAGE, LABEL, TEST_IMAGE, TEST_LABEL = make_arrays()  # 110 images of 6 by 5 pixels, in 4 classes.
SEEN = Augment(flip="random", translate=1, cutout=2)


def epoch_of(loader, epoch=0):
    return jax.tree.map(lambda *parts: np.concatenate(parts), *loader.epoch(epoch))


class Pooling(nn.Module):
    """Accepts images of any size."""

    num_classes: int = 4

    @nn.compact
    def __call__(self, image, *, train):
        x = nn.relu(nn.Conv(8, (2, 2))(image)).mean((1, 2))
        return nn.Dense(self.num_classes)(nn.Dropout(0.2, deterministic=not train)(x))


@pytest.mark.parametrize(
    ("sampling", "augment"),
    [
        ("none", SEEN),
        ("balanced", Augment(flip="alternating")),
        ("none", PhotoAugment(flip="random", cutout=2, train_sizes=(3, 4), mixup=0.2, num_classes=4)),
    ],
)
def test_a_loop_gives_the_parameters_and_scores_of_a_run_with_its_seed(sampling, augment, tmp_path):
    config = Config(
        dataset=(IMAGE, LABEL, TEST_IMAGE, TEST_LABEL),
        seed=4,
        num_epochs=3,
        batch_size=16,
        sampling=sampling,
        augment=augment,
        model=Pooling(),
        optim=Adam(learning_rate=3e-3, schedule="one_cycle"),
        tta="flip",
    )
    train_and_evaluate(config, run_dir=tmp_path / "run")
    data = load_dataset(config.dataset)
    train, _ = data.load_parts(4, config.validation_fraction)
    loader = DataLoader(*train, batch_size=16, seed=4, augment=augment, num_epochs=3, sampling=sampling)
    tx = config.optim.make_tx(3 * loader.steps_per_epoch)
    init_key, train_key, _ = jax.random.split(jax.random.key(4), 3)
    state = init_state(init_key, jnp.zeros((1, *data.image_shape)), model=config.model, tx=tx)
    for epoch in range(3):
        for batch in loader.epoch(epoch):
            state, _ = train_step(state, batch, train_key, model=config.model, tx=tx)
    last = load_run(tmp_path / "run", config, step=3 * loader.steps_per_epoch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state.params, last.state.params)
    scores = evaluate(state, loader.standardize(TEST_IMAGE), TEST_LABEL, model=config.model, tta="flip")
    assert scores.loss == pytest.approx(last.evaluate().loss, rel=1e-4)


def test_an_epoch_shows_every_image_once_standardized_and_masks_the_padding():
    loader = DataLoader(IMAGE, LABEL, batch_size=32, seed=1)
    batches = [*loader.epoch(2)]
    assert loader.steps_per_epoch == len(batches) == 4 and {len(batch.mask) for batch in batches} == {32}
    batch = epoch_of(loader, 2)
    assert batch.image.dtype == np.float32 and batch.label.dtype == np.int32
    kept = batch.mask
    assert kept.sum() == len(LABEL) and not kept[len(LABEL) :].any()
    mean, std = IMAGE.mean((0, 1, 2)), IMAGE.std((0, 1, 2))
    expected = (IMAGE - mean) / std
    rows = np.array([np.abs(expected - image).sum((1, 2, 3)).argmin() for image in batch.image[kept]])
    assert sorted(rows) == [*range(len(LABEL))] and [*rows] != sorted(rows)
    np.testing.assert_allclose(batch.image[kept], expected[rows], atol=1e-5)
    np.testing.assert_array_equal(batch.label[kept], LABEL[rows])
    np.testing.assert_array_equal(batch.image[~kept], batch.image[: 4 * 32 - len(LABEL)])  # The padding.
    np.testing.assert_allclose(loader.standardize(IMAGE), expected, atol=1e-5)
    np.testing.assert_allclose(loader.standardization, [mean, std], rtol=1e-5)


def test_an_epoch_is_a_function_of_the_seed_and_its_number():
    loader = DataLoader(IMAGE, LABEL, batch_size=16, seed=7, augment=CutMix(flip="random", num_classes=4))
    same = DataLoader(IMAGE, LABEL, batch_size=16, seed=7, augment=CutMix(flip="random", num_classes=4))
    other = DataLoader(IMAGE, LABEL, batch_size=16, seed=8, augment=CutMix(flip="random", num_classes=4))
    third = epoch_of(loader, 3)
    jax.tree.map(np.testing.assert_array_equal, epoch_of(same, 3), third)  # Without the epochs before.
    for different in (epoch_of(loader, 2), epoch_of(other, 3)):
        assert (different.image != third.image).any(axis=(1, 2, 3)).mean() > 0.9
    assert third.label.shape == (112, 4) and third.label.max(axis=1).min() < 1  # Mixed.


def test_labels_may_be_any_arrays_of_examples():
    teacher = np.arange(len(LABEL) * 3, dtype=np.float32).reshape(-1, 3)
    label = {"class": LABEL, "teacher": jnp.asarray(teacher), "bits": (np.arange(len(LABEL)) % 2 == 0,)}
    batch = epoch_of(DataLoader(IMAGE, label, batch_size=16, seed=0, augment=SEEN))
    example = (batch.label["teacher"][:, 0] / 3).round().astype(int)
    np.testing.assert_array_equal(batch.label["class"], LABEL[example])
    np.testing.assert_array_equal(batch.label["teacher"], teacher[example])
    np.testing.assert_array_equal(batch.label["bits"][0], example % 2 == 0)


@dataclass(frozen=True)
class Shrinking(Augment):
    """Images lose a row with each epoch."""

    def at_epoch(self, epoch, num_epochs):
        return Cropped(rows=num_epochs - epoch, cutout=self.cutout)


@dataclass(frozen=True)
class Cropped(Augment):
    rows: Any = 6

    def output_size(self, image_size):
        return self.rows, image_size[1]

    def transform_pixels(self, key, image):
        return image[:, : self.rows]


@dataclass(frozen=True)
class Schedule(PhotoAugment):
    """Has one size, but depends on the number of epochs."""

    def at_epoch(self, epoch, num_epochs):
        return replace(self, cutout=min(epoch, num_epochs - 1))


def test_augmentations_of_the_user_and_of_epochs():
    plain, noisy = (
        epoch_of(DataLoader(IMAGE, LABEL, batch_size=16, seed=0, augment=augment))
        for augment in (None, Noise(scale=1.0))
    )
    noise = noisy.image - plain.image
    assert abs(noise.mean()) < 0.1 and noise.std() == pytest.approx(1, abs=0.1)
    loader = DataLoader(IMAGE, LABEL, batch_size=16, seed=0, augment=Shrinking(), num_epochs=3)
    assert [epoch_of(loader, epoch).image.shape[1:3] for epoch in range(3)] == [(3, 5), (2, 5), (1, 5)]
    with pytest.raises(UserError, match="`epoch` must be an integer from 0 to 2, got 3"):
        loader.epoch(3)
    # The last epoch is checked before the first.
    with pytest.raises(UserError, match="must be at most 1 for images of 1×5 pixels, got 2"):
        DataLoader(IMAGE, LABEL, batch_size=16, seed=0, augment=Shrinking(cutout=2), num_epochs=3)
    grown = DataLoader(
        np.zeros((8, 12, 12, 3), np.uint8),
        np.arange(0, 96, 12),  # More classes than the default of `num_classes`, which only mixing uses.
        batch_size=4,
        seed=0,
        augment=PhotoAugment(train_sizes=(8, 12)),
        num_epochs=2,
    )
    assert [next(iter(grown.epoch(epoch))).image.shape for epoch in range(2)] == [(4, 8, 8, 3), (4, 12, 12, 3)]


def test_the_cutout_of_resized_images_is_inside_of_them():
    image, pixel_units = np.full((40, 12, 12, 3), 9, np.uint8), ([0.0] * 3, [9.0] * 3)
    augment = PhotoAugment(train_sizes=(6,), cutout=3)
    loader = DataLoader(image, np.arange(40) % 4, batch_size=40, seed=0, augment=augment, standardization=pixel_units)
    cut = epoch_of(loader).image == 0
    assert (cut.sum((1, 2, 3)) == 3 * 3 * 3).all() and cut.any((0, 3)).all()


def test_a_loop_compiles_once_and_transfers_nothing_implicitly():
    loader = DataLoader(IMAGE[..., 0], jnp.asarray(LABEL), batch_size=16, seed=0, augment=SEEN)
    model, tx = Pooling(), optax.sgd(0.1)
    state, key = init_state(jax.random.key(0), jnp.zeros((1, 6, 5, 1)), model=model, tx=tx), jax.random.key(1)
    programs: list[Any] = [_make_batch, _donating_step]
    compiled = [program._cache_size() for program in programs]
    with jax.transfer_guard("disallow"):
        for epoch in range(2):
            for batch in loader.epoch(epoch):
                assert batch.image.shape == (16, 6, 5, 1)
                state, _ = train_step(state, batch, key, model=model, tx=tx)
    assert [program._cache_size() for program in programs] == [count + 1 for count in compiled]


def test_no_key_is_used_twice():
    augment = PhotoAugment(mixup=0.2, cutmix=1.0, num_classes=4)
    with jax.debug_key_reuse(True):
        loader = DataLoader(IMAGE, LABEL, batch_size=64, seed=0, augment=augment)
        assert len([batch for epoch in range(2) for batch in loader.epoch(epoch)]) == 4


PHOTO = PhotoAugment(train_sizes=(4,), num_ops=2, mixup=0.2, cutmix=1.0, num_classes=4)


@pytest.mark.parametrize("augment", [SEEN, Mixup(translate=1, cutout=1), PHOTO])
def test_batches_have_the_same_bits_in_64_bits_and_under_strict_promotion(augment):
    expected = epoch_of(DataLoader(IMAGE, LABEL, batch_size=16, seed=0, augment=augment))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        found = epoch_of(DataLoader(IMAGE, LABEL, batch_size=16, seed=0, augment=augment))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_what_the_caller_changes_later_changes_no_batch():
    image, label = IMAGE.copy(), {"class": LABEL.astype(np.int32), "teacher": np.ones((len(LABEL), 64), np.float32)}
    mean, std = np.full(3, 100, np.float32), np.full(3, 50, np.float32)
    loader = DataLoader(image, label, batch_size=16, seed=0, standardization=(mean, std))
    before = epoch_of(loader)
    for array in (image, *label.values(), mean, std):
        array[:] = 7
    jax.tree.map(np.testing.assert_array_equal, epoch_of(loader), before)


def test_a_standardization_of_ones_own():
    loader = DataLoader(IMAGE, LABEL, batch_size=16, seed=0, standardization=([1, 2, 3], np.array([2, 4, 8.0])))
    np.testing.assert_allclose(loader.standardize(IMAGE), (IMAGE - [1, 2, 3]) / [2, 4, 8], rtol=1e-6)
    dark = IMAGE // 128
    own = DataLoader(dark, LABEL, batch_size=16, seed=0).standardization
    for image, given in ((IMAGE, ([0] * 3, [1] * 3)), (dark, own)):
        found = DataLoader(image, LABEL, batch_size=16, seed=0, standardization=given).standardize(image)
        np.testing.assert_allclose(found, (image - np.array(given[0])) / given[1], rtol=1e-5)
    assert epoch_of(loader).image.min() == pytest.approx(((IMAGE - [1, 2, 3]) / [2, 4, 8]).min(), rel=1e-6)


ARGUMENTS: dict[str, Any] = {"image": IMAGE, "label": LABEL, "batch_size": 16, "seed": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": IMAGE / 255}, r"`image` must be images of dtype uint8, got float64 between 0 and 1\. Convert it"),
        ({"image": IMAGE[0, 0]}, r"`image` must be of shape \[N, H, W, C\] or \[N, H, W\]"),
        ({"image": [1]}, "`image` must be a NumPy or JAX array, got list"),
        ({"label": LABEL[1:]}, r"`label` must be \[N \.\.\.\] with N = 110, the number of images, got int\d+\[109\]"),
        ({"label": {"a": LABEL, "b": LABEL[:3]}}, r"`label\['b'\]` must be \[N \.\.\.\] with N = 110"),
        (
            {"label": np.array(["cat"] * 110)},
            "`label` must be numbers or bools, got <U3. Number the classes: names, label = np.unique",
        ),
        (
            {"label": LABEL.astype(np.int64) + 2**32},
            r"`label` must be between -2\*\*31 and 2\*\*31 - 1, got 4294967296 to",
        ),
        ({"label": np.ma.masked_array(LABEL)}, "`label` must be an array without a mask"),
        ({"label": ()}, r"`label` must be an array, or a pytree of arrays, got \(\)"),
        ({"label": [*LABEL]}, r"`label\[0\]` must be a NumPy or JAX array"),
        ({"batch_size": 111}, "`batch_size` must be between 1 and the 110 training examples, got 111"),
        ({"batch_size": 16.0}, r"`batch_size` must be an integer, got 16\.0"),
        ({"seed": -1}, "`seed` must be an integer from 0 to 4294967295, got -1"),
        ({"num_epochs": 0}, "`num_epochs` must be an integer from 1"),
        ({"augment": Augment}, "`augment` must be an instance of cnnjax's Augment, got the class Augment"),
        ({"augment": Augment(translate=9)}, "`augment.translate` must be at most 4 for images of 6×5 pixels, got 9"),
        (
            {"augment": Mixup(num_classes=3)},
            r"`label` must be from 0 to 2, as `augment.num_classes` is 3, got 0 to 3\. Set it to 4\.",
        ),
        ({"augment": Shrinking()}, "`num_epochs` must be the number of epochs for Shrinking, which depends on it"),
        (
            {"standardization": ([1, 2], [1, 2])},
            r"`standardization` must be a pair \(mean, std\) of arrays \[3\] from 0 to 255, with std above 0",
        ),
        ({"standardization": ([1] * 3, [1, 0, 1])}, "`standardization` must be a pair .* with std above 0"),
        ({"standardization": ("a", "b")}, r"`standardization` must be a pair \(mean, std\)"),
        ({"standardization": ([np.nan] * 3, [1] * 3)}, r"`standardization` must be a pair \(mean, std\)"),
        (
            {"standardization": ([0.5] * 3, [0.2] * 3)},
            r"`standardization` must be in pixel units \(0 to 255\), got .* by 255\.",
        ),
        (
            {"label": LABEL - 1, "augment": CutMix()},
            "`label` must be from 0 to 9, .* got -1 to 2. Number the classes from 0",
        ),
        (
            {"label": np.eye(4)[LABEL], "augment": Mixup()},
            r"class indices, int \[B\], to be mixed, got float32\[16, 4\]",
        ),
        ({"label": {"class": LABEL}, "augment": Mixup()}, r"class indices, int \[B\], to be mixed, got \{'class'"),
        ({"label": {"class": LABEL}, "sampling": "balanced"}, "`sampling` must be none if `label` is not integers"),
        ({"sampling": "even"}, "`sampling` must be a known name, got 'even'"),
        ({"augment": 0}, "`augment` must be an instance of cnnjax's Augment, got 0"),
        ({"augment": Cropped(rows=[2])}, r"`augment` must be hashable, got .* Use @dataclass\(frozen=True\)"),
        ({"augment": Schedule()}, "`num_epochs` must be the number of epochs for Schedule"),
        ({"standardization": 1}, r"`standardization` must be a pair \(mean, std\)"),
    ],
)
def test_wrong_arguments(changes, message, no_type_checks):
    with pytest.raises(UserError, match=message):
        DataLoader(**(ARGUMENTS | changes))


@dataclass(frozen=True)
class Doubling(Augment):
    """Returns twice as many labels."""

    def transform(self, key, batch):
        return batch._replace(label=jnp.tile(batch.label, 2))


def test_wrong_results_and_epochs(no_type_checks):
    loader = DataLoader(**ARGUMENTS)
    for epoch in (-1, 1.0, True):
        with pytest.raises(UserError, match="`epoch` must be an integer from 0"):
            loader.epoch(epoch)
    with pytest.raises(UserError, match=r"`image` must be uint8 \[N 6 5 3\]"):
        loader.standardize(IMAGE / 255)
    with pytest.raises(UserError, match=r"`augment.transform` must return labels"):
        DataLoader(**ARGUMENTS, augment=Doubling())
