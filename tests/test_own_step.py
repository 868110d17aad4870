"""A training step of the user: the same path as `train_step`, compared with optax, plain JAX and hand-written steps."""

import json
import re
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from cnnjax import (
    MLP,
    SGD,
    Adam,
    Augment,
    Batch,
    Config,
    ParamGroup,
    TrainState,
    UserError,
    apply_gradients,
    find_learning_rate,
    init_state,
    load_run,
    mean_loss,
    train_and_evaluate,
    train_step,
)
from cnnjax.runs.codec import encode

KEY = jax.random.key(7)
RNG = np.random.default_rng(0)
IMAGE, LABEL = RNG.normal(size=(6, 4, 3, 1)).astype(np.float32), np.array([0, 3, 1, 2, 2, 0], np.int32)
BATCH = Batch(IMAGE, LABEL, np.array([True] * 5 + [False]))
PIXELS, CLASS = RNG.integers(0, 256, (80, 6, 6, 1), dtype=np.uint8), np.arange(80) % 4


class Linear(nn.Module):
    num_classes: int = 4

    @nn.compact
    def __call__(self, image):
        return nn.Dense(self.num_classes)(image.reshape(len(image), -1))


class Normed(nn.Module):
    """Has dropout and batch statistics."""

    num_classes: int = 4

    @nn.compact
    def __call__(self, image, *, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(image.reshape(len(image), -1)))
        return nn.Dense(self.num_classes)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))


class TwoLayers(nn.Module):
    num_classes: int = 4

    @nn.compact
    def __call__(self, image):
        x = nn.relu(nn.Dense(5, name="body")(image.reshape(len(image), -1)))
        return nn.Dense(self.num_classes, name="head")(x)


LINEAR, DESCENT = Linear(), optax.sgd(0.1)
CONFIG = Config(
    dataset=(PIXELS[:60], CLASS[:60], PIXELS[60:], CLASS[60:]),
    num_epochs=2,
    batch_size=9,
    model=Linear(),
    optim=SGD(learning_rate=0.05, momentum=0.9),
    augment=Augment(flip="random"),
)


def wrapped(state, batch, key, **options):
    return train_step(state, batch, key, **options)


@dataclass(frozen=True)
class SAM:
    """Follows the gradient at the worst nearby parameters."""

    radius: float = 0.05
    """Distance of these parameters."""

    def __call__(self, state, batch, key, *, tx, **options):
        loss_of = partial(mean_loss, state=state, batch=batch, key=key, **options)
        grads, _ = jax.grad(loss_of, has_aux=True)(state.params)
        scale = self.radius / optax.tree.norm(grads)
        nearby = jax.tree.map(lambda p, g: p + scale * g, state.params, grads)
        grads, (metrics, model_state) = jax.grad(loss_of, has_aux=True)(nearby)
        return apply_gradients(state, grads, metrics, model_state, tx=tx)


def clipped(state, batch, key, *, tx, **options):
    """Clips the gradient of each example to the norm 1, as DP-SGD does, and counts how many it clips."""

    def of_example(example):
        one = jax.tree.map(lambda x: x[None], example)
        return jax.grad(mean_loss, has_aux=True)(state.params, state, one, key, **options)

    grads, (metrics, _) = jax.vmap(of_example)(batch)
    norm = jax.vmap(optax.tree.norm)(grads)
    weight = batch.mask / jnp.maximum(norm, 1) / batch.mask.sum()
    grads = jax.tree.map(lambda g: jnp.einsum("b,b...->...", weight, g), grads)
    metrics = jax.tree.map(lambda x: x.sum(0), metrics)
    metrics = metrics._replace(values={**metrics.values, "clipped": jnp.sum((norm > 1) & batch.mask)})
    return apply_gradients(state, grads, metrics, state.model_state, tx=tx)


