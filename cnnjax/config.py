"""The configuration of a run: together with the code, it determines every bit of the result."""

import inspect
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import PurePath
from typing import Any

from cnnjax.data.augment import Augment
from cnnjax.data.stored import LISTS, MAX_SIDE, RESIZE
from cnnjax.data.tta import TTA
from cnnjax.errors import UserError, check, check_name, describe_shapes
from cnnjax.fields import check_fields, check_methods, shorten, show
from cnnjax.losses import CrossEntropy
from cnnjax.models.cnn import CNN
from cnnjax.network import check_network
from cnnjax.optim.optimizer import Optimizer
from cnnjax.optim.recipes import Adam
from cnnjax.step import train_step

NAME_OR_CONFIG = r"\w[\w-]*(/\w[\w.-]*)?(:[\d.]+)?/?"  # As tfds writes them.
BALANCING, BEST_BY = ("none", "balanced"), ("accuracy", "balanced_accuracy", "loss")
# (x_train, y_train, x_test, y_test), or with x_validation, y_validation before x_test.
Arrays = tuple[Any, Any, Any, Any] | tuple[Any, Any, Any, Any, Any, Any]


@dataclass(frozen=True, repr=False)
class Config:
    """A run. The same configuration and seed on the same machine give the same bits.

    Network, optimizer, augmentation, loss, training step and metrics are objects, whose fields are options.
    """

    name: str = ""
    """Name of the run directory, before the seed; the name of the experiment file, or DATASET_MODEL, if empty. If it is
    not given on the command line, but another --dataset than that of the experiment is, _DATASET follows it."""
    dataset: str | Arrays | Callable[[], Arrays] = "cifar10"
    """mnist, fashion_mnist, cifar10, cifar100, another set in the tfds directory (NAME:VERSION for one version), or the
    path of a folder of images, or of a .csv or .jsonl file with the columns path and label."""
    seed: int = 0
    """Determines the held-out examples, the initial parameters, the order of the data, augmentation and dropout."""
    num_epochs: int = 10
    """Number of passes over the training examples."""
    batch_size: int | None = None
    """Number of examples per step; by default 128, or an eighth of the training examples (at least 8) if that is less.
    """
    validation_fraction: float = 0.1
    """Fraction of each class held out of the training split for validation; 0: no validation. If the data have a
    validation split, any value above 0 uses it instead."""
    tta: str = "none"
    """Test-time augmentation: none; flip (averages with the mirror image); flip_translate (and with shifted images);
    uncertain (flip_translate for the least certain quarter of each batch of 500, or 2,000 on an accelerator; fewer for
    images above 64×64)."""
    model: Any = field(default_factory=CNN)
    """The network: a Linen module, or an object with functions init and apply."""
    optim: Optimizer = field(default_factory=Adam)
    """The optimizer."""
    augment: Augment = field(default_factory=Augment)
    """Augmentation of the training images, on the device."""
    loss: Any = field(default_factory=CrossEntropy)
    """The training loss, (logits [B K], batch) -> loss [B]. Validation and test report the cross-entropy."""
    sampling: str = "none"
    """none: an epoch visits every example once; balanced: it draws equally often from every class."""
    class_weights: str = "none"
    """none; balanced: weights the loss of each example so that all classes have the same total weight."""
    train_step: Any = field(default_factory=lambda: train_step)
    """The training step: a function with the arguments and results of cnnjax's `train_step`, which is the default."""
    metrics: Any = None
    """Your own scores, of the validation images after each epoch and of the test images at the end: a function
    (logits [N K], label [N]) -> {name: number} of NumPy arrays."""
    best_by: str = "accuracy"
    """The validation score that selects the best checkpoint: accuracy, balanced_accuracy (mean recall), loss (the
    lowest), or a name that `metrics` returns (the highest)."""
    patience: int | None = None
    """Stop after this number of epochs without a better validation score, see `best_by`; None: train all epochs."""
    image_size: int | tuple[int, int] | None = None
    """Height and width to which images are resized; None: the network's for a folder, else unchanged."""
    resize: str = "crop"
    """How images are resized: crop (fits the shorter side, keeps the center), pad (fits the longer side, adds black
    borders) or stretch."""
    channels: int | None = None
    """1: gray, 3: color over white, 4: color and alpha; by default 3 for a folder, or if there is alpha."""
    skip_unreadable: bool = False
    """Train on a folder without its unreadable files, instead of refusing it."""
    test_split: str | None = None
    """The split to score at the end; by default test, or a part of the training split if there is none."""
    test_fraction: float = 0.2
    """Fraction of each class that becomes the test set if the data have none."""
    test_seed: int = 0
    """Selects the test examples, independently of `seed`, so that all seeds share a test set."""

    def __post_init__(self) -> None:
        check_part("optim", self.optim, Optimizer, "Adam(), SGD() or Muon()")
        check_part("augment", self.augment, Augment, "Augment(), PhotoAugment(), Mixup() or CutMix()")
        _check_dataset(self.dataset)
        check_fields(self)
        check(
            "name",
            "letters, digits, '.', '_' and '-' that begin with a letter or digit",
            re.fullmatch(r"(\w[\w.-]*)?", self.name, re.ASCII) is not None,
            repr(self.name),
        )
        for name, valid in (("resize", RESIZE), ("sampling", BALANCING), ("class_weights", BALANCING)):
            check_name(name, getattr(self, name), valid)
        rule = f"{', '.join(BEST_BY)}, or a name that `metrics` returns, if they are set"
        check("best_by", rule, self.metrics is not None or self.best_by in BEST_BY, repr(self.best_by))
        both = self.sampling == self.class_weights == "balanced"
        check("class_weights", "none if `sampling` is balanced: use one of the two", not both, "balanced")
        size = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,)
        valid = size == (None,) or all(n is not None and 1 <= n <= MAX_SIDE for n in size)
        check("image_size", f"from 1 to {MAX_SIDE}", valid, self.image_size)
        check("channels", "1, 3 or 4", self.channels in (None, 1, 3, 4), self.channels)
        check("test_fraction", "above 0 and below 1", 0 < self.test_fraction < 1, self.test_fraction)
        check("test_seed", "between 0 and 2**32 - 1", 0 <= self.test_seed < 2**32, self.test_seed)
        check("seed", "between 0 and 2**32 - 1", 0 <= self.seed < 2**32, self.seed)
        for name in ("num_epochs", "batch_size", "patience"):
            if (value := getattr(self, name)) is not None:
                check(name, "at least 1", value >= 1, value)
                check(name, "below 2**31", value < 2**31, value)
        fraction = self.validation_fraction
        check("validation_fraction", "at least 0 and below 1", 0 <= fraction < 1, fraction)
        rule = "None without validation: set `validation_fraction`"
        check("patience", rule, self.patience is None or fraction > 0, self.patience)
        check_name("tta", self.tta, TTA)
        check_network(self.model)
        _check_function("loss", "a function of logits and a batch", self.loss)
        _check_function("train_step", "a function (state, batch, key, ...)", self.train_step)
        if self.metrics is not None:
            _check_function("metrics", "a function (logits, label), or None", self.metrics)
        for name in ("model", "optim", "augment", "loss", "train_step", "metrics"):
            check_hashable(name, getattr(self, name))
        # A run directory may get a suffix, and a file name has at most 255 bytes.
        check("name", "short: at most 200 characters with the seed", len(self.run_name) <= 200, repr(self.run_name))

    def __repr__(self) -> str:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "dataset"}
        values = {name: x.__qualname__ if inspect.isfunction(x) else repr(x) for name, x in values.items()}
        dataset = describe_shapes(self.dataset) if isinstance(self.dataset, tuple) else repr(self.dataset)
        values = {"name": values.pop("name"), "dataset": dataset, **values}
        return f"Config({', '.join(f'{name}={value}' for name, value in values.items())})"

    @property
    def run_name(self) -> str:
        """The name of the run directory: `name`, or DATASET_MODEL, and the seed."""
        return f"{self.name or f'{self.dataset_word}_{word(type(self.model))}'}-seed{self.seed}"

    @property
    def dataset_word(self) -> str:
        """The data set in the names of runs."""
        dataset = self.dataset if isinstance(self.dataset, str) else getattr(self.dataset, "__name__", "arrays")
        dataset = dataset.rstrip("/") or dataset
        if dataset.lower().endswith(LISTS) or re.fullmatch(NAME_OR_CONFIG, dataset, re.ASCII) is None:  # A path.
            path = PurePath(dataset)
            plain = unicodedata.normalize("NFKD", path.stem if path.suffix.lower() in LISTS else path.name)
            words = re.findall(r"[a-z0-9][a-z0-9_.-]*", plain.encode("ascii", "ignore").decode(), re.IGNORECASE)
            dataset = "-".join(words) or "images"
        return re.sub("[/:]", "-", dataset)

    def data_options(self) -> dict[str, Any]:
        """Returns the arguments of `load_dataset` that determine the examples and their shape."""
        names = ("image_size", "resize", "channels", "skip_unreadable", "test_split", "test_fraction", "test_seed")
        return {name: getattr(self, name) for name in names} | {"default_size": getattr(self.model, "image_size", 64)}

    def with_num_classes(self, num_classes: int) -> "Config":
        """Returns the configuration with the field `num_classes` set in every object that has one.

        Raises:
          UserError: a `num_classes` was set to another value.
        """
        changes = {}
        for name in ("model", "augment", "loss", "train_step", "metrics"):
            part = getattr(self, name)
            if "num_classes" not in getattr(part, "__dataclass_fields__", {}):
                continue
            if part.num_classes not in (getattr(type(part), "num_classes", None), num_classes):
                fix = "Leave it out" if hasattr(type(part), "num_classes") else f"Set it to {num_classes}"
                raise UserError(
                    f"`{name}.num_classes` must be the {num_classes} of the data, got {part.num_classes}. {fix}."
                )
            changes[name] = replace(part, num_classes=num_classes)
        return replace(self, **changes)


