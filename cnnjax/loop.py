"""The loop: epochs of training steps, validation, checkpoints, and the test set once at the end."""

import math
import os
import time
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from cnnjax import rundir
from cnnjax.batches import (
    Standardization,
    pixel_statistics,
    split_validation,
    steps_per_epoch,
    train_batch,
)
from cnnjax.checkpoint import Checkpoints, all_finite
from cnnjax.config import Config
from cnnjax.data import Examples, ImageDataset, load_dataset
from cnnjax.errors import NonFiniteLossError, UserError
from cnnjax.evaluation import Scores, Totals, evaluate
from cnnjax.models import make_model
from cnnjax.optim import make_loss, make_tx
from cnnjax.report import Report
from cnnjax.signals import Interrupted, stop_signals
from cnnjax.step import Batch, LossFn, TrainState, init_state, train_step


class Run(NamedTuple):
    """All that a run does not change."""

    config: Config
    folder: Path
    dataset: ImageDataset
    train: Examples
    validation: Examples
    standardization: Standardization
    steps_per_epoch: int
    model: nn.Module
    tx: optax.GradientTransformation
    loss_fn: LossFn
    train_key: jax.Array

    def batch(self, step: int) -> Batch:
        """Returns the batch of a training step."""
        return train_batch(
            self.train,
            self.standardization,
            seed=self.config.seed,
            step=step,
            batch_size=self.config.batch_size,
            flip=self.config.flip,
        )


def train_and_evaluate(
    config: Config,
    *,
    run_dir: Path | None = None,
    data_dir: Path | None = None,
    resume: bool = False,
    report: Report | None = None,
) -> dict[str, Any]:
    """Trains a network and scores it on the test set, in one run directory.

    Args:
      config: what to train.
      run_dir: runs/<experiment>-seed<k> when None.
      data_dir: the tfds directory; tfds's own default when None.
      resume: go on with the run in `run_dir`, exactly where it stopped. A run that ended is not run again, but for more
        epochs at a constant learning rate.
      report: told what happens; a quiet one when None.

    Returns:
      The content of result.json.

    Raises:
      UserError: what the user can mend; see its message.
      NonFiniteLossError: the loss became infinite or not a number; the checkpoints before that are kept.
      Interrupted: SIGINT or SIGTERM came; the run can be resumed.
    """
    report = report or Report(quiet=True)
    run_dir = rundir.default_run_dir(config) if run_dir is None else run_dir
    rundir.check_run(run_dir, config, resume)
    result = rundir.read_result(run_dir)
    if result is None or result["num_epochs"] < config.num_epochs:
        run, state = _set_up(config, run_dir, data_dir, report)
        with rundir.lock(run_dir), stop_signals() as stop, closing(Checkpoints(run_dir / "checkpoints")) as checkpoints:
            if resume and checkpoints.latest() is None:
                report.say(f"There is nothing to resume in {run_dir}: starting anew.")
            state, rows = fit(run, state, checkpoints, stop, report)
            result = _test(run, state, rows, checkpoints)
        rundir.write_result(run_dir, result)
    report.result(result, run_dir)
    return result


def _set_up(config: Config, run_dir: Path, data_dir: Path | None, report: Report) -> tuple[Run, TrainState]:
    """Loads the training split, builds what `config` names, makes the first state and writes config.json."""
    dataset = load_dataset(config.dataset, data_dir, report.say)
    examples = dataset.load("train")
    train, validation = (
        Examples(examples.image[part], examples.label[part])
        for part in split_validation(config.seed, examples.label, config.validation_fraction)
    )
    standardization = pixel_statistics(train.image)
    steps = steps_per_epoch(len(train.label), config.batch_size)
    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    run = Run(
        config=config,
        folder=run_dir,
        dataset=dataset,
        train=train,
        validation=validation,
        standardization=standardization,
        steps_per_epoch=steps,
        model=make_model(config.model, dataset.num_classes),
        tx=make_tx(config.optim, num_steps=steps * config.num_epochs),
        loss_fn=make_loss(config.label_smoothing),
        train_key=train_key,
    )
    image_shape = train.image.shape[1:]
    state = init_state(init_key, jnp.zeros((1, *image_shape)), model=run.model, tx=run.tx)
    rundir.create_run(run_dir, config, rundir.make_facts(dataset, image_shape, standardization))
    report.say(
        f"{run_dir}: {config.model.name} ({count_params(state):,} parameters) on {config.dataset} ({dataset.source}), "
        f"{len(train.label):,} training and {len(validation.label):,} validation images, on {device()}"
    )
    return run, state


