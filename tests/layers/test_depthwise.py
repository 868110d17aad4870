"""Depthwise and strided convolutions, and the blocks of the networks for photos."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import select_kernels

from cnnjax.layers.blocks import ConvNorm
from cnnjax.layers.depthwise import depthwise_conv2d, plain_depthwise_conv2d, strided_conv2d
from cnnjax.models.resnet import max_pool_3x3

RNG = np.random.default_rng(0)
SHAPES = [  # (height, width, kernel size, stride, padding)
    (6, 9, 3, 1, ((1, 1), (1, 1))),
    (6, 9, 3, 2, ((0, 1), (1, 1))),
    (7, 8, 5, 2, ((2, 2), (1, 2))),
    (2, 1, 5, 1, ((2, 2), (2, 2))),
    (9, 6, 3, 3, ((1, 0), (0, 0))),
]


def reference(image, kernel, padding, stride):
    """Returns the cross-correlation by loops, in float64; a kernel [I J C] is depthwise."""
    image = np.pad(np.asarray(image, np.float64), ((0, 0), *padding, (0, 0)))
    (i, j), rule = kernel.shape[:2], "bijc,ijc->bc" if kernel.ndim == 3 else "bijc,ijck->bk"
    rows, columns = range(0, image.shape[1] - i + 1, stride), range(0, image.shape[2] - j + 1, stride)
    parts = [[np.einsum(rule, image[:, y : y + i, x : x + j], kernel) for x in columns] for y in rows]
    return np.moveaxis(np.array(parts), 2, 0)


@pytest.mark.parametrize(
    ("h", "w", "size", "stride", "padding", "dtype"),
    [(*shape, "float32") for shape in SHAPES] + [(*shape, "bfloat16") for shape in SHAPES[1:3]],
)
@pytest.mark.parametrize("kind", ["depthwise", "plain depthwise", "full", "plain full", "xla depthwise", "xla full"])
@pytest.mark.usefixtures("quick_compilation")
def test_convolutions_and_their_gradients_equal_loops(kind, h, w, size, stride, padding, dtype, monkeypatch):
    """Both gradients are the transposes of a linear map: <g, conv(direction)> = <gradient, direction>."""
    select_kernels("xla" if "xla" in kind else "onednn", monkeypatch)
    shape = (size, size, 18) if "depthwise" in kind else (size, size, 18, 7)
    image = jnp.asarray(RNG.normal(size=(2, h, w, 18)), dtype)
    kernel = jnp.asarray(jnp.asarray(RNG.normal(size=shape), dtype), jnp.float32)
    convolve = {
        "depthwise": depthwise_conv2d,
        "xla depthwise": depthwise_conv2d,
        "plain depthwise": plain_depthwise_conv2d,
        "full": strided_conv2d,
        "xla full": strided_conv2d,
        "plain full": partial(strided_conv2d, plain=True),
    }[kind]
    expected = reference(image, kernel, padding, stride)
    g = jnp.asarray(RNG.normal(size=expected.shape), dtype)

    @jax.jit
    def with_gradients(image, kernel, g):
        y, pullback = jax.vjp(lambda image, kernel: convolve(image, kernel, padding, stride), image, kernel)
        return y, *pullback(g)

    y, image_grad, kernel_grad = with_gradients(image, kernel, g)
    assert (y.dtype, image_grad.dtype, kernel_grad.dtype) == (image.dtype, image.dtype, jnp.float32)
    tolerance = {"float32": 1e-5, "bfloat16": 0.02}[dtype]
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=tolerance * np.abs(expected).max())
    wide = np.asarray(g, np.float64)
    for grad, at in ((image_grad, 0), (kernel_grad, 1)):
        direction = RNG.normal(size=grad.shape)
        moved = reference(*((direction, kernel) if at == 0 else (image, direction)), padding, stride)
        scale = np.linalg.norm(wide) * np.linalg.norm(moved)
        inner = np.sum(np.asarray(grad, np.float64) * direction)
        np.testing.assert_allclose(inner, np.sum(wide * moved), atol=tolerance * scale)


def test_max_pool_equals_a_loop():
    image = RNG.normal(size=(2, 5, 8, 3)).astype(np.float32) - 5
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    expected = [[padded[:, y : y + 3, x : x + 3].max((1, 2)) for x in (0, 2, 4, 6)] for y in (0, 2, 4)]
    np.testing.assert_array_equal(max_pool_3x3(jnp.asarray(image)), np.moveaxis(np.array(expected), 2, 0))
    assert max_pool_3x3(jnp.asarray(image, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.usefixtures("quick_compilation")
def test_conv_norm_equals_numpy():
    """Also its running statistics, the padding of TensorFlow, and the bound of the ReLU."""
    image = jnp.asarray(RNG.normal(size=(4, 6, 5, 3)), jnp.float32)
    model = ConvNorm(8, 3, 2, relu=6.0, same=True, momentum=0.99, epsilon=1e-3)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(RNG.uniform(0.5, 4, size=leaf.shape), jnp.float32),
        jax.eval_shape(partial(model.init, train=False), jax.random.key(0), image),
    )
    params, stats = jax.device_get((variables["params"], variables["batch_stats"]["norm"]))
    x = reference(image, params["kernel"], ((0, 1), (1, 1)), 2)  # SAME: an even height is padded below only.
    y, after = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))(variables, image)
    evaluated = jax.jit(partial(model.apply, train=False))(variables, image)
    for got, mean, var in ((y, x.mean((0, 1, 2)), x.var((0, 1, 2))), (evaluated, stats["mean"], stats["var"])):
        expected = (x - mean) / np.sqrt(var + 1e-3) * params["norm"]["scale"] + params["norm"]["bias"]
        assert got.max() == 6 and got.min() == 0
        np.testing.assert_allclose(got, np.clip(expected, 0, 6), atol=1e-4)
    new = jax.device_get(after["batch_stats"]["norm"])
    np.testing.assert_allclose(new["mean"], 0.99 * stats["mean"] + 0.01 * x.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(new["var"], 0.99 * stats["var"] + 0.01 * x.var((0, 1, 2)), rtol=1e-4)


@pytest.mark.parametrize("features", [None, 3])
@pytest.mark.usefixtures("quick_compilation")
def test_plain_blocks_can_be_differentiated_in_forward_mode(features):
    image = jnp.asarray(RNG.normal(size=(1, 4, 4, 2)), jnp.float32)
    model = ConvNorm(features, 3, 2, plain=True)
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(0), image)
    apply = partial(model.apply, variables, train=False)
    jacobians = [jax.jit(jac(apply))(image) for jac in (jax.jacfwd, jax.jacrev)]
    np.testing.assert_allclose(*jacobians, atol=1e-5)
