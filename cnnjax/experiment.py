"""An experiment as its configuration names it: data on the device, network, optimizer, loss, first state."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from cnnjax.cli.console import Report
from cnnjax.config import Config
from cnnjax.data.batches import (
    Pixels,
    Plan,
    check_augment,
    epoch_plan,
    pixel_statistics,
    row,
    split_validation,
    standardize,
    steps_per_epoch,
)
from cnnjax.data.datasets import Examples, ImageDataset, load_dataset
from cnnjax.evaluate import Scores, evaluate, train_steps
from cnnjax.models.models import check_size, make_model
from cnnjax.models.whitening import NUM_IMAGES, whiten
from cnnjax.optim.optimizer import frozen_parts, make_loss, make_tx
from cnnjax.runs import directory as rundir
from cnnjax.runs import manifest
from cnnjax.sharding import Placement, place
from cnnjax.step import LossFn, Metrics, TrainState, init_state


class Run(NamedTuple):
    """All that a run does not change."""

    config: Config
    folder: Path
    dataset: ImageDataset
    train: Pixels  # On every device, as the state.
    validation: Pixels
    steps_per_epoch: int
    steps_per_dispatch: int
    model: nn.Module
    tx: optax.GradientTransformation
    loss_fn: LossFn
    train_key: jax.Array
    placement: Placement

    def plan(self, step: int) -> Plan:
        """Returns the plan of the steps from `step` on that are dispatched together, on the run's devices."""
        epoch, index = divmod(step, self.steps_per_epoch)
        plan = epoch_plan(
            self.config.seed,
            epoch,
            len(self.train.label),
            batch_size=self.config.batch_size,
            augment=self.config.augment,
            image_size=self.train.image.shape[1:3],
        )
        return jax.device_put(row(plan, slice(index, index + self.steps_per_dispatch)), self.placement.plan)

    def train_steps(self, state: TrainState, plan: Plan, step: int) -> tuple[TrainState, Metrics]:
        """Makes the steps of the plan of `step`; the state is donated. Returns before the device is done."""
        config, num_steps = self.config, self.steps_per_epoch * self.config.num_epochs
        # Another program saves the time of a gradient; on a CPU, compiling it takes longer than that.
        on_cpu = self.placement.devices[0].platform == "cpu"
        frozen = () if on_cpu else frozen_parts(config.optim, state.params, step, num_steps, config.num_epochs)
        return train_steps(
            state,
            self.train,
            plan,
            self.train_key,
            augment=self.config.augment,
            model=self.model,
            tx=self.tx,
            loss_fn=self.loss_fn,
            frozen=frozen,
        )

    def evaluate(self, state: TrainState, pixels: Pixels, views: str = "plain") -> Scores:
        """Scores every example once."""
        return evaluate(state, pixels, model=self.model, views=views, placement=self.placement)


def set_up(
    config: Config, run_dir: Path, data_dir: Path | None, devices: Sequence[Any] | None, report: Report
) -> tuple[Run, TrainState, rundir.DataFacts]:
    """Loads the training split, builds what `config` names and makes the first state."""
    dataset = load_dataset(config.dataset, data_dir, report.say)
    examples = dataset.load("train")
    kept, held_out = split_validation(config.seed, examples.label, config.validation_fraction)
    validation = Examples(examples.image[held_out], examples.label[held_out])
    train = Examples(examples.image[kept], examples.label[kept]) if len(held_out) else examples  # A copy, or none.
    del examples
    image_shape = train.image.shape[1:]
    check_size(config.model, image_shape)
    check_augment(config.augment, image_shape[:2])
    steps = steps_per_epoch(len(train.label), config.batch_size)
    tx = make_tx(config.optim, num_steps=steps * config.num_epochs, num_epochs=config.num_epochs)
    standardization = pixel_statistics(train.image)
    facts = rundir.make_facts(dataset, image_shape, standardization)
    rundir.check_data(run_dir, facts)
    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    placement = place(config.batch_size, devices)
    run = Run(
        config=config,
        folder=run_dir,
        dataset=dataset,
        train=jax.device_put(Pixels(*train, standardization), placement.state),
        validation=jax.device_put(Pixels(*validation, standardization), placement.state),
        steps_per_epoch=steps,
        steps_per_dispatch=1 if placement.devices[0].platform == "cpu" else steps,
        model=make_model(config.model, dataset.num_classes),
        tx=tx,
        loss_fn=make_loss(config.label_smoothing),
        train_key=jax.device_put(train_key, placement.state),
        placement=placement,
    )
    state = init_state(init_key, jnp.zeros((1, *image_shape)), model=run.model, tx=run.tx)
    if config.model.name == "speednet":
        state = whiten(state, standardize(run.train.image[:NUM_IMAGES], standardization))
    where = device(placement.devices[0])
    shared = f" ({placement.num_devices} share a batch)" if placement.num_devices > 1 else ""
    report.say(
        f"{run_dir}: {config.model.name} ({count_params(state):,} parameters) on {config.dataset} ({dataset.source}), "
        f"{len(train.label):,} training and {len(validation.label):,} validation images, on {where}{shared}"
    )
    return run, jax.device_put(state, placement.state), facts


def count_params(state: TrainState) -> int:
    """Returns the number of trainable parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(state.params))


def device(first: Any) -> str:
    """Returns in words what a device of jax is."""
    if first.platform == "cpu":
        count = manifest.num_cores()
        return f"cpu, {count} core{'s' if count != 1 else ''}"
    return f"{first.platform}, {first.device_kind}"
