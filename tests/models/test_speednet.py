"""The network of the speed records, and its whitening."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from cnnjax import Batch, SpeedNet, UserError, init_from_data, init_state, train_step
from cnnjax.models import speednet
from cnnjax.models.speednet import identity_init, patch_covariance, whitening_kernel

pytestmark = pytest.mark.usefixtures("quick_compilation")
RNG = np.random.default_rng(0)
# Neighbors are alike, as in photographs.
NOISE = RNG.normal(size=(200, 13, 13, 3)).astype(np.float32)
IMAGE = sum(NOISE[:, i : i + 10, j : j + 10] for i in range(4) for j in range(4)) / 4
MODEL, TX, KEY = SpeedNet(widths=(4, 4, 4)), optax.adamw(0.1, weight_decay=0.5), jax.random.key(0)


def whitened(model, image, *, train=False):
    """Returns the initial variables of a network that is ready for use."""
    return model.init_from_data(jax.jit(partial(model.init, train=train))(KEY, image), image)


def conv(x, kernel, padding):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.fixture(scope="module")
def state():
    return init_state(KEY, jnp.zeros((1, 10, 10, 3)), model=MODEL, tx=TX)


# --- Network ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [2, 3])
def test_parameter_count_by_formula(depth):
    model = SpeedNet(10, (64, 256, 128), depth)
    params = jax.eval_shape(partial(model.init, train=False), KEY, jnp.zeros((1, 32, 32, 3)))["params"]
    filters, c = 0, 24  # Channels after whitening: 8 of each color.
    for width in model.widths:
        filters += 9 * c * width + (depth - 1) * 9 * width * width
        c = width
    whitening, biases, head = 24, depth * sum(model.widths), 128 * 10  # Only the bias of the whitening is trained.
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == whitening + filters + biases + head


@pytest.mark.parametrize("train", [True, False])
def test_logits_equal_those_of_plain_operations(train):
    model, rng = SpeedNet(10, (8, 16, 12), depth=3), np.random.default_rng(0)
    image = rng.normal(size=(4, 17, 20, 3)).astype(np.float32)
    drawn = jax.tree.map(
        lambda leaf: jnp.asarray(np.abs(rng.normal(size=leaf.shape)) + 0.1, jnp.float32),  # A variance is positive.
        jax.eval_shape(partial(whitened, model), image),
    )
    params = drawn["params"]

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
    got, after = jax.jit(partial(model.apply, train=train, mutable=["batch_stats"]))(drawn, image)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * float(jnp.abs(expected).max()))
    before, after = drawn["batch_stats"], after["batch_stats"]
    np.testing.assert_array_equal(after["whiten"]["kernel"], before["whiten"]["kernel"])
    old, new = (stats["NormGelu_0"]["mean"] for stats in (before, after))
    np.testing.assert_allclose(new, 0.6 * old + 0.4 * mean if train else old, rtol=1e-3)


@pytest.mark.parametrize(("c", "k"), [(3, 8), (8, 3)])
def test_a_convolution_is_initialized_to_the_identity_on_its_first_channels(c, k):
    kernel = jax.jit(identity_init, static_argnums=1)(KEY, (3, 3, c, k))
    image = np.random.default_rng(0).normal(size=(2, 6, 6, c)).astype(np.float32)
    y = conv(image, kernel, "SAME")
    np.testing.assert_array_equal(y[..., : min(c, k)], image[..., : min(c, k)])
    # The others are uniform, as PyTorch's: within 1/sqrt(fan in).
    others = np.asarray(kernel)[..., c:]
    assert np.abs(others).max(initial=0) <= 1 / np.sqrt(9 * c)
    if k > c:
        assert others.std() == pytest.approx(1 / np.sqrt(3 * 9 * c), rel=0.1)


def test_the_smallest_images():
    image = jnp.ones((2, 9, 9, 3))
    logits, _ = jax.jit(partial(SpeedNet(5, (4, 4, 4)).init_with_output, train=False))(KEY, image)
    assert logits.shape == (2, 5) and np.isfinite(logits).all()
    with pytest.raises(UserError, match=r"Images must have at least 9×9 pixels for SpeedNet, got 8×30\."):
        MODEL.init(KEY, jnp.ones((2, 8, 30, 3)), train=False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_activations_have_the_dtype_and_logits_are_float32(dtype):
    dtypes = {}

    def record(next_call, args, kwargs, context):
        y = next_call(*args, **kwargs)
        dtypes[context.module.name or "network"] = str(y.dtype)
        return y

    model = SpeedNet(widths=(4, 4, 4), dtype=dtype)
    with nn.intercept_methods(record):
        variables = jax.eval_shape(partial(model.init, train=True), KEY, jnp.zeros((2, 9, 9, 3)))
    assert dtypes.pop("network") == "float32"
    assert len(dtypes) == 13 and {*dtypes.values()} == {dtype}  # Whitening, six convolutions, six norms.
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "float31"}, "`model.dtype` must be a known name, got 'float31'. Did you mean float32"),
        ({"widths": [4, 4, 4]}, r"`model.widths` must be a tuple, which is hashable, got \[4, 4, 4\]\."),
        ({"widths": (4, 4)}, r"`model.widths` must be 3 numbers of at least 1, got \(4, 4\)\."),
        ({"widths": (4, 0, 4)}, r"`model.widths` must be 3 numbers of at least 1, got \(4, 0, 4\)\."),
        ({"depth": 4}, r"`model.depth` must be 2 or 3, got 4\."),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_invalid_options(fields, message):
    with pytest.raises(UserError, match=message):
        SpeedNet(**fields)


# --- Whitening --------------------------------------------------------------------------------------------------------


def test_whitened_features_are_uncorrelated_with_deviation_1():
    kernel = whitening_kernel(IMAGE)
    assert kernel.shape == (2, 2, 3, 24) and kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel[..., 12:], -kernel[..., :12])
    features = np.asarray(conv(IMAGE, kernel[..., :12], "VALID")).reshape(-1, 12)
    np.testing.assert_allclose(features.T @ features / len(features), np.eye(12), atol=0.05)  # 0.0005 is added.


def test_the_covariance_equals_numpys_in_float64(monkeypatch):
    monkeypatch.setattr(speednet, "BLOCK", 70)  # Of 200 images: two whole blocks and a rest.
    windows = np.lib.stride_tricks.sliding_window_view(IMAGE, (2, 2), axis=(1, 2))  # [N H-1 W-1 C 2 2]
    patches = windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, 12).astype(np.float64)
    got = jax.jit(patch_covariance.__wrapped__)(IMAGE)  # Traced anew.
    np.testing.assert_allclose(got, patches.T @ patches / len(patches), atol=1e-5)


def test_initialization_from_data_sets_only_the_whitening_kernel(state):
    before = state.model_state["batch_stats"]
    assert before["whiten"]["kernel"].shape == (2, 2, 3, 0)
    got = init_from_data(state, IMAGE, model=MODEL, tx=TX)
    after = got.model_state["batch_stats"]
    np.testing.assert_array_equal(after["whiten"]["kernel"], whitening_kernel(IMAGE))
    rest = got._replace(model_state={"batch_stats": {**after, "whiten": before["whiten"]}})
    jax.tree.map(np.testing.assert_array_equal, rest, state)


def test_whitening_can_be_traced():
    variables = jax.eval_shape(partial(MODEL.init, train=False), KEY, IMAGE)
    shapes = jax.eval_shape(MODEL.init_from_data, variables, IMAGE)
    kernel = shapes["batch_stats"]["whiten"]["kernel"]
    assert (kernel.shape, kernel.dtype) == ((2, 2, 3, 24), jnp.float32)
    np.testing.assert_array_equal(jax.jit(whitening_kernel)(IMAGE), whitening_kernel(IMAGE))


@pytest.mark.parametrize(("images", "channels"), [(None, 3), (IMAGE[..., :1], 1)])
def test_a_network_without_the_whitening_of_its_images_is_an_error_when_traced(images, channels):
    variables = MODEL.init(KEY, IMAGE[:1] if images is None else images[:1], train=False)
    if images is not None:
        variables = MODEL.init_from_data(variables, images)
    filters = 0 if images is None else 8
    message = (
        f"`model` must be whitened: the shape of its whitening kernel must be (2, 2, 3, 24) for these images, got "
        f"(2, 2, {channels}, {filters}). Call `init_from_data(state, images, model=model, tx=tx)`."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(partial(MODEL.apply, train=False), variables, IMAGE)


def test_pooled_features_are_sown():
    """The logits are their product with the head, divided by 9."""
    variables = whitened(MODEL, IMAGE)
    assert variables.keys() == {"params", "batch_stats"}
    logits, sown = MODEL.apply(variables, IMAGE[:4], train=False, mutable=["intermediates"])
    (pooled,) = sown["intermediates"]["pooled"]
    assert pooled.shape == (4, 4)
    np.testing.assert_allclose(np.asarray(pooled) @ variables["params"]["head"] / 9, logits, rtol=1e-5, atol=1e-6)


def test_a_step_trains_the_whitening_bias_but_not_the_kernel(state):
    state = init_from_data(jax.tree.map(jnp.copy, state), IMAGE, model=MODEL, tx=TX)
    batch = Batch(IMAGE[:20], np.arange(20, dtype=np.int32) % 10, np.ones(20, bool))
    state, _ = train_step(state, batch, KEY, model=MODEL, tx=TX)
    np.testing.assert_array_equal(state.model_state["batch_stats"]["whiten"]["kernel"], whitening_kernel(IMAGE))
    assert state.params["whiten"]["bias"].any()


def test_images_with_other_channels_than_the_network(state):
    with pytest.raises(UserError, match=r"`image` must have the network's 3 channels, got shape \(200, 10, 10, 1\)\."):
        init_from_data(state, IMAGE[..., :1], model=MODEL, tx=TX)
