"""The experiment files: each one trains, and states what was measured."""

import importlib
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import MLP, Config, init_from_data, train_and_evaluate
from cnnjax.cli.experiment import load_experiment
from cnnjax.data.batches import Pixels, pixel_statistics, standardize
from cnnjax.data.order import epoch_plan
from cnnjax.program import Program, init_train_state, train_steps

pytestmark = pytest.mark.usefixtures("quick_compilation")
HERE = Path(__file__).parent.parent / "experiments"
FILES = [path for path in sorted(HERE.glob("*.py")) if "\nCONFIG = " in path.read_text()]
SHAPES = {"mnist": (28, 28, 1), "fashion_mnist": (28, 28, 1), "cifar10": (32, 32, 3)}
SHAPES |= {"data/cifar10_1000": (32, 32, 3), "data/fashion_mnist_uneven": (28, 28, 1), "imagenet2012": (64, 64, 3)}
SLOW = ("finetune", "imagenet_resnet50")  # 30 s to compile.
BATCH_SIZE = 4  # Smaller than the experiments': neither shapes of images nor parameters depend on it.


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] * (path.stem in SLOW)) for path in FILES],
    ids=lambda path: path.stem,
)
def test_every_experiment_runs_two_steps(path):
    """Network, optimizer, augmentation and loss fit together, and each parameter moves."""
    config = load_experiment(str(path)).config.with_num_classes(10)
    assert config.name == path.stem
    rng, shape = np.random.default_rng(0), SHAPES[config.dataset]
    image = rng.integers(0, 256, (2 * BATCH_SIZE, *shape), np.uint8)
    pixels = Pixels(image, np.arange(2 * BATCH_SIZE, dtype=np.int32) % 10, pixel_statistics(image))
    config.augment.check_size(shape[:2])
    plan = epoch_plan(0, 0, 2 * BATCH_SIZE, batch_size=BATCH_SIZE, augment=config.augment, image_size=shape[:2])
    model = config.model.clone(zero_init=False) if hasattr(config.model, "zero_init") else config.model
    optim = replace(config.optim, freeze_epochs=0).for_network(model)  # Every layer moves.
    program = Program(model, optim, config.augment, config.loss, 100, 10, config.train_step)
    key = jax.random.key(0)
    state = init_train_state(key, jnp.zeros((1, *shape)), program=program)
    if hasattr(model, "init_from_data"):
        images = standardize(image, pixels.standardization)
        state = init_from_data(state, images, model=model, tx=program.make_tx())
    before = jax.device_get(state.params)
    for i in range(2):
        state, metrics = train_steps(state, pixels, plan.row(slice(i, i + 1)), key, key, program=program)
        assert np.isfinite(metrics.loss)
        assert metrics.num_examples == BATCH_SIZE
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), jax.device_get(state.params), before)
    still = [jax.tree_util.keystr(path) for path, m in jax.tree_util.tree_leaves_with_path(moved) if m == 0]
    assert still == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_experiment_states_what_was_measured(path):
    docstring = path.read_text().split('"""')[1]
    assert "make train " in docstring
    (benchmarks,) = (path.read_text() for path in HERE.rglob("BENCHMARKS.md"))
    if re.search(rf"^Not measured: .*`{path.stem}`", benchmarks, re.MULTILINE):
        assert "Not measured on a GPU yet" in docstring
        return
    for figure in (r"\d\d\.\d\d%( ± \d\.\d\d)? \(", r"\d seeds?", r"\d+ (minutes|seconds)", r"cores"):
        assert re.search(figure, docstring), figure


def test_an_attack_moves_pixels_within_its_radius(tmp_path, monkeypatch):
    """The classes are dark and bright images, 40 levels apart."""
    monkeypatch.syspath_prepend(HERE)
    attack = importlib.import_module("attack").attack
    label = np.arange(240) % 2
    image = np.broadcast_to(np.uint8(100 + 40 * label)[:, None, None, None], (240, 4, 4, 1))
    config = Config(dataset=(image[:160], label[:160], image[160:], label[160:]), num_epochs=8, model=MLP())
    run = train_and_evaluate(config, run_dir=tmp_path / "run")
    assert run.test_accuracy == 1.0
    assert attack(run, 0.0, 2) == attack(run, 5.0, 4) == (1.0, 1.0)
    before, after = attack(run, 39.0, 4)
    assert before == 1.0 and after < 0.6
