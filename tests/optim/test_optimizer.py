"""The base class of optimizers: schedules, groups, clipping, accumulation, lookahead."""

from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax import (
    SGD,
    Adam,
    Batch,
    Muon,
    Optimizer,
    ParamGroup,
    TrainState,
    UserError,
    eval_params,
    init_state,
    train_step,
)
from cnnjax.optim.optimizer import param_labels

pytestmark = pytest.mark.usefixtures("quick_compilation")
# The parameters of a small SpeedNet with one convolution.
SPEEDNET = {
    "whiten": {"bias": jnp.ones(24)},
    "Conv_0": {"kernel": jnp.ones((3, 3, 2, 4))},
    "NormGelu_0": {"bias": jnp.ones(4)},
    "head": jnp.ones((4, 10)),
}
PLAIN = SGD(learning_rate=1.0, momentum=0.0)  # Its update is the negative gradient.


def updates_of(tx, params, grads):
    """Returns the update of each step and the final parameters."""
    state, update, all_updates = tx.init(params), jax.jit(tx.update), []
    for grad in grads:
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
        all_updates.append(updates)
    return all_updates, params


def scalar_updates(tx, grads, x=0.0):
    """Returns the updates of one parameter x."""
    updates, _ = updates_of(tx, {"x": jnp.array(x)}, [{"x": jnp.array(grad)} for grad in grads])
    return [float(update["x"]) for update in updates]


def ones_like(params, steps=1):
    return [jax.tree.map(jnp.ones_like, params)] * steps


# --- Schedule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        (Adam(learning_rate=0.1), [0.1, 0.1, 0.1, 0.1, 0.1]),
        (Adam(learning_rate=0.8, schedule="one_cycle", warmup=0.5), [0, 0.4, 0.8, 0.4, 0]),
        (Adam(learning_rate=0.8, schedule="one_cycle", warmup=0.0), [0.8, 0.6, 0.4, 0.2, 0]),
        (Adam(learning_rate=0.8, schedule="cosine", warmup=0.5), [0, 0.4, 0.8, 0.4, 0]),
        (
            Adam(learning_rate=1.0, schedule="cosine", warmup=0.0, end_factor=0.1),
            [1, 0.55 + 0.45 * 0.5**0.5, 0.55, 0.55 - 0.45 * 0.5**0.5, 0.1],
        ),
        (
            Adam(learning_rate=2.0, schedule="one_cycle", warmup=0.5, init_factor=0.2, end_factor=0.1),
            [0.4, 1.2, 2.0, 1.1, 0.2],
        ),
    ],
    ids=["constant", "one_cycle", "no warm-up", "cosine", "end of the cosine", "init_factor and end_factor"],
)
def test_schedules_equal_hand_computed_values(optim, expected):
    schedule = optim.make_schedule(4)
    assert [float(schedule(update)) for update in range(5)] == pytest.approx(expected, abs=1e-6)


def test_each_update_uses_the_learning_rate_of_its_number():
    optim = replace(PLAIN, schedule="one_cycle", warmup=0.5)
    assert scalar_updates(optim.make_tx(num_steps=4), [1.0] * 4) == pytest.approx([0, -0.5, -1, -0.5])


# --- Accumulation, clipping, lookahead --------------------------------------------------------------------------------


def test_accumulated_gradients_are_averaged():
    """SGD without momentum: Adam would hide a factor."""
    tx = replace(PLAIN, accumulate_steps=2).make_tx(num_steps=4)
    assert scalar_updates(tx, [2.0, 4.0, 1.0, -2.0]) == pytest.approx([0, -3, 0, 0.5])


def test_an_incomplete_final_group_is_dropped():
    tx = replace(PLAIN, accumulate_steps=3).make_tx(num_steps=5)
    assert scalar_updates(tx, [1.0] * 5) == pytest.approx([0, 0, -1, 0, 0])


def test_the_schedule_counts_updates_under_accumulation():
    optim = replace(PLAIN, schedule="one_cycle", warmup=0.5, accumulate_steps=2)
    updates = scalar_updates(optim.make_tx(num_steps=9), [1.0] * 9)  # Four updates; the ninth step makes none.
    assert updates == pytest.approx([0, 0, 0, -0.5, 0, -1, 0, -0.5, 0])


