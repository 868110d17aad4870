"""Each operation with its gradient against NumPy in float64 or Flax: by oneDNN's kernels and by XLA's."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cnnjax.layers import onednn
from cnnjax.layers.conv import conv2d, convolution_on_accelerators, image_grad_by_xla, kernel_grad_by_xla
from cnnjax.layers.modules import (
    Conv,
    Dense,
    Dropout,
    dense,
    gelu,
    max_pool_2x2,
    max_pool_grad_by_comparison,
    max_pool_grad_by_index,
    max_pool_with_index,
)

# The kernels of this processor, those of processors that have less, and XLA's own.
NEEDS = {
    "onednn": onednn.AVAILABLE,
    "onednn without bfloat16": onednn.AVAILABLE and onednn.HAS_BFLOAT16,
    "onednn without AVX-512": onednn.AVAILABLE and onednn.HAS_AVX512,
    "xla": True,
}
KERNELS = [
    pytest.param(name, marks=pytest.mark.skipif(not has, reason="not of this processor")) for name, has in NEEDS.items()
]
SAME = ((1, 1), (1, 1))
# Height, width, channels, features, taps, padding: every shape of the networks, and odd ones.
CONVOLUTIONS = [
    (32, 32, 3, 32, 3, SAME),
    (32, 32, 32, 32, 3, SAME),
    (16, 16, 32, 64, 3, SAME),
    (16, 16, 64, 64, 3, SAME),
    (32, 32, 3, 24, 2, ((0, 0), (0, 0))),
    (31, 31, 24, 64, 3, SAME),
    (15, 15, 64, 128, 3, SAME),
    (7, 7, 128, 128, 3, SAME),
    (28, 28, 1, 32, 3, SAME),
    (27, 33, 16, 8, 3, ((2, 0), (0, 1))),
    (26, 31, 17, 5, 4, ((1, 2), (1, 2))),
    (5, 3, 2, 3, 2, ((0, 1), (0, 1))),
]
# Of the largest value. Sums are in float32; bfloat16 rounds the result to 8 bits, before and after the bias.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-7, "float16": 2**-10}


@pytest.fixture(params=KERNELS)
def kernels(request, monkeypatch):
    monkeypatch.setattr(onednn, "AVAILABLE", request.param != "xla")
    monkeypatch.setattr(onednn, "HAS_AVX512", request.param != "onednn without AVX-512" and onednn.HAS_AVX512)
    monkeypatch.setattr(onednn, "HAS_BFLOAT16", request.param == "onednn" and onednn.HAS_BFLOAT16)
    return request.param


@pytest.fixture
def accelerator(monkeypatch):
    """The layers compute on this CPU as they do on an accelerator."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *operands, cpu, default: default(*operands))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def draw(*shapes, dtype="float32"):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def windows(x, taps):
    return np.lib.stride_tricks.sliding_window_view(x, (taps, taps), axis=(1, 2))  # [B H W C I J]


def convolution_by_numpy(x, kernel, bias, g, padding, relu, positive=None):
    """Returns the result and the gradients of image, kernel and bias, in float64.

    `positive` is where the ReLU lets the gradient through: rounding decides it near 0.
    """
    x, kernel, bias, g = (np.asarray(a, np.float64) for a in (x, kernel, bias, g))
    taps = kernel.shape[0]
    patches = windows(np.pad(x, ((0, 0), *padding, (0, 0))), taps)
    y = np.einsum("bhwcij,ijck->bhwk", patches, kernel, optimize=True) + bias
    if relu:
        g = np.where(y > 0 if positive is None else positive, g, 0)
        y = np.maximum(y, 0)
    back = tuple((taps - 1 - low, taps - 1 - high) for low, high in padding)
    patches_of_g = windows(np.pad(g, ((0, 0), *back, (0, 0))), taps)
    image_grad = np.einsum("bhwkij,ijck->bhwc", patches_of_g, kernel[::-1, ::-1], optimize=True)
    return y, image_grad, np.einsum("bhwcij,bhwk->ijck", patches, g, optimize=True), g.sum((0, 1, 2))


def assert_near(got, wanted, tolerance):
    assert got.shape == wanted.shape
    np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize(("h", "w", "c", "k", "taps", "padding"), CONVOLUTIONS)
