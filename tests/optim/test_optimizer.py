import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax import CNN, Batch, ModelConfig, OptimConfig, UserError, init_state, train_step
from cnnjax.models.models import make_model
from cnnjax.optim.optimizer import (
    frozen_parts,
    group_of,
    keep_norm,
    lookahead,
    make_loss,
    make_schedule,
    make_tx,
    orthogonalize,
)


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


@pytest.mark.parametrize(
    "config",
    [
        OptimConfig(name="adam", whiten_epochs=1),
        OptimConfig(name="sgd", whiten_epochs=0),
        OptimConfig(name="sgd", whiten_epochs=1, clip_norm=1.0),  # The norm of all gradients counts in each update.
    ],
    ids=["adam", "no whiten_epochs", "clip_norm"],
)
def test_nothing_is_frozen_whose_gradient_counts(config):
    assert {frozen_parts(config, SPEEDNET, step, num_steps=6, num_epochs=3) for step in range(6)} == {()}


@pytest.mark.parametrize("name", ["sgd", "muon"])
@pytest.mark.parametrize(("accumulate", "num_steps", "end"), [(1, 6, 2), (2, 12, 4), (2, 13, 4), (1, 7, 2), (1, 8, 3)])
def test_the_whitening_bias_is_frozen_from_the_step_on_that_moves_it_no_more(name, accumulate, num_steps, end):
    """After a third of the updates: round(8 / 3) = 3."""
    config = OptimConfig(name=name, whiten_epochs=1, accumulate=accumulate)
    tx = make_tx(config, num_steps, 3)
    params, state, moves = SPEEDNET, tx.init(SPEEDNET), []
    update = jax.jit(tx.update)
    for step in range(num_steps):
        updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
        if updates["whiten"]["bias"].any():
            moves.append(step)
    assert max(moves) == end - 1
    frozen = [frozen_parts(config, SPEEDNET, step, num_steps, 3) for step in range(num_steps)]
    assert frozen == [()] * end + [("whiten",)] * (num_steps - end)
    assert frozen_parts(config, {"Conv_0": {}}, num_steps - 1, num_steps, 3) == ()


def test_a_run_with_a_frozen_whitening_bias_ends_in_the_same_parameters():
    config = OptimConfig(
        name="muon", learning_rate=0.1, weight_decay=0.01, whiten_epochs=1, whiten_scale=4.0, accumulate=2
    )
    num_steps, half = 8, 4
    model, tx = make_model(ModelConfig(name="speednet", widths=(4, 8, 8)), 10), make_tx(config, num_steps, 2)
    rng = np.random.default_rng(0)
    image, kernel = rng.normal(size=(16, 9, 9, 3)).astype(np.float32), rng.normal(size=(2, 2, 3, 24))
    batch = Batch(image, np.arange(16, dtype=np.int32) % 10, np.ones(16, bool))

    def train(parts):
        state = init_state(jax.random.key(0), image[:1], model=model, tx=tx)
        stats = {**state.batch_stats, "whiten": {"kernel": jnp.asarray(kernel, jnp.float32) / 4}}
        state, biases = state._replace(batch_stats=stats), []
        for step in range(num_steps):
            frozen = parts(config, state.params, step, num_steps, 2)
            state, _ = train_step(state, batch, jax.random.key(1), model=model, tx=tx, frozen=frozen)
            biases.append(np.asarray(state.params["whiten"]["bias"]))
        return jax.device_get(state.params), biases

    with_frozen, biases = train(frozen_parts)
    without, _ = train(lambda *args: ())
    assert np.abs(biases[half - 1]).min() > 0
    for bias in biases[half:]:
        np.testing.assert_array_equal(bias, biases[half - 1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), with_frozen, without)


def test_muon_by_numpy():
    """The momentum's matrix, orthogonalised by three steps of Newton and Schulz, on a kernel brought to its norm."""
    rng = np.random.default_rng(0)
    kernel, *grads = (rng.normal(size=(3, 3, 2, 4)).astype(np.float32) for _ in range(3))
    params = {**SPEEDNET, "Conv_0": {"kernel": jnp.asarray(kernel)}}
    tx = make_tx(OptimConfig(name="muon", learning_rate=0.24, muon_momentum=0.6), num_steps=2)
    state, m, wanted = tx.init(params), np.zeros((18, 4)), kernel.astype(np.float64).reshape(18, 4)
    for grad in grads:
        given = {**jax.tree.map(jnp.zeros_like, params), "Conv_0": {"kernel": jnp.asarray(grad)}}
        updates, state = tx.update(given, state, params)
        params = optax.apply_updates(params, updates)
        g = grad.astype(np.float64).reshape(18, 4)
        m = 0.6 * m + g
        ahead = g + 0.6 * m  # Nesterov's look ahead, as of airbench94_muon.
        x = ahead / np.linalg.norm(ahead)
        for _ in range(3):  # Keller Jordan (2024): the quintic with these coefficients.
            gram = x.T @ x
            x = 3.4445 * x + x @ (-4.7750 * gram + 2.0315 * gram @ gram)
        wanted = wanted * 2 / np.linalg.norm(wanted) - 0.24 * x
    got = np.asarray(params["Conv_0"]["kernel"], np.float64).reshape(18, 4)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)


def test_kernels_are_orthogonalised_together_as_each_alone(monkeypatch):
    """On an accelerator, in bfloat16 and filled up with zeros to the largest; one has more columns than rows."""
    rng = np.random.default_rng(0)
    shapes = {"wide": (1, 1, 3, 8), "small": (3, 3, 2, 4), "large": (3, 3, 4, 6)}
    kernels = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    update = orthogonalize().update
    exact = {name: update({name: kernel}, optax.EmptyState())[0][name] for name, kernel in kernels.items()}
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *operands, cpu, default: default(*operands))
    together, _ = update(kernels, optax.EmptyState())
    for name, shape in shapes.items():
        alone = update({name: kernels[name]}, optax.EmptyState())[0][name]
        assert together[name].shape == shape
        assert together[name].dtype == jnp.float32
        assert jnp.any(together[name] != exact[name])  # It is in bfloat16.
        np.testing.assert_allclose(together[name], alone, rtol=0, atol=2**-7)
        # The first rounding, 2**-9, is multiplied in each of the three steps, as small values are.
        np.testing.assert_allclose(together[name], exact[name], rtol=0, atol=3.4445**3 * 2**-9)


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
