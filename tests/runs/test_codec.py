import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, Flag, auto
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict
from jax import lax

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
    Muon,
    Optimizer,
    ParamGroup,
    SpeedNet,
    UserError,
    conv_general_dilated,
    softmax_cross_entropy,
)
from cnnjax.errors import messages_for_shell
from cnnjax.files import changes, file_changes
from cnnjax.runs.codec import ARRAYS, check_complete, collect_names, decode, encode, source_files
from cnnjax.runs.manifest import differences


class Block(nn.Module):
    width: int = 4
    dtype: Any = jnp.bfloat16
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    kernel_init: Callable[..., jax.Array] = nn.initializers.he_normal()  # A closure.


class Net(nn.Module):
    num_classes: int = 10
    blocks: tuple[nn.Module, ...] = (Block(), Block(width=8))
    norm: Any = nn.BatchNorm
    rates: Mapping[str, Any] = FrozenDict()


@dataclass(frozen=True)
class Schedule:
    power: float = 1.0


@dataclass(frozen=True)
class Lion(Optimizer):
    b1: float = 0.9
    decay: Schedule = Schedule()

    def transform(self, learning_rate):
        return optax.lion(learning_rate, self.b1)


@dataclass(frozen=True)
class Noise(Augment):
    scale: float = 0.1


@dataclass(frozen=True)
class Focal:
    gamma: float = 2.0

    def __call__(self, logits, batch):
        return softmax_cross_entropy(logits, batch)


def focal_loss(logits, batch, gamma: Any = 2.0):
    return softmax_cross_entropy(logits, batch)


def load_arrays():
    return ARRAY, ARRAY, ARRAY, ARRAY


ARRAY = np.zeros(4)
BUILT_IN = [
    Config(),
    Config("a", "cifar100", 3, 2, 64, 0.0, "flip", CNN(conv_dropout=0.1, kernel_init="he_normal", dtype="bfloat16")),
    Config(model=MLP(num_classes=100, dense_dropout=0.2), optim=SGD(momentum=0.5, init_factor=0.1), augment=Mixup(0.4)),
    Config(model=SpeedNet(widths=(4, 8, 8), depth=3), optim=Muon(sgd_momentum=0.7), augment=CutMix(alpha=0.5)),
    Config(optim=Adam(b2=0.99, groups=(ParamGroup("bias$", 64.0), ParamGroup("^head", num_epochs=0)))),
    Config(loss=CrossEntropy(label_smoothing=0.1), augment=Augment(flip="random", translate=2, cutout=3)),
    Config(loss=softmax_cross_entropy),
]
OWN = [
    Config(model=Net(), optim=Lion(learning_rate=0.1), augment=Noise(scale=0.2, flip="random"), loss=focal_loss),
    Config(
        model=Net(blocks=(Block(activation=nn.gelu, dtype=jnp.float16),), rates=FrozenDict(a=0.5, b=(1, 2))),
        loss=Focal(1.0),
    ),
    Config(model=Net(norm=np.dtype("float64")), optim=Lion(decay=Schedule(2.0)), dataset=load_arrays),
    Config(dataset=(ARRAY, ARRAY, ARRAY, ARRAY)),
]


def round_trip(config, names):
    content = json.loads(json.dumps(encode(config)))
    restored = decode(content, names)
    assert encode(restored) == content
    return restored


@pytest.mark.parametrize("config", BUILT_IN, ids=range(len(BUILT_IN)))
def test_a_configuration_of_built_in_classes_is_restored_by_name(config):
    assert round_trip(config, {}) == config


@pytest.mark.parametrize("config", OWN, ids=range(len(OWN)))
def test_a_configuration_of_own_classes_is_restored_from_their_names(config):
    restored = round_trip(config, collect_names(config))
    assert restored == config
    assert isinstance(hash(restored.model), int)  # Only a hashable network can be compiled.


def test_partial_functions_and_classes_are_restored():
    model = Net(norm=partial(nn.BatchNorm, True, momentum=0.9, dtype=jnp.float16))
    config = Config(model=model, loss=partial(focal_loss, gamma=1.5))
    restored: Any = round_trip(config, collect_names(config))
    assert (restored.model.norm.func, restored.model.norm.args) == (nn.BatchNorm, (True,))
    assert restored.model.norm.keywords == {"momentum": 0.9, "dtype": jnp.float16}
    assert (restored.loss.func, restored.loss.args, restored.loss.keywords) == (focal_loss, (), {"gamma": 1.5})


