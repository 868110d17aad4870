"""A run as an object: its configuration, its history, its result, and the network that it trained."""

import os
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from cnnjax.compiler import jit
from cnnjax.config import Config, word
from cnnjax.data.arrays import check_images
from cnnjax.data.batches import standardize
from cnnjax.data.datasets import ImageDataset, load_dataset
from cnnjax.data.feed import pixels_of
from cnnjax.data.stored import Examples
from cnnjax.data.tta import TTA
from cnnjax.errors import UserError, check_name, option
from cnnjax.evaluation import evaluate_pixels
from cnnjax.files import tree_sha256
from cnnjax.metrics import Scores, with_metrics
from cnnjax.process.settings import start_jax
from cnnjax.runs.checkpoints import Checkpoints
from cnnjax.runs.codec import check_complete, collect_names
from cnnjax.runs.inference import features_of, in_batches, outputs_of
from cnnjax.runs.manifest import read_manifest
from cnnjax.runs.predictions import FilePrediction, predict_files
from cnnjax.runs.records import read_record, read_result, read_rows, read_timing, run_argument
from cnnjax.runs.recovery import list_steps
from cnnjax.runs.schema import DataFacts, Result, Row, Timing
from cnnjax.sharding import place
from cnnjax.state import TrainState, abstract_state, check_tx, eval_params, init_optimizer


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """A run, finished or not. `train_and_evaluate` and `load_run` return it.

    Attributes:
      run_dir: the run directory.
      config: the configuration, with the number of classes of the data.
      facts: shape of the images, names of the classes, digests, mean and standard deviation of the pixels.
      result: the content of result.json, or None if the run is not finished.
      step: the step of the checkpoint that `state` holds; None: the best by validation, or else the last.
      test_logits: those of the test score, in the order of `load_data`, if this process has trained the run.
    """

    run_dir: Path
    config: Config
    facts: DataFacts
    result: Result | None
    step: int | None = None
    test_logits: Float[np.ndarray, "N K"] | None = None
    _trained: tuple[TrainState | None, list[Row], list[Timing]] | None = None  # Set if this process trained it.

    def __repr__(self) -> str:
        dataset = self.facts.source if not isinstance(self.config.dataset, str) else self.config.dataset
        outcome = "not finished"
        if self.result is not None:
            num_epochs = self.result["stopped_epoch"] or self.result["num_epochs"]
            outcome = f"test accuracy {self.test_accuracy:.2%} after {num_epochs} epochs"
        return f"Run({self.run_dir}: {word(type(self.config.model))} on {dataset}, seed {self.config.seed}, {outcome})"

    @property
    def test_accuracy(self) -> float:
        """The fraction of the test set that is classified correctly, by the best checkpoint.

        Raises:
          UserError: the run is not finished.
        """
        return self.finished_result()["test_accuracy"]

    @property
    def test_loss(self) -> float:
        """The mean cross-entropy of the test set in nats; see `test_accuracy`."""
        return self.finished_result()["test_loss"]

    def finished_result(self) -> Result:
        """Returns `result`.

        Raises:
          UserError: the run is not finished.
        """
        if self.result is None:
            raise UserError(
                f"`{run_argument()}` must be finished to have a test score, got {self.run_dir}, which is not. Resume "
                f"the run: {option('resume')}."
            )
        return self.result

    @cached_property
    def history(self) -> dict[str, np.ndarray]:
        """The numbers in metrics.jsonl and timing.jsonl: {name: values [epochs]}, for pandas.DataFrame or plots.

        Raises:
          UserError: a file is damaged.
        """
        _, rows, timing = self._trained or (None, read_rows(self.run_dir), read_timing(self.run_dir))
        seconds: dict[int, Any] = {line["epoch"]: line for line in timing}  # A kill can come before it is written.
        merged: list[dict[str, Any]] = [{**row, **seconds.get(row["epoch"], {})} for row in rows]
        names = dict.fromkeys(name for row in merged for name in row if name != "params_sha256")
        return {name: np.array([row.get(name, np.nan) for row in merged]) for name in names}

    @property
    def state(self) -> TrainState:
        """The state of the network and its optimizer; restored from its checkpoint when it is first used.

        To train on, use `new_state`, or `train_step(..., donate=False)`. If it was donated, it is restored again.

        Raises:
          UserError: there is no such checkpoint, or it is damaged.
        """
        if _is_deleted(self._kept_state):
            del vars(self)["_kept_state"]
        return self._kept_state

    @cached_property
    def _kept_state(self) -> TrainState:
        state = None if self._trained is None or self.step is not None else self._trained[0]
        if state is not None and not _is_deleted(state):
            return state
        return self._restore()

    def _restore(self) -> TrainState:
        start_jax()
        # Only the structure of its state matters here, and it must allow for one update and one synchronization.
        optim = self.config.optim.for_network(self.config.model)
        tx = optim.make_tx(optim.accumulate_steps * max(optim.lookahead, 1), 1)
        target = abstract_state(self.facts.image_shape, model=self.config.model, tx=tx)
        fix = f"Resume it: {option('resume')}." if self.result is None else "Train it again: cnnjax reproduce."
        with closing(Checkpoints(self.run_dir / "checkpoints")) as checkpoints:
            best = self._best_step() if self.result else None if self.step else checkpoints.best()
            step = self.step or best
            if step is None or step not in checkpoints.steps():
                of_step = "the end of an epoch" if step is None else f"step {step}, its best"
                raise UserError(
                    f"`{run_argument()}` must have the checkpoint of {of_step}, got {self.run_dir} without it. {fix}"
                )
            state, _ = checkpoints.restore(step, target)
        if self.result and step == best and tree_sha256(state.params) != self.result["sha256"]["best_params"]:
            raise UserError(
                f"`{run_argument()}` must have the parameters that result.json names, got others in {self.run_dir}. "
                f"{fix}"
            )
        return state

    def _best_step(self) -> int | None:
        """Returns the step of the best epoch of a finished run."""
        best = self.finished_result()["best_epoch"]
        return next((row["step"] for row in read_rows(self.run_dir) if row["epoch"] == best), None)

    def new_state(self, tx: optax.GradientTransformation) -> TrainState:
        """Returns a state of step 0 for `train_step`: a copy of the network, and the initial state of an optimizer.

        Example:
          >>> state = run.new_state(tx)
          >>> batch = Batch(run.standardize(images), label, jnp.ones(len(label), bool))
          >>> state, metrics = train_step(state, batch, key, model=run.config.model, tx=tx)

        Args:
          tx: an optax optimizer.
        """
        check_tx(tx)
        return _restart(self.state, tx=tx)

    def standardize(self, images: Any) -> Float[np.ndarray, "N H W C"]:
        """Returns images as the network was trained on them: float32, with the mean and deviation of its training set.

        Args:
          images: see `predict`.
        """
        return np.asarray(
            standardize(check_images("images", images, self.facts.image_shape), self.facts.standardization)
        )

    def predict(self, images: Any, *, tta: str = "none") -> Float[np.ndarray, "N K"]:
        """Returns the probability of each class, float32.

        Args:
          images: uint8 [N H W C], as in training; or [N H W] if C is 1. Any N compiles one program.
          tta: the test-time augmentation, see `Config`; `run.config.tta` is that of the test score. With "uncertain",
            the images that are predicted together share the extra views.

        Raises:
          UserError: `images` has another dtype or shape.
        """
        return self._outputs(images, tta, softmax=True)

    def logits(self, images: Any, *, tta: str = "none") -> Float[np.ndarray, "N K"]:
        """Returns the logits, float32, such as those of a teacher for distillation: `predict` is their softmax.

        Args:
          images, tta: see `predict`.
        """
        return self._outputs(images, tta, softmax=False)

    def _outputs(self, images: Any, tta: str, *, softmax: bool) -> Float[np.ndarray, "N K"]:
        check_name("tta", tta, TTA)
        images = check_images("images", images, self.facts.image_shape)
        network = partial(outputs_of, model=self.config.model, tta=tta, softmax=softmax)
        return in_batches(partial(network, self.state, self.facts.standardization), images)

    def predict_files(
        self, paths: Iterable[str | os.PathLike[str]], *, tta: str | None = None, invert: bool = False
    ) -> Iterator[FilePrediction]:
        """Yields a `FilePrediction` for each image file of any size and format, in order; few are in memory at a time.

        Example:
          >>> for path, probabilities, error, _ in run.predict_files(sorted(Path("photos").rglob("*.jpg"))):
          ...     print(path, error or run.facts.class_names[probabilities.argmax()])

        Args:
          paths: of any number of files.
          tta: see `predict`; None: that of the test score, but "flip_translate" instead of "uncertain".
          invert: swaps dark and bright first: for dark digits on white paper, if the training images are the reverse.

        Raises:
          UserError: the network has more than 4 channels. A file that cannot be read has an `error` instead.
        """
        return predict_files([self], paths, tta=tta, invert=invert)

    def features(self, images: Any, layer: str) -> Float[np.ndarray, "N ..."]:
        """Returns the output of a layer of a Linen module, float32.

        Args:
          images: see `predict`.
          layer: the name of a submodule that is called once, "Conv_0" or "block/Dense_0"; or of a value that the
            network sows into "intermediates", such as "pooled".

        Raises:
          UserError: there is no such layer; the message lists them. See also `predict`.
        """
        model, standardization = self.config.model, self.facts.standardization
        images = check_images("images", images, self.facts.image_shape)
        return in_batches(partial(features_of, self.state, standardization, model=model, layer=layer), images)

    def load_data(self, split: str = "test", *, data_dir: str | os.PathLike[str] | None = None) -> Examples:
        """Returns the images, uint8 [N H W C], and labels, int [N], of the "test" or the "validation" split.

        Args:
          split: "validation" is the validation split of the data, or the part that the run was not trained on.
          data_dir: the tfds directory; tfds's default if None.

        Raises:
          UserError: the data are not those of the run, or it has no validation part.
        """
        dataset = self._dataset(split, data_dir)
        if split == "test":
            return dataset.load("test")
        return dataset.load_parts(self.config.seed, self.config.validation_fraction)[1]

    def _dataset(self, split: str, data_dir: str | os.PathLike[str] | None) -> ImageDataset:
        check_name("split", split, ("test", "validation"))
        config, facts = self.config, self.facts
        size, interpolation = facts.image_shape[:2], facts.interpolation
        options = config.data_options() | {"image_size": size, "interpolation": interpolation}
        dataset = load_dataset(config.dataset, data_dir, version=facts.version, **options)
        if dataset.sha256 != facts.sha256:
            parameter = "data_dir" if dataset.folder else "dataset"
            raise UserError(
                f"`{parameter}` must hold the {dataset.name!r} of this run, SHA-256 {facts.sha256}, got "
                f"{dataset.sha256} from {dataset.folder or dataset.source}."
            )
        if split == "validation" and config.validation_fraction == 0:
            raise UserError("`split` must be test if `validation_fraction` was 0, got validation.")
        return dataset

    def evaluate(
        self, split: str = "test", *, tta: str | None = None, data_dir: str | os.PathLike[str] | None = None
    ) -> Scores:
        """Scores every image of the "test" split, or of the "validation" part that the run was not trained on.

        Args:
          split: see `load_data`.
          tta: the test-time augmentation; None: as in training, that of the configuration for "test", else "none".
          data_dir: the tfds directory; tfds's default if None.

        Raises:
          UserError: the data are not those of the run, or it has no validation part.
        """
        check_complete(self.config, "metrics")
        scores, label = evaluate_ours(self, split, tta=tta, data_dir=data_dir)
        return with_metrics(scores, self.config.metrics, label)._replace(logits=None)


