import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax import OptimConfig
from cnnjax.optim import make_loss, make_schedule, make_tx


def test_schedules_by_hand():
    constant = make_schedule(OptimConfig(learning_rate=0.1), 10)
    assert [float(constant(step)) for step in (0, 5, 9)] == pytest.approx([0.1, 0.1, 0.1])
    one_cycle = make_schedule(OptimConfig(learning_rate=0.8, schedule="one_cycle", warmup=0.2), 10)
    got = [float(one_cycle(step)) for step in range(11)]
    assert got == pytest.approx([0, 0.4, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0], abs=1e-6)


def test_one_cycle_without_warm_up_falls_from_the_peak():
    schedule = make_schedule(OptimConfig(learning_rate=0.8, schedule="one_cycle", warmup=0.0), 4)
    assert [float(schedule(step)) for step in range(5)] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0], abs=1e-6)


def test_first_update_of_adam_by_hand():
    # m / (1 - b1) = g and v / (1 - b2) = g², so the first update is -lr * g / (|g| + eps).
    tx = make_tx(OptimConfig(learning_rate=0.01), num_steps=1)
    params = {"kernel": jnp.array([[1.0, 2.0]]), "bias": jnp.array([3.0])}
    grads = {"kernel": jnp.array([[0.5, -4.0]]), "bias": jnp.array([1e-8])}
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], [[-0.01, 0.01]], rtol=1e-5)
    np.testing.assert_allclose(updates["bias"], [-0.005], rtol=1e-4)


def test_weight_decay_is_of_kernels_only():
    tx = make_tx(OptimConfig(learning_rate=0.01, weight_decay=0.1), num_steps=1)
    params = {"kernel": jnp.array([[1.0, 2.0]]), "bias": jnp.array([3.0])}
    grads = {"kernel": jnp.zeros((1, 2)), "bias": jnp.zeros(1)}
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], [[-0.001, -0.002]], rtol=1e-5)
    np.testing.assert_array_equal(updates["bias"], [0.0])


def test_label_smoothing_by_hand():
    logits, label = jnp.log(jnp.array([[0.7, 0.2, 0.1]])), jnp.array([0])
    expected = -(0.8 * np.log(0.7) + 0.1 * np.log(0.2) + 0.1 * np.log(0.1))  # 0.3 spread over three classes
    np.testing.assert_allclose(make_loss(0.3)(logits, label), [expected], rtol=1e-6)
    np.testing.assert_allclose(make_loss(0.0)(logits, label), [-np.log(0.7)], rtol=1e-6)
    assert make_loss(0.0)(logits, label) == optax.softmax_cross_entropy_with_integer_labels(logits, label)
