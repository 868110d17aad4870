"""Networks of other libraries: each equals a training loop that is written with its library alone."""

from dataclasses import replace
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from programs import equinox_network, nnx_network, plain_network
from programs.equinox_network import EquinoxNetwork
from programs.nnx_network import NnxNetwork
from programs.plain_network import PlainNetwork
from programs.research import make_arrays

from cnnjax import (
    SGD,
    Batch,
    Config,
    Functions,
    ParamGroup,
    eval_step,
    init_state,
    load_run,
    train_and_evaluate,
    train_step,
)
from cnnjax.cli.main import main

pytestmark = pytest.mark.usefixtures("quick_compilation")
KEY, STEP_KEY, TX = jax.random.key(0), jax.random.key(1), optax.sgd(0.1, momentum=0.9)
IMAGE = np.random.default_rng(0).normal(size=(8, 3, 2, 1)).astype(np.float32)
BATCH = Batch(IMAGE, np.arange(8, dtype=np.int32) % 4, np.ones(8, bool))
SIZES = {"width": 6, "num_classes": 4}


def mean_loss(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, BATCH.label).mean()


def by_nnx():
    """Returns the losses of three steps and of the evaluation after them, the parameters, and the other state."""
    net = nnx.jit(lambda: nnx_network.Net(6, *SIZES.values(), nnx.Rngs(KEY)))()
    optimizer = nnx.Optimizer(net, TX, wrt=nnx.Param)

    @nnx.jit
    def step(net, optimizer, key):
        loss, grads = nnx.value_and_grad(lambda net: mean_loss(net(IMAGE, nnx.Rngs(dropout=key))))(net)
        optimizer.update(net, grads)
        return loss

    net.train()
    losses = [step(net, optimizer, jax.random.fold_in(STEP_KEY, i)) for i in range(3)]
    net.eval()
    loss = nnx.jit(lambda net: mean_loss(net(IMAGE)))(net)
    return [*losses, loss], nnx.state(net, nnx.Param), nnx.state(net, nnx.BatchStat)


def by_equinox():
    net, state = eqx.nn.make_with_state(equinox_network.Net)(6, *SIZES.values(), KEY)
    opt_state = TX.init(eqx.filter(net, eqx.is_inexact_array))

    def apply(net, state, keys):
        batched = jax.vmap(net, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))
        logits, state = batched(IMAGE, state, keys)
        return mean_loss(logits), state

    @eqx.filter_jit
    def step(net, state, opt_state, key):
        keys = jax.random.split(key, 8)
        (loss, state), grads = eqx.filter_value_and_grad(apply, has_aux=True)(net, state, keys)
        updates, opt_state = TX.update(grads, opt_state)
        return eqx.apply_updates(net, updates), state, opt_state, loss

    losses = []
    for i in range(3):
        net, state, opt_state, loss = step(net, state, opt_state, jax.random.fold_in(STEP_KEY, i))
        losses.append(loss)
    loss, _ = eqx.filter_jit(apply)(eqx.nn.inference_mode(net), state, None)
    return [*losses, loss], eqx.filter(net, eqx.is_inexact_array), state


def by_hand():
    """Returns what `by_nnx` does, by other formulas for everything that is not `jax.random`."""
    keys = jax.random.split(KEY, 3)
    params = {
        "hidden": jax.random.normal(keys[0], (6, 6)) / np.sqrt(6),
        "head": jax.random.normal(keys[1], (6, 4)) / np.sqrt(6),
        "bias": jnp.zeros(4),
    }
    mean, var, u = np.zeros(6), np.ones(6), jax.random.normal(keys[2], (6,))

    def loss_of(params, mean, var, u, keep):
        x = jnp.einsum("nhwc,hwcf->nf", IMAGE, params["hidden"].reshape(3, 2, 1, 6))
        mean, var = (jnp.mean(x, 0), jnp.var(x, 0)) if mean is None else (mean, var)
        x = jax.nn.relu(jax.nn.standardize(x, mean=mean, variance=var, axis=0, epsilon=1e-5)) * keep
        sigma = jnp.sqrt(u @ params["head"] @ params["head"].T @ u)
        logits = jnp.einsum("nf,fk->nk", x, params["head"]) / sigma + params["bias"]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), BATCH.label[:, None], axis=1).mean()

    loss_and_grads = jax.jit(jax.value_and_grad(loss_of))
    params = jax.device_get(params)
    losses, momentum = [], jax.tree.map(np.zeros_like, params)
    for i in range(3):
        key = jax.random.fold_in(STEP_KEY, i)
        keep = ~jax.random.bernoulli(key, 0.2, (8, 6)) / 0.8
        head = np.float64(params["head"])
        u = head @ head.T @ np.asarray(u)
        u = (u / np.linalg.norm(u)).astype(np.float32)
        x = IMAGE.reshape(8, 6) @ params["hidden"]
        mean, var = 0.9 * mean + 0.1 * x.mean(0), 0.9 * var + 0.1 * x.var(0)
        with jax.numpy_rank_promotion("allow"):
            loss, grads = loss_and_grads(params, None, None, u, keep)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + np.asarray(g), momentum, grads)
        params = jax.tree.map(lambda p, m: p - np.float32(0.1) * m, params, momentum)
        losses.append(loss)
    with jax.numpy_rank_promotion("allow"):
        loss = jax.jit(loss_of)(params, jnp.float32(mean), jnp.float32(var), u, 1.0)
    return [*losses, loss], params, {"batch_stats": {"mean": mean, "var": var}, "spectral": u}


