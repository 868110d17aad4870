import re
from collections import Counter
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from programs.research import Noise

from cnnjax import (
    CNN,
    SGD,
    Adam,
    Augment,
    Batch,
    CrossEntropy,
    Metrics,
    ParamGroup,
    TrainState,
    eval_step,
    init_from_data,
    init_state,
    softmax_cross_entropy,
    train_step,
)
from cnnjax.data.batches import Pixels, make_batch, pixel_statistics
from cnnjax.data.order import epoch_plan
from cnnjax.data.tta import mean_logits
from cnnjax.evaluation import evaluate_pixels
from cnnjax.metrics import Scores, Totals
from cnnjax.optim.transforms import lookahead
from cnnjax.program import Program, init_train_state, train_steps
from cnnjax.sharding import Placement, place

pytestmark = pytest.mark.usefixtures("quick_compilation")
SHAPE = (6, 5, 3)
KEY = jax.random.key(7)
TX = optax.sgd(0.1, momentum=0.9)


class Linear(nn.Module):
    """Sees where each pixel is, so that an image and its mirror image have different logits."""

    @nn.compact
    def __call__(self, image, *, train):
        return nn.Dense(10)(image.reshape(image.shape[0], -1))


class Net(nn.Module):
    """A network with batch normalization and dropout that is not the package's."""

    rate: float = 0.5

    @nn.compact
    def __call__(self, image, *, train):
        x = nn.Dense(8)(image.reshape(image.shape[0], -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(10)(nn.Dropout(self.rate, deterministic=not train)(x))


MODEL = Net()


def random_batch(size=8, masked=0):
    rng = np.random.default_rng(1)
    image = rng.normal(size=(size, *SHAPE)).astype(np.float32)
    return Batch(image, np.arange(size, dtype=np.int32) % 10, np.arange(size) < size - masked)


def random_pixels(size, shape=SHAPE):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (size, *shape), np.uint8)
    return Pixels(image, rng.integers(0, 10, size).astype(np.int32), pixel_statistics(image))


def make_state(model: nn.Module = MODEL, tx: optax.GradientTransformation = TX, seed=0):
    return init_state(jax.random.key(seed), jnp.zeros((1, *SHAPE)), model=model, tx=tx)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol, atol), a, b)


def softmax(logits):
    exp = np.exp(np.asarray(logits, np.float64))
    return exp / exp.sum(1, keepdims=True)


# --- train_step and eval_step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True], ids=["class indices", "class probabilities"])
def test_a_step_of_sgd_equals_numpy_on_a_linear_model(soft):
    model, tx, batch = Linear(), optax.sgd(0.1), random_batch(6, masked=2)
    target = np.eye(10)[batch.label]
    if soft:  # As from Mixup: 0.6 of the own class, 0.4 of the class of the neighbor.
        target = 0.6 * target + 0.4 * np.roll(target, 1, axis=0)
        batch = batch._replace(label=target.astype(np.float32))
    state = make_state(model, tx)
    kernel, bias = (np.asarray(state.params["Dense_0"][name], np.float64) for name in ("kernel", "bias"))
    x = batch.image[:4].reshape(4, -1).astype(np.float64)
    probability, target = softmax(x @ kernel + bias), target[:4]
    error = (probability - target) / 4  # The masked examples do not count.

    state, metrics = train_step(state, batch, KEY, model=model, tx=tx)

    np.testing.assert_allclose(state.params["Dense_0"]["kernel"], kernel - 0.1 * x.T @ error, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.params["Dense_0"]["bias"], bias - 0.1 * error.sum(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics.loss, -(target * np.log(probability)).sum(), rtol=1e-5)
    assert metrics.num_examples == 4
    norm = np.sqrt(((x.T @ error) ** 2).sum() + (error.sum(0) ** 2).sum())
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)
    if soft:
        with pytest.raises(ValueError, match=r"`metrics` must be those of logits"):
            _ = metrics.correct
    else:
        assert metrics.correct == (probability.argmax(1) == target.argmax(1)).sum()
    assert state.step == 1


def test_the_gradient_is_that_of_the_given_loss():
    def twice(logits, batch):
        return 2 * softmax_cross_entropy(logits, batch)

    model, tx, batch = Linear(), optax.sgd(0.1), random_batch()
    before = jax.device_get(make_state(model, tx).params)
    once, metrics = train_step(make_state(model, tx), batch, KEY, model=model, tx=tx)
    double, double_metrics = train_step(make_state(model, tx), batch, KEY, model=model, tx=tx, loss_fn=twice)
    expected = jax.tree.map(lambda a, b: b + 2 * (a - b), once.params, before)
    assert_close((double.params, double_metrics.loss), (expected, 2 * metrics.loss))
    assert double_metrics.correct == metrics.correct


