"""The sentences of the report: what the numbers of a run mean."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from cnnjax.class_scores import Calibration
from cnnjax.config import Config
from cnnjax.losses import CrossEntropy
from cnnjax.report.analysis import FALL, GAP, Fit
from cnnjax.runs.statistics import wilson_interval
from cnnjax.step import train_step

CALIBRATED = 0.02  # A calibration that is off by less than 2 points needs no warning.
NORMAL = 1.96  # 95% of a normal distribution lies within this many standard deviations.
MIN_VARIANCE = 5.0  # Above it, the number of correct predictions is nearly normal.

# What an operation does, by a word in its name; the first that fits.
OPERATIONS = {
    "conv": "A convolution moves a small window of weights over its input; a map is bright where its pattern occurs.",
    "leaky relu": "A leaky ReLU reduces negative values to a small fraction of themselves, and keeps positive ones.",
    "relu": "A ReLU sets every negative value to zero, so that only what was found remains.",
    "gelu": "A GELU is a smooth ReLU: it keeps positive values and nearly silences negative ones.",
    "pool": "Pooling keeps one value of each small square, so that the maps shrink and small shifts matter less.",
    "norm": "A normalization shifts and scales each map to a similar range, which keeps training stable.",
    "dense": "A dense layer computes weighted sums of all values before it.",
    "logits": "The logits are the scores of the classes; softmax turns them into probabilities.",
    "maximum": "The maximum over all positions leaves one value per map.",
    "sum": "The sum over all positions leaves one value per map.",
    "mean": "The mean over all positions leaves one value per map.",
    "add": "An addition of two branches lets a layer learn only what has to change.",
}


def explain_operation(operation: str) -> str:
    """Returns a sentence about what an operation of a network does, or "" if there is none."""
    return next((text for name, text in OPERATIONS.items() if name in operation.lower()), "")


def explain_fit(fit: Fit, history: Mapping[str, np.ndarray], config: Config) -> list[str]:
    """Returns what the learning curves say about over-fitting.

    Args:
      history: of at least one epoch.
    """
    last = {name: float(values[-1]) for name, values in history.items()}
    epoch = int(last["epoch"])
    for part in ("train", "validation"):
        if not np.isfinite(value := last.get(f"{part}_loss", 0.0)):
            name = "training" if part == "train" else part
            return [f"The {name} loss is {value} after epoch {epoch}. The training diverges: lower the learning rate."]
    if fit.lowest is None:
        return [
            *_explain_start(fit, history),
            "No images were held out for validation (validation_fraction is 0), so these curves cannot show "
            "over-fitting: a network that memorizes its training images has the same curves. The test score is the "
            "only one on images that the network has not seen.",
        ]
    lowest = float(np.nanmin(history["validation_loss"]))
    ends = f"it ends at {last['validation_loss']:.4f}, and is lowest ({lowest:.4f}) after epoch {fit.lowest}"
    doubt = ""
    if fit.chance:
        low, high = fit.chance
        doubt = (
            ", which may be chance with so few images (the 95% interval of the difference between training and "
            f"validation accuracy is {100 * low:.1f} to {100 * high:.1f} points)"
        )
    if start := _explain_start(fit, history):
        lines = start
    elif fit.over_fitted:
        over_fits = "seems to over-fit" if doubt else "over-fits"
        lines = [
            f"This run {over_fits} from epoch {fit.lowest + 1} on. Its validation loss is lowest after epoch "
            f"{fit.lowest} ({lowest:.4f}) and ends at {last['validation_loss']:.4f}, while the network keeps improving "
            f"on its training images: it memorizes them{doubt}. Dropout, augmentation, weight decay, more images, or "
            "fewer epochs reduce this."
        ]
    elif fit.rises:
        lines = [
            f"The validation loss is lowest after epoch {fit.lowest} ({lowest:.4f}) and ends at "
            f"{last['validation_loss']:.4f}. As the training loss has not fallen since, this is not over-fitting; "
            "perhaps the learning rate is too high."
        ]
    elif (gap := fit.gap or 0.0) > GAP:
        where = f"it is lowest at the end ({lowest:.4f})" if fit.lowest == epoch else ends
        meaning = doubt or ": the network begins to memorize its training images"
        lines = [
            f"The validation loss has not risen clearly yet: {where}. But training accuracy is {100 * gap:.1f} points "
            f"higher than validation accuracy{meaning}."
        ]
    elif fit.above:
        lines = [
            f"There is no clear sign of over-fitting: the validation loss has risen in the last epochs ({ends}), which "
            "may be noise."
        ]
    elif fit.lowest == epoch:
        lines = [
            f"There is no sign of over-fitting: the validation loss is lowest at the end ({lowest:.4f}). Training "
            "longer may improve the network."
        ]
    else:
        lines = [
            f"There is no sign of over-fitting: the validation loss ends at {last['validation_loss']:.4f}, near its "
            f"lowest value ({lowest:.4f}, after epoch {fit.lowest})."
        ]
    if fit.gap is not None:
        scores = f"{last['train_accuracy']:.2%} in training and {last['validation_accuracy']:.2%} in validation"
        lines.append(f"The accuracy ends at {scores}. " + _explain_gap(fit))
    return [*lines, *_scale_of_loss(history, config)]


def explain_fits(fits: Sequence[Fit]) -> str:
    """Returns what the learning curves of several runs say about over-fitting, or "".

    Args:
      fits: of runs of several epochs. Those without validation, and those that learn nothing, do not count.
    """
    judged = [fit for fit in fits if fit.lowest is not None and not fit.flat]
    if not judged:
        return ""

    def doubt(fits: Sequence[Fit]) -> str:
        return ", which may be chance with so few images" if all(fit.chance for fit in fits) else ""

    lines = ["No run clearly over-fits."]
    if over_fitted := [fit for fit in judged if fit.over_fitted]:
        over_fit = "over-fits" if len(over_fitted) == 1 else "over-fit"
        lines = [
            f"{len(over_fitted)} of {len(judged)} runs {over_fit}: the validation loss rises while the training loss "
            f"falls{doubt(over_fitted)}."
        ]
    with_gap = [fit for fit in judged if fit.gap is not None]
    if with_gap and (gap := fmean(fit.gap or 0.0 for fit in with_gap)) > GAP:
        lines.append(
            f"Training accuracy ends {100 * gap:.1f} points above validation accuracy, on average{doubt(with_gap)}."
        )
    return " ".join(lines)


def _explain_start(fit: Fit, history: Mapping[str, np.ndarray]) -> list[str]:
    """Returns why the curves say nothing about over-fitting, or []."""
    loss = history["train_loss"]
    if len(loss) == 1:
        return ["One epoch shows no trend."]
    if fit.flat and loss[-1] - loss[0] > FALL * abs(loss[0]):
        return [
            f"The loss has risen since the first epoch (training loss {loss[0]:.4f} to {loss[-1]:.4f}): the network "
            "has not learned anything since then. Perhaps the learning rate is too high."
        ]
    if fit.flat:
        return [
            f"The loss has hardly fallen since the first epoch (training loss {loss[0]:.4f} to {loss[-1]:.4f}): the "
            "network has not learned anything since then."
        ]
    return []


def _explain_gap(fit: Fit) -> str:
    gap = 100 * (fit.gap or 0.0)
    if gap > 100 * GAP:
        return f"The network is {gap:.1f} points better on the images that it was trained on: the shaded gap."
    if gap < 0:
        return (
            "Validation accuracy is often higher: it is measured after the epoch without dropout and augmentation, "
            "training accuracy during the epoch with both."
        )
    return f"A gap of {gap:.1f} points is small."


def _scale_of_loss(history: Mapping[str, np.ndarray], config: Config) -> list[str]:
    loss: Any = config.loss
    reasons = []
    if not isinstance(loss, CrossEntropy):
        reasons.append(getattr(loss, "__name__", type(loss).__name__))
    elif loss.label_smoothing:
        reasons.append(f"label smoothing of {loss.label_smoothing:g}")
    if config.train_step is not train_step:
        step: Any = config.train_step
        reasons.append(f"the training step {getattr(step, '__name__', type(step).__name__)}")
    if config.class_weights != "none":
        reasons.append("class weights")
    if not np.isfinite(history.get("train_accuracy", np.nan)).all():  # Only class indices have one.
        reasons.append("labels that the augmentation changes")
    if not reasons:
        return []
    return [
        f"The training loss is computed with {', '.join(reasons)}, the validation loss is the plain cross-entropy: "
        "compare their shapes, not their heights."
    ]


def explain_calibration(calibration: Calibration, config: Config) -> list[str]:
    """Returns whether the confidence of a network can be trusted."""
    confidence, accuracy = calibration.mean_confidence, calibration.mean_accuracy
    difference, excess = abs(confidence - accuracy), calibration.error - calibration.by_chance
    opposite = (calibration.error - difference) / 2  # What the bins of the rarer direction add to the error.
    bound, n = max(CALIBRATED, NORMAL * calibration.deviation), int(calibration.num_examples.sum())
    too_few = not (n * calibration.deviation) ** 2 >= MIN_VARIANCE
    low, high = wilson_interval(accuracy, n)
    lines = [
        "A network is calibrated if, of all predictions that it makes with a confidence of 80%, it gets 80% right. "
        f"This one is {confidence:.1%} confident on average, and right in {accuracy:.1%} of the cases."
    ]
    agrees = max(difference, excess) <= bound
    if agrees and high - low <= 2 * CALIBRATED:
        lines.append("Its probabilities can be taken at face value.")
    elif agrees or too_few:
        lines.append(
            f"The {n:,} test images show neither over-confidence nor under-confidence, but they are too few to show "
            f"that it is calibrated: the 95% interval of its accuracy is {low:.1%} to {high:.1%}."
        )
    elif opposite > max(CALIBRATED / 2, calibration.by_chance):
        lines.append(
            "It is over-confident in some bins of confidence, and under-confident in others: the diagram shows which. "
            "No single temperature corrects both."
        )
    elif confidence < accuracy:
        lines.append(
            "It is under-confident: it is right more often than it says, so its probabilities are too low."
            + _label_smoothing(config)
        )
    else:
        lines.append(
            "It is over-confident: it is right less often than it says, which is common in modern networks (Guo et al. "
            "2017). Divide the logits by a temperature that is chosen on validation images to correct this without "
            "changing a prediction."
        )
    return lines


def _label_smoothing(config: Config) -> str:
    smoothing = getattr(config.loss, "label_smoothing", 0.0)
    return f" Label smoothing (here {smoothing:g}) teaches such caution." if smoothing else ""


def duration(seconds: float) -> str:
    """Returns a duration in words: "45.2 s", "1 min 47 s", "2 h 5 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
