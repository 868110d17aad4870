"""Fixtures for the tests of the report: three seeds of a tiny network, with class names that need to be escaped."""

from dataclasses import dataclass, replace

import jax
import numpy as np
import pytest
from generated import make_raw
from tiny import NAMES, Tiny

from cnnjax import Adam, Augment, Config, load_run, train_and_evaluate
from cnnjax.data.named import NAMED_SETS
from cnnjax.data.tfds_format import write_tfds


@dataclass(frozen=True)
class Trained:
    """Runs, and the tfds directory of their images.

    Attributes:
      run: seed 0, as `train_and_evaluate` returned it.
      runs: all three seeds, read from the disk.
    """

    run: object
    runs: list
    data_dir: object


def top2(logits, label):
    of_label = np.take_along_axis(logits, label[:, None], axis=1)
    return {"top2": np.mean((logits > of_label).sum(1) < 2), "result": -of_label.std()}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    raw = make_raw((8, 8, 3), num_train=240, num_test=120, label_names={"label": [*NAMES]})
    write_tfds(NAMED_SETS["cifar10"], raw, folder / "tfds", say=lambda line: None)
    (folder / "tfds/cifar10").rename(folder / "tfds/generated")
    config = Config(
        name="tiny",
        dataset="generated",
        model=Tiny(),
        optim=Adam(learning_rate=3e-3),
        num_epochs=3,
        batch_size=20,
        augment=Augment(flip="none"),
        metrics=top2,
        best_by="top2",
    )
    jax.config.update("jax_disable_most_optimizations", True)  # It compiles in half the time.
    options = {"data_dir": folder / "tfds"}
    runs = [train_and_evaluate(replace(config, seed=k), run_dir=folder / f"seeds/seed{k}", **options) for k in range(3)]
    jax.config.update("jax_disable_most_optimizations", False)
    return Trained(runs[0], [load_run(run.run_dir, config) for run in runs], folder / "tfds")