def test_one_batch_is_overfitted():
    model, tx, batch = CNN(), optax.adam(1e-2), random_batch()
    state = make_state(model, tx)
    for _ in range(60):
        state, _ = train_step(state, batch, KEY, model=model, tx=tx)
    metrics = eval_step(state, batch, model=model)
    assert metrics.correct == 8
    assert metrics.loss / 8 < 0.1


def test_train_step_traces_once_for_equal_models():
    traces = []

    def loss_fn(logits, batch):
        traces.append(1)
        return softmax_cross_entropy(logits, batch)

    state = make_state()
    for step in range(3):
        state, _ = train_step(state, random_batch(masked=step), KEY, model=Net(rate=0.5), tx=TX, loss_fn=loss_fn)
    assert len(traces) == 1


def test_the_same_seed_gives_the_same_bits_and_another_seed_gives_others():
    def train(seed, key):
        state = make_state(seed=seed)
        for _ in range(2):
            state, _ = train_step(state, random_batch(), key, model=MODEL, tx=TX)
        return jax.device_get(state.params)

    first = train(0, KEY)
    assert_equal(first, train(0, KEY))
    for other in (train(1, KEY), train(0, jax.random.key(8))):
        assert not np.array_equal(first["Dense_1"]["kernel"], other["Dense_1"]["kernel"])


def test_each_step_drops_other_units():
    losses = set()
    for step in range(3):  # The same parameters in each step.
        state = make_state()._replace(step=jnp.int32(step))
        _, metrics = train_step(state, random_batch(), KEY, model=MODEL, tx=TX)
        losses.add(float(metrics.loss))
    assert len(losses) == 3


def test_batch_stats_change_in_training_only():
    state, batch = make_state(), random_batch()
    before = jax.device_get(state.model_state)
    eval_step(state, batch, model=MODEL)
    assert_equal(before, state.model_state)
    state, _ = train_step(state, batch, KEY, model=MODEL, tx=TX)
    moved = state.model_state["batch_stats"]["BatchNorm_0"]["mean"] - before["batch_stats"]["BatchNorm_0"]["mean"]
    assert np.abs(moved).min() > 0


def test_masked_examples_do_not_count_in_evaluation():
    state, whole = make_state(), random_batch(8)
    part = Batch(whole.image[:5], whole.label[:5], whole.mask[:5])
    masked = whole._replace(mask=np.arange(8) < 5)
    assert_close(eval_step(state, part, model=MODEL), eval_step(state, masked, model=MODEL))


def test_evaluation_uses_no_dropout():
    state, batch = make_state(), random_batch()
    assert_equal(eval_step(state, batch, model=MODEL), eval_step(state, batch, model=Net(rate=0.0)))


def test_frozen_parameters_do_not_change_and_the_others_change_as_without():
    before = jax.device_get(make_state().params)
    whole, metrics = train_step(make_state(), random_batch(), KEY, model=MODEL, tx=TX)
    frozen = ("Dense_0", "Dense_1")
    part, part_metrics = train_step(make_state(), random_batch(), KEY, model=MODEL, tx=TX, frozen=frozen)
    for name in frozen:
        assert_equal(part.params[name], before[name])
        assert not np.array_equal(whole.params[name]["kernel"], before[name]["kernel"])
    for leaf in ("scale", "bias"):
        assert not np.array_equal(part.params["BatchNorm_0"][leaf], before["BatchNorm_0"][leaf])
    expected = (whole.params["BatchNorm_0"], whole.model_state, metrics._replace(norm=None))
    assert_close((part.params["BatchNorm_0"], part.model_state, part_metrics._replace(norm=None)), expected)


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize("frozen", [("whiten", "Dense_0", "Conv_1"), "Dense_0"])
def test_parameters_to_freeze_that_do_not_exist(frozen):
    message = (
        "`frozen` must be a tuple of top-level names in the parameters (['BatchNorm_0', 'Dense_0', 'Dense_1']), got "
        f"{frozen!r}."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        train_step(make_state(), random_batch(), KEY, model=MODEL, tx=TX, frozen=frozen)


@pytest.mark.usefixtures("no_type_checks")
def test_an_optimizer_of_a_configuration_is_not_one_of_optax():
    tx: Any = Adam()
    with pytest.raises(ValueError, match=r"`tx` must be an optax optimizer, got Adam\. Make one of a cnnjax"):
        make_state(tx=tx)
    with pytest.raises(ValueError, match=r"`tx` must be an optax optimizer, got Adam\. Make one of a cnnjax"):
        train_step(make_state(), random_batch(), KEY, model=MODEL, tx=tx)


def test_a_state_that_orbax_saved_continues_with_the_same_bits(tmp_path):
    batch, model = random_batch(), Net(rate=0.5)
    state, _ = train_step(make_state(model), batch, KEY, model=model, tx=TX)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "state", make_state(model, seed=1))
    assert isinstance(restored, TrainState)
    continued, expected = (train_step(s, batch, KEY, model=model, tx=TX)[0] for s in (restored, state))
    assert_equal(continued, expected)


