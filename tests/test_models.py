import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import CNN, MLP, ModelConfig, SpeedNet
from cnnjax.models import make_model


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
    whitening, biases, head = 2 * 2 * 3 * 24 + 24, depth * sum(widths), 128 * 10
    assert count(SpeedNet(10, widths, depth), (32, 32, 3)) == whitening + filters + biases + head


def test_make_model_takes_the_names_and_rates_of_the_configuration():
    assert make_model(ModelConfig(name="mlp", dense_dropout=0.1), 7) == MLP(7, dense_dropout=0.1)
    config = ModelConfig(name="cnn", conv_dropout=0.2, dense_dropout=0.3, kernel_init="he_normal")
    model = make_model(config, 7)
    assert (model.num_classes, model.conv_dropout, model.dense_dropout) == (7, 0.2, 0.3)
    kernel = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)["params"]["Dense_0"]["kernel"]
    assert kernel.std() == pytest.approx(np.sqrt(2 / 4096), rel=0.02)  # He et al. 2015, equation 10.
