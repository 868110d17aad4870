"""A trained network: restored from its run directory, scored, and applied to image files."""

import warnings
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float, PyTree
from PIL import Image, ImageOps, UnidentifiedImageError

from cnnjax.cli.process import start_jax
from cnnjax.cli.streams import reason
from cnnjax.config import Config
from cnnjax.data.batches import Pixels, standardize
from cnnjax.data.datasets import load_dataset
from cnnjax.data.order import split_validation
from cnnjax.data.tfds_format import Examples
from cnnjax.errors import UserError
from cnnjax.runs.checkpoints import Checkpoints
from cnnjax.runs.codec import collect_names
from cnnjax.runs.files import open_regular, tree_sha256
from cnnjax.runs.records import read_record, read_result, read_rows
from cnnjax.runs.schema import DataFacts
from cnnjax.step import Scores, TrainState, evaluate, init_state

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # Of Pillow, for each number of channels.


class Trained(NamedTuple):
    """A network with the best parameters of its run, by validation."""

    config: Config
    facts: DataFacts
    state: TrainState


def load_trained(run_dir: Path, config: Config | None = None) -> Trained:
    """Restores the best checkpoint of a run.

    Args:
      run_dir: the run directory.
      config: a configuration with the classes, functions and arrays of the run; None: they are all cnnjax's own.

    Raises:
      UserError: `run_dir` holds no run or no checkpoint of an epoch yet, or `config` lacks a class.
    """
    run_dir = Path(run_dir)
    record = read_record(run_dir)
    return restore_best(run_dir, record.decode({} if config is None else collect_names(config)), record.data)


def restore_best(run_dir: Path, config: Config, facts: DataFacts) -> Trained:
    """Restores the best checkpoint of a run with a known configuration.

    Raises:
      UserError: there is no checkpoint of an epoch yet.
    """
    start_jax()
    config = config.with_num_classes(len(facts.class_names))
    # Only the structure of its state matters here, and it must allow for one update and one synchronization.
    tx = config.optim.make_tx(num_steps=config.optim.accumulate_steps * max(config.optim.lookahead, 1))
    image = jax.ShapeDtypeStruct((1, *facts.image_shape), np.float32)
    abstract_state = jax.eval_shape(partial(init_state, model=config.model, tx=tx), jax.random.key(0), image)
    result = read_result(run_dir)
    fix = "Resume it with --resume." if result is None else "Train it again: cnnjax reproduce."
    with closing(Checkpoints(run_dir / "checkpoints")) as checkpoints:
        if result is None:
            best = checkpoints.best()
        else:
            best = next((row["step"] for row in read_rows(run_dir) if row["epoch"] == result["best_epoch"]), None)
        if best is None or best not in checkpoints.steps():
            of_step = "the end of an epoch" if best is None else f"step {best}, its best"
            raise UserError(f"`run` must have the checkpoint of {of_step}, got {run_dir} without it. {fix}")
        state, _ = checkpoints.restore(best, abstract_state)
    if result is not None and tree_sha256(state.params) != result["sha256"]["best_params"]:
        raise UserError(f"`run` must have the parameters that result.json names, got others in {run_dir}. {fix}")
    return Trained(config, facts, state)


def score(trained: Trained, split: str, data_dir: Path | None = None) -> Scores:
    """Scores a trained network on the "test" split, or on the "validation" part that it was not trained on.

    Raises:
      UserError: the data are not those of the run.
    """
    config, facts = trained.config, trained.facts
    dataset = load_dataset(config.dataset, data_dir, version=facts.version)
    if dataset.sha256 != facts.sha256:
        parameter = "data_dir" if dataset.folder else "dataset"
        raise UserError(
            f"`{parameter}` must hold the {dataset.name!r} of this run, SHA-256 {facts.sha256}, got {dataset.sha256} "
            f"from {dataset.folder or dataset.source}."
        )
    if split == "test":
        examples = dataset.load("test")
    else:
        whole = dataset.load("train")
        if config.validation_fraction == 0:
            raise UserError("`split` must be test if `validation_fraction` was 0, got validation.")
        _, part = split_validation(config.seed, whole.label, config.validation_fraction)
        examples = Examples(whole.image[part], whole.label[part])
    pixels = Pixels(*examples, facts.standardization)
    tta = config.tta if split == "test" else "none"  # As in training.
    return evaluate(trained.state, pixels, model=config.model, tta=tta)


def classify(trained: Trained, image: np.ndarray) -> np.ndarray:
    """Returns the probability of each class, float32 [K], of an image, uint8 [H W C]."""
    pixels = standardize(image[None], trained.facts.standardization)
    variables = {"params": trained.state.params, "batch_stats": trained.state.batch_stats}
    return np.asarray(_probabilities(variables, pixels, model=trained.config.model)[0])


@partial(jax.jit, static_argnames="model")
def _probabilities(variables: PyTree, image: Float[Array, "B H W C"], *, model: nn.Module) -> Float[Array, "B K"]:
    logits: Any = model.apply(variables, image, train=False)
    return jax.nn.softmax(logits)


def read_image(path: Path, image_shape: tuple[int, ...]) -> np.ndarray:
    """Reads an image file, or the first frame of an animation, as uint8 [H W C].

    It is rotated by its EXIF orientation, put on a white background if it is transparent and C is 1 or 3, converted to
    gray or color, and scaled to H×W with a center crop of the longer side. If C is 2 or 4, the last channel is alpha.

    Raises:
      UserError: `path` is not an image that Pillow can read, or C is above 4.
    """
    height, width, channels = image_shape
    if channels not in MODES:
        raise UserError(f"`image` must have 1 to 4 channels to be read from a file, got a network of {channels}.")
    try:
        # Pillow warns of large images, up to twice that size, and of metadata.
        with warnings.catch_warnings(action="ignore"), open_regular(path) as stream, Image.open(stream) as file:
            if file.mode in ("I", "F"):
                raise UserError(f"`image` must have 8 or 16 bits per channel, got {path} with 32 (mode {file.mode}).")
            ImageOps.exif_transpose(file, in_place=True)
            image: Image.Image = file
            if image.mode.startswith("I;16"):  # Pillow would clip 16-bit gray instead of scaling it.
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode not in ("L", "RGB") or image.has_transparency_data:  # A copy of a photograph is large.
                image = image.convert("RGBA")
                if channels in (1, 3):
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            if image.mode != MODES[channels]:
                image = image.convert(MODES[channels])
            fitted = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    except UserError:
        raise
    except Exception as error:  # The decoders of Pillow raise errors of many types.
        unknown = isinstance(error, UnidentifiedImageError)
        why = "of an unknown format" if unknown else reason(error) or type(error).__name__
        raise UserError(f"`image` must be an image file (PNG, JPEG, WebP, ...), got {path} ({why}).") from error
    return np.array(fitted).reshape(image_shape)
