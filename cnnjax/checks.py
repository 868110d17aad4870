"""Checks of what the parts of a run return for the shapes of its batches, without computing anything."""

import re
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from cnnjax.data.augment import Augment
from cnnjax.data.batches import Pixels, StreamedPixels, make_batch
from cnnjax.data.order import plain_plan
from cnnjax.errors import UserError, describe, describe_shapes, user_code
from cnnjax.jaxprs import constants_of
from cnnjax.metrics import sum_metrics
from cnnjax.network import Network, apply_in_training, logits_of
from cnnjax.runs.files import tree_sha256
from cnnjax.step import TrainState
from cnnjax.typing import BatchLike, LossFn

_TRACES: dict[Hashable, str] = {}  # As jax keeps them: what each function computed when it was traced last.


def eval_shape(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Returns the shapes that a function returns like `jax.eval_shape`, and notices edited code.

    JAX traces a jitted function once for equal arguments. A function that it calls may be edited later, as in a cell of
    a notebook, and would not be used. So this function is always traced anew. If it does not compute what it computed
    before in this process, the caches of JAX are cleared, and every other function is traced again, too.

    Args:
      function: of a module, or a `partial` of one, whose arguments are compared by value.
    """
    function = partial(function)
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*args, **kwargs)
    key = (function.func, function.args, *sorted(function.keywords.items()), f"{jaxpr.in_avals}")
    text = re.sub("0x[0-9a-f]+", "", f"{jaxpr}")  # Without the addresses of functions.
    trace = tree_sha256([np.frombuffer(text.encode(), np.uint8), *constants_of(jaxpr)])
    if _TRACES.setdefault(key, trace) != trace:
        jax.clear_caches()
        _TRACES[key] = trace
    return shapes


def check_augment(
    augment: Augment,
    pixels: Pixels | StreamedPixels,
    batch_size: int,
    train_shape: tuple[int, ...],
    key: Key[Array, ""],
) -> BatchLike:
    """Checks what an augmentation returns.

    Args:
      augment: of one epoch.
      pixels: the training set, or the shapes of a batch of it.
      batch_size: B.
      train_shape: (H, W, C), of the images that the network is trained on.
      key: any.

    Returns:
      The shapes of a batch.

    Raises:
      UserError: a shape is wrong, or the augmentation raised an exception.
    """
    plan, shape = plain_plan(batch_size, batch_size).row(0), (batch_size, *train_shape)
    if type(augment).transform_pixels is not Augment.transform_pixels:
        keys = jax.eval_shape(partial(jax.random.split, num=batch_size), key)
        image = jax.ShapeDtypeStruct((batch_size, *pixels.image.shape[1:]), jnp.uint8)
        with user_code("`augment.transform_pixels`"):
            transformed = eval_shape(augment.transform_pixels, keys, image)
        check_shape("augment.transform_pixels", "images", shape, transformed)
    with user_code("`augment.transform`"):
        batch: Any = eval_shape(partial(make_batch, augment=augment), pixels, plan, key=key)
    if not isinstance(batch, BatchLike):
        raise UserError(f"`augment.transform` must return a Batch, got {type(batch).__name__}. Use batch._replace.")
    check_shape("augment.transform", "images", shape, batch.image)
    check_shape("augment.transform", "a mask", (batch_size,), batch.mask)
    for leaf in jax.tree.leaves(batch.label):
        check_shape("augment.transform", "labels", (batch_size, *leaf.shape[1:]), leaf)
    return batch


def check_training(
    state: TrainState, batch: BatchLike, key: Key[Array, ""], *, model: Network, loss_fn: LossFn, num_classes: int
) -> None:
    """Checks what a network in training, and the loss, return for the shapes of a state and a batch.

    Raises:
      UserError: a shape is wrong, or a part raised an exception.
    """
    with user_code("`model`"):
        apply = partial(apply_in_training, model)
        trained = eval_shape(apply, state.params, state.model_state, batch.image, key).output
    check_shape("model", "logits", (len(batch.mask), num_classes), logits_of(trained))
    try:
        eval_shape(partial(sum_metrics, loss_fn=loss_fn), trained, batch)
    except UserError as error:
        raise UserError(str(error).replace("`loss_fn`", "`loss`")) from error
    except Exception as error:
        raise UserError(
            f"`loss` must accept logits {describe_shapes(trained)} and a batch with the label "
            f"{describe_shapes(batch.label)}, as the augmentation makes it, got {describe(error)} It "
            "is called as loss(logits, batch). If it needs labels, wrap it: `def loss(logits, batch): return "
            "f(logits, batch.label)`."
        ) from error


def check_shape(name: str, rule: str, expected: tuple[int, ...], got: Any) -> None:
    """Raises a `UserError` unless `got` has the expected shape."""
    if getattr(got, "shape", None) != expected:
        raise UserError(f"`{name}` must return {rule} of shape {expected}, got {describe_shapes(got)}.")
