"""The step: one jitted function for gradient, update and apply, and one for evaluation."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from cnnjax.data.tta import mean_logits
from cnnjax.typing import AnyArray

LossFn = Callable[[Float[Array, "B K"], Int[AnyArray, " B"]], Float[Array, " B"]]


class Batch(NamedTuple):
    """Images, their labels, and which of them count (the rest is padding).

    Padding has no part in loss, gradient and metrics of a network that treats each image alone. Batch statistics do see
    it: pad a training batch with real images.
    """

    image: Float[AnyArray, "B H W C"]
    label: Int[AnyArray, " B"]
    mask: Bool[AnyArray, " B"]


class Metrics(NamedTuple):
    """Sums over the examples that count; divide by `num_examples` once, on the host."""

    loss: Float[Array, ""]
    correct: Int[Array, ""]
    num_examples: Int[Array, ""]


class TrainState(NamedTuple):
    """All that training changes, as arrays.

    Attributes:
      step: the number of updates made, int32.
      params: the trainable parameters.
      batch_stats: running statistics of normalisation layers, the whitening kernel; empty for a model without any.
      opt_state: the state of the optimizer.
    """

    step: Int[Array, ""]
    params: PyTree
    batch_stats: PyTree
    opt_state: Any


def softmax_cross_entropy(logits: Float[Array, "B K"], label: Int[AnyArray, " B"]) -> Float[Array, " B"]:
    """Returns -log softmax(logits)[label] of each example, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


@partial(jax.jit, static_argnames=("model", "tx"))
def init_state(
    key: Key[Array, ""], image: Float[AnyArray, "B H W C"], *, model: nn.Module, tx: optax.GradientTransformation
) -> TrainState:
    """Returns the first state of `model` and `tx`. Jitted so that its compilation can be cached, as the step's.

    Args:
      key: consumed; draws the initial parameters.
      image: images of the shape to train on; their values do not matter.
      model: a Flax module, called as `model(image, train=bool)`.
      tx: an optax optimizer.
    """
    variables = model.init(key, image, train=False)
    params = variables["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, variables.get("batch_stats", {}), tx.init(params))


@partial(jax.jit, static_argnames=("model", "tx", "loss_fn", "frozen"), donate_argnames="state")
def train_step(
    state: TrainState,
    batch: Batch,
    key: Key[Array, ""],
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    loss_fn: LossFn = softmax_cross_entropy,
    frozen: tuple[str, ...] = (),
) -> tuple[TrainState, Metrics]:
    """Updates the parameters once, by the gradient of the mean loss over the examples that count.

    Args:
      state: donated; use the returned one from here on.
      batch: at least one example must count.
      key: the same for every step; `state.step` is folded into it.
      model: a Flax module, called as `model(image, train=True)` with a "dropout" key and mutable "batch_stats".
      tx: an optax optimizer that needs the gradient alone. Build it once: another one traces again.
      loss_fn: `(logits [B K], label [B]) -> loss [B]`. Build it once, too.
      frozen: a tuple of top-level names in `state.params` whose gradients are zero, and are not computed. Weight decay
        and momentum may still move these parameters: mask them in `tx` to keep them as they are.

    Returns:
      The next state, and the metrics of this batch before the update.

    Raises:
      ValueError: `frozen` is no tuple of top-level names in `state.params`.
    """
    if unknown := {frozen} if isinstance(frozen, str) else {name for name in frozen if name not in state.params}:
        names, got = sorted(state.params), sorted(map(str, unknown))
        raise ValueError(f"`frozen` must be a tuple of top-level names in `state.params` ({names}), got {got}.")
    dropout_key = jax.random.fold_in(key, state.step)

    def mean_loss(params: PyTree) -> tuple[Float[Array, ""], tuple[Metrics, PyTree]]:
        if frozen:
            params = {name: lax.stop_gradient(part) if name in frozen else part for name, part in params.items()}
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, mutated = model.apply(
            variables, batch.image, train=True, rngs={"dropout": dropout_key}, mutable=["batch_stats"]
        )
        metrics = _sum_metrics(logits, batch, loss_fn)
        return metrics.loss / metrics.num_examples, (metrics, mutated.get("batch_stats", {}))

    grads, (metrics, batch_stats) = jax.grad(mean_loss, has_aux=True)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, batch_stats, opt_state), metrics


@partial(jax.jit, static_argnames=("model", "loss_fn", "views"))
def eval_step(
    state: TrainState,
    batch: Batch,
    *,
    model: nn.Module,
    loss_fn: LossFn = softmax_cross_entropy,
    views: str = "plain",
) -> Metrics:
    """Returns the metrics of a batch, without dropout and with running statistics.

    Args:
      views: what an image is scored by, as of `views.mean_logits`.
    """

    def logits_fn(image: Float[AnyArray, "B H W C"]) -> Any:
        return model.apply({"params": state.params, "batch_stats": state.batch_stats}, image, train=False)

    return _sum_metrics(mean_logits(logits_fn, batch.image, views, batch.mask), batch, loss_fn)


def _sum_metrics(logits: Float[Array, "B K"], batch: Batch, loss_fn: LossFn) -> Metrics:
    loss = jnp.where(batch.mask, loss_fn(logits, batch.label), 0.0)
    correct = batch.mask & (jnp.argmax(logits, axis=-1) == batch.label)
    return Metrics(jnp.sum(loss), jnp.sum(correct, dtype=jnp.int32), jnp.sum(batch.mask, dtype=jnp.int32))
