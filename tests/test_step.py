import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.test_util import check_grads

from cnnjax import CNN, MLP, Batch, eval_step, init_state, softmax_cross_entropy, train_step

MODEL = CNN(num_classes=10)
TX = optax.adam(1e-3)
KEY = jax.random.key(7)


def make_batch(size=8, shape=(32, 32, 3), masked=0):
    rng = np.random.default_rng(1)
    image = rng.normal(size=(size, *shape)).astype(np.float32)
    return Batch(image, np.arange(size, dtype=np.int32) % 10, np.arange(size) < size - masked)


def make_state(model=MODEL, tx=TX, seed=0, shape=(32, 32, 3)):
    return init_state(jax.random.key(seed), jnp.zeros((1, *shape)), model=model, tx=tx)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


class Normalized(nn.Module):
    """A network that is not the package's: batch normalisation and dropout."""

    @nn.compact
    def __call__(self, image, *, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(image))
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x).mean(axis=(1, 2)))
        return nn.Dense(10)(x)


def test_softmax_cross_entropy_equals_hand_computed_values():
    logits = jnp.array([[0.0, 0.0], [jnp.log(3.0), 0.0], [0.0, 100.0]])
    loss = softmax_cross_entropy(logits, jnp.array([0, 0, 1]))
    np.testing.assert_allclose(loss, [np.log(2), np.log(4 / 3), 0.0], rtol=1e-6, atol=1e-7)
    check_grads(
        lambda x: softmax_cross_entropy(jnp.asarray(x), jnp.array([0, 0, 1])), (logits,), order=1, modes=["rev"]
    )


