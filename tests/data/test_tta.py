import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import UserError
from cnnjax.data.tta import mean_logits

pytestmark = pytest.mark.usefixtures("quick_compilation")
RNG = np.random.default_rng(0)
IMAGE = RNG.normal(size=(20, 4, 5, 2)).astype(np.float32)
KERNEL = RNG.normal(size=(40, 7)).astype(np.float32)


def logits_fn(image):
    """Depends on the position of each pixel."""
    return jnp.asarray(image).reshape(len(image), -1) @ KERNEL


mean_logits_jit = jax.jit(mean_logits, static_argnums=(0, 2))


def scores(image, tta, mask=None):
    return np.array(mean_logits_jit(logits_fn, image, tta, mask))


def shifted(image, by):
    """By NumPy: to the bottom right for 1, to the top left for -1, with reflect padding."""
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)), "reflect")
    return padded[:, 1 - by : 5 - by, 1 - by : 6 - by]


def confidence(logits):
    """Returns the probability of the most probable class."""
    exp = np.exp(logits.astype(np.float64))
    return (exp / exp.sum(1, keepdims=True)).max(1)


def test_views_equal_numpy():
    np.testing.assert_allclose(scores(IMAGE, "none"), logits_fn(IMAGE), rtol=1e-5, atol=1e-5)

    def flip(image):
        return (logits_fn(image) + logits_fn(np.flip(image, 2))) / 2

    np.testing.assert_allclose(scores(IMAGE, "flip"), flip(IMAGE), rtol=1e-5, atol=1e-5)
    expected = flip(IMAGE) / 2 + (flip(shifted(IMAGE, 1)) + flip(shifted(IMAGE, -1))) / 4
    np.testing.assert_allclose(scores(IMAGE, "flip_translate"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("batch_size", "quarter"), [(1, 1), (4, 1), (5, 2), (20, 5)])
def test_the_least_certain_quarter_is_scored_by_all_views(batch_size, quarter):
    none, all_views = (scores(IMAGE, tta)[:batch_size] for tta in ("none", "flip_translate"))
    assert np.abs(all_views - none).max(1).min() > 0.1  # The scores show which views were averaged.
    least = np.argsort(confidence(none))[:quarter]
    expected = none.copy()
    expected[least] = all_views[least]
    np.testing.assert_allclose(scores(IMAGE[:batch_size], "uncertain"), expected, rtol=1e-5, atol=1e-5)


def test_padding_gets_extra_views_only_after_all_other_images():
    none, all_views = (scores(IMAGE, tta) for tta in ("none", "flip_translate"))
    least = np.argsort(confidence(none))
    mask = np.ones(20, bool)
    mask[least[:3]] = False
    expected = none.copy()
    expected[least[3:8]] = all_views[least[3:8]]
    np.testing.assert_allclose(scores(IMAGE, "uncertain", mask), expected, rtol=1e-5, atol=1e-5)


def test_an_unknown_test_time_augmentation():
    with pytest.raises(UserError, match=r"`tta` must be a known name, got 'filp'\. Did you mean flip"):
        mean_logits(logits_fn, IMAGE, "filp")
