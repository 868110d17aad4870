"""Checks of what the parts of a run return for the shapes of its batches, and for random logits."""

import inspect
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, PyTree

from cnnjax.config import BEST_BY
from cnnjax.data.augment import Augment
from cnnjax.data.batches import Pixels, StreamedPixels, make_batch
from cnnjax.data.order import plain_plan
from cnnjax.edits import notice_edits, trace_and_notice_edits, trace_sha256
from cnnjax.errors import UserError, check, check_name, describe, describe_shapes, user_code
from cnnjax.fields import shorten
from cnnjax.files import changes
from cnnjax.jaxprs import repeats_draws
from cnnjax.metrics import Metrics, call_metrics, sum_metrics
from cnnjax.network import apply_in_training, logits_of
from cnnjax.optim.optimizer import REST, Optimizer, param_labels
from cnnjax.program import Program
from cnnjax.state import TrainState, init_from_data, init_optimizer
from cnnjax.step import train_step, update
from cnnjax.typing import AnyArray, BatchLike, LossFn, MetricsFn

MAX_LABELS = 10_000  # With 1,000 classes their logits take 40 MB.


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
            # jax would reuse the trace of the method itself; a new function is traced anew.
            transformed = jax.eval_shape(partial(augment.transform_pixels), keys, image)
        check_shape("augment.transform_pixels", "images", shape, transformed)
        rule = "must return images of dtype uint8 or float32"
        if transformed.dtype not in (jnp.uint8, jnp.float32):
            raise UserError(f"`augment.transform_pixels` {rule}, got {describe_shapes(transformed)}.")
    with user_code("`augment.transform`"):
        batch: Any = notice_edits(partial(make_batch, augment=augment), pixels, plan, key=key)
    if not isinstance(batch, BatchLike):
        raise UserError(f"`augment.transform` must return a Batch, got {type(batch).__name__}. Use batch._replace.")
    check_shape("augment.transform", "images", shape, batch.image)
    if not jnp.issubdtype(batch.image.dtype, jnp.floating):
        raise UserError(
            f"`augment.transform` must return images of floating-point numbers, got {describe_shapes(batch.image)}."
        )
    check_shape("augment.transform", "a mask", (batch_size,), batch.mask)
    for leaf in jax.tree.leaves(batch.label):
        check_shape("augment.transform", "labels", (batch_size, *leaf.shape[1:]), leaf)
    return batch


def check_optimizer(program: Program, params: PyTree) -> Any:
    """Checks that the optimizer of a program accepts parameters of these shapes.

    Returns:
      The shapes of its state.

    Raises:
      UserError: it raised an exception.
    """
    try:
        with user_code("`optim`"):
            opt_state, _ = notice_edits(partial(_first_update, program), params)
    except UserError as error:
        text = str(error).replace("`tx` must be the optimizer of `state`, and accept", "`optim` must accept")
        raise UserError(text) from error.__cause__
    return opt_state


def _first_update(program: Program, params: PyTree) -> tuple[Any, PyTree]:
    """Returns the initial state of the optimizer, and its update if the gradients are the parameters."""
    tx, loss = program.make_tx(), jnp.zeros(())
    state = TrainState(jnp.zeros((), jnp.int32), params, {}, init_optimizer(tx, params))
    with jax.numpy_dtype_promotion("standard"):  # As in `train_step`.
        updates, _ = update(tx, params, state, {"value": loss, "grad": params, "value_fn": lambda params: loss})
    return state.opt_state, updates


def check_depths(optim: Optimizer, params: PyTree) -> None:
    """Checks that each parameter has a group if groups were made of the layers that `depths` of a network names.

    Raises:
      UserError: one has none, so that it would not be frozen with the others.
    """
    if isinstance(params, dict):
        labels = param_labels(params, optim.groups)
        missing = [name for name in sorted(params) if REST in jax.tree.leaves(labels[name])]
        got = f"a result without {missing}. List them, or give them a group in `optim.groups`"
        check("model.depths", "a method that returns all top-level names of the parameters", not missing, got)


def never_trained(given: Optimizer, optim: Optimizer, params: PyTree, num_epochs: int) -> Iterator[str]:
    """Yields a line about each group of parameters that would thaw only after the last epoch.

    Args:
      given: the optimizer of the configuration.
      optim: the same with a group for each layer, see `Optimizer.for_network`.

    Raises:
      UserError: all parameters are frozen in all epochs.
    """
    frozen = [group for group in optim.groups if group.num_epochs == 0 or group.start_epoch >= num_epochs]
    patterns = {group.pattern for group in frozen}
    trained = not patterns.issuperset(jax.tree.leaves(param_labels(params, optim.groups)))
    check("optim", "an optimizer that trains some parameters", trained, "groups that freeze all of them")
    end = f"because the run ends after {num_epochs} epoch{'s' if num_epochs > 1 else ''}."
    for group in given.groups:
        if group in frozen and group.num_epochs != 0:
            begin = f"{group.pattern!r} begins in epoch {group.start_epoch + 1}"
            yield f"`optim.groups`: {begin} and is never trained, {end}"
    if given.freeze_epochs >= num_epochs:
        yield f"`optim.freeze_epochs` is {given.freeze_epochs}: only the head is trained, {end}"


