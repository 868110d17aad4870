import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax import CNN, OptimConfig, UserError
from cnnjax.optim import group_of, keep_norm, lookahead, make_loss, make_schedule, make_tx


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


def test_one_cycle_begins_and_ends_at_its_shares_of_the_peak():
    config = OptimConfig(learning_rate=2.0, schedule="one_cycle", warmup=0.5, start=0.2, end=0.1)
    schedule = make_schedule(config, 4)
    assert [float(schedule(step)) for step in range(5)] == pytest.approx([0.4, 1.2, 2.0, 1.1, 0.2])


SPEEDNET = {
    "whiten": {"bias": jnp.ones(24)},
    "Conv_0": {"kernel": jnp.ones((3, 3, 2, 4))},
    "NormGelu_0": {"bias": jnp.ones(4)},
    "head": jnp.ones((4, 10)),
}


def test_the_groups_of_a_speednet():
    assert group_of(SPEEDNET) == {
        "whiten": {"bias": "whiten"},
        "Conv_0": {"kernel": "filter"},
        "NormGelu_0": {"bias": "bias"},
        "head": "head",
    }


def test_another_network_has_filters_and_others():
    params = CNN(10).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)["params"]
    groups = group_of(params)
    assert groups["Conv_0"] == {"kernel": "filter", "bias": "other"}
    assert groups["Dense_1"] == {"kernel": "other", "bias": "other"}


def test_a_run_too_short_for_its_optimizer():
    with pytest.raises(UserError, match=r"`optim.accumulate` must be at most the 3 steps of the run, got 4\."):
        make_tx(OptimConfig(accumulate=4), num_steps=3)
    with pytest.raises(UserError, match=r"`optim.lookahead` must be at most the 4 updates of the run, got 5\."):
        make_tx(OptimConfig(accumulate=2, lookahead=5), num_steps=9)


def test_sgd_by_hand_in_each_group():
    """Two updates with the gradient 1; g is the gradient with its decay, m the momentum's trace.

    m1 = g1, and Nesterov's update is g1 + 0.5 m1; m2 = 0.5 m1 + g2, and the second is g2 + 0.5 m2.
    """
    config = OptimConfig(
        name="sgd", learning_rate=0.1, weight_decay=0.2, momentum=0.5, bias_scale=4.0, head_scale=2.0, whiten_scale=0.5
    )
    tx = make_tx(config, num_steps=2)
    params, state = SPEEDNET, tx.init(SPEEDNET)
    for _ in range(2):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)

    def expected(scale):
        p, m = 1.0, 0.0
        for _ in range(2):
            g = 1 + 0.2 / scale * p
            m = 0.5 * m + g
            p -= 0.1 * scale * (g + 0.5 * m)
        return p

    moved = jax.tree.map(lambda leaf: leaf.ravel()[0], params)
    for leaf, scale in (
        (moved["Conv_0"]["kernel"], 1.0),
        (moved["NormGelu_0"]["bias"], 4.0),
        (moved["head"], 2.0),
        (moved["whiten"]["bias"], 0.5),
    ):
        assert leaf == pytest.approx(expected(scale), rel=1e-5)


def test_the_whitening_bias_stands_still_after_its_epochs():
    tx = make_tx(OptimConfig(name="sgd", whiten_epochs=1), num_steps=6, num_epochs=3)
    params, state, still = SPEEDNET, tx.init(SPEEDNET), []
    for _ in range(6):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        still.append(not updates["whiten"]["bias"].any())
        assert updates["Conv_0"]["kernel"].all()
    assert still == [False, False, True, True, True, True]


