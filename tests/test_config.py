"""The ranges of the options are tested in cli/test_train.py."""

from dataclasses import FrozenInstanceError, dataclass, replace
from typing import Annotated

import flax.linen as nn
import numpy as np
import optax
import pytest

from cnnjax import (
    CNN,
    MLP,
    SGD,
    Adam,
    Augment,
    Config,
    CrossEntropy,
    CutMix,
    Mixup,
    ParamGroup,
    SpeedNet,
    UserError,
    softmax_cross_entropy,
)


@dataclass(frozen=True)
class Weighted:
    """A loss that depends on the number of classes."""

    num_classes: int = 2

    def __call__(self, logits, batch):
        return softmax_cross_entropy(logits, batch) / self.num_classes


def test_arrays_are_shown_by_their_shapes():
    image, label = np.zeros((600, 8, 8), np.uint8), np.zeros(600, np.int64)
    shown = repr(Config(dataset=(image, label, image[:5], label[:5])))
    assert "dataset=(uint8[600, 8, 8], int64[600], uint8[5, 8, 8], int64[5]), seed=0" in shown
    assert repr(Config(name="a")).startswith("Config(name='a', dataset='cifar10', seed=0, num_epochs=10, ")


class Net(nn.Module):
    sizes: list[int]


class Sized(nn.Module):
    width: Annotated[int, "channels"] = 4


@dataclass(frozen=True)
class Decaying(SGD):
    decay: float = 0.5


def arrays():
    x, y = np.zeros((2, 4, 4), np.uint8), np.arange(2)
    return x, y, x, y