def evaluate_ours(
    run: Run, split: str, *, tta: str | None, data_dir: str | os.PathLike[str] | None
) -> tuple[Scores, Any]:
    """Does what `Run.evaluate` does without `Config.metrics`; returns the labels, and logits if there are metrics."""
    dataset, config = run._dataset(split, data_dir), run.config
    parts = [dataset.open("test")] if split == "test" else dataset.open_parts(config.seed, config.validation_fraction)
    pixels = pixels_of(parts[-1], run.facts.standardization)
    if tta is None:
        tta = config.tta if split == "test" else "none"
    placement = place(1, [*run.state.step.devices()])
    keeps = config.metrics is not None
    scores = evaluate_pixels(run.state, pixels, model=config.model, tta=tta, placement=placement, keep_logits=keeps)
    return scores, pixels.label


def load_run(run_dir: str | os.PathLike[str], config: Config | None = None, *, step: int | None = None) -> Run:
    """Reads a run, finished or not, and does not change it.

    Example:
      >>> load_run("runs/mnist_mlp-seed0").predict(images).argmax(axis=1)

    Args:
      run_dir: the run directory.
      config: a configuration with the classes, functions and arrays of the run; None: enough if its network and its
        optimizer are cnnjax's own. Loss, augmentation and step are used only in training, the data only in training and
        scoring.
      step: of the checkpoint to use; None: the best by validation, or else the last.

    Raises:
      UserError: `run_dir` holds no run, or no checkpoint of `step`, or `config` lacks a class of the network or
        the optimizer.
    """
    run_dir = Path(os.path.expanduser(run_dir))
    record = read_record(run_dir)
    if (run_dir / "manifest.json").exists():
        read_manifest(run_dir)  # A run of another version ends here.
    config = record.decode({} if config is None else collect_names(config))
    steps = list_steps(run_dir / "checkpoints")
    if step is not None and not (isinstance(step, int) and step in steps):
        raise UserError(f"`step` must be that of a checkpoint in {run_dir} ({steps}), got {step!r}.")
    return make_run(run_dir, config, record.data, step)


def make_run(run_dir: Path, config: Config, facts: DataFacts, step: int | None = None) -> Run:
    """Returns the run in a directory, if its configuration is known."""
    return Run(run_dir, config.with_num_classes(len(facts.class_names)), facts, read_result(run_dir), step)


def _is_deleted(state: TrainState) -> bool:
    return any(leaf.is_deleted() for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array))


@jit(static_argnames=("tx",))
def _restart(state: TrainState, *, tx: optax.GradientTransformation) -> TrainState:
    params, model_state = jax.tree.map(jnp.copy, (eval_params(state), state.model_state))
    return TrainState(jnp.zeros((), jnp.int32), params, model_state, init_optimizer(tx, params))