def test_muon_by_numpy():
    """The momentum's matrix, orthogonalised by three steps of Newton and Schulz, on a kernel brought to its norm."""
    rng = np.random.default_rng(0)
    kernel, *grads = (rng.normal(size=(3, 3, 2, 4)).astype(np.float32) for _ in range(3))
    params = {**SPEEDNET, "Conv_0": {"kernel": jnp.asarray(kernel)}}
    tx = make_tx(OptimConfig(name="muon", learning_rate=0.24, muon_momentum=0.6), num_steps=2)
    state, m, wanted = tx.init(params), np.zeros((18, 4)), kernel.astype(np.float64).reshape(18, 4)
    for step, grad in enumerate(grads):
        given = {**jax.tree.map(jnp.zeros_like, params), "Conv_0": {"kernel": jnp.asarray(grad)}}
        updates, state = tx.update(given, state, params)
        params = optax.apply_updates(params, updates)
        g = grad.astype(np.float64).reshape(18, 4)
        m = 0.6 * m + 0.4 * g
        # Nesterov's look ahead, without its bias: of no matter, for only the direction of the matrix counts.
        ahead = 0.6 * m / (1 - 0.6 ** (step + 2)) + 0.4 * g / (1 - 0.6 ** (step + 1))
        x = ahead / np.linalg.norm(ahead)
        for _ in range(3):  # Keller Jordan (2024): the quintic with these coefficients.
            gram = x.T @ x
            x = 3.4445 * x + x @ (-4.7750 * gram + 2.0315 * gram @ gram)
        wanted = wanted * 2 / np.linalg.norm(wanted) - 0.24 * x
    got = np.asarray(params["Conv_0"]["kernel"], np.float64).reshape(18, 4)
    np.testing.assert_allclose(got, wanted, atol=2e-3)


def test_keep_norm_by_hand():
    params = jnp.array([3.0, 0.0, 0.0, 4.0]).reshape(1, 1, 1, 4)  # Norm 5, and 4 features: to the norm 2.
    update = jnp.full((1, 1, 1, 4), 0.5)
    tx = keep_norm()
    updates, _ = tx.update(update, tx.init(params), params)
    np.testing.assert_allclose((params + updates).ravel(), [1.7, 0.5, 0.5, 2.1], rtol=1e-6)


def test_lookahead_by_hand():
    """Plain steps of -1 from 10; every 2 updates fast and slow meet; the last of 5 leaves the average."""
    tx = lookahead(optax.sgd(1.0), 2, 5)
    params = {"x": jnp.array([10.0])}
    state, got = tx.init(params), []
    for _ in range(5):
        updates, state = tx.update({"x": jnp.ones(1)}, state, params)
        params = optax.apply_updates(params, updates)
        got.append(float(params["x"][0]))
    decay = [0.95**2 * (step / 5) ** 3 for step in (2, 4)]
    meet2 = decay[0] * 10 + (1 - decay[0]) * 8
    meet4 = decay[1] * meet2 + (1 - decay[1]) * (meet2 - 2)
    np.testing.assert_allclose(got, [9, meet2, meet2 - 1, meet4, meet4], rtol=1e-6)


def test_accumulated_gradients_equal_one_larger_batch():
    params = {"x": jnp.array([[1.0, 2.0]])}
    grads = [{"x": jnp.array([[2.0, 0.0]])}, {"x": jnp.array([[4.0, 6.0]])}]
    one, two = make_tx(OptimConfig(), 1), make_tx(OptimConfig(accumulate=2), 2)
    expected, _ = one.update({"x": jnp.array([[3.0, 3.0]])}, one.init(params), params)
    state = two.init(params)
    first, state = two.update(grads[0], state, params)
    second, _ = two.update(grads[1], state, params)
    np.testing.assert_array_equal(first["x"], [[0, 0]])
    np.testing.assert_allclose(second["x"], expected["x"], rtol=1e-6)


def test_gradients_are_clipped_together():
    config = OptimConfig(name="sgd", learning_rate=1.0, momentum=0.0, clip_norm=1.0)
    tx = make_tx(config, 1)
    params = {"Conv_0": {"kernel": jnp.zeros((1, 1, 1, 1))}, "head": jnp.zeros((1, 1))}
    grads = {"Conv_0": {"kernel": jnp.full((1, 1, 1, 1), 3.0)}, "head": jnp.full((1, 1), 4.0)}
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["Conv_0"]["kernel"].ravel(), [-0.6], rtol=1e-6)
    np.testing.assert_allclose(updates["head"].ravel(), [-0.8], rtol=1e-6)
