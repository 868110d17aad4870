import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax.data.tta import mean_logits
from cnnjax.errors import UserError

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


@pytest.mark.parametrize(("batch_size", "quarter"), [(1, 1), (3, 1), (4, 1), (5, 2), (20, 5)])
def test_the_quarter_that_is_least_sure_is_scored_by_all_views(batch_size, quarter):
    image = np.random.default_rng(1).normal(size=(batch_size, 4, 5, 2)).astype(np.float32)
    plain, shifted = (np.asarray(mean_logits(logits_fn, image, views)) for views in ("plain", "shifted"))
    exp = np.exp(plain.astype(np.float64))
    confidence = (exp / exp.sum(1, keepdims=True)).max(1)
    unsure = np.argsort(confidence)[:quarter]
    expected = plain.copy()
    expected[unsure] = shifted[unsure]
    np.testing.assert_allclose(mean_logits(logits_fn, image, "uncertain"), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(shifted - plain).max(1).min() > 0.1  # Which it is shows.


def test_padding_takes_no_place_among_the_least_sure():
    image = np.random.default_rng(1).normal(size=(8, 4, 5, 2)).astype(np.float32)
    plain, shifted = (np.asarray(mean_logits(logits_fn, image, views)) for views in ("plain", "shifted"))
    least = np.argsort(np.asarray(jax.nn.softmax(plain)).max(1))
    mask = np.ones(8, bool)
    mask[least[:3]] = False
    expected = plain.copy()
    expected[least[3:5]] = shifted[least[3:5]]
    got = mean_logits(logits_fn, image, "uncertain", mask)
    np.testing.assert_allclose(got[mask], expected[mask], rtol=1e-5, atol=1e-5)


def test_views_that_are_not_there():
    with pytest.raises(UserError, match=r"`views` must be a known name, got 'miror'\. Did you mean mirrored"):
        mean_logits(logits_fn, IMAGE, "miror")
