"""Metrics: sums over the examples of a batch on the device, and totals and means on the host."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cnnjax.class_scores import OUR_SCORES, Confusion, class_scores
from cnnjax.errors import ArgumentError, UserError, describe_shapes, user_code
from cnnjax.fields import shorten
from cnnjax.network import logits_of
from cnnjax.typing import AnyArray, BatchLike, LossFn, MetricsFn

# The names of our own scores, which a user's function must not return.
RESERVED_NAMES = (*OUR_SCORES, "macro_precision", "macro_recall", "macro_f1", "confusion_matrix")


class Metrics(NamedTuple):
    """Sums over the unmasked examples; divide by `num_examples` once, on the host.

    `jax.tree.map(jnp.add, a, b)` adds the metrics of two batches; `a + b` would concatenate tuples.

    Attributes:
      loss: the sum of the losses; the losses that the network sows count once per example.
      num_examples: number of unmasked examples.
      values: "accuracy", the number of correct predictions, int32, if the labels are class indices, int [B], of at
        least two logits; and the named values of the loss, or of a training step.
      norm: see `grad_norm`; None if no gradient was computed.
    """

    loss: Float[Array, ""]
    num_examples: Int[Array, ""]
    values: dict[str, Array]
    norm: Float[Array, ""] | None = None

    @property
    def correct(self) -> AnyArray:
        """The number of correct predictions.

        Raises:
          ValueError: the labels were not class indices.
        """
        if "accuracy" not in self.values:
            raise ArgumentError(
                "`metrics` must be those of logits [B K], K > 1, and labels int [B] to have correct predictions, got "
                "others."
            )
        return self.values["accuracy"]

    @property
    def grad_norm(self) -> AnyArray:
        """The global norm of the gradient of the mean loss.

        Raises:
          ValueError: these are metrics of `eval_step` or `mean_loss`.
        """
        if self.norm is None:
            raise ArgumentError(
                "`metrics` must be those of `train_step` or `apply_gradients` to have a gradient, got those of "
                "`eval_step` or `mean_loss`."
            )
        return self.norm


def sum_metrics(output: Any, batch: BatchLike, loss_fn: LossFn) -> Metrics:
    """Returns the metrics of a batch.

    Args:
      output: of the network, the logits or a tuple that begins with them.

    Raises:
      ValueError: the loss, one of its values, the mask or a label has the wrong shape.
    """
    size = batch.image.shape[:1]
    if getattr(batch.mask, "shape", None) != size or batch.mask.dtype != jnp.bool_:
        raise ArgumentError(
            f"`batch.mask` must be bool of shape {size}, like the images, got {describe_shapes(batch.mask)}."
        )
    for path, leaf in jax.tree.leaves_with_path(batch.label):
        if jnp.shape(leaf)[:1] != size:
            name = f"batch.label{jax.tree_util.keystr(path)}"
            raise ArgumentError(
                f"`{name}` must have the {size[0]} examples of the images as its first axis, got {jnp.shape(leaf)}."
            )
    result = loss_fn(output, batch)
    loss, values = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ArgumentError(
            f"`loss_fn` must return loss [B] or (loss [B], {{name: value [B]}}), got {describe_shapes(result)}."
        )
    for name, value in [(None, loss), *values.items()]:
        kinds = (jnp.floating,) if name is None else (jnp.floating, jnp.integer, jnp.bool_)
        is_array = getattr(value, "shape", None) == size
        if not is_array or not any(jnp.issubdtype(value.dtype, kind) for kind in kinds):
            what = "floating-point values" if name is None else f"{'real ' * is_array}values {name!r}"
            raise ArgumentError(
                f"`loss_fn` must return {what} of shape {size}, one per example, got {describe_shapes(value)}."
            )
    if taken := {"loss", "accuracy", "grad_norm"} & values.keys():
        raise ArgumentError(f"`loss_fn` must not name a value loss, accuracy or grad_norm, got {sorted(taken)}.")
    logits, label = logits_of(output), batch.label
    several = jnp.ndim(logits) == 2 and logits.shape[1] > 1  # One logit would always predict class 0.
    if several and getattr(label, "shape", None) == size and jnp.issubdtype(label.dtype, jnp.integer):
        values = {"accuracy": jnp.argmax(logits, axis=-1).astype(jnp.int32) == label.astype(jnp.int32), **values}

    def masked_sum(x: Array) -> Array:
        narrow = jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32  # Float16 ends at 65504.
        dtype = jnp.int32 if x.dtype == bool else jnp.float32 if narrow else None
        return jnp.sum(jnp.where(batch.mask, x, jnp.zeros_like(x)), dtype=dtype)

    sums = {name: masked_sum(value) for name, value in values.items()}
    return Metrics(masked_sum(loss), jnp.sum(batch.mask, dtype=jnp.int32), sums)


class Totals(NamedTuple):
    """Sums of metrics on the host, as Python numbers."""

    loss: float = 0.0
    num_examples: int = 0
    values: dict[str, float] = {}  # noqa: RUF012  Never changed.

    def add(self, metrics: Metrics) -> "Totals":
        """Returns the totals plus the metrics of one step, or of several [S]. Waits for the device."""
        loss, num_examples, values = jax.device_get((metrics.loss, metrics.num_examples, metrics.values))
        values = {name: sum(np.ravel(x).tolist(), self.values.get(name, 0)) for name, x in values.items()}
        return Totals(
            sum(np.ravel(loss).tolist(), self.loss), sum(np.ravel(num_examples).tolist(), self.num_examples), values
        )

    def means(self) -> "Scores":
        """Returns the means over all examples.

        Raises:
          ValueError: all of them were masked.
        """
        n = self.num_examples
        if n == 0:
            raise ArgumentError("`batch.mask` must leave at least one example unmasked, got none.")
        return Scores(self.loss / n, n, {name: total / n for name, total in self.values.items()})


class Scores(NamedTuple):
    """Means over `num_examples` examples.

    Attributes:
      values: "accuracy", and in training the named values of the loss or of the training step.
      confusion: {(true class, predicted class): number of examples}, see `class_scores`; empty in training.
      logits: of every example, in order; None in training, and if they were not kept.
      metrics: the user's own scores, see `Config.metrics`; empty in training.
    """

    loss: float
    num_examples: int
    values: dict[str, float]
    confusion: Confusion = {}  # noqa: RUF012  Never changed.
    logits: Float[np.ndarray, "N K"] | None = None
    metrics: dict[str, float] = {}  # noqa: RUF012  Never changed.

    @property
    def accuracy(self) -> float:
        """The fraction of correct predictions."""
        return self.values["accuracy"]

    @property
    def balanced_accuracy(self) -> float:
        """The mean recall over the classes that have examples.

        Raises:
          ValueError: these are scores of training, without `confusion`.
        """
        if not self.confusion:
            raise ArgumentError("`scores` must be those of an evaluation to have a balanced accuracy, got others.")
        return class_scores(self.confusion, 1 + max(map(max, self.confusion))).means()["recall"]


def with_metrics(
    scores: Scores,
    metrics_fn: MetricsFn | None,
    label: Int[AnyArray, " N"],
    share: Callable[[Callable[[], Any]], Any] = lambda compute: compute(),
) -> Scores:
    """Returns scores with those of a user's function, see `Config.metrics`.

    Args:
      scores: with logits, unless `metrics_fn` is None.
      share: see `Hosts.share`.
    """
    if metrics_fn is None:
        return scores
    return scores._replace(metrics=share(lambda: call_metrics(metrics_fn, scores.logits, label)))


def call_metrics(metrics_fn: MetricsFn, logits: Any, label: Int[AnyArray, " N"]) -> dict[str, float]:
    """Returns the scores that a user's function computes.

    Args:
      metrics_fn: receives copies in NumPy, of float32 and int32.
      logits: [N K].

    Raises:
      UserError: it raised an exception, or returned anything other than {name: number}.
    """
    with user_code("`metrics`"):
        scores: Any = metrics_fn(np.array(logits, np.float32), np.array(label, np.int32))
        valid = isinstance(scores, Mapping) and all(map(_is_number, scores.values()))
    if not valid:
        raise UserError(f"`metrics` must return {{name: number}}, got {shorten(describe_shapes(scores))}.")
    numbers = {}
    for name, value in scores.items():
        with user_code(f"`metrics`: {name!r}"):
            numbers[name] = float(value)
    for name in numbers:
        if not isinstance(name, str) or re.fullmatch("[A-Za-z][A-Za-z0-9_]*", name) is None:
            rule = "must return names of ASCII letters, digits and underscores that begin with a letter"
            raise UserError(f"`metrics` {rule}, got {name!r}. Rename it.")
        if name in RESERVED_NAMES:
            raise UserError(f"`metrics` must not name a score {', '.join(RESERVED_NAMES)}, got {name!r}. Rename it.")
    return numbers


def _is_number(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        return isinstance(value, (bool, int, float))
    kinds = (jnp.bool_, jnp.integer, jnp.floating)
    return np.shape(value) == () and any(jnp.issubdtype(dtype, kind) for kind in kinds)