# --- init_from_data -------------------------------------------------------------------------------------------------


class Whitened(nn.Module):
    """Sets its own parameters and statistics from data."""

    @nn.compact
    def __call__(self, image, *, train):
        mean = self.variable("batch_stats", "mean", jnp.zeros, image.shape[-1:])
        return nn.Dense(10)((image - mean.value[None, None, None]).mean((1, 2)))

    def init_from_data(self, variables, image):
        params = jax.tree.map(lambda x: x + 1, variables["params"])
        return {"params": params, "batch_stats": {"mean": image.mean((0, 1, 2))}}


def test_a_network_is_initialized_from_data():
    model, tx, image = (
        Whitened(),
        lookahead(TX, 2, 4),
        random_batch().image,
    )  # Lookahead keeps a copy of the parameters.
    before = make_state(model, tx)
    state = init_from_data(before, image, model=model, tx=tx)
    params = jax.tree.map(lambda x: x + 1, before.params)
    assert_close(
        state, TrainState(before.step, params, {"batch_stats": {"mean": image.mean((0, 1, 2))}}, tx.init(params))
    )


class WhitenedInPlace(Whitened):
    """Changes the dictionaries that it receives."""

    def init_from_data(self, variables, image):
        variables["params"]["Dense_0"] |= {"bias": jnp.ones(10)}
        return variables


def test_the_optimizer_sees_parameters_that_a_network_changes_in_place():
    model, tx = WhitenedInPlace(), lookahead(TX, 2, 4)
    state = init_from_data(make_state(model, tx), random_batch().image, model=model, tx=tx)
    assert_close(state.opt_state, tx.init(state.params))
    assert float(state.params["Dense_0"]["bias"].min()) == 1


def test_arrays_that_init_from_data_returns_stay_valid():
    weights = jnp.ones(10)

    class Loaded(Whitened):
        def init_from_data(self, variables, image):
            layer = {**variables["params"]["Dense_0"], "bias": weights}
            twice = {"weights": weights, "kernel": layer["kernel"]}  # No two arrays of a state may be the same.
            return {**variables, "params": {**variables["params"], "Dense_0": layer}, "loaded": twice}

    model, batch = Loaded(), random_batch()
    state = init_from_data(make_state(model, TX), batch.image, model=model, tx=TX)
    train_step(state, batch, KEY, model=model, tx=TX)
    assert not weights.is_deleted()


# --- train_steps ----------------------------------------------------------------------------------------------------


def test_no_key_is_used_twice():
    pixels, augment = random_pixels(20), Noise(flip="random", translate=1, cutout=2)
    program = Program(MODEL, Adam(), augment, softmax_cross_entropy, num_steps=4, num_epochs=2)
    with jax.debug_key_reuse(True):
        state = init_train_state(jax.random.key(1), jnp.zeros((1, *SHAPE)), program=program)
        for epoch in range(2):
            plan = epoch_plan(0, epoch, 20, batch_size=10, augment=augment, image_size=SHAPE[:2])
            state, _ = train_steps(state, pixels, plan, KEY, jax.random.key(epoch), program=program)
    assert state.step == 4


def test_many_steps_in_one_program_equal_steps_one_at_a_time():
    pixels, augment, augment_key = random_pixels(90), Noise(flip="random", cutout=2), jax.random.key(3)
    plan = epoch_plan(0, 0, 90, batch_size=16, augment=augment, image_size=SHAPE[:2])
    program = Program(MODEL, SGD(learning_rate=0.1), augment, CrossEntropy(label_smoothing=0.1), 6, 1)
    tx = program.make_tx()

    def train(state, rows):
        metrics = []
        for row in rows:
            state, of_row = train_steps(state, pixels, row, KEY, augment_key, program=program)
            metrics.append(of_row)
        return state, jax.tree.map(lambda *values: np.concatenate(values), *metrics)

    together = train(make_state(tx=tx), [plan])
    singly = train(make_state(tx=tx), [plan.row(slice(i, i + 1)) for i in range(6)])
    state, metrics = make_state(tx=tx), []
    for i in range(6):
        batch = jax.jit(make_batch, static_argnums=2)(pixels, plan.row(i), augment, augment_key)
        state, of_row = train_step(state, batch, KEY, model=MODEL, tx=tx, loss_fn=program.loss_fn)
        metrics.append(of_row)
    by_hand = state, jax.tree.map(lambda *values: np.stack(values), *metrics)

    np.testing.assert_array_equal(by_hand[1].num_examples, [16, 16, 16, 16, 16, 10])
    assert_close(together, by_hand, atol=1e-5)
    assert_close(singly, by_hand, atol=1e-5)


