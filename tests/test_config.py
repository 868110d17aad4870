"""The ranges of the options are tested in cli/test_train.py."""

from dataclasses import FrozenInstanceError, dataclass, replace

import flax.linen as nn
import jaxtyping
import numpy as np
import pytest

from cnnjax import CNN, MLP, Adam, Augment, Config, CutMix, Mixup, SpeedNet, UserError, softmax_cross_entropy


@dataclass(frozen=True)
class Weighted:
    """A loss that depends on the number of classes."""

    num_classes: int = 2

    def __call__(self, logits, label):
        return softmax_cross_entropy(logits, label) / self.num_classes


class Net(nn.Module):
    sizes: list[int]


def arrays():
    x, y = np.zeros((2, 4, 4), np.uint8), np.arange(2)
    return x, y, x, y


@pytest.fixture
def no_type_checks():
    """Disables the type checks of the tests, which users do not have."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def test_a_configuration_cannot_be_changed_and_is_compared_by_value():
    config = Config(model=MLP(dense_dropout=0.1), optim=Adam(b1=0.8))
    assert config == Config(model=MLP(dense_dropout=0.1), optim=Adam(b1=0.8)) != Config()
    with pytest.raises(FrozenInstanceError):
        setattr(config, "seed", 1)  # noqa: B010


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": -5}, r"`batch_size` must be at least 1, got -5\."),
        ({"model": MLP}, r"`model` must be an instance of a subclass of flax's Module, got <class .*MLP'>\."),
        ({"model": "mlp"}, r"`model` must be an instance of a subclass of flax's Module, got 'mlp'\."),
        ({"optim": MLP()}, r"`optim` must be an instance of a subclass of cnnjax's Optimizer, got MLP"),
        ({"augment": "mixup"}, r"`augment` must be an instance of a subclass of cnnjax's Augment, got 'mixup'\."),
        ({"loss": 0.1}, r"`loss` must be a function of logits and labels, got 0\.1\."),
        ({"model": Net([1, 2])}, r"`model` must be hashable, got Net\(.* Use @dataclass\(frozen=True\), and tuples\."),
    ],
)
def test_values_that_are_no_configuration(values, message, no_type_checks):
    with pytest.raises(UserError, match=rf"(?s){message}"):
        Config(**values)


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
