import re
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass
from math import inf, nan
from typing import Any, ClassVar, Final, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

from cnnjax import SGD, Adam, Augment, Config, Optimizer, UserError
from cnnjax.fields import check_fields


@dataclass(frozen=True)
class Part:
    count: int = 1
    rate: float = 0.5
    flag: bool = False
    word: "str" = "a"
    limit: float = inf
    width: int = None  # type: ignore
    pair: tuple[int, float] = (1, 2.0)
    many: tuple[int, ...] = ()
    sizes: list[int] = ()  # type: ignore
    rates: Mapping[str, float] = FrozenDict()
    function: Callable[[Any], Any] = abs
    mode: Literal["a", "b"] = "a"
    either: int | str | None = None
    dtype: jnp.dtype = jnp.float32  # type: ignore
    unknown: "Missing" = 1  # type: ignore  # noqa: F821
    part: "Part | None" = None
    parts: Any = ()


class Net(nn.Module):
    width: int
    layer: nn.Module | None = None

    @nn.compact
    def __call__(self, x):
        return x


@pytest.mark.parametrize(
    "values",
    [
        {"count": np.int64(2), "rate": np.float32(0.25), "flag": np.bool_(True)},
        {"rate": 3, "limit": 1.0, "width": 3},
        {"rate": 3.4e38, "limit": -1.2e-38},
        {"limit": float("inf")},  # Its default.
        {"pair": (np.int32(1), 1), "many": (1, 2), "sizes": [1, 2], "rates": FrozenDict(a=1)},
        {"function": len, "mode": "b", "either": "x", "dtype": jnp.bfloat16, "unknown": "anything"},
        {"part": Part(count=2), "parts": (Part(rate=0.0), 3)},
    ],
    ids=str,
)
def test_values_of_the_declared_types(values):
    check_fields(Part(**values), "loss")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": "3"}, "`loss.count` must be an int, got '3'."),
        ({"count": 1.0}, "`loss.count` must be an int, got 1.0."),
        ({"count": True}, "`loss.count` must be an int, got True."),
        ({"count": np.float64(2)}, "`loss.count` must be an int, got 2.0."),
        ({"count": 10**5000}, f"`loss.count` must be an int of 64 bits, got {hex(10**5000)[:97]}...."),
        ({"rate": "1e-3"}, "`loss.rate` must be a float, got '1e-3'."),
        ({"rate": False}, "`loss.rate` must be a float, got False."),
        ({"flag": 1}, "`loss.flag` must be a bool, got 1."),
        ({"word": 1}, "`loss.word` must be a str, got 1."),
        ({"width": 0.5}, "`loss.width` must be an int, got 0.5."),
        ({"pair": (1,)}, "`loss.pair` must be a tuple of 2, got (1,)."),
        ({"pair": (1, "b")}, "`loss.pair.1` must be a float, got 'b'."),
        ({"many": (1, 2.0)}, "`loss.many.1` must be an int, got 2.0."),
        ({"many": [1, 2]}, "`loss.many` must be a tuple, which is hashable, got [1, 2]."),
        ({"many": 3}, "`loss.many` must be a tuple, got 3."),
        ({"rates": FrozenDict(a="x")}, "`loss.rates.a` must be a float, got 'x'."),
        ({"function": 3}, "`loss.function` must be a function, got 3."),
        ({"mode": "c"}, "`loss.mode` must be one of 'a', 'b', got 'c'."),
        ({"either": 0.5}, "`loss.either` must be an int or a str or None, got 0.5."),
        ({"part": Part(part=Part(count=1.5))}, "`loss.part.part.count` must be an int, got 1.5."),  # type: ignore
        ({"parts": (1, Net("4"))}, "`loss.parts.1.width` must be an int, got '4'."),  # type: ignore
    ],
)
def test_values_of_other_types(values, message):
    with pytest.raises(UserError) as error:
        check_fields(Part(**values), "loss")
    assert str(error.value) == message


@pytest.mark.parametrize("value", [1e39, -1e39, 1e-50, nan, 10**400])
def test_floats_that_float32_cannot_hold(value):
    with pytest.raises(UserError, match=r"`rate` must be finite, and 0 or a normal number of float32 \(1\.2e-38 to 3"):
        check_fields(Part(rate=value))


def test_infinity_is_for_users_classes():
    check_fields(Part(rate=inf))
    with pytest.raises(UserError, match=r"`optim\.weight_decay` must be finite, and 0 or a normal number .*, got inf"):
        Adam(weight_decay=inf)