def assert_close(got, expected):
    """Compares the leaves, because the containers are those of each library."""
    got, expected = jax.tree.leaves(got), jax.tree.leaves(expected)
    assert len(got) == len(expected) > 1
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), got, expected)


NETWORKS = {
    "nnx": (NnxNetwork(**SIZES), by_nnx),
    "equinox": (EquinoxNetwork(**SIZES), by_equinox),
    "plain": (PlainNetwork(**SIZES), by_hand),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_another_library_equals_a_loop_by_that_library(name):
    model, loop = NETWORKS[name]
    state = init_state(KEY, IMAGE[:1], model=model, tx=TX)
    first, losses = state, []
    for _ in range(3):
        state, metrics = train_step(state, BATCH, STEP_KEY, model=model, tx=TX)
        losses.append(metrics.loss / 8)
    assert jax.tree.leaves(first.params)[0].is_deleted()
    before = jax.device_get(jax.tree.leaves(state.model_state))
    losses.append(eval_step(state, BATCH, model=model).loss / 8)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.leaves(state.model_state))

    expected_losses, params, model_state = loop()
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert_close(state.params, params)
    assert_close(state.model_state, model_state)
    assert jax.tree.structure(state) == jax.tree.structure(first)  # As `lax.scan` requires.


def test_two_functions_are_a_network():
    model = PlainNetwork(**SIZES)
    functions = Functions(model.init, model.apply)
    assert functions == Functions(model.init, model.apply)  # So it is compiled once.
    state = init_state(KEY, IMAGE, model=functions, tx=TX)
    expected = init_state(KEY, IMAGE, model=model, tx=TX)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    got, _ = train_step(state, BATCH, STEP_KEY, model=functions, tx=TX)
    expected, _ = train_step(expected, BATCH, STEP_KEY, model=model, tx=TX)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


class Counting(eqx.Module):
    """Counts how often it is called."""

    weight: jax.Array
    count: eqx.nn.StateIndex

    def __call__(self, image, state):
        return image.reshape(len(image), -1) @ self.weight, state.set(self.count, state.get(self.count) + 1)


def test_an_equinox_state_is_used_again_by_an_optimizer_that_calls_the_loss():
    def make():
        return eqx.nn.make_with_state(Counting)(jnp.ones((6, 4)), eqx.nn.StateIndex(jnp.int32(0)))

    def init(key, image):
        net, state = make()
        return {"params": net.weight, "state": state}

    def apply(variables, image, key, train):
        net = eqx.tree_at(lambda net: net.weight, make()[0], variables["params"])
        logits, state = net(image, variables["state"])
        return logits, {"state": state}

    def update(updates, state, params, value_fn):
        return -0.1 * updates * value_fn(params), state

    model, tx = Functions(init, apply), optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    state = init_state(KEY, IMAGE, model=model, tx=tx)
    state, _ = train_step(state, BATCH, STEP_KEY, model=model, tx=tx)
    assert jax.tree.leaves(state.model_state) == [1]  # The optimizer's calls change nothing.
    x = IMAGE.reshape(8, 6).astype(np.float64)
    grads = x.T @ (0.25 - np.eye(4)[BATCH.label]) / 8
    np.testing.assert_allclose(state.params, 1 - 0.1 * grads * np.log(4), rtol=1e-5)