def test_a_program_freezes_what_its_optimizer_no_longer_changes():
    optim = SGD(groups=(ParamGroup("Dense_0", num_epochs=1),))
    program = Program(MODEL, optim, Augment(), softmax_cross_entropy, num_steps=4, num_epochs=2)
    params = make_state().params
    assert [program.frozen_names(params, step) for step in range(4)] == [(), (), ("Dense_0",), ("Dense_0",)]


# --- evaluate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tta", ["none", "flip"])
def test_evaluation_of_a_size_that_the_batch_does_not_divide_equals_numpy(tta):
    pixels, model = random_pixels(703), Linear()
    state = make_state(model)
    image = pixels.image / 255.0
    image = (image - image.mean((0, 1, 2))) / image.std((0, 1, 2))
    kernel, bias = (np.asarray(state.params["Dense_0"][name], np.float64) for name in ("kernel", "bias"))
    logits, mirrored = (x.reshape(703, -1) @ kernel + bias for x in (image, image[:, :, ::-1]))
    probability = softmax((logits + mirrored) / 2 if tta == "flip" else logits)

    scores = evaluate_pixels(state, pixels, model=model, tta=tta)

    assert scores.num_examples == 703
    assert scores.accuracy == (probability.argmax(1) == pixels.label).mean()
    pairs = zip(pixels.label.tolist(), probability.argmax(1).tolist(), strict=True)
    assert scores.confusion == Counter(pairs)
    assert scores.loss == pytest.approx(-np.log(probability[np.arange(703), pixels.label]).mean(), rel=1e-5)


def test_padding_gets_no_extra_views_before_the_images():
    state, batch = make_state(Linear()), random_batch(8, masked=6)

    @jax.jit
    def loss_with_views(params, image):
        model = Linear().bind({"params": params})
        logits = mean_logits(lambda image: model(image, train=False), image, "flip_translate")
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.label[:2]).sum()

    metrics = eval_step(state, batch, model=Linear(), tta="uncertain")  # A quarter of the batch: the two images.
    np.testing.assert_allclose(metrics.loss, loss_with_views(state.params, batch.image[:2]), rtol=1e-5)


class CpuAsGpu(Placement):
    """A CPU that presents itself as a GPU."""

    @property
    def device(self):
        return SimpleNamespace(platform="gpu")


@pytest.mark.parametrize(
    ("platform", "size", "batch_size"), [("cpu", 4, 500), ("gpu", 4, 2000), ("gpu", 32, 2000), ("gpu", 33, 500)]
)
def test_the_batch_size_of_evaluation_suits_the_device(platform, size, batch_size):
    placement = CpuAsGpu(*place(1)) if platform == "gpu" else place(1)
    seen = []

    class Red(nn.Module):
        """Returns class 1 for an image that is redder than the mean image, else class 0."""

        def __call__(self, image, *, train):
            seen.append(image.shape)
            red = image[..., 0].mean((1, 2))
            return jnp.stack([-red, red, *8 * [-9 + 0 * red]], axis=1)

    pixels = random_pixels(2100, (size, size, 3))
    scores = evaluate_pixels(TrainState(jnp.zeros((), jnp.int32), {}, {}, ()), pixels, model=Red(), placement=placement)
    assert seen == [(batch_size, size, size, 3)]
    red = pixels.image[..., 0].mean((1, 2), dtype=np.float64)
    assert scores.accuracy == np.mean((red > red.mean()) == pixels.label)
    assert scores.num_examples == 2100


def test_totals_are_sums_and_means_are_per_example():
    steps = Metrics(jnp.array([0.5, 2.5]), jnp.array([3, 1]), {"accuracy": jnp.array([1, 2])}, jnp.array([1.0, 2.0]))
    totals = Totals(1.0, 4, {"accuracy": 2}).add(steps)
    assert totals == (4.0, 8, {"accuracy": 5})
    assert totals.means() == Scores(loss=0.5, num_examples=8, values={"accuracy": 0.625})
    with pytest.raises(ValueError, match=r"`batch\.mask` must leave at least one example unmasked, got none\."):
        Totals().means()
    assert Totals().add(jax.tree.map(lambda x: x[0], steps)) == (0.5, 3, {"accuracy": 1})
