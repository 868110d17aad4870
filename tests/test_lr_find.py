"""The learning-rate range test, on losses whose course is known."""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax import SGD, Augment, Config, Optimizer, ParamGroup, UserError
from cnnjax.cli.main import main
from cnnjax.data.order import epoch_plan
from cnnjax.inputs import load_inputs
from cnnjax.lr_find import RangeTest, find_learning_rate
from cnnjax.seeds import train_seeds

IMAGES = np.random.default_rng(0).integers(0, 256, (24, 4, 4, 1), np.uint8)
ARRAYS = (IMAGES, np.arange(24) % 2, IMAGES, np.arange(24) % 2)


class Scalars(nn.Module):
    """Its logits are two of its parameters, a and b; c is frozen in the tests."""

    start: float = 0.0

    @nn.compact
    def __call__(self, image):
        a, b, c = (self.param(name, nn.initializers.constant(self.start), ()) for name in "abc")
        return jnp.broadcast_to(jnp.stack([a, b + c]), (len(image), 2))


def linear(logits, batch):
    return 10 + logits.sum(-1)


def quadratic(logits, batch):
    return logits[:, 0] ** 2


def test_each_update_uses_its_learning_rate_times_the_factor_of_the_group():
    groups = ParamGroup("^b$", multiplier=0.5), ParamGroup("^c$", num_epochs=0)
    optim = SGD(learning_rate=1e-3, momentum=0.0, groups=groups, accumulate_steps=2, schedule="one_cycle")
    found = find_learning_rate(Config(dataset=ARRAYS, model=Scalars(), optim=optim, loss=linear, batch_size=8))
    rates = 1e-7 * 10 ** (np.arange(161) / 20)
    np.testing.assert_allclose(found.learning_rate, rates, rtol=1e-9)
    np.testing.assert_allclose(found.loss, 10 - 1.5 * np.cumsum(rates), rtol=2e-5, atol=2e-5)
    assert not found.diverged


@dataclass(frozen=True)
class Grow(Augment):
    """Its images are larger in a run of one epoch, and from the second epoch on; applied twice, twice as much."""

    factor: int = 1

    def output_size(self, image_size):
        return image_size[0] * self.factor, image_size[1] * self.factor

    def transform_pixels(self, key, image):
        return jnp.repeat(jnp.repeat(image, self.factor, 1), self.factor, 2)

    def at_epoch(self, epoch, num_epochs):
        return replace(self, factor=self.factor + (num_epochs == 1) + (epoch > 0))


def test_all_updates_have_the_augmentation_of_the_first_epoch(monkeypatch):
    drawn, trained = set(), set()

    def draw(*arguments, **options):
        drawn.add(options["image_size"])
        return epoch_plan(*arguments, **options)

    def loss(logits, batch):
        trained.add(batch.image.shape[1:3])
        return linear(logits, batch)

    monkeypatch.setattr("cnnjax.dispatch.epoch_plan", draw)
    config = Config(
        dataset=ARRAYS, num_epochs=1, model=Scalars(), optim=SGD(learning_rate=1e-3), augment=Grow(), loss=loss
    )
    assert len(find_learning_rate(config).loss) > 100
    assert drawn == trained == {(8, 8)}


def test_it_stops_when_the_loss_diverges():
    config = Config(
        dataset=ARRAYS, model=Scalars(start=3.0), optim=SGD(learning_rate=1e-2, momentum=0.0), loss=quadratic
    )
    found = find_learning_rate(config)
    a, losses, smoothed = np.float64(3), [], []
    for rate in 1e-6 * 10 ** (np.arange(161) / 20):
        a -= rate * 2 * a
        losses.append(a**2)
        weights = 0.9 ** np.arange(len(losses))[::-1]
        smoothed.append(weights @ losses / weights.sum())
        if smoothed[-1] > 18:  # Twice the first loss.
            break
    assert found.diverged
    np.testing.assert_allclose(found.loss, losses, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.smoothed, smoothed, rtol=1e-3, atol=1e-6)
    lowest = found.learning_rate[np.argmin(smoothed)]
    assert found.lowest == lowest > 1  # The rate above which the steps overshoot.
    # The loss falls by exp(-4 times the sum of the rates), fastest where this sum is 1/4; smoothing delays it.
    assert 0.25 * np.log(10) / 20 < found.steepest < lowest


@pytest.mark.parametrize(
    ("powers", "losses", "is_flat"),
    [
        ((-7, -4, -2, -1), (2.3, 2.3, 0.5, 4.0), False),
        ((-7, -5, -4, 1), (2.3, 2.3, 0.1, 0.0), True),  # All is learned at 1e-4.
    ],
)
def test_a_tenth_of_the_lowest_point_is_suggested_unless_the_curve_is_flat_there(powers, losses, is_flat):
    power = np.arange(20 * powers[0], 20 * powers[-1] + 1) / 20
    found = RangeTest(10**power, np.interp(power, powers, losses), True)
    assert powers[1] < np.log10(found.steepest) < powers[2]
    assert np.log10(found.lowest) == pytest.approx(powers[-1] if is_flat else powers[-2], abs=0.3)  # Smoothing delays.
    assert found.suggestion == pytest.approx(found.steepest if is_flat else found.lowest / 10, rel=0.05)


@pytest.mark.parametrize("loss", [np.full(100, 2.3), np.linspace(2.3, 4, 100)])
def test_a_loss_that_does_not_fall_suggests_nothing(loss):
    assert RangeTest(np.geomspace(1e-7, 1e-2, 100), loss, True).suggestion is None