def test_lookahead_counts_updates_under_accumulation():
    """Synchronizes after the second update and after the third, which is the last."""
    tx = replace(PLAIN, accumulate_steps=2, lookahead=2).make_tx(num_steps=6)
    decay = 0.95**2 * (2 / 3) ** 3
    slow = decay * 10 + (1 - decay) * 8
    assert scalar_updates(tx, [1.0] * 6, x=10.0) == pytest.approx([0, -1, 0, slow - 9, 0, 0], abs=1e-5)


def test_gradients_are_clipped_by_their_global_norm():
    """Across groups: the norm of 3 and 4 is 5."""
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    optim = replace(PLAIN, clip_norm=1.0, groups=(ParamGroup("b", multiplier=2.0),))
    (updates,), _ = updates_of(optim.make_tx(1), params, [{"a": jnp.array([3.0]), "b": jnp.array([4.0])}])
    np.testing.assert_allclose([*updates["a"], *updates["b"]], [-0.6, -1.6], rtol=1e-6)


def test_gradients_are_clipped_after_accumulation():
    tx = replace(PLAIN, accumulate_steps=2, clip_norm=1.0).make_tx(num_steps=2)
    assert scalar_updates(tx, [4.0, 0.0]) == pytest.approx([0, -1])  # Clipped before, it would be 0.5.


def test_a_small_gradient_is_not_clipped():
    assert scalar_updates(replace(PLAIN, clip_norm=1.0).make_tx(1), [0.25]) == [-0.25]


def test_a_run_too_short_for_its_optimizer():
    with pytest.raises(UserError, match=r"`optim.accumulate_steps` must be at most the 3 steps of the run, got 4\."):
        Adam(accumulate_steps=4).make_tx(num_steps=3)
    with pytest.raises(UserError, match=r"`optim.lookahead` must be at most the 4 updates of the run, got 5\."):
        Adam(accumulate_steps=2, lookahead=5).make_tx(num_steps=9)


# --- Groups -----------------------------------------------------------------------------------------------------------


def test_the_first_matching_group_labels_a_parameter():
    groups = (ParamGroup("^Conv_0/"), ParamGroup("bias$"), ParamGroup("^head$"))
    x = jnp.zeros(1)
    params = {"Conv_0": {"kernel": x, "bias": x}, "Conv_1": {"kernel": x, "bias": x}, "head": x}
    rest = "(the other parameters)"
    assert param_labels(params, groups) == {
        "Conv_0": {"kernel": "^Conv_0/", "bias": "^Conv_0/"},
        "Conv_1": {"kernel": rest, "bias": "bias$"},
        "head": "^head$",
    }


def test_the_first_matching_group_determines_the_learning_rate():
    groups = (ParamGroup("^Conv_0/", multiplier=2.0), ParamGroup("kernel", multiplier=8.0))
    params = {"Conv_0": {"kernel": jnp.zeros(1)}, "Conv_1": {"kernel": jnp.zeros(1)}, "head": jnp.zeros(1)}
    (updates,), _ = updates_of(replace(PLAIN, groups=groups).make_tx(1), params, ones_like(params))
    assert jax.tree.map(float, jax.tree.map(jnp.squeeze, updates)) == {
        "Conv_0": {"kernel": -2.0},
        "Conv_1": {"kernel": -8.0},
        "head": -1.0,
    }


@pytest.mark.parametrize("optim", [PLAIN, Adam(), Muon()], ids=["sgd", "adam", "muon"])
def test_the_multiplier_leaves_the_weight_decay_per_update(optim):
    """With a gradient of 0 only the decay moves a matrix: by 0.1 · 0.5 of its value, in every group."""
    optim = replace(optim, learning_rate=0.1, weight_decay=0.5, groups=(ParamGroup("b", multiplier=8.0),))
    if isinstance(optim, Muon):
        optim = replace(optim, sgd_momentum=0.0)
    params = {"a": jnp.ones((1, 1)), "b": jnp.ones((1, 1))}
    (updates,), _ = updates_of(optim.make_tx(1), params, [jax.tree.map(jnp.zeros_like, params)])
    np.testing.assert_allclose([updates["a"], updates["b"]], np.full((2, 1, 1), -0.05), rtol=1e-6)


