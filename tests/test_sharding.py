"""One global batch on 1, 2, 4 and 8 devices: the same examples, flips and dropout masks; parameters equal to rounding.

The devices are simulated on the CPU, in a process of its own: their number is fixed before jax starts.
"""

import json
import os
import subprocess
import sys

import jax
import pytest

from cnnjax.sharding import place

SCRIPT = """
import hashlib, json, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from cnnjax import AugmentConfig, Config, ModelConfig, OptimConfig, experiment, init_state, train_and_evaluate
from cnnjax.data.batches import make_batch, row
from cnnjax.sharding import place
from cnnjax.layers.modules import Dropout
from cnnjax.runs.checkpoints import Checkpoints

config = Config(dataset="generated", batch_size=16, num_epochs=1, augment=AugmentConfig("random", 2, 4),
                model=ModelConfig(name="mlp", dense_dropout=0.2), optim=OptimConfig(learning_rate=1e-3))
digest = lambda arrays: hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in arrays)).hexdigest()
out, step = {}, experiment.train_steps
for n in (1, 2, 4, 8):
    seen, lives = [], set()
    def record(state, pixels, plan, *args, augment, **kwargs):
        batch = jax.jit(make_batch, static_argnums=2)(pixels, row(plan, 0), augment)
        lives.add((len(batch.image.sharding.device_set), batch.image.sharding.is_fully_replicated,
                   all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))))
        seen.extend(batch)
        return step(state, pixels, plan, *args, augment=augment, **kwargs)
    experiment.train_steps = record
    run_dir = Path(sys.argv[2]) / str(n)
    before = step._cache_size()
    train_and_evaluate(config, run_dir=run_dir, data_dir=Path(sys.argv[1]), devices=jax.devices()[:n])
    placement = place(16, jax.devices()[:n])
    x = jax.device_put(np.ones((16, 8, 8, 4), np.float32), placement.batch)
    mask = jax.jit(lambda x: Dropout(0.25).apply({}, x, train=True, rngs={"dropout": jax.random.key(7)}))(x)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    out[n] = {"batches": digest(seen), "count": len(seen) // 3, "mask": digest([mask]), "lives": sorted(lives),
              "compiled": step._cache_size() - before, "rows": rows}
    model, tx = experiment.make_model(config.model, 10), experiment.make_tx(config.optim, num_steps=25)
    like = init_state(jax.random.key(0), jnp.zeros((1, 28, 28, 1)), model=model, tx=tx)
    checkpoints = Checkpoints(run_dir / "checkpoints", read_only=True)
    state, _ = checkpoints.restore(25, like)
    checkpoints.close()
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.params)]).astype(np.float64)
    first = flat if n == 1 else first
    out[n]["distance"] = float(np.linalg.norm(flat - first) / np.linalg.norm(first))
print(json.dumps({**out, "of 6 examples": place(6, jax.devices()[:4]).num_devices}))
"""
# Relative to the norm of the parameters, after an epoch of 25 steps. Adam, which divides by the gradient's size, lets
# rounding grow with the steps.
BOUND = 1e-5


@pytest.fixture(scope="module")
def on(prepared_dir, tmp_path_factory):
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(prepared_dir), str(tmp_path_factory.mktemp("devices"))],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "XLA_FLAGS": flags},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {int(name) if name.isdecimal() else name: value for name, value in found.items()}


def test_batches_and_dropout_masks_are_the_same_bits(on):
    assert on[1]["count"] == 25
    for key in ("batches", "count", "mask"):
        assert len({on[n][key] for n in (1, 2, 4, 8)}) == 1, key


def test_the_batch_is_shared_and_the_state_is_on_each(on):
    assert [on[n]["lives"] for n in (1, 2, 4, 8)] == [[[n, n == 1, True]] for n in (1, 2, 4, 8)]
    assert {on[n]["compiled"] for n in (1, 2, 4, 8)} == {1}


def test_parameters_agree_to_rounding(on):
    assert all(0 <= on[n]["distance"] <= BOUND for n in (2, 4, 8))
    for n in (2, 4, 8):
        assert on[n]["rows"][0]["train_loss"] == pytest.approx(on[1]["rows"][0]["train_loss"], rel=1e-5)


def test_as_many_devices_as_divide_the_batch(on):
    assert on["of 6 examples"] == 3  # Of 4.
    assert place(16).num_devices == len(jax.devices())
