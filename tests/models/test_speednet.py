import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax import MLP, Batch, SpeedNet, UserError, init_state, train_step, whiten
from cnnjax.models import whitening
from cnnjax.models.whitening import patch_covariance, whitening_kernel

RNG = np.random.default_rng(0)
# Neighbours are alike, as in photographs.
NOISE = RNG.normal(size=(200, 13, 13, 3)).astype(np.float32)
IMAGE = sum(NOISE[:, i : i + 10, j : j + 10] for i in range(4) for j in range(4)) / 4


def test_features_of_the_whitening_kernel_are_uncorrelated_with_deviation_1():
    kernel = whitening_kernel(IMAGE)
    assert kernel.shape == (2, 2, 3, 24) and kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel[..., 12:], -kernel[..., :12])
    features = jax.lax.conv_general_dilated(
        IMAGE, kernel[..., :12], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    features = np.asarray(features).reshape(-1, 12)
    np.testing.assert_allclose(features.T @ features / len(features), np.eye(12), atol=0.05)  # 0.0005 is added.


def test_the_covariance_equals_numpys_in_float64(monkeypatch):
    monkeypatch.setattr(whitening, "BLOCK", 70)  # Of 200: two whole blocks, and a rest.
    windows = np.lib.stride_tricks.sliding_window_view(IMAGE, (2, 2), axis=(1, 2))  # [N H-1 W-1 C 2 2]
    patches = windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, 12).astype(np.float64)
    got = patch_covariance.__wrapped__(IMAGE)  # Not what is compiled already.
    np.testing.assert_allclose(got, patches.T @ patches / len(patches), atol=1e-5)


def test_whiten_sets_the_kernel_and_nothing_else():
    model, tx = SpeedNet(10, (4, 4, 4)), optax.sgd(0.1)
    state = init_state(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), model=model, tx=tx)
    assert not state.batch_stats["whiten"]["kernel"].any()
    whitened = whiten(state, IMAGE)
    np.testing.assert_array_equal(whitened.batch_stats["whiten"]["kernel"], whitening_kernel(IMAGE))
    rest = whitened._replace(batch_stats={**whitened.batch_stats, "whiten": state.batch_stats["whiten"]})
    jax.tree.map(np.testing.assert_array_equal, rest, state)


def test_a_step_trains_the_bias_and_leaves_the_kernel():
    model, tx, key = SpeedNet(10, (4, 4, 4)), optax.adamw(0.1, weight_decay=0.5), jax.random.key(0)
    state = whiten(init_state(key, jnp.zeros((1, 10, 10, 3)), model=model, tx=tx), IMAGE)
    batch = Batch(IMAGE[:20], np.arange(20, dtype=np.int32) % 10, np.ones(20, bool))
    state, _ = train_step(state, batch, key, model=model, tx=tx)
    np.testing.assert_array_equal(state.batch_stats["whiten"]["kernel"], whitening_kernel(IMAGE))
    assert state.params["whiten"]["bias"].any()


def test_whitening_of_another_network_or_other_channels():
    tx, key = optax.sgd(0.1), jax.random.key(0)
    state = init_state(key, jnp.zeros((1, 10, 10, 1)), model=SpeedNet(10, (4, 4, 4)), tx=tx)
    with pytest.raises(
        UserError, match=r"`image` must have the 1 channels of the network, got shape \(200, 10, 10, 3\)"
    ):
        whiten(state, IMAGE)
    state = init_state(key, jnp.zeros((1, 10, 10, 3)), model=MLP(10), tx=tx)
    with pytest.raises(UserError, match=r"`state` must be of a SpeedNet, got one with batch_stats of \[\]"):
        whiten(state, IMAGE)