@pytest.mark.parametrize(("noise", "is_suggested"), [(0.002, True), (0.03, False)])
def test_a_bounded_loss_may_fall_little_if_it_is_more_than_noise(noise, is_suggested):
    """It begins at 1.147 of at most 1 / 0.7, as the generalized cross-entropy with q = 0.7, and falls by 2%."""
    rates = np.geomspace(1e-7, 10, 161)
    fall = 0.027 * np.exp(-(((np.log10(rates) + 1.5) / 0.7) ** 2))
    loss = 1.147 - fall + np.where(rates > 0.3, 0.15, 0.0) + noise * np.random.default_rng(0).normal(size=161)
    assert (RangeTest(rates, loss, False).suggestion is not None) == is_suggested


def test_a_loss_that_is_not_finite_before_the_first_update_is_an_error():
    config = Config(dataset=ARRAYS, model=Scalars(), loss=lambda logits, batch: linear(logits, batch) + jnp.nan)
    with pytest.raises(UserError, match="`loss` must be finite before the first update, got nan"):
        find_learning_rate(config)


@dataclass(frozen=True)
class Masks(Augment):
    def transform(self, key, batch):
        return batch._replace(mask=jnp.zeros_like(batch.mask))


def test_batches_without_an_example_are_an_error():
    config = Config(dataset=ARRAYS, model=Scalars(), loss=linear, augment=Masks())
    with pytest.raises(UserError, match=r"`batch\.mask` must leave at least one example unmasked, got none\."):
        find_learning_rate(config)


def test_a_lookahead_is_scheduled_over_the_whole_sweep():
    """Else the last updates of a run that is shorter than the sweep would diverge."""
    found = [
        find_learning_rate(Config(dataset=ARRAYS, model=Scalars(), optim=SGD(lookahead=3), num_epochs=n, loss=linear))
        for n in (1, 200)
    ]
    np.testing.assert_array_equal(found[0].loss, found[1].loss)


@pytest.mark.parametrize("same", [({"start_epoch": 1}, {"num_epochs": 0}), ({"num_epochs": 1}, {})])
def test_all_epochs_freeze_what_the_first_one_freezes_and_let_nothing_of_it_decay(same):
    """The sweep takes many epochs of this set."""
    found = []
    for times in same:
        optim = SGD(learning_rate=1e-3, weight_decay=0.1, groups=(ParamGroup("^c$", **times),))
        config = Config(dataset=ARRAYS, model=Scalars(start=1.0), optim=optim, loss=linear, batch_size=8)
        found.append(find_learning_rate(config))
    np.testing.assert_array_equal(found[0].loss, found[1].loss)


@dataclass(frozen=True)
class Stubborn(Optimizer):
    def transform(self, learning_rate):
        return optax.sgd(self.learning_rate)


def test_an_optimizer_that_ignores_the_schedule_is_an_error():
    config = Config(dataset=ARRAYS, model=Scalars(), optim=Stubborn(), loss=linear)
    with pytest.raises(
        UserError, match="`optim` must use the argument `learning_rate` of its `transform`, got stubborn"
    ):
        find_learning_rate(config)


EXPERIMENT = """
import flax.linen as nn
import numpy as np
from cnnjax import Adam, Augment, Config

class Net(nn.Module):
    @nn.compact
    def __call__(self, image, *, train):
        x = nn.Dropout(0.5, deterministic=not train)(image.reshape(len(image), -1))
        return nn.Dense(2)(x)

def arrays():
    rng = np.random.default_rng(0)
    image, label = rng.integers(0, 256, (80, 8, 8, 1), np.uint8), np.arange(80) % 2
    image[label == 1] //= 2
    return image, label, image, label

optim = Adam(schedule="one_cycle", ema=0.9)
CONFIG = Config(dataset=arrays, model=Net(), optim=optim, augment=Augment(flip="random"), num_epochs=2)
"""


def test_a_run_after_it_has_the_bits_of_a_run_without_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(EXPERIMENT)
    main(["lr-find", "mine.py", "--plot", "plots/found.svg", "--batch-size", "16"])
    lines = capsys.readouterr().out.splitlines()
    assert {str(path) for path in Path().rglob("*.*") if "__pycache__" not in path.parts} == {
        "mine.py",
        "plots/found.svg",
    }
    (option,) = (line for line in lines if line.startswith("  --optim.learning-rate "))
    assert 1e-5 < float(option.split()[1]) < 10
    text = "".join(ElementTree.parse("plots/found.svg").getroot().itertext())
    assert f"suggested: {option.split()[1]}" in text and "mine-seed0" in text

    train = ["train", "mine.py", "--batch-size", "16", "--no-report"]
    main([*train, "--run-dir", "after"])
    jax.clear_caches()  # Otherwise the programs of the first run would be used again.
    main([*train, "--run-dir", "without"])
    after, without = (json.loads(Path(name, "result.json").read_text())["sha256"] for name in ("after", "without"))
    assert after == without

    with pytest.raises(SystemExit):
        main(["lr-find", "mine.py", "--plot", "found.txt"])
    assert "`plot` must be a file .svg or .html, got found.txt." in capsys.readouterr().err


@pytest.mark.parametrize("function", [load_inputs, find_learning_rate, partial(train_seeds, seeds=(0, 1))])
def test_data_that_do_not_fit_into_memory_are_a_message(function, tmp_path, monkeypatch):
    def load(*arguments, **options):
        raise MemoryError("Unable to allocate 9 TiB.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cnnjax.inputs.load_dataset", load)
    with pytest.raises(UserError, match=r"^The run must fit into memory, got: Unable to allocate 9 TiB\. Lower"):
        function(Config(dataset=ARRAYS))
