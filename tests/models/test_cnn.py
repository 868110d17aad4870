from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cnnjax import CNN, UserError
from cnnjax.layers.modules import Dropout

pytestmark = pytest.mark.usefixtures("quick_compilation")


def init_params(model, shape):
    return jax.jit(partial(model.init, train=False))(jax.random.key(0), jnp.zeros((1, *shape)))["params"]


def count_params(model, shape):
    params = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, *shape)))["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("shape", "num_classes"), [((32, 32, 3), 10), ((28, 28, 1), 10), ((32, 32, 3), 100), ((9, 15, 4), 3)]
)
def test_parameter_count_by_formula(shape, num_classes):
    h, w, c = shape
    conv = sum(9 * i * o + o for i, o in ((c, 32), (32, 32), (32, 64), (64, 64)))
    flat = (h // 2 // 2) * (w // 2 // 2) * 64
    dense = flat * 512 + 512 + 512 * num_classes + num_classes
    assert count_params(CNN(num_classes), shape) == conv + dense


def test_the_cifar10_network_has_the_parameter_count_of_the_tutorial():
    assert count_params(CNN(), (32, 32, 3)) == 2_168_362  # As Keras prints for the same layers.


def test_logits_equal_those_of_plain_operations():
    model, rng = CNN(7), np.random.default_rng(0)
    image = rng.normal(size=(3, 8, 9, 2)).astype(np.float32)
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), image)
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / 8, shapes)
    params = variables["params"]

    @jax.jit
    def plain(x):
        for i in range(4):
            kernel, bias = params[f"Conv_{i}"]["kernel"], params[f"Conv_{i}"]["bias"]
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x = nn.relu(x + bias[None, None, None])
            if i % 2:
                x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(len(x), -1)
        x = nn.relu(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None])
        return x @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"][None]

    logits = jax.jit(partial(model.apply, train=False))(variables, image)
    assert logits.shape == (3, 7)
    expected = plain(image)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * float(jnp.abs(expected).max()))


def test_dropout_follows_each_group_of_convolutions_and_the_hidden_layer():
    model, rates = CNN(conv_dropout=0.2, dense_dropout=0.3), []

    def record(next_call, args, kwargs, context):
        if isinstance(context.module, Dropout):
            rates.append((context.module.rate, kwargs["train"]))
        return next_call(*args, **kwargs)

    key, image = jax.random.key(0), jnp.zeros((1, 8, 8, 3))
    with nn.intercept_methods(record):
        jax.eval_shape(partial(model.init, train=True), {"params": key, "dropout": key}, image)
    assert rates == [(0.2, True), (0.2, True), (0.3, True)]


def test_kernels_are_drawn_from_the_initializer():
    """He et al. 2015, equation 10, or Glorot and Bengio 2010, equation 16; always the latter for the logits."""
    glorot, he = (init_params(CNN(256, kernel_init=name), (8, 8, 3)) for name in ("glorot_uniform", "he_normal"))
    assert he["Conv_3"]["kernel"].std() == pytest.approx(np.sqrt(2 / 576), rel=0.02)
    assert he["Dense_0"]["kernel"].std() == pytest.approx(np.sqrt(2 / 256), rel=0.02)
    assert glorot["Conv_3"]["kernel"].std() == pytest.approx(np.sqrt(2 / (576 + 576)), rel=0.02)
    assert glorot["Dense_0"]["kernel"].std() == pytest.approx(np.sqrt(2 / (256 + 512)), rel=0.02)
    for params in (glorot, he):
        assert params["Dense_1"]["kernel"].std() == pytest.approx(np.sqrt(2 / (512 + 256)), rel=0.02)
        assert not params["Conv_3"]["bias"].any() and not params["Dense_0"]["bias"].any()


def test_the_smallest_images():
    image = jnp.ones((2, 4, 4, 3))
    logits, _ = jax.jit(partial(CNN(5).init_with_output, train=False))(jax.random.key(0), image)
    assert logits.shape == (2, 5) and np.isfinite(logits).all()
    with pytest.raises(UserError, match=r"Images must have at least 4×4 pixels for CNN, got 30×3\."):
        CNN(5).init(jax.random.key(0), jnp.ones((2, 30, 3, 3)), train=False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_activations_have_the_dtype_and_logits_are_float32(dtype):
    dtypes = []

    def record(next_call, args, kwargs, context):
        y = next_call(*args, **kwargs)
        dtypes.append(str(y.dtype))
        return y

    with nn.intercept_methods(record):
        logits, variables = jax.eval_shape(
            partial(CNN(dtype=dtype).init_with_output, train=False), jax.random.key(0), jnp.zeros((1, 8, 8, 3))
        )
    assert dtypes == [dtype] * 9 + ["float32"]  # Four convolutions, three dropouts, two dense layers, and the network.
    assert logits.dtype == np.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "float31"}, "`model.dtype` must be a known name, got 'float31'. Did you mean float32"),
        ({"kernel_init": "he_norm"}, "`model.kernel_init` must be a known name, .* Did you mean he_normal"),
        ({"conv_dropout": 1.0}, r"`model.conv_dropout` must be between 0 and 0\.99, got 1\.0\."),
        ({"dense_dropout": -0.1}, r"`model.dense_dropout` must be between 0 and 0\.99, got -0\.1\."),
    ],
)
def test_invalid_options(fields, message):
    with pytest.raises(UserError, match=message):
        CNN(**fields)


def test_pooled_features_are_sown():
    """The logits are those of the last two layers."""
    model, image = CNN(3), np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(0), image)
    assert variables.keys() == {"params"}
    logits, sown = model.apply(variables, image, train=False, mutable=["intermediates"])
    (pooled,) = sown["intermediates"]["pooled"]
    assert pooled.shape == (2, 2 * 2 * 64)
    hidden, last = (variables["params"][f"Dense_{i}"] for i in range(2))
    x = np.maximum(np.asarray(pooled) @ hidden["kernel"] + hidden["bias"][None], 0)
    np.testing.assert_allclose(x @ last["kernel"] + last["bias"][None], logits, rtol=1e-4, atol=1e-5)