def adversarial(state, batch, key, *, tx, **options):
    """Trains on images that are moved along the sign of their gradient, from a random start (Wong et al. 2020)."""
    own_key, key = jax.random.split(key)
    noise = jax.random.uniform(jax.random.fold_in(own_key, state.step), batch.image.shape, minval=-0.1, maxval=0.1)

    def loss_of(image):
        return mean_loss(state.params, state, batch._replace(image=image), key, **options)[0]

    moved = noise + 0.1 * jnp.sign(jax.grad(loss_of)(batch.image + noise))
    return train_step(state, batch._replace(image=batch.image + moved.clip(-0.1, 0.1)), key, tx=tx, **options)


def start(model: Any = LINEAR, tx: Any = DESCENT) -> TrainState:
    return init_state(jax.random.key(0), jnp.zeros((1, *IMAGE.shape[1:])), model=model, tx=tx)


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-5, 1e-6), a, b)


def history_of(run_dir):
    return (run_dir / "metrics.jsonl").read_bytes()


# --- The two parts of `train_step` ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("model", [Linear(), Normed()])
def test_the_parts_make_the_step(model):
    tx = optax.sgd(0.1, momentum=0.9)
    state = start(model, tx)
    state, _ = train_step(state, BATCH, KEY, model=model, tx=tx)
    expected, sums = train_step(state, BATCH, KEY, model=model, tx=tx, donate=False)

    @jax.jit
    def by_parts(state):
        grads, (metrics, model_state) = jax.grad(mean_loss, has_aux=True)(state.params, state, BATCH, KEY, model=model)
        return apply_gradients(state, grads, metrics, model_state, tx=tx)

    after, metrics = by_parts(state)
    assert_close(after, expected)
    assert_close(metrics, sums)


@pytest.mark.usefixtures("quick_compilation")
def test_the_loss_is_that_of_other_parameters():
    state = start()
    other = jax.tree.map(lambda p: p + 0.3, state.params)
    loss, (metrics, model_state) = mean_loss(other, state, BATCH, KEY, model=Linear())
    logits = IMAGE[:5].reshape(5, -1) @ np.asarray(other["Dense_0"]["kernel"]) + np.asarray(other["Dense_0"]["bias"])
    by_hand = optax.softmax_cross_entropy_with_integer_labels(logits, LABEL[:5]).mean()
    np.testing.assert_allclose(loss, by_hand, rtol=1e-6)
    np.testing.assert_allclose(metrics.loss, 5 * by_hand, rtol=1e-6)
    assert (int(metrics.num_examples), metrics.norm, model_state) == (5, None, {})


