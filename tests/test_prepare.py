"""What can be known before the first step is an error before the first step."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax import SGD, Augment, Config, Mixup, Optimizer, ParamGroup, Report, UserError, memory, train_and_evaluate
from cnnjax import prepare as prepare_module
from cnnjax.data.stored import Examples
from cnnjax.files import tree_sha256
from cnnjax.inputs import load_inputs
from cnnjax.memory import explain_out_of_memory, largest_result
from cnnjax.prepare import oddities

pytestmark = pytest.mark.usefixtures("quick_compilation")


def arrays(shape=(4, 5, 3), num_classes=3):
    rng = np.random.default_rng(0)
    image, label = rng.integers(0, 256, (60, *shape), dtype=np.uint8), np.arange(60) % num_classes
    return image[:40], label[:40], image[40:], label[40:]


class Net(nn.Module):
    """A linear network, with a mistake."""

    mistake: str = ""
    width: int = 4
    num_classes: int = 10

    @nn.compact
    def __call__(self, image, *, train):
        if self.mistake == "train" and train:
            raise ValueError("in training\nonly")
        if self.mistake == "init" and self.is_initializing():
            raise KeyError("init")
        if self.mistake == "no parameters":
            return image.mean((1, 2))
        init = nn.initializers.constant(jnp.nan) if self.mistake == "nan" else nn.initializers.ones
        x = nn.Dense(self.width, kernel_init=init)(image.reshape(len(image), -1))
        if self.mistake == "gradient":
            x = host_square(x)
        if self.mistake == "dtype":
            mean = self.variable("batch_stats", "mean", jnp.zeros, ())
            if train:
                mean.value = jnp.zeros((), jnp.float16)
        x = nn.Dense(self.num_classes)(x)
        return x.astype(jnp.int32) if self.mistake == "int" else x

    def init_from_data(self, variables, image):
        if self.mistake == "init_from_data":
            raise ValueError("data")
        return variables


@jax.custom_vjp
def host_square(x):
    return x * x


def backward(x, g):
    raise NotImplementedError("no gradient")


host_square.defvjp(lambda x: (x * x, x), backward)


@dataclass(frozen=True)
class Strange(Optimizer):
    mistake: str = ""

    def transform(self, learning_rate: Any) -> optax.GradientTransformation:
        if self.mistake == "transform":
            raise ValueError("transform")

        def update(updates, state, params=None):
            if self.mistake == "update":
                raise ValueError("update")
            return updates, state.astype(jnp.float16) if self.mistake == "state" else state

        return optax.GradientTransformation(lambda params: jnp.zeros(()), update)


@dataclass(frozen=True)
class Broken(Augment):
    mistake: str = ""

    def transform(self, key, batch):
        if self.mistake == "error":
            raise ValueError("transform of images")
        if self.mistake in ("bytes", "pixels"):
            return batch._replace(image=batch.image.astype(jnp.uint8) if self.mistake == "bytes" else batch.image)
        if self.mistake == "mask":
            return batch._replace(mask=jnp.zeros_like(batch.mask))
        return batch._replace(label=jax.nn.one_hot(batch.label, 7) if self.mistake == "classes" else batch.label[:-1])

    def transform_pixels(self, key, image):
        return image > 0 if self.mistake == "pixels" else image

    def at_epoch(self, epoch, num_epochs):
        return None if self.mistake == "at_epoch" else self

    def check_size(self, image_size):
        if self.mistake == "check_size":
            raise ValueError("check_size")


@dataclass(frozen=True)
class PerChannel(SGD):
    def make_schedule(self, num_updates):
        return lambda update: jnp.array([0.1, 0.2, 0.3])


class Named(nn.Module):
    names: Any
    num_classes: int = 10

    @nn.compact
    def __call__(self, image):
        return nn.Dense(self.num_classes)(nn.relu(nn.Dense(4)(image.reshape(len(image), -1))))

    def depths(self):
        return self.names


@dataclass(frozen=True)
class Weighted:
    num_classes: int = 10
    weights: tuple[float, ...] = field(default=(1.0,) * 10)

    def __post_init__(self):
        if len(self.weights) != self.num_classes:
            raise ValueError("weights")

    def __call__(self, logits, batch):
        return logits.mean(1)


def failing_loss(logits, batch):
    raise ZeroDivisionError


def mean_loss(logits, batch):
    return (logits**2).mean()


def failing_metrics(logits, label):
    raise LookupError("metrics")


def no_dict(logits, label):
    return (logits.argmax(1) == label).mean()


def per_class(logits, label):
    return {"recall": np.eye(3).mean(0)}


def ragged(logits, label):
    return {"counts": [[1], [2, 3]]}


def percent(logits, label):
    return {"top-2": 0.5}


def taken(logits, label):
    return {"accuracy": 0.5}


def top2(logits, label):
    return {"top2": 0.5}


@dataclass
class Counter:
    calls: int = 0

    def __call__(self, logits, label):
        self.calls += 1
        return {"calls": self.calls}


def arrays_of_two_classes():
    return arrays(num_classes=2)


def failing_data():
    return np.load("no-such-file.npy")


def three_arrays():
    return arrays()[:3]


CONFIG = Config(dataset=arrays, num_epochs=1, batch_size=16, model=Net(), optim=SGD())


def line_of(text):
    """Returns where this file contains a text for the first time."""
    lines = Path(__file__).read_text().splitlines()
    return f"test_prepare.py, line {next(i for i, line in enumerate(lines, 1) if text in line)}"


def refused(tmp_path, **changes):
    """Returns the error of a run that must not begin."""
    with pytest.raises(UserError) as error:
        train_and_evaluate(replace(CONFIG, **changes), run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert "\n" not in str(error.value)
    return error.value


@pytest.mark.parametrize(
    ("changes", "part", "line", "text"),
    [
        ({"model": Net("init")}, "`model`", 'raise KeyError("init")', "KeyError: 'init'."),
        ({"model": Net("train")}, "`model`", 'raise ValueError("in training', "ValueError: in training only."),
        (
            {"model": Net("gradient")},
            "The training step of `model`, `loss` and `optim`",
            'raise NotImplementedError("no gradient")',
            "NotImplementedError: no gradient.",
        ),
        (
            {"model": Net("init_from_data")},
            "`model.init_from_data`",
            'raise ValueError("data")',
            "ValueError: data.",
        ),
        ({"optim": Strange(mistake="transform")}, "`optim`", 'ValueError("transform")', "ValueError: transform."),
        (
            {"optim": Strange(mistake="update")},
            "`optim` must accept gradients, parameters, and any of",
            'ValueError("update")',
            "ValueError: update.",
        ),
        (
            {"augment": Broken(mistake="error")},
            "`augment.transform`",
            'ValueError("transform of',
            "ValueError: transform of images.",
        ),
        ({"augment": Broken(mistake="check_size")}, "`augment`", '("check_size")', "ValueError: check_size."),
        ({"loss": Weighted()}, "The configuration", '("weights")', "ValueError: weights."),
        ({"metrics": failing_metrics}, "`metrics`", 'LookupError("metrics")', "LookupError: metrics."),
        (
            {"dataset": failing_data},
            "`dataset`",
            'np.load("no',
            "FileNotFoundError: [Errno 2] No such file or directory: 'no-such-file.npy'.",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_exception_in_the_users_code_is_one_line(changes, part, line, text, tmp_path):
    error = refused(tmp_path, **changes)
    assert str(error).startswith(f"{part} ")
    assert f"{line_of(line)}: {text}" in str(error)
    assert error.__cause__ is not None and type(error.__cause__).__name__ == text.partition(":")[0]


def test_the_augmentation_of_an_epoch_must_be_one(tmp_path):
    rule = "`augment.at_epoch` must be a method that returns an Augment"
    assert str(refused(tmp_path, augment=Broken(mistake="at_epoch"))) == f"{rule}, got None for epoch 0."


def test_an_exception_in_the_users_loss_names_its_arguments(tmp_path):
    error = refused(tmp_path, loss=failing_loss)
    assert "`loss` must accept logits float32[16, 3] and a batch with the label int32[16], " in str(error)
    assert f"{line_of('raise ZeroDivisionError')}: ZeroDivisionError. It is called as loss(logits" in str(error)
    error = refused(tmp_path, loss=optax.softmax_cross_entropy_with_integer_labels)
    assert str(error).endswith("wrap it: `def loss(logits, batch): return f(logits, batch.label)`.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": Net("no parameters")}, "`model` must have parameters to train, got [] from Net."),
        ({"model": Net("nan")}, "`model` must be initialized with finite parameters, got an infinite one or nan."),
        (
            {"model": Net("dtype")},
            "`model` must keep the shape and dtype of its state: .model_state['batch_stats']['mean'] was float32[] and "
            "became float16[].",
        ),
        (
            {"optim": Strange(mistake="state")},
            "`optim` must keep the shape and dtype of its state: .opt_state was float32[] and became float16[].",
        ),
        (
            {"augment": Broken(mistake="classes")},
            "`batch.label` must be class indices, int [B], or probabilities, float [B K], for the cross-entropy with "
            "logits [B K] of shape (16, 3), got float32[16, 7].",
        ),
        (
            {"loss": mean_loss},
            "`loss` must return floating-point values of shape (16,), one per example, got float32[].",
        ),
        (
            {"augment": Broken(mistake="labels")},
            "`augment.transform` must return labels of shape (16,), got int32[15].",
        ),
        (
            {"dataset": three_arrays},
            "`dataset` must be a tuple of arrays `(x_train, y_train, x_test, y_test)` or `(x_train, y_train, "
            "x_validation, y_validation, x_test, y_test)`, got a tuple of 3.",
        ),
        ({"model": Net("int")}, "`model` must return floating-point logits, got int32[16, 3]."),
        (
            {"augment": Broken(mistake="bytes")},
            "`augment.transform` must return images of floating-point numbers, got uint8[16, 4, 5, 3].",
        ),
        (
            {"augment": Broken(mistake="pixels")},
            "`augment.transform_pixels` must return images of dtype uint8 or float32, got bool[16, 4, 5, 3].",
        ),
        (
            {"optim": PerChannel()},
            "`optim.make_schedule` must be a method that returns a function of the number of updates, a single rate, "
            "got float32[3].",
        ),
        (
            {"optim": SGD(groups=(ParamGroup(".", start_epoch=2),))},
            "`optim` must be an optimizer that trains some parameters, got groups that freeze all of them.",
        ),
        (
            {"model": Named(("Dense_1",)), "optim": SGD(freeze_epochs=1)},
            "`model.depths` must be a method that returns all top-level names of the parameters, got a result without "
            "['Dense_0']. List them, or give them a group in `optim.groups`.",
        ),
        (
            {"model": Named(("Dense_0", "Dense_0")), "optim": SGD(freeze_epochs=1)},
            "`model.depths` must be a method that returns different names, got ('Dense_0', 'Dense_0').",
        ),
        (
            {"model": Named(None), "optim": SGD(freeze_epochs=1)},  # type: ignore
            "`model.depths` failed at ",
        ),
        (
            {"metrics": no_dict},
            "`metrics` must return {name: number}, got float64[].",
        ),
        (
            {"metrics": per_class},
            "`metrics` must return {name: number}, got {'recall': float64[3]}.",
        ),
        (
            {"metrics": percent},
            "`metrics` must return names of ASCII letters, digits and underscores that begin with a letter, got "
            "'top-2'. Rename it.",
        ),
        ({"metrics": ragged}, "`metrics` must return {name: number}, got {'counts': ((1), (2, 3))}."),
        (
            {"metrics": taken},
            "`metrics` must not name a score loss, accuracy, balanced_accuracy, macro_precision, macro_recall, "
            "macro_f1, confusion_matrix, got 'accuracy'. Rename it.",
        ),
        (
            {"metrics": top2, "best_by": "top3"},
            "`best_by` must be a known name, got 'top3'. Did you mean top2?",
        ),
        (
            {"num_epochs": 2**31 - 1},
            "`num_epochs` must be a number that gives fewer than 2**31 steps, got 2147483647 epochs of 3 steps.",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_step_can_use(changes, message, tmp_path):
    assert str(refused(tmp_path, **changes)).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"metrics": Counter},
            "`metrics` must be a function (logits, label), or None, got the class Counter. Crea",
        ),
        ({"metrics": 3}, "`metrics` must be a function (logits, label), or None, got 3."),
        (
            {"metrics": Counter()},
            "`metrics` must be hashable, got Counter(calls=0) (unhashable type: 'Counter'). ",
        ),
        (
            {"best_by": "auroc"},
            "`best_by` must be accuracy, balanced_accuracy, loss, or a name that `metrics` returns",
        ),
    ],
)
def test_metrics_are_a_function_that_does_not_change(changes, message):
    with pytest.raises(UserError) as error:
        replace(CONFIG, **changes)
    assert str(error.value).startswith(message)


def test_a_batch_without_an_example_is_an_error(tmp_path):
    message = r"^`augment\.transform` .* must leave at least one example of each batch unmasked, got none in step 1\.$"
    with pytest.raises(UserError, match=message):
        train_and_evaluate(replace(CONFIG, augment=Broken(mistake="mask")), run_dir=tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"model": Named(("Dense_0", "Dense_1")), "optim": SGD(freeze_epochs=5)},
            "`optim.freeze_epochs` is 5: only the head is trained, because the run ends after 2 epochs.",
        ),
        (
            {"optim": SGD(groups=(ParamGroup("^Dense_0/", start_epoch=2),))},
            "`optim.groups`: '^Dense_0/' begins in epoch 3 and is never trained, because the run ends after 2 epochs.",
        ),
        (
            {
                "model": Named(("Dense_0", "Dense_1")),
                "optim": SGD(freeze_epochs=1, groups=(ParamGroup("^Dense_0/kernel", start_epoch=9),)),
            },
            "`optim.groups`: '^Dense_0/kernel' begins in epoch 10 and is never trained, because the run ends after 2 "
            "epochs.",
        ),
        ({"model": Named(("Dense_1",)), "optim": SGD(freeze_epochs=1, groups=(ParamGroup("^Dense_0/"),))}, None),
        ({"optim": SGD(groups=(ParamGroup("^Dense_0/", num_epochs=0),))}, None),
        ({"optim": SGD(groups=(ParamGroup("^Dense_0/", start_epoch=1),))}, None),
    ],
)
def test_parameters_that_would_thaw_after_the_end_are_named(changes, line, tmp_path):
    lines = []
    report = Report(quiet=True)
    report.say = lines.append
    train_and_evaluate(replace(CONFIG, num_epochs=2, **changes), run_dir=tmp_path / "run", report=report)
    assert [x for x in lines if "trained" in x] == ([line] if line else [])


@pytest.mark.parametrize("stream", [0, 1, "no"])
def test_streaming_is_a_bool(stream, tmp_path, no_type_checks):
    with pytest.raises(UserError, match=rf"`stream` must be True, False or None, got {stream!r}\."):
        train_and_evaluate(CONFIG, run_dir=tmp_path / "run", stream=stream)


@pytest.mark.parametrize("path", ["", 5])
@pytest.mark.parametrize("name", ["run_dir", "data_dir"])
def test_paths_are_paths_and_not_empty(name, path, no_type_checks):
    with pytest.raises(UserError, match=rf"`{name}` must be a path or None, got {path!r}\."):
        train_and_evaluate(CONFIG, **{name: path})


def test_what_is_probably_a_mistake_is_said():
    examples = Examples(np.zeros((6, 3, 32, 32), np.uint8), np.array([1, 2, 4, 1, 2, 4]))
    assert [*oddities(examples, 5)] == [
        "The images have 3×32 pixels with 32 channels: is their layout [N C H W] instead of [N H W C]?",
        "No training image has the label 0, 3, of 0 to 4.",
    ]
    assert [*oddities(Examples(np.zeros((3, 3, 4, 3), np.uint8), np.arange(3)), 3)] == []


# --- Memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [10**9, 2**63 - 1])
def test_a_network_that_no_memory_holds(width, tmp_path):
    error = str(refused(tmp_path, model=Net(width=width)))
    num_params = 60 * width + width + width * 3 + 3
    assert f"of memory, got {num_params:,} parameters. Training needs at least " in error
    assert error.endswith("Lower the size of the network.")


def test_the_limit_is_the_state_its_copy_the_first_checkpoint_and_the_data(tmp_path, monkeypatch):
    """Of SGD: the parameters, their momentum, the number of the step and that of the update."""
    num_params = 60 * 4 + 4 + 4 * 3 + 3
    needed = 3 * (4 * 2 * num_params + 4 + 4) + 40 * (60 + 4) + 2 * 2 * 3 * 4
    config = replace(CONFIG, validation_fraction=0.0)
    monkeypatch.setattr(prepare_module, "device_memory", lambda device: needed - 1)
    with pytest.raises(UserError, match=rf"`model` must fit into the 0\.0 GiB of memory, got {num_params} parameters"):
        train_and_evaluate(config, run_dir=tmp_path / "run", devices=jax.devices()[:1])
    monkeypatch.setattr(prepare_module, "device_memory", lambda device: needed)
    monkeypatch.setattr(prepare_module, "init_train_state", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # It would begin.
        train_and_evaluate(config, run_dir=tmp_path / "run", devices=jax.devices()[:1])


def test_images_that_no_memory_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "device_memory", lambda device: 40 * (60 + 4) - 1)
    message = "`dataset` must fit into the 0.0 GiB of memory, got images of 0.0 GiB. "
    assert str(refused(tmp_path)) == message + "Images from files can be read while training: stream=True."


class Products(nn.Module):
    """Few parameters, and a layer of 10,000 values per image."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, image, *, train):
        x = jnp.broadcast_to(image.mean((1, 2))[:, None], (len(image), 10_000, 3))
        return nn.Dense(self.num_classes)(nn.Dense(1)(x).mean(1))


