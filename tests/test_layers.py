"""Each operation with its gradient against NumPy in float64 or Flax: by oneDNN's kernels and by XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cnnjax import onednn
from cnnjax.layers import Conv, Dense, Dropout, conv2d, dense, kernel_grad_by_xla, max_pool_2x2

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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_kernel_gradient_of_accelerators_equals_numpy(dtype):
    padding = ((2, 0), (0, 1))
    image, kernel, bias, g = draw((4, 9, 8, 5), (3, 3, 5, 6), (6,), (4, 9, 7, 6), dtype=dtype)
    got = kernel_grad_by_xla(image, g, padding=padding)
    assert got.dtype == jnp.float32
    *_, wanted, _ = convolution_by_numpy(image, kernel, bias, g, padding, False)
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


@pytest.mark.parametrize("shape", [(2, 8, 6, 3), (2, 7, 5, 3)])
def test_max_pool_equals_flax_with_its_gradient(shape):
    x, weight = draw(shape, (shape[0], shape[1] // 2, shape[2] // 2, shape[3]))  # No ties.

    def flax_pool(x):
        return nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))

    np.testing.assert_array_equal(max_pool_2x2(x), flax_pool(x))
    ours, theirs = (jax.grad(lambda x, f=f: jnp.sum(weight * f(x)))(x) for f in (max_pool_2x2, flax_pool))
    np.testing.assert_array_equal(ours, theirs)


def test_values_that_tie_in_a_max_pool_share_its_gradient():
    x = jnp.array([[1.0, 0.0, 2.0, 2.0], [1.0, 1.0, 2.0, 2.0]])[None, :, :, None]
    grad = jax.grad(lambda x: jnp.sum(jnp.array([3.0, 4.0])[None, None, :, None] * max_pool_2x2(x)))(x)
    np.testing.assert_array_equal(grad[0, :, :, 0], [[1, 0, 1, 1], [1, 1, 1, 1]])


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
