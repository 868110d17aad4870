"""The typed configuration of a run: what, together with the code, decides every bit of its result."""

import re
from dataclasses import dataclass, field
from math import inf

from cnnjax.errors import UserError, unknown_name


def _check_name(parameter: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise unknown_name(parameter, value, valid)


def _check(parameter: str, rule: str, valid: bool, value: object) -> None:
    if not valid:
        raise UserError(f"`{parameter}` must be {rule}, got {value}.")


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    name: str = "cnn"
    """cnn (the tutorial's convolutional network) or mlp (two hidden layers of 512)."""
    kernel_init: str = "glorot_uniform"
    """glorot_uniform (as in Keras) or he_normal: what the first kernels of the hidden layers are drawn from."""
    conv_dropout: float = 0.25
    """The share of units dropped after each group of convolutions (cnn only), rounded to a 256th."""
    dense_dropout: float = 0.5
    """The share of units dropped after each hidden dense layer, rounded to a 256th."""

    def __post_init__(self) -> None:
        _check_name("model.name", self.name, ("cnn", "mlp"))
        _check_name("model.kernel_init", self.kernel_init, ("glorot_uniform", "he_normal"))
        for parameter in ("conv_dropout", "dense_dropout"):
            value = getattr(self, parameter)
            _check(f"model.{parameter}", "between 0 and 0.99", 0 <= value <= 0.99, value)


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer (Adam) and its learning rate."""

    learning_rate: float = 1e-3
    """The learning rate; with a schedule, its peak."""
    schedule: str = "constant"
    """constant, or one_cycle: from 0 up to the peak in a line, and down to 0 in another."""
    warmup: float = 0.2
    """The share of all steps in which one_cycle rises."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the kernels (AdamW), times the learning rate, per step."""

    def __post_init__(self) -> None:
        _check_name("optim.schedule", self.schedule, ("constant", "one_cycle"))
        _check("optim.learning_rate", "above 0 and finite", 0 < self.learning_rate < inf, self.learning_rate)
        _check("optim.warmup", "at least 0 and below 1", 0 <= self.warmup < 1, self.warmup)
        _check("optim.weight_decay", "at least 0 and finite", 0 <= self.weight_decay < inf, self.weight_decay)


@dataclass(frozen=True)
class Config:
    """A run. The same configuration and seed on the same machine give the same bits."""

    experiment: str = ""
    """The name of the run directory, before the seed; DATASET_MODEL where it is empty."""
    dataset: str = "cifar10"
    """mnist, fashion_mnist, cifar10, cifar100, or a set of 8-bit images of one size in the tfds directory."""
    seed: int = 0
    """Decides the held-out examples, the first parameters, the order of the data, and dropout."""
    num_epochs: int = 10
    """How often training goes through the training examples."""
    batch_size: int = 128
    """Examples an update."""
    validation_fraction: float = 0.1
    """The share of each class that is held out of the training split, for validation."""
    flip: bool = False
    """Mirror each training image, left to right, with probability 1/2."""
    label_smoothing: float = 0.0
    """The share of the target probability that is spread over all classes, in training."""
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        _check(
            "experiment",
            "a name of letters, digits, '.', '_' and '-' that begins with a letter or digit",
            re.fullmatch(r"(\w[\w.-]*)?", self.experiment, re.ASCII) is not None,
            repr(self.experiment),
        )
        _check(
            "dataset",
            "a tfds name, such as cifar10 or name/config",
            re.fullmatch(r"\w[\w-]*(/\w[\w.-]*)?/?", self.dataset, re.ASCII) is not None,
            repr(self.dataset),
        )
        _check("seed", "between 0 and 2**32 - 1", 0 <= self.seed < 2**32, self.seed)
        _check("num_epochs", "at least 1", self.num_epochs >= 1, self.num_epochs)
        _check("batch_size", "at least 1", self.batch_size >= 1, self.batch_size)
        fraction = self.validation_fraction
        _check("validation_fraction", "above 0 and below 1", 0 < fraction < 1, fraction)
        _check("label_smoothing", "at least 0 and below 1", 0 <= self.label_smoothing < 1, self.label_smoothing)