def test_convolution_equals_numpy_with_its_gradients(h, w, c, k, taps, padding, relu, dtype, kernels):
    size = [n + sum(pads) - taps + 1 for n, pads in zip((h, w), padding, strict=True)]
    batch_size = 3 if h % 2 else 4
    image, g = draw((batch_size, h, w, c), (batch_size, *size, k), dtype=dtype)
    kernel, bias = (a.astype(dtype).astype(jnp.float32) for a in draw((taps, taps, c, k), (k,)))

    @jax.jit
    def forward_and_gradients(image, kernel, bias, g):
        y, pullback = jax.vjp(lambda *operands: conv2d(*operands, padding, relu), image, kernel, bias)
        return y, *pullback(g)

    got = forward_and_gradients(image, kernel, bias, g)
    called = "__onednn$convolution" in forward_and_gradients.lower(image, kernel, bias, g).as_text()
    assert called == (kernels != "xla")
    assert [a.dtype for a in got] == [image.dtype, image.dtype, jnp.float32, jnp.float32]
    expected = convolution_by_numpy(image, kernel, bias, g, padding, relu, positive=got[0] > 0)
    for a, wanted in zip(got, expected, strict=True):
        assert_near(a, wanted, TOLERANCE[dtype] if a.dtype == dtype else 1e-4)


def test_without_avx512_several_products_in_one_call_are_refused(monkeypatch):
    """oneDNN's routine for them would wait for itself."""
    monkeypatch.setattr(onednn, "HAS_AVX512", False)
    with pytest.raises(ValueError, match=r"`a` must be one matrix .* without AVX-512, got the shape \(2, 3, 4\)"):
        onednn.matmul(*draw((2, 3, 4), (2, 4, 5)))


# 24 channels are filled up to 32 in 16 bits.
@pytest.mark.parametrize("channels", [5, 24])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_gradients_of_accelerators_equal_numpy(dtype, channels):
    padding = ((2, 0), (0, 1))
    image, kernel, bias, g = draw((4, 9, 8, channels), (3, 3, channels, 6), (6,), (4, 9, 7, 6), dtype=dtype)
    _, wanted_image, wanted_kernel, _ = convolution_by_numpy(image, kernel, bias, g, padding, False)
    got = kernel_grad_by_xla(image, g, padding=padding)
    assert got.dtype == jnp.float32
    assert_near(got, wanted_kernel, TOLERANCE[dtype])
    got = image_grad_by_xla(g, kernel, size=(9, 8), padding=padding)
    assert got.dtype == dtype
    assert_near(got, wanted_image, TOLERANCE[dtype])


# Taps, channels, padding, and what the shape is computed as in 16 bits: by a matrix product, or by how many channels.
ON_ACCELERATORS = [
    (2, 3, ((0, 0), (0, 0)), "product"),
    (2, 3, ((1, 0), (0, 1)), "product"),
    (1, 16, ((0, 0), (0, 0)), "product"),
    (3, 3, SAME, 3),
    (2, 5, ((0, 0), (0, 0)), 5),
    (3, 16, SAME, 32),
    (3, 24, SAME, 32),
    (3, 64, ((0, 1), (2, 0)), 64),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("taps", "channels", "padding", "computed"), ON_ACCELERATORS)
def test_the_convolution_of_accelerators_equals_numpy(taps, channels, padding, computed, dtype):
    image, kernel = draw((2, 7, 6, channels), (taps, taps, channels, 5), dtype=dtype)
    h, w = (n + sum(pads) - taps + 1 for n, pads in zip((7, 6), padding, strict=True))
    convolve = jax.jit(lambda image, kernel: convolution_on_accelerators(image, kernel, padding=padding))
    got = convolve(image, kernel)
    assert got.dtype == dtype
    wanted, *_ = convolution_by_numpy(image, kernel, np.zeros(5), np.zeros((2, h, w, 5)), padding, False)
    assert_near(got, wanted, TOLERANCE[dtype])
    program = convolve.lower(image, kernel).as_text()
    computed = channels if dtype == "float32" else computed
    assert ("stablehlo.dot_general" in program) == (computed == "product")
    assert re.findall(r"convolution\(.*\(tensor<2x7x6x(\d+)x", program) == [str(computed)] * (computed != "product")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("taps", "channels"), [(2, 3), (3, 24)])
