"""The evaluation of a data set."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import repeat
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from cnnjax.class_scores import count_pairs
from cnnjax.compiler import jit
from cnnjax.data.batches import Pixels, StreamedPixels, make_batch
from cnnjax.data.feed import StreamedSet
from cnnjax.data.order import Plan, plain_plan
from cnnjax.errors import ArgumentError, describe_shapes
from cnnjax.losses import softmax_cross_entropy
from cnnjax.metrics import Metrics, Scores, Totals, sum_metrics
from cnnjax.network import Network, check_network, logits_of
from cnnjax.sharding import Placement, fetch, place, put
from cnnjax.state import TrainState
from cnnjax.step import apply_views, check_batch, check_valid
from cnnjax.typing import AnyArray, Batch

# Examples; divisors of the usual test sets. The larger one is for images of up to 32 by 32 on an accelerator.
EVAL_BATCH_SIZE, ACCELERATOR_EVAL_BATCH_SIZE = 500, 2000


def evaluate(
    state: TrainState,
    image: Float[AnyArray, "N H W C"],
    label: Int[AnyArray, " N"],
    *,
    model: Network,
    tta: str = "none",
) -> Scores:
    """Scores a whole data set, each example once: cross-entropy, accuracy, confusion of the classes, and the logits.

    Example:
      >>> scores = evaluate(state, (test.image - mean) / std, test.label, model=model)
      >>> print(f"{scores.accuracy:.2%}, {scores.loss:.3f}, {scores.balanced_accuracy:.2%}")

    Args:
      state: not donated; evaluated as by `eval_step`.
      image: standardized as in training; on the host, so that it may be larger than the memory of the device.
      label: classes, from 0 to K-1.
      model: see `train_step`.
      tta: see `eval_step`.

    Raises:
      ValueError: an argument or a shape is wrong, or a label is not below the number of logits.
    """
    check_network(model)
    check_valid(state)
    if isinstance(image, np.ma.MaskedArray) or isinstance(label, np.ma.MaskedArray):
        raise ArgumentError("`image` and `label` must be without a mask, got a masked array. Remove what is masked.")
    image, label = np.asarray(image), np.asarray(label)
    if image.ndim != 4 or image.size == 0:
        raise ArgumentError(f"`image` must be [N H W C], with at least one image, got {describe_shapes(image)}.")
    if label.shape != image.shape[:1] or not np.issubdtype(label.dtype, np.integer):
        got = f"{describe_shapes(label)} for images {describe_shapes(image)}"
        raise ArgumentError(f"`label` must be int [N], one for each image, got {got}.")
    size = _batch_size(image.shape[1:], len(image), on_cpu=jax.default_backend() == "cpu")
    totals, parts = Totals(), []
    for i in range(0, len(image), size):
        rows = np.arange(i, i + size)
        taken = np.minimum(rows, len(image) - 1)  # The padding of the last batch is masked.
        batch = Batch(image[taken], label[taken], rows < len(image))
        metrics, predicted, logits = _score_batch(state, batch, model=model, tta=tta)
        if logits.ndim != 2 or not 0 <= label.min() <= label.max() < logits.shape[1]:
            got = f"{label.min()} to {label.max()} for logits {[*logits.shape]}"
            raise ArgumentError(f"`label` must be from 0 to K-1, for logits [B K], got {got}.")
        totals = totals.add(metrics)  # Waits for the device.
        parts.append((np.asarray(predicted), np.asarray(logits, np.float32)))
    predicted, logits = (np.concatenate(part)[: len(image)] for part in zip(*parts, strict=True))
    return totals.means()._replace(confusion=count_pairs(label, predicted), logits=logits)


@jit(static_argnames=("model", "tta", "placement"))
def _score(
    state: TrainState,
    pixels: Pixels | StreamedPixels,
    plan: Plan,
    *,
    model: Network,
    tta: str,
    placement: Placement | None,
) -> tuple[Metrics, Int[Array, " B"], Float[Array, "B K"]]:
    """Returns the metrics of a batch, the predicted classes, and the logits."""
    batch = make_batch(pixels, plan)
    if placement is not None:  # It divides the state.
        state = lax.with_sharding_constraint(state, placement.replicated)  # What is not used is not gathered.
    return _scores_of_batch(state, batch, model, tta)


def _scores_of_batch(
    state: TrainState, batch: Batch, model: Network, tta: str
) -> tuple[Metrics, Int[Array, " B"], Float[Array, "B K"]]:
    check_batch(batch)
    logits = logits_of(apply_views(state, batch, model, tta))
    return sum_metrics(logits, batch, softmax_cross_entropy), jnp.argmax(logits, axis=-1).astype(jnp.int32), logits


_score_batch = jit(_scores_of_batch, static_argnames=("model", "tta"))


def evaluate_pixels(
    state: TrainState,
    pixels: Pixels | StreamedSet,
    *,
    model: Network,
    tta: str = "none",
    placement: Placement | None = None,
    keep_logits: bool = False,
) -> Scores:
    """Scores every example once: cross-entropy, accuracy and the confusion of classes. Waits for the device.

    Args:
      pixels: the data set, on the device, on the host or on disk.
      tta: see `eval_step`.
      placement: how devices share a batch; None: the first device works alone.
      keep_logits: whether to return the logits, too.
    """
    placement = placement or place(1, jax.local_devices())
    return start_evaluation(state, pixels, model, placement, tta=tta, keep_logits=keep_logits)()


def start_evaluation(
    state: TrainState,
    pixels: Pixels | StreamedSet,
    model: Network,
    placement: Placement,
    *,
    tta: str = "none",
    keep_logits: bool = False,
) -> Callable[[], Scores]:
    """Starts to `evaluate_pixels`; the function that it returns waits for the device, and returns the scores."""
    num_examples = len(pixels.label)
    plan = plain_plan(num_examples, evaluation_batch_size(pixels, placement))
    options = _score_options(model, tta, placement)
    rows = put([plan.row(i) for i in range(len(plan.example))], placement.batch_sharding)
    few_at_a_time = placement.device.platform == "cpu" or isinstance(pixels, StreamedSet)
    batches: list[tuple[Metrics, Array, Array | None]] = []
    with _inputs(pixels, plan.example.shape[1], placement) as inputs:
        for row in rows:
            metrics, predicted, logits = _score(state, next(inputs), row, **options)
            if batches and few_at_a_time:
                # At most two at a time: each has its own scratch memory or images.
                jax.block_until_ready(batches[-1])
            batches.append((metrics, predicted, logits if keep_logits else None))

    def finish() -> Scores:
        totals, (metrics, predicted, logits) = Totals(), zip(*fetch(batches), strict=True)
        for sums in metrics:
            totals = totals.add(sums)
        confusion = count_pairs(fetch(pixels.label), np.concatenate(predicted)[:num_examples])  # Without the padding.
        scores = totals.means()._replace(confusion=confusion)
        return scores._replace(logits=np.concatenate(logits)[:num_examples]) if keep_logits else scores

    return finish


def compile_evaluation(state: Any, pixels: Pixels, *, model: Network, tta: str, placement: Placement) -> None:
    """Compiles the program with which `evaluate_pixels` scores a data set.

    Args:
      state: the shapes of the state, with their shardings.
    """
    plan = plain_plan(len(pixels.label), evaluation_batch_size(pixels, placement))
    shapes: Any = jax.tree.map(lambda x: x.update(sharding=placement.replicated), jax.eval_shape(lambda x: x, pixels))
    row = put(plan.row(0), placement.batch_sharding)
    _score.lower(state, shapes, row, **_score_options(model, tta, placement)).compile()


def evaluation_batch_size(pixels: Pixels | StreamedSet, placement: Placement) -> int:
    """Returns the number of examples that `evaluate_pixels` scores at a time."""
    on_cpu = placement.device.platform == "cpu"
    batch_size = _batch_size(pixels.image.shape[1:], len(pixels.label), on_cpu=on_cpu)
    return -(-batch_size // placement.num_devices) * placement.num_devices


def _batch_size(image_shape: tuple[int, ...], num_examples: int, *, on_cpu: bool) -> int:
    size = image_shape[0] * image_shape[1]
    batch_size = ACCELERATOR_EVAL_BATCH_SIZE if not on_cpu and size <= 32 * 32 else EVAL_BATCH_SIZE
    batch_size = min(batch_size, max(8, EVAL_BATCH_SIZE * 64 * 64 // size))  # Large images need much memory.
    return min(batch_size, max(1, num_examples))


def _score_options(model: Network, tta: str, placement: Placement) -> Any:
    return {"model": model, "tta": tta, "placement": placement if placement.divides_state else None}


def _inputs(
    pixels: Pixels | StreamedSet, batch_size: int, placement: Placement
) -> AbstractContextManager[Iterator[Any]]:
    """Opens the input of each `_score`: the whole data set every time, or one batch after another."""
    if isinstance(pixels, StreamedSet):
        return pixels.plain_batches(batch_size, placement)
    return nullcontext(repeat(put(pixels, placement.replicated)))
