"""ImageNet: its archives become the set of tfds, and images that grow during a run; on generated archives."""

import io
import os
import signal
import subprocess
import sys
import tarfile
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from programs.research import make_arrays

from cnnjax import SGD, Augment, Config, Interrupted, PhotoAugment, UserError, load_dataset, train_and_evaluate
from cnnjax.cli.main import main
from cnnjax.data.imagenet import ARCHIVES, archive_folder
from cnnjax.dispatch import open_dispatches
from cnnjax.runs.directory import check_run
from cnnjax.runs.records import read_record, read_rows

sys.path.append(str(Path(__file__).parent.parent / "experiments"))
from generate_imagenet import add, write_archives

pytestmark = pytest.mark.usefixtures("quick_compilation")
EXPERIMENTS = Path(__file__).parent.parent / "experiments"
STOCK = files("tensorflow_datasets") / "datasets" / "imagenet2012"
NAMES = (STOCK / "labels.txt").read_text().split()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Returns a tfds directory with small archives: 60 and 20 images of 4 classes."""
    data_dir = tmp_path_factory.mktemp("imagenet")
    write_archives(data_dir, 60, 20, num_classes=4, long_side=(40, 90))
    return data_dir


# --- The archives -----------------------------------------------------------------------------------------------------


def encoded(mode, kind="JPEG"):
    """Returns an image file, red or gray."""
    file = io.BytesIO()
    Image.new("RGB", (30, 20), (200, 40, 40)).convert(mode).save(file, kind)
    return file.getvalue()


def write_tars(data_dir, train, validation):
    """Writes archives: files of the classes of ImageNet by name, and validation files."""
    folder = archive_folder(data_dir)
    folder.mkdir(parents=True)
    with tarfile.open(folder / ARCHIVES["train"], "w") as tar:
        for name, members in train.items():
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as of_class:
                for member, data in members.items():
                    add(of_class, member, data)
            add(tar, f"{name}.tar", inner.getvalue())
    with tarfile.open(folder / ARCHIVES["validation"], "w") as tar:
        for member, data in validation.items():
            add(tar, member, data)


def test_archives_become_the_set_of_tfds(tmp_path):
    """JPEG files keep their bytes, others become RGB; labels are those of tfds."""
    import tensorflow_datasets as tfds

    kinds = {"rgb": encoded("RGB"), "gray": encoded("L"), "cmyk": encoded("CMYK"), "png": encoded("RGB", "PNG")}
    train = {f"{NAMES[7]}_{kind}.JPEG": data for kind, data in kinds.items()}
    validation = {f"ILSVRC2012_val_{n:08d}.JPEG": encoded("RGB") for n in (3, 50000)}
    write_tars(tmp_path, {NAMES[7]: train, NAMES[999]: {f"{NAMES[999]}_1.JPEG": encoded("RGB")}}, validation)
    dataset = load_dataset("imagenet2012", tmp_path, lambda line: None, image_size=16, test_split="validation")
    assert dataset.class_names == tuple(NAMES) and dataset.image_shape == (16, 16, 3)
    assert np.bincount(dataset.load("train").label).nonzero()[0].tolist() == [7, 999]
    builder = tfds.builder_from_directory(tmp_path / "imagenet2012" / dataset.version)
    decoders = {"image": tfds.decode.SkipDecoding()}
    rows = {row["file_name"].decode(): row for row in builder.as_data_source("train", decoders=decoders)}
    for kind, data in kinds.items():
        row = rows[f"{NAMES[7]}_{kind}.JPEG"]
        assert row["label"] == 7
        assert (row["image"] == data) == (kind in ("rgb", "gray"))
        with Image.open(io.BytesIO(row["image"])) as image:
            assert (image.format, image.mode) == ("JPEG", "L" if kind == "gray" else "RGB")
    means = dataset.load("train").image.astype(float).mean((1, 2))
    red = np.abs(means - [[200, 40, 40]]).max(1) < 12
    gray = np.abs(means - 88).max(1) < 4  # 0.299 * 200 + 0.701 * 40
    assert (red.sum(), gray.sum()) == (4, 1)
    known = (STOCK / "validation_labels.txt").read_text().split()
    labels = {row["file_name"].decode(): NAMES[row["label"]] for row in builder.as_data_source("validation")}
    assert labels == {"ILSVRC2012_val_00000003.JPEG": known[2], "ILSVRC2012_val_00050000.JPEG": known[49999]}


def test_a_set_that_is_prepared_for_streaming_is_not_decoded_into_memory(tmp_path, monkeypatch):
    train = {name: {f"{name}_{i}.JPEG": encoded("RGB") for i in range(2)} for name in NAMES[:2]}
    write_tars(tmp_path, train, {"ILSVRC2012_val_00000001.JPEG": encoded("RGB")})
    monkeypatch.setattr("cnnjax.data.prepared._decode_all", lambda *arguments: pytest.fail("decoded"))
    options = {"image_size": 16, "test_split": "validation", "stream": True}
    assert load_dataset("imagenet2012", tmp_path, lambda line: None, **options).open("train").image.shape[0] == 4


def test_data_prepares_and_describes_the_set(tmp_path, capsys):
    train = {name: {f"{name}_{i}.JPEG": encoded("RGB") for i in range(2)} for name in NAMES[:2]}
    write_tars(tmp_path, train, {"ILSVRC2012_val_00000001.JPEG": encoded("RGB")})
    for _ in range(2):
        main(["data", "imagenet2012", "--data-dir", str(tmp_path)])
        out = capsys.readouterr().out
        assert "  train: 4 images of any size\n  validation: 1 images of any size\n" in out
        assert "  1000 classes: n01440764, " in out


def test_missing_archives_are_asked_for(tmp_path):
    with pytest.raises(UserError, match=r"put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into .*manual, and"):
        load_dataset("imagenet2012", tmp_path, lambda line: None, image_size=16)


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        ({"n00": {"a.JPEG": encoded("RGB")}}, {}, "img_train.tar must be the official .*, got the class 'n00'. Fetch"),
        ({NAMES[0]: {"a.JPEG": b""}}, {}, "img_train.tar must be .*, got the file 'a.JPEG', which is no image"),
        ({NAMES[0]: {}}, {}, "img_train.tar must be .*, got no images"),
        (
            {NAMES[0]: {"a.JPEG": encoded("RGB")}},
            {"val.JPEG": encoded("RGB")},
            "img_val.tar must be .*, got the file 'val.JPEG'",
        ),
    ],
    ids=["class", "image", "empty", "name"],
)
def test_other_archives(train, validation, message, tmp_path):
    write_tars(tmp_path, train, validation)
    with pytest.raises(UserError, match=message):
        load_dataset("imagenet2012", tmp_path, lambda line: None, image_size=16, test_split="validation")
    assert not (tmp_path / "imagenet2012").exists()


# --- Growing images ---------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Any image size; logits for each of the classes."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, image, *, train):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3, 3), strides=2)(image)))
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


CONFIG = Config(
    dataset="imagenet2012",
    test_split="validation",
    validation_fraction=0.2,
    image_size=32,
    num_epochs=3,
    batch_size=16,
    model=Net(),
    optim=SGD(learning_rate=0.1, schedule="cosine", ema=0.9),
    augment=PhotoAugment(flip="random", train_sizes=(16, 24), cutout=4),
)


class Shapes:
    """Records the shapes that the network is trained on and scored with, when they are traced."""

    def __init__(self, monkeypatch):
        self.train, self.evaluation, call = [], [], Net.__call__

        def record(module, image, *, train):
            shapes = self.train if train else self.evaluation
            if not module.is_initializing() and image.shape not in shapes:
                shapes.append(image.shape)
            return call(module, image, train=train)

        monkeypatch.setattr(Net, "__call__", record)


def test_a_run_with_growing_images_is_resumed_to_the_bit(data_dir, tmp_path):
    """It stops in the epoch in which the images grow, and is scored with images of the stored size."""
    whole = train_and_evaluate(CONFIG, run_dir=tmp_path / "whole", data_dir=data_dir)
    assert whole.config.augment.num_classes == 1000

    def interrupt(step, metrics):
        if step == 4:  # Of 3 per epoch.
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="the checkpoint of step 4 is saved"):
        train_and_evaluate(CONFIG, run_dir=tmp_path / "run", data_dir=data_dir, on_step=interrupt)
    resumed = train_and_evaluate(CONFIG, run_dir=tmp_path / "run", data_dir=data_dir, resume=True)
    assert resumed.result["sha256"] == whole.result["sha256"]
    assert resumed.result["test_loss"] == whole.result["test_loss"]
    with pytest.raises(UserError, match="`num_epochs` is 3 there and 4 here"):  # An image size depends on it.
        check_run(tmp_path / "run", replace(resumed.config, num_epochs=4), resume=True)


@dataclass(frozen=True)
class Enlarge(Augment):
    """A user's augmentation: repeats each pixel, in later epochs more often."""

    factor: int = 1

    def output_size(self, image_size):
        return image_size[0] * self.factor, image_size[1] * self.factor

    def transform_pixels(self, key, image):
        return jnp.repeat(jnp.repeat(image, self.factor, 1), self.factor, 2)

    def at_epoch(self, epoch, num_epochs):
        return replace(self, factor=1 + (epoch > 0))