def test_parameters_that_are_not_a_dict_have_no_names_to_freeze():
    model = EquinoxNetwork(**SIZES)
    state = init_state(KEY, IMAGE, model=model, tx=TX)
    optim = SGD(groups=(ParamGroup("head", num_epochs=0),))
    assert optim.frozen(state.params, 0, 4, 1) == ()
    with pytest.raises(ValueError, match=r"`frozen` must be .* names in the parameters \(\[\]\), got \('head',\)"):
        train_step(state, BATCH, STEP_KEY, model=model, tx=TX, frozen=("head",))


# --- Errors ---------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    @nn.compact
    def __call__(self, image):
        return nn.Dense(4)(image.reshape(len(image), -1))


PLAIN = PlainNetwork(**SIZES)


def returns(variables=None, changed: Any = None):
    """Returns a network whose functions return something else."""

    def apply(*args):
        logits, _ = PLAIN.apply(*args)
        return logits if changed == "none" else (logits, changed)

    return Functions(PLAIN.init if variables is None else lambda key, image: variables, apply)


ONES = jnp.ones(3)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Linear, r"`model` must be a Linen module, or .* got the class Linear\. Create an instance"),
        (
            nnx.Linear(2, 2, rngs=nnx.Rngs(0)),
            r"got an object of Linear\. .* for Flax NNX, Equinox .*`cnnjax.Functions`",
        ),
        (eqx.nn.Linear(2, 2, key=KEY), r"`model` must be a Linen module, .* got an object of Linear\. .* Equinox"),
        (returns(ONES), r'`model.init` must return a dict with "params", got .* from '),
        (returns({"weights": ONES}), r"`model.init` must return a dict with \"params\", got \['weights'\]"),
        (returns({"params": {"w": ONES, "count": jnp.int32(0)}}), r"got int32\[\] at \['params'\]\['count'\]\. Return"),
        (returns({"params": {"w": ONES, "key": KEY}}), r"got key<fry>\[\] at \['params'\]\['key'\]\. Return other"),
        (returns({"params": ONES, "state": {"f": nn.relu}}), r"must return arrays, .* at \['state'\]\['f'\]\. .* keep"),
        (returns(changed="none"), r"must return \(logits, dict of changed entries\), got float32\[8, 4\]\."),
        (
            returns(changed={"stats": ONES}),
            r"entries of those of `init` .*'batch_stats', 'spectral'.*, got \['stats'\]",
        ),
        (returns(changed={"spectral": ONES}), r"must keep the .* of 'spectral', float32\[6\], got float32\[3\]\."),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_an_invalid_network(model, message):
    with pytest.raises(ValueError, match=message):
        state = init_state(KEY, IMAGE, model=model, tx=TX)
        train_step(state, BATCH, STEP_KEY, model=model, tx=TX)


def test_a_class_in_a_later_step():
    state = init_state(KEY, IMAGE, model=Linear(), tx=TX)
    with pytest.raises(ValueError, match=r"`model` must be a Linen module, .* got the class Linear\."):
        eval_step(state, BATCH, model=Linear)


# --- In the loop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_another_library_in_the_loop(name, tmp_path):
    config = Config(
        dataset=make_arrays(),
        num_epochs=2,
        batch_size=16,
        validation_fraction=0.0,
        model=replace(NETWORKS[name][0], num_classes=10),
        optim=SGD(learning_rate=0.05, groups=(ParamGroup("head", multiplier=0.5),)),
    )
    run = train_and_evaluate(config, run_dir=tmp_path / "run")
    assert run.test_accuracy > 0.9
    assert run.config.model.num_classes == 4
    restored = load_run(tmp_path / "run", config).state
    assert jax.tree.structure(restored) == jax.tree.structure(run.state)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(restored), jax.tree.leaves(run.state))


def test_a_network_of_another_library_on_the_command_line(tmp_path, prepared_dir, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--model.width", "5", "--num-epochs", "1", "--dataset", "generated", "--data-dir", str(prepared_dir)]
    main(["train", plain_network.__file__, *options])
    num_params = 28 * 28 * 5 + 5 * 10 + 10
    assert f"plainnetwork ({num_params:,} parameters)" in capsys.readouterr().out