def test_all_of_a_convolution_on_accelerators_equals_numpy(taps, channels, dtype, accelerator):
    """Its bias, ReLU and gradients, with what accelerators compute by."""
    low, high = (taps - 1) // 2, taps // 2
    padding = ((low, high), (low, high))
    image, g = draw((2, 7, 6, channels), (2, 7, 6, 8), dtype=dtype)
    kernel, bias = (a.astype(dtype).astype(jnp.float32) for a in draw((taps, taps, channels, 8), (8,)))
    y, pullback = jax.vjp(lambda *operands: conv2d(*operands, padding, True), image, kernel, bias)
    expected = convolution_by_numpy(image, kernel, bias, g, padding, True, positive=y > 0)
    for got, wanted in zip((y, *pullback(g)), expected, strict=True):
        assert_near(got, wanted, TOLERANCE[dtype])


def test_a_convolution_in_float16_is_xla_s(kernels):
    """oneDNN computes in float16 on few processors alone."""
    image, kernel, bias = draw((2, 8, 8, 16), (3, 3, 16, 4), (4,), dtype="float16")
    step = jax.jit(lambda *operands: conv2d(*operands, SAME, True))
    assert "onednn" not in step.lower(image, kernel, bias).as_text()
    wanted, *_ = convolution_by_numpy(image, kernel, bias, np.zeros((2, 8, 8, 4)), SAME, True)
    assert_near(step(image, kernel, bias), wanted, TOLERANCE["float16"])


