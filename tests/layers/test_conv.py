"""Convolutions and their gradients against NumPy in float64, with the kernels of oneDNN and of XLA."""

import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from reference import TOLERANCE, assert_near, convolution_by_numpy, draw, select_kernels, simulate_accelerator

from cnnjax.compiler import compiler_options
from cnnjax.layers.conv import conv2d, convolution_on_accelerators, image_grad_by_xla, kernel_grad_by_xla
from cnnjax.onednn import calls as onednn

SAME = ((1, 1), (1, 1))
VALID = ((0, 0), (0, 0))
# Height, width, channels, features, kernel size, padding: the shapes of the networks, and odd ones.
SHAPES = [
    (32, 32, 3, 32, 3, SAME),
    (32, 32, 32, 32, 3, SAME),
    (16, 16, 32, 64, 3, SAME),
    (16, 16, 64, 64, 3, SAME),
    (32, 32, 3, 24, 2, VALID),
    (31, 31, 24, 64, 3, SAME),
    (15, 15, 64, 128, 3, SAME),
    (7, 7, 128, 128, 3, SAME),
    (28, 28, 1, 32, 3, SAME),
    (26, 31, 17, 5, 4, ((1, 2), (1, 2))),
    (6, 5, 17, 4, 1, VALID),
    (27, 33, 16, 8, 3, ((2, 0), (0, 1))),
    (5, 3, 2, 3, 2, ((0, 1), (0, 1))),
]
# One for each way in which XLA gets them; cnnjax has no kernels of its own there. `make test-slow` tests the others.
SHAPES_OF_XLA = [SHAPES[i] for i in (0, 4, 5, 9, 12)]
# A float32 program does not depend on bfloat16 instructions.
KERNELS = [
    ("onednn", "float32"),
    ("onednn", "bfloat16"),
    ("onednn without bfloat16", "bfloat16"),
    ("xla", "float32"),
    ("xla", "bfloat16"),
    ("xla with its own flags", "float32"),
    ("xla with its own flags", "bfloat16"),
]
# jaxlib's defaults of the options that `compiler_options` changes on a CPU. The first one only affects convolutions.
XLA_DEFAULTS = {
    "xla_cpu_experimental_ynn_fusion_type": ",".join(
        f"LIBRARY_FUSION_TYPE_{name}" for name in ("INDIVIDUAL_DOT", "REDUCE", "INDIVIDUAL_CONVOLUTION")
    ),
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_DEFAULT",
}


def cases():
    """Yields the combinations whose programs differ in more than what other combinations test."""
    for shape in SHAPES:
        for kernels, dtype in KERNELS:
            if "without" in kernels and shape not in SHAPES[3:6]:
                continue  # Combines kernels that are tested elsewhere with this shape.
            if kernels == "xla with its own flags" and shape in SHAPES[-3:]:
                continue  # The same kernels as with our flags.
            for relu in (False, True) if kernels == "onednn" or shape == SHAPES[-1] else (True,):
                name = "-".join(map(str, (*shape[:5], "relu" if relu else "linear", dtype, kernels)))
                slow = kernels.startswith("xla") and shape not in SHAPES_OF_XLA
                yield pytest.param(*shape, relu, dtype, kernels, id=name, marks=[pytest.mark.slow] * slow)


def forward_and_gradients(padding, relu):
    """Returns a jitted function of image, kernel, bias and `g`."""

    def f(image, kernel, bias, g):
        y, pullback = jax.vjp(lambda *operands: conv2d(*operands, padding, relu), image, kernel, bias)
        return y, *pullback(g)

    return jax.jit(f)


@pytest.mark.parametrize(("h", "w", "c", "k", "kernel_size", "padding", "relu", "dtype", "kernels"), list(cases()))
def test_convolution_and_gradients_match_numpy(h, w, c, k, kernel_size, padding, relu, dtype, kernels, monkeypatch):
    select_kernels(kernels, monkeypatch)
    size = [n + sum(pads) - kernel_size + 1 for n, pads in zip((h, w), padding, strict=True)]
    batch_size = 3 if h % 2 else 19  # Fewer than the parts of a call, or parts of 3 and a rest of 1.
    image, g = draw((batch_size, h, w, c), (batch_size, *size, k), dtype=dtype)
    kernel, bias = draw((kernel_size, kernel_size, c, k), (k,), rounded_to=dtype)
    lowered = forward_and_gradients(padding, relu).lower(image, kernel, bias, g)
    calls = re.findall(r"@cnnjax_\w+\(.*", lowered.as_text())
    assert len(calls) == 3 * kernels.startswith("onednn")
    narrow = dtype == "bfloat16" and "without" not in kernels and onednn.kernels().bfloat16
    assert all(("bf16" in call) == narrow for call in calls)
    program = lowered.compile(XLA_DEFAULTS if kernels == "xla with its own flags" else compiler_options())
    got = program(image, kernel, bias, g)
    if kernels.startswith("xla"):  # Its own flags select kernels for fused convolutions.
        fused = re.search(r"ROOT \S+ = \S+ convolution\(", program.as_text()) is not None
        assert fused == (kernels == "xla with its own flags")
    assert [a.dtype for a in got] == [image.dtype, image.dtype, jnp.float32, jnp.float32]
    expected = convolution_by_numpy(image, kernel, bias, g, padding, relu, positive=np.asarray(got[0]) > 0)
    for a, wanted in zip(got, expected, strict=True):
        assert_near(a, wanted, TOLERANCE[dtype] if a.dtype == dtype else 1e-4)


