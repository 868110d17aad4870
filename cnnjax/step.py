"""The step: gradient, update and apply in one jitted function; and the evaluation of a batch."""

import inspect
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key, PyTree

from cnnjax.compiler import jit
from cnnjax.data.tta import mean_logits
from cnnjax.errors import ArgumentError, UserError, describe, describe_shapes
from cnnjax.losses import softmax_cross_entropy
from cnnjax.metrics import Metrics, sum_metrics
from cnnjax.network import Network, apply_in_evaluation, apply_in_training, check_network, init_variables, logits_of
from cnnjax.optim.transforms import AverageState
from cnnjax.pretrained import VariablePath, Weights, insert_weights, replacements
from cnnjax.sharding import Placement
from cnnjax.typing import AnyArray, BatchLike, LossFn


class TrainState(NamedTuple):
    """Everything that training changes, as arrays.

    Attributes:
      step: number of updates, int32.
      params: trainable parameters.
      model_state: every other collection of the network by name, such as {"batch_stats": ...}.
      opt_state: state of the optimizer.
    """

    step: Int[Array, ""]
    params: PyTree
    model_state: dict[str, PyTree]
    opt_state: Any


def init_state(
    key: Key[Array, ""], image: Float[AnyArray, "B H W C"], *, model: Network, tx: optax.GradientTransformation
) -> TrainState:
    """Returns the initial state of `model` and `tx`.

    Args:
      key: consumed; draws the initial parameters.
      image: images of the shape to train on; their values do not matter.
      model: a Linen module, called as `model(image)` or `model(image, train=bool)`; or `Functions`.
      tx: an optax optimizer.

    Raises:
      ValueError: `model` is not a network, is not hashable, or has no parameters.
    """
    check_network(model)
    check_tx(tx)
    return _init_state(key, image, model=model, tx=tx)


@jit(static_argnames=("model", "tx"), runs_once=True)
def _init_state(
    key: Key[Array, ""], image: Float[AnyArray, "B H W C"], *, model: Network, tx: optax.GradientTransformation
) -> TrainState:
    variables = init_variables(key, image, model=model)
    params = variables.pop("params")
    return TrainState(jnp.zeros((), jnp.int32), params, variables, init_optimizer(tx, params))


def init_from_data(
    state: TrainState, image: Float[AnyArray, "N H W C"], *, model: Network, tx: optax.GradientTransformation
) -> TrainState:
    """Initializes a network from data, by its method `init_from_data(variables, image) -> variables`.

    Args:
      image: standardized training images.
    """
    if not hasattr(model, "init_from_data"):
        raise ArgumentError(f"`model` must have a method init_from_data, got {type(model).__name__} without it.")
    before = jax.tree.leaves(state.params)
    network: Any = model
    variables = {**network.init_from_data({"params": state.params, **state.model_state}, image)}
    params = variables.pop("params")
    unchanged = [*map(id, before)] == [*map(id, jax.tree.leaves(params))]
    opt_state = state.opt_state if unchanged else init_optimizer(tx, params)
    return TrainState(state.step, params, variables, opt_state)


def init_from_weights(
    state: TrainState, weights: Weights, *, model: Network, tx: optax.GradientTransformation
) -> TrainState:
    """Initializes a network from pretrained weights, except for a head with another number of classes.

    Example:
      >>> model = EfficientNetLite0(num_classes=3, weights="imagenet")
      >>> weights = load_weights(model)
      >>> state = init_from_weights(init_state(key, image, model=model, tx=tx), weights, model=model, tx=tx)
      >>> mean, std = weights.standardization
      >>> batch = Batch((image - mean) / std, label, mask)  # image: pixels from 0 to 255, not divided by 255

    Args:
      weights: of `load_weights`.
      model: a network with the methods `variables_from_torch` and `depths`, see `EfficientNetLite0`.

    Raises:
      UserError: an array has another shape than the network's.
    """
    return replace_variables(state, replacements({"params": state.params, **state.model_state}, weights, model), tx=tx)


def replace_variables(
    state: TrainState, loaded: dict[VariablePath, Array], *, tx: optax.GradientTransformation
) -> TrainState:
    """Returns a state with other variables at some paths, and a new optimizer state."""
    variables = insert_weights({"params": state.params, **state.model_state}, loaded)
    params = variables.pop("params")
    return TrainState(state.step, params, variables, init_optimizer(tx, params))


def abstract_state(image_shape: tuple[int, ...], *, model: Network, tx: optax.GradientTransformation) -> TrainState:
    """Returns the shapes and dtypes of a state, initialized from data if the network is, without computing anything.

    Args:
      image_shape: (H, W, C).
    """
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    state = jax.eval_shape(partial(init_state, model=model, tx=tx), jax.random.key(0), image)
    if hasattr(model, "init_from_data"):
        with suppress(jax.errors.JAXTypeError):  # It needs values, so that shapes stay as they are.
            return jax.eval_shape(partial(init_from_data, model=model, tx=tx), state, image)
    return state