def test_a_batch_that_no_memory_holds(tmp_path, monkeypatch):
    """A value counts two bytes."""
    monkeypatch.setattr(prepare_module, "device_memory", lambda device: 16 * 10_000 * 2)
    assert str(refused(tmp_path, model=Products())).endswith("Lower `batch_size` (now 16).")


def test_the_largest_result_of_a_program_equals_hand_computed_sizes():
    def bytes_of(function, *shapes):
        args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return largest_result(jax.make_jaxpr(function)(*args).jaxpr)

    assert bytes_of(lambda a, b: a @ b, (3, 5), (5, 7)) == 3 * 7 * 2
    assert bytes_of(lambda a, b: a @ b, (3, 1), (1, 7)) == 0  # An outer product may be fused.
    assert bytes_of(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (9, 3, 5), (9, 5, 7)) == 3 * 7 * 2
    assert bytes_of(lambda a, b: jnp.exp(a + b), (3, 7), (3, 7)) == 0
    assert bytes_of(jax.jit(lambda a, b: (a @ b).sum()), (3, 5), (5, 7)) == 3 * 7 * 2
    scanned = lambda a, b: jax.lax.scan(lambda c, x: (c, x @ b), 0.0, a)  # noqa: E731
    assert bytes_of(scanned, (9, 3, 5), (5, 7)) == 3 * 7 * 2
    assert bytes_of(jax.grad(lambda b, a: (a @ b).sum()), (50, 70), (3, 50)) == 50 * 70 * 2
    conv = lambda a, b: jax.lax.conv(a, b, (1, 1), "SAME")  # noqa: E731
    assert bytes_of(conv, (2, 3, 8, 9), (5, 3, 3, 3)) == 2 * 5 * 8 * 9 * 2


