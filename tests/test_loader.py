"""`DataLoader`: the batches of a run in a loop of one's own."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs.research import make_arrays

from cnnjax import (
    MLP,
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
    train_and_evaluate,
    train_step,
)

IMAGE, LABEL, TEST_IMAGE, TEST_LABEL = make_arrays()  # 110 images of 6 by 5 pixels, in 4 classes.
SEEN = Augment(flip="random", translate=1, cutout=2)


def epoch_of(loader, epoch=0):
    return jax.tree.map(lambda *parts: np.concatenate(parts), *loader.epoch(epoch))


def test_a_loop_gives_the_parameters_and_scores_of_a_run_with_its_seed(tmp_path):
    config = Config(
        dataset=(IMAGE, LABEL, TEST_IMAGE, TEST_LABEL),
        seed=4,
        num_epochs=3,
        batch_size=16,
        augment=Mixup(flip="alternating", translate=1, cutout=2, num_classes=4),
        model=MLP(num_classes=4, dense_dropout=0.2),
        optim=Adam(learning_rate=3e-3, schedule="one_cycle"),
        tta="flip",
    )
    run = train_and_evaluate(config, run_dir=tmp_path / "run")

    data = load_dataset(config.dataset)
    train, _ = data.load_parts(4, config.validation_fraction)
    loader = DataLoader(*train, batch_size=16, seed=4, augment=config.augment)
    tx = config.optim.make_tx(3 * len(loader))
    init_key, train_key, _ = jax.random.split(jax.random.key(4), 3)
    image = jnp.zeros((1, *data.image_shape))
    state, states = init_state(init_key, image, model=config.model, tx=tx), []
    for epoch in range(3):
        for batch in loader.epoch(epoch):
            state, _ = train_step(state, batch, train_key, model=config.model, tx=tx)
        states.append(jax.tree.map(jnp.copy, state))
    best = states[run.finished_result()["best_epoch"] - 1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), best.params, run.state.params)
    scores = evaluate(best, loader.standardize(TEST_IMAGE), TEST_LABEL, model=config.model, tta="flip")
    assert scores.loss == pytest.approx(run.test_loss, rel=1e-4)


def test_an_epoch_shows_every_image_once_standardized_and_masks_the_padding():
    loader = DataLoader(IMAGE, LABEL, batch_size=32, seed=1)
    batches = [*loader.epoch(2)]
    assert len(loader) == len(batches) == 4 and {len(batch.mask) for batch in batches} == {32}
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
        return Cropped(rows=num_epochs - epoch)


@dataclass(frozen=True)
class Cropped(Augment):
    rows: int = 6

    def output_size(self, image_size):
        return self.rows, image_size[1]

    def transform_pixels(self, key, image):
        return image[:, : self.rows]


@dataclass(frozen=True)
class Noisy(Augment):
    """Adds noise of deviation 1."""

    def transform(self, key, batch):
        noise = jax.vmap(lambda key: jax.random.normal(key, batch.image.shape[1:]))(key)
        return batch._replace(image=batch.image + noise)


def test_augmentations_of_the_user_and_of_epochs():
    plain, noisy = (
        epoch_of(DataLoader(IMAGE, LABEL, batch_size=16, seed=0, augment=augment)) for augment in (None, Noisy())
    )
    noise = noisy.image - plain.image
    assert abs(noise.mean()) < 0.1 and noise.std() == pytest.approx(1, abs=0.1)
    loader = DataLoader(IMAGE, LABEL, batch_size=16, seed=0, augment=Shrinking(), num_epochs=3)
    assert [epoch_of(loader, epoch).image.shape[1:3] for epoch in range(3)] == [(3, 5), (2, 5), (1, 5)]
    with pytest.raises(UserError, match="`epoch` must be an integer from 0 to 2, got 3"):
        loader.epoch(3)
    grown = DataLoader(
        np.zeros((8, 12, 12, 3), np.uint8),
        np.arange(8),
        batch_size=4,
        seed=0,
        augment=PhotoAugment(train_sizes=(8, 12)),
        num_epochs=2,
    )
    assert [next(iter(grown.epoch(epoch))).image.shape for epoch in range(2)] == [(4, 8, 8, 3), (4, 12, 12, 3)]


def test_what_the_caller_changes_later_changes_no_batch():
    image, label = IMAGE.copy(), LABEL.astype(np.int32).copy()
    loader = DataLoader(image, label, batch_size=16, seed=0)
    before = epoch_of(loader)
    image[:], label[:] = 0, 0
    jax.tree.map(np.testing.assert_array_equal, epoch_of(loader), before)


def test_a_standardization_of_ones_own():
    loader = DataLoader(IMAGE, LABEL, batch_size=16, seed=0, standardization=([1, 2, 3], np.array([2, 4, 8.0])))
    np.testing.assert_allclose(loader.standardize(IMAGE), (IMAGE - [1, 2, 3]) / [2, 4, 8], rtol=1e-6)
    assert epoch_of(loader).image.min() == pytest.approx(((IMAGE - [1, 2, 3]) / [2, 4, 8]).min(), rel=1e-6)


ARGUMENTS: dict[str, Any] = {"image": IMAGE, "label": LABEL, "batch_size": 16, "seed": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": IMAGE / 255}, r"`image` must be images of dtype uint8, got float64 between 0 and 1\. Convert it"),
        ({"image": IMAGE[0, 0]}, r"`image` must be of shape \[N, H, W, C\] or \[N, H, W\]"),
        ({"image": [1]}, "`image` must be a NumPy or JAX array, got list"),
        ({"label": LABEL[1:]}, r"`label` must be \[N \.\.\.\], one for each of 110 images, got int\d+\[109\]"),
        ({"label": {"a": LABEL, "b": LABEL[:3]}}, r"`label\['b'\]` must be \[N \.\.\.\], one for each of 110 images"),
        ({"label": np.array(["cat"] * 110)}, "`label` must be an array of numbers, got <U3"),
        ({"label": LABEL.astype(np.int64) + 2**32}, "`label` must be integers of 32 bits, got 4294967296 to"),
        ({"label": np.ma.masked_array(LABEL)}, "`label` must be an array without a mask"),
        ({"label": ()}, r"`label` must be an array, or a pytree of arrays, got \(\)"),
        ({"label": [*LABEL]}, r"`label\[0\]` must be a NumPy or JAX array"),
        ({"batch_size": 111}, "`batch_size` must be between 1 and the 110 training examples, got 111"),
        ({"batch_size": 16.0}, r"`batch_size` must be an integer from 1 to 2147483647, got 16\.0"),
        ({"seed": -1}, "`seed` must be an integer from 0 to 4294967295, got -1"),
        ({"num_epochs": 0}, "`num_epochs` must be an integer from 1"),
        ({"augment": Augment}, "`augment` must be an instance of cnnjax's Augment, got the class Augment"),
        ({"augment": Augment(translate=9)}, "`augment.translate` must be at most 4 for images of 6×5 pixels, got 9"),
        ({"augment": Mixup(num_classes=3)}, "`augment.num_classes` must be at least 4 for labels up to 3, got 3"),
        ({"augment": Shrinking()}, "`num_epochs` must be the number of epochs for Shrinking, which depends on it"),
        ({"standardization": ([1, 2], [1, 2])}, r"`standardization` must be a pair \(mean, std\) of finite numbers"),
        ({"standardization": ([1] * 3, [1, 0, 1])}, r"`standardization` must be a pair .*, with std above 0"),
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
    with pytest.raises(UserError, match=r"`images` must be uint8 \[N 6 5 3\]"):
        loader.standardize(IMAGE / 255)
    with pytest.raises(UserError, match=r"`augment.transform` must return labels"):
        DataLoader(**ARGUMENTS, augment=Doubling())
