"""Every optimizer of optax in `train_step`, compared with optax alone."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib
from programs.research import make_arrays

from cnnjax import (
    Batch,
    Config,
    Optimizer,
    ParamGroup,
    TrainState,
    UserError,
    eval_step,
    init_from_data,
    init_from_weights,
    init_state,
    softmax_cross_entropy,
    train_and_evaluate,
    train_step,
)
from cnnjax.optim.transforms import lookahead
from cnnjax.pretrained import Weights
from cnnjax.state import eval_params
from cnnjax.typing import Preprocessing

pytestmark = pytest.mark.usefixtures("quick_compilation")
KEY = jax.random.key(0)
IMAGE = np.random.default_rng(0).normal(size=(6, 2, 2, 1)).astype(np.float32)
BATCH = Batch(IMAGE, np.arange(6, dtype=np.int32) % 4, np.ones(6, bool))


class Net(nn.Module):
    @nn.compact
    def __call__(self, image):
        return nn.Dense(4)(image.reshape(len(image), -1))


MODEL = Net()


def mean_loss(params):
    logits = MODEL.apply({"params": params}, IMAGE)
    return optax.softmax_cross_entropy_with_integer_labels(logits, BATCH.label).mean()


value_and_grad, initial_params = jax.jit(jax.value_and_grad(mean_loss)), jax.jit(MODEL.init)


def train(tx, steps=3, loss_fn=softmax_cross_entropy):
    state = init_state(KEY, IMAGE, model=MODEL, tx=tx)
    for _ in range(steps):
        state, _ = train_step(state, BATCH, KEY, model=MODEL, tx=tx, loss_fn=loss_fn)
    return state


def train_by_optax(tx, steps=3, extra=()):
    """Returns the state after updates by optax alone, with the arguments `extra` of those that it may take."""
    params = initial_params(KEY, IMAGE)["params"]
    opt_state = tx.init(params)

    def update(grads, opt_state, params, value):
        arguments = {
            "value": value,
            "grad": grads,
            "value_fn": mean_loss,
            "obj_fn": mean_loss,
            "grad_fn": lambda params, _: jax.grad(mean_loss)(params),
        }
        updates, opt_state = tx.update(grads, opt_state, params, **{name: arguments[name] for name in extra})
        return optax.apply_updates(params, updates), opt_state

    update = jax.jit(update)
    for _ in range(steps):
        value, grads = value_and_grad(params)
        params, opt_state = update(grads, opt_state, params, value)
    return TrainState(jnp.int32(steps), params, {}, opt_state)


def assert_close(a, b, rtol=1e-4, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol, atol), a, b)


# --- Each optimizer -------------------------------------------------------------------------------------------------


def optimizers():
    """Yields the names of optax's functions that return an optimizer with a learning rate."""
    for module in (optax, contrib):
        for name, function in vars(module).items():
            if inspect.isfunction(function) and not name.startswith(("_", "scale_by")):
                first, *_ = [*inspect.signature(function).parameters, ""]
                if first in ("learning_rate", "max_learning_rate"):
                    yield name, function


def plateau():
    return optax.chain(optax.sgd(0.1), contrib.reduce_on_plateau(patience=1, rtol=1.0))


def sam(**kwargs):
    return contrib.sam(optax.sgd(0.1), optax.chain(contrib.normalize(), optax.sgd(0.05)), **kwargs)


LINE_SEARCH = "value", "grad", "value_fn"
BY_HAND: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {  # Those that optax calls in another way.
    "lbfgs": (optax.lbfgs, LINE_SEARCH),
    "polyak_sgd": (optax.polyak_sgd, ("value",)),
    "momo": (lambda: contrib.momo(0.1), ("value",)),
    "momo_adam": (lambda: contrib.momo_adam(0.1), ("value",)),
    "noisy_sgd": (lambda: optax.noisy_sgd(0.1, key=jax.random.key(1)), ()),
    "backtracking": (lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)), LINE_SEARCH),
    "reduce_on_plateau": (plateau, ("value",)),
    "mechanize": (lambda: contrib.mechanize(optax.sgd(0.1)), ()),
    "sam": (sam, ()),
}
FAIL = {"sophia", "dpsgd", "optimistic_adam"}  # They need other arguments; the last is deprecated.
ALL = {
    **{name: (lambda f=function: f(0.1), ()) for name, function in optimizers() if name not in FAIL},
    **BY_HAND,
}


