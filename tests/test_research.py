"""Research with `train_step`: other objectives, collections and random streams, compared with plain Flax and optax."""

import zlib
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from cnnjax import (
    Adam,
    Batch,
    Config,
    CutMix,
    Optimizer,
    TrainState,
    eval_step,
    init_state,
    load_run,
    train_and_evaluate,
    train_step,
)
from cnnjax.files import is_key

pytestmark = pytest.mark.usefixtures("quick_compilation")
KEY = jax.random.key(7)
TX = optax.sgd(0.1)
SHAPE = (4, 3, 1)
RNG = np.random.default_rng(0)
IMAGE = RNG.normal(size=(6, *SHAPE)).astype(np.float32)
LABEL = np.array([0, 3, 1, 2, 2, 0], np.int32)
MASK = np.array([True, True, True, True, True, False])
BATCH = Batch(IMAGE, LABEL, MASK)


class Linear(nn.Module):
    """A linear network without an argument `train`."""

    num_classes: int = 4

    @nn.compact
    def __call__(self, image):
        return nn.Dense(self.num_classes)(image.reshape(len(image), -1))


def start(model, tx: optax.GradientTransformation = TX):
    return init_state(jax.random.key(0), jnp.zeros((1, *SHAPE)), model=model, tx=tx)


@partial(jax.jit, static_argnames=("objective", "tx"))
def step_by_hand(objective, state, *args, tx=TX):
    """Returns what a step of plain optax makes of the parameters; `objective` is a function of them and `args`."""
    loss, grads = jax.value_and_grad(objective)(state.params, *args)
    updates, _ = tx.update(grads, state.opt_state, state.params)
    return loss, optax.apply_updates(state.params, updates), optax.tree.norm(grads)


def assert_step(state, batch, objective, *args, tx=TX, **options):
    """Checks a step against `objective`, the mean loss of plain Flax; returns the next state and the metrics."""
    loss, params, norm = step_by_hand(objective, state, *args, tx=tx)
    after, metrics = train_step(state, batch, KEY, tx=tx, donate=False, **options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), after.params, params)
    np.testing.assert_allclose(metrics.loss / metrics.num_examples, loss, rtol=1e-5)
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)
    return after, metrics


