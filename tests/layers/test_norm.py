"""The fused norm and GELU against plain operations and Flax."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from reference import assert_near

from cnnjax.layers.norm import NormGelu, batch_norm_gelu, plain_batch_norm_gelu

SHAPE = (4, 5, 3, 6)
# Relative to the largest value. bfloat16 rounds the result to 8 bits and the gradient twice, before and after the norm.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-7}


def draw(dtype="float32"):
    """Returns features with a different mean and deviation in each channel, a bias, a residual and a gradient."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=SHAPE) * rng.uniform(0.2, 3, 6) + rng.normal(size=6)
    residual, g = rng.normal(size=(2, *SHAPE))
    bias = jnp.asarray(rng.normal(size=6), jnp.float32)
    return jnp.asarray(x, dtype), bias, jnp.asarray(residual, dtype), jnp.asarray(g, dtype)


def plain(x, bias, residual=None):
    mean, var = x.mean((0, 1, 2), keepdims=True), x.var((0, 1, 2), keepdims=True)
    y = (x - mean) / jnp.sqrt(var + 1e-12) + bias[None, None, None]
    return nn.gelu(y if residual is None else y + residual), mean, var


@jax.jit(static_argnums=0)
def forward_and_gradients(f, g, *operands):
    (y, mean, var), pullback = jax.vjp(f, *operands)
    return (y, *pullback((g, jnp.zeros_like(mean), jnp.zeros_like(var)))), mean, var


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
def test_norm_gelu_and_gradients_match_plain_operations(with_residual, dtype):
    x, bias, residual, g = draw(dtype)
    operands = (x, bias, residual) if with_residual else (x, bias)
    got, mean, var = forward_and_gradients(batch_norm_gelu, g, *operands)
    wide = [operand.astype(jnp.float32) for operand in (g, *operands)]
    wanted, _, _ = forward_and_gradients(plain, *wide)
    assert [a.dtype for a in got] == [x.dtype, *(operand.dtype for operand in operands)]
    for a, b in zip(got, wanted, strict=True):
        assert_near(a, b, TOLERANCE[dtype])
    x64 = np.asarray(x, np.float64)
    np.testing.assert_allclose(mean, x64.mean((0, 1, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(var, x64.var((0, 1, 2)), rtol=1e-5)


@pytest.mark.parametrize("f", [batch_norm_gelu, plain_batch_norm_gelu], ids=["fast", "plain"])
def test_no_gradient_flows_through_the_statistics(f):
    x, bias, _, g = draw()

    @jax.jit
    @jax.grad
    def grad(x, weight):
        y, mean, var = f(x, bias)
        return jnp.sum(g * y) + weight * jnp.sum(mean + var)

    np.testing.assert_array_equal(grad(x, 1.0), grad(x, 0.0))


def variables_of(x):
    """Returns variables with drawn statistics, under the names that Flax uses too."""
    rng = np.random.default_rng(1)
    stats = {
        "mean": jnp.asarray(rng.normal(size=6), jnp.float32),
        "var": jnp.asarray(rng.uniform(0.5, 2, 6), jnp.float32),
    }
    return {"params": {"bias": draw()[1]}, "batch_stats": stats}


def flax_norm(train):
    return nn.BatchNorm(use_running_average=not train, momentum=0.6, epsilon=1e-12, use_scale=False)


@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
def test_module_matches_flax_in_training_and_moves_its_statistics_by_two_fifths(with_residual):
    x, _, residual, _ = draw()
    variables, more = variables_of(x), (residual,) if with_residual else ()
    got, moved = NormGelu().apply(variables, x, *more, train=True, mutable=["batch_stats"])
    wanted, flax_moved = flax_norm(True).apply(variables, x, mutable=["batch_stats"])
    assert_near(got, nn.gelu(sum(more, wanted)), 1e-5)
    x64, before = np.asarray(x, np.float64), variables["batch_stats"]
    for name, of_batch in (("mean", x64.mean((0, 1, 2))), ("var", x64.var((0, 1, 2)))):
        new = moved["batch_stats"][name]
        np.testing.assert_allclose(new, flax_moved["batch_stats"][name], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(new, 0.6 * np.asarray(before[name]) + 0.4 * of_batch, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
def test_module_uses_and_keeps_its_running_statistics_in_evaluation(with_residual):
    x, _, residual, _ = draw()
    variables, more = variables_of(x), (residual,) if with_residual else ()
    got, kept = NormGelu().apply(variables, x, *more, train=False, mutable=["batch_stats"])
    assert_near(got, nn.gelu(sum(more, flax_norm(False).apply(variables, x))), 1e-5)
    jax.tree.map(np.testing.assert_array_equal, kept["batch_stats"], variables["batch_stats"])


@pytest.mark.parametrize("train", [False, True])
def test_module_has_the_initial_variables_of_flax(train):
    x, key = draw()[0], jax.random.key(0)
    got, wanted = NormGelu().init(key, x, train=train), flax_norm(train).init(key, x)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_float64_parameters_with_float32_features():
    """JAX_ENABLE_X64 makes the parameters float64; the features keep their dtype."""
    with jax.enable_x64(True):
        x, bias = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 3, 4)), jnp.float32), jnp.ones(4)
        grads = jax.jit(jax.grad(lambda x, bias: batch_norm_gelu(x, bias)[0].sum(), (0, 1)))(x, bias)
        assert [grad.dtype for grad in grads] == [jnp.float32, jnp.float64]
        state = jax.eval_shape(partial(NormGelu().init, train=True), jax.random.key(0), x)
        assert state["batch_stats"]["mean"].dtype == jnp.float32
