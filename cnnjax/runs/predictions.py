"""Predictions for image files: decoded in threads, ahead of the device; by one run, or by several as an ensemble."""

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from cnnjax.class_scores import count_pairs
from cnnjax.data.image_files import AHEAD, check_channels, fit_image, on_all_cores, open_image
from cnnjax.data.stored import digest
from cnnjax.errors import UserError, check
from cnnjax.metrics import Scores
from cnnjax.runs.inference import batch_size_of

if TYPE_CHECKING:
    from cnnjax.runs.run import Run

_TINY = float(np.finfo(np.float32).tiny)  # The least probability that counts as it is.


class FilePrediction(NamedTuple):
    """The prediction of a network for an image file.

    Attributes:
      path: of the file.
      probabilities: of each class, float32; None if the file cannot be read.
      error: why it cannot be read, or None.
      is_bright: whether the image is brighter than the training images by more than the standard deviation of their
        pixels, and would differ by less than half of it if it were inverted.
    """

    path: Path
    probabilities: Float[np.ndarray, " K"] | None
    error: UserError | None = None
    is_bright: bool = False


class _TestSet(NamedTuple):
    """The test set of a run, and the digest of its images as the run prepares them."""

    run: "Run"
    sha256: str
    label: Int[np.ndarray, " N"]

    def equals(self, other: "_TestSet") -> bool:
        """Returns whether two runs are tested on the same images, which they may prepare in different ways."""
        a, b = self.run, other.run
        if _kind(a) == _kind(b):
            return self.sha256 == other.sha256
        part_a, part_b = ((c.test_split or "test", c.test_fraction, c.test_seed) for c in (a.config, b.config))
        same_set = a.facts.sha256 == b.facts.sha256 or _name(a) == _name(b)
        return same_set and part_a == part_b and np.array_equal(self.label, other.label)


def _kind(run: "Run") -> tuple[Any, ...]:
    """Returns how a run prepares images: the arguments of `fit_image`."""
    return run.facts.image_shape, run.facts.resize, run.facts.interpolation


def _name(run: "Run") -> Any:
    """Returns the data set of a run, the same for all paths to a folder."""
    dataset = run.config.dataset
    return os.path.realpath(os.path.expanduser(dataset)) if isinstance(dataset, str) else id(dataset)


def check_ensemble(runs: Sequence["Run"]) -> None:
    """Checks that runs have the same classes in the same order.

    Raises:
      UserError: they do not.
    """
    kinds = ", ".join(dict.fromkeys(type(run).__name__ for run in runs)) or "none"
    valid = len(runs) > 0 and all(hasattr(run, "facts") for run in runs)
    check("runs", "at least one Run, such as `load_run(run_dir)`", valid, kinds)
    first, *others = runs
    for run in others:
        if run.facts.class_names != first.facts.class_names:
            pairs = enumerate(zip(first.facts.class_names, run.facts.class_names, strict=False))
            count = f"{len(run.facts.class_names)} classes instead of {len(first.facts.class_names)}"
            got = next((f"class {k} {b!r} instead of {a!r}" for k, (a, b) in pairs if a != b), count)
            raise UserError(
                f"`ensemble` must be runs with the classes of {first.run_dir}, in the same order, got {run.run_dir} "
                f"with {got}."
            )


def predict_files(
    runs: Sequence["Run"], paths: Iterable[str | os.PathLike[str]], *, tta: str | None = None, invert: bool = False
) -> Iterator[FilePrediction]:
    """Yields a prediction for each image file, in order: the mean of the probabilities of all runs.

    Each run receives the images as it was trained on them. Few images are in memory at a time. Python's warnings are
    ignored until the iteration ends.

    Args:
      runs: have the same classes, see `check_ensemble`.
      paths: of any number of files.
      tta: the test-time augmentation, see `Run.predict`; None: that of the configuration of each run, or
        "flip_translate" instead of "uncertain", so that the prediction for a file does not depend on others.
      invert: swaps dark and bright first.
    """
    if isinstance(paths, (str, os.PathLike)):
        fix = "Pass [path], or sorted(Path(folder).rglob('*.jpg'))."
        raise UserError(f"`paths` must be several paths, got {paths!r}. {fix}")
    check_ensemble(runs)
    for run in runs:
        check_channels(run.facts.image_shape)
    kinds = [_kind(run) for run in runs]
    distinct = [*dict.fromkeys(kinds)]

    def read(path: str | os.PathLike[str]) -> tuple[Path, list[UInt8[np.ndarray, "H W C"]] | UserError]:
        file = Path(path)
        try:
            image = open_image(file)
        except UserError as error:
            return file, error
        return file, [fit_image(image, *kind) for kind in distinct]

    size = max(batch_size_of(run.facts.image_shape) for run in runs)
    # The `catch_warnings` of a thread restores the filters that another thread has set.
    with (
        warnings.catch_warnings(action="ignore"),
        closing(on_all_cores(read, paths, ahead=max(AHEAD, 2 * size))) as results,
    ):
        while batch := list(islice(results, size)):
            read_images = [images for _, images in batch if isinstance(images, list)]
            found = iter(_predict(runs, kinds, read_images, tta, invert))
            for file, images in batch:
                if isinstance(images, UserError):
                    yield FilePrediction(file, None, images)
                else:
                    probabilities, is_bright = next(found)
                    yield FilePrediction(file, probabilities, is_bright=is_bright)