def cross_entropy(logits: Any, label: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


# --- Objectives -----------------------------------------------------------------------------------------------------


def test_a_loss_with_named_values():
    def loss_fn(logits, batch):
        ce, penalty = cross_entropy(logits, batch.label), jnp.square(logits).sum(1)
        return ce + 0.01 * penalty, {"ce": ce, "penalty": penalty}

    def objective(params):
        logits: Any = Linear().apply({"params": params}, IMAGE[:5])
        return (cross_entropy(logits, LABEL[:5]) + 0.01 * jnp.square(logits).sum(1)).mean()

    state = start(Linear())
    _, metrics = assert_step(state, BATCH, objective, model=Linear(), loss_fn=loss_fn)
    dense = state.params["Dense_0"]
    logits = np.float64(IMAGE[:5].reshape(5, -1)) @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"])
    ce = np.log(np.exp(logits).sum(1)) - logits[np.arange(5), LABEL[:5]]
    assert metrics.values.keys() == {"accuracy", "ce", "penalty"}
    np.testing.assert_allclose(metrics.values["penalty"], (logits**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics.values["ce"], ce.sum(), rtol=1e-5)
    assert metrics.correct == (logits.argmax(1) == LABEL[:5]).sum()
    evaluated = eval_step(state, BATCH, model=Linear(), loss_fn=loss_fn)
    np.testing.assert_allclose(evaluated.values["penalty"], metrics.values["penalty"], rtol=1e-6)


class Segmenter(nn.Module):
    """Returns logits for each pixel, and features."""

    @nn.compact
    def __call__(self, image, *, train):
        features = nn.Conv(3, (3, 3))(image)
        return nn.Conv(2, (1, 1))(nn.relu(features)), features


def test_labels_that_are_a_pytree_of_pixel_masks_and_weights():
    pixels, weight = RNG.integers(0, 2, (6, *SHAPE[:2])), RNG.random(6).astype(np.float32)

    def loss_fn(output, batch):
        logits, features = output
        pixel = cross_entropy(logits, batch.label["pixels"]).mean((1, 2))
        return batch.label["weight"] * pixel + 0.1 * jnp.square(features).mean((1, 2, 3))

    def objective(params):
        output: Any = Segmenter().apply({"params": params}, IMAGE[:5], train=True)
        logits, features = output
        pixel = cross_entropy(logits, pixels[:5]).mean((1, 2))
        return (weight[:5] * pixel + 0.1 * jnp.square(features).mean((1, 2, 3))).mean()

    batch = Batch(IMAGE, {"pixels": pixels, "weight": weight}, MASK)
    _, metrics = assert_step(start(Segmenter()), batch, objective, model=Segmenter(), loss_fn=loss_fn)
    assert metrics.values == {}


def test_multi_label_targets():
    target = RNG.integers(0, 2, (6, 4)).astype(np.float32)

    def loss_fn(logits, batch):
        return optax.sigmoid_binary_cross_entropy(logits, batch.label).sum(1)

    def objective(params):
        logits: Any = Linear().apply({"params": params}, IMAGE[:5])
        return optax.sigmoid_binary_cross_entropy(logits, target[:5]).sum(1).mean()

    assert_step(start(Linear()), Batch(IMAGE, target, MASK), objective, model=Linear(), loss_fn=loss_fn)


def test_one_logit_for_two_classes_has_no_accuracy():
    label = LABEL % 2

    def loss_fn(logits, batch):
        return optax.sigmoid_binary_cross_entropy(logits[:, 0], batch.label.astype(jnp.float32))

    def objective(params):
        logits: Any = Linear(1).apply({"params": params}, IMAGE[:5])
        return optax.sigmoid_binary_cross_entropy(logits[:, 0], label[:5]).mean()

    batch = Batch(IMAGE, label, MASK)
    _, metrics = assert_step(start(Linear(1)), batch, objective, model=Linear(1), loss_fn=loss_fn)
    with pytest.raises(ValueError, match=r"`metrics` must be those of logits \[B K\], K > 1, and labels int \[B\]"):
        _ = metrics.correct


def test_soft_labels_with_as_many_examples_as_classes():
    target = RNG.random((4, 4)).astype(np.float32)
    target /= target.sum(1, keepdims=True)

    def objective(params):
        logits: Any = Linear().apply({"params": params}, IMAGE[:4])
        return optax.softmax_cross_entropy(logits, target).mean()

    _, metrics = assert_step(start(Linear()), Batch(IMAGE[:4], target, MASK[:4]), objective, model=Linear())
    assert "accuracy" not in metrics.values


class Distillation(NamedTuple):
    """A batch with more fields: a teacher's logits for each example, and a coefficient."""

    image: Any
    label: Any
    mask: Any
    teacher: Any
    coefficient: Any


def test_a_batch_with_a_teacher_and_a_coefficient_that_is_annealed_without_recompilation():
    teacher, traces = RNG.normal(size=(6, 4)).astype(np.float32), []

    def loss_fn(logits, batch):
        traces.append(1)
        soft = optax.softmax_cross_entropy(logits, jax.nn.softmax(batch.teacher))
        return (1 - batch.coefficient) * cross_entropy(logits, batch.label) + batch.coefficient * soft

    def objective(params, coefficient):
        logits: Any = Linear().apply({"params": params}, IMAGE[:5])
        soft = optax.softmax_cross_entropy(logits, jax.nn.softmax(teacher[:5]))
        return ((1 - coefficient) * cross_entropy(logits, LABEL[:5]) + coefficient * soft).mean()

    state = start(Linear())
    for coefficient in (0.0, 0.25, 1.0):
        batch = Distillation(*BATCH, teacher, jnp.asarray(coefficient))
        state, _ = assert_step(state, batch, objective, coefficient, model=Linear(), loss_fn=loss_fn)
    assert len(traces) == 1


def test_a_learning_rate_that_changes_without_recompilation():
    tx, traces = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1), []

    def loss_fn(logits, batch):
        traces.append(1)
        return cross_entropy(logits, batch.label)

    state = start(Linear(), tx)
    grads = jax.jit(jax.grad(lambda p: cross_entropy(Linear().apply({"params": p}, IMAGE[:5]), LABEL[:5]).mean()))
    for rate in (0.1, 0.3):
        state.opt_state.hyperparams["learning_rate"] = jnp.asarray(rate)
        before = state.params
        state, _ = train_step(state, BATCH, KEY, model=Linear(), tx=tx, loss_fn=loss_fn, donate=False)
        expected = jax.tree.map(lambda p, g, rate=rate: p - rate * g, before, grads(before))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), state.params, expected)
    assert len(traces) == 1


