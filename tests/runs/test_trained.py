import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from cnnjax import Config, ModelConfig, UserError, train_and_evaluate
from cnnjax.data.datasets import load_dataset
from cnnjax.runs.trained import classify, load_trained, read_image, score

# Views are of the test split alone.
CONFIG = Config(
    dataset="generated", num_epochs=2, batch_size=16, views="mirrored", model=ModelConfig("mlp", dense_dropout=0.1)
)


@pytest.fixture(scope="module")
def run(tmp_path_factory, prepared_dir):
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    return run_dir, train_and_evaluate(CONFIG, run_dir=run_dir, data_dir=prepared_dir)


def test_scores_equal_those_of_the_run(run, prepared_dir):
    trained = load_trained(run[0])
    test, validation = (score(trained, split, prepared_dir) for split in ("test", "validation"))
    assert (test.accuracy, test.loss, test.num_examples) == (run[1]["test_accuracy"], run[1]["test_loss"], 170)
    assert (validation.accuracy, validation.num_examples) == (run[1]["best_validation_accuracy"], 40)


def test_scoring_on_other_data(run, prepared_dir):
    trained = load_trained(run[0])
    other = trained._replace(
        facts=type(trained.facts)(**{**vars(trained.facts), "sha256": {"train": "0", "test": "1"}})
    )
    with pytest.raises(UserError, match=r"`data_dir` must hold the 'generated' of this run, SHA-256 {'train': '0'"):
        score(other, "test", prepared_dir)


def test_classifies_the_images_of_the_set(run, prepared_dir):
    trained = load_trained(run[0])
    examples = load_dataset("generated", prepared_dir).load("test")
    for i in range(10):
        probability = classify(trained, examples.image[i])
        assert probability.sum() == pytest.approx(1, abs=1e-5)
        assert probability.argmax() == examples.label[i]


def test_a_png_of_the_right_size_is_read_exactly(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    np.testing.assert_array_equal(read_image(tmp_path / "image.png", (32, 32, 3)), image)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_kind_of_image_is_read(mode, channels, tmp_path):
    suffix = {"CMYK": "jpg"}.get(mode, "png")
    Image.new("RGB", (50, 20), (102, 102, 102)).convert(mode).save(tmp_path / f"image.{suffix}")
    image = read_image(tmp_path / f"image.{suffix}", (28, 28, channels))
    assert image.shape == (28, 28, channels)
    assert image.dtype == np.uint8
    assert np.abs(image.astype(int) - 102).max() <= 2  # JPEG rounds; the palette of P holds 102.


def test_black_and_white_is_read(tmp_path):
    Image.new("1", (28, 28), 1).save(tmp_path / "image.png")
    np.testing.assert_array_equal(read_image(tmp_path / "image.png", (28, 28, 1)), 255)


def test_thirty_two_bits_are_refused(tmp_path):
    Image.new("F", (28, 28), 0.5).save(tmp_path / "image.tiff")
    with pytest.raises(UserError, match=r"`image` must have 8 or 16 bits a channel, got .* with 32 \(mode F\)"):
        read_image(tmp_path / "image.tiff", (28, 28, 1))


def test_sixteen_bit_grey_keeps_its_range(tmp_path):
    Image.fromarray(np.full((28, 28), 128 * 257, np.uint16)).save(tmp_path / "image.png")
    np.testing.assert_array_equal(read_image(tmp_path / "image.png", (28, 28, 1)), np.full((28, 28, 1), 128))


def test_transparent_parts_become_white_and_long_sides_are_cropped(tmp_path):
    image = np.zeros((10, 30, 4), np.uint8)  # Black, transparent but for the middle third.
    image[:, 10:20, 3] = 255
    image[:, 10:15, 0] = 200
    Image.fromarray(image).save(tmp_path / "image.png")
    read = read_image(tmp_path / "image.png", (10, 10, 3))
    np.testing.assert_array_equal(read[:, :5], np.broadcast_to([200, 0, 0], (10, 5, 3)))
    np.testing.assert_array_equal(read[:, 5:], 0)
    wide = read_image(tmp_path / "image.png", (10, 30, 3))
    np.testing.assert_array_equal(wide[:, :10], 255)


def test_a_photograph_is_turned_upright(tmp_path):
    image = np.zeros((20, 20, 3), np.uint8)
    image[:10] = 255  # White above.
    exif = Image.Exif()
    exif[0x0112] = 3  # Orientation: upside down.
    Image.fromarray(image).save(tmp_path / "image.png", exif=exif)
    read = read_image(tmp_path / "image.png", (20, 20, 3))
    assert (read[:10].max(), read[10:].min()) == (0, 255)


def test_no_image(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    for path in (tmp_path / "text.png", tmp_path / "missing.png", tmp_path):
        with pytest.raises(UserError, match=rf"`image` must be an image file .*, got {path} \("):
            read_image(path, (32, 32, 3))


def test_a_truncated_image(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "image.png")
    data = (tmp_path / "image.png").read_bytes()
    (tmp_path / "image.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="`image` must be an image file"):
        read_image(tmp_path / "image.png", (32, 32, 3))


def test_no_run(tmp_path):
    with pytest.raises(UserError, match=rf"`run` must be the directory of a run .*, got {tmp_path}"):
        load_trained(tmp_path)


def test_a_run_without_a_finished_epoch(run, tmp_path):
    shutil.copy(run[0] / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"`run` must have finished an epoch"):
        load_trained(tmp_path)


def test_the_best_checkpoint_is_restored_without_touching_the_run(run):
    (run[0] / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir()  # Of a training that still goes on, perhaps.
    before = sorted(run[0].rglob("*"))
    trained = load_trained(run[0])
    assert trained.state.step == 25 * run[1]["best_epoch"]
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(trained.state))
    assert sorted(run[0].rglob("*")) == before