def test_the_collect_names_classes_and_functions_are_written():
    content = encode(OWN[0])
    assert content["loss"] == {"function": "focal_loss"}
    assert content["optim"]["class"] == "Lion" and content["optim"]["decay"] == {"class": "Schedule", "power": 1.0}
    assert content["model"]["blocks"][1] == {
        "class": "Block",
        "width": 8,
        "dtype": {"dtype": "bfloat16"},
        "activation": {"default": "relu"},
        "kernel_init": {"default": "variance_scaling.<locals>.init"},
    }
    assert encode(OWN[3])["dataset"] == ARRAYS


def test_what_cannot_be_named_is_refused():
    for value in (lambda x: x, nn.initializers.he_normal(), object(), b"bytes"):
        message = (
            "`model.norm` must be a value that config.json can name (a number, a string, a dataclass, or a class or "
            f"function at the top level of a file), got {value!r}."
        )
        with pytest.raises(UserError, match=re.escape(message)):
            encode(Config(model=Net(norm=value)))
    with pytest.raises(UserError, match=r"`loss` must be .* Write it with `def` at the top level of a file, or "):
        encode(Config(loss=lambda logits, batch: logits))
    with pytest.raises(UserError, match=r"`model\.blocks\.0\.activation` must be a value that config\.json can name"):
        encode(Config(model=Net(blocks=(Block(activation=lambda x: x),))))
    for array in (np.zeros(2), jnp.zeros(2)):  # Class weights, for example.
        with pytest.raises(UserError, match=r"`loss\.gamma` must be a value that config\.json can name"):
            encode(Config(loss=partial(focal_loss, gamma=array)))


class Kind(Enum):
    FAST = "fast"
    SLOW = "slow"


class Choosing(nn.Module):
    kind: Kind = Kind.FAST
    weights: Path = Path("a.npz")


@pytest.mark.parametrize("values", [{}, {"kind": Kind.SLOW, "weights": Path("b.npz")}], ids=["default", "other"])
def test_enums_and_paths_are_recorded_by_value_also_if_they_are_defaults(values):
    config = Config(model=Choosing(**values))
    content = encode(config)
    model = content["model"]
    assert model["kind"] == {"enum": "Kind", "name": config.model.kind.name}
    assert model["weights"] == {"path": str(config.model.weights)}
    restored = decode(json.loads(json.dumps(content)), collect_names(config))
    assert restored == config and type(restored.model.weights) is type(config.model.weights)
    with pytest.raises(UserError, match=r"`model\.kind` of this run is Kind, which is not part of cnnjax"):
        decode(content, collect_names(Config()) | {"Choosing": Choosing})


class Part(Flag):
    BODY = auto()
    HEAD = auto()


class Mode(Enum):
    A = 1


class Flagged(nn.Module):
    parts: Part = Part.BODY | Part.HEAD
    mode: Mode = Mode.A
    precision: Any = lax.Precision.HIGHEST


@pytest.mark.parametrize("parts", [Part.BODY | Part.HEAD, Part(0), Part.HEAD])
def test_flags_and_the_enums_of_an_experiment_file_and_of_libraries(parts):
    content = json.loads(json.dumps(encode(Config(model=Flagged(parts=parts)))))
    names = collect_names(Config(), [Flagged, Part, print])  # Mode and Precision are the types of defaults.
    assert decode(content, names).model == Flagged(parts=parts)
    assert print not in names.values()


def test_the_convolution_of_this_package_has_a_name():
    layer = nn.Conv(3, (3, 3), conv_general_dilated=conv_general_dilated)
    content = encode(Config(model=layer))
    assert content["model"]["conv_general_dilated"] == {"function": "cnnjax.conv_general_dilated"}


class Scale:
    def __init__(self, factor):
        self.factor = factor

    def loss(self, logits, batch):
        return self.factor * softmax_cross_entropy(logits, batch)