def test_sums_of_narrow_losses_are_wide():
    image, label = np.ones((4096, *SHAPE), np.float32), np.zeros(4096, np.int32)
    batch = Batch(image, label, np.ones(4096, bool))

    def loss_fn(logits, batch):
        return (33 + 0 * logits[:, 0]).astype(jnp.float16)

    metrics = eval_step(start(Linear()), batch, model=Linear(), loss_fn=loss_fn)
    assert metrics.loss == 4096 * 33  # Float16 ends at 65504.


# --- Nothing wrong in silence ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "loss_fn", "message"),
    [
        (
            BATCH._replace(label=LABEL[:, None]),
            None,
            r"`batch.label` must be class indices, .* with logits \[B K\] of shape \(6, 4\), got int32\[6, 1\]\.",
        ),
        (
            BATCH._replace(label=LABEL[:1]),
            None,
            r"`batch.label` must have the 6 examples of the images as its first axis, got \(1,\)",
        ),
        (
            BATCH._replace(label={"a": np.zeros(5)}),
            lambda logits, batch: logits[:, 0],
            r"`batch.label\['a'\]` must have the 6 examples of the images as its first axis, got \(5,\)",
        ),
        (
            BATCH,
            lambda logits, batch: logits[:, :1],
            r"`loss_fn` must return floating-point values of shape \(6,\), one per example, got float32\[6, 1\]\.",
        ),
        (
            BATCH,
            lambda logits, batch: logits.mean(),
            r"`loss_fn` must return floating-point values of shape \(6,\), one per example, got float32\[\]\.",
        ),
        (
            BATCH,
            lambda logits, batch: logits.argmax(1),
            r"`loss_fn` must return floating-point values of shape \(6,\), one per example, got int32\[6\]\.",
        ),
        (
            BATCH,
            lambda logits, batch: (logits[:, 0], {"a": logits}),
            r"`loss_fn` must return values 'a' of shape \(6,\), one per example, got float32\[6, 4\]\.",
        ),
        (
            BATCH,
            lambda logits, batch: (logits[:, 0], {"a": logits[:, 0] * 1j}),
            r"`loss_fn` must return real values 'a' of shape \(6,\), one per example, got complex64\[6\]\.",
        ),
        (
            BATCH,
            lambda logits, batch: (logits[:, 0], {"accuracy": logits[:, 0]}),
            r"`loss_fn` must not name a value loss, accuracy or grad_norm, got \['accuracy'\]\.",
        ),
        (
            BATCH,
            lambda logits, batch: (logits[:, 0], logits[:, 0]),
            r"`loss_fn` must return loss \[B\] or \(loss \[B\], .*, got \(float32\[6\], float32\[6\]\)\.",
        ),
        (
            BATCH,
            lambda logits, batch: [logits[:, 0], {}],
            r"`loss_fn` must return floating-point values of shape \(6,\), .*, got \(float32\[6\], \{\}\)\.",
        ),
        (
            BATCH,
            lambda logits, batch: (logits.mean(), {"": logits[:, 0]}),
            r"`loss_fn` must return floating-point values of shape \(6,\), one per example, got float32\[\]\.",
        ),
        (
            {"image": IMAGE, "label": LABEL, "mask": MASK},
            None,
            r"`batch` must be a Batch, or a NamedTuple with its fields and more, got dict\.",
        ),
        (
            BATCH._replace(mask=np.ones((6, 1), bool)),
            None,
            r"`batch.mask` must be bool of shape \(6,\), like the images, got bool\[6, 1\]\.",
        ),
        (
            BATCH._replace(image=np.zeros((6, *SHAPE), np.uint8)),
            None,
            r"`batch.image` must be .*, got uint8\[6, 4,",
        ),
        (BATCH._replace(mask=np.ones(6, np.float32)), None, r"`batch.mask` must be bool of .*, got float32\[6\]\."),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_a_wrong_shape_is_an_error(batch, loss_fn, message):
    options: Any = {} if loss_fn is None else {"loss_fn": loss_fn}
    for call in (
        lambda: train_step(start(Linear()), batch, KEY, model=Linear(), tx=TX, **options),
        lambda: eval_step(start(Linear()), batch, model=Linear(), **options),
    ):
        with pytest.raises(ValueError, match=message):
            call()


class Listed(nn.Module):
    """A network with a list as a field."""

    widths: Any = ()

    @nn.compact
    def __call__(self, image):
        return nn.Dense(4)(image.reshape(len(image), -1))


def test_a_network_with_a_list_as_a_field():
    model = Listed([1, 2])
    message = r"`model` must be hashable, got Listed .*Use tuples instead of lists, no arrays"
    state = start(Listed((1, 2)))
    for call in (
        lambda: start(model),
        lambda: train_step(state, BATCH, KEY, model=model, tx=TX),
        lambda: eval_step(state, BATCH, model=model),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# --- Collections and random streams ---------------------------------------------------------------------------------


class Remembers(nn.Module):
    """Keeps a memory, sows losses, and drops paths with a stream of its own."""

    @nn.compact
    def __call__(self, image, *, train):
        x = nn.Dense(5)(image.reshape(len(image), -1))
        memory = self.variable("memory", "seen", jnp.zeros, (5,))
        if train:
            memory.value = 0.5 * memory.value + x.mean(0)
            x = x * jax.random.bernoulli(self.make_rng("path"), 0.5, (len(x), 1))
        x = nn.Dropout(0.5, deterministic=not train)(jnp.add(x, memory.value[None]))
        self.sow("losses", "activity", 0.1 * jnp.square(x).mean())
        self.sow("intermediates", "x", x)
        return nn.Dense(4)(x)


def test_collections_are_kept_streams_have_keys_and_sown_losses_are_added():
    model = Remembers()
    state = start(model)
    assert state.model_state.keys() == {"memory"}

    @jax.jit
    def forward(params, model_state, step):
        dropout = jax.random.fold_in(KEY, step)
        rngs = {"dropout": dropout, "path": jax.random.fold_in(dropout, zlib.crc32(b"path"))}
        variables = {"params": params, **model_state}
        logits, after = model.apply(variables, IMAGE, train=True, rngs=rngs, mutable=["memory", "losses"])
        (activity,) = after["losses"]["activity"]
        return cross_entropy(logits[:5], LABEL[:5]).mean() + activity, after["memory"]["seen"]

    def objective(*args):
        return forward(*args)[0]

    for _ in range(2):  # The second step reads the memory of the first.
        after, _ = assert_step(state, BATCH, objective, state.model_state, state.step, model=model)
        _, memory = forward(state.params, state.model_state, state.step)
        np.testing.assert_allclose(after.model_state["memory"]["seen"], memory, 1e-4, 1e-6)
        state = after
    evaluated = eval_step(state, BATCH, model=model)  # Without sown losses.
    variables = {"params": state.params, **state.model_state}
    logits = jax.jit(partial(model.apply, train=False))(variables, IMAGE[:5])
    np.testing.assert_allclose(evaluated.loss, cross_entropy(logits, LABEL[:5]).sum(), rtol=1e-5)
    with pytest.raises(ValueError, match=r"`metrics` must be those of `train_step` or .* to have a gradient"):
        _ = evaluated.grad_norm


def test_no_key_of_a_stream_is_used_twice():
    with jax.debug_key_reuse(True):
        state = start(Remembers())
        for _ in range(2):
            state, _ = train_step(state, BATCH, KEY, model=Remembers(), tx=TX)


class Noise(nn.Module):
    """Adds noise of two streams, always, and in `init`, too."""

    scales: tuple[float, float] = (0.0, 0.0)

    @nn.compact
    def __call__(self, image):
        x = image.reshape(len(image), -1)
        for stream, scale in zip(("first", "second"), self.scales, strict=True):
            x = x + scale * jax.random.normal(self.make_rng(stream), x.shape)
        return nn.Dense(4)(x)


def test_each_random_stream_has_its_own_key():
    state = init_state(KEY, jnp.zeros((1, *SHAPE)), model=Noise(), tx=TX)
    zeros = BATCH._replace(image=np.zeros_like(IMAGE))
    first, second = (
        train_step(state, zeros, KEY, model=Noise(scales), tx=TX, donate=False)[1].loss
        for scales in ((1.0, 0.0), (0.0, 1.0))
    )
    assert first != second


class SowsVectors(nn.Module):
    """Sows the loss of each example."""

    @nn.compact
    def __call__(self, image):
        self.sow("losses", "each", image.mean((1, 2, 3)))
        return nn.Dense(4)(image.reshape(len(image), -1))


def test_a_sown_loss_that_is_not_a_scalar():
    with pytest.raises(ValueError, match=r'`model` must sow scalars into "losses", .* got the shape \(6,\) from'):
        train_step(start(SowsVectors()), BATCH, KEY, model=SowsVectors(), tx=TX)


class Gathers(nn.Module):
    """Sows into a collection of its own, which grows, unless a value replaces the one before."""

    grows: bool = False

    @nn.compact
    def __call__(self, image):
        x = nn.Dense(4)(image.reshape(len(image), -1))
        options: Any = {} if self.grows else {"reduce_fn": lambda _, new: new, "init_fn": lambda: jnp.zeros(())}
        self.sow("gathered", "mean", x.mean(), **options)
        self.sow("losses", "square", jnp.square(x).mean())
        return x


def test_a_collection_that_grows_is_an_error():
    after, _ = train_step(start(Gathers()), BATCH, KEY, model=Gathers(), tx=TX)
    assert after.model_state["gathered"]["mean"].shape == ()
    message = r"`model` must keep the structure of its collection 'gathered', .* pass `reduce_fn=lambda _, new: new`"
    with pytest.raises(ValueError, match=message):
        train_step(start(Gathers(grows=True)), BATCH, KEY, model=Gathers(grows=True), tx=TX)


def test_losses_in_a_state_made_by_hand_are_not_counted_again():
    state = start(Gathers())
    sown: Any = jax.jit(Gathers().init)(jax.random.key(0), IMAGE)["losses"]
    copy = jax.tree.map(jnp.copy, state)
    by_hand = copy._replace(model_state={**copy.model_state, "losses": sown})
    for _ in range(2):
        state, metrics = train_step(state, BATCH, KEY, model=Gathers(), tx=TX)
        by_hand, other = train_step(by_hand, BATCH, KEY, model=Gathers(), tx=TX)
        assert metrics.loss == other.loss


class Draws(nn.Module):
    """Draws random numbers in evaluation, too."""

    @nn.compact
    def __call__(self, image):
        noise = jnp.zeros((len(image), 1))
        if not self.is_initializing():
            noise = jax.random.normal(self.make_rng("noise"), noise.shape)
        return nn.Dense(4)(image.reshape(len(image), -1)) + noise


class Deterministic(nn.Module):
    """Has an argument that nothing would set."""

    @nn.compact
    def __call__(self, image, deterministic=True):
        return nn.Dense(4)(nn.Dropout(0.5, deterministic=deterministic)(image.reshape(len(image), -1)))


def test_what_would_have_no_effect_is_an_error():
    with pytest.raises(ValueError, match=r'`model` must draw no random numbers in evaluation, got .*"noise"'):
        eval_step(start(Draws()), BATCH, model=Draws())
    with pytest.raises(ValueError, match=r"`model` must be called as .*, got the argument 'deterministic' of Determin"):
        start(Deterministic())


def flatten(image):
    return image.reshape(len(image), -1)


def test_a_sequence_of_layers():
    model = nn.Sequential((flatten, nn.Dense(4)))

    def objective(params):
        return cross_entropy(model.apply({"params": params}, IMAGE[:5]), LABEL[:5]).mean()

    assert_step(start(model), BATCH, objective, model=model)


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, image, train=False):
        return nn.Dropout(0.5, deterministic=not train)(image)


def test_a_sequence_whose_later_layers_would_not_be_told_that_they_are_trained():
    for first in (flatten, Dropped()):
        message = r"`model` must have the argument 'train' in the first layer of an `nn.Sequential`.* in Dropped\."
        with pytest.raises(ValueError, match=message):
            start(nn.Sequential((first, Dropped(), flatten, nn.Dense(4))))
    start(nn.Sequential((Dropped(), flatten, nn.Dense(4))))


class NoParameters(nn.Module):
    """Has nothing to train."""

    def __call__(self, image):
        return image.mean((1, 2))


def test_a_network_without_parameters():
    with pytest.raises(ValueError, match=r"`model` must have parameters to train, got \[\] from NoParameters\."):
        start(NoParameters())


# --- The state ------------------------------------------------------------------------------------------------------


def test_a_state_that_is_not_donated_stays_alive():
    state = start(Linear())
    average = state.params  # The same arrays.
    forks = [train_step(state, BATCH, KEY, model=Linear(), tx=TX, donate=False)[0] for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, forks[0], forks[1])
    jax.tree.map(np.testing.assert_array_equal, state.params, average)
    donated, _ = train_step(state, BATCH, KEY, model=Linear(), tx=TX)
    jax.tree.map(np.testing.assert_array_equal, donated, forks[0])
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(jax.tree.leaves(average)[0])
    for use in (partial(train_step, state, BATCH, KEY, tx=TX), partial(eval_step, state, BATCH)):
        with pytest.raises(ValueError, match=r"`state` must be valid, got one that was donated .* pass donate=False"):
            use(model=Linear())


def test_a_gradient_through_the_step_as_in_maml():
    state = start(Linear())

    def after_one_step(params):
        inner, _ = train_step(state._replace(params=params), BATCH, KEY, model=Linear(), tx=TX)
        return eval_step(inner, BATCH, model=Linear()).loss

    def by_hand(params):
        mean = lambda p: cross_entropy(Linear().apply({"params": p}, IMAGE[:5]), LABEL[:5]).mean()  # noqa: E731
        inner = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(mean)(params))
        return 5 * mean(inner)

    expected = jax.jit(jax.grad(by_hand))(state.params)
    for grad in (jax.grad(after_one_step), jax.jit(jax.grad(after_one_step))):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-6), grad(state.params), expected)


