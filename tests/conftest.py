"""Fixtures: a small generated set, prepared in tfds's own format, that a network can learn."""

import os

import jax
import numpy as np
import pytest

from cnnjax.data.named import NAMED_SETS
from cnnjax.data.sources import RawSet, RawSplit
from cnnjax.data.tfds_writer import write_tfds

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory):
    """The tests leave nothing in the person's own cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


def make_raw(shape, num_train, num_test, num_classes=10, label_names=None):
    """Noisy copies of one random pattern a class: real uint8 images, real class balance, learnable in seconds."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 128, (num_classes, *shape))  # Dark, as MNIST is.

    def split(count):
        label = np.arange(count) % num_classes
        image = np.clip(patterns[label] + rng.normal(0, 40, (count, *shape)), 0, 255).astype(np.uint8)
        return RawSplit(image, {"label": label.astype(np.uint8)})

    return RawSet({"train": split(num_train), "test": split(num_test)}, label_names or {})


@pytest.fixture(scope="session")
def raw_fashion_mnist():
    return make_raw((28, 28, 1), num_train=430, num_test=170)


@pytest.fixture(scope="session")
def prepared_dir(tmp_path_factory, raw_fashion_mnist):
    """A tfds directory that holds a generated set under the name "generated"."""
    data_dir = tmp_path_factory.mktemp("tfds")
    write_tfds(NAMED_SETS["fashion_mnist"], raw_fashion_mnist, data_dir, say=lambda line: None)
    (data_dir / "fashion_mnist").rename(data_dir / "generated")
    return data_dir
