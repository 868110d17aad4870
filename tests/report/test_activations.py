"""The feature maps, against what Flax captures, and against NumPy."""

from dataclasses import replace
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from programs.nnx_network import NnxNetwork

from cnnjax.config import Config
from cnnjax.layers.blocks import ConvNorm
from cnnjax.layers.modules import Conv, Dense
from cnnjax.layers.norm import NormGelu
from cnnjax.layers.ops import max_pool_2x2
from cnnjax.network import Functions
from cnnjax.report.activations import NUM_MAPS, feature_maps, first_filters
from cnnjax.runs.run import Run
from cnnjax.runs.schema import DataFacts
from cnnjax.state import abstract_state

IMAGE_SHAPE = (8, 10, 2)
IMAGE = np.random.default_rng(0).integers(0, 256, IMAGE_SHAPE).astype(np.uint8)
SHA256 = {"train": "0" * 64, "test": "0" * 64}
FACTS = DataFacts(IMAGE_SHAPE, tuple("abc"), SHA256, "1", "", (120.0, 130.0), (60.0, 70.0), "crop", "lanczos", None)


def make_run(model):
    """Returns a run with random parameters and statistics."""
    random = np.random.default_rng(1)
    shapes = abstract_state(IMAGE_SHAPE, model=model, tx=optax.identity())
    state = jax.tree.map(
        lambda x: jnp.asarray(random.uniform(0.1, 0.9, x.shape) - 0.4 * (len(x.shape) > 1), x.dtype), shapes
    )
    return Run(Path(), Config(model=model), FACTS, None, _trained=(state, [], []))


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


class Net(nn.Module):
    """Layers of cnnjax and of Flax, with functions between them."""

    num_classes: int = 3

    @nn.compact
    def __call__(self, image, *, train: bool):
        x = Conv(20, relu=True)(image)
        x = max_pool_2x2(x)
        y = ConvNorm(20, relu=6.0)(x, train=train)
        x = nn.relu(nn.BatchNorm(not train)(nn.Conv(20, (3, 3))(y)) + x)
        x = NormGelu()(x, train=train)
        x = nn.silu(nn.LayerNorm()(nn.Dense(6)(nn.avg_pool(x, (2, 2), (2, 2)))))
        x = nn.gelu(nn.Dense(5)(x.mean((1, 2))), approximate=False)
        return Dense(self.num_classes)(x).astype(jnp.float32)


def test_feature_maps_equal_the_outputs_that_flax_captures():
    run = make_run(Net())
    maps = feature_maps(run, IMAGE)
    assert [(m.name, m.operation, m.shape) for m in maps] == [
        ("Conv_0", "convolution", (8, 10, 20)),
        ("Conv_0", "ReLU", (8, 10, 20)),
        ("max-pool", "max-pool", (4, 5, 20)),
        ("ConvNorm_0", "convolution", (4, 5, 20)),
        ("ConvNorm_0/norm", "normalization", (4, 5, 20)),
        ("ConvNorm_0", "ReLU6", (4, 5, 20)),
        ("Conv_1", "convolution", (4, 5, 20)),
        ("BatchNorm_0", "normalization", (4, 5, 20)),
        ("addition", "addition", (4, 5, 20)),
        ("ReLU", "ReLU", (4, 5, 20)),
        ("NormGelu_0", "normalization", (4, 5, 20)),
        ("NormGelu_0", "GELU", (4, 5, 20)),
        ("average-pool", "average-pool", (2, 2, 20)),
        ("Dense_0", "dense", (2, 2, 6)),
        ("LayerNorm_0", "normalization", (2, 2, 6)),
        ("SiLU", "SiLU", (2, 2, 6)),
        ("mean", "mean", (6,)),
        ("Dense_1", "dense", (5,)),
        ("GELU", "GELU", (5,)),
        ("Dense_2", "logits", (3,)),
    ]
    _, captured = run.config.model.apply(
        {"params": run.state.params, **run.state.model_state},
        run.standardize(IMAGE[None]),
        train=False,
        capture_intermediates=True,
        mutable=["intermediates"],
    )
    outputs = {m.name: m for m in maps}  # The last operation of each module is its output.
    names = [
        "Conv_0",
        "ConvNorm_0",
        "Conv_1",
        "BatchNorm_0",
        "NormGelu_0",
        "Dense_0",
        "LayerNorm_0",
        "Dense_1",
        "Dense_2",
    ]
    for name in names:
        (expected,) = captured["intermediates"][name]["__call__"]
        shown = outputs[name].channels
        close(outputs[name].maps, np.asarray(expected)[0].reshape(*outputs[name].maps.shape[:2], -1)[..., shown])
    by_number = [m.maps for m in maps]
    assert by_number[0].min() < 0 and by_number[4].max() > 6
    close(by_number[1], np.maximum(by_number[0], 0))
    close(by_number[2], by_number[1].reshape(4, 2, 5, 2, -1).max((1, 3)))
    close(by_number[5], np.clip(by_number[4], 0, 6))
    close(by_number[9], np.maximum(by_number[8], 0))
    close(by_number[12], by_number[11][:, :4].reshape(2, 2, 2, 2, -1).mean((1, 3)))
    close(by_number[15], by_number[14] / (1 + np.exp(-by_number[14])))
    close(by_number[16][0, 0], by_number[15].mean((0, 1)))
    close(first_filters(run), run.state.params["Conv_0"]["kernel"])


