"""The configuration of a run: together with the code, it determines every bit of the result."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from cnnjax.data.augment import Augment
from cnnjax.data.tta import TTA
from cnnjax.errors import UserError, check, check_name, describe_shapes
from cnnjax.fields import check_fields
from cnnjax.losses import CrossEntropy
from cnnjax.models.cnn import CNN
from cnnjax.network import check_network
from cnnjax.optim.optimizer import Optimizer
from cnnjax.optim.recipes import Adam

Arrays = tuple[Any, Any, Any, Any]  # (x_train, y_train, x_test, y_test)


@dataclass(frozen=True, repr=False)
class Config:
    """A run. The same configuration and seed on the same machine give the same bits.

    Network, optimizer, augmentation and loss are objects, whose fields are options.
    """

    name: str = ""
    """Name of the run directory, before the seed; the name of the experiment file, or DATASET_MODEL, if empty."""
    dataset: str | Arrays | Callable[[], Arrays] = "cifar10"
    """mnist, fashion_mnist, cifar10, cifar100, or a set of 8-bit images of one size in the tfds directory."""
    seed: int = 0
    """Determines the held-out examples, the initial parameters, the order of the data, augmentation and dropout."""
    num_epochs: int = 10
    """Number of passes over the training examples."""
    batch_size: int = 128
    """Number of examples per step."""
    validation_fraction: float = 0.1
    """Fraction of each class held out of the training split for validation; 0 trains on all of it."""
    tta: str = "none"
    """Test-time augmentation: none; flip (averages with the mirror image); flip_translate (and with shifted images);
    uncertain (flip_translate for the least certain quarter of each batch of 500, or 2,000 on an accelerator)."""
    model: Any = field(default_factory=CNN)
    """The network: a Linen module, or an object with functions init and apply."""
    optim: Optimizer = field(default_factory=Adam)
    """The optimizer."""
    augment: Augment = field(default_factory=Augment)
    """Augmentation of the training images, on the device."""
    loss: Any = field(default_factory=CrossEntropy)
    """The training loss, (logits [B K], batch) -> loss [B]. Validation and test report the cross-entropy."""

    def __post_init__(self) -> None:
        check_fields(self)
        check(
            "name",
            "letters, digits, '.', '_' and '-' that begin with a letter or digit",
            re.fullmatch(r"(\w[\w.-]*)?", self.name, re.ASCII) is not None,
            repr(self.name),
        )
        if isinstance(self.dataset, str):
            valid = re.fullmatch(r"\w[\w-]*(/\w[\w.-]*)?/?", self.dataset, re.ASCII) is not None
            check("dataset", "a tfds name, such as cifar10 or name/config", valid, repr(self.dataset))
        check("seed", "between 0 and 2**32 - 1", 0 <= self.seed < 2**32, self.seed)
        for name in ("num_epochs", "batch_size"):
            check(name, "at least 1", getattr(self, name) >= 1, getattr(self, name))
            check(name, "below 2**31", getattr(self, name) < 2**31, getattr(self, name))
        fraction = self.validation_fraction
        check("validation_fraction", "at least 0 and below 1", 0 <= fraction < 1, fraction)
        check_name("tta", self.tta, TTA)
        check_network(self.model)
        check("loss", "a function of logits and a batch", callable(self.loss), repr(self.loss))
        for name in ("model", "optim", "augment", "loss"):
            value = getattr(self, name)
            try:
                hash(value)  # `jit` compiles once for equal values.
            except TypeError as error:
                raise UserError(
                    f"`{name}` must be hashable, got {value!r} ({error}). Use @dataclass(frozen=True), and tuples."
                ) from error
        # A run directory may get a suffix, and a file name has at most 255 bytes.
        check("name", "short: at most 200 characters with the seed", len(self.run_name) <= 200, repr(self.run_name))

    def __repr__(self) -> str:
        values = {f.name: repr(getattr(self, f.name)) for f in fields(self) if f.name != "dataset"}
        dataset = describe_shapes(self.dataset) if isinstance(self.dataset, tuple) else repr(self.dataset)
        values = {"name": values.pop("name"), "dataset": dataset, **values}
        return f"Config({', '.join(f'{name}={value}' for name, value in values.items())})"

    @property
    def run_name(self) -> str:
        """The name of the run directory: `name`, or DATASET_MODEL, and the seed."""
        dataset = self.dataset if isinstance(self.dataset, str) else getattr(self.dataset, "__name__", "arrays")
        name = self.name or f"{dataset.replace('/', '-')}_{word(type(self.model))}"
        return f"{name}-seed{self.seed}"

    def with_num_classes(self, num_classes: int) -> "Config":
        """Returns the configuration with the field `num_classes` set in every object that has one.

        Raises:
          UserError: a `num_classes` was set to another value.
        """
        changes = {}
        for name in ("model", "augment", "loss"):
            part = getattr(self, name)
            if "num_classes" not in getattr(part, "__dataclass_fields__", {}):
                continue
            if part.num_classes not in (getattr(type(part), "num_classes", None), num_classes):
                raise UserError(
                    f"`{name}.num_classes` must be the {num_classes} of the data, got {part.num_classes}. Leave it out."
                )
            changes[name] = replace(part, num_classes=num_classes)
        return replace(self, **changes)


def word(cls: type) -> str:
    """Returns the word for a class on the command line and in the names of runs: resnet9 for ResNet9."""
    return cls.__name__.lower()
