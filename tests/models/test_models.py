from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cnnjax import CNN, MLP, ModelConfig, SpeedNet, UserError
from cnnjax.models.models import check_size, identity_init, make_model


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


@pytest.mark.parametrize("depth", [2, 3])
def test_the_parameter_count_of_the_records_network_by_formula(depth):
    widths, c = (64, 256, 128), 24  # Channels after whitening: 8 of each color.
    filters = 0
    for width in widths:
        filters += 9 * c * width + (depth - 1) * 9 * width * width
        c = width
    whitening, biases, head = 24, depth * sum(widths), 128 * 10  # Of the whitening the bias alone is trained.
    assert count(SpeedNet(10, widths, depth), (32, 32, 3)) == whitening + filters + biases + head


def test_make_model_takes_the_names_and_rates_of_the_configuration():
    assert make_model(ModelConfig(name="mlp", dense_dropout=0.1), 7) == MLP(7, dense_dropout=0.1)
    config = ModelConfig(name="cnn", conv_dropout=0.2, dense_dropout=0.3, kernel_init="he_normal")
    model = make_model(config, 7)
    assert (model.num_classes, model.conv_dropout, model.dense_dropout) == (7, 0.2, 0.3)
    kernel = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)["params"]["Dense_0"]["kernel"]
    assert kernel.std() == pytest.approx(np.sqrt(2 / 4096), rel=0.02)  # He et al. 2015, equation 10.


@pytest.mark.parametrize("train", [True, False])
def test_the_records_network_equals_one_of_plain_operations(train):
    model, rng = SpeedNet(10, (8, 16, 12), depth=3), np.random.default_rng(0)
    image = rng.normal(size=(4, 17, 20, 3)).astype(np.float32)
    apply = jax.jit(partial(model.apply, train=train, mutable=["batch_stats"]))
    drawn = jax.tree.map(
        lambda leaf: jnp.asarray(np.abs(rng.normal(size=leaf.shape)) + 0.1, jnp.float32),  # A variance is positive.
        jax.eval_shape(partial(model.init, train=False), jax.random.key(0), image),
    )
    params = drawn["params"]

    def conv(x, kernel, padding):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def norm(x, i):
        bias, stats = (drawn[kind][f"NormGelu_{i}"] for kind in ("params", "batch_stats"))
        mean, var = (x.mean((0, 1, 2)), x.var((0, 1, 2))) if train else (stats["mean"], stats["var"])
        return (x - mean[None, None, None]) / jnp.sqrt(var[None, None, None] + 1e-12) + bias["bias"][None, None, None]

    def group(x, i):
        x = pooled = nn.max_pool(conv(x, params[f"Conv_{3 * i}"]["kernel"], "SAME"), (2, 2), (2, 2))
        x = first = nn.gelu(norm(x, 3 * i))
        x = nn.gelu(norm(conv(x, params[f"Conv_{3 * i + 1}"]["kernel"], "SAME"), 3 * i + 1))
        return nn.gelu(norm(conv(x, params[f"Conv_{3 * i + 2}"]["kernel"], "SAME"), 3 * i + 2) + first), pooled

    @jax.jit
    def plain(image):
        x = conv(image, drawn["batch_stats"]["whiten"]["kernel"], "VALID") + params["whiten"]["bias"][None, None, None]
        x, pooled = group(nn.gelu(x), 0)
        for i in (1, 2):
            x, _ = group(x, i)
        return x.max((1, 2)) @ params["head"] / 9, pooled.mean((0, 1, 2))

    expected, mean = plain(image)
    got, after = apply(drawn, image)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * float(jnp.abs(expected).max()))
    before, after = drawn["batch_stats"], after["batch_stats"]
    np.testing.assert_array_equal(after["whiten"]["kernel"], before["whiten"]["kernel"])
    old, new = (stats["NormGelu_0"]["mean"] for stats in (before, after))
    np.testing.assert_allclose(new, 0.6 * old + 0.4 * mean if train else old, rtol=1e-3)


@pytest.mark.parametrize(("c", "k"), [(3, 8), (8, 3)])
def test_a_convolution_begins_as_the_identity_of_its_first_channels(c, k):
    kernel = identity_init(jax.random.key(0), (3, 3, c, k))
    image = np.random.default_rng(0).normal(size=(2, 6, 6, c)).astype(np.float32)
    y = jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_array_equal(y[..., : min(c, k)], image[..., : min(c, k)])
    assert np.abs(kernel).max(where=np.arange(k) >= c, initial=0) <= 1 / np.sqrt(9 * c)  # As PyTorch's: 1/sqrt(fan in).


@pytest.mark.parametrize(("name", "least"), [("cnn", 4), ("speednet", 9), ("mlp", 1)])
def test_the_smallest_images_of_each_network(name, least):
    config = ModelConfig(name=name, widths=(4, 4, 4))
    check_size(config, (least, least, 3))
    image = jnp.ones((2, least, least, 3))
    init_with_output = jax.jit(partial(make_model(config, 5).init_with_output, train=False))
    logits, _ = init_with_output(jax.random.key(0), image)
    assert logits.shape == (2, 5) and np.isfinite(logits).all()
    if least > 1:
        rule = rf"Images must have {least}×{least} pixels at least for `model.name` {name}, got {least - 1}×30\."
        with pytest.raises(UserError, match=rule):
            check_size(config, (least - 1, 30, 3))