@pytest.mark.parametrize("optim", [SGD(weight_decay=0.1), Adam(weight_decay=0.1), Muon(weight_decay=0.1)])
@pytest.mark.parametrize(("num_epochs", "moving"), [(0, 0), (1, 2), (None, 6)])
def test_a_frozen_group_does_not_move(optim, num_epochs, moving):
    """Despite momentum and weight decay: of six updates in three epochs, those of its epochs move it."""
    optim = replace(optim, groups=(ParamGroup("^(whiten|Conv_0)/", num_epochs=num_epochs),))
    all_updates, _ = updates_of(optim.make_tx(6, num_epochs=3), SPEEDNET, ones_like(SPEEDNET, 6))
    for update, moves in zip(all_updates, [True] * moving + [False] * (6 - moving), strict=True):
        leaves = [update["whiten"]["bias"], update["Conv_0"]["kernel"]]
        if isinstance(optim, Muon) and num_epochs:
            leaves.pop()  # Muon keeps the norm of a kernel, whatever its learning rate.
        for leaf in leaves:
            assert np.all(leaf != 0) if moves else not np.any(leaf)
        assert np.all(update["head"] != 0)


def test_a_group_that_is_frozen_from_the_start_does_not_move_under_lookahead():
    optim = replace(PLAIN, lookahead=2, groups=(ParamGroup("x", num_epochs=0),))
    assert scalar_updates(optim.make_tx(5), [1.0] * 5, x=0.3) == [0, 0, 0, 0, 0]


def test_a_group_that_is_frozen_from_the_start_has_no_state():
    params = {"a": jnp.zeros(3), "b": jnp.zeros(5)}
    tx = SGD(groups=(ParamGroup("b", num_epochs=0),)).make_tx(1)
    assert [leaf.shape for leaf in jax.tree.leaves(tx.init(params)) if leaf.ndim] == [(3,)]


def test_a_group_without_a_parameter():
    rule = r"`optim.groups` must each match a parameter, got 'kernle'\. Parameters: \['Conv_0/kernel', .*'head', "
    with pytest.raises(UserError, match=rule):
        SGD(groups=(ParamGroup("kernle"),)).make_tx(1).init(SPEEDNET)
    with pytest.raises(UserError, match=r"got '\^Conv_0/kernel'\."):  # An earlier group has all of its parameters.
        param_labels(SPEEDNET, (ParamGroup("Conv"), ParamGroup("^Conv_0/kernel")))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": "("}, r"`pattern` must be a regular expression, got '\(' \(missing \), unterminated subpattern"),
        ({"multiplier": 0.0}, r"`multiplier` must be above 0 and finite \(`num_epochs=0` freezes\), got 0\.0\."),
        ({"multiplier": float("inf")}, "`multiplier` must be finite, and 0 or .*, got inf"),
        ({"num_epochs": -1}, r"`num_epochs` must be at least 0, got -1\."),
    ],
)
def test_invalid_groups(fields, message):
    with pytest.raises(UserError, match=message):
        ParamGroup(**{"pattern": "kernel", **fields})


def test_two_groups_of_the_same_pattern():
    with pytest.raises(UserError, match=r"`optim.groups` must be of distinct patterns, got \['a', 'b', 'a'\]\."):
        SGD(groups=(ParamGroup("a"), ParamGroup("b"), ParamGroup("a", multiplier=2.0)))


# --- Frozen parameters ------------------------------------------------------------------------------------------------

WHITEN_ONE_EPOCH = (ParamGroup("^whiten/", num_epochs=1),)


@pytest.mark.parametrize(
    ("accumulate_steps", "num_steps", "end"), [(1, 6, 2), (2, 12, 4), (2, 13, 4), (1, 7, 2), (1, 8, 3)]
)
def test_parameters_are_frozen_after_the_last_step_that_moves_them(accumulate_steps, num_steps, end):
    """After a third of the updates, rounded: round(8 / 3) = 3."""
    optim = SGD(accumulate_steps=accumulate_steps, groups=WHITEN_ONE_EPOCH)
    updates, _ = updates_of(optim.make_tx(num_steps, num_epochs=3), SPEEDNET, ones_like(SPEEDNET, num_steps))
    assert max(step for step, update in enumerate(updates) if update["whiten"]["bias"].any()) == end - 1
    frozen = [optim.frozen(SPEEDNET, step, num_steps, 3) for step in range(num_steps)]
    assert frozen == [()] * end + [("whiten",)] * (num_steps - end)