def _predict(
    runs: Sequence["Run"],
    kinds: Sequence[Any],
    read_images: Sequence[Sequence[UInt8[np.ndarray, "_ _ C"]]],
    tta: str | None,
    invert: bool,
) -> list[tuple[Float[np.ndarray, " K"], bool]]:
    """Returns the probabilities of each file, and whether its image is bright, see `FilePrediction`.

    Args:
      kinds: of image, that each run needs.
      read_images: for each file, an image of each distinct kind.
    """
    if not read_images:
        return []
    columns = map(np.stack, zip(*read_images, strict=True))
    images = dict(zip(dict.fromkeys(kinds), columns, strict=True))
    first, facts = _color(images[kinds[0]]), runs[0].facts
    num_channels = first.shape[-1]
    usual, std = np.mean(facts.mean[:num_channels]), np.mean(facts.std[:num_channels])
    brightness = first.mean(axis=(1, 2, 3))
    # Measured: 0% of the images of MNIST and CIFAR-10, and 0.2% of Fashion-MNIST's; inverted 99.9%, 0% and 64%.
    is_bright = (brightness - usual > std) & (np.abs(255 - brightness - usual) < std / 2)
    if invert:
        for pixels in images.values():
            _color(pixels)[...] ^= 255
    probabilities = _mean(
        [
            run.predict(images[kind], tta=_tta_of(run) if tta is None else tta)
            for run, kind in zip(runs, kinds, strict=True)
        ]
    )
    return [*zip(probabilities, is_bright.tolist(), strict=True)]


def _tta_of(run: "Run") -> str:
    return "flip_translate" if run.config.tta == "uncertain" else run.config.tta


def _color(images: UInt8[np.ndarray, "N H W C"]) -> UInt8[np.ndarray, "N H W D"]:
    """Returns the channels of images without alpha."""
    return images[..., : 1 if images.shape[-1] < 3 else 3]


def _mean(probabilities: Sequence[Float[np.ndarray, "N K"]]) -> Float[np.ndarray, "N K"]:
    return probabilities[0] if len(probabilities) == 1 else np.mean(probabilities, axis=0)


def evaluate_ensemble(
    runs: Sequence["Run"], *, tta: str | None = None, data_dir: Path | None = None
) -> tuple[Scores, Int[np.ndarray, " N"]]:
    """Scores the mean probabilities of several runs on their test split; returns the labels, too.

    Args:
      tta, data_dir: see `Run.evaluate`.

    Raises:
      UserError: the runs have other classes, or other test examples.
    """
    check_ensemble(runs)
    probabilities, tested = [], []
    for run in runs:
        examples = run.load_data("test", data_dir=data_dir)
        tested.append(_TestSet(run, digest(examples), examples.label))
        rule = f"runs with the test examples of {runs[0].run_dir}"
        check("ensemble", rule, tested[-1].equals(tested[0]), f"{run.run_dir} with others")
        probabilities.append(run.predict(examples.image, tta=run.config.tta if tta is None else tta))
    label = np.asarray(tested[0].label)
    return scores_of(_mean(probabilities), label), label


def scores_of(probabilities: Float[np.ndarray, "N K"], label: Int[np.ndarray, " N"]) -> Scores:
    """Returns the scores of predictions, with the logarithms of the probabilities, float32, as logits.

    The loss of an example is at most 87 nats, that of the least normal float32.
    """
    predicted, of_label = probabilities.argmax(axis=1), probabilities[np.arange(len(label)), label]
    loss = float(-np.log(np.maximum(of_label.astype(np.float64), _TINY)).mean())
    values, logits = {"accuracy": float((predicted == label).mean())}, np.log(np.maximum(probabilities, _TINY))
    return Scores(loss, len(label), values, count_pairs(label, predicted), logits)