def check_init_from_data(program: Program, state: TrainState, image: jax.ShapeDtypeStruct) -> TrainState:
    """Checks that a network that is initialized from data accepts images of these shapes.

    Returns:
      The shapes of the state after that.

    Raises:
      UserError: it raised an exception.
    """
    if hasattr(program.model, "init_from_data"):
        with user_code("`model.init_from_data`"), suppress(jax.errors.JAXTypeError):  # As in `abstract_state`.
            return notice_edits(partial(_init_from_data, program), state, image)
    return state


def _init_from_data(program: Program, state: TrainState, image: AnyArray) -> TrainState:
    return init_from_data(state, image, model=program.model, tx=program.make_tx())


def check_training(
    program: Program, state: TrainState, batch: BatchLike, key: Key[Array, ""], *, num_classes: int
) -> None:
    """Checks the shapes that a network returns in training, and those of the loss or of the user's step.

    Raises:
      UserError: a shape is wrong, or a part raised an exception.
    """
    with user_code("`model`"):
        apply = partial(apply_in_training, program.model)
        trained = notice_edits(apply, state.params, state.model_state, batch.image, key).output
    check_logits(trained, (len(batch.mask), num_classes))
    if program.step_fn is train_step:
        _check_loss(program.loss_fn, trained, batch)
    else:  # It may call network and loss with other arguments.
        _check_step_fn(program, state, batch, key)


def _check_step_fn(program: Program, state: TrainState, batch: BatchLike, key: Key[Array, ""]) -> None:
    name = _check_step_signature(program, state, batch, key)
    call = partial(Program.call_step, program)
    try:
        with user_code("`train_step`"):
            trace, result = trace_and_notice_edits(call, state, batch, key)
            again = jax.make_jaxpr(call)(state, batch, key)
            is_same = trace_sha256(trace) == trace_sha256(again)
    except UserError as error:
        raise UserError(str(error).replace("`loss_fn`", "`loss`")) from error.__cause__
    if not is_same:
        raise UserError(
            f"`train_step` must be the same each time that JAX traces it, got {name}, which uses a value of the host "
            "that changes, such as a counter or a number of np.random. Use its arguments, and jax.random."
        )
    if type(result) is not tuple or [*map(type, result)] != [TrainState, Metrics]:
        parts = [type(part).__name__ for part in result] if type(result) is tuple else []
        got = f"({', '.join(parts)})" if type(result) is tuple else type(result).__name__
        raise UserError(
            f"`train_step` must return a tuple (TrainState, Metrics), as `train_step` of cnnjax does, got {got}."
        )
    after, metrics = result
    check_kept(state, after._replace(step=state.step), "train_step")
    _check_step_metrics(metrics)
    if repeats_draws(trace, [False] * (len(trace.in_avals) - 1) + [True]):
        raise UserError(
            "`train_step` must draw other random numbers in each step, got some that depend on its `key` alone, which "
            "is the same for every step. Draw them from jax.random.fold_in(key, state.step), as cnnjax's `train_step` "
            "and `mean_loss` do; numbers that should repeat, from a key of their own, such as jax.random.key(0)."
        )


def _check_step_signature(program: Program, *arguments: Any) -> str:
    """Checks that a user's step accepts the arguments of a step; returns its name."""
    step_fn: Any = program.step_fn
    options, name = program.options(), getattr(step_fn, "__qualname__", type(step_fn).__name__)
    if isinstance(step_fn, partial) and (taken := sorted(options.keys() & step_fn.keywords.keys())):
        raise UserError(f"`train_step` must leave {taken} to the Config, got a partial that sets them.")
    try:
        inspect.signature(step_fn).bind(*arguments, **options)
    except (TypeError, ValueError) as error:  # A function in C may have no signature.
        raise UserError(
            f"`train_step` must accept (state, batch, key, *, {', '.join(options)}), got {name}: {error}. Its "
            "signature may be (state, batch, key, **options); numbers of its own are fields of a frozen dataclass with "
            "a method `__call__`."
        ) from error
    return name