def test_a_configuration_cannot_be_changed_and_is_compared_by_value():
    config = Config(model=MLP(dense_dropout=0.1), optim=Adam(b1=0.8))
    assert config == Config(model=MLP(dense_dropout=0.1), optim=Adam(b1=0.8)) != Config()
    with pytest.raises(FrozenInstanceError):
        setattr(config, "seed", 1)  # noqa: B010


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": -5}, r"`batch_size` must be at least 1, got -5\."),
        ({"num_epochs": "3"}, r"`num_epochs` must be an int, got '3'\."),
        ({"seed": 0.5}, r"`seed` must be an int, got 0\.5\."),
        ({"seed": 2**32}, r"`seed` must be between 0 and 2\*\*32 - 1, got 4294967296\."),
        ({"batch_size": True}, r"`batch_size` must be an int or None, got True\."),
        ({"num_epochs": 2**31}, r"`num_epochs` must be below 2\*\*31, got 2147483648\."),
        ({"dataset": (1, 2, 3)}, r"`dataset` must be .*, a tuple \(x_train, .*, got a tuple: \(1, 2, 3\)\."),
        (
            {"dataset": (arrays()[:2], arrays()[2:])},
            r"`dataset` .* \(x_train, y_train, x_test, y_test\) or .* a tuple: \(\(uint8\[2, 4, 4\], int64\[2\]\), \(u",
        ),
        ({"dataset": [*arrays()]}, r"`dataset` must be .* got a list: \(uint8\[2, 4, 4\], int64\[2\], uint8.*"),
        ({"dataset": [[1] * 999] * 9}, r"`dataset` must be .* got a list: \(\(1, [1, ]{80,100}\.\.\.\.$"),
        ({"name": "a" * 195}, r"`name` must be short: at most 200 characters with the seed, got 'a+-seed0'\."),
        ({"model": Sized(width="4")}, r"`model\.width` must be an int, got '4'\."),
        ({"loss": Weighted("2")}, r"`loss\.num_classes` must be an int, got '2'\."),
        ({"model": MLP}, r"`model` must be a Linen module, or an object with functions .* got the class MLP\."),
        (
            {"model": "mlp"},
            r"`model` must be a Linen module, or an object with functions init and apply, got an object",
        ),
        ({"optim": MLP()}, r"`optim` must be an instance of cnnjax's Optimizer, got MLP"),
        (
            {"optim": optax.adam(1e-3)},
            r"`optim` must be an instance of cnnjax's Optimizer, got an optax optimizer\. Write a subclass, `class Mi",
        ),
        ({"optim": "adam"}, r"`optim` must be .* got 'adam'\. Create an instance: Adam\(\), SGD\(\) or Muon\(\)\."),
        ({"optim": Adam}, r"`optim` must be .* got the class Adam\. Create an instance: Adam\(\)\."),
        (
            {"augment": "mixup"},
            r"`augment` must be an instance of cnnjax's Augment, got 'mixup'\. Create an instance: .* Mixup\(\)",
        ),
        ({"loss": 0.1}, r"`loss` must be a function of logits and a batch, got 0\.1\."),
        ({"model": Net([1, 2])}, r"`model` must be hashable, got Net\(.* Use @dataclass\(frozen=True\), and tuples\."),
    ],
)
def test_values_that_are_no_configuration(values, message, no_type_checks):
    with pytest.raises(UserError, match=rf"(?s){message}"):
        Config(**values)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Adam(learning_rate="1e-3"), "`optim.learning_rate` must be a float, got '1e-3'"),
        (
            lambda: Adam(learning_rate=abs),
            "`optim.learning_rate` must be a float, got a function. Override `make_schedule(self, num_updates)` in a "
            "subclass, and return it there",
        ),
        (
            lambda: SGD(schedule=abs),
            "`optim.schedule` must be a str, got a function. Override `make_schedule(self, num_updates)` in a "
            "subclass, and return it there",
        ),
        (lambda: SGD(groups=(3,)), "`optim.groups.0` must be an instance of cnnjax's ParamGroup, got 3"),
        (lambda: Decaying(decay="0.5"), "`optim.decay` must be a float, got '0.5'"),
        (lambda: ParamGroup("a", num_epochs=1.5), "`num_epochs` must be an int or None, got 1.5"),
        (lambda: SpeedNet(widths=(1, 2, "3")), "`model.widths.2` must be an int, got '3'"),
        (lambda: SpeedNet(widths=(1, 2, 2**31)), "`model.widths` must be below 2**31, got (1, 2, 2147483648)"),
        (lambda: CNN(conv_dropout="a"), "`model.conv_dropout` must be a float, got 'a'"),
        (lambda: MLP(dtype=np.float32), "`model.dtype` must be a str, got <class 'numpy.float32'>"),
        (lambda: Augment(translate=1.0), "`augment.translate` must be an int, got 1.0"),
        (lambda: CrossEntropy("a"), "`loss.label_smoothing` must be a float, got 'a'"),
    ],
)
def test_the_parts_check_their_own_fields(make, message, no_type_checks):
    """Before they compare them, which would end in a `TypeError`."""
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value) == f"{message}."


def test_the_name_of_a_run_is_that_of_the_experiment_or_of_data_and_network():
    assert Config().run_name == "cifar10_cnn-seed0"
    assert Config(name="wide", seed=3).run_name == "wide-seed3"
    assert Config(dataset="name/config", model=MLP()).run_name == "name-config_mlp-seed0"
    assert Config(dataset=arrays, model=SpeedNet()).run_name == "arrays_speednet-seed0"
    assert Config(dataset=arrays()).run_name == "arrays_cnn-seed0"


def test_the_number_of_classes_is_that_of_the_data():
    config = Config(model=CNN(conv_dropout=0.1), augment=Mixup(0.5, flip="random"), loss=Weighted())
    assert config.with_num_classes(100) == replace(
        config,
        model=CNN(num_classes=100, conv_dropout=0.1),
        augment=Mixup(0.5, 100, flip="random"),
        loss=Weighted(num_classes=100),
    )
    plain = Config(model=CNN(num_classes=100), augment=Augment(flip="random"))
    assert plain.with_num_classes(100) == plain
    with pytest.raises(UserError, match=r"`augment\.num_classes` must be the 10 of the data, got 7\. Leave it out\."):
        Config(augment=CutMix(num_classes=7)).with_num_classes(10)
