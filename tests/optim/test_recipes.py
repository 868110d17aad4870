"""The built-in optimizers, against NumPy in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax import SGD, Adam, Muon, ParamGroup, SpeedNet, UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")
RNG = np.random.default_rng(0)


def draw(shape):
    return RNG.normal(size=shape).astype(np.float32)


def train(tx, params, grads):
    """Returns the parameters after one update per gradient."""
    state, update = tx.init(params), jax.jit(tx.update)
    for grad in grads:
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_first_update_of_adam_by_hand():
    # m / (1 - b1) = g and v / (1 - b2) = g², so the first update is -lr * g / (|g| + eps).
    params = {"kernel": jnp.array([[1.0, 2.0]]), "bias": jnp.array([3.0])}
    grads = {"kernel": jnp.array([[0.5, -4.0]]), "bias": jnp.array([1e-8])}
    params = train(Adam(learning_rate=0.01).make_tx(1), params, [grads])
    np.testing.assert_allclose(params["kernel"], [[0.99, 2.01]], rtol=1e-6)
    np.testing.assert_allclose(params["bias"], [2.995], rtol=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_adam_equals_numpy(weight_decay):
    """Kernels decay, apart from the moments; biases do not."""
    b1, b2, rate = 0.8, 0.95, 0.1
    start, grads = draw((2, 3)), [draw((2, 3)) for _ in range(3)]
    tx = Adam(learning_rate=rate, b1=b1, b2=b2, weight_decay=weight_decay).make_tx(3)
    params = {"kernel": jnp.asarray(start), "bias": jnp.asarray(start[0])}
    params = train(tx, params, [{"kernel": grad, "bias": grad[0]} for grad in grads])

    def expected(decay):
        p, m, v = start.astype(np.float64), 0.0, 0.0
        for t, grad in enumerate(grads, start=1):
            m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
            p = p - rate * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + 1e-8) + decay * p)
        return p

    np.testing.assert_allclose(params["kernel"], expected(weight_decay), rtol=1e-5)
    np.testing.assert_allclose(params["bias"], expected(0.0)[0], rtol=1e-5)


class NumpySGD:
    """SGD with Nesterov momentum; weight decay within the momentum."""

    def __init__(self, momentum, weight_decay):
        self.momentum, self.weight_decay, self.trace = momentum, weight_decay, 0.0

    def update(self, p, grad, rate):
        grad = grad + self.weight_decay * p
        self.trace = self.momentum * self.trace + grad
        return p - rate * (grad + self.momentum * self.trace)


class NumpyMuon:
    """The orthogonalized Nesterov momentum, added to the kernel at norm sqrt(K)."""

    def __init__(self, momentum):
        self.momentum, self.trace = momentum, 0.0

    def update(self, p, grad, rate):
        num_features = p.shape[-1]
        self.trace = self.momentum * self.trace + grad
        ahead = (grad + self.momentum * self.trace).reshape(-1, num_features)
        x = ahead / np.linalg.norm(ahead)
        for _ in range(3):  # Keller Jordan (2024): the quintic with these coefficients.
            gram = x.T @ x
            x = 3.4445 * x + x @ (-4.7750 * gram + 2.0315 * gram @ gram)
        return p * np.sqrt(num_features) / np.linalg.norm(p) - rate * x.reshape(p.shape)


def assert_trained_as_by_numpy(optim, params, numpy_rule, num_steps, num_epochs):
    """`numpy_rule(path, leaf)` returns the rule of a parameter and its learning rates, one per step."""
    params = jax.tree.map(lambda leaf: draw(leaf.shape), params)
    grads = [jax.tree.map(lambda leaf: draw(leaf.shape), params) for _ in range(num_steps)]
    got = train(optim.make_tx(num_steps, num_epochs), jax.tree.map(jnp.asarray, params), grads)

    def expected(path, leaf, *grads):
        rule, rates = numpy_rule(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        p = leaf.astype(np.float64)
        for grad, rate in zip(grads, rates, strict=True):
            p = rule.update(p, grad.astype(np.float64), rate)
        return p

    def assert_near(path, p, wanted):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(p, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max(), err_msg=name)

    jax.tree.map_with_path(assert_near, got, jax.tree.map_with_path(expected, params, *grads))


@pytest.mark.parametrize("name", ["sgd", "muon"])
def test_the_speednet_recipe_equals_numpy(name):
    """Every parameter of the network, with the groups and the schedule of the records.

    Multipliers scale the learning rate but not the weight decay per update, and the whitening bias stops after two of
    three epochs.
    """
    model = SpeedNet(widths=(4, 6, 5), depth=3)
    params = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 9, 9, 3)))["params"]
    multipliers = {"whiten/bias": 3.0, "head": 0.5}
    options = {
        "learning_rate": 0.1,
        "schedule": "one_cycle",
        "warmup": 1 / 3,
        "weight_decay": 0.2,
        "groups": (
            ParamGroup("^whiten/", multiplier=3.0, num_epochs=2),
            ParamGroup(r"^NormGelu_\d+/bias$", multiplier=8.0),
            ParamGroup("^head$", multiplier=0.5),
        ),
    }
    optim = SGD(momentum=0.7, **options) if name == "sgd" else Muon(momentum=0.6, sgd_momentum=0.7, **options)
    rates = np.array([0.0, 0.05, 0.1, 0.075, 0.05, 0.025])

    def numpy_rule(path, leaf):
        if leaf.ndim == 4:
            return NumpySGD(0.7, 0.2) if name == "sgd" else NumpyMuon(0.6), rates
        multiplier = multipliers.get(path, 8.0)
        trained = np.arange(6) < (4 if path == "whiten/bias" else 6)
        return NumpySGD(0.7, 0.2 / multiplier), multiplier * rates * trained

    assert_trained_as_by_numpy(optim, params, numpy_rule, num_steps=6, num_epochs=3)


@pytest.mark.parametrize("name", ["sgd", "muon"])
def test_a_group_of_kernels_equals_numpy(name):
    """A group may hold kernels, which Muon still orthogonalizes, beside other parameters."""
    shapes = {"Conv_0": {"kernel": (3, 3, 2, 4), "bias": (4,)}, "Conv_1": {"kernel": (1, 1, 4, 6), "bias": (6,)}}
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, np.float32), shapes, is_leaf=lambda x: type(x) is tuple
    )
    optim = (SGD if name == "sgd" else Muon)(learning_rate=0.1, groups=(ParamGroup("^Conv_1/", multiplier=3.0),))

    def numpy_rule(path, leaf):
        rule = NumpyMuon(0.6) if name == "muon" and leaf.ndim == 4 else NumpySGD(0.85, 0.0)
        return rule, [0.1 * (3 if path.startswith("Conv_1") else 1)] * 2

    assert_trained_as_by_numpy(optim, params, numpy_rule, num_steps=2, num_epochs=1)


def test_muon_leaves_a_scale_of_four_dimensions_to_sgd():
    params = {"scale": jnp.full((1, 1, 1, 4), 1e-3), "kernel": jnp.zeros((3, 3, 1, 4))}
    grads = jax.tree.map(jnp.ones_like, params)
    params = train(Muon(learning_rate=0.1, sgd_momentum=0.5).make_tx(1), params, [grads])
    np.testing.assert_allclose(params["scale"], 1e-3 - 0.1 * 1.5, rtol=1e-6)
    assert np.isfinite(params["kernel"]).all()


@pytest.mark.parametrize(
    ("recipe", "field"), [(Adam, "b1"), (Adam, "b2"), (SGD, "momentum"), (Muon, "momentum"), (Muon, "sgd_momentum")]
)
def test_invalid_decay_rates(recipe, field):
    for value in (-0.1, 1.0):
        with pytest.raises(UserError, match=rf"`optim.{field}` must be at least 0 and below 1, got {value}\."):
            recipe(**{field: value})
    with pytest.raises(UserError, match=r"`optim.learning_rate` must be above 0"):  # As in every optimizer.
        recipe(learning_rate=0.0)
