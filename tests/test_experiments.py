import importlib
import re
import runpy
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import Batch, init_state, train_step
from cnnjax import evaluate as epoch
from cnnjax.data.batches import Pixels, epoch_plan, pixel_statistics
from cnnjax.layers import conv, norm
from cnnjax.layers import modules as layers
from cnnjax.models import models
from cnnjax.models.models import make_model
from cnnjax.models.whitening import whiten
from cnnjax.optim import optimizer as optim
from cnnjax.optim.optimizer import make_loss, make_tx

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


@contextmanager
def restored():
    """Leaves the package as it was, whatever a variant puts into it."""
    modules = [conv, epoch, layers, models, norm, optim]
    before = [dict(vars(module)) for module in modules]
    try:
        yield
    finally:
        for module, names in zip(modules, before, strict=True):
            for name, value in names.items():
                setattr(module, name, value)
        layers.max_pool_2x2.defvjp(layers._max_pool_fwd, layers._max_pool_bwd)


def program_for_a_gpu(variant):
    """Returns the configuration, and a program of two steps."""
    config = variant.change(runpy.run_path(str(HERE / f"{variant.recipe}.py"))["CONFIG"])
    model = models.make_model(config.model, 10)
    tx = optim.make_tx.__wrapped__(config.optim, 16 * config.num_epochs, config.num_epochs)
    image = np.zeros((8, 32, 32, 3), np.uint8)
    pixels = jax.device_put(Pixels(image, np.zeros(8, np.int32), pixel_statistics(image)))
    plan = epoch_plan(0, 0, 8, batch_size=4, augment=config.augment, image_size=(32, 32))

    def steps(key):
        state = init_state.__wrapped__(key, jnp.zeros((1, 32, 32, 3)), model=model, tx=tx)
        return epoch.train_steps.__wrapped__(state, pixels, plan, key, augment=config.augment, model=model, tx=tx)

    return config, jax.jit(steps).trace(jax.random.key(0)).lower(lowering_platforms=("cuda",)).as_text()


def test_every_variant_of_the_ladder_is_another_program_or_configuration(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    ladder = importlib.import_module("benchmark_gpu_variants")
    base = program_for_a_gpu(ladder.Variant())
    assert program_for_a_gpu(ladder.Variant()) == base
    for name, variant in ladder.VARIANTS.items():
        if variant.flags or variant.one_program or variant.recipe != ladder.MUON:
            continue
        with restored():
            assert (program_for_a_gpu(variant) == base) == (name == "as it is"), name
    assert program_for_a_gpu(ladder.Variant()) == base