def test_parameters_of_zero_epochs_are_frozen_from_the_start():
    optim = Muon(groups=(ParamGroup("^head$", num_epochs=0), *WHITEN_ONE_EPOCH))
    frozen = [optim.frozen(SPEEDNET, step, num_steps=2, num_epochs=2) for step in range(2)]
    assert frozen == [("head",), ("whiten", "head")]


@pytest.mark.parametrize(
    "optim",
    [
        SGD(),
        SGD(groups=(ParamGroup("^whiten/", multiplier=4.0),)),
        SGD(groups=WHITEN_ONE_EPOCH, clip_norm=1.0),  # The global norm depends on every gradient.
    ],
    ids=["no groups", "no end", "clip_norm"],
)
def test_parameters_whose_gradient_affects_an_update_are_not_frozen(optim):
    assert {optim.frozen(SPEEDNET, step, num_steps=6, num_epochs=3) for step in range(6)} == {()}


def test_a_module_of_which_a_part_is_frozen_is_not_frozen():
    x = jnp.zeros(1)
    params = {"Conv_0": {"kernel": x, "bias": x}, "Dense_0": {"bias": x}}
    optim = SGD(groups=(ParamGroup("bias$", num_epochs=0),))
    assert optim.frozen(params, 0, num_steps=2, num_epochs=1) == ("Dense_0",)


class Net(nn.Module):
    @nn.compact
    def __call__(self, image, *, train):
        return nn.Dense(10)(nn.gelu(nn.Conv(4, (3, 3))(image)).mean((1, 2)))


def test_a_run_that_skips_frozen_gradients_ends_in_the_same_parameters():
    num_steps, half = 8, 4
    groups = (ParamGroup("^Dense_0/", multiplier=4.0, num_epochs=1),)
    optim = Muon(learning_rate=0.1, weight_decay=0.01, accumulate_steps=2, groups=groups)
    model, tx = Net(), optim.make_tx(num_steps, num_epochs=2)
    image = np.random.default_rng(0).normal(size=(8, 6, 6, 3)).astype(np.float32)
    batch = Batch(image, np.arange(8, dtype=np.int32), np.ones(8, bool))

    def train(frozen_of):
        state, layers = init_state(jax.random.key(0), image, model=model, tx=tx), []
        for step in range(num_steps):
            frozen = frozen_of(state.params, step, num_steps, 2)
            state, _ = train_step(state, batch, jax.random.key(1), model=model, tx=tx, frozen=frozen)
            layers.append(jax.device_get(state.params["Dense_0"]))
        return jax.device_get(state.params), layers

    with_frozen, layers = train(optim.frozen)
    without, _ = train(lambda *args: ())
    assert np.abs(layers[half - 1]["bias"]).min() > 0
    for layer in layers[half:]:
        jax.tree.map(np.testing.assert_array_equal, layer, layers[half - 1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), with_frozen, without)


# --- User-defined optimizers ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SignDescent(Optimizer):
    """Moves by the sign of the gradient, with a field of its own and a schedule of its own."""

    scale: float = 1.0

    def transform(self, learning_rate):
        return optax.chain(optax.scale_by_sign(), optax.scale(self.scale), optax.scale_by_learning_rate(learning_rate))

    def make_schedule(self, num_updates):
        return lambda update: self.learning_rate * (num_updates - update)


def test_a_user_defined_optimizer_by_hand():
    """It takes part in accumulation and groups, which keep its own field."""
    optim = SignDescent(learning_rate=0.5, scale=3.0, accumulate_steps=2, groups=(ParamGroup("b", multiplier=2.0),))
    params = {"a": jnp.array(0.0), "b": jnp.array(0.0)}
    grads = [{"a": jnp.array(a), "b": jnp.array(-a)} for a in (5.0, -1.0, -7.0, 1.0)]
    updates, _ = updates_of(optim.make_tx(4), params, grads)
    assert [float(update["a"]) for update in updates] == [0, -3.0, 0, 1.5]  # Learning rates 1 and 0.5.
    assert [float(update["b"]) for update in updates] == [0, 6.0, 0, -3.0]