@pytest.mark.parametrize("channels", [5, 24])  # 24 channels are padded to 32 in 16-bit dtypes.
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gradients_on_accelerators_match_numpy(dtype, channels):
    padding = ((2, 0), (0, 1))
    image, kernel, bias, g = draw((4, 9, 8, channels), (3, 3, channels, 6), (6,), (4, 9, 7, 6), dtype=dtype)

    @jax.jit
    def gradients(image, kernel, g):
        return image_grad_by_xla(g, kernel, size=(9, 8), padding=padding), kernel_grad_by_xla(image, g, padding=padding)

    image_grad, kernel_grad = gradients(image, kernel, g)
    assert (image_grad.dtype, kernel_grad.dtype) == (dtype, jnp.float32)
    _, wanted_image, wanted_kernel, _ = convolution_by_numpy(image, kernel, bias, g, padding, False)
    assert_near(image_grad, wanted_image, TOLERANCE[dtype])
    assert_near(kernel_grad, wanted_kernel, TOLERANCE[dtype])


# Kernel size, channels, padding, and how 16-bit dtypes are computed: as a product, or with this number of channels.
ON_ACCELERATORS = [
    (2, 3, VALID, "product"),
    (2, 3, ((1, 0), (0, 1)), "product"),
    (1, 16, VALID, "product"),
    (3, 3, SAME, 3),
    (2, 5, VALID, 5),
    (3, 16, SAME, 32),
    (3, 24, SAME, 32),
    (3, 64, ((0, 1), (2, 0)), 64),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("kernel_size", "channels", "padding", "computed"), ON_ACCELERATORS)
def test_convolution_on_accelerators_matches_numpy(kernel_size, channels, padding, computed, dtype):
    image, kernel = draw((2, 7, 6, channels), (kernel_size, kernel_size, channels, 5), dtype=dtype)
    h, w = (n + sum(pads) - kernel_size + 1 for n, pads in zip((7, 6), padding, strict=True))
    lowered = jax.jit(convolution_on_accelerators, static_argnames="padding").lower(image, kernel, padding=padding)
    got = lowered.compile()(image, kernel)
    assert got.dtype == dtype
    wanted, *_ = convolution_by_numpy(image, kernel, np.zeros(5), np.zeros((2, h, w, 5)), padding, False)
    assert_near(got, wanted, TOLERANCE[dtype])
    program = lowered.as_text()
    computed = channels if dtype == "float32" else computed
    assert ("stablehlo.dot_general" in program) == (computed == "product")
    assert re.findall(r"convolution\(.*\(tensor<2x7x6x(\d+)x", program) == [str(computed)] * (computed != "product")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kernel_size", "channels"), [(2, 3), (3, 24)])
def test_bias_relu_and_gradients_on_accelerators_match_numpy(kernel_size, channels, dtype, monkeypatch):
    simulate_accelerator(monkeypatch)
    low, high = (kernel_size - 1) // 2, kernel_size // 2
    padding = ((low, high), (low, high))
    image, g = draw((2, 7, 6, channels), (2, 7, 6, 8), dtype=dtype)
    kernel, bias = draw((kernel_size, kernel_size, channels, 8), (8,), rounded_to=dtype)
    got = forward_and_gradients(padding, relu=True)(image, kernel, bias, g)
    expected = convolution_by_numpy(image, kernel, bias, g, padding, True, positive=np.asarray(got[0]) > 0)
    for a, wanted in zip(got, expected, strict=True):
        assert_near(a, wanted, TOLERANCE[dtype])


def test_float16_uses_the_kernels_of_xla():
    """Only few processors support float16 in oneDNN."""
    image, kernel, bias = draw((2, 8, 8, 16), (3, 3, 16, 4), (4,), dtype="float16")
    lowered = jax.jit(lambda *operands: conv2d(*operands, SAME, True)).lower(image, kernel, bias)
    assert "onednn" not in lowered.as_text()
    wanted, *_ = convolution_by_numpy(image, kernel, bias, np.zeros((2, 8, 8, 4)), SAME, True)
    assert_near(lowered.compile()(image, kernel, bias), wanted, TOLERANCE["float16"])


@pytest.mark.parametrize("kernels", ["onednn", "xla"])
def test_vmap_equals_a_loop(kernels, monkeypatch):
    select_kernels(kernels, monkeypatch)
    image, kernel = draw((3, 2, 8, 8, 4), (3, 3, 3, 4, 5))
    convolve = jax.jit(lambda image, kernel: conv2d(image, kernel, None, SAME, False))
    batched = jax.jit(jax.vmap(convolve))(image, kernel)
    for i in range(3):
        np.testing.assert_allclose(batched[i], convolve(image[i], kernel[i]), rtol=1e-4, atol=1e-5)


def test_shapes_are_checked_in_the_tests():
    """By outer_functions.py."""
    image, kernel = draw((2, 8, 8), (3, 3, 4, 5))
    with pytest.raises(jaxtyping.TypeCheckError, match="image"):
        convolution_on_accelerators(image, kernel, padding=SAME)
