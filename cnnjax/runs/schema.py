"""The content of the JSON files of a run directory: keys, types and bounds, which `files.read_json` checks."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
from pydantic import ConfigDict, Field, FiniteFloat, with_config
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12.

from cnnjax.data.batches import Standardization
from cnnjax.data.stored import INTERPOLATIONS, RESIZE
from cnnjax.errors import check

FORMAT = 5  # The version of the run directory's format.

ImageShape = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=3, max_length=3)]  # (H, W, C)
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Split = Annotated[str, Field(pattern=r"^[\w.-]+$")]
Splits = Annotated[dict[Split, Sha256], Field(min_length=1)]  # See `data.stored.digest`.
Fraction = Annotated[FiniteFloat, Field(ge=0, le=1)]
Amount = Annotated[FiniteFloat, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class DataFacts:
    """The facts about its data that a trained network needs.

    Attributes:
      image_shape: (H, W, C).
      class_names: the name of each label, in order.
      sha256: for each stored split that is used, see `data.stored.digest`.
      version: the tfds version; for folders and arrays, 12 hexadecimal digits.
      source: where the pixels came from, in words.
      mean: of each channel of the training images, in pixel units (0 to 255); or that of the pretrained weights.
      std: their standard deviation.
      resize: how images were brought to `image_shape`, see `data.image_files.fit_image`.
      interpolation: see `resize`.
      weights_sha256: of the file of pretrained weights, or None.
      num_train_examples: the number of images that the network is trained on; None if an earlier version made the run.
      num_validation_examples: the number of images that are held out, or of the validation split; None as above.
    """

    image_shape: ImageShape
    class_names: Annotated[tuple[str, ...], Field(min_length=1)]
    sha256: Splits
    version: str
    source: str
    mean: tuple[Annotated[FiniteFloat, Field(ge=0, le=255)], ...]
    std: tuple[Annotated[FiniteFloat, Field(gt=0, le=255)], ...]
    resize: Annotated[str, Field(pattern=f"^({'|'.join(RESIZE)})$")]
    interpolation: Annotated[str, Field(pattern=f"^({'|'.join(INTERPOLATIONS)})$")]
    weights_sha256: Sha256 | None
    num_train_examples: Positive | None = None
    num_validation_examples: Count | None = None

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            check(
                name,
                f"one value for each of {self.image_shape[-1]} channels",
                len(values) == self.image_shape[-1],
                values,
            )

    def decisive(self) -> dict[str, Any]:
        """Returns all facts except the numbers of images, which follow from the others and the configuration."""
        return {k: v for k, v in asdict(self).items() if k not in ("num_train_examples", "num_validation_examples")}

    @property
    def standardization(self) -> Standardization:
        """Mean and standard deviation as arrays."""
        return Standardization(np.array(self.mean, np.float32), np.array(self.std, np.float32))


@with_config(ConfigDict(extra="allow"))
class EncodedConfig(TypedDict):
    """A configuration, see `codec.encode`. These keys are read without the classes that it names."""

    name: str
    dataset: Any
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    num_epochs: Positive


@with_config(ConfigDict(extra="allow"))
class Row(TypedDict):
    """A line of metrics.jsonl: the same bits for the same seed.

    Keys:
      train_accuracy: if the labels in training are class indices.
      train_grad_norm: the mean of the steps.
      train_<name>: the mean of a value that the loss returns, perhaps infinite or nan.
      validation_<name>: a score that `Config.metrics` returns, perhaps infinite or nan.
    """

    epoch: Positive
    step: Positive
    train_loss: FiniteFloat
    train_accuracy: NotRequired[Fraction]
    train_grad_norm: float
    validation_loss: NotRequired[FiniteFloat]
    validation_accuracy: NotRequired[Fraction]
    validation_balanced_accuracy: NotRequired[Fraction]
    params_sha256: Sha256


class Timing(TypedDict):
    """A line of timing.jsonl.

    Keys:
      flops_utilization: the FLOP/s of the network as a fraction of the peak of the devices, see `throughput`; only on
        known devices, with cnnjax's `train_step`.
    """

    epoch: Positive
    images_per_second: Amount
    seconds: Amount
    flops_utilization: NotRequired[Amount]


class Sums(TypedDict):
    """`metrics.Totals`."""

    loss: FiniteFloat
    num_examples: Count
    values: dict[str, int | float]


class SavedProgress(TypedDict):
    """progress.json of a checkpoint: what the loop knows besides the state.

    Keys:
      totals, grad_norm: the sums of the current epoch.
      seconds: of training, in all sessions.
      stopped_within: the `num_epochs` of the run if `on_epoch` or its `patience` stopped it after this epoch. A longer
        run continues, unless it is out of patience.
      best_step: the step of the best checkpoint; None without validation.
      validation: at the end of an epoch, its "score", which ranks the checkpoint, if there is one; None within one.
      files: the names of the other files of the checkpoint, except SHA256SUMS.
    """

    rows: list[Row]
    timing: list[Timing]
    totals: Sums
    grad_norm: float
    seconds: Amount
    stopped_within: Positive | None
    best_step: Count | None
    validation: dict[str, FiniteFloat] | None
    files: Annotated[list[str], Field(min_length=1)]


class Digests(TypedDict):
    """The SHA-256 of what a run ended with."""

    params: Sha256
    model_state: Sha256
    opt_state: Sha256
    best_params: Sha256
    metrics: Sha256


class ClassResult(TypedDict):
    """A class in result.json, see `class_scores.ClassScores`."""

    name: str
    count: Count
    precision: Fraction
    recall: Fraction | None
    f1: Fraction | None


class Result(TypedDict):
    """result.json.

    Keys:
      test_balanced_accuracy, test_macro_recall: the same number under both of its names.
      test_macro_precision, test_macro_recall, test_macro_f1: the means over the classes that have test images.
      best_validation_*: at the best epoch, which is the best by the `best_by` of the configuration.
      test_metrics, best_validation_metrics: the scores that `Config.metrics` returns, perhaps infinite or nan.
      num_epochs: of the configuration.
      stopped_epoch: the epoch after which `on_epoch` or the `patience` of the configuration stopped the run, or None.
      classes: the scores of each class on the test set, in the order of the labels.
      confusion_matrix: the number of test images of each true class (rows) that were predicted as each class (columns);
        None if there are more than `class_scores.MAX_CLASSES` classes.
    """

    test_accuracy: Fraction
    test_balanced_accuracy: Fraction
    test_macro_precision: Fraction
    test_macro_recall: Fraction
    test_macro_f1: Fraction
    test_loss: FiniteFloat
    num_test_examples: Positive
    best_validation_accuracy: Fraction | None
    best_validation_balanced_accuracy: Fraction | None
    best_validation_loss: NotRequired[FiniteFloat | None]
    best_epoch: Positive
    num_epochs: Positive
    stopped_epoch: Positive | None
    training_seconds: Amount
    num_params: Count
    seed: Count
    device: str
    sha256: Digests
    test_metrics: NotRequired[dict[str, float]]
    best_validation_metrics: NotRequired[dict[str, float]]
    classes: Annotated[list[ClassResult], Field(min_length=1)]
    confusion_matrix: list[list[Count]] | None


def own_metrics(result: Result) -> dict[str, float]:
    """Returns the scores of `Config.metrics` in a result, by the names test_NAME and best_validation_NAME."""
    parts = {"test": result.get("test_metrics", {}), "best_validation": result.get("best_validation_metrics", {})}
    return {f"{part}_{name}": value for part, scores in parts.items() for name, value in scores.items()}


@with_config(ConfigDict(extra="allow"))  # See `manifest.environment` and `source.source_code`.
class Session(TypedDict):
    """A session of manifest.json.

    Keys:
      checkpoints: the steps of the checkpoints at the end.
      on_epoch: the name of the function that may stop the run, or None.
    """

    state: Literal["running", "finished", "interrupted", "failed", "killed"]
    command: list[str]
    started: str
    ended: NotRequired[str]
    seconds: NotRequired[Amount]
    cores: Positive
    num_devices: Positive
    checkpoints: NotRequired[list[Count]]
    on_epoch: NotRequired[str | None]


class Versioned(TypedDict):
    """The part of manifest.json that every version has."""

    format: int


class Manifest(TypedDict):
    """manifest.json."""

    format: int
    sessions: Annotated[list[Session], Field(min_length=1)]