def test_the_memory_of_a_cpu_is_the_least_of_its_limits(monkeypatch):
    cpu, read_text = jax.devices("cpu")[0], Path.read_text
    total = memory.device_memory(cpu)
    assert total is not None and 2**28 < total < 2**60
    limits = {}
    monkeypatch.setattr(memory, "_read_int", lambda path: limits.get(str(path), -1))
    groups = "4:cpu,memory:/a/b\n0::/c\n"
    monkeypatch.setattr(Path, "read_text", lambda self: groups if "proc" in str(self) else read_text(self))
    limits["/sys/fs/cgroup/memory.max"] = 2**27
    assert memory.device_memory(cpu) == 2**27
    limits["/sys/fs/cgroup/c/memory.max"] = 2**26
    assert memory.device_memory(cpu) == 2**26
    limits["/sys/fs/cgroup/memory/a/memory.limit_in_bytes"] = 2**25
    assert memory.device_memory(cpu) == 2**25
    monkeypatch.setattr(memory.resource, "getrlimit", lambda which: (2**24, 2**24))
    assert memory.device_memory(cpu) == 2**24


def exhausted(*args, **options):
    raise MemoryError


def test_an_out_of_memory_error_is_one_line(tmp_path):
    for exhaust in (lambda: np.empty(2**60, np.uint8), lambda: jnp.zeros(2**50, jnp.uint8).block_until_ready()):
        with pytest.raises(UserError, match=r"^The run must fit into memory, got: .*[^.]\. Lower `batch_size` or the "):
            with explain_out_of_memory():
                exhaust()
    with pytest.raises(UserError, match=r"^The run must fit into memory, got: MemoryError\. Lower `batch_size`"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("cnnjax.train.fit", exhausted)
            train_and_evaluate(CONFIG, run_dir=tmp_path / "run")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        with explain_out_of_memory():
            raise jax.errors.JaxRuntimeError("INTERNAL: something else")


# --- What fits --------------------------------------------------------------------------------------------------------


TRACES: list[bool | str] = []


class Counted(nn.Module):
    """A network with statistics that counts how often it is traced."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, image, *, train):
        TRACES.append("init" if self.is_initializing() else train)
        x = nn.BatchNorm(use_running_average=not train)(image.reshape(len(image), -1))
        return nn.Dense(self.num_classes)(x)


def test_the_first_step_uses_the_trace_of_the_check(tmp_path):
    """In training the network is traced once by itself, and once in the step. Labels may be class probabilities."""
    config = replace(CONFIG, model=Counted(), augment=Mixup(), num_epochs=2)
    train_and_evaluate(config, run_dir=tmp_path / "run")
    assert TRACES.count(True) == 2
    assert TRACES.count("init") == 2  # For the checks, and for the initial state.


LAYERS = [nn.Dense(3)]


class Edited(nn.Module):
    """Calls code that its class does not contain, as a cell of a notebook does."""

    @nn.compact
    def __call__(self, image):
        x = image.reshape(len(image), -1)
        for layer in LAYERS:
            x = layer.copy()(x)
        return x


def test_code_that_is_corrected_after_a_refusal_is_traced_again(tmp_path, monkeypatch):
    config = replace(CONFIG, model=Edited(), dataset=arrays_of_two_classes)
    with pytest.raises(UserError, match=r"`model` must return logits of shape \(16, 2\)"):
        train_and_evaluate(config, run_dir=tmp_path / "run")
    monkeypatch.setattr(f"{__name__}.LAYERS", [nn.Dense(5), nn.Dense(2)])
    train_and_evaluate(config, run_dir=tmp_path / "run")


FACTORS = {
    "initial": 1.0,
    "model": 1.0,
    "array": np.ones((1, 2), np.float32),
    "augment": 1.0,
    "loss": 1.0,
    "optim": 1.0,
}


class Scaled(nn.Module):
    """Multiplies its logits by numbers that its class does not contain."""

    @nn.compact
    def __call__(self, image):
        return jax.jit(lambda x: x * FACTORS["array"])(nn.Dense(2)(image.reshape(len(image), -1))) * FACTORS["model"]

    def init_from_data(self, variables, image):
        return jax.tree.map(initial, variables)


@jax.jit
def initial(x):
    return x * FACTORS["initial"]


@dataclass(frozen=True)
class ScaledImages(Augment):
    def transform(self, keys, batch):
        return batch._replace(image=batch.image * FACTORS["augment"])


@dataclass(frozen=True)
class ScaledSGD(Optimizer):
    def transform(self, learning_rate):
        return optax.sgd(lambda step: 0.1 * FACTORS["optim"])


def scaled_loss(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.label) * FACTORS["loss"]


SCALED = {"model": Scaled(), "optim": ScaledSGD(), "augment": ScaledImages(), "loss": scaled_loss}


def test_what_the_code_of_a_user_calls_is_compared_with_the_last_run(monkeypatch):
    edited = []
    monkeypatch.setattr(jax, "clear_caches", lambda: edited.append(part))
    config = replace(CONFIG, dataset=arrays(num_classes=2), **SCALED)
    inputs = load_inputs(config)
    for part in (None, None, *FACTORS):
        if part is not None:
            monkeypatch.setitem(FACTORS, part, FACTORS[part] * 0.5)
        prepare_module.set_up(config, inputs, None, title="", say=print)
    assert [*dict.fromkeys(edited)] == [*FACTORS]


def test_edited_code_is_used_in_the_next_run(tmp_path, monkeypatch):
    config = replace(CONFIG, dataset=arrays(num_classes=2), **SCALED)

    def outcome(name):
        run = train_and_evaluate(config, run_dir=tmp_path / name)
        probabilities = run.predict(config.dataset[2])
        return tree_sha256(run.state.params), run.history["validation_loss"].tolist(), probabilities.tolist()

    before = outcome("before")
    for part, value in FACTORS.items():
        monkeypatch.setitem(FACTORS, part, value * 0.5)
    edited = outcome("edited")
    assert all(new != old for new, old in zip(edited, before, strict=True))
    jax.clear_caches()
    assert outcome("afresh") == edited


def test_an_edited_network_is_evaluated_anew_beside_another_optimizer(tmp_path, monkeypatch):
    """Then the steps are another program, but the evaluation is not."""
    config = replace(CONFIG, dataset=arrays(num_classes=2), model=Scaled(), num_epochs=1)
    train_and_evaluate(config, run_dir=tmp_path / "before")
    monkeypatch.setitem(FACTORS, "model", 0.0)
    run = train_and_evaluate(replace(config, optim=SGD(learning_rate=0.01)), run_dir=tmp_path / "edited")
    assert run.history["validation_loss"] == pytest.approx(np.log(2))


def test_equal_code_is_not_traced_again(tmp_path):
    config = replace(CONFIG, dataset=arrays(num_classes=2), model=Counted(), optim=SGD())
    TRACES.clear()
    train_and_evaluate(config, run_dir=tmp_path / "first")
    num_traces = len(TRACES)
    train_and_evaluate(config, run_dir=tmp_path / "second")
    assert len(TRACES) == num_traces + 3  # Of the checks: initialization, evaluation and training.


class Centered(nn.Module):
    """Subtracts the mean of the images from which it is initialized."""

    @nn.compact
    def __call__(self, image):
        mean = self.variable("batch_stats", "mean", jnp.zeros, ())
        return nn.Dense(2)((image - mean.value).reshape(len(image), -1))

    def init_from_data(self, variables, image):
        return {**variables, "batch_stats": {"mean": image.mean()}}


@pytest.mark.parametrize(("label", "mean"), [(np.arange(40) // 20, 0), (np.arange(40) % 2, -1)])
def test_a_network_is_initialized_from_the_first_images_unless_each_class_is_a_block(monkeypatch, label, mean):
    monkeypatch.setattr(prepare_module, "INIT_IMAGES", 8)
    image = np.repeat([0, 255], 20).astype(np.uint8)[:, None, None, None] + np.zeros((1, 2, 2, 1), np.uint8)
    config = Config(dataset=(image, label, image, label), model=Centered(), validation_fraction=0.0)
    _, state = prepare_module.set_up(config, load_inputs(config), None, title="", say=print)
    assert float(state.model_state["batch_stats"]["mean"]) == mean