def test_the_fields_of_flax_itself_are_not_checked():
    check_fields(Net(4, layer=nn.Dense(3), name="a", parent=None))
    with pytest.raises(UserError, match=r"`layer` must be an instance of flax's Module or None, got <class '.*Dense'>"):
        check_fields(Net(4, layer=nn.Dense))  # type: ignore


@dataclass(frozen=True)
class Scaled(Augment):
    scale: float = 1.0
    unit: ClassVar[str] = "pixels"

    def _helper(self):
        return self.scale


class Undecorated(Scaled):
    scale: float = 5.0


class Unannotated(SGD):
    learning_rate = 3.0


class Sized(nn.Module):
    width: int = 8


class Wider(Sized):
    width = 64


@dataclass(frozen=True)
class Resets(Augment):
    factor: InitVar[float] = 1.0

    def __post_init__(self, factor):
        super().__post_init__()


class Constructed(Augment):
    def __init__(self, factor):
        super().__init__()
        object.__setattr__(self, "factor", factor)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            Undecorated,
            "`augment` must declare its values as fields, got Undecorated.scale, which is not a field and",
        ),
        (Unannotated, "`optim` must declare its values as fields, got Unannotated.learning_rate, which is not a field"),
        (
            lambda: Config(model=Wider()),
            "`model` must declare its values as fields, got Wider.width, which is not a field",
        ),
        (
            lambda: Resets(factor=0.0),
            "`augment` must be made of fields alone, .* with the parameter 'factor'",
        ),
        (
            lambda: Constructed(0.0),
            "`augment` must be made of fields alone, .* with the parameter 'factor'",
        ),
    ],
)
def test_what_a_class_declares_and_keeps_must_be_fields(make, message):
    """Otherwise it has no effect, or a run neither records nor compares it."""
    with pytest.raises(UserError, match=message):
        make()


def test_classes_of_users_may_have_helpers_and_constants():
    assert Config(augment=Scaled(scale=2.0)).augment._helper() == 2.0


@pytest.mark.parametrize(
    ("base", "part", "wrong", "right"),
    [
        (Augment, "augment", "tranform", "transform"),
        (Augment, "augment", "get_output_size", "output_size"),
        (SGD, "optim", "make_shedule", "make_schedule"),
    ],
)
def test_a_method_that_nothing_calls_because_its_name_is_misspelled(base, part, wrong, right):
    cls = dataclass(frozen=True)(type("Mine", (base,), {wrong: lambda self: None, "__module__": __name__}))
    owner = Augment if part == "augment" else Optimizer
    message = (
        f"`{part}` must have methods with the names of {owner.__name__}, got Mine.{wrong}, which nothing calls. Is it "
        f"{right}? If not, begin its name with an underscore."
    )
    with pytest.raises(UserError, match=re.escape(message)):
        Config(**{part: cls()})
    private = dataclass(frozen=True)(type("Mine", (base,), {f"_{wrong}": lambda self: None, "__module__": __name__}))
    Config(**{part: private()})


class WithProperty(nn.Module):
    @property
    def width(self):
        raise NotImplementedError

    rate = 0.5


class Fills(WithProperty):
    width: int = 8
    rate: float = 0.1


class Constant(Augment):
    LIMIT: Final = 3  # type: ignore


@dataclass(frozen=True, slots=True)
class Slotted(Augment):
    scale: float = 1.0


class Flips:
    flip = "random"


@dataclass(frozen=True)
class Mixed(Flips, Augment):
    pass


class Forwards(Augment):
    def __init__(self, **values):
        super().__init__(**values)


@dataclass(frozen=True)
class Helps(Augment):
    transform_fn: Callable[[Any], Any] = abs

    def transforms(self, x):
        return [f() for f in (lambda: self.untransform(x),)]

    def untransform(self, x):
        return x

    def transform(self, key, batch):
        return self.transforms(batch)[0]


def test_classes_that_are_unusual_and_right_are_accepted():
    assert Config(model=Fills()).model.rate == 0.1
    for augment in (Constant(), Slotted(), Forwards(flip="random"), Helps()):
        assert Config(augment=augment).augment is augment


def test_a_default_of_a_mixin_has_no_effect_and_is_refused():
    with pytest.raises(
        UserError, match=r"`augment` must declare its values as fields, got Flips\.flip, which is not a"
    ):
        Mixed()
