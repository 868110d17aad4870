"""The content of the JSON files of a run directory: keys, types and bounds, which `files.read_json` checks."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
from pydantic import ConfigDict, Field, FiniteFloat, with_config
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12.

from cnnjax.data.batches import Standardization
from cnnjax.errors import check

FORMAT = 4  # Of the run directory.

ImageShape = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=3, max_length=3)]  # (H, W, C)
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Split = Annotated[str, Field(pattern="^(train|test)$")]
Splits = Annotated[dict[Split, Sha256], Field(min_length=2, max_length=2)]  # See `data.datasets.digest`.
Fraction = Annotated[FiniteFloat, Field(ge=0, le=1)]
Amount = Annotated[FiniteFloat, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class DataFacts:
    """What a trained network has to know about its data.

    Attributes:
      image_shape: (H, W, C).
      class_names: the name of each label, in order.
      sha256: for each split, see `data.datasets.digest`.
      version: the tfds version.
      source: where the pixels came from, in words.
      mean, std: of the training images' channels, in pixel units (0 to 255).
    """

    image_shape: ImageShape
    class_names: Annotated[tuple[str, ...], Field(min_length=1)]
    sha256: Splits
    version: str
    source: str
    mean: tuple[Annotated[FiniteFloat, Field(ge=0, le=255)], ...]
    std: tuple[Annotated[FiniteFloat, Field(gt=0, le=255)], ...]

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            check(
                name,
                f"one value for each of {self.image_shape[-1]} channels",
                len(values) == self.image_shape[-1],
                values,
            )

    @property
    def standardization(self) -> Standardization:
        """Mean and standard deviation as arrays."""
        return Standardization(np.array(self.mean, np.float32), np.array(self.std, np.float32))


@with_config(ConfigDict(extra="allow"))
class EncodedConfig(TypedDict):
    """A configuration, see `codec.encode`. These keys are read without the classes that it names."""

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
    """

    epoch: Positive
    step: Positive
    train_loss: FiniteFloat
    train_accuracy: NotRequired[Fraction]
    train_grad_norm: float
    validation_loss: NotRequired[FiniteFloat]
    validation_accuracy: NotRequired[Fraction]
    params_sha256: Sha256


class Timing(TypedDict):
    """A line of timing.jsonl."""

    epoch: Positive
    images_per_second: Amount
    seconds: Amount


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
      stopped_within: the `num_epochs` of the run if `on_epoch` stopped it after this epoch. A longer run continues.
      best_step: the step of the best checkpoint; None without validation.
      validation: the scores at the end of an epoch, which rank a checkpoint by "accuracy" if present; None within one.
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


class Result(TypedDict):
    """result.json.

    Keys:
      num_epochs: of the configuration.
      stopped_epoch: the epoch after which `on_epoch` stopped the run, or None.
    """

    test_accuracy: Fraction
    test_loss: FiniteFloat
    num_test_examples: Positive
    best_validation_accuracy: Fraction | None
    best_epoch: Positive
    num_epochs: Positive
    stopped_epoch: Positive | None
    training_seconds: Amount
    num_params: Count
    seed: Count
    device: str
    sha256: Digests


@with_config(ConfigDict(extra="allow"))  # See `manifest.environment` and `source.source_code`.
class Session(TypedDict):
    """A session of manifest.json.

    Keys:
      checkpoints: the steps of the checkpoints at the end.
    """

    state: Literal["running", "finished", "interrupted", "failed", "killed"]
    command: list[str]
    started: str
    ended: NotRequired[str]
    seconds: NotRequired[Amount]
    cores: Positive
    num_devices: Positive
    checkpoints: NotRequired[list[Count]]


class Versioned(TypedDict):
    """The part of manifest.json that every version has."""

    format: int


class Manifest(TypedDict):
    """manifest.json."""

    format: int
    sessions: Annotated[list[Session], Field(min_length=1)]
