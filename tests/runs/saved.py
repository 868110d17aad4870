"""Small checkpoints, and damage to them."""

from contextlib import closing

import jax
import jax.numpy as jnp
import optax

from cnnjax import MLP, init_state
from cnnjax.runs.checkpoints import Checkpoints

MODEL, TX = MLP(3), optax.adam(1e-3)


def make_state(model=MODEL, step=0, seed=0):
    state = init_state(jax.random.key(seed), jnp.zeros((1, 8, 8, 1)), model=model, tx=TX)
    return state._replace(step=jnp.int32(step))


def make_abstract_state(model):
    return jax.eval_shape(lambda: make_state(model))


def make_progress(best_step=None, seconds=0.0):
    totals = {"loss": 0.5, "num_examples": 3, "values": {"accuracy": 2}}
    counted = {"totals": totals, "grad_norm": 0.5, "stopped_within": None}
    return {"rows": [], "timing": [], **counted, "seconds": seconds, "best_step": best_step}


def save_epochs(folder, *accuracies):
    """Saves a checkpoint for each of epochs 1, 2, ... with these validation accuracies."""
    with closing(Checkpoints(folder)) as checkpoints:
        for epoch, accuracy in enumerate(accuracies, 1):
            best = max(range(epoch), key=lambda i: (accuracies[i], i)) + 1
            checkpoints.save(make_state(step=epoch), make_progress(best), {"score": accuracy})


def kept_steps(folder):
    return sorted(int(path.name) for path in folder.iterdir())


def largest_file(checkpoint):
    return max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_bit(checkpoint):
    """Flips one bit in the largest file. Orbax would load it silently."""
    path = largest_file(checkpoint)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(checkpoint):
    path = largest_file(checkpoint)
    path.write_bytes(path.read_bytes()[:1000])
