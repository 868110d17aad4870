"""The loops of elementwise.c against NumPy in float64, next to XLA's; tests/layers has small examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_near, draw

from cnnjax.layers import norm
from cnnjax.onednn import elementwise, library

pytestmark = pytest.mark.skipif(library.kernels().version is None, reason=str(library.kernels()))


def gelu_in_float64(x):
    """Returns GELU and its derivative."""
    factor = np.sqrt(2 / np.pi)
    tanh = np.tanh(factor * (x + 0.044715 * x**3))
    return x * (1 + tanh) / 2, (1 + tanh) / 2 + x / 2 * (1 - tanh**2) * factor * (1 + 3 * 0.044715 * x**2)


def norm_in_float64(x, bias, residual, g):
    x, bias, residual, g = (np.asarray(a, np.float64) for a in (x, bias, residual, g))
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    normal = (x - mean) / np.sqrt(var)
    y, slope = gelu_in_float64(normal + bias + residual)
    h = g * slope
    x_grad = (h - h.mean((0, 1, 2)) - normal * (h * normal).mean((0, 1, 2))) / np.sqrt(var)
    return y, mean, var, 1 / np.sqrt(var), x_grad, h.sum((0, 1, 2)), h


# Long sums with an incomplete tile; fewer tiles than parts; more channels than a tile has values.
@pytest.mark.parametrize("shape", [(90, 31, 31, 24), (2, 3, 3, 10), (5, 3, 2, 600)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norm_gelu_and_gradients_match_numpy_as_those_of_XLA_do(shape, dtype):  # noqa: N802
    x, residual, g, bias = draw(shape, shape, shape, shape[-1:], rounded_to=dtype)
    operands = (3 * x + 1).astype(dtype), bias, residual.astype(dtype), g.astype(dtype)
    wanted = norm_in_float64(*operands)

    def run(forward, backward, x, bias, residual, g):
        y, mean, var, scale = forward(x, bias, residual)
        return y, mean, var, scale, *backward(x, g, mean, scale, bias, residual)

    of_xla = 5e-6 if dtype == "float32" else 2**-7  # It adds up rounded values.
    for *fs, tolerance in (norm._fast_forward, norm._fast_backward, 1e-6), (norm._forward, norm._backward, of_xla):
        for a, b in zip(jax.jit(run, static_argnums=(0, 1))(*fs, *operands), wanted, strict=True):
            # bfloat16 rounds a result to 8 bits, and the gradient twice.
            assert_near(a, b, max(tolerance, 2**-7) if a.dtype == jnp.bfloat16 else tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2**-8)])
def test_gelu_and_gradient_match_numpy_far_from_zero_and_keep_nan(dtype, tolerance):
    x = jnp.asarray([[*np.linspace(-12, 12, 1001), 1e4, -1e4]], dtype)
    got = elementwise.gelu(x), elementwise.gelu_grad(x, jnp.ones_like(x))
    for a, b in zip(got, gelu_in_float64(np.asarray(x, np.float64)), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=tolerance, atol=1e-7)
    nan = jnp.full((1, 3), np.nan, dtype)
    assert np.isnan(elementwise.gelu(nan)).all()
    assert np.isnan(elementwise.gelu_grad(nan, jnp.ones_like(nan))).all()