def test_a_gradient_of_what_the_optimizer_closes_over():
    state = start(Linear())

    def after_one_step(rate):  # Outside of jit, nothing is donated either.
        inner, _ = train_step(state, BATCH, KEY, model=Linear(), tx=optax.sgd(rate))
        return eval_step(inner, BATCH, model=Linear()).loss

    mean = lambda p: cross_entropy(Linear().apply({"params": p}, IMAGE[:5]), LABEL[:5]).mean()  # noqa: E731

    def moved(rate):
        return 5 * mean(jax.tree.map(lambda p, g: p - rate * g, state.params, jax.grad(mean)(state.params)))

    np.testing.assert_allclose(jax.grad(after_one_step)(0.1), jax.jit(jax.grad(moved))(0.1), rtol=1e-4)


def train(key, steps=3):
    """Trains from a key, as one pure function."""
    state = init_state(key, jnp.zeros((1, *SHAPE)), model=Remembers(), tx=TX)

    def step(state, _):
        return train_step(state, BATCH, key, model=Remembers(), tx=TX)

    return lax.scan(step, state, length=steps)


def test_many_seeds_by_vmap_and_scan_equal_single_steps():
    keys = jax.random.split(jax.random.key(3), 2)
    together, metrics = jax.jit(jax.vmap(train))(keys)
    assert metrics.grad_norm.shape == (2, 3)
    for i, key in enumerate(keys):
        state = init_state(key, jnp.zeros((1, *SHAPE)), model=Remembers(), tx=TX)
        for _ in range(3):
            state, _ = train_step(state, BATCH, key, model=Remembers(), tx=TX)
        of_seed: TrainState = jax.tree.map(lambda x, i=i: x[i], together)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), of_seed, state)


