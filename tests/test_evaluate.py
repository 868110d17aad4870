import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from cnnjax import MLP, AugmentConfig, ModelConfig, TrainState, init_state
from cnnjax.data.batches import Pixels, epoch_plan, pixel_statistics, row
from cnnjax.evaluate import evaluate, train_steps
from cnnjax.models.models import make_model

AUGMENT = AugmentConfig(flip="random", translate=1, cutout=2)


def make_pixels(count, size):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (count, size, size, 3), np.uint8)
    return Pixels(image, rng.integers(0, 10, count).astype(np.int32), pixel_statistics(image))


def test_no_key_is_used_twice_in_an_epoch():
    pixels, model, tx, key = make_pixels(20, 4), MLP(10), optax.sgd(0.1), jax.random.key(0)
    plan = epoch_plan(0, 0, 20, batch_size=10, augment=AUGMENT, image_size=(4, 4))
    with jax.debug_key_reuse(True):
        state = init_state(jax.random.key(1), jnp.zeros((1, 4, 4, 3)), model=model, tx=tx)
        for _ in range(2):
            state, _ = train_steps(state, pixels, plan, key, augment=AUGMENT, model=model, tx=tx)
    assert state.step == 4


def test_many_steps_in_one_program_equal_one_after_another():
    pixels = make_pixels(90, 12)
    plan = epoch_plan(0, 0, 90, batch_size=16, augment=AUGMENT, image_size=(12, 12))
    model, tx, key = make_model(ModelConfig(name="cnn"), 10), optax.sgd(0.1, momentum=0.9), jax.random.key(0)

    def train(plans):
        state, found = init_state(key, jnp.zeros((1, 12, 12, 3)), model=model, tx=tx), []
        for plan in plans:
            state, metrics = train_steps(state, pixels, plan, key, augment=AUGMENT, model=model, tx=tx)
            found.append(metrics)
        return state, jax.tree.map(lambda *values: np.concatenate(values), *found)

    together, metrics = train([plan])
    single, single_metrics = train([row(plan, slice(i, i + 1)) for i in range(6)])
    assert together.step == single.step == 6
    np.testing.assert_array_equal(metrics.num_examples, [16, 16, 16, 16, 16, 10])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), metrics, single_metrics)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), together.params, single.params)


@pytest.mark.parametrize(("backend", "batch_size"), [("cpu", 500), ("gpu", 2000)])
def test_a_set_is_scored_in_batches_that_its_device_is_fast_at(backend, batch_size, monkeypatch):
    seen = []

    class Red(nn.Module):
        """Finds class 1 where an image is redder than the mean image, else class 0."""

        @nn.compact
        def __call__(self, image, *, train):
            seen.append(image.shape)
            red = image.mean((1, 2))[:, :1]
            return jnp.concatenate([-red, red], axis=1)

    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    pixels = make_pixels(2100, 4)
    scores = evaluate(TrainState(jnp.zeros((), jnp.int32), {}, {}, ()), pixels, model=Red())
    assert seen == [(batch_size, 4, 4, 3)]
    red = pixels.image[..., 0].mean((1, 2), dtype=np.float64) / 255
    mean = pixels.image[..., 0].mean(dtype=np.float64) / 255
    assert scores.num_examples == 2100
    assert scores.accuracy == np.mean((red > mean) == pixels.label)
