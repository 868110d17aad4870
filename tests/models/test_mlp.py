from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cnnjax import MLP, UserError
from cnnjax.layers.modules import Dropout

pytestmark = pytest.mark.usefixtures("quick_compilation")
INIT = {"params": jax.random.key(0), "dropout": jax.random.key(1)}


@pytest.mark.parametrize(("shape", "num_classes"), [((28, 28, 1), 10), ((32, 32, 3), 100), ((1, 1, 3), 5)])
def test_parameter_count_by_formula(shape, num_classes):
    params = jax.eval_shape(partial(MLP(num_classes).init, train=False), INIT, jnp.zeros((1, *shape)))["params"]
    expected = np.prod(shape) * 512 + 512 + 512 * 512 + 512 + 512 * num_classes + num_classes
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


def test_logits_equal_numpy():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(3, 4, 5, 2)).astype(np.float32)
    shapes = jax.eval_shape(partial(MLP(7).init, train=False), INIT, image)
    variables = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 20, jnp.float32), shapes)
    x = image.reshape(3, -1).astype(np.float64)
    for i in range(3):
        layer = variables["params"][f"Dense_{i}"]
        x = x @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"], np.float64)
        x = np.maximum(x, 0) if i < 2 else x
    np.testing.assert_allclose(MLP(7).apply(variables, image, train=False), x, rtol=1e-4, atol=1e-5)


def test_dropout_follows_both_hidden_layers():
    rates = []

    def record(next_call, args, kwargs, context):
        if isinstance(context.module, Dropout):
            rates.append((context.module.rate, kwargs["train"]))
        return next_call(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(partial(MLP(dense_dropout=0.1).init, train=True), INIT, jnp.zeros((1, 4, 4, 1)))
    assert rates == [(0.1, True), (0.1, True)]


def test_kernels_are_drawn_from_the_initializer():
    """See `test_cnn.py`."""
    image = jnp.zeros((1, 16, 16, 1))
    glorot, he = (
        jax.jit(partial(MLP(256, kernel_init=name).init, train=False))(INIT, image)["params"]
        for name in ("glorot_uniform", "he_normal")
    )
    for i, fan_in in enumerate((256, 512)):
        assert he[f"Dense_{i}"]["kernel"].std() == pytest.approx(np.sqrt(2 / fan_in), rel=0.02)
        assert glorot[f"Dense_{i}"]["kernel"].std() == pytest.approx(np.sqrt(2 / (fan_in + 512)), rel=0.02)
    for params in (glorot, he):
        assert params["Dense_2"]["kernel"].std() == pytest.approx(np.sqrt(2 / (512 + 256)), rel=0.02)


def test_logits_are_float32():
    """The activations, here in bfloat16, are not."""
    image = np.random.default_rng(0).normal(size=(4, 4, 4, 1)).astype(np.float32)
    variables = jax.jit(partial(MLP().init, train=False))(INIT, image)
    exact, rounded = (
        jax.jit(partial(MLP(dtype=dtype).apply, train=False))(variables, image) for dtype in ("float32", "bfloat16")
    )
    assert rounded.dtype == jnp.float32
    np.testing.assert_array_equal(rounded, rounded.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(rounded, exact, atol=0.02 * float(jnp.abs(exact).max()))
    assert jnp.any(rounded != exact)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "float31"}, "`model.dtype` must be a known name, got 'float31'. Did you mean float32"),
        ({"kernel_init": "he_norm"}, "`model.kernel_init` must be a known name, .* Did you mean he_normal"),
        ({"dense_dropout": 1.0}, r"`model.dense_dropout` must be between 0 and 0\.99, got 1\.0\."),
    ],
)
def test_invalid_options(fields, message):
    with pytest.raises(UserError, match=message):
        MLP(**fields)
