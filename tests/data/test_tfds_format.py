import hashlib
import tempfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from generated import make_raw

from cnnjax.data.named import NAMED_SETS
from cnnjax.data.sources import RawSplit
from cnnjax.data.tfds_format import write_tfds

CLASS_NAMES = {
    "fashion_mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}


@pytest.fixture(
    scope="module", params=[("fashion_mnist", (28, 28, 1)), ("cifar10", (32, 32, 3))], ids=lambda param: param[0]
)
def written(request, tmp_path_factory, raw_fashion_mnist):
    """A generated set written under the name of a known one: the name, the raw set, and the tfds directory."""
    name, shape = request.param
    raw = raw_fashion_mnist if shape[-1] == 1 else make_raw(shape, 60, 30, label_names={"label": CLASS_NAMES[name]})
    data_dir = tmp_path_factory.mktemp("written")
    folder = write_tfds(NAMED_SETS[name], raw, data_dir, say=lambda line: None)
    assert folder == data_dir / name / NAMED_SETS[name].version
    return name, raw, data_dir


@pytest.mark.parametrize("split", ["train", "test"])
def test_stock_tfds_reads_every_example_in_its_own_order(written, split):
    name, raw, data_dir = written
    image, labels = raw.splits[split]
    rows = list(tfds.data_source(name, split=split, data_dir=data_dir))
    # tfds orders records by the 128-bit MD5 of the split's name and the key.
    order = sorted(range(len(image)), key=lambda key: hashlib.md5(f"{split}{key}".encode()).digest())
    np.testing.assert_array_equal([row["image"] for row in rows], image[order])
    np.testing.assert_array_equal([row["label"] for row in rows], labels["label"][order])
    if name == "cifar10":
        assert [row["id"] for row in rows] == [f"{split}_{key:05d}".encode() for key in order]


def test_metadata_equals_the_stock_metadata(written):
    name, _, data_dir = written
    info, stock = tfds.builder(name, data_dir=data_dir).info, tfds.builder_cls(name)
    assert info.version == NAMED_SETS[name].version == str(stock.VERSION)
    assert info.supervised_keys == ("image", "label")
    assert tuple(info.features["label"].names) == CLASS_NAMES[name]


def test_cifar100_keeps_both_labels_and_their_names(tmp_path):
    names = {"coarse_label": tuple(f"coarse_{i}" for i in range(20)), "label": tuple(f"fine_{i}" for i in range(100))}
    raw = make_raw((32, 32, 3), 100, 100, num_classes=100, label_names=names)
    splits = {
        split: RawSplit(image, {"coarse_label": labels["label"] // 5, "label": labels["label"]})
        for split, (image, labels) in raw.splits.items()
    }
    write_tfds(NAMED_SETS["cifar100"], raw._replace(splits=splits), tmp_path, say=lambda line: None)
    source = tfds.data_source("cifar100", split="test", data_dir=tmp_path)
    fine = {image.tobytes(): i for i, image in enumerate(splits["test"].image)}
    assert sorted(row["label"] for row in source) == list(range(100))
    for row in source:
        i = fine[row["image"].tobytes()]
        assert (row["id"], row["label"], row["coarse_label"]) == (b"test_%05d" % i, i, i // 5)
    features = tfds.builder("cifar100", data_dir=tmp_path).info.features
    assert (features["coarse_label"].names, features["label"].names) == tuple(map(list, names.values()))


def test_no_temporary_folder_is_left(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    write_tfds(NAMED_SETS["fashion_mnist"], make_raw((28, 28, 1), 10, 10), tmp_path, say=lambda line: None)
    assert [*(tmp_path / "temporary").iterdir()] == []
