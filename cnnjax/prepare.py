"""What a run sets up before its first step: the data on the device, the initial state, and checks of user code."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from cnnjax.config import Config, word
from cnnjax.data.batches import Pixels, make_batch, pixel_statistics, standardize
from cnnjax.data.datasets import ImageDataset
from cnnjax.data.order import plain_plan, split_validation, steps_per_epoch
from cnnjax.data.tfds_format import Examples
from cnnjax.errors import UserError
from cnnjax.runs import manifest
from cnnjax.runs.directory import DataFacts, OpenRun, make_facts
from cnnjax.sharding import Placement, place
from cnnjax.step import Program, TrainState, init_from_data, init_run
from cnnjax.typing import Batch

INIT_IMAGES = 5000  # Number of training images that a network may be initialized from.


class Setup(NamedTuple):
    """Everything that a run does not change."""

    config: Config
    dataset: ImageDataset
    facts: DataFacts
    train: Pixels  # On every device.
    validation: Pixels
    program: Program
    steps_per_epoch: int
    steps_per_dispatch: int
    train_key: Key[Array, ""]
    augment_key: Key[Array, ""]
    placement: Placement


def set_up(run: OpenRun, dataset: ImageDataset, devices: Sequence[Any] | None) -> tuple[Setup, TrainState]:
    """Loads the training split, resolves what the data determine, and makes the initial state."""
    config = run.config.with_num_classes(dataset.num_classes)
    examples = dataset.load("train")
    kept, held_out = split_validation(config.seed, examples.label, config.validation_fraction)
    validation = Examples(examples.image[held_out], examples.label[held_out])
    train = Examples(examples.image[kept], examples.label[kept]) if len(held_out) else examples
    del examples  # The copy replaces it.
    image_shape, standardization = train.image.shape[1:], pixel_statistics(train.image)
    config.augment.check_size(image_shape[:2])
    steps = steps_per_epoch(len(train.label), config.batch_size)
    program = Program(
        config.model, config.optim, config.augment, config.loss, steps * config.num_epochs, config.num_epochs
    )
    placement = place(config.batch_size, devices)
    init_key, train_key, augment_key = jax.random.split(jax.random.key(config.seed), 3)
    setup = Setup(
        config=config,
        dataset=dataset,
        facts=make_facts(dataset, image_shape, standardization),
        train=jax.device_put(Pixels(*train, standardization), placement.state_sharding),
        validation=jax.device_put(Pixels(*validation, standardization), placement.state_sharding),
        program=program,
        steps_per_epoch=steps,
        steps_per_dispatch=1 if placement.devices[0].platform == "cpu" else steps,
        train_key=jax.device_put(train_key, placement.state_sharding),
        augment_key=augment_key,
        placement=placement,
    )
    state = init_run(init_key, jnp.zeros((1, *image_shape)), program=program)
    check_shapes(setup, state)
    if hasattr(config.model, "init_from_data"):
        images = standardize(setup.train.image[:INIT_IMAGES], standardization)
        state = init_from_data(state, images, model=config.model, tx=program.make_tx())
    shared = f" ({placement.num_devices} share a batch)" if placement.num_devices > 1 else ""
    run.report.say(
        f"{run.run_dir}: {word(type(config.model))} ({count_params(state):,} parameters) on {dataset.name} "
        f"({dataset.source}), {len(train.label):,} training and {len(validation.label):,} validation images, on "
        f"{device_name(placement.devices[0])}{shared}"
    )
    return setup, jax.device_put(state, placement.state_sharding)


def check_shapes(setup: Setup, state: TrainState) -> None:
    """Checks the shapes that network, augmentation and loss return, without computing anything.

    Raises:
      UserError: one of them is wrong.
    """
    config, batch_size = setup.config, setup.config.batch_size

    def check(name: str, rule: str, expected: tuple[int, ...], got: Any) -> None:
        if getattr(got, "shape", None) != expected:
            raise UserError(f"`{name}` must return {rule} of shape {expected}, got {got}.")

    plan = plain_plan(batch_size, batch_size).row(0)
    batch = jax.eval_shape(lambda plan: make_batch(setup.train, plan, config.augment, setup.augment_key), plan)
    if not isinstance(batch, Batch):
        raise UserError(f"`augment.transform` must return a Batch, got {type(batch).__name__}. Use batch._replace.")
    check("augment.transform", "images", (batch_size, *setup.facts.image_shape), batch.image)
    check("augment.transform", "a mask", (batch_size,), batch.mask)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = jax.eval_shape(lambda image: config.model.apply(variables, image, train=False), batch.image)
    check("model", "logits", (batch_size, setup.dataset.num_classes), logits)
    try:
        loss = jax.eval_shape(config.loss, logits, batch.label)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"`loss` must accept logits {logits} and labels {batch.label}, as the augmentation makes them: {error}"
        ) from error
    check("loss", "one value per example", (batch_size,), loss)
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        raise UserError(f"`loss` must return floating-point values, which have gradients, got {loss.dtype}.")


def count_params(state: TrainState) -> int:
    """Returns the number of trainable parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(state.params))


def device_name(device: Any) -> str:
    """Describes a device of jax in words."""
    if device.platform == "cpu":
        count = manifest.num_cores()
        return f"cpu, {count} core{'s' if count != 1 else ''}"
    return f"{device.platform}, {device.device_kind}"