def test_an_optimizer_without_transform():
    @dataclass(frozen=True)
    class Unfinished(Optimizer):
        pass

    unfinished: Any = Unfinished
    with pytest.raises(TypeError, match=r"Can't instantiate abstract class Unfinished .*transform"):
        unfinished()


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        (SGD(), False),
        (SGD(accumulate_steps=2, clip_norm=1.0, weight_decay=0.1, groups=(ParamGroup("x", multiplier=2.0),)), False),
        (SGD(groups=WHITEN_ONE_EPOCH), False),  # It ends with a whole number of updates.
        (SGD(groups=(ParamGroup("x", num_epochs=0),), accumulate_steps=2), False),
        (SGD(groups=WHITEN_ONE_EPOCH, accumulate_steps=2), True),  # The rounded end of the group.
        (SGD(schedule="one_cycle"), True),
        (SGD(lookahead=2), True),
        (SignDescent(), True),  # Its schedule is unknown.
    ],
)
def test_which_optimizers_depend_on_the_length_of_the_run(optim, expected):
    assert optim.depends_on_length() is expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rate": 0.0}, r"`optim.learning_rate` must be above 0 and finite, got 0\.0\."),
        ({"learning_rate": float("nan")}, "`optim.learning_rate` must be finite, and 0 or .*, got nan"),
        ({"schedule": "one_cycel"}, "`optim.schedule` must be a known name, got 'one_cycel'. Did you mean one_cycle"),
        ({"warmup": 1.0}, "`optim.warmup` must be at least 0 and below 1, got 1"),
        ({"init_factor": -0.1}, "`optim.init_factor` must be between 0 and 1, got -0.1"),
        ({"end_factor": 2.0}, "`optim.end_factor` must be between 0 and 1, got 2"),
        ({"weight_decay": -1.0}, "`optim.weight_decay` must be at least 0 and finite, got -1"),
        ({"clip_norm": float("inf")}, "`optim.clip_norm` must be finite, and 0 or .*, got inf"),
        ({"accumulate_steps": 0}, "`optim.accumulate_steps` must be at least 1, got 0"),
        ({"lookahead": -1}, "`optim.lookahead` must be at least 0, got -1"),
    ],
)
def test_invalid_options(fields, message):
    with pytest.raises(UserError, match=message):
        SGD(**fields)


# --- Fine-tuning ------------------------------------------------------------------------------------------------------


class Deep(nn.Module):
    """Three layers, named from input to head."""

    @nn.compact
    def __call__(self, x):
        for name in self.depths():
            x = nn.Dense(3, name=name)(x)
        return x

    def depths(self):
        return ("stem", "block.1", "head")


def deep_params():
    return Deep().init(jax.random.key(0), jnp.ones((1, 3)))["params"]


def test_the_rates_decay_with_the_depth_below_the_head():
    params = deep_params()
    optim = replace(PLAIN, depth_decay=0.5, weight_decay=0.1)
    (updates,), _ = updates_of(optim.for_network(Deep()).make_tx(4), params, [jax.tree.map(jnp.ones_like, params)])
    for name, rate in (("head", 1.0), ("block.1", 0.5), ("stem", 0.25)):
        for leaf, p in zip(jax.tree.leaves(updates[name]), jax.tree.leaves(params[name]), strict=True):
            np.testing.assert_allclose(leaf, -rate * (1 + 0.1 * p), rtol=1e-6)  # The decay, too.