def test_a_method_of_an_object_is_refused_because_its_state_is_not_recorded():
    for loss in (Scale(2.0).loss, jax.jit(Scale(2.0).loss)):
        with pytest.raises(UserError, match=r"`loss` must be .* Make it a dataclass with a method `__call__`, whose"):
            encode(Config(loss=loss))


def test_names_must_be_unique_and_keys_strings():
    another = type("Focal", (Focal,), {"__qualname__": "Focal"})
    assert another.__qualname__ == Focal.__qualname__
    with pytest.raises(UserError, match=r"The names in an experiment must be unique, got two objects called Focal\."):
        collect_names(Config(loss=Focal()), [another])
    with pytest.raises(UserError, match=r"`model\.rates` must have strings as keys, got 1\."):
        encode(Config(model=Net(rates=FrozenDict({1: 2}))))


def test_only_dataclasses_and_what_the_configuration_holds_have_names():
    """A run directory must not choose which function of a file is called."""
    names = collect_names(Config(loss=focal_loss), [Focal, Net, load_arrays, json.dumps, Path, 3])
    assert names == {"focal_loss": focal_loss, "Focal": Focal, "Net": Net}


def test_a_name_that_is_not_passed_names_the_file_to_pass(tmp_path):
    content = encode(OWN[0])
    for part, name in (("model", "Net"), ("optim", "Lion"), ("augment", "Noise"), ("loss", "focal_loss")):
        names = {known: x for known, x in collect_names(OWN[0]).items() if known != name}
        with pytest.raises(UserError) as error:
            check_complete(decode(content, names, ["mine.py"]))
        assert str(error.value) == (
            f"`{part}` of this run is {name}, which is not part of cnnjax, and a run directory imports no code. Pass a "
            "`config` that has it, such as that of training."
        )
    with messages_for_shell():
        (tmp_path / "mine.py").write_text("CONFIG = None")
        mine = str(tmp_path / "mine.py")
        trained = "Pass the file with the CONFIG that was trained, which is or imports"
        for files, fix in (
            ([mine], f"Pass the file that defines it: --experiment {mine}"),
            (["helper.py", mine], f"Pass the file that defines it: --experiment {mine}"),
            (["no/mine.py"], f"{trained} no/mine.py: --experiment FILE"),
            (["helper.py", "no/mine.py"], f"{trained} helper.py and no/mine.py: --experiment FILE"),
            ([], "Pass the file that defines it: --experiment FILE"),
        ):
            with pytest.raises(UserError, match=re.escape(fix)):
                decode(content, {}, files)
    called = {**content, "model": {"class": "focal_loss", "logits": 0, "label": 0}}  # It is no class.
    with pytest.raises(UserError, match="`model` of this run is focal_loss, which is not part of cnnjax"):
        decode(called, collect_names(OWN[0]))


@dataclass(frozen=True)
class Weighted:
    weights: tuple[float, ...]
    num_classes: int = 10
    inner: Any = Focal()
    reduction: Callable[..., Any] = jnp.mean

    def __call__(self, logits, batch):
        return softmax_cross_entropy(logits, batch)