# Most are pairs of functions like these; `make test-slow` tries all of them.
FEW = {"adam", "lion", "muon", "schedule_free_adamw", *BY_HAND} - {"momo_adam", "backtracking"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in ALL])
def test_an_optimizer_equals_optax_alone_and_is_traced_once(name):
    make, extra = ALL[name]
    tx, traces = make(), []

    def loss_fn(logits, batch):
        traces.append(len(traces))
        return softmax_cross_entropy(logits, batch)

    state = train(tx, steps=1, loss_fn=loss_fn)
    first = len(traces)
    for _ in range(2):
        state, _ = train_step(state, BATCH, KEY, model=MODEL, tx=tx, loss_fn=loss_fn)
    assert len(traces) == first
    assert_close(state.params, train_by_optax(tx, extra=extra).params)


def test_the_list_of_optimizers_is_complete():
    assert len(ALL) >= 48
    assert {"adam", "lbfgs", "muon", "schedule_free_sgd", "prodigy", "noisy_sgd"} <= ALL.keys()


# --- The arguments that an optimizer receives -----------------------------------------------------------------------


class Dropped(nn.Module):
    """Uses dropout; has two parts."""

    @nn.compact
    def __call__(self, image, *, train):
        x = nn.Dense(4, name="body")(image.reshape(len(image), -1))
        return nn.Dense(4, name="head")(nn.Dropout(0.5, deterministic=not train)(x))


class Recorded(NamedTuple):
    value: Any
    value_again: Any
    grad: Any


def recorder(received):
    """Returns an optimizer that keeps in its state what it receives."""

    def update(updates, state, params, **extra):
        received.append({*extra})
        return updates, Recorded(extra["value"], extra["value_fn"](params), extra["grad"])

    return optax.GradientTransformationExtraArgs(lambda params: Recorded(jnp.inf, jnp.inf, params), update)


def test_an_optimizer_receives_the_loss_its_gradient_and_the_function():
    received, model = [], Dropped()
    tx = optax.chain(recorder(received), optax.sgd(1.0))
    before = init_state(KEY, IMAGE, model=model, tx=tx)
    state, metrics = train_step(before, BATCH, KEY, model=model, tx=tx, donate=False)
    assert received == [{"value", "grad", "value_fn"}]
    recorded = state.opt_state[0]
    np.testing.assert_allclose(recorded.value, metrics.loss / 6, rtol=1e-6)
    np.testing.assert_allclose(recorded.value_again, recorded.value, rtol=1e-6)  # The same units are dropped.
    assert_close(recorded.grad, jax.tree.map(lambda a, b: a - b, before.params, state.params))
    again, _ = train_step(before._replace(step=jnp.int32(1)), BATCH, KEY, model=model, tx=tx)
    assert again.opt_state[0].value != recorded.value


BODY = {"body": "a", "head": "b"}
NESTINGS = {
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx),
    "named_chain": lambda tx: optax.named_chain(("clip", optax.clip(1.0)), ("tx", tx)),
    "partition": lambda tx: optax.partition({"a": tx, "b": optax.sgd(0.1)}, BODY),
    "masked": lambda tx: optax.masked(tx, {"body": True, "head": False}),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "skip_not_finite": lambda tx: optax.MultiSteps(
        tx, 2, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation(),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda rate: optax.chain(tx, optax.sgd(rate)))(rate=0.1),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda step: step % 2 == 0),
    "lookahead of cnnjax": lambda tx: lookahead(tx, 2, 4),
}


def trace(tx, model):
    """Traces two steps: the state keeps its structure, shapes and dtypes."""
    state = jax.eval_shape(lambda: init_state(KEY, IMAGE, model=model, tx=tx))
    after, _ = jax.eval_shape(lambda state: train_step(state, BATCH, KEY, model=model, tx=tx), state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), after)


@pytest.mark.parametrize("nesting", NESTINGS)
def test_a_nested_optimizer_receives_the_arguments(nesting):
    received = []

    def update(updates, state, params, *, value, grad, value_fn):
        received.append((jnp.shape(value), jax.tree.map(jnp.shape, grad)))
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    trace(NESTINGS[nesting](inner), Dropped())
    part = {"kernel": (4, 4), "bias": (4,)}
    assert received
    assert all(shapes == ((), {"body": part, "head": part}) for shapes in received)


def test_an_optimizer_receives_only_the_arguments_that_it_accepts():
    received = []

    def none(updates, state, params=None):
        return updates, state

    def one(updates, state, params=None, value=None):
        received.append(value.shape)
        return updates, state

    def two(updates, state, params, *, value, value_fn):
        received.append(value_fn(params).shape)
        return updates, state

    for update in (none, one, two):
        trace(optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update), MODEL)
    assert received == [(), ()]


