"""The set-up of a run before its first step: the data on the device, the initial state, and checks of user code."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from cnnjax.checks import (
    check_augment,
    check_depths,
    check_init_from_data,
    check_kept,
    check_logits,
    check_metrics,
    check_optimizer,
    check_training,
    never_trained,
)
from cnnjax.config import Config, word
from cnnjax.data.batches import Standardization, pixel_statistics, standardize
from cnnjax.data.datasets import ImageDataset
from cnnjax.data.feed import pixels_of
from cnnjax.data.order import steps_per_epoch
from cnnjax.data.stored import Examples
from cnnjax.data.stream import Streamed, StreamedImages
from cnnjax.edits import notice_edits, tracing_anew
from cnnjax.errors import UserError, check, option, user_code
from cnnjax.hosts import current
from cnnjax.inputs import Inputs
from cnnjax.jaxprs import calls_kernels
from cnnjax.losses import ClassWeighted, CrossEntropy, balanced_weights
from cnnjax.memory import device_memory, explain_out_of_memory, gib, largest_result, num_bytes
from cnnjax.network import apply_in_evaluation, init_variables
from cnnjax.onednn.library import kernels
from cnnjax.pretrained import Weights, replacements
from cnnjax.program import Program, init_train_state
from cnnjax.runs.checkpoints import all_finite
from cnnjax.runs.records import make_facts
from cnnjax.setup import Setup, count_params, device_name, trace_steps
from cnnjax.sharding import Placement, place, put
from cnnjax.state import TrainState, init_from_data
from cnnjax.step import train_step
from cnnjax.typing import AnyArray

INIT_IMAGES = 5000  # Number of training images that a network may be initialized from.


def set_up(
    config: Config,
    inputs: Inputs,
    devices: Sequence[Any] | None,
    *,
    mesh: str | None = None,
    title: str,
    say: Callable[[str], None],
) -> tuple[Setup, TrainState]:
    """Loads the training split, resolves what the data determine, and makes the initial state.

    Args:
      devices, mesh: see `place`.
      title: begins the line that describes the run.
      say: receives that line, and those about oddities of the data.
    """
    dataset, weights = inputs
    with user_code("The configuration"):
        config = config.with_num_classes(dataset.num_classes)
    train, validation = dataset.open_parts(config.seed, config.validation_fraction)
    _check_classes(train, dataset, config)
    num_examples = len(train.label)
    batch_size = config.batch_size or min(128, max(8, num_examples // 8), num_examples)
    steps = steps_per_epoch(num_examples, batch_size)
    placement = place(batch_size, devices, mesh)
    if not dataset.streams:
        _check_images_fit(num_bytes(train) + num_bytes(validation), placement.device)
    standardization = _standardization(train, weights)
    for line in oddities(train, dataset.num_classes):
        say(line)
    got = f"{config.num_epochs} epochs of {steps} steps"
    check("num_epochs", "a number that gives fewer than 2**31 steps", steps * config.num_epochs < 2**31, got)
    if config.metrics is not None:
        labels = train.label, validation.label
        # As in training, process 0 alone calls them.
        current().share(lambda: check_metrics(config.metrics, config.best_by, *labels, dataset.num_classes))
    program = _make_program(config, train.label, dataset.num_classes, steps, placement)
    height, width, _ = train.image.shape[1:]
    with user_code("`augment`"):
        for distinct in program.distinct_programs():
            distinct.augment.check_size((height, width))
    init_key, train_key, augment_key = jax.random.split(jax.random.key(config.seed), 3)
    train_pixels, validation_pixels = (pixels_of(part, standardization) for part in (train, validation))
    if not dataset.streams:
        train_pixels, validation_pixels = put((train_pixels, validation_pixels), placement.replicated)
    setup = Setup(
        config=config,
        dataset=dataset,
        facts=make_facts(
            dataset,
            standardization,
            None if weights is None else weights.sha256,
            num_train_examples=num_examples,
            num_validation_examples=len(validation.label),
        ),
        batch_size=batch_size,
        balanced_label=train.label if config.sampling == "balanced" else None,
        train=train_pixels,
        validation=validation_pixels,
        program=program,
        steps_per_epoch=steps,
        steps_per_dispatch=1 if dataset.streams or placement.device.platform == "cpu" else steps,
        train_key=put(train_key, placement.replicated),
        augment_key=augment_key,
        placement=placement,
    )
    with tracing_anew():
        shapes, variables = check_parts(setup)
    setup = setup._replace(params=shapes.params)
    step = check_step(setup, shapes)
    say(f"{title}: {_describe_run(setup, shapes, step)}")
    count = len(jax.devices() if devices is None else devices)
    if mesh is None and (num_idle := count - placement.num_devices):
        say(f"{num_idle} of {count} devices are idle: `batch_size` {batch_size} is not a multiple of {count}.")
    for line in never_trained(config.optim, program.optim, shapes.params, config.num_epochs):
        say(line)
    state = _initial_state(setup, init_key, variables, weights, partial(_init_images, train, standardization))
    return setup, put(state, placement.of_state(state))


def _check_classes(train: Examples | Streamed, dataset: ImageDataset, config: Config) -> None:
    uses_labels = isinstance(config.loss, CrossEntropy) and config.train_step is train_step
    several = bool(np.ptp(train.label)) or not uses_labels
    got = f"only {dataset.class_names[train.label[0]]!r}. Add images of another class"
    check("dataset", "a set with training images of at least two classes", several, got)


def _check_images_fit(size: int, device: Any) -> None:
    """Raises a `UserError` if images of `size` bytes exceed the memory. Arrays in memory may be mapped files."""
    available = device_memory(device)
    if available is not None and size > available:
        raise UserError(
            f"`dataset` must fit into the {gib(available)} of memory, got images of {gib(size)}. Images from files can "
            f"be read while training: {option('stream')}."
        )


def _standardization(train: Examples | Streamed, weights: Weights | None) -> Standardization:
    """Returns the standardization of the weights, or of the training images."""
    if weights is not None:
        num_channels = train.image.shape[-1]
        check("channels", "3 for pretrained weights", num_channels == 3, num_channels)
        return weights.standardization
    return pixel_statistics(train.image) if isinstance(train, Examples) else train.image.statistics()


def _make_program(
    config: Config, label: Int[np.ndarray, " N"], num_classes: int, steps_per_epoch: int, placement: Placement
) -> Program:
    loss_fn = config.loss
    if config.class_weights == "balanced":
        loss_fn = ClassWeighted(loss_fn, balanced_weights(label, num_classes))
    return Program(
        model=config.model,
        optim=config.optim.for_network(config.model),
        augment=config.augment,
        loss_fn=loss_fn,
        num_steps=steps_per_epoch * config.num_epochs,
        num_epochs=config.num_epochs,
        step_fn=config.train_step,
        placement=placement if placement.divides_state else None,
    )


def _describe_run(setup: Setup, state: TrainState, step: Any) -> str:
    """Returns the line that describes a run, without its title.

    Args:
      state: its shapes.
      step: the jaxpr of the step.
    """
    dataset, placement, device, used = setup.dataset, setup.placement, setup.placement.device, ""
    if device.platform == "cpu":  # A network of the user may call none of oneDNN's kernels.
        found = kernels()
        called = found.version is None or calls_kernels(step)
        used = f", {found}" if called else f", XLA (the network calls none of the kernels of {found})"
    shared = f" ({placement.num_devices} share a batch: {placement})" if placement.num_devices > 1 else ""
    return (
        f"{word(type(setup.config.model))} ({count_params(state):,} parameters) on {dataset.name} ({dataset.source}), "
        f"{len(setup.train.label):,} training and {len(setup.validation.label):,} validation images, on "
        f"{device_name(device)}{used}{shared}"
    )


def _initial_state(
    setup: Setup,
    key: Key[Array, ""],
    variables: dict[str, Any],
    weights: Weights | None,
    images: Callable[[], Float[AnyArray, "N H W C"]],
) -> TrainState:
    """Returns the initial state, from a key, pretrained weights and training images.

    Args:
      variables: the shapes of what `init_variables` returns.
      images: returns standardized training images.
    """
    program, image = setup.program, jnp.zeros((1, *setup.facts.image_shape), jnp.float32)
    model = program.model
    with user_code("`model.variables_from_torch`"):
        loaded = None if weights is None else replacements(variables, weights, model)
    if program.divides_initial_state:
        key, image, loaded = put((key, image, loaded), setup.placement.replicated)
    state = init_train_state(key, image, loaded, program=program)
    if hasattr(model, "init_from_data"):
        standardized = images()
        with user_code("`model.init_from_data`"), explain_out_of_memory():
            state = init_from_data(state, standardized, model=model, tx=program.make_tx())
    check("model", "initialized with finite parameters", all_finite(state.params), "an infinite one or nan")
    return state


def _init_images(examples: Examples | Streamed, standardization: Standardization) -> Float[AnyArray, "N H W C"]:
    """Returns the first images, or evenly spaced ones if each class is one block; standardized."""
    label, index = examples.label, np.arange(min(len(examples.label), INIT_IMAGES))
    if len(label) > INIT_IMAGES and np.count_nonzero(np.diff(label)) < len(np.unique(label)):
        index = np.linspace(0, len(label) - 1, INIT_IMAGES).round().astype(int)
    images = examples.image[index]
    images = images.read() if isinstance(images, StreamedImages) else images
    return standardize(jnp.asarray(images), standardization)


def oddities(examples: Examples | Streamed, num_classes: int) -> Iterator[str]:
    """Yields a line about each property of training examples that is allowed, but is probably a mistake."""
    _, height, width, channels = examples.image.shape
    if height in (1, 3) and width == channels:
        size = f"{height}×{width} pixels with {channels} channels"
        yield f"The images have {size}: is their layout [N C H W] instead of [N H W C]?"
    if missing := np.flatnonzero(np.bincount(examples.label, minlength=num_classes) == 0).tolist():
        shown = ", ".join(map(str, missing[:10])) + (", ..." if missing[10:] else "")
        yield f"No training image has the label {shown}, of 0 to {num_classes - 1}."


def check_parts(setup: Setup) -> tuple[TrainState, dict[str, Any]]:
    """Checks what network, optimizer, augmentation, loss and training step return, without computing anything.

    Returns:
      The shapes of the state, and those of the variables before `init_from_data`.

    Raises:
      UserError: a shape is wrong, or a part raised an exception.
    """
    config, key = setup.config, setup.augment_key
    batch_size, image_shape, num_classes = setup.batch_size, setup.facts.image_shape, setup.dataset.num_classes
    batches = [
        check_augment(program.augment, setup.train_input, batch_size, setup.train_shape(program), key)
        for program in setup.program.distinct_programs()
    ]
    with user_code("`model`"):
        image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        variables = notice_edits(partial(init_variables, model=config.model), key, image)
    params = variables["params"]
    if config.optim.freeze_epochs or config.optim.depth_decay < 1:
        check_depths(setup.program.optim, params)
    opt_state = check_optimizer(setup.program, params)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    model_state = {name: value for name, value in variables.items() if name != "params"}
    state = TrainState(step, params, model_state, opt_state)
    state = check_init_from_data(setup.program, state, image)
    image = jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.float32)
    with user_code("`model`"):
        apply = partial(apply_in_evaluation, config.model)
        output = notice_edits(apply, state.params, state.model_state, image)
    check_logits(output, (batch_size, num_classes))
    programs = [setup.program]
    if setup.program.step_fn is not train_step:  # It receives the names of the frozen parameters, too.
        known = setup._replace(params=state.params)
        frozen = dict.fromkeys(known.frozen_names(epoch) for epoch in range(config.num_epochs))
        programs = [setup.program._replace(frozen=names) for names in frozen]
    for program, batch in product(programs, batches):
        check_training(program, state, batch, key, num_classes=num_classes)
    return state, variables


def check_step(setup: Setup, state: TrainState) -> Any:
    """Checks that the training step can be traced, keeps the shapes of `state`, and fits into memory.

    Of several augmentations, the one with the largest images is checked. The trace is not lost: a step uses it.

    Returns:
      The jaxpr of the step.

    Raises:
      UserError: it does not, or the network or the optimizer raised an exception.
    """
    device, placement, batch_size = setup.placement.device, setup.placement, setup.batch_size
    program = max(setup.program.distinct_programs(), key=lambda program: math.prod(setup.train_shape(program)))
    placed: Any = jax.tree.map(lambda x, sharding: x.update(sharding=sharding), state, placement.of_state(state))
    ours = program.step_fn is train_step
    with user_code("The training step of `model`, `loss` and `optim`" if ours else "`train_step`"):
        step = trace_steps(setup, placed, program._replace(frozen=setup.frozen_names(0)))
    check_kept(state, step.out_info[0])
    sizes, intermediate = placement.bytes_per_device(state), largest_result(step.jaxpr.jaxpr) // placement.num_devices
    data = num_bytes(setup.train_input) + (0 if setup.dataset.streams else num_bytes(setup.validation))
    needed = data + sizes + max(sizes, intermediate)  # Each epoch ends with a copy of the state.
    if device.platform == "cpu":  # Its devices share one memory, into which the first checkpoint is read back.
        copies = placement.num_devices
        needed = data + max(copies * (sizes + intermediate), 2 * copies * sizes + num_bytes(state))
    elif not program.divides_initial_state:
        needed = max(needed, data + num_bytes(state))
    available = device_memory(device)
    if available is not None and needed > available:
        fix = "the size of the network" if sizes > intermediate else f"`batch_size` (now {batch_size})"
        raise UserError(
            f"`model` must fit into the {gib(available)} of memory, got {count_params(state):,} parameters. Training "
            f"needs at least {gib(needed)}: {gib(sizes)} for parameters and optimizer state, {gib(intermediate)} for "
            f"the largest result of a layer, and {gib(data)} for the data. Lower {fix}."
        )
    return step.jaxpr
