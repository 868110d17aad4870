"""The convolution for any network, compared with that of jax."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from cnnjax import conv_general_dilated
from cnnjax.jaxprs import calls_kernels
from cnnjax.onednn.library import kernels

USUAL = [
    {},
    {"strides": (2, 2)},
    {"strides": (2, 2), "padding": "VALID"},
    {"padding": ((2, 1), (0, 2))},
    {"kernel": (1, 1, 6, 5), "strides": (2, 2)},
    {"kernel": (2, 4, 6, 5)},
    {"kernel": (3, 3, 1, 6), "groups": 6},
    {"kernel": (3, 3, 1, 6), "groups": 6, "strides": (2, 2)},
    {"padding": ((-1, 2), (0, 0)), "strides": (2, 2)},
    {"kernel": (3, 3, 1, 6), "groups": 6, "padding": ((-1, 2), (0, 0))},
]
OTHERS = [
    {"padding": ((-1, 2), (0, 0)), "strides": (2, 1)},
    {"padding": ((4, 4), (3, 3))},  # Not less than the kernel.
    {"kernel": (3, 3, 1, 6), "groups": 6, "padding": ((3, 0), (0, 3))},
    {"kernel": (10, 3, 6, 5), "padding": "VALID"},  # Larger than the image.
    {"kernel": (3, 3, 1, 12), "groups": 6},
    {"kernel": (3, 3, 3, 6), "groups": 2},
    {"strides": (2, 1)},
    {"rhs_dilation": (2, 2)},
    {"lhs_dilation": (2, 2), "padding": ((1, 1), (2, 2))},
    {"precision": lax.Precision.HIGHEST},
]


def convolve(function, image, kernel, *, strides=(1, 1), padding="SAME", groups=1, **options):
    return function(
        image,
        kernel,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        **options,
    )


def by_jax(image, kernel, strides, padding, **options):
    """The convolution of JAX, which on a CPU must not get negative padding: it would read beyond the images."""
    if not isinstance(padding, str):
        (top, bottom), (left, right) = np.minimum(padding, 0)
        image = image[:, -top : image.shape[1] + bottom, -left : image.shape[2] + right]
        padding = np.maximum(padding, 0).tolist()
    return lax.conv_general_dilated(image, kernel, strides, padding, **options)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("options", [*USUAL, *OTHERS], ids=range(len(USUAL) + len(OTHERS)))
def test_values_and_gradients_are_those_of_jax(options, dtype):
    options = dict(options)
    rng, shape = np.random.default_rng(0), options.pop("kernel", (3, 3, 6, 5))
    image, kernel = (jnp.asarray(rng.normal(size=size), dtype) for size in ((2, 9, 8, 6), shape))
    results = []
    for function in (conv_general_dilated, by_jax):
        y, pullback = jax.vjp(partial(convolve, function, **options), image, kernel)
        g = jnp.asarray(np.random.default_rng(1).normal(size=y.shape), dtype)
        results.append([y, *pullback(g)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype == dtype and ours.shape == theirs.shape
        wide = np.asarray(theirs, np.float64)
        error, largest = (np.abs(x).max(initial=0.0) for x in (np.asarray(ours, np.float64) - wide, wide))
        assert error <= (1e-5 if dtype == jnp.float32 else 0.02) * largest


@pytest.mark.skipif(not str(kernels()).startswith("oneDNN"), reason="needs oneDNN")
@pytest.mark.parametrize(("options", "is_fast"), [(USUAL[0], True), *((x, False) for x in OTHERS)])
def test_the_usual_kinds_use_fast_kernels(options, is_fast):
    options = dict(options)
    image, kernel = jnp.zeros((2, 9, 8, 6)), jnp.zeros(options.pop("kernel", (3, 3, 6, 5)))
    assert calls_kernels(jax.make_jaxpr(partial(convolve, conv_general_dilated, **options))(image, kernel)) == is_fast


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ((3, 3, 2, 6), {"groups": 6}),
        ((3, 3, 5, 6), {}),
        ((3, 3, 6, 5), {"strides": (2,)}),
        ((3, 3, 6, 5), {"strides": (2, 2, 2)}),
        ((3, 3, 6, 5), {"padding": ((1.7, 1), (1, 1))}),
        ((3, 3, 6, 5), {"padding": ((1, 1),)}),
        ((3, 3, 6, 5), {"padding": "SOME"}),
    ],
)
def test_wrong_arguments_are_refused_as_by_jax(kernel, options, no_type_checks):
    image, kernel = jnp.zeros((2, 8, 8, 6)), jnp.zeros(kernel)
    errors = []
    for function in (lax.conv_general_dilated, conv_general_dilated):
        with pytest.raises(Exception) as error:
            convolve(function, image, kernel, **options)
        errors.append(error.value)
    assert type(errors[0]) is type(errors[1]) and str(errors[0]) == str(errors[1])


def test_a_batch_without_images():
    image, kernel = jnp.zeros((0, 8, 8, 6)), jnp.ones((3, 3, 6, 5))
    assert convolve(conv_general_dilated, image, kernel, strides=(2, 2)).shape == (0, 4, 4, 5)


def test_vmap_and_jit():
    image = jax.random.normal(jax.random.key(0), (3, 2, 8, 8, 6))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 6, 5))
    ours, theirs = (
        jax.jit(jax.vmap(partial(convolve, f)))(image, kernel) for f in (conv_general_dilated, lax.conv_general_dilated)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_other_layouts_and_ranks_are_left_to_jax():
    image = jnp.arange(48.0).reshape(1, 3, 4, 4)
    kernel = jnp.arange(54.0).reshape(2, 3, 3, 3)
    ours = conv_general_dilated(image, kernel, (1, 1), "SAME")  # [B C H W]
    assert jnp.array_equal(ours, lax.conv_general_dilated(image, kernel, (1, 1), "SAME"))
    line, filters = jnp.arange(8.0).reshape(1, 8, 1), jnp.ones((3, 1, 2))
    numbers = ("NWC", "WIO", "NWC")
    ours = conv_general_dilated(line, filters, (1,), "SAME", dimension_numbers=numbers)
    assert jnp.array_equal(ours, lax.conv_general_dilated(line, filters, (1,), "SAME", dimension_numbers=numbers))


def test_layers_of_flax_accept_it():
    image = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    fast, slow = (nn.Conv(4, (3, 3), strides=2, conv_general_dilated=f) for f in (conv_general_dilated, None))
    variables = fast.init(jax.random.key(1), image)
    np.testing.assert_allclose(fast.apply(variables, image), slow.apply(variables, image), atol=1e-5)
    layer = nnx.Conv(3, 4, (3, 3), conv_general_dilated=conv_general_dilated, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(layer(image), nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))(image), atol=1e-5)


def test_forward_mode_is_an_error_that_names_the_argument():
    image, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 2))
    with pytest.raises(TypeError, match=r"Build it with `plain=True`, or without `conv_general_dilated`"):
        jax.jvp(partial(convolve, conv_general_dilated), (image, kernel), (image, kernel))


@pytest.mark.parametrize("padding", [1, (1, 1), None], ids=repr)
def test_what_is_no_padding_gets_the_message_of_jax(padding, no_type_checks):
    image, kernel = jnp.zeros((2, 9, 8, 6)), jnp.zeros((3, 3, 6, 5))
    with pytest.raises((TypeError, ValueError), match="padding argument to conv_general_dilated should be a string"):
        convolve(conv_general_dilated, image, kernel, padding=padding)