# --- Schedule-free optimizers ---------------------------------------------------------------------------------------


def free(rate=0.1):
    return contrib.schedule_free_sgd(rate, b1=0.8)


SCHEDULE_FREE = {  # The optimizer, and where its state is.
    "alone": (free, lambda state: state),
    "chain": (lambda: optax.chain(optax.clip(1.0), free()), lambda state: state[1]),
    "inject_hyperparams": (lambda: optax.inject_hyperparams(free)(rate=0.1), lambda state: state.inner_state),
    "MultiSteps": (
        lambda: optax.MultiSteps(free(), 2).gradient_transformation(),
        lambda state: state.inner_opt_state,
    ),
    "apply_if_finite": (lambda: optax.apply_if_finite(free(), 2), lambda state: state.inner_state),
    "lookahead of cnnjax": (lambda: lookahead(free(), 2, 6), lambda state: state.inner),
}


@pytest.mark.parametrize("nesting", SCHEDULE_FREE)
def test_schedule_free_parameters_are_evaluated(nesting):
    make, find = SCHEDULE_FREE[nesting]
    state = train(make(), steps=5)
    expected = jax.jit(contrib.schedule_free_eval_params)(find(state.opt_state), state.params)
    assert_close(eval_params(state), expected, rtol=1e-6, atol=1e-7)
    assert np.abs(expected["Dense_0"]["kernel"] - state.params["Dense_0"]["kernel"]).max() > 1e-3
    loss, _ = value_and_grad(expected)
    np.testing.assert_allclose(eval_step(state, BATCH, model=MODEL).loss, 6 * loss, rtol=1e-5)


def test_parts_with_schedule_free_optimizers_of_their_own_by_vmap():
    """Two states, of which the kernel, the bias and the head are trained in another way."""
    model = Dropped()
    labels = {"body": {"kernel": "a", "bias": "b"}, "head": "c"}
    tx = optax.partition({"a": free(0.1), "b": contrib.schedule_free_adamw(0.2), "c": optax.sgd(0.1)}, labels)

    def train(key):
        state = init_state(key, IMAGE, model=model, tx=tx)
        for _ in range(2):
            state, _ = train_step(state, BATCH, key, model=model, tx=tx)
        return state

    def train_and_average(key):
        state = train(key)
        return state, eval_params(state)

    states, got = jax.device_get(jax.jit(jax.vmap(train_and_average))(jax.random.split(KEY, 2)))
    for i in range(2):
        params, opt_state = jax.tree.map(lambda x, i=i: x[i], (states.params, states.opt_state))
        expected = {"body": {}, "head": params["head"]}
        for label, name in (("a", "kernel"), ("b", "bias")):
            part = opt_state.inner_states[label].inner_state
            z, y = part.z["body"][name], params["body"][name]
            expected["body"][name] = (y - (1 - part.b1) * z) / part.b1
        assert_close(jax.tree.map(lambda x, i=i: x[i], got), expected, rtol=1e-5, atol=1e-6)


# --- Optimizers that need other arguments, or refuse these ----------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: sam(opaque_mode=True), "ValueError: grad_fn must be provided when opaque_mode=True"),
        (lambda: optax.chain(optax.clip(1.0), sam()), r"TypeError: .* got an unexpected keyword argument 'value'"),
        (lambda: contrib.sophia(0.1), "ValueError: obj_fn must be provided to hutchinson update function"),
        (lambda: optax.lookahead(optax.sgd(0.1), 2, 0.5), "AttributeError: 'dict' object has no attribute 'fast'"),
    ],
    ids=["opaque sam", "sam in a chain", "sophia", "lookahead of optax"],
)
def test_an_optimizer_that_cannot_work_says_so(make, text):
    message = rf"`tx` must be the optimizer of .* got .*{text}\. If it .* wrap its `update`\. optax.lookahead, .* not"
    with pytest.raises(ValueError, match=message) as caught:
        train(make())
    assert "\n" not in str(caught.value)


def opaque_sam():
    tx = sam(opaque_mode=True)

    def update(updates, state, params, *, value_fn, **_):
        return tx.update(updates, state, params, grad_fn=lambda params, _: jax.grad(value_fn)(params))

    return optax.GradientTransformationExtraArgs(tx.init, update)


def sophia():
    tx = contrib.sophia(0.1)

    def update(updates, state, params, *, value_fn, **_):
        return tx.update(updates, state, params, obj_fn=value_fn)

    return optax.GradientTransformationExtraArgs(tx.init, update)


