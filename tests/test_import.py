"""The import: what it leaves unchanged, what it offers, and what editors and type checkers know about it."""

import copy
import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cnnjax
from cnnjax.errors import ArgumentError, StorageError

# `state()` returns what the whole process shares. The libraries that cnnjax uses are imported before.
STATE = """
import atexit, locale, logging, os, random, signal, sys, tempfile, threading, warnings
import flax.linen, flax.nnx, jax, numpy, optax, orbax.checkpoint, requests, rich.console, scipy.stats, tyro
import tensorflow_datasets.public_api

tempfile.TemporaryDirectory().cleanup()  # Registers an exit handler of the standard library.

def state():
    loggers = {name: logging.getLogger(name) for name in [None, *logging.root.manager.loggerDict]}
    return {
        "environment": dict(os.environ),
        "hooks": (sys.excepthook, sys.unraisablehook, threading.excepthook, sys.displayhook),
        "warnings": [*warnings.filters],
        "loggers": {name: (logger.level, [*logger.handlers], logger.disabled) for name, logger in loggers.items()},
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "exit": atexit._ncallbacks(),
        "locale": locale.setlocale(locale.LC_ALL),
        "path": [*sys.path],
        "folder": os.getcwd(),
        "random": (random.getstate(), str(numpy.random.get_state())),
        "jax": dict(jax.config.values),
        "threads": threading.active_count(),
    }

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

def check(before):
    after = state()
    new = after["loggers"].keys() - before["loggers"].keys()  # Those of modules that were imported.
    assert all(after["loggers"].pop(name) == (logging.NOTSET, [], False) for name in new), new
    assert after.pop("threads") <= before["threads"]  # One of an import may have ended.
    for name in after:
        assert before[name] == after[name], (name, before[name], after[name])
"""


def run(script):
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS" and not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", STATE + script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=kept)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_import_changes_nothing_in_the_process():
    run("""
before, small = state(), resident()
from cnnjax import *
check(before)
b"x" * 2**28
assert resident() < small + 128, "freed memory stays with the process"
""")


def test_a_run_changes_nothing_in_the_process(tmp_path):
    """Not even which exceptions of other threads are printed."""
    done = run(
        """
from pathlib import Path
from cnnjax import MLP, Config, Report, train_and_evaluate
import numpy as np

jax.numpy.zeros(3) + 1  # jax starts, with what it registers.
with orbax.checkpoint.CheckpointManager(Path("orbax").absolute()) as manager:
    manager.save(0, args=orbax.checkpoint.args.StandardSave({"x": np.zeros(3)}))
before = state()
image, label = np.zeros((40, 8, 8), np.uint8), np.arange(40) % 10
config = Config(dataset=(image, label, image, label), model=MLP(), num_epochs=1, batch_size=20, validation_fraction=0)

def fail():
    raise ValueError("in another thread")

def on_epoch(row, state):
    threading.Thread(target=fail).start()

train_and_evaluate(config, run_dir="run", report=Report(quiet=True), on_epoch=on_epoch)
check(before)
assert "altair" not in sys.modules, "training waits for the charts"
""".replace('"orbax"', repr(str(tmp_path / "orbax"))).replace('"run"', repr(str(tmp_path / "run")))
    )
    assert done.stderr.count("ValueError: in another thread") == 1


def test_public_names_are_listed_and_jax_is_imported_with_the_first_that_needs_it():
    script = """
import sys, cnnjax
names = dir(cnnjax)
assert "jax" not in sys.modules
exec("from cnnjax import *")
assert set(cnnjax.__all__) <= {*names} & {*globals()}
"""
    subprocess.run([sys.executable, "-c", script], check=True)


# --- Types ----------------------------------------------------------------------------------------------------------

USER = """
import jax, jax.numpy as jnp, optax
from cnnjax import CNN, Batch, Config, eval_step, init_state, train_and_evaluate, train_step

model, tx, key = CNN(), optax.adam(1e-3), jax.random.key(0)
state = init_state(key, jnp.zeros((1, 32, 32, 3)), model=model, tx=tx)
batch = Batch(jnp.zeros((8, 32, 32, 3)), jnp.zeros(8, int), jnp.ones(8, bool))
state, metrics = train_step(state, batch, key, model=model, tx=tx, donate=False)
reveal_type(state)
reveal_type(metrics.loss)
reveal_type(eval_step(state, batch, model=model).values)
init_state(key, batch.image, modle=model, tx=tx)
train_step(state, batch, key, model=model, tx=tx, los_fn=len)
train_and_evaluate(Config(num_epoch=1))
train_and_evaluate(Config(), run_directory="run")
"""


@pytest.mark.skipif(importlib.util.find_spec("pyright") is None, reason="pyright is not installed")
def test_an_editor_knows_types_and_keywords(tmp_path):
    (tmp_path / "user.py").write_text(USER)
    # pyright does not see a package that is installed by `pip install --editable`.
    settings = {"extraPaths": [str(Path(cnnjax.__file__).parents[1])]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "user.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    found = json.loads(done.stdout)["generalDiagnostics"]
    information = [item["message"].split(" is ")[1] for item in found if item["severity"] == "information"]
    assert information == ['"TrainState"', '"Array"', '"dict[str, Array]"']
    wrong = {word for item in found for word in re.findall(r'No parameter named "(\w+)"', item["message"])}
    assert wrong == {"modle", "los_fn", "num_epoch", "run_directory"}
    assert len({item["range"]["start"]["line"] for item in found if item["severity"] == "error"}) == 4


def test_the_package_says_that_it_is_typed():
    assert Path(cnnjax.__file__).with_name("py.typed").read_text() == ""


# --- Copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [lambda x: pickle.loads(pickle.dumps(x)), copy.copy, copy.deepcopy])
def test_errors_keep_their_message_and_type_in_a_copy(duplicate):
    for error in (*(kind("a message") for kind in (cnnjax.UserError, cnnjax.NonFiniteLossError, ArgumentError)),):
        found = duplicate(error)
        assert (type(found), str(found)) == (type(error), "a message")
    found = duplicate(StorageError("full"))
    assert (type(found), str(found)) == (StorageError, "full")
    for step in (None, 7):
        stop = cnnjax.Interrupted(15, step)
        found = duplicate(stop)
        assert (type(found), str(found), found.signum, found.step) == (cnnjax.Interrupted, str(stop), 15, step)


@pytest.mark.parametrize("duplicate", [lambda x: pickle.loads(pickle.dumps(x)), copy.copy, copy.deepcopy])
def test_a_configuration_and_its_parts_equal_their_copies(duplicate):
    parts = [cnnjax.CNN(7), cnnjax.MLP(9), cnnjax.SpeedNet(depth=3), cnnjax.Muon(), cnnjax.SGD(), cnnjax.Adam()]
    parts += [cnnjax.Mixup(), cnnjax.CutMix(), cnnjax.Augment(), cnnjax.PhotoAugment(train_sizes=(32, 48))]
    parts += [cnnjax.CrossEntropy(0.1), cnnjax.softmax_cross_entropy]
    parts += [cnnjax.Config(model=model, seed=3) for model in parts[:3]]
    for part in parts:
        found = duplicate(part)
        assert found == part and hash(found) == hash(part)
    images = np.zeros((40, 8, 8), np.uint8)
    config = duplicate(cnnjax.Config(dataset=(images, np.arange(40), images, np.arange(40)), num_epochs=3))
    assert config.num_epochs == 3 and config.dataset[0].shape == (40, 8, 8)
