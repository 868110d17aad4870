"""A trained network: restored from its run directory, scored, and asked about image files."""

from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from PIL import Image, ImageOps

from cnnjax.data.batches import Pixels, split_validation, standardize
from cnnjax.runs.checkpoints import Checkpoints
from cnnjax.config import Config
from cnnjax.data.datasets import Examples, load_dataset
from cnnjax.evaluate import Scores, evaluate
from cnnjax.errors import UserError
from cnnjax.models.models import make_model
from cnnjax.optim.optimizer import make_tx
from cnnjax.runs.directory import DataFacts, read_run
from cnnjax.step import TrainState, init_state


class Trained(NamedTuple):
    """A network with the best parameters of its run, by validation."""

    config: Config
    facts: DataFacts
    model: nn.Module
    state: TrainState


def load_trained(run_dir: Path) -> Trained:
    """Restores the best checkpoint of a run.

    Raises:
      UserError: `run_dir` holds no run, or no checkpoint of an epoch yet.
    """
    config, facts = read_run(run_dir)
    model = make_model(config.model, len(facts.class_names))
    tx = make_tx(config.optim, num_steps=2**30)  # Only the structure of its state matters here.
    image = jax.ShapeDtypeStruct((1, *facts.image_shape), np.float32)
    like = jax.eval_shape(partial(init_state, model=model, tx=tx), jax.random.key(0), image)
    with closing(Checkpoints(run_dir / "checkpoints", read_only=True)) as checkpoints:
        if (best := checkpoints.best()) is None:
            raise UserError(f"`run` must have finished an epoch, got {run_dir}. Train it further: --resume.")
        state, _ = checkpoints.restore(best, like)
    return Trained(config, facts, model, state)


def score(trained: Trained, split: str, data_dir: Path | None = None) -> Scores:
    """Scores a trained network on the "test" split, or on the "validation" part that it did not train on.

    Raises:
      UserError: the data are not those that it was trained with.
    """
    dataset = load_dataset(trained.config.dataset, data_dir)
    if dataset.sha256 != trained.facts.sha256:
        raise UserError(
            f"`data_dir` must hold the {trained.config.dataset!r} of this run, SHA-256 {trained.facts.sha256}, got "
            f"{dataset.sha256} in {dataset.folder}."
        )
    if split == "test":
        examples = dataset.load("test")
    else:
        whole = dataset.load("train")
        fraction = trained.config.validation_fraction
        if fraction == 0:
            raise UserError("`split` must be test where `validation_fraction` was 0, got validation.")
        _, part = split_validation(trained.config.seed, whole.label, fraction)
        examples = Examples(whole.image[part], whole.label[part])
    pixels = Pixels(*examples, trained.facts.standardization)
    views = trained.config.views if split == "test" else "plain"  # As in training.
    return evaluate(trained.state, pixels, model=trained.model, views=views)


def classify(trained: Trained, image: np.ndarray) -> np.ndarray:
    """Returns the probability of each class, float32 [K], for an image, uint8 [H W C]."""
    pixels = standardize(image[None], trained.facts.standardization)
    variables = {"params": trained.state.params, "batch_stats": trained.state.batch_stats}
    logits: Any = trained.model.apply(variables, pixels, train=False)
    return np.asarray(jax.nn.softmax(logits)[0])


def read_image(path: Path, image_shape: tuple[int, ...]) -> np.ndarray:
    """Reads an image file as uint8 [H W C].

    Turned upright as its camera says, transparent parts on white, converted to grey or colour as C asks, and fitted by
    cropping the longer side about the centre.

    Raises:
      UserError: `path` is no image that Pillow can read.
    """
    height, width, channels = image_shape
    try:
        with Image.open(path) as file:
            if file.mode in ("I", "F"):
                raise UserError(f"`image` must have 8 or 16 bits a channel, got {path} with 32 (mode {file.mode}).")
            if file.mode.startswith("I;16"):  # Pillow would clip 16-bit grey instead of scaling it.
                image = Image.fromarray((np.asarray(file) >> 8).astype(np.uint8)).convert("RGBA")
            else:
                image = ImageOps.exif_transpose(file).convert("RGBA")
    except UserError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"`image` must be an image file (PNG, JPEG, WebP, ...), got {path} ({error}).") from error
    opaque = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    fitted = ImageOps.fit(opaque.convert("L" if channels == 1 else "RGB"), (width, height), Image.Resampling.LANCZOS)
    return np.asarray(fitted).reshape(image_shape)
