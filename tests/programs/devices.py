"""Trains on meshes of up to eight simulated devices, and prints as JSON what each of them did.

Usage: devices.py dense|convolutions DATA_DIR FOLDER
"""

import hashlib
import json
import os
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

# Before jax starts.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # Compiles in half the time.
sys.path.append(str(Path(__file__).parents[2] / "experiments" / "benchmarks"))

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import optax
from research import Noise

from cnnjax import CNN, MLP, Config, Optimizer, apply_gradients, mean_loss, train_and_evaluate, train_step
from cnnjax.data.batches import make_batch
from cnnjax.dispatch import open_dispatches
from cnnjax.files import tree_sha256
from cnnjax.inputs import load_inputs
from cnnjax.layers.modules import Dropout
from cnnjax.prepare import set_up
from cnnjax.program import init_train_state, train_steps
from cnnjax.sharding import place

MESHES = ("data=1", "data=2", "data=8", "model=8", "data=4,model=2")


class Momentum(Optimizer):
    """SGD with momentum. Adam divides by gradients that are nearly zero, and with them by rounding."""

    def transform(self, learning_rate):
        return optax.sgd(learning_rate, 0.9)


CONFIG = Config(
    dataset="generated",
    num_epochs=1,
    batch_size=16,
    model=MLP(dense_dropout=0.2),
    optim=Momentum(learning_rate=0.05),
    augment=Noise(flip="random", translate=2, cutout=4),
)
make = jax.jit(make_batch, static_argnums=2)
steps: Any = train_steps


def digest(arrays):
    return hashlib.sha256(b"".join(np.asarray(array).tobytes() for array in arrays)).hexdigest()


def name_of(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


def arguments(setup, dispatch):
    return dispatch.pixels, dispatch.plan, setup.train_key, dispatch.augment_key


def collectives(setup, state):
    """Returns the communication of the program that trains: kind, and dtype and shape of the results."""
    with open_dispatches(setup, 0) as dispatches:
        dispatch = next(dispatches)
    lowered = steps.lower(state, *arguments(setup, dispatch), program=setup.program)
    return [(c.kind, c.results) for c in hlo.collectives(lowered.compile().as_text())]


def open_on(mesh, config, data_dir):
    return set_up(config, load_inputs(config, data_dir), None, mesh=mesh, title="", say=print)


def held(state):
    """Returns the shape of each array of parameters and optimizer state, and the shapes that the devices hold."""
    leaves = jax.tree_util.tree_leaves_with_path((state.params, state.opt_state))
    return [(name_of(path), x.shape, sorted({part.data.shape for part in x.addressable_shards})) for path, x in leaves]


def without_placement(state, batch, key, *, placement, **options):
    """A step of the user, who does not know of devices."""
    return train_step(state, batch, key, **options)


def by_example(state, batch, key, *, tx, **options):
    """Averages the gradients of the examples."""

    def of_example(example):
        return jax.grad(mean_loss, has_aux=True)(state.params, state, example, key, **options)

    grads, (metrics, _) = jax.vmap(of_example)(jax.tree.map(lambda x: x[:, None], batch))
    weight = batch.mask / batch.mask.sum()
    grads = jax.tree.map(lambda g: jnp.einsum("b,b...->...", weight, g), grads)
    metrics = jax.tree.map(lambda x: x.sum(0), metrics)
    return apply_gradients(state, grads, metrics, state.model_state, tx=tx)


def train(mesh, data_dir, config=CONFIG):
    """Trains an epoch; returns a summary, and the parameters before and after it, each as one vector."""
    setup, state = open_on(mesh, config, data_dir)
    compiled, batches, loss, before = steps._cache_size(), [], 0.0, vector(state)
    communication = collectives(setup, state)
    with open_dispatches(setup, 0) as dispatches:
        for dispatch in islice(dispatches, setup.steps_per_epoch):
            batches.append(make(setup.train, dispatch.plan.row(0), CONFIG.augment, dispatch.augment_key))
            state, metrics = steps(state, *arguments(setup, dispatch), program=setup.program)
            loss += float(metrics.loss[0])
    x = jax.device_put(jnp.ones((16, 8, 8, 4)), setup.placement.batch_sharding)
    dropped = jax.jit(lambda x: Dropout(0.25).apply({}, x, train=True, rngs={"dropout": jax.random.key(7)}))(x)
    summary = {
        "batches": digest(leaf for batch in batches for leaf in batch),
        "count": len(batches),
        "dropout": digest([dropped]),
        "examples per device": [shard.data.shape[0] for shard in batches[0].image.addressable_shards],
        "state": held(state),
        "programs": steps._cache_size() - compiled,
        "collectives": communication,
        "loss": loss,
        "params": tree_sha256(state.params),
        "initial": digest([before]),
        "initial bytes": initial_bytes(setup),
    }
    return summary, before, vector(state)


def initial_bytes(setup):
    """Returns the bytes of the results and of the temporary memory of the program that makes the initial state."""
    key, image = jax.device_put(
        (jax.random.key(0), jnp.zeros((1, *setup.facts.image_shape))), setup.placement.replicated
    )
    used = init_train_state.lower(key, image, program=setup.program).compile().memory_analysis()
    return used.output_size_in_bytes + used.temp_size_in_bytes


def vector(state):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.params)]).astype(np.float64)


def communicate(mesh, kernels, data_dir):
    """Returns the same about a convolutional network, which is not trained."""
    os.environ["CNNJAX_ONEDNN"] = kernels
    jax.clear_caches()
    setup, state = open_on(mesh, replace(CONFIG, model=CNN()), data_dir)
    return {"state": held(state), "collectives": collectives(setup, state)}


def train_on_all(data_dir, folder):
    # What is compiled to be read is not compiled again to be run.
    jax.config.update("jax_compilation_cache_dir", str(folder / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    found, after = {}, {}
    for mesh in MESHES:
        found[mesh], before, after[mesh] = train(mesh, data_dir)
        found[mesh]["distance"] = np.linalg.norm(after[mesh] - after["data=1"]) / np.linalg.norm(after["data=1"])
        found[mesh]["moved"] = np.linalg.norm(after[mesh] - before) / np.linalg.norm(before)
    plain = replace(CONFIG, model=MLP(dense_dropout=0.0))
    *_, expected = train("data=1", data_dir, plain)
    for step in (without_placement, by_example):
        found[step.__name__], _, own = train("data=4,model=2", data_dir, replace(plain, train_step=step))
        found[step.__name__]["distance"] = np.linalg.norm(own - expected) / np.linalg.norm(expected)
    found["run on 8"] = train_and_evaluate(CONFIG, run_dir=folder / "run", data_dir=data_dir).result
    found["6 examples on 4"] = place(6, jax.devices()[:4]).num_devices
    return found


if __name__ == "__main__":
    data_dir, folder = map(Path, sys.argv[2:])
    if sys.argv[1] == "dense":
        print(json.dumps(train_on_all(data_dir, folder)))
    else:
        cases = [(mesh, kernels) for mesh in ("data=8", "data=4,model=2") for kernels in ("0", "1")]
        print(json.dumps({f"{mesh} {kernels}": communicate(mesh, kernels, data_dir) for mesh, kernels in cases}))
