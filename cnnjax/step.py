"""The step: gradient, update and apply in one jitted function; its two parts; and the evaluation of a batch."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Key, PyTree

from cnnjax.compiler import jit
from cnnjax.data.tta import mean_logits
from cnnjax.errors import ArgumentError, UserError, describe, describe_shapes
from cnnjax.losses import softmax_cross_entropy
from cnnjax.metrics import Metrics, sum_metrics
from cnnjax.network import Network, apply_in_evaluation, apply_in_training, check_network, logits_of
from cnnjax.sharding import Placement
from cnnjax.state import TrainState, check_tx, eval_params, strong_type
from cnnjax.typing import AnyArray, BatchLike, LossFn


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
    check_valid(state)
    step = _donating_step if donate else _keeping_step
    return step(state, batch, key, model=model, tx=tx, loss_fn=loss_fn, frozen=frozen, placement=placement)


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
    options = {"model": model, "loss_fn": loss_fn, "frozen": frozen, "placement": placement}
    loss_of = partial(mean_loss, state=state, batch=batch, key=key, **options)
    grads, aux = jax.grad(loss_of, has_aux=True)(state.params)
    state, metrics = apply_gradients(state, grads, *aux, tx=tx, value_fn=lambda params: loss_of(params)[0])
    if placement is not None:
        state = lax.with_sharding_constraint(state, placement.of_state(state))
    return state, metrics


# Two programs: whether an argument is donated is decided at `jit`, not at the call.
_STATIC = ("model", "tx", "loss_fn", "frozen", "placement")
_donating_step = jit(_step, static_argnames=_STATIC, donate_argnames=("state",))
_keeping_step = jit(_step, static_argnames=_STATIC)


def mean_loss(
    params: PyTree,
    state: TrainState,
    batch: BatchLike,
    key: Key[Array, ""],
    *,
    model: Network,
    loss_fn: LossFn = softmax_cross_entropy,
    frozen: tuple[str, ...] = (),
    placement: Placement | None = None,
) -> tuple[Float[Array, ""], tuple[Metrics, dict[str, PyTree]]]:
    """Returns the loss that `train_step` differentiates: the first part of a step of your own, not jitted.

    Example:
      >>> def sam_step(state, batch, key, *, tx, **options):
      ...     loss_of = partial(mean_loss, state=state, batch=batch, key=key, **options)
      ...     grads, _ = jax.grad(loss_of, has_aux=True)(state.params)
      ...     scale = 0.05 / optax.tree.norm(grads)
      ...     nearby = jax.tree.map(lambda p, g: p + scale * g, state.params, grads)
      ...     grads, (metrics, model_state) = jax.grad(loss_of, has_aux=True)(nearby)
      ...     return apply_gradients(state, grads, metrics, model_state, tx=tx)

    Args:
      params: the parameters at which the loss is computed, instead of `state.params`.
      state: gives the state of the network, and the step.
      batch, model, loss_fn, frozen, placement: see `train_step`.
      key: the same for every step; `state.step` is folded into it.

    Returns:
      The mean loss over the unmasked examples, plus the losses that the network sows; and (metrics, model_state): the
      metrics without `norm`, and the next `model_state`.

    Raises:
      ValueError: an argument or a shape is wrong.
    """
    check_network(model)
    check_batch(batch)
    names = sorted(params) if isinstance(params, dict) else []
    if not isinstance(frozen, tuple) or not {*frozen} <= {*names}:
        raise ArgumentError(f"`frozen` must be a tuple of top-level names in the parameters ({names}), got {frozen!r}.")
    if frozen:
        params = {name: lax.stop_gradient(part) if name in frozen else part for name, part in params.items()}
    if placement is not None:
        params = placement.gather(params)
    key = jax.random.fold_in(key, state.step)
    output, model_state, extra_loss = apply_in_training(model, params, state.model_state, batch.image, key)
    metrics = sum_metrics(output, batch, loss_fn)
    if extra_loss is not None:
        count, dtype = metrics.num_examples, metrics.loss.dtype
        metrics = metrics._replace(loss=metrics.loss + extra_loss.astype(dtype) * count.astype(dtype))
    return _mean(metrics), (metrics, model_state)


def _mean(metrics: Metrics) -> Float[Array, ""]:
    """Returns the mean loss; 0 for padding alone."""
    return metrics.loss / jnp.maximum(metrics.num_examples, 1).astype(metrics.loss.dtype)


def apply_gradients(
    state: TrainState,
    grads: PyTree,
    metrics: Metrics,
    model_state: dict[str, PyTree],
    *,
    tx: optax.GradientTransformation,
    value_fn: Callable[[PyTree], Float[Array, ""]] | None = None,
) -> tuple[TrainState, Metrics]:
    """Updates the parameters once, with given gradients: the last part of a step of your own, not jitted.

    Args:
      state: the state before the step.
      grads: the gradients, with the structure and the shapes of `state.params`.
      metrics: of the batch. The optimizer receives the mean loss as `value`.
      model_state: the next state of the network, see `mean_loss`.
      tx: the optimizer, see `train_step`.
      value_fn: the loss as a function of the parameters, for an optimizer that searches along a line.

    Returns:
      The next state, and the metrics with the norm of the gradients.

    Raises:
      ValueError: the gradients are not those of the parameters, or `tx` needs more arguments.
    """
    check_tx(tx)

    def shapes(tree: PyTree) -> tuple[Any, list[tuple[int, ...]]]:
        return jax.tree.structure(tree), [*map(jnp.shape, jax.tree.leaves(tree))]

    if shapes(grads) != shapes(state.params):
        raise ArgumentError(
            f"`grads` must have the structure and the shapes of `state.params`, {describe_shapes(state.params)}, got "
            f"{describe_shapes(grads)}."
        )
    extra: dict[str, Any] = {"value": _mean(metrics), "grad": grads}
    extra |= {} if value_fn is None else {"value_fn": value_fn}
    with jax.numpy_dtype_promotion("standard"):  # Parameters, and optimizers of optax, may mix dtypes.
        updates, opt_state = update(tx, grads, state, extra)
        params = optax.apply_updates(state.params, updates)
        metrics = metrics._replace(norm=optax.tree.norm(grads))
    return jax.tree.map(strong_type, TrainState(state.step + 1, params, model_state, opt_state)), metrics


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
    check_valid(state)
    return _eval_step(state, batch, model=model, loss_fn=loss_fn, tta=tta)


@jit(static_argnames=("model", "loss_fn", "tta"))
def _eval_step(state: TrainState, batch: BatchLike, *, model: Network, loss_fn: LossFn, tta: str) -> Metrics:
    check_batch(batch)
    return sum_metrics(apply_views(state, batch, model, tta), batch, loss_fn)


def check_valid(state: TrainState) -> None:
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