def test_a_step_of_sgd_equals_numpy_on_a_linear_model():
    class Linear(nn.Module):
        @nn.compact
        def __call__(self, image, *, train):
            return nn.Dense(10)(image.reshape(image.shape[0], -1))

    model, tx, batch = Linear(), optax.sgd(0.1), make_batch(6, (4, 4, 1), masked=2)
    state = make_state(model, tx, shape=(4, 4, 1))
    kernel, bias = (np.asarray(state.params["Dense_0"][name], np.float64) for name in ("kernel", "bias"))
    x, label = batch.image[:4].reshape(4, -1).astype(np.float64), batch.label[:4]
    exp = np.exp(x @ kernel + bias)
    probability = exp / exp.sum(1, keepdims=True)
    error = (probability - np.eye(10)[label]) / 4  # The two masked examples count for nothing.

    state, metrics = train_step(state, batch, KEY, model=model, tx=tx)

    np.testing.assert_allclose(state.params["Dense_0"]["kernel"], kernel - 0.1 * x.T @ error, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.params["Dense_0"]["bias"], bias - 0.1 * error.sum(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics.loss, -np.log(probability[range(4), label]).sum(), rtol=1e-5)
    assert metrics.correct == (probability.argmax(1) == label).sum()
    assert metrics.num_examples == 4
    assert state.step == 1


def test_one_batch_is_overfitted():
    state, batch = make_state(), make_batch()
    for _ in range(60):
        state, metrics = train_step(state, batch, KEY, model=MODEL, tx=TX)
    metrics = eval_step(state, batch, model=MODEL)
    assert metrics.correct == 8
    assert metrics.loss / 8 < 0.1


def test_train_step_traces_once_for_equal_models():
    traces = []

    def loss_fn(logits, label):
        traces.append(1)
        return softmax_cross_entropy(logits, label)

    state, model = make_state(), CNN(num_classes=10)
    for step in range(3):
        state, _ = train_step(state, make_batch(masked=step), KEY, model=model, tx=TX, loss_fn=loss_fn)
        model = CNN(num_classes=10)
    assert len(traces) == 1


def test_same_seed_is_equal_and_another_differs():
    def train(seed, key):
        state = make_state(seed=seed)
        for _ in range(2):
            state, _ = train_step(state, make_batch(), key, model=MODEL, tx=TX)
        return jax.device_get(state.params)

    first = train(0, KEY)
    assert_equal(first, train(0, KEY))
    for other in (train(1, KEY), train(0, jax.random.key(8))):
        assert not np.array_equal(first["Dense_1"]["kernel"], other["Dense_1"]["kernel"])


def test_each_step_drops_other_units():
    model, batch, tx = MLP(10), make_batch(shape=(4, 4, 1)), optax.sgd(0.0)
    state = make_state(model, tx, shape=(4, 4, 1))
    losses = []
    for _ in range(3):
        state, metrics = train_step(state, batch, KEY, model=model, tx=tx)
        losses.append(float(metrics.loss))
    assert len(set(losses)) == 3


def test_no_key_is_used_twice():
    # One small network without convolutions: the checker looks at every primitive.
    model, batch = MLP(10), make_batch(shape=(4, 4, 1))
    with jax.debug_key_reuse(True):
        state = make_state(model, shape=(4, 4, 1))
        for _ in range(2):
            state, _ = train_step(state, batch, KEY, model=model, tx=TX)
    assert state.step == 2


def test_batch_stats_move_in_training_only():
    model, batch = Normalized(), make_batch()
    state = make_state(model)
    before = jax.device_get(state.batch_stats)
    eval_step(state, batch, model=model)
    assert_equal(before, state.batch_stats)
    state, _ = train_step(state, batch, KEY, model=model, tx=TX)
    moved = state.batch_stats["BatchNorm_0"]["mean"] - before["BatchNorm_0"]["mean"]
    assert np.abs(moved).min() > 0


def test_masked_examples_count_for_nothing():
    state, whole = make_state(), make_batch(8)
    part = Batch(whole.image[:5], whole.label[:5], whole.mask[:5])
    masked = whole._replace(mask=np.arange(8) < 5)
    for a, b in zip(eval_step(state, part, model=MODEL), eval_step(state, masked, model=MODEL), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_eval_step_is_without_dropout():
    state, batch = make_state(), make_batch()
    assert_equal(eval_step(state, batch, model=MODEL), eval_step(state, batch, model=MODEL))
    without = eval_step(state, batch, model=CNN(10, conv_dropout=0.0, dense_dropout=0.0))
    assert_equal(eval_step(state, batch, model=MODEL), without)


def test_donated_state_is_deleted():
    state = make_state()
    train_step(state, make_batch(), KEY, model=MODEL, tx=TX)
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(state.params["Dense_1"]["kernel"])


def test_frozen_parameters_stand_still_and_the_others_move_as_without():
    model, tx, batch = Normalized(), optax.sgd(0.1), make_batch()
    before = jax.device_get(make_state(model, tx).params)
    whole, metrics = train_step(make_state(model, tx), batch, KEY, model=model, tx=tx)
    part, part_metrics = train_step(make_state(model, tx), batch, KEY, model=model, tx=tx, frozen=("Conv_0", "Dense_0"))
    for name in ("Conv_0", "Dense_0"):
        assert_equal(part.params[name], before[name])
        assert not np.array_equal(whole.params[name]["kernel"], before[name]["kernel"])
    for leaf in ("scale", "bias"):
        assert not np.array_equal(part.params["BatchNorm_0"][leaf], before["BatchNorm_0"][leaf])
    same = (part.params["BatchNorm_0"], part.batch_stats, part_metrics)
    wanted = (whole.params["BatchNorm_0"], whole.batch_stats, metrics)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), same, wanted)


def test_parameters_to_freeze_that_are_not_there():
    model, tx = Normalized(), optax.sgd(0.1)
    message = (
        "`frozen` must be a tuple of top-level names in `state.params` "
        r"\(\['BatchNorm_0', 'Conv_0', 'Dense_0'\]\), got \['Conv_1', 'whiten'\]\."
    )
    with pytest.raises(ValueError, match=message):
        train_step(make_state(model, tx), make_batch(), KEY, model=model, tx=tx, frozen=("whiten", "Conv_0", "Conv_1"))