def fit(
    run: Run, state: TrainState, checkpoints: Checkpoints, stop: list[int], report: Report
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Trains from the latest checkpoint, or from `state` where there is none, to the last epoch.

    Args:
      run: what stays the same.
      state: donated.
      checkpoints: of this run.
      stop: the signals received; as soon as there is one, the loop saves and raises.
      report: told what happens.

    Returns:
      The last state, and the rows of metrics.jsonl, one an epoch.

    Raises:
      UserError: metrics.jsonl lacks epochs.
      NonFiniteLossError: the loss or a parameter became infinite or not a number.
      Interrupted: a signal came.
    """
    config, steps = run.config, run.steps_per_epoch
    totals, seconds = Totals(), 0.0
    if (latest := checkpoints.latest()) is not None:
        state, progress = checkpoints.restore(latest, state)
        totals, seconds = Totals(*progress["totals"]), progress["seconds"]
        report.say(f"resuming at step {latest} of {steps * config.num_epochs}")
    step = int(state.step)
    rows = rundir.read_metrics(run.folder)[: step // steps]
    if len(rows) != step // steps:
        raise UserError(
            f"{run.folder}/metrics.jsonl must have a line for each of the {step // steps} epochs before step {step}, "
            f"got {len(rows)}. Restore it, or train in another directory."
        )
    clock = time.perf_counter() - seconds  # The instant at which a run without interruptions would have begun.

    def save(scores: Scores | None = None) -> None:
        if not all_finite(state):
            raise _not_finite("the parameters became infinite or nan", step, config, checkpoints)
        progress = {"totals": totals, "seconds": time.perf_counter() - clock}
        checkpoints.save(state, progress, None if scores is None else scores._asdict())

    batch = run.batch(step)
    with report.progress(config.num_epochs, steps, start=step) as bar:
        for epoch in range(step // steps, config.num_epochs):
            lap, already = time.perf_counter(), totals.num_examples
            while step < (epoch + 1) * steps:
                state, metrics = train_step(
                    state, batch, run.train_key, model=run.model, tx=run.tx, loss_fn=run.loss_fn
                )
                step += 1
                batch = run.batch(step)  # The host makes the next batch while the device works on this one.
                totals = totals.add(metrics)  # Waits for the device.
                if not math.isfinite(totals.loss):
                    raise _not_finite(f"the loss became {float(metrics.loss)}", step, config, checkpoints)
                bar.update(step, totals.means())
                if stop and step % steps:  # A stop at the end of an epoch is saved with its scores, below.
                    save()
                    checkpoints.wait()
                    raise Interrupted(stop[0], step)
            images_per_second = (totals.num_examples - already) / (time.perf_counter() - lap)
            scores = evaluate(state, run.validation, run.standardization, model=run.model)
            rows.append(
                {
                    "epoch": epoch + 1,
                    "step": step,
                    "train_loss": totals.means().loss,
                    "train_accuracy": totals.means().accuracy,
                    "validation_loss": scores.loss,
                    "validation_accuracy": scores.accuracy,
                    "images_per_second": images_per_second,
                    "seconds": time.perf_counter() - clock,
                }
            )
            rundir.write_metrics(run.folder, rows)
            report.epoch(rows[-1], config.num_epochs)
            totals = Totals()
            save(scores)
            if stop:
                checkpoints.wait()
                raise Interrupted(stop[0], step)
    checkpoints.wait()
    return state, rows


def _test(run: Run, like: TrainState, rows: list[dict[str, Any]], checkpoints: Checkpoints) -> dict[str, Any]:
    """Scores the best checkpoint on the test split; returns the content of result.json."""
    best_step = checkpoints.best()
    if best_step is None:
        raise UserError(f"The checkpoints in {run.folder} must have one at the end of an epoch, got none. Train anew.")
    state, _ = checkpoints.restore(best_step, like)
    best = next(row for row in rows if row["step"] == best_step)
    scores = evaluate(state, run.dataset.load("test"), run.standardization, model=run.model)
    return {
        "test_accuracy": scores.accuracy,
        "test_loss": scores.loss,
        "num_test_examples": scores.num_examples,
        "best_validation_accuracy": best["validation_accuracy"],
        "best_epoch": best["epoch"],
        "num_epochs": run.config.num_epochs,
        "training_seconds": rows[-1]["seconds"],
        "num_params": count_params(state),
        "seed": run.config.seed,
        "device": device(),
        "versions": {name: version(name) for name in ("cnnjax", "jax", "jaxlib", "flax", "optax", "numpy")},
    }


def count_params(state: TrainState) -> int:
    """Returns the number of trainable parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(state.params))


def device() -> str:
    """Returns what jax computes on, in words."""
    first = jax.devices()[0]
    if first.platform == "cpu":
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return f"cpu, {count} core{'s' if count != 1 else ''}"
    return f"{first.platform}, {first.device_kind}"


def _not_finite(what: str, step: int, config: Config, checkpoints: Checkpoints) -> NonFiniteLossError:
    checkpoints.wait()
    latest = checkpoints.latest()
    kept = "there is no checkpoint yet" if latest is None else f"the last finite checkpoint is of step {latest}"
    return NonFiniteLossError(
        f"{what} between steps {step - 1} and {step}; {kept}. Try a lower `optim.learning_rate` "
        f"(now {config.optim.learning_rate}), in another run directory."
    )
