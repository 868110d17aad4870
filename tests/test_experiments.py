import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import Batch, init_state, train_step
from cnnjax.models import make_model
from cnnjax.optim import make_loss, make_tx
from cnnjax.whitening import whiten

HERE = Path(__file__).parent.parent / "experiments"
FILES = sorted(HERE.glob("*.py"))
BENCHMARKS = (HERE / "BENCHMARKS.md").read_text()
EXPERIMENTS = [path for path in FILES if not path.stem.startswith("benchmark")]
SHAPES = {"mnist": (28, 28, 1), "fashion_mnist": (28, 28, 1), "cifar10": (32, 32, 3)}


@pytest.fixture
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_runs_two_steps(path, quick_compilation):
    module = runpy.run_path(str(path))
    config = module["CONFIG"]
    assert config.experiment == path.stem
    model, tx, loss_fn = make_model(config.model, 10), make_tx(config.optim, 100, 10), make_loss(config.label_smoothing)
    shape, key, batch_size = SHAPES[config.dataset], jax.random.key(0), min(config.batch_size, 16)
    image = np.random.default_rng(0).normal(size=(batch_size, *shape)).astype(np.float32)
    batch = Batch(image, np.arange(batch_size, dtype=np.int32) % 10, np.ones(batch_size, bool))
    state = init_state(key, jnp.zeros((1, *shape)), model=model, tx=tx)
    if config.model.name == "speednet":
        state = whiten(state, image)
    before = jax.tree.map(np.array, state.params)
    for _ in range(2):
        state, metrics = train_step(state, batch, key, model=model, tx=tx, loss_fn=loss_fn)
    assert state.step == 2
    assert np.isfinite(metrics.loss)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, before)
    still = [jax.tree_util.keystr(path) for path, m in jax.tree_util.tree_leaves_with_path(moved) if m == 0]
    assert still == []


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_states_what_was_measured(path):
    docstring = runpy.run_path(str(path))["__doc__"]
    figures = (r"\d\d\.\d\d%( ± \d\.\d\d)? \(", r"\d seeds?", r"\d+ (minutes|seconds)", r"cores")
    unmeasured = re.search(rf"^Not measured: .*`{path.stem}`", BENCHMARKS, re.MULTILINE)
    for part in ("make train ", *(("Not measured on a GPU yet",) if unmeasured else figures)):
        assert re.search(part, docstring), part


@pytest.mark.parametrize(("script", "prefix"), [("benchmark", ""), ("benchmark_gpu", "gpu ")])
def test_every_part_of_a_benchmark_has_its_place_in_the_report(script, prefix):
    parts = re.search(r"^PARTS = {(.*?)}$", (HERE / f"{script}.py").read_text(), re.MULTILINE | re.DOTALL)[1]
    names = re.findall(r'"(\w+)":', parts)
    assert len(names) == {"benchmark": 5, "benchmark_gpu": 7}[script]
    for name in names:
        place = f"<!-- {prefix}{name} -->\n.*?<!-- end of {prefix}{name} -->\n"
        assert len(re.findall(place, BENCHMARKS, re.DOTALL)) == 1