def test_a_convolution_that_is_vmapped_equals_one_after_another(kernels):
    image, kernel = draw((3, 2, 8, 8, 4), (3, 3, 3, 4, 5))
    batched = jax.vmap(lambda image, kernel: conv2d(image, kernel, None, SAME, False))(image, kernel)
    for i in range(3):
        np.testing.assert_allclose(batched[i], conv2d(image[i], kernel[i], None, SAME, False), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dense_equals_numpy_with_its_gradients(dtype, kernels):
    x, g = draw((9, 130), (9, 70), dtype=dtype)
    (kernel,) = draw((130, 70))
    kernel = kernel.astype(dtype).astype(jnp.float32)
    y, pullback = jax.vjp(dense, x, kernel)
    x64, kernel64, g64 = (np.asarray(a, np.float64) for a in (x, kernel, g))
    for got, wanted in zip((y, *pullback(g)), (x64 @ kernel64, g64 @ kernel64.T, x64.T @ g64), strict=True):
        assert_near(got, wanted, TOLERANCE[dtype] if got.dtype == dtype else 1e-4)


@pytest.mark.parametrize(("ours", "theirs"), [(Conv(5, relu=True), nn.Conv(5, (3, 3))), (Dense(5), nn.Dense(5))])
def test_modules_hold_and_compute_what_flax_s_do(ours, theirs, kernels):
    (x,) = draw((4, 6, 6, 3) if isinstance(ours, Conv) else (4, 8))
    variables = theirs.init(jax.random.key(0), x)
    shapes = jax.tree.map(jnp.shape, variables)
    assert jax.tree.map(jnp.shape, ours.init(jax.random.key(0), x)) == shapes
    expected = theirs.apply(variables, x)
    expected = nn.relu(expected) if isinstance(ours, Conv) else expected
    np.testing.assert_allclose(ours.apply(variables, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("taps", "h", "w"), [(3, 7, 5), (3, 8, 6), (2, 7, 6), (1, 7, 6)])
def test_an_even_convolution_leaves_out_the_odd_row_and_column(taps, h, w, kernels):
    """Which a max pool does not read: after it, nothing differs, and no gradient."""
    x, weight = draw((2, h, w, 3), (2, h // 2, w // 2, 4))
    whole, even = Conv(4, taps), Conv(4, taps, even=True)
    variables = whole.init(jax.random.key(0), x)
    wanted = whole.apply(variables, x)[:, : h // 2 * 2, : w // 2 * 2]
    got = even.apply(variables, x)
    assert_near(got, np.asarray(wanted), 1e-6)

    def gradients(module):
        return jax.grad(lambda variables, x: jnp.sum(weight * max_pool_2x2(module.apply(variables, x))), (0, 1))

    jax.tree.map(
        lambda a, b: assert_near(a, np.asarray(b), 1e-5), gradients(even)(variables, x), gradients(whole)(variables, x)
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2**-8), ("float16", 2**-11)])
def test_gelu_equals_flax_with_its_gradient(dtype, tolerance):
    """Flax computes in float32 here; ours rounds each result once to its dtype."""
    x = jnp.linspace(-6, 6, 101).astype(dtype)
    g = jnp.linspace(1, 2, 101).astype(dtype)
    y, pullback = jax.vjp(gelu, x)
    wanted, flax_pullback = jax.vjp(nn.gelu, x.astype(jnp.float32))
    for got, b in ((y, wanted), (pullback(g)[0], flax_pullback(g.astype(jnp.float32))[0])):
        assert got.dtype == dtype
        np.testing.assert_allclose(np.asarray(got, np.float64), b, rtol=tolerance, atol=1e-7)


def flax_pool(x):
    return nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))


@pytest.mark.parametrize("shape", [(2, 8, 6, 3), (2, 7, 5, 3)])
def test_max_pool_equals_flax_with_its_gradient(shape):
    x, weight = draw(shape, (shape[0], shape[1] // 2, shape[2] // 2, shape[3]))  # No ties.
    np.testing.assert_array_equal(max_pool_2x2(x), flax_pool(x))
    ours, theirs = (jax.grad(lambda x, f=f: jnp.sum(weight * f(x)))(x) for f in (max_pool_2x2, flax_pool))
    np.testing.assert_array_equal(ours, theirs)


def test_values_that_tie_in_a_max_pool_share_its_gradient():
    x = jnp.array([[1.0, 0.0, 2.0, 2.0], [1.0, 1.0, 2.0, 2.0]])[None, :, :, None]
    grad = jax.grad(lambda x: jnp.sum(jnp.array([3.0, 4.0])[None, None, :, None] * max_pool_2x2(x)))(x)
    np.testing.assert_array_equal(grad[0, :, :, 0], [[1, 0, 1, 1], [1, 1, 1, 1]])


def draw_ties(h, w):
    """Returns images of three values alone, so that most windows have ties, and a gradient of their pools."""
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.integers(-1, 2, (2, h, w, 5)), jnp.float32)
    return image, jnp.asarray(rng.normal(size=(2, h // 2, w // 2, 5)), jnp.float32)


@pytest.mark.parametrize(("h", "w"), [(8, 6), (7, 6), (8, 5), (7, 5)])
def test_a_max_pool_by_index_equals_flax_where_values_tie(h, w, accelerator):
    """Flax gives the gradient to the first of equal values."""
    x, g = draw_ties(h, w)
    expected, flax_pullback = jax.vjp(flax_pool, x)
    y, index = max_pool_with_index(x)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(max_pool_grad_by_index(index, g, h, w), *flax_pullback(g))
    y, pullback = jax.vjp(max_pool_2x2, x)  # An accelerator's.
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(*pullback(g), *flax_pullback(g))


def test_the_index_of_a_max_pool_by_hand():
    x = jnp.array([[1.0, 0.0, 2.0, 3.0, 5.0, 5.0], [1.0, 1.0, 3.0, 2.0, 5.0, 6.0]])[None, :, :, None]
    y, index = max_pool_with_index(x)
    np.testing.assert_array_equal(y.ravel(), [1, 3, 6])
    np.testing.assert_array_equal(index.ravel(), [0, 1, 3])
    grad = max_pool_grad_by_index(index, jnp.array([3.0, 4.0, 5.0])[None, None, :, None], 2, 6)
    np.testing.assert_array_equal(grad[0, :, :, 0], [[3, 0, 0, 4, 0, 0], [0, 0, 0, 0, 0, 5]])


@pytest.mark.parametrize(("h", "w"), [(8, 6), (7, 5)])
def test_a_max_pool_by_comparison_equals_numpy_and_is_a_cpu_s(h, w):
    x, g = draw_ties(h, w)
    wanted = np.zeros(x.shape)
    for row in range(h // 2):
        for column in range(w // 2):
            window = np.s_[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            largest = np.asarray(x[window]) == np.max(x[window], axis=(1, 2), keepdims=True)
            share = np.asarray(g)[:, row, column][:, None, None] / largest.sum((1, 2), keepdims=True)
            wanted[window] = np.where(largest, share, 0)
    y, pullback = jax.vjp(max_pool_2x2, x)
    got = max_pool_grad_by_comparison(x, y, g)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    np.testing.assert_array_equal(*pullback(g), got)


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
