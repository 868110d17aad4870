"""Fixtures: a small generated data set that a network can learn, in the format of tfds; quick compilation."""

import os

import jax
import jaxtyping
import numpy as np
import pytest

from cnnjax.data.named import NAMED_SETS
from cnnjax.data.sources import RawSet, RawSplit
from cnnjax.data.tfds_format import write_tfds

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory):
    """Keeps the tests out of the user's own cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


def make_raw(shape, num_train, num_test, num_classes=10, label_names=None):
    """Returns noisy copies of one random pattern per class: uint8 images that a network learns in seconds."""
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
    """Returns a tfds directory that contains a generated set with the name "generated"."""
    data_dir = tmp_path_factory.mktemp("tfds")
    write_tfds(NAMED_SETS["fashion_mnist"], raw_fashion_mnist, data_dir, say=lambda line: None)
    (data_dir / "fashion_mnist").rename(data_dir / "generated")
    return data_dir


@pytest.fixture
def quick_compilation():
    """Compiles in half the time, for tests that compare values up to rounding."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def no_type_checks():
    """Disables the type checks of the tests, which users do not have."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