@pytest.mark.parametrize(
    ("wrapped", "alone", "extra"),
    [
        (opaque_sam, lambda: sam(opaque_mode=True), ("grad_fn",)),
        (lambda: optax.chain(optax.clip(0.1), optax.GradientTransformation(*sam())), "", ()),
        (sophia, lambda: contrib.sophia(0.1), ("obj_fn",)),
    ],
    ids=["opaque sam", "sam in a chain", "sophia"],
)
def test_a_wrapped_update_makes_it_work(wrapped, alone, extra):
    reference = alone() if alone else optax.chain(optax.clip(0.1), sam())
    assert_close(train(wrapped()).params, train_by_optax(reference, extra=extra).params)


class Initialized(Net):
    """Starts from data or from weights; both set every parameter."""

    def depths(self):
        return ("Dense_0",)

    def init_from_data(self, variables, image):
        return jax.tree.map(lambda x: x + image.mean(), variables)

    def variables_from_torch(self, tensors):
        return {"params": {"Dense_0": tensors}}


PIXELS = Preprocessing(2, (0.0,) * 3, (1.0,) * 3, "bilinear")
WEIGHTS = Weights({"kernel": np.eye(4, dtype=np.float32), "bias": np.ones(4, np.float32)}, "", "", "", PIXELS)


@pytest.mark.parametrize(("init", "source"), [(init_from_data, IMAGE), (init_from_weights, WEIGHTS)])
@pytest.mark.parametrize("tx", [contrib.prodigy(0.1), contrib.cocob()], ids=["prodigy", "cocob"])
def test_a_step_donates_a_state_whose_optimizer_keeps_the_parameters(tx, init, source):
    model = Initialized()
    state = init(init_state(KEY, IMAGE, model=model, tx=tx), source, model=model, tx=tx)
    kept, _ = train_step(state, BATCH, KEY, model=model, tx=tx, donate=False)
    donated, _ = train_step(state, BATCH, KEY, model=model, tx=tx)
    assert_close(donated, kept)


# --- In a `Config` --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Wrapping(Optimizer):
    """An optimizer of optax, by name."""

    of: str = "free"

    def transform(self, learning_rate):
        if self.of == "plateau":
            return optax.chain(optax.sgd(learning_rate), contrib.reduce_on_plateau(patience=1))
        if self.of == "lbfgs":
            return optax.lbfgs(learning_rate)
        return contrib.schedule_free_adamw(self.learning_rate)


GROUPS = (ParamGroup("head", multiplier=0.5),)
OPTIONS = {"clip_norm": 1.0, "accumulate_steps": 2, "lookahead": 2, "groups": GROUPS}


@pytest.mark.parametrize("of", ["free", "plateau", "lbfgs"])
@pytest.mark.parametrize("option", OPTIONS)
def test_such_an_optimizer_works_with_every_option(of, option):
    tx = Wrapping(of=of, **{option: OPTIONS[option]}).make_tx(4)
    if (of, option) == ("lbfgs", "groups"):  # A line search needs all parameters.
        with pytest.raises(ValueError, match="`tx` must be the optimizer of"):
            trace(tx, Dropped())
    elif option == "accumulate_steps" and of != "free":  # The loss is that of the last batch alone.
        message = (
            "`optim.accumulate_steps` must be 1 for an optimizer that needs `value`, .*got 2: TypeError: .*'value'"
        )
        with pytest.raises(UserError, match=message):
            trace(tx, Dropped())
    else:
        trace(tx, Dropped())


def test_the_loop_evaluates_schedule_free_parameters(tmp_path):
    x_train, _, x_test, y_test = arrays = make_arrays()
    optim = Wrapping(learning_rate=0.02, clip_norm=1.0, accumulate_steps=2, lookahead=3)
    config = Config(dataset=arrays, num_epochs=2, batch_size=16, validation_fraction=0.0, model=Dropped(), optim=optim)
    run = train_and_evaluate(config, run_dir=tmp_path / "run")
    free_state = run.state.opt_state.inner_opt_state.inner[1]
    params = jax.jit(contrib.schedule_free_eval_params)(free_state, run.state.params)
    assert np.abs(params["body"]["kernel"] - run.state.params["body"]["kernel"]).max() > 1e-4
    mean, std = x_train.mean((0, 1, 2)), x_train.std((0, 1, 2))

    @jax.jit
    def test_loss(params, image):
        logits = Dropped().apply({"params": params}, image, train=False)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y_test).mean()

    loss = test_loss(params, ((x_test - mean) / std).astype(np.float32))
    np.testing.assert_allclose(run.test_loss, loss, rtol=1e-4)