# --- The loop -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noisy(Optimizer):
    """Has a PRNG key in its state."""

    def transform(self, learning_rate):
        return optax.noisy_sgd(learning_rate, key=jax.random.key(3))


def arrays(size=40):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (size, 6, 6, 1), np.uint8), np.arange(size) % 4


def config(**changes):
    return Config(dataset=(*arrays(), *arrays(20)), num_epochs=2, batch_size=9, model=Linear(), **changes)


def test_an_optimizer_with_a_key_in_its_state_resumes_with_the_same_bits(tmp_path):
    def stop(step, metrics):
        if step == 5:
            raise TimeoutError

    whole = train_and_evaluate(config(optim=Noisy()), run_dir=tmp_path / "whole")
    with pytest.raises(TimeoutError):
        train_and_evaluate(config(optim=Noisy()), run_dir=tmp_path / "run", on_step=stop, checkpoint_seconds=0.0)
    resumed = train_and_evaluate(config(optim=Noisy()), run_dir=tmp_path / "run", resume="auto")
    assert resumed.finished_result()["sha256"] == whole.finished_result()["sha256"]
    keys = [leaf for leaf in jax.tree.leaves(load_run(tmp_path / "run", config(optim=Noisy())).state) if is_key(leaf)]
    assert len(keys) == 1


@pytest.mark.slow
def test_a_run_under_strict_dtype_promotion_has_the_same_bits(tmp_path):
    """With soft labels, weight decay, clipping, accumulation and test-time augmentation."""
    optim = Adam(weight_decay=1e-3, clip_norm=1.0, accumulate_steps=2, schedule="one_cycle")
    strict = config(optim=optim, augment=CutMix(flip="random", cutout=2), tta="uncertain")
    digests = []
    for promotion in ("standard", "strict"):
        with jax.numpy_dtype_promotion(promotion):
            run = train_and_evaluate(strict, run_dir=tmp_path / promotion)
        digests.append(run.finished_result()["sha256"])
    assert digests[0] == digests[1]