def test_the_body_is_frozen_in_the_first_epochs():
    params, optim = deep_params(), Adam(learning_rate=0.1, freeze_epochs=1, schedule="one_cycle").for_network(Deep())
    tx = optim.make_tx(num_steps=8, num_epochs=4)  # 2 steps per epoch.
    grads = [jax.tree.map(jnp.ones_like, params)] * 4
    updates, _ = updates_of(tx, params, grads)
    head = [float(update["head"]["bias"][0]) for update in updates]
    body = [float(update["block.1"]["bias"][0]) for update in updates]
    schedule = Adam(learning_rate=0.1, schedule="one_cycle").make_schedule(8)
    np.testing.assert_allclose(head, [-schedule(i) for i in range(4)], rtol=1e-4)
    np.testing.assert_allclose(body, [0, 0, -schedule(2), -schedule(3)], rtol=1e-4)
    for step, names in ((0, ("block.1", "stem")), (1, ("block.1", "stem")), (2, ())):
        assert {*optim.frozen(params, step, 8, 4)} == {*names}


@pytest.mark.parametrize("times", [{"start_epoch": 1}, {"num_epochs": 3}])
def test_groups_that_are_frozen_in_some_epochs_need_the_number_of_epochs(times):
    optim = replace(PLAIN, groups=(ParamGroup("x", **times),))
    message = r"`num_epochs` must be the number of epochs .* such as .x., got None\. Call `make_tx\(num_steps, num"
    with pytest.raises(UserError, match=message):
        optim.make_tx(8)
    optim.make_tx(8, 4)


def test_gradients_of_the_frozen_body_change_nothing():
    """Therefore they need not be computed."""
    params, optim = deep_params(), Adam(learning_rate=0.1, freeze_epochs=1, ema=0.5).for_network(Deep())
    ones = jax.tree.map(jnp.ones_like, params)
    zero = {**jax.tree.map(jnp.zeros_like, params), "head": ones["head"]}
    results = [updates_of(optim.make_tx(8, 4), params, [first, first, ones])[1] for first in (ones, zero)]
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_own_groups_come_before_the_layers():
    optim = replace(PLAIN, depth_decay=0.5, groups=(ParamGroup("stem/bias", multiplier=8.0),)).for_network(Deep())
    params = deep_params()
    (updates,), _ = updates_of(optim.make_tx(4), params, [jax.tree.map(jnp.ones_like, params)])
    assert float(updates["stem"]["bias"][0]), float(updates["stem"]["kernel"][0, 0]) == (-8.0, -0.25)


def test_fine_tuning_needs_the_depths_of_the_network():
    with pytest.raises(
        UserError, match=r"`model` must have a method depths\(\) -> .* got Dense without it\. Set `optim"
    ):
        Adam(freeze_epochs=1).for_network(nn.Dense(3))
    with pytest.raises(UserError, match=r"must be 0 and `optim.depth_decay` 1 without a network, got 0 and 0\.9"):
        Adam(depth_decay=0.9).make_tx(10)
    assert Adam().for_network(nn.Dense(3)) == Adam()


def test_a_group_may_have_its_own_weight_decay():
    optim = replace(PLAIN, weight_decay=0.1, groups=(ParamGroup("bias", weight_decay=0.0, multiplier=2.0),))
    params = {"bias": jnp.ones(2), "kernel": jnp.ones(2)}
    (updates,), _ = updates_of(optim.make_tx(1), params, [jax.tree.map(jnp.ones_like, params)])
    np.testing.assert_allclose(updates["bias"], -2.0)
    np.testing.assert_allclose(updates["kernel"], -1.1, rtol=1e-6)


@pytest.mark.parametrize("wrapped", [{}, {"accumulate_steps": 2}, {"groups": (ParamGroup("head", multiplier=0.5),)}])
def test_the_average_of_the_parameters_is_evaluated(wrapped):
    params = deep_params()
    tx = replace(PLAIN, ema=0.9, **wrapped).make_tx(4)
    state = TrainState(jnp.int32(0), params, {}, tx.init(params))
    grads = jax.tree.map(jnp.ones_like, params)
    for _ in range(2):
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        state = TrainState(state.step + 1, optax.apply_updates(state.params, updates), {}, opt_state)
    first, last = params["stem"]["bias"][0], state.params["stem"]["bias"][0]
    steps = 1 if "accumulate_steps" in wrapped else 2
    expected, x = float(first), float(first)
    for t in range(1, steps + 1):
        x -= 1.0
        expected = t / (9 + t) * expected + 9 / (9 + t) * x
    assert float(last) == x
    np.testing.assert_allclose(eval_params(state)["stem"]["bias"][0], expected, rtol=1e-6)