@jit
def copy_state(state: TrainState) -> TrainState:
    """Returns a copy that stays valid after `state` is donated."""
    return jax.tree.map(jnp.copy, state)


def train_step(
    state: TrainState,
    batch: BatchLike,
    key: Key[Array, ""],
    *,
    model: Network,
    tx: optax.GradientTransformation,
    loss_fn: LossFn = softmax_cross_entropy,
    frozen: tuple[str, ...] = (),
    placement: Placement | None = None,
    donate: bool = True,
) -> tuple[TrainState, Metrics]:
    """Updates the parameters once, with the gradient of the mean loss over the unmasked examples.

    The step is compiled once for equal static arguments, which are all after `key`, and equal shapes. To change a value
    without compiling again, make it an array: of the batch, or of the optimizer's state (`optax.inject_hyperparams`).

    Args:
      state: donated; use the returned one instead.
      batch: a `Batch`, or a NamedTuple with its fields and more; at least one example must be unmasked.
      key: the same for every step; `state.step` is folded into it.
      model: a hashable Linen module, or `Functions`. In training every collection is mutable, every random stream has
        its own key, and what is sown into "losses", scalars, is added to the mean loss.
      tx: an optax optimizer. It receives the arguments `value`, `grad` and `value_fn` if it accepts them. Build it
        once: another one retraces the step.
      loss_fn: `(logits [B K], batch) -> loss [B]`, or `-> (loss [B], {name: value [B]})` with values for the metrics.
        If the network returns a tuple, the loss receives the whole tuple. Build it once, too.
      frozen: top-level names in `state.params` whose gradients are zero and are not computed. Weight decay and momentum
        may still move these parameters: mask them in `tx` to keep them fixed.
      placement: how devices divide `state` (FSDP), see `cnnjax.sharding.place`; None if each device has all of it.
      donate: whether the memory of `state` is reused; False keeps it valid.

    Returns:
      The next state, and the metrics of this batch before the update.

    Raises:
      ValueError: an argument or a shape is wrong, `state` was donated before, or `tx` needs more arguments.
    """
    check_network(model)
    check_tx(tx)
    _check_valid(state)
    step = _donating_step if donate else _keeping_step
    options: Any = {"loss_fn": loss_fn, "frozen": frozen, "placement": placement}
    return step(state, batch, key, model=model, tx=tx, **options)


def _step(
    state: TrainState,
    batch: BatchLike,
    key: Key[Array, ""],
    *,
    model: Network,
    tx: optax.GradientTransformation,
    loss_fn: LossFn,
    frozen: tuple[str, ...],
    placement: Placement | None,
) -> tuple[TrainState, Metrics]:
    check_batch(batch)
    names = sorted(state.params) if isinstance(state.params, dict) else []
    if not isinstance(frozen, tuple) or not {*frozen} <= {*names}:
        raise ArgumentError(f"`frozen` must be a tuple of top-level names in `state.params` ({names}), got {frozen!r}.")
    key = jax.random.fold_in(key, state.step)

    def mean_loss(params: PyTree) -> tuple[Float[Array, ""], tuple[Metrics, dict[str, PyTree]]]:
        if frozen:
            params = {name: lax.stop_gradient(part) if name in frozen else part for name, part in params.items()}
        if placement is not None:
            params = placement.gather(params)
        output, model_state, extra_loss = apply_in_training(model, params, state.model_state, batch.image, key)
        metrics = sum_metrics(output, batch, loss_fn)
        count = metrics.num_examples.astype(metrics.loss.dtype)
        if extra_loss is not None:
            metrics = metrics._replace(loss=metrics.loss + extra_loss.astype(metrics.loss.dtype) * count)
        return metrics.loss / count, (metrics, model_state)

    (loss, (metrics, model_state)), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
    extra = {"value": loss, "grad": grads, "value_fn": lambda params: mean_loss(params)[0]}
    with jax.numpy_dtype_promotion("standard"):  # Parameters, and optimizers of optax, may mix dtypes.
        updates, opt_state = update(tx, grads, state, extra)
        params = optax.apply_updates(state.params, updates)
        metrics = metrics._replace(norm=optax.tree.norm(grads))
    state = TrainState(state.step + 1, params, model_state, opt_state)
    if placement is not None:
        state = lax.with_sharding_constraint(state, placement.of_state(state))
    return state, metrics


# Two programs: whether an argument is donated is decided at `jit`, not at the call.
_STATIC = ("model", "tx", "loss_fn", "frozen", "placement")
_donating_step = jit(_step, static_argnames=_STATIC, donate_argnames=("state",))
_keeping_step = jit(_step, static_argnames=_STATIC)


def init_optimizer(tx: optax.GradientTransformation, params: PyTree) -> Any:
    """Returns the initial state of an optimizer.

    Its arrays are distinct from each other and from the parameters, because a step donates each of them. It has no weak
    types: a step changes them, and the next one retraces.
    """
    seen = {*map(id, jax.tree.leaves(params))}

    def own(x: Any) -> Any:
        y = jnp.copy(x) if isinstance(x, jax.Array) and id(x) in seen else x
        seen.add(id(x))
        return y.astype(y.dtype) if getattr(y, "weak_type", False) else y

    return jax.tree.map(own, tx.init(params))


