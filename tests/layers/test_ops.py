import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from reference import TOLERANCE, assert_near, draw, select_kernels, simulate_accelerator

from cnnjax.layers.ops import (
    dense,
    dropout,
    gelu,
    max_pool_2x2,
    max_pool_grad_by_comparison,
    max_pool_grad_by_index,
    max_pool_with_index,
)


def forward_and_gradient(f, g, *operands):
    """Returns the result of `f` and its gradients for the cotangent `g`, from one compiled program."""

    def run(g, *operands):
        y, pullback = jax.vjp(f, *operands)
        return y, *pullback(g)

    return jax.jit(run)(g, *operands)


@pytest.mark.parametrize(
    ("kernels", "dtype"),
    [
        ("onednn", "float32"),
        ("onednn", "bfloat16"),
        ("onednn without bfloat16", "bfloat16"),
        ("xla", "float32"),
        ("xla", "bfloat16"),
    ],
)
def test_dense_and_gradients_match_numpy(kernels, dtype, monkeypatch):
    select_kernels(kernels, monkeypatch)
    x, g = draw((9, 130), (9, 70), dtype=dtype)
    (kernel,) = draw((130, 70), rounded_to=dtype)
    x64, kernel64, g64 = (np.asarray(a, np.float64) for a in (x, kernel, g))
    expected = (x64 @ kernel64, g64 @ kernel64.T, x64.T @ g64)
    for got, wanted in zip(forward_and_gradient(dense, g, x, kernel), expected, strict=True):
        assert_near(got, wanted, TOLERANCE[dtype] if got.dtype == dtype else 1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2**-8), ("float16", 2**-11)])
def test_gelu_and_gradient_match_flax(dtype, tolerance):
    """Flax computes in float32 here; ours rounds each result once to its dtype."""
    x, g = (jnp.asarray(np.linspace(*ends, 101), dtype) for ends in ((-6, 6), (1, 2)))
    got = forward_and_gradient(gelu, g, x)
    wanted = forward_and_gradient(nn.gelu, g.astype(jnp.float32), x.astype(jnp.float32))
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == dtype
        # 1 + tanh, as Flax computes it, is inaccurate near zero.
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=tolerance, atol=1e-6)


def flax_pool(x):
    return nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))


@pytest.mark.parametrize("shape", [(2, 8, 6, 3), (2, 7, 5, 3)])
def test_max_pool_and_gradient_match_flax_without_ties(shape):
    x, g = draw(shape, (shape[0], shape[1] // 2, shape[2] // 2, shape[3]))
    ours, flax = (forward_and_gradient(pool, g, x) for pool in (max_pool_2x2, flax_pool))
    jax.tree.map(np.testing.assert_array_equal, ours, flax)


def test_ties_in_a_max_pool_share_the_gradient():
    x = jnp.array([[1.0, 0.0, 2.0, 2.0], [1.0, 1.0, 2.0, 2.0]])[None, :, :, None]
    _, grad = forward_and_gradient(max_pool_2x2, jnp.array([3.0, 4.0])[None, None, :, None], x)
    np.testing.assert_array_equal(grad[0, :, :, 0], [[1, 0, 1, 1], [1, 1, 1, 1]])


def draw_ties(h, w):
    """Returns images of only three values, so that most windows have ties, and a gradient of their pools."""
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.integers(-1, 2, (2, h, w, 5)), jnp.float32)
    return image, jnp.asarray(rng.normal(size=(2, h // 2, w // 2, 5)), jnp.float32)


@pytest.mark.parametrize(("h", "w"), [(8, 6), (7, 6), (8, 5), (7, 5)])
def test_max_pool_by_index_matches_flax_with_ties(h, w, monkeypatch):
    """Flax passes the gradient to the first maximum; so does the shipped function on an accelerator."""
    x, g = draw_ties(h, w)

    @jax.jit
    def by_index(x, g):
        y, index = max_pool_with_index(x)
        return y, max_pool_grad_by_index(index, g, h, w)

    expected = forward_and_gradient(flax_pool, g, x)
    jax.tree.map(np.testing.assert_array_equal, by_index(x, g), expected)
    simulate_accelerator(monkeypatch)
    jax.tree.map(np.testing.assert_array_equal, forward_and_gradient(max_pool_2x2, g, x), expected)


def test_max_pool_index_by_hand():
    x = jnp.array([[1.0, 0.0, 2.0, 3.0, 5.0, 5.0], [1.0, 1.0, 3.0, 2.0, 5.0, 6.0]])[None, :, :, None]
    y, index = jax.jit(max_pool_with_index)(x)
    np.testing.assert_array_equal(y.ravel(), [1, 3, 6])
    np.testing.assert_array_equal(index.ravel(), [0, 1, 3])
    grad = max_pool_grad_by_index(index, jnp.array([3.0, 4.0, 5.0])[None, None, :, None], 2, 6)
    np.testing.assert_array_equal(grad[0, :, :, 0], [[3, 0, 0, 4, 0, 0], [0, 0, 0, 0, 0, 5]])


@pytest.mark.parametrize(("h", "w"), [(8, 6), (7, 5)])
def test_max_pool_on_a_cpu_compares_and_matches_numpy_with_ties(h, w):
    x, g = draw_ties(h, w)
    wanted = np.zeros(x.shape)
    for row in range(h // 2):
        for column in range(w // 2):
            window = np.s_[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            largest = np.asarray(x)[window] == np.max(np.asarray(x)[window], axis=(1, 2), keepdims=True)
            share = np.asarray(g)[:, row, column][:, None, None] / largest.sum((1, 2), keepdims=True)
            wanted[window] = np.where(largest, share, 0)
    y, grad = forward_and_gradient(max_pool_2x2, g, x)
    np.testing.assert_allclose(grad, wanted, rtol=1e-6)
    np.testing.assert_array_equal(jax.jit(max_pool_grad_by_comparison)(x, y, g), grad)


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.1])
def test_dropout_drops_its_share_and_keeps_the_mean(rate):
    y = np.asarray(dropout(jax.random.key(0), jnp.ones((400, 512)), rate))
    exact = round(rate * 256) / 256
    # Five standard deviations of a share over 204,800 draws.
    assert abs(np.mean(y == 0) - exact) < 5 * np.sqrt(exact * (1 - exact) / y.size)
    np.testing.assert_allclose(y[y != 0], 1 / (1 - exact), rtol=1e-6)
    # Units are dropped independently, including neighbors within one 32-bit word of random bits.
    pairs = np.mean((y[:, ::2] == 0) & (y[:, 1::2] == 0))
    assert abs(pairs - exact**2) < 0.01
