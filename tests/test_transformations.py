"""The networks under the transformations of JAX, against plain Flax modules with the same parameters."""

import json
import pickle
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from cnnjax import CNN, MLP, Batch, SpeedNet, eval_step, init_state, train_step
from cnnjax.layers.conv import conv2d
from cnnjax.layers.norm import batch_norm_gelu
from cnnjax.layers.ops import dense, gelu, max_pool_2x2, plain_max_pool_2x2
from cnnjax.onednn import calls as onednn

pytestmark = pytest.mark.usefixtures("quick_compilation")
PROGRAM = Path(__file__).parent / "programs" / "meshes.py"
KEY, LABEL = jax.random.key(0), np.arange(4) % 3


class FlaxCNN(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        for features in (32, 64):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(512)(x.reshape(len(x), -1)))
        return nn.Dense(3)(x)


class FlaxMLP(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.relu(nn.Dense(512)(x.reshape(len(x), -1)))
        x = nn.relu(nn.Dense(512)(x))
        return nn.Dense(3)(x)


class FlaxSpeedNet(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        c, norms = x.shape[-1], iter(range(9))
        kernel = self.variable("batch_stats", "whiten", lambda: {"kernel": jnp.zeros((2, 2, c, 8 * c))}).value["kernel"]
        bias = self.param("whiten", lambda _: {"bias": jnp.zeros(8 * c)})["bias"]
        x = nn.Conv(8 * c, (2, 2), padding="VALID", parent=None).apply({"params": {"kernel": kernel, "bias": bias}}, x)
        x = nn.gelu(x)
        for width in (3, 4, 5):
            conv = partial(nn.Conv, width, (3, 3), use_bias=False)
            norm = partial(nn.BatchNorm, not train, momentum=0.6, epsilon=1e-12, use_scale=False)
            x = nn.max_pool(conv()(x), (2, 2), (2, 2))
            x = first = nn.gelu(norm(name=f"NormGelu_{next(norms)}")(x))
            x = nn.gelu(norm(name=f"NormGelu_{next(norms)}")(conv()(x)))
            x = nn.gelu(norm(name=f"NormGelu_{next(norms)}")(conv()(x)) + first)
        return x.max((1, 2)) @ self.param("head", nn.initializers.zeros, (5, 3)) / 9


SPEEDNET = partial(SpeedNet, 3, (3, 4, 5), 3)
NETWORKS = {  # Without dropout, which Flax draws differently.
    "cnn": (partial(CNN, 3, conv_dropout=0.0, dense_dropout=0.0), FlaxCNN(), (6, 5, 2)),
    "mlp": (partial(MLP, 3, dense_dropout=0.0), FlaxMLP(), (3, 3, 1)),
    "speednet": (SPEEDNET, FlaxSpeedNet(), (17, 18, 2)),
}


def drawn_variables(model, image):
    """Returns variables drawn by NumPy, which compiles nothing; as from Glorot, but biases and statistics are not 0."""
    rng = np.random.default_rng(1)

    def draw(leaf):
        if leaf.ndim == 1:
            return jnp.asarray(rng.uniform(0.01, 0.05, leaf.shape), jnp.float32)
        fan_in, fan_out = np.prod(leaf.shape[:-1]), np.prod(leaf.shape[:-2]) * leaf.shape[-1]
        return jnp.asarray(rng.normal(size=leaf.shape) * np.sqrt(2 / (fan_in + fan_out)), jnp.float32)

    def init(image):
        variables = model.init(KEY, image, train=False)
        return model.init_from_data(variables, image) if isinstance(model, SpeedNet) else variables

    return jax.tree.map(draw, jax.eval_shape(init, image))


@pytest.fixture(params=NETWORKS, scope="module")
def network(request):
    """Returns a function that builds the network, Flax's network, drawn variables, and images."""
    make, flax, shape = NETWORKS[request.param]
    image = np.random.default_rng(0).normal(size=(4, *shape)).astype(np.float32)
    return make, flax, drawn_variables(make(), image), image


# For SpeedNet these compile for half a minute, and CNN has the same operations except for the norm and GELU.
mostly = pytest.mark.parametrize(
    "network",
    [pytest.param(name, marks=pytest.mark.slow if name == "speednet" else ()) for name in NETWORKS],
    indirect=True,
)


def loss_of(model, variables, image, train=True):
    """Returns a function of the parameters that returns the loss, and (logits, updated statistics)."""
    rest = {name: value for name, value in variables.items() if name != "params"}

    def loss(params):
        logits, after = model.apply({"params": params, **rest}, image, train=train, mutable=[*rest])
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABEL[: len(image)]).mean(), (logits, after)

    return loss


def assert_trees_near(got, wanted, tolerance):
    """Compares leaves with a tolerance relative to the largest value of the tree."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=tolerance * scale), got, wanted)


def test_plain_and_fast_networks_equal_flax_in_training(network):
    make, flax, variables, image = network

    def run(model):
        return jax.jit(jax.value_and_grad(loss_of(model, variables, image), has_aux=True))(variables["params"])

    wanted = run(flax)
    for model in (make(), make(plain=True)):
        for got, expected in zip(jax.tree.leaves(run(model)), jax.tree.leaves(wanted), strict=True):
            assert got.dtype == jnp.float32
            np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())


@mostly
def test_derivatives_of_plain_networks_equal_flax(network):
    """Forward mode, and the product of the Hessian and a vector in all modes."""
    make, flax, variables, image = network
    params, rng = variables["params"], np.random.default_rng(1)
    along = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)

    def functions(model):
        loss = loss_of(model, variables, image)
        return (lambda p: loss(p)[0]), (lambda p: jax.grad(loss, has_aux=True)(p)[0])

    @jax.jit
    def derivatives(params, along):
        loss, grad = functions(make(plain=True))
        first = jax.jvp(loss, (params,), (along,))[1], jax.linearize(loss, params)[1](along)
        second = (
            jax.jvp(grad, (params,), (along,))[1],
            jax.grad(lambda p: jax.jvp(loss, (p,), (along,))[1])(params),
            jax.grad(lambda p: optax.tree.vdot(grad(p), along))(params),
        )
        return first, second

    first, second = derivatives(params, along)
    _, grad = functions(flax)

    @jax.jit
    def wanted_derivatives(params, along):
        gradient, product = jax.jvp(grad, (params,), (along,))
        return optax.tree.vdot(gradient, along), product

    wanted_first, wanted = wanted_derivatives(params, along)
    for got in first:
        np.testing.assert_allclose(got, wanted_first, rtol=1e-3)
    for got in second:
        assert_trees_near(got, wanted, 1e-3)


@mostly
def test_hessian_and_gradients_of_each_example_equal_flax(network):
    make, flax, variables, image = network

    @partial(jax.jit, static_argnums=0)
    def run(model, image):
        def score(image):
            return jnp.sum(jax.nn.log_softmax(model.apply(variables, image, train=False)) ** 2)

        def loss(params, image):
            return loss_of(model, {**variables, "params": params}, image[None], train=False)(params)[0]

        corner = lambda x: score(image[:1].at[0, :2, :2].set(x))  # noqa: E731
        return jax.hessian(corner)(image[0, :2, :2]), jax.vmap(jax.grad(loss), (None, 0))(variables["params"], image)

    got, wanted = run(make(plain=True), image), run(flax, image)
    assert np.abs(wanted[0]).max() > 0
    for a, b in zip(got, wanted, strict=True):
        assert_trees_near(a, b, 1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2**-6)])
def test_dropout_masks_of_plain_and_fast_networks_are_equal(dtype, tolerance):
    image = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)
    variables = drawn_variables(CNN(), image)

    @partial(jax.jit, static_argnums=0)
    def logits(plain, key):
        return CNN(dtype=dtype, plain=plain).apply(variables, image, train=True, rngs={"dropout": key})

    fast, plain, other = logits(False, KEY), logits(True, KEY), logits(True, jax.random.key(1))
    assert_trees_near(plain, fast, tolerance)
    assert np.abs(other - fast).max() > 10 * tolerance * np.abs(fast).max()


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_gradients_at_ties_are_equal(platform, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    x = jnp.asarray(np.random.default_rng(0).integers(-1, 2, (2, 7, 9, 5)), jnp.float32)
    g = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 4, 5)), jnp.float32)
    with_nan = x.at[0, 0, 0].set(jnp.nan)
    (plain, plain_nan), (fast, fast_nan) = (
        jax.jit(lambda pool=pool: (jax.vjp(pool, x)[1](g)[0], pool(with_nan)))()
        for pool in (plain_max_pool_2x2, max_pool_2x2)
    )
    np.testing.assert_allclose(plain, fast, rtol=1e-6)
    np.testing.assert_array_equal(plain_nan, fast_nan)


@pytest.mark.slow
def test_plain_networks_are_divided_among_devices():
    """With explicit axes and with `jax.shard_map`, on four simulated devices, the gradient is that of one device."""
    done = subprocess.run([sys.executable, PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert errors.keys() == {f"{name} {way}" for name in ("cnn", "speednet") for way in ("explicit", "shard_map")}
    assert max(errors.values()) < 1e-3, errors


# --- Dtypes -----------------------------------------------------------------------------------------------------------


FEW = [
    (CNN, "bfloat16", False),
    (CNN, "float16", True),
    (MLP, "bfloat16", False),
    (SPEEDNET, "float32", False),
    (SPEEDNET, "float16", False),
    (SPEEDNET, "bfloat16", True),
]


@pytest.mark.parametrize(
    ("make", "dtype", "plain"),
    [
        pytest.param(*case, marks=() if case in FEW else pytest.mark.slow)
        for case in product((CNN, MLP, SPEEDNET), ("float32", "bfloat16", "float16"), (False, True))
    ],
)
def test_strict_promotion_and_x64_keep_float32(make, dtype, plain):
    model = make(dtype=dtype, plain=plain)

    def run(image):
        variables = model.init(KEY, image, train=False)
        variables = model.init_from_data(variables, image) if isinstance(model, SpeedNet) else variables
        rest = {name: value for name, value in variables.items() if name != "params"}

        def loss(params):
            options = {"train": True, "mutable": [*rest], "rngs": {"dropout": KEY}}
            logits, after = model.apply({"params": params, **rest}, image, **options)
            return logits.mean(), (logits, after)

        return variables, jax.grad(loss, has_aux=True)(variables["params"]), model.apply(variables, image, train=False)

    image = jax.ShapeDtypeStruct((2, 9, 9, 2), jnp.float32)
    with jax.numpy_dtype_promotion("strict"):
        wanted = jax.eval_shape(run, image)
        with jax.enable_x64(True):
            got = jax.eval_shape(run, jax.ShapeDtypeStruct(image.shape, jnp.float64))
    assert {leaf.dtype for leaf in jax.tree.leaves(wanted)} == {jnp.dtype("float32")}
    assert got == wanted


class MixedDtypes(nn.Module):
    @nn.compact
    def __call__(self, image):
        x = nn.Dense(4, param_dtype=jnp.bfloat16, dtype=jnp.float32)(image.reshape(len(image), -1))
        return nn.Dense(4)(x)


@pytest.mark.parametrize("x64", [False, True], ids=["float32", "x64"])
def test_steps_under_strict_promotion(x64):
    model, tx, image = MixedDtypes(), optax.adam(0.1), np.ones((2, 3, 3, 1), np.float32)
    batch = Batch(image, np.zeros(2, np.int32), np.ones(2, bool))
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("strict"):
        state = jax.eval_shape(partial(init_state, model=model, tx=tx), KEY, image)
        after, _ = jax.eval_shape(partial(train_step, model=model, tx=tx), state, batch, KEY)
        metrics = jax.eval_shape(partial(eval_step, model=model), state, batch)
    assert after == state
    assert metrics.values["accuracy"].dtype == jnp.int32


def test_x64_keeps_the_bits_of_the_initial_parameters():
    image = np.zeros((1, 4, 4, 1), np.float32)
    init = lambda: jax.jit(partial(CNN().init, train=False))(KEY, image)  # noqa: E731
    wanted = init()
    with jax.enable_x64(True):
        jax.tree.map(np.testing.assert_array_equal, init(), wanted)


# --- The fast kernels -------------------------------------------------------------------------------------------------

MESSAGE = (
    "`model` must use plain XLA operations to be differentiated twice or in forward mode, got fast kernels. Build it "
    "with `plain=True`, or without `conv_general_dilated`."
)
X = jnp.ones((1, 4, 4, 2))
OPERATIONS = {
    "conv2d": lambda x: conv2d(x, jnp.ones((3, 3, 2, 2)), None, ((1, 1), (1, 1)), False),
    "dense": lambda x: dense(x.reshape(4, 8), jnp.ones((8, 3))),
    "gelu": gelu,
    "max_pool_2x2": max_pool_2x2,
    "batch_norm_gelu": lambda x: batch_norm_gelu(x, jnp.ones(2))[0],
}


def differentiated(way, f):
    """Returns a function of `x` that computes a derivative of the sum of `f(x)`."""
    loss = lambda x: jnp.sum(f(x) ** 2)  # noqa: E731
    return {
        "forward": lambda x: jax.jvp(loss, (x,), (x,)),
        "Hessian": jax.hessian(loss),
        "reverse over forward": jax.grad(lambda x: jax.jvp(loss, (x,), (x,))[1]),
        "forward over reverse": lambda x: jax.jvp(jax.grad(loss), (x,), (x,)),
        "reverse over reverse": jax.grad(lambda x: jnp.sum(jax.grad(loss)(x) ** 2)),
    }[way]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("way", ["forward", "reverse over forward"])
def test_a_fast_operation_in_forward_mode_names_the_switch(name, way):
    with pytest.raises(TypeError) as raised:
        differentiated(way, OPERATIONS[name])(X)
    assert str(raised.value) == MESSAGE


@mostly
@pytest.mark.parametrize("jitted", [False, True], ids=["called", "jitted"])
@pytest.mark.parametrize("way", ["forward over reverse", "reverse over reverse", "Hessian"])
def test_the_second_derivative_of_a_fast_network_names_the_switch(network, way, jitted):
    if not onednn.in_use():
        pytest.skip("XLA's kernels can be differentiated twice")
    make, _, variables, image = network
    f = partial(make().apply, variables, train=False)
    f = differentiated(way, jax.jit(f) if jitted else f)
    with pytest.raises(TypeError) as raised:
        (jax.jit(f) if jitted else f)(image)
    assert str(raised.value) == MESSAGE


def test_forward_mode_within_jit_raises_an_error_of_jax():
    with pytest.raises(TypeError, match=r"can't apply forward-mode autodiff \(jvp\) to a custom_vjp function"):
        jax.jit(differentiated("forward", OPERATIONS["dense"]))(X)


# --- Modules as values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [CNN, MLP, SPEEDNET], ids=["cnn", "mlp", "speednet"])
def test_networks_are_pickled_compared_and_hashed_by_value(make):
    model = make(dtype="bfloat16")
    jax.eval_shape(partial(model.init, train=False), KEY, jnp.zeros((1, 9, 9, 1)))
    copy = pickle.loads(pickle.dumps(model))
    assert copy == model == make(dtype="bfloat16") and hash(copy) == hash(model)
    assert model != make(dtype="bfloat16", plain=True)