def update(
    tx: optax.GradientTransformation, grads: PyTree, state: TrainState, extra: dict[str, Any]
) -> tuple[PyTree, Any]:
    """Returns the updates and the next state of an optimizer, which receives those of `extra` that it accepts."""
    parameters = inspect.signature(tx.update).parameters
    if all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
        extra = {name: value for name, value in extra.items() if name in parameters}
    try:
        return tx.update(grads, state.opt_state, state.params, **extra)
    except UserError:
        raise
    except Exception as error:
        raise ArgumentError(
            "`tx` must be the optimizer of `state`, and accept gradients, parameters, and any of `value`, `grad` and "
            f"`value_fn`, got {describe(error)} If it needs other arguments, as the opaque mode of optax.contrib.sam "
            "does, or refuses these, wrap its `update`. optax.lookahead, and a line search over some parameters, are "
            "not supported."
        ) from error


def eval_params(state: TrainState) -> PyTree:
    """Returns the parameters to evaluate: those of a moving average or a schedule-free optimizer, else `state.params`.

    Batch statistics remain those of the training parameters.

    Source: Defazio et al., "The Road Less Scheduled" (2024), as in `optax.contrib.schedule_free_eval_params`.
    """

    def is_average(x: Any) -> bool:
        return isinstance(x, AverageState)

    for found in filter(is_average, jax.tree.leaves(state.opt_state, is_leaf=is_average)):
        return found.params

    def is_schedule_free(x: Any) -> bool:
        return isinstance(x, optax.contrib.ScheduleFreeState)

    params = state.params
    for found in filter(is_schedule_free, jax.tree.leaves(state.opt_state, is_leaf=is_schedule_free)):

        def average(z: Any, p: PyTree, found: Any = found) -> PyTree:
            if isinstance(z, optax.MaskedNode):  # In place of parameters of another optimizer.
                return p
            return optax.contrib.schedule_free_eval_params(found._replace(z=z), p)

        params = jax.tree.map(average, found.z, params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    return params


def eval_step(
    state: TrainState,
    batch: BatchLike,
    *,
    model: Network,
    loss_fn: LossFn = softmax_cross_entropy,
    tta: str = "none",
) -> Metrics:
    """Returns the metrics of a batch, without dropout, with running statistics and `eval_params`.

    Args:
      state: not donated.
      batch, model, loss_fn: see `train_step`.
      tta: test-time augmentation, see `cnnjax.data.tta.mean_logits`; the loss then receives only the logits.
    """
    check_network(model)
    _check_valid(state)
    return _eval_step(state, batch, model=model, loss_fn=loss_fn, tta=tta)


@jit(static_argnames=("model", "loss_fn", "tta"))
def _eval_step(state: TrainState, batch: BatchLike, *, model: Network, loss_fn: LossFn, tta: str) -> Metrics:
    check_batch(batch)
    return sum_metrics(apply_views(state, batch, model, tta), batch, loss_fn)


def check_tx(tx: Any) -> None:
    """Raises a `ValueError` unless `tx` is an optax optimizer."""
    if not hasattr(tx, "update"):
        raise ArgumentError(
            f"`tx` must be an optax optimizer, got {type(tx).__name__}. Make one of a cnnjax `Optimizer` by "
            "`make_tx(num_steps)`."
        )


def _check_valid(state: TrainState) -> None:
    """Raises a `ValueError` if `state` was donated. Skips tracers, which never are."""
    step: Any = getattr(state, "step", None)
    if isinstance(step, jax.Array) and not isinstance(step, Tracer) and step.is_deleted():
        raise ArgumentError(
            "`state` must be valid, got one that was donated to an earlier step. Use the state that this step "
            "returned, or pass donate=False to it."
        )


def check_batch(batch: Any) -> None:
    """Raises a `ValueError` unless `batch` has the fields of a `Batch`, and images of floating-point numbers."""
    if not isinstance(batch, BatchLike):
        got = type(batch).__name__
        raise ArgumentError(f"`batch` must be a Batch, or a NamedTuple with its fields and more, got {got}.")
    if not hasattr(batch.image, "dtype") or not jnp.issubdtype(batch.image.dtype, jnp.floating):
        raise ArgumentError(
            f"`batch.image` must be standardized, of floating-point numbers, got {describe_shapes(batch.image)}. Bytes "
            "are not scaled."
        )


def apply_views(state: TrainState, batch: BatchLike, model: Network, tta: str) -> Any:
    """Returns the output of a network in evaluation: the mean logits over views of each image, unless `tta` is none."""
    params = eval_params(state)

    def output_fn(image: Float[AnyArray, "B H W C"]) -> Any:
        return apply_in_evaluation(model, params, state.model_state, image)

    if tta == "none":
        return output_fn(batch.image)
    return mean_logits(lambda image: logits_of(output_fn(image)), batch.image, tta, batch.mask)