OWN = replace(CONFIG, dataset=make_arrays, image_size=None, test_split=None, augment=Enlarge(cutout=7), optim=SGD())


def test_a_users_augmentation_may_change_the_size_too(tmp_path, monkeypatch):
    """The cutout, 7 pixels, fits into no stored image, of 6×5 pixels: it is refused for the first epoch."""
    with pytest.raises(UserError, match=r"`augment.cutout` must be at most 5 for images of 6×5 pixels, got 7"):
        train_and_evaluate(OWN, run_dir=tmp_path / "run")
    shapes = Shapes(monkeypatch)
    config = replace(OWN, augment=Enlarge(cutout=3))
    run = train_and_evaluate(config, run_dir=tmp_path / "run")
    assert run.finished_result()["num_epochs"] == 3
    assert {shape[1:] for shape in shapes.train} == {(6, 5, 3), (12, 10, 3)}
    assert {shape[1:] for shape in shapes.evaluation} == {(6, 5, 3)}
    with pytest.raises(UserError, match="`num_epochs` is 3 there and 4 here"):  # `at_epoch` may depend on it.
        check_run(run.run_dir, replace(config, num_epochs=4), resume=True)


def test_cutout_is_drawn_for_the_size_of_the_epoch(monkeypatch, tmp_path):
    """In the last epoch for 12×10 pixels, in the first for 6×5."""
    setups = []

    def record(setup, step):
        setups.append(setup)
        return open_dispatches(setup, step)

    monkeypatch.setattr("cnnjax.loop.open_dispatches", record)
    train_and_evaluate(replace(OWN, augment=Enlarge(cutout=3), num_epochs=1), run_dir=tmp_path / "run")
    setup = setups[0]._replace(program=setups[0].program._replace(num_epochs=2))
    with open_dispatches(setup, 0) as dispatches:
        cutouts = np.concatenate([dispatch.plan.cutout for dispatch in dispatches])  # [S B 2]
    np.testing.assert_array_equal(cutouts.reshape(2, -1, 2).max(1), [(3, 2), (9, 7)])


