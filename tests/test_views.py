import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax.errors import UserError
from cnnjax.views import mean_logits

RNG = np.random.default_rng(0)
IMAGE = RNG.normal(size=(3, 4, 5, 2)).astype(np.float32)
KERNEL = RNG.normal(size=(40, 7)).astype(np.float32)


def logits_fn(image):
    """Depends on where each pixel is."""
    return jnp.asarray(image).reshape(len(image), -1) @ KERNEL


def moved(image, by):
    """By NumPy: to the bottom right for 1, to the top left for -1, with the image mirrored at its edge."""
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)), "reflect")
    return padded[:, 1 - by : 5 - by, 1 - by : 6 - by]


def test_views_equal_numpy():
    np.testing.assert_array_equal(mean_logits(logits_fn, IMAGE, "plain"), logits_fn(IMAGE))

    def mirrored(image):
        return (logits_fn(image) + logits_fn(np.flip(image, 2))) / 2

    np.testing.assert_allclose(mean_logits(logits_fn, IMAGE, "mirrored"), mirrored(IMAGE), rtol=1e-5, atol=1e-5)
    expected = mirrored(IMAGE) / 2 + (mirrored(moved(IMAGE, 1)) + mirrored(moved(IMAGE, -1))) / 4
    np.testing.assert_allclose(mean_logits(logits_fn, IMAGE, "shifted"), expected, rtol=1e-5, atol=1e-5)


def test_views_that_are_not_there():
    with pytest.raises(UserError, match=r"`views` must be a known name, got 'miror'\. Did you mean mirrored"):
        mean_logits(logits_fn, IMAGE, "miror")