def test_channels_that_vary_are_shown_and_kept_until_the_next_convolution():
    run = make_run(Net())
    conv, relu, pool, *_ = feature_maps(run, IMAGE)
    p = run.state.params["Conv_0"]
    every = nn.Conv(20, (3, 3)).apply({"params": p}, run.standardize(IMAGE[None]))[0]
    spread = np.asarray(every).std((0, 1))
    assert len(conv.channels) == NUM_MAPS and conv.channels == relu.channels == pool.channels
    assert min(spread[[*conv.channels]]) >= max(np.delete(spread, conv.channels))


def test_large_maps_are_reduced_to_the_means_of_blocks():
    image = np.random.default_rng(2).integers(0, 256, (140, 70, 2)).astype(np.uint8)

    def apply(variables, image, key, train):
        x = jax.nn.relu(image * variables["params"]["scale"])
        return x.mean((1, 2)), {}

    run = make_run(Functions(lambda key, image: {"params": {"scale": jnp.zeros((1, 1, 1, 2))}}, apply))
    run = replace(run, facts=replace(FACTS, image_shape=image.shape))
    (relu, *_) = feature_maps(run, image)
    full = np.maximum(run.standardize(image[None])[0] * run.state.params["scale"][0], 0)
    assert (relu.operation, relu.shape) == ("ReLU", (140, 70, 2))
    close(relu.maps, [[full[3 * i : 3 * i + 3, 3 * j : 3 * j + 3].mean((0, 1)) for j in range(23)] for i in range(46)])


def test_a_network_of_functions_with_channels_first():
    """As in Equinox and PyTorch: of one image, mapped over the batch."""

    def apply(variables, image, key, train):
        p = variables["params"]

        def of_one(x):
            x = jax.lax.conv_general_dilated(x.transpose(2, 0, 1)[None], p["kernel"], (2, 2), "SAME")[0]
            x = jax.nn.relu(x + p["bias"])
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2), (1, 2, 2), "VALID")
            return x.ravel() @ p["head"]

        return jax.vmap(of_one)(image), {}

    shapes = {"kernel": (6, 2, 3, 3), "bias": (6, 1, 1), "head": (6 * 2 * 2, 3)}
    run = make_run(Functions(lambda key, image: {"params": {k: jnp.zeros(s) for k, s in shapes.items()}}, apply))
    conv, relu, pool, logits = feature_maps(run, IMAGE)
    assert [m.operation for m in (conv, relu, pool, logits)] == ["convolution", "ReLU", "max-pool", "logits"]
    kernel, x = np.asarray(run.state.params["kernel"]), run.standardize(IMAGE[None])[0]
    x = np.pad(x, ((0, 1), (0, 1), (0, 0)))  # As SAME does for an even size and a stride of 2.
    expected = np.zeros((4, 5, 6))
    for i in range(4):
        for j in range(5):
            expected[i, j] = np.einsum("ijc,kcij->k", x[2 * i : 2 * i + 3, 2 * j : 2 * j + 3], kernel)
    close(conv.maps, expected + np.asarray(run.state.params["bias"])[:, 0, 0])
    close(relu.maps, np.maximum(conv.maps, 0))
    close(pool.maps, relu.maps[:, :4].reshape(2, 2, 2, 2, 6).max((1, 3)))
    close(logits.maps[0, 0], pool.maps.transpose(2, 0, 1).ravel() @ run.state.params["head"])
    close(first_filters(run), kernel.transpose(2, 3, 1, 0))


def test_a_network_of_flax_nnx_without_a_convolution():
    run = make_run(NnxNetwork(num_classes=3))
    assert first_filters(run) is None
    dense, norm, relu, logits = feature_maps(run, IMAGE)
    assert [m.operation for m in (dense, norm, relu, logits)] == ["dense", "normalization", "ReLU", "logits"]
    p, s = run.state.params, run.state.model_state["state"]["norm"]
    expected = run.standardize(IMAGE[None]).ravel() @ p["hidden"]["kernel"] + p["hidden"]["bias"]
    close(dense.maps[0, 0], expected)
    normal = (expected - s["mean"]) / np.sqrt(s["var"] + 1e-5) * p["norm"]["scale"] + p["norm"]["bias"]
    close(norm.maps[0, 0], normal)
    close(relu.maps[0, 0], np.maximum(normal, 0))
    close(logits.maps[0, 0], np.maximum(normal, 0) @ p["head"]["kernel"] + p["head"]["bias"])