@pytest.mark.parametrize(
    ("changed", "part", "name"),
    [
        ({"loss": focal_loss}, "loss", "focal_loss"),
        ({"loss": partial(focal_loss, gamma=1.5)}, "loss", "focal_loss"),
        ({"loss": Weighted((0.5, 2.0))}, "loss", "Weighted"),
        ({"loss": Weighted((0.5, 2.0), inner=(Focal(1.0), Focal(2.0)))}, "loss", "Weighted"),
        ({"augment": Noise(scale=0.2, flip="random", cutout=2)}, "augment", "Noise"),
        ({"dataset": load_arrays}, "dataset", "load_arrays"),
        ({"dataset": (ARRAY, ARRAY, ARRAY, ARRAY)}, "dataset", ARRAYS),
    ],
    ids=["function", "partial", "class", "classes", "augmentation", "data", "arrays"],
)
def test_a_network_is_restored_without_what_only_trains_and_scores(changed, part, name):
    """The configuration keeps the recorded names and values, and an error replaces what they would do."""
    content = json.loads(json.dumps(encode(Config(**changed))))
    config = decode(content, {})
    again: Any = encode(config)
    assert again == content and encode(decode(content, collect_names(config))) == content
    assert config == decode(content, {}) and hash(config.augment) == hash(decode(content, {}).augment)
    assert config.augment != decode(json.loads(json.dumps(encode(Config(augment=Noise(scale=0.9))))), {}).augment
    assert (config.augment.flip, config.augment.cutout) == (content["augment"]["flip"], content["augment"]["cutout"])
    assert config.with_num_classes(4).model == CNN(num_classes=4) and isinstance(hash(config.loss), int)
    assert source_files(config) == {}
    message = rf"`{part}(\.inner.*)?` of this run is ({re.escape(name)}|Focal), .* Pass a `config` that has it"
    with pytest.raises(UserError, match=message):
        check_complete(config)
    for use in ("transform", "transform_pixels", "at_epoch") if part == "augment" else ("__call__",):
        with pytest.raises(UserError, match=message):
            getattr(getattr(config, part), use)(0, 1)
    check_complete(Config(**changed))


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        (lambda config: config.update(depth=3), "'depth'"),
        (lambda config: config.pop("dataset"), "dataset"),
        (lambda config: config.pop("tta"), "tta"),
        (lambda config: config["model"].update(depth=3), "'depth'"),
        (lambda config: config["model"].pop("dense_dropout"), "dense_dropout"),
        (lambda config: config["optim"].update(muon_momentum=0.5), "'muon_momentum'"),
        (lambda config: config.update(loss={"partial": "cnnjax.CrossEntropy"}), "args"),
        (lambda config: config.update(model={}), "model"),
    ],
)
def test_a_configuration_of_another_version_is_one_message(edit, found):
    content: Any = encode(Config())
    edit(content)
    with pytest.raises(UserError) as error:
        decode(content, {})
    assert found in str(error.value)


def test_a_value_out_of_range_is_refused_as_on_the_command_line(no_type_checks):
    content = encode(Config())
    for edit, message in (
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0."),
        ({"seed": 0.5}, "`seed` must be an int, got 0.5."),
        ({"num_epochs": 1.5}, "`num_epochs` must be an int, got 1.5."),
        ({"validation_fraction": "0.1"}, "`validation_fraction` must be a float, got '0.1'."),
        ({"optim": {**content["optim"], "learning_rate": None}}, "`optim.learning_rate` must be a float, got None."),
        ({"model": {**content["model"], "dtype": ["float32"]}}, "`model.dtype` must be a str, got ('float32',)."),
        (
            {"model": 3},
            "`model` must be a Linen module, or an object with functions init and apply, got",
        ),
    ):
        with pytest.raises(UserError) as error:
            decode({**content, **edit}, {})
        assert str(error.value).startswith(f"config.json: {message}")
    for key in content:
        with pytest.raises(UserError) as error:
            decode({name: value for name, value in content.items() if name != key}, {})
        assert str(error.value) == f"config.json: `{key}` must be there, got nothing."
    for name, value in (("dataset", "gs://secret"), ("dataset", ""), ("name", "../x"), ("name", "a/b")):
        with pytest.raises(UserError, match=rf"`{name}` must be "):
            decode({**content, name: value}, {})


def test_the_files_of_own_classes_are_those_outside_of_libraries(monkeypatch):
    monkeypatch.chdir(Path(__file__).parent)
    assert [*source_files(OWN[0])] == ["test_codec.py"]
    assert source_files(Config()) == {}
    assert source_files(Config(loss=optax.softmax_cross_entropy_with_integer_labels)) == {}


def test_changes_name_the_values_that_differ():
    a, b = {"x": 1, "y": {"z": 2, "same": [3]}}, {"x": 1, "y": {"z": 4, "same": [3], "new": 5}}
    assert changes(a, b) == {"y.z": (2, 4), "y.new": (None, 5)}
    assert changes(a, a) == {}


def test_a_file_with_another_path_and_the_same_bytes_has_not_changed():
    there, here = {"net.py": "1", "loss.py": "2"}, {"/study/net.py": "1", "loss.py": "3"}
    assert file_changes(there, here) == {"loss.py": ("2", "3")}
    found = differences({"files": there, "cores": 1}, {"files": here, "cores": 2})
    assert found == {"cores": (1, 2), "files.loss.py": ("2", "3")}
