"""Drawn arrays, NumPy references and kernel selection for the tests of the layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax.onednn import calls, library

# Relative to the largest value. Sums are in float32; bfloat16 rounds the result to 8 bits, before and after the bias.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-7, "float16": 2**-10}


def select_kernels(name, monkeypatch):
    """Makes the layers use oneDNN's kernels, those of a processor without bfloat16, or XLA's."""
    monkeypatch.setenv("CNNJAX_ONEDNN", "1" if name.startswith("onednn") else "0")
    if name.startswith("onednn") and not calls.in_use():
        pytest.skip(str(library.kernels()))
    if name == "onednn without bfloat16":
        monkeypatch.setattr(calls, "required_kernels", lambda: library.kernels()._replace(bfloat16=False))


def simulate_accelerator(monkeypatch):
    """Makes the layers choose the operations for an accelerator, which then run on the CPU."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *operands, cpu, default: default(*operands))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def draw(*shapes, dtype="float32", rounded_to="float32"):
    """Draws normal values, rounds them to one dtype and returns them as another."""
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(rng.normal(size=shape).astype(jnp.dtype(rounded_to)).astype(jnp.dtype(dtype))) for shape in shapes
    ]


def assert_near(got, wanted, tolerance):
    """Compares with a tolerance relative to the largest value."""
    got, wanted = (np.asarray(a, np.float64) for a in (got, wanted))
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def windows(x, size):
    return np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))  # [B H W C I J]


def convolution_by_numpy(x, kernel, bias, g, padding, relu, positive=None):
    """Returns the result and the gradients of image, kernel and bias in float64.

    `positive` is where the ReLU passes the gradient: near 0 this depends on rounding.
    """
    x, kernel, bias, g = (np.asarray(a, np.float64) for a in (x, kernel, bias, g))
    size = kernel.shape[0]
    patches = windows(np.pad(x, ((0, 0), *padding, (0, 0))), size)
    y = np.einsum("bhwcij,ijck->bhwk", patches, kernel, optimize=True) + bias
    if relu:
        g = np.where(y > 0 if positive is None else positive, g, 0)
        y = np.maximum(y, 0)
    back = tuple((size - 1 - low, size - 1 - high) for low, high in padding)
    patches_of_g = windows(np.pad(g, ((0, 0), *back, (0, 0))), size)
    image_grad = np.einsum("bhwkij,ijck->bhwc", patches_of_g, kernel[::-1, ::-1], optimize=True)
    return y, image_grad, np.einsum("bhwcij,bhwk->ijck", patches, g, optimize=True), g.sum((0, 1, 2))
