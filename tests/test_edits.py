"""Edited code is traced again; other shapes, options and addresses are not edits."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cnnjax.edits import notice_edits, tracing_anew

FACTORS = {"number": 1.0, "array": np.ones(3, np.float32)}


def scaled(x):
    return x * FACTORS["number"] + x * FACTORS["array"]


def scale_carry(carry, _):
    return scaled(carry), None


def keep(x):
    return x


class Scaled(nn.Module):
    @nn.compact
    def __call__(self, x):
        return scaled(nn.Dense(3)(x))


jitted, JittedNetwork, checkpoint = jax.jit(scaled), nn.jit(Scaled), jax.checkpoint(scaled)

FUNCTIONS = {  # Each of them calls `scaled`, most by way of a function that JAX traces once.
    "call": scaled,
    "scan": lambda x: lax.scan(scale_carry, x, None, length=2)[0],
    "cond": lambda x: lax.cond(x[0] > 0, scaled, keep, x),
    "while": lambda x: lax.while_loop(lambda x: x[0] < 1, scaled, x),
    "checkpoint": checkpoint,
    "jit": jitted,
    "network": lambda x: JittedNetwork().init_with_output(jax.random.key(0), x),
    "gradient": jax.grad(lambda x: scaled(x).sum()),
}


@pytest.fixture
def cleared(monkeypatch):
    """A list that grows instead of clearing JAX's caches."""
    found = []
    monkeypatch.setattr(jax, "clear_caches", lambda: found.append(True))
    with tracing_anew():  # The first one of the process.
        pass
    return found


def trace(function):
    with tracing_anew():
        return notice_edits(function, jnp.ones(3))


@pytest.mark.parametrize("edited", FACTORS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_edit_is_noticed(name, edited, cleared, monkeypatch):
    function = FUNCTIONS[name]
    assert trace(function) == jax.eval_shape(function, jnp.ones(3))
    cleared.clear()  # The last test may have ended with other factors.
    trace(function)
    assert not cleared
    monkeypatch.setitem(FACTORS, edited, FACTORS[edited] * 1.0001)
    trace(function)
    trace(function)
    assert cleared == [True]


def logged(x, *, factor):
    jax.debug.callback(lambda x: None, 1)  # The trace contains its address.
    return sum(leaf @ leaf * factor for leaf in jax.tree.leaves(x))


INPUTS = [np.ones(3), np.ones(4), {"a": np.ones(3)}, {"b": np.ones(3)}, {"a": np.ones(3), "b": np.ones(3)}]


@pytest.mark.parametrize(("option", "value"), [("jax_default_matmul_precision", "float32"), ("jax_enable_x64", True)])
def test_other_arguments_and_options_are_no_edits(option, value, cleared):
    before = getattr(jax.config, option)
    for setting in (before, value, before, value):
        jax.config.update(option, setting)
        try:
            for factor in (1, 2):
                for x in INPUTS:
                    notice_edits(partial(logged, factor=factor), x)
        finally:
            jax.config.update(option, before)
    assert not cleared