@pytest.mark.usefixtures("quick_compilation")
def test_dropout_depends_on_the_step():
    model = Normed()
    state = start(model)
    losses = [
        float(mean_loss(state.params, state._replace(step=jnp.int32(step)), BATCH, KEY, model=model)[0])
        for step in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.usefixtures("quick_compilation")
def test_an_optimizer_that_searches_along_a_line():
    tx, model = optax.lbfgs(), Linear()
    state = start(model, tx)
    expected, _ = train_step(state, BATCH, KEY, model=model, tx=tx, donate=False)

    def loss_of(params):
        return mean_loss(params, state, BATCH, KEY, model=model)[0]

    grads, aux = jax.jit(jax.grad(mean_loss, has_aux=True), static_argnames="model")(
        state.params, state, BATCH, KEY, model=model
    )
    after, _ = jax.jit(partial(apply_gradients, tx=tx, value_fn=loss_of))(state, grads, *aux)
    assert_close(after.params, expected.params)
    with pytest.raises(ValueError, match=r"`tx` must be the optimizer of `state`, and accept .* `value_fn`"):
        apply_gradients(state, grads, *aux, tx=tx)


def test_gradients_are_those_of_the_parameters():
    state = start()
    _, aux = mean_loss(state.params, state, BATCH, KEY, model=Linear())
    with pytest.raises(ValueError, match=r"`grads` must have the structure and the shapes of .*, got {}"):
        apply_gradients(state, {}, *aux, tx=DESCENT)
    of_examples = jax.tree.map(lambda p: jnp.stack([p] * 6), state.params)
    with pytest.raises(ValueError, match=r"of `state.params`, .*float32\[4\].*, got .*float32\[6, 4\]"):
        apply_gradients(state, of_examples, *aux, tx=DESCENT)
    with pytest.raises(ValueError, match="`frozen` must be a tuple of top-level names in the parameters"):
        mean_loss(state.params, state, BATCH, KEY, model=Linear(), frozen=("Dense_1",))


# --- Published methods, beside their implementations in optax --------------------------------------------------------


@pytest.mark.usefixtures("quick_compilation")
def test_sam_is_that_of_optax():
    tx, state = optax.sgd(0.1), start()
    after, metrics = jax.jit(partial(SAM(0.05), model=Linear(), tx=tx))(state, BATCH, KEY)
    sam = optax.contrib.sam(tx, optax.chain(optax.contrib.normalize(), optax.sgd(0.05)), opaque_mode=True)

    def objective(params, _=None):
        return mean_loss(params, state, BATCH, KEY, model=Linear())[0]

    grads = jax.grad(objective)(state.params)
    updates, _ = sam.update(grads, sam.init(state.params), state.params, grad_fn=jax.grad(objective))
    assert_close(after.params, optax.apply_updates(state.params, updates))
    assert float(metrics.grad_norm) != float(optax.tree.norm(grads))


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("size", [5, 6])
def test_clipped_gradients_of_examples_are_those_of_optax(size):
    tx, state, batch = optax.sgd(0.1), start(), BATCH._replace(mask=np.arange(6) < size)
    after, metrics = jax.jit(partial(clipped, model=Linear(), tx=tx))(state, batch, KEY)

    def loss_of(params, image, label):
        logits: Any = Linear().apply({"params": params}, image[None])
        return optax.softmax_cross_entropy_with_integer_labels(logits[0], label)

    grads = jax.vmap(jax.grad(loss_of), (None, 0, 0))(state.params, IMAGE[:size], LABEL[:size])
    private = optax.contrib.differentially_private_aggregate(1.0, 0.0, 0)
    mean, _ = private.update(grads, private.init(state.params), state.params)
    assert_close(after.params, jax.tree.map(lambda p, g: p - 0.1 * g, state.params, mean))
    norms = jax.vmap(optax.tree.norm)(grads)
    assert 0 < int(metrics.values["clipped"]) == int((norms > 1).sum())


def run_whole_and_in_parts(config, tmp_path):
    """Returns a run, and the same run stopped within its second epoch and resumed."""

    def stop(step, metrics):
        if step == 8:
            raise KeyboardInterrupt

    whole = train_and_evaluate(config, run_dir=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_and_evaluate(config, run_dir=tmp_path / "parts", on_step=stop, checkpoint_seconds=0.0)
    return whole, train_and_evaluate(config, run_dir=tmp_path / "parts", resume=True)


# --- In a run -------------------------------------------------------------------------------------------------------


def test_a_step_that_calls_ours_gives_the_bits_of_ours(tmp_path):
    ours, theirs = (
        train_and_evaluate(replace(CONFIG, train_step=step), run_dir=tmp_path / step.__name__)
        for step in (train_step, wrapped)
    )
    assert ours.finished_result()["sha256"] == theirs.finished_result()["sha256"]
    assert history_of(ours.run_dir) == history_of(theirs.run_dir)
    assert "train_step" not in json.loads((ours.run_dir / "config.json").read_text())["config"]


@pytest.mark.parametrize("step", [SAM(), SAM(radius=0.5), clipped, adversarial], ids=["sam", "wide sam", "dp", "fgsm"])
def test_a_run_with_a_step_is_reproduced_and_resumed(step, tmp_path):
    config = replace(CONFIG, train_step=step)
    whole, parts = run_whole_and_in_parts(config, tmp_path)
    assert whole.finished_result()["sha256"] == parts.finished_result()["sha256"]
    assert history_of(tmp_path / "whole") == history_of(tmp_path / "parts")
    ours = train_and_evaluate(CONFIG, run_dir=tmp_path / "ours")
    assert whole.finished_result()["sha256"]["params"] != ours.finished_result()["sha256"]["params"]
    with pytest.raises(UserError, match=r"another configuration: `train_step"):
        train_and_evaluate(CONFIG, run_dir=tmp_path / "whole")


def test_what_a_step_counts_is_in_the_history_and_reaches_callbacks(tmp_path):
    steps = []
    run = train_and_evaluate(
        replace(CONFIG, train_step=clipped), run_dir=tmp_path / "run", on_step=lambda step, m: steps.append(m)
    )
    assert all(0 <= x <= 1 for x in run.history["train_clipped"])
    assert {"loss", "accuracy", "grad_norm", "clipped"} == steps[0].keys()
    assert run.history["train_clipped"][0] > 0


def test_a_network_predicts_without_its_step(tmp_path):
    config = replace(CONFIG, model=MLP(), train_step=SAM(0.1))
    trained = train_and_evaluate(config, run_dir=tmp_path / "run")
    run = load_run(tmp_path / "run")
    np.testing.assert_array_equal(run.predict(PIXELS), trained.predict(PIXELS))
    assert encode(run.config)["train_step"] == {"class": "SAM", "radius": 0.1}
    with pytest.raises(UserError, match="`train_step` of this run is SAM, which is not part of cnnjax"):
        train_and_evaluate(replace(run.config, dataset=CONFIG.dataset), run_dir=tmp_path / "again")
    full = load_run(tmp_path / "run", replace(config, train_step=SAM()))
    assert full.config.train_step == SAM(0.1)


def test_frozen_parameters_and_accumulated_gradients(tmp_path):
    optim = Adam(accumulate_steps=2, clip_norm=1.0, groups=(ParamGroup("^body/", start_epoch=1),))
    config = replace(CONFIG, model=TwoLayers(), optim=optim)
    states = {}
    for step in (train_step, wrapped, SAM()):
        name = getattr(step, "__name__", "sam")

        def keep(row, state, name=name):
            states[name, row["epoch"]] = state.params

        train_and_evaluate(replace(config, train_step=step), run_dir=tmp_path / name, on_epoch=keep)
    assert_close(states["wrapped", 2], states["train_step", 2])
    first = load_run(tmp_path / "sam", config, step=6).state.params
    np.testing.assert_array_equal(states["sam", 1]["body"]["kernel"], first["body"]["kernel"])
    np.testing.assert_array_equal(states["sam", 1]["body"]["kernel"], states["train_step", 1]["body"]["kernel"])
    assert not np.array_equal(states["sam", 2]["body"]["kernel"], states["sam", 1]["body"]["kernel"])


def test_the_loop_counts_the_steps(tmp_path):
    seen = []
    run = train_and_evaluate(
        replace(CONFIG, train_step=plain_descent),
        run_dir=tmp_path / "run",
        on_epoch=lambda row, state: seen.append((row["step"], int(state.step))),
    )
    assert seen == [(6, 6), (12, 12)]
    assert run.history["train_grad_norm"].tolist() == [1.0, 1.0]


def plain_descent(state, batch, key, *, tx, **options):
    """Does not count."""
    grads, (metrics, model_state) = jax.grad(mean_loss, has_aux=True)(state.params, state, batch, key, **options)
    params = jax.tree.map(lambda p, g: p - 0.01 * g, state.params, grads)
    return state._replace(params=params, model_state=model_state), metrics._replace(norm=jnp.ones(()))


class Tempered(nn.Module):
    """Divides its logits, in bfloat16, by a temperature."""

    num_classes: int = 4

    @nn.compact
    def __call__(self, image, *, train):
        x = nn.Dense(self.num_classes, dtype=jnp.bfloat16)(image.reshape(len(image), -1))
        return (x / self.variable("ema", "temperature", jnp.ones, ()).value).astype(jnp.float32)


class Warming(Tempered):
    """Its own variable has a weak type after a step."""

    @nn.compact
    def __call__(self, image, *, train):
        temperature = self.variable("ema", "temperature", jnp.ones, ())
        if train:
            temperature.value = jnp.where(image.sum() > 0, 2.0, 1.7)
        return nn.Dense(self.num_classes)(image.reshape(len(image), -1)) / temperature.value


def tempered(state, batch, key, **options):
    """Keeps a number of a weak type in the state."""
    after, metrics = train_step(state, batch, key, **options)
    return after._replace(model_state={"ema": {"temperature": jnp.where(state.step < 3, 2.0, 1.7)}}), metrics


def tempered_with_a_number(state, batch, key, **options):
    after, metrics = train_step(state, batch, key, **options)
    return after._replace(model_state={"ema": {"temperature": 1.7}}), metrics._replace(norm=1.0)


@pytest.mark.parametrize("step", [tempered, tempered_with_a_number])
def test_a_weak_type_in_the_state_does_not_change_the_bits(step, tmp_path):
    config = replace(CONFIG, model=Tempered(), train_step=step)
    whole, parts = run_whole_and_in_parts(config, tmp_path)
    assert whole.finished_result()["sha256"] == parts.finished_result()["sha256"]


def test_no_part_of_a_state_has_a_weak_type():
    """Neither in a loop of one's own, whose state Orbax restores without."""
    state = start(Warming())
    state, _ = train_step(state, BATCH, KEY, model=Warming(), tx=DESCENT)
    assert not any(x.weak_type for x in jax.tree.leaves(state))


def test_a_key_may_be_split_in_each_step(tmp_path):
    with jax.debug_key_reuse(True):
        train_and_evaluate(replace(CONFIG, train_step=adversarial), run_dir=tmp_path / "run")


def test_the_learning_rate_range_test_uses_the_step():
    ours, wide = (find_learning_rate(replace(CONFIG, train_step=step)).loss for step in (train_step, SAM(radius=2.0)))
    assert ours[0] < wide[0]  # The loss nearby is higher.


def test_the_utilization_of_the_device_is_not_known(tmp_path, monkeypatch):
    monkeypatch.setattr("cnnjax.throughput.PEAKS", {jax.devices()[0].device_kind: 1e9})
    ours, theirs = (
        train_and_evaluate(replace(CONFIG, num_epochs=1, train_step=step), run_dir=tmp_path / step.__name__).history
        for step in (train_step, wrapped)
    )
    assert ours.keys() - theirs.keys() == {"flops_utilization"}


# --- What a run records ---------------------------------------------------------------------------------------------


class Base:
    radius = 0.1

    @classmethod
    def step(cls, state, batch, key, **options):
        return train_step(state, batch._replace(image=batch.image * cls.radius), key, **options)


class Derived(Base):
    radius = 2.0


def scaled_by(factor):
    def decorate(step):
        @wraps(step)
        def scaled(state, batch, key, **options):
            return step(state, batch._replace(image=batch.image * factor), key, **options)

        return scaled

    return decorate


@scaled_by(2.0)
def decorated(state, batch, key, **options):
    return train_step(state, batch, key, **options)


def scaled(state, batch, key, *, factor, **options):
    return train_step(state, batch._replace(image=batch.image * factor), key, **options)


@pytest.mark.parametrize(
    "step",
    [
        Derived.step,
        scaled_by(2.0)(wrapped),
        jax.jit(partial(scaled, factor=2.0), static_argnames=("model", "tx", "loss_fn", "frozen", "placement")),
        jax.jit(scaled_by(2.0)(wrapped)),
    ],
    ids=["method", "decorated", "jitted partial", "jitted and decorated"],
)
def test_what_a_name_does_not_tell_is_refused(step):
    with pytest.raises(UserError, match="`train_step` must be the function that its name stands for, got another one"):
        encode(replace(CONFIG, train_step=step))


@pytest.mark.parametrize(
    ("step", "recorded"),
    [
        (Base.step, {"function": "Base.step"}),
        (decorated, {"function": "decorated"}),
        (jax.jit(wrapped), {"function": "wrapped"}),
        (partial(scaled, factor=2.0), {"partial": "scaled", "args": [], "keywords": {"dict": {"factor": 2.0}}}),
    ],
    ids=["method", "decorated", "jitted", "partial"],
)
def test_what_a_name_tells_is_recorded(step, recorded):
    config = replace(CONFIG, train_step=step)
    assert encode(config)["train_step"] == recorded


class Options(NamedTuple):
    factor: float = 2.0


@dataclass(frozen=True)
class Scaled:
    options: Options = Options()  # noqa: RUF009

    def __call__(self, state, batch, key, **options):
        return scaled(state, batch, key, factor=self.options.factor, **options)


def test_a_named_tuple_is_refused():
    message = r"`train_step.options` must not be a NamedTuple, got Options\(factor=2.0\). Make it a frozen dataclass."
    with pytest.raises(UserError, match=message):
        encode(replace(CONFIG, train_step=Scaled()))


@pytest.mark.parametrize("now", [wrapped, np.ones(3)], ids=["function", "array"])
def test_a_name_that_was_defined_again_is_accepted(now, monkeypatch):
    """As in a cell of a notebook that is executed twice."""
    config = replace(CONFIG, train_step=decorated)
    monkeypatch.setitem(globals(), "decorated", now)
    assert encode(config)["train_step"] == {"function": "decorated"}


class Sowing(nn.Module):
    """Adds a penalty on its logits to the loss."""

    num_classes: int = 4

    @nn.compact
    def __call__(self, image, *, train):
        logits = nn.Dense(self.num_classes)(image.reshape(len(image), -1))
        self.sow("losses", "penalty", 0.01 * jnp.square(logits).mean())
        return logits


def test_padding_alone_has_a_loss_of_zero(tmp_path):
    state = start()
    padding = BATCH._replace(mask=np.zeros(6, bool))
    assert float(mean_loss(state.params, state, padding, KEY, model=LINEAR)[0]) == 0.0
    run = train_and_evaluate(replace(CONFIG, model=Sowing(), train_step=clipped), run_dir=tmp_path / "run")
    assert np.isfinite(run.history["train_loss"]).all()


# --- Mistakes -------------------------------------------------------------------------------------------------------


def lacks_options(state, batch, key, *, model, tx):
    return train_step(state, batch, key, model=model, tx=tx)


def returns_state(state, batch, key, **options):
    return train_step(state, batch, key, **options)[0]


def returns_loss(state, batch, key, **options):
    state, metrics = train_step(state, batch, key, **options)
    return state, metrics.loss


def lacks_norm(state, batch, key, *, tx, **options):
    _, (metrics, _) = mean_loss(state.params, state, batch, key, **options)
    return state, metrics


def changes_dtype(state, batch, key, **options):
    state, metrics = train_step(state, batch, key, **options)
    return state._replace(params=jax.tree.map(jnp.bfloat16, state.params)), metrics


def drops_state(state, batch, key, **options):
    state, metrics = train_step(state, batch, key, **options)
    return state._replace(opt_state=()), metrics


def names_loss(state, batch, key, **options):
    state, metrics = train_step(state, batch, key, **options)
    return state, metrics._replace(values={"loss": metrics.loss})


def sums_nothing(state, batch, key, **options):
    state, metrics = train_step(state, batch, key, **options)
    return state, metrics._replace(values={"mean": jnp.zeros(3)})


def counts_in_float(state, batch, key, **options):
    state, metrics = train_step(state, batch, key, **options)
    return state, metrics._replace(num_examples=metrics.num_examples / 2)


def draws_on_the_host(state, batch, key, **options):
    noise = np.random.default_rng().normal(size=batch.image.shape).astype(np.float32)
    return train_step(state, batch._replace(image=batch.image + noise), key, **options)


def adds_a_collection(state, batch, key, **options):
    state, metrics = train_step(state, batch, key, **options)
    return state._replace(model_state={"teacher": state.params}), metrics


def empties_a_collection(state, batch, key, **options):
    state, metrics = train_step(state, batch, key, **options)
    return state._replace(model_state={"teacher": {}}), metrics


def names_a_number(state, batch, key, **options):
    state, metrics = train_step(state, batch, key, **options)
    return state, metrics._replace(values={1: metrics.loss})


def counts_a_bool(state, batch, key, **options):
    state, metrics = train_step(state, batch, key, **options)
    return state, metrics._replace(values={"any": metrics.loss > 0})


class Other(NamedTuple):
    loss: Any


Other.__name__ = "Metrics"


def returns_other_metrics(state, batch, key, **options):
    state, metrics = train_step(state, batch, key, **options)
    return state, Other(metrics.loss)


def fails(state, batch, key, **options):
    raise LookupError("no such thing")


def repeats_noise(state, batch, key, **options):
    noise = 0.1 * jax.random.normal(jax.random.split(key)[0], batch.image.shape)
    return train_step(state, batch._replace(image=batch.image + noise), key, **options)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            lacks_options,
            "accept (state, batch, key, *, model, tx, loss_fn, frozen, placement), got lacks_options: "
            "got an unexpected keyword argument 'loss_fn'. Its signature may be",
        ),
        (returns_state, "`train_step` must return a tuple (TrainState, Metrics), as `train_step` of cnnjax"),
        (returns_state, "does, got TrainState."),
        (returns_loss, "does, got (TrainState, ShapeDtypeStruct)."),
        (lacks_norm, "`train_step` must return metrics with the norm of the gradients, got None. Return those of"),
        (
            changes_dtype,
            "`train_step` must keep the shape and dtype of its state: .params['Dense_0']['bias'] was float32[4] and "
            "became bfloat16[4].",
        ),
        (drops_state, "`train_step` must keep the shape and dtype of its state: .opt_state"),
        (
            names_loss,
            "`train_step` must return metrics whose `values` are a dict with names other than loss and grad_norm, got "
            "['loss'].",
        ),
        (
            sums_nothing,
            "`train_step` must return the metric 'mean' of shape (), got float32[3].",
        ),
        (
            counts_in_float,
            "`train_step` must return the metric 'num_examples' with a dtype of kind integer, got float32[].",
        ),
        (fails, "LookupError: no such thing."),
        (max, "), got max: "),
        (partial(train_step, loss_fn=names_loss), "`train_step` must leave ['loss_fn'] to the Config, got a partial"),
        (draws_on_the_host, "`train_step` must be the same each time that JAX traces it, got draws_on_the_host, which"),
        (
            adds_a_collection,
            "got the new array .model_state['teacher']['Dense_0']['bias'], float32[4]. A network creates it as a",
        ),
        (empties_a_collection, "structure of its state: model_state was PyTreeDef({}) and became PyTreeDef({'teacher'"),
        (names_a_number, "`values` are a dict with names other than loss and grad_norm, got [1]."),
        (counts_a_bool, "the metric 'any' with a dtype of kind integer or floating, got bool[]."),
        (returns_other_metrics, "does, got (TrainState, Metrics)."),
        (
            repeats_noise,
            "`train_step` must draw other random numbers in each step, got some that depend on its `key` alone, which "
            "is the same for every step. Draw them from jax.random.fold_in(key, state.step),",
        ),
    ],
)
def test_a_mistake_is_an_error_before_the_first_step(step, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        train_and_evaluate(replace(CONFIG, train_step=step), run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert str(error.value).startswith("`train_step` ") and "\n" not in str(error.value)


def fails_if_frozen(state, batch, key, *, frozen, **options):
    if frozen:
        raise LookupError(f"{frozen}")
    return train_step(state, batch, key, **options)


@pytest.mark.parametrize("group", [ParamGroup("^body/", num_epochs=1), ParamGroup("^body/", num_epochs=0)])
def test_a_step_is_checked_with_the_parameters_that_will_be_frozen(group, tmp_path):
    optim = SGD(learning_rate=0.05, groups=(group,))
    config = replace(CONFIG, model=TwoLayers(), optim=optim, train_step=fails_if_frozen)
    if group.num_epochs:  # On a CPU one program trains both epochs, see `Setup.frozen_names`.
        train_and_evaluate(config, run_dir=tmp_path / "run")
    else:
        with pytest.raises(UserError, match=r"`train_step` failed at .*: LookupError: \('body',\)"):
            train_and_evaluate(config, run_dir=tmp_path / "run")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            SAM,
            "`train_step` must be a function (state, batch, key, ...), got the class SAM. Create an instance: SAM().",
        ),
        (None, "`train_step` must be a function (state, batch, key, ...), got None."),
    ],
)
def test_a_step_is_a_function(value, message):
    with pytest.raises(UserError, match=re.escape(message)):
        replace(CONFIG, train_step=value)