@dataclass(frozen=True)
class WrongSize(Augment):
    def transform_pixels(self, key, image):
        return image[:, :4]


def test_a_size_that_is_not_stated_is_refused(tmp_path):
    message = r"`augment.transform_pixels` must return images of shape \(16, 6, 5, 3\), got uint8\[16, 4, 5, 3\]"
    with pytest.raises(UserError, match=message):
        train_and_evaluate(replace(OWN, augment=WrongSize()), run_dir=tmp_path / "run")


# --- At scale ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--stream",)], ids=["in memory", "streamed"])
def test_the_experiment_learns_from_thousands_of_files_of_a_thousand_classes(options, tmp_path):
    """The command of the experiment, with small sizes, in three epochs of 2,000 images."""
    write_archives(tmp_path, 2000, 500)
    small = ["--num-epochs", "3", "--batch-size", "50", "--image-size", "64", "--augment.train-sizes", "32", "48"]
    small += ["--optim.learning-rate", "0.05", "--optim.ema", "0.98"]
    command = [sys.executable, "-m", "cnnjax", "train", str(EXPERIMENTS / "imagenet_resnet50.py"), *small, *options]
    command += ["--data-dir", str(tmp_path), "--run-dir", str(tmp_path / "run")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run(command, check=True, env=environment, timeout=3000)
    rows = read_rows(tmp_path / "run")
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[0]["train_loss"] > 6 and rows[-1]["train_loss"] < rows[0]["train_loss"] - 0.3
    assert read_record(tmp_path / "run").data.image_shape == (64, 64, 3)
