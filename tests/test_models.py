import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cnnjax import CNN, MLP, ModelConfig
from cnnjax.models import Dropout, make_model, max_pool_2x2


def count(model, shape):
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *shape)), train=False))["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("shape", "num_classes"), [((32, 32, 3), 10), ((28, 28, 1), 10), ((32, 32, 3), 100), ((9, 15, 4), 3)]
)
def test_parameter_counts_by_formula(shape, num_classes):
    h, w, c = shape
    conv = sum(9 * i * o + o for i, o in ((c, 32), (32, 32), (32, 64), (64, 64)))
    flat = (h // 2 // 2) * (w // 2 // 2) * 64
    assert count(CNN(num_classes), shape) == conv + flat * 512 + 512 + 512 * num_classes + num_classes
    assert count(MLP(num_classes), shape) == h * w * c * 512 + 512 + 512 * 512 + 512 + 512 * num_classes + num_classes


def test_the_cifar10_network_has_the_parameters_of_the_tutorial():
    assert count(CNN(10), (32, 32, 3)) == 2_168_362  # As Keras prints for the same layers.


@pytest.mark.parametrize("shape", [(2, 8, 6, 3), (2, 7, 5, 3)])
def test_max_pool_equals_flax_with_its_gradient(shape):
    x = jax.random.normal(jax.random.key(0), shape)  # No ties.
    weight = jax.random.normal(jax.random.key(1), (shape[0], shape[1] // 2, shape[2] // 2, shape[3]))

    def flax_pool(x):
        return nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))

    np.testing.assert_array_equal(max_pool_2x2(x), flax_pool(x))
    ours, theirs = (jax.grad(lambda x, f=f: jnp.sum(weight * f(x)))(x) for f in (max_pool_2x2, flax_pool))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.1])
def test_dropout_drops_its_share_and_keeps_the_mean(rate):
    x = jnp.ones((400, 512))
    y = np.asarray(Dropout(rate).apply({}, x, train=True, rngs={"dropout": jax.random.key(0)}))
    exact = round(rate * 256) / 256
    # Five standard deviations of a share over 204,800 draws.
    assert abs(np.mean(y == 0) - exact) < 5 * np.sqrt(exact * (1 - exact) / y.size)
    np.testing.assert_allclose(y[y != 0], 1 / (1 - exact), rtol=1e-6)
    # Units are dropped independently: neighbours within a 32-bit word of random bits, too.
    pairs = np.mean((y[:, ::2] == 0) & (y[:, 1::2] == 0))
    assert abs(pairs - exact**2) < 0.01


def test_dropout_is_off_in_evaluation_and_at_rate_0():
    x = jnp.ones((4, 8))
    np.testing.assert_array_equal(Dropout(0.5).apply({}, x, train=False), x)
    np.testing.assert_array_equal(Dropout(0.0).apply({}, x, train=True), x)


def test_make_model_takes_the_names_and_rates_of_the_configuration():
    assert make_model(ModelConfig(name="mlp", dense_dropout=0.1), 7) == MLP(7, dense_dropout=0.1)
    config = ModelConfig(name="cnn", conv_dropout=0.2, dense_dropout=0.3, kernel_init="he_normal")
    model = make_model(config, 7)
    assert (model.num_classes, model.conv_dropout, model.dense_dropout) == (7, 0.2, 0.3)
    kernel = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)["params"]["Dense_0"]["kernel"]
    assert kernel.std() == pytest.approx(np.sqrt(2 / 4096), rel=0.02)  # He et al. 2015, equation 10.


@pytest.mark.parametrize(("size", "c", "features"), [(32, 3, 32), (32, 32, 32), (16, 32, 64), (16, 64, 64)])
def test_the_convolutions_that_xla_picks_are_right_with_their_gradients(size, c, features):
    """At each shape of the network, against NumPy in float64: some of XLA's CPU kernels have been wrong."""
    rng = np.random.default_rng(0)
    x, kernel, cotangent = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((4, size, size, c), (3, 3, c, features), (4, size, size, features))
    )
    model = nn.Conv(features, (3, 3), use_bias=False)

    @jax.jit
    def forward_and_gradients(x, kernel):
        y, pullback = jax.vjp(lambda x, kernel: model.apply({"params": {"kernel": kernel}}, x), x, kernel)
        return y, *pullback(cotangent)

    def windows(x):
        padded = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
        return np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))  # [B H W C 3 3]

    turned = kernel[::-1, ::-1].astype(np.float64)
    expected = (
        np.einsum("bhwcij,ijck->bhwk", windows(x), kernel, optimize=True),
        np.einsum("bhwkij,ijck->bhwc", windows(cotangent), turned, optimize=True),
        np.einsum("bhwcij,bhwk->ijck", windows(x), cotangent, optimize=True),
    )
    for got, wanted in zip(forward_and_gradients(x, kernel), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())