def _check_dataset(dataset: Any) -> None:
    if isinstance(dataset, str):
        rule = "a tfds name, such as cifar10 or name/config, or the path of a folder or a list of images"
        valid = dataset.strip() != "" and "\0" not in dataset and "://" not in dataset
        check("dataset", rule, valid, repr(dataset))
        return
    rule = (
        "a str (a name or a path), a tuple (x_train, y_train, x_test, y_test) or (x_train, y_train, x_validation, "
        "y_validation, x_test, y_test), or a function that returns the tuple"
    )
    valid = (isinstance(dataset, tuple) and len(dataset) in (4, 6)) or callable(dataset)
    check("dataset", rule, valid, f"a {type(dataset).__name__}: {shorten(describe_shapes(dataset))}")


def _check_function(name: str, rule: str, value: Any) -> None:
    is_class = isinstance(value, type)
    got = f"the class {value.__name__}. Create an instance: {value.__name__}()" if is_class else show(value)
    check(name, rule, callable(value) and not is_class, got)


def check_hashable(name: str, value: Any) -> None:
    """Checks that a part of a configuration cannot change: `jit` compiles once for equal values.

    Raises:
      UserError: it is not hashable, and could differ from what is recorded.
    """
    try:
        hash(value)
    except TypeError as error:
        raise UserError(
            f"`{name}` must be hashable, got {show(value)} ({error}). Use @dataclass(frozen=True), and tuples."
        ) from error


def check_part(name: str, value: Any, base: type, instances: str) -> None:
    """Checks that a part of a configuration is an instance of its base class; `instances` is code that makes some."""
    if isinstance(value, base):
        return check_methods(type(value), base, name)
    got, fix = show(value), f"Create an instance: {instances}."
    if isinstance(value, type):
        got, fix = f"the class {value.__name__}", f"Create an instance: {value.__name__}()."
    elif hasattr(value, "init") and hasattr(value, "update"):
        got, fix = (
            "an optax optimizer",
            (
                "Write a subclass, `class Mine(Optimizer)`, with a method `def transform(self, learning_rate)` that "
                "returns it, such as optax.adam(learning_rate), and pass Mine()."
            ),
        )
    raise UserError(f"`{name}` must be an instance of cnnjax's {base.__name__}, got {got}. {fix}")


def word(cls: type) -> str:
    """Returns the word for a class on the command line and in the names of runs: resnet9 for ResNet9."""
    return cls.__name__.lower()
