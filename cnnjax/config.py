"""The typed configuration of a run: what, together with the code, decides every bit of its result."""

import re
from dataclasses import dataclass, field
from math import inf

from cnnjax.errors import UserError, unknown_name

VIEWS = ("plain", "mirrored", "shifted", "uncertain")


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
    """cnn (the tutorial's convolutional network), mlp (two hidden layers of 512), or speednet (the records')."""
    dtype: str = "float32"
    """float32, or bfloat16 or float16: what activations are computed in; parameters and sums stay float32."""
    kernel_init: str = "glorot_uniform"
    """glorot_uniform (as in Keras) or he_normal: what the hidden layers' first kernels are drawn from (cnn, mlp)."""
    conv_dropout: float = 0.25
    """The share of units dropped after each group of convolutions (cnn only), rounded to a 256th."""
    dense_dropout: float = 0.5
    """The share of units dropped after each hidden dense layer, rounded to a 256th (cnn and mlp)."""
    widths: tuple[int, ...] = (64, 256, 256)
    """The channels of each group of convolutions (speednet only)."""
    depth: int = 2
    """The convolutions of a group: 2, or 3 with a residual connection around the last two (speednet only)."""

    def __post_init__(self) -> None:
        _check_name("model.name", self.name, ("cnn", "mlp", "speednet"))
        _check_name("model.dtype", self.dtype, ("float32", "bfloat16", "float16"))
        _check("model.widths", "3 numbers of at least 1", len(self.widths) == 3 and min(self.widths) >= 1, self.widths)
        _check("model.depth", "2 or 3", self.depth in (2, 3), self.depth)
        _check_name("model.kernel_init", self.kernel_init, ("glorot_uniform", "he_normal"))
        for parameter in ("conv_dropout", "dense_dropout"):
            value = getattr(self, parameter)
            _check(f"model.{parameter}", "between 0 and 0.99", 0 <= value <= 0.99, value)


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate."""

    name: str = "adam"
    """adam, sgd (with Nesterov momentum), or muon (of convolutions; sgd of the rest)."""
    learning_rate: float = 1e-3
    """The learning rate of a mean loss; with a schedule, its peak."""
    schedule: str = "constant"
    """constant, or one_cycle: from `start` up to the peak in a line, and down to `end` in another."""
    warmup: float = 0.2
    """The share of all steps in which one_cycle rises; 0 only falls."""
    start: float = 0.0
    """Where one_cycle begins, as a share of the peak."""
    end: float = 0.0
    """Where one_cycle ends, as a share of the peak."""
    weight_decay: float = 0.0
    """Decay, times the learning rate, per step: of the kernels, decoupled (adam); of all, within the momentum (sgd); of
    all but the filters of convolutions, within the momentum (muon)."""
    momentum: float = 0.85
    """Of sgd (and the sgd within muon)."""
    muon_momentum: float = 0.6
    """Of muon."""
    bias_scale: float = 1.0
    """What the learning rate of the norms' biases is multiplied by (speednet by sgd or muon)."""
    whiten_scale: float = 1.0
    """What the learning rate of the whitening convolution's bias is multiplied by (speednet by sgd or muon)."""
    head_scale: float = 1.0
    """What the learning rate of the last layer is multiplied by (speednet by sgd or muon)."""
    whiten_epochs: int = 0
    """For how many epochs the whitening convolution's bias is trained (speednet by sgd or muon); 0: all."""
    lookahead: int = 0
    """Every so many updates parameters and their slow average meet (Zhang et al. 2019); 0: never."""
    clip_norm: float = 0.0
    """The norm of all gradients together is at most this; 0: any."""
    accumulate: int = 1
    """Batches whose gradients make one update together; the last of a run that are too few for one make none."""

    def __post_init__(self) -> None:
        _check_name("optim.name", self.name, ("adam", "sgd", "muon"))
        _check_name("optim.schedule", self.schedule, ("constant", "one_cycle"))
        _check("optim.learning_rate", "above 0 and finite", 0 < self.learning_rate < inf, self.learning_rate)
        for parameter in ("warmup", "momentum", "muon_momentum"):
            value = getattr(self, parameter)
            _check(f"optim.{parameter}", "at least 0 and below 1", 0 <= value < 1, value)
        for parameter in ("start", "end"):
            value = getattr(self, parameter)
            _check(f"optim.{parameter}", "between 0 and 1", 0 <= value <= 1, value)
        for parameter in ("weight_decay", "bias_scale", "whiten_scale", "head_scale", "clip_norm"):
            value = getattr(self, parameter)
            _check(f"optim.{parameter}", "at least 0 and finite", 0 <= value < inf, value)
        for parameter in ("whiten_epochs", "lookahead"):
            value = getattr(self, parameter)
            _check(f"optim.{parameter}", "at least 0", value >= 0, value)
        _check("optim.accumulate", "at least 1", self.accumulate >= 1, self.accumulate)


@dataclass(frozen=True)
class AugmentConfig:
    """What is done to each training image, on the device."""

    flip: str = "none"
    """none, random (mirror with probability 1/2), or alternating (a half drawn once, then the other in turn)."""
    translate: int = 0
    """Move by up to so many pixels each way; what comes in from outside is the image, mirrored at its edge."""
    cutout: int = 0
    """The side of a square that is set to the mean (DeVries and Taylor 2017), wholly within the image; 0: none."""

    def __post_init__(self) -> None:
        _check_name("augment.flip", self.flip, ("none", "random", "alternating"))
        _check("augment.translate", "at least 0", self.translate >= 0, self.translate)
        _check("augment.cutout", "at least 0", self.cutout >= 0, self.cutout)


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
    """The share of each class that is held out of the training split, for validation; 0 trains on all of it."""
    label_smoothing: float = 0.0
    """The share of the target probability that is spread over all classes, in training."""
    views: str = "plain"
    """What a test image is scored by: plain, mirrored (it and its mirror image), shifted (those, moved, too), or
    uncertain: shifted for the quarter of each batch that the network is least sure of, plain for the others. So a score
    depends on the batch: 500 images on a CPU, 2,000 on an accelerator."""
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

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
        _check("validation_fraction", "at least 0 and below 1", 0 <= fraction < 1, fraction)
        _check_name("views", self.views, VIEWS)
        _check("label_smoothing", "at least 0 and below 1", 0 <= self.label_smoothing < 1, self.label_smoothing)
