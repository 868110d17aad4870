"""Trains with one global batch on 1, 2, 4 and 8 simulated devices, and prints as JSON what each of them did.

Usage: devices.py DATA_DIR FOLDER
"""

import hashlib
import json
import os
import sys
from itertools import islice
from pathlib import Path
from typing import Any

# Before jax starts.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # Compiles in half the time.

import jax
import jax.numpy as jnp
import numpy as np
from research import Noise

from cnnjax import MLP, Adam, Config, load_dataset, train_and_evaluate
from cnnjax.data.batches import make_batch
from cnnjax.layers.modules import Dropout
from cnnjax.prepare import set_up
from cnnjax.program import train_steps
from cnnjax.runs.files import tree_sha256
from cnnjax.sharding import place
from cnnjax.train import plan_dispatches

CONFIG = Config(
    dataset="generated",
    num_epochs=1,
    batch_size=16,
    model=MLP(dense_dropout=0.2),
    optim=Adam(learning_rate=1e-3),
    augment=Noise(flip="random", translate=2, cutout=4),
)
make = jax.jit(make_batch, static_argnums=2)
steps: Any = train_steps


def digest(arrays):
    return hashlib.sha256(b"".join(np.asarray(array).tobytes() for array in arrays)).hexdigest()


def train(devices, data_dir):
    """Trains an epoch; returns a summary, and the state."""
    setup, state = set_up(CONFIG, load_dataset("generated", data_dir), devices, title="", say=print)
    compiled, batches, loss = steps._cache_size(), [], 0.0
    for plan, key in islice(plan_dispatches(setup, 0), setup.steps_per_epoch):
        batches.append(make(setup.train, plan.row(0), CONFIG.augment, key))
        state, metrics = steps(state, setup.train, plan, setup.train_key, key, program=setup.program, frozen=())
        loss += float(metrics.loss[0])
    x = jax.device_put(jnp.ones((16, 8, 8, 4)), setup.placement.batch_sharding)
    dropped = jax.jit(lambda x: Dropout(0.25).apply({}, x, train=True, rngs={"dropout": jax.random.key(7)}))(x)
    images = batches[0].image.sharding
    summary = {
        "batches": digest(leaf for batch in batches for leaf in batch),
        "count": len(batches),
        "dropout": digest([dropped]),
        "devices of a batch": len(images.device_set),
        "whole batch on each device": images.is_fully_replicated,
        "whole state on each device": all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state)),
        "programs": steps._cache_size() - compiled,
        "loss": loss,
        "params": tree_sha256(state.params),
    }
    return summary, state


if __name__ == "__main__":
    data_dir, folder = map(Path, sys.argv[1:])
    found, vectors = {}, {}
    for n in (1, 2, 4, 8):
        found[n], state = train(jax.devices()[:n], data_dir)
        vectors[n] = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.params)]).astype(np.float64)
        found[n]["distance"] = np.linalg.norm(vectors[n] - vectors[1]) / np.linalg.norm(vectors[1])
    found["run on 8"] = train_and_evaluate(CONFIG, run_dir=folder, data_dir=data_dir).result
    found["6 examples on 4"] = place(6, jax.devices()[:4]).num_devices
    print(json.dumps(found))
