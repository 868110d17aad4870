import jax
import jax.numpy as jnp
import numpy as np
import optax

from cnnjax import SpeedNet, init_state
from cnnjax.whitening import patch_covariance, whiten, whitening_kernel

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


def test_the_covariance_equals_numpys_in_float64():
    windows = np.lib.stride_tricks.sliding_window_view(IMAGE, (2, 2), axis=(1, 2))  # [N H-1 W-1 C 2 2]
    patches = windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, 12).astype(np.float64)
    np.testing.assert_allclose(patch_covariance(IMAGE), patches.T @ patches / len(patches), atol=1e-5)


def test_whiten_sets_the_kernel_and_nothing_else():
    model, tx = SpeedNet(10, (4, 4, 4)), optax.sgd(0.1)
    state = init_state(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), model=model, tx=tx)
    assert not state.params["whiten"]["kernel"].any()
    whitened = whiten(state, IMAGE)
    np.testing.assert_array_equal(whitened.params["whiten"]["kernel"], whitening_kernel(IMAGE))
    rest = whitened._replace(params={**whitened.params, "whiten": state.params["whiten"]})
    jax.tree.map(np.testing.assert_array_equal, rest, state)
