"""The layer table and the FLOPs, by formulas and by the numbers that the networks' authors publish."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from programs.plain_network import PlainNetwork

from cnnjax.models.cnn import CNN
from cnnjax.models.efficientnet import EfficientNetLite0
from cnnjax.models.mlp import MLP
from cnnjax.models.resnet import ResNet18, ResNet50
from cnnjax.models.speednet import SpeedNet
from cnnjax.network import Functions
from cnnjax.state import abstract_state
from cnnjax.summary import Layer, forward_flops, layer_table


def conv(height, width, kernel_size, channels, features):
    """Returns the multiplications and additions of a convolution whose result has this size."""
    return 2 * height * width * kernel_size**2 * channels * features


def lite0():
    """Returns the FLOPs of EfficientNet-Lite0 at 64×64: stages of (depth, kernel size, stride, expansion, width)."""
    stages = [(1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112)]
    stages += [(4, 5, 2, 6, 192), (1, 3, 1, 6, 320)]
    size, channels, total = 32, 32, conv(32, 32, 3, 3, 32)
    for depth, kernel_size, stride, expansion, width in stages:
        for i in range(depth):
            wide = expansion * channels
            total += conv(size, size, 1, channels, wide) if expansion > 1 else 0
            size //= stride if i == 0 else 1
            total += conv(size, size, kernel_size, 1, wide) + conv(size, size, 1, wide, width)
            channels = width
    return total + conv(size, size, 1, 320, 1280) + 2 * 1280 * 7


CNN_FLOPS = conv(8, 12, 3, 3, 32) + conv(8, 12, 3, 32, 32) + conv(4, 6, 3, 32, 64) + conv(4, 6, 3, 64, 64)
SPEEDNET_FLOPS = [conv(15, 15, 2, 1, 8), conv(14, 14, 3, 8, 4), 2 * conv(7, 7, 3, 4, 4), conv(6, 6, 3, 4, 6)]
SPEEDNET_FLOPS += [2 * conv(3, 3, 3, 6, 6), conv(2, 2, 3, 6, 5), 2 * conv(1, 1, 3, 5, 5), 2 * 5 * 7]


@pytest.mark.parametrize(
    ("model", "image_shape", "flops"),
    [
        (MLP(7), (6, 5, 2), 2 * (60 * 512 + 512 * 512 + 512 * 7)),
        (CNN(7), (8, 12, 3), CNN_FLOPS + 2 * (2 * 3 * 64 * 512 + 512 * 7)),
        (SpeedNet(7, (4, 6, 5), 3, "bfloat16"), (16, 16, 1), sum(SPEEDNET_FLOPS)),
        (SpeedNet(7, (4, 6, 5), 3, plain=True), (16, 16, 1), sum(SPEEDNET_FLOPS)),
        (EfficientNetLite0(7), (64, 64, 3), lite0()),
    ],
)
def test_flops_equal_those_by_hand(model, image_shape, flops):
    assert forward_flops(model, image_shape) == flops


@pytest.mark.parametrize(("model", "num_params", "macs"), [(ResNet18, 11_689_512, 1.81), (ResNet50, 25_557_032, 4.09)])
def test_residual_networks_have_the_published_numbers(model, num_params, macs):
    """Source: torchvision's table of pretrained weights, for 1000 classes and 224×224 pixels."""
    layers = layer_table(model(1000), (224, 224, 3))
    assert sum(layer.num_params for layer in layers) == num_params
    assert round(sum(layer.flops for layer in layers) / 2e9, 2) == macs


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.relu(nn.Dense(5)(x) * self.param("scale", nn.initializers.ones, (1, 5))), None


class Nested(nn.Module):
    """Modules in modules, one that is called twice, a loop of three, and a kernel of the network itself."""

    num_classes: int = 3

    @nn.compact
    def __call__(self, image, *, train):
        x = nn.Conv(4, (3, 3), strides=2, padding="VALID")(image)
        x = nn.BatchNorm(not train)(x).mean((1, 2))
        twice = nn.Dense(4, name="twice")
        x, _ = Block(name="block")(twice(nn.Dropout(0.5, deterministic=not train)(twice(x))))
        x, _ = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()(x, None)
        x = jax.lax.cond(x.sum() > 0, lambda x: x @ jnp.ones((5, 5)), lambda x: x, x)
        return x @ self.param("head", nn.initializers.ones, (5, self.num_classes)), x


def test_the_layers_of_a_network_of_a_user():
    """The parameters and the operations of a row are its own, in the unit of one image."""
    layers = layer_table(Nested(), (9, 7, 2))
    assert layers == [
        Layer("Conv_0", "Conv", (4, 3, 4), 3 * 3 * 2 * 4 + 4, conv(4, 3, 3, 2, 4)),
        Layer("BatchNorm_0", "BatchNorm", (4, 3, 4), 8, 0),
        Layer("twice", "Dense", (4,), 20, 2 * 2 * 16),
        Layer("Dropout_0", "Dropout", (4,), 0, 0),
        Layer("block", "Block", (5,), 5, 0),
        Layer("block/Dense_0", "Dense", (5,), 25, 2 * 20),
        Layer("ScanBlock_0", "Block", (5,), 3 * 5, 0),
        Layer("ScanBlock_0/Dense_0", "Dense", (5,), 3 * 30, 3 * 2 * 25),
        Layer("Nested", "Nested", (3,), 15, 2 * 15 + 2 * 25),
    ]
    params = abstract_state((9, 7, 2), model=Nested(), tx=optax.identity()).params
    assert sum(layer.num_params for layer in layers) == sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def test_the_layers_of_other_networks_are_their_parameters():
    layers = layer_table(PlainNetwork(width=4), (2, 3, 1))
    assert [layer[:4] for layer in layers[:-1]] == [
        ("bias", "parameters", (), 10),
        ("head", "parameters", (), 40),
        ("hidden", "parameters", (), 24),
    ]
    assert layers[-1] == Layer("forward pass", "", (10,), 0, 2 * (24 + 40 + 40))  # The norm of the head, too.
    one = Functions(
        lambda key, image: {"params": jnp.ones((6, 3))}, lambda v, x, key, train: (x[:, 0, 0] @ v["params"], {})
    )
    assert layer_table(one, (1, 1, 6))[0] == Layer("params", "parameters", (), 18, 0)