def _check_step_metrics(metrics: Metrics) -> None:
    if metrics.norm is None:
        raise UserError(
            "`train_step` must return metrics with the norm of the gradients, got None. Return those of "
            "`apply_gradients`, or metrics._replace(norm=optax.tree.norm(grads))."
        )
    values, taken = metrics.values, {"loss", "grad_norm"}
    if not isinstance(values, dict) or taken & values.keys() or not all(isinstance(name, str) for name in values):
        got = [*values] if isinstance(values, dict) else type(values).__name__
        rule = "metrics whose `values` are a dict with names other than loss and grad_norm"
        raise UserError(f"`train_step` must return {rule}, got {got}.")
    integer, floating, either = (jnp.integer,), (jnp.floating,), (jnp.integer, jnp.floating)
    numbers = [("loss", metrics.loss, floating), ("norm", metrics.norm, floating)]
    numbers += [("num_examples", metrics.num_examples, integer)]
    numbers += [(name, value, either) for name, value in values.items()]
    for name, value, kinds in numbers:
        check_shape("train_step", f"the metric {name!r}", (), value)
        if not any(jnp.issubdtype(value.dtype, kind) for kind in kinds):
            rule = f"the metric {name!r} with a dtype of kind {' or '.join(kind.__name__ for kind in kinds)}"
            raise UserError(f"`train_step` must return {rule}, got {describe_shapes(value)}.")


def check_kept(state: TrainState, after: TrainState, part: str = "") -> None:
    """Checks that a step keeps structure, shapes and dtypes of a state.

    Args:
      part: is named in the error; by default `model` or `optim`.

    Raises:
      UserError: it does not.
    """
    old, new = (
        {jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}" for path, x in jax.tree.leaves_with_path(tree)}
        for tree in (state, after)
    )
    for name, (before, now) in changes(old, new).items():
        if before is None and name.startswith(".model_state"):
            raise UserError(
                f"`{part or 'model'}` must keep the structure of its state, got the new array {name}, {now}. A network "
                "creates it as a variable, or in its `init_from_data`."
            )
        part = part or ("model" if name.startswith(".model_state") else "optim")
        raise UserError(f"`{part}` must keep the shape and dtype of its state: {name} was {before} and became {now}.")
    for name, before, now in zip(state._fields, state, after, strict=True):
        if (old := jax.tree.structure(before)) != (new := jax.tree.structure(now)):
            part = part or ("model" if name == "model_state" else "optim")
            got = f"{name} was {shorten(f'{old}')} and became {shorten(f'{new}')}"
            raise UserError(f"`{part}` must keep the structure of its state: {got}.")


def _check_loss(loss_fn: LossFn, trained: Any, batch: BatchLike) -> None:
    try:
        notice_edits(partial(sum_metrics, loss_fn=loss_fn), trained, batch)
    except UserError as error:
        raise UserError(str(error).replace("`loss_fn`", "`loss`")) from error
    except Exception as error:
        raise UserError(
            f"`loss` must accept logits {describe_shapes(trained)} and a batch with the label "
            f"{describe_shapes(batch.label)}, as the augmentation makes it, got {describe(error)} It "
            "is called as loss(logits, batch). If it needs labels, wrap it: `def loss(logits, batch): return "
            "f(logits, batch.label)`."
        ) from error


def check_metrics(
    metrics_fn: MetricsFn,
    best_by: str,
    train_label: Int[np.ndarray, " N"],
    validation_label: Int[np.ndarray, " M"],
    num_classes: int,
) -> None:
    """Checks what `metrics` returns for random logits, and that `best_by` is one of these scores or of ours.

    Args:
      train_label: replaces `validation_label` if there is no validation; at most `MAX_LABELS` of them, so that the
        logits of many classes fit into memory.

    Raises:
      UserError: `metrics_fn` raised an exception, or returned something else; or `best_by` is no score.
    """
    rng = np.random.default_rng(0)
    label = validation_label if len(validation_label) else rng.permutation(train_label)[:MAX_LABELS]
    logits = rng.standard_normal((len(label), num_classes), np.float32)
    names = call_metrics(metrics_fn, logits, label)
    check_name("best_by", best_by, (*BEST_BY, *names))


def check_logits(output: Any, expected: tuple[int, ...]) -> None:
    """Raises a `UserError` unless the output of a network begins with floating-point logits of the expected shape."""
    logits = logits_of(output)
    check_shape("model", "logits", expected, logits)
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise UserError(f"`model` must return floating-point logits, got {describe_shapes(logits)}.")


def check_shape(name: str, rule: str, expected: tuple[int, ...], got: Any) -> None:
    """Raises a `UserError` unless `got` has the expected shape."""
    if getattr(got, "shape", None) != expected:
        raise UserError(f"`{name}` must return {rule} of shape {expected}, got {describe_shapes(got)}.")
