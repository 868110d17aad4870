"""One global batch on meshes of simulated devices. Their number is fixed before jax starts, in another process."""

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from cnnjax import Config, train_and_evaluate
from cnnjax.errors import UserError
from cnnjax.seeds import train_seeds
from cnnjax.sharding import AXES, MIN_DIVIDED, Placement, parse_mesh, place

PROGRAM = Path(__file__).parent / "programs" / "devices.py"
# Relative to the norm of the parameters, after an epoch of 25 steps.
BOUND = 1e-5
MESHES = {"data=1": 1, "data=2": 2, "data=8": 8, "model=8": 8, "data=4,model=2": 8}
MODEL = {"model=8": 8, "data=4,model=2": 2}  # How many devices divide an array.


def run_program(*arguments):
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def on(prepared_dir, tmp_path_factory):
    """What a run did on each mesh."""
    return run_program("dense", prepared_dir, tmp_path_factory.mktemp("devices"))


@pytest.fixture(scope="module")
def convolutions(prepared_dir, tmp_path_factory):
    """How a convolutional network communicates, with XLA's kernels (0) and with oneDNN's (1), if it is installed."""
    return run_program("convolutions", prepared_dir, tmp_path_factory.mktemp("convolutions"))


def results(found, kind):
    """Returns the shapes [dtype, dimensions] that the collectives of a kind return, without numbers and pairs."""
    arrays = [result for name, results in found["collectives"] if name == kind for result in results]
    return sorted(shape for dtype, shape in arrays if dtype == "f32" and math.prod(shape) > 2)


def shapes_of_params(found):
    return {name: shape for name, shape, _ in found["state"] if name.startswith("0/")}


def divided(found):
    """Returns the shapes of the parameters that devices hold in parts."""
    return sorted(shape for name, shape, parts in found["state"] if name.startswith("0/") and parts != [shape])


def test_the_bytes_of_a_state_that_a_device_holds():
    placement = Placement(AbstractMesh((2, 4), AXES, axis_types=(AxisType.Auto,) * 2))
    state = {"kernel": jax.ShapeDtypeStruct((256, 128), jnp.float32), "bias": jax.ShapeDtypeStruct((128,), jnp.float32)}
    assert placement.bytes_per_device(state) == 4 * (256 * 128 // 4 + 128)


def test_initial_parameters_are_the_same_bits_and_never_on_one_device(on):
    assert len({on[mesh]["initial"] for mesh in MESHES}) == 1
    for mesh, parts in MODEL.items():  # Two kernels and their momentum, nearly all of the state, are divided.
        assert on[mesh]["initial bytes"] < 1.1 * on["data=8"]["initial bytes"] / parts


def test_batches_and_dropout_masks_are_the_same_bits(on):
    assert on["data=1"]["count"] == 25
    for key in ("batches", "count", "dropout"):
        assert len({on[mesh][key] for mesh in MESHES}) == 1, key


def test_devices_share_the_batch(on):
    for mesh, size in MESHES.items():
        assert on[mesh]["examples per device"] == [16 // size] * size
        assert on[mesh]["programs"] == 1


def test_parameters_agree_up_to_rounding(on):
    assert on["data=1"]["moved"] > 1000 * BOUND
    for mesh in MESHES:
        assert on[mesh]["distance"] <= BOUND
        assert on[mesh]["loss"] == pytest.approx(on["data=1"]["loss"], rel=1e-5)


def test_each_device_holds_the_state_or_its_part_of_large_arrays(on):
    for mesh in MESHES:
        for name, shape, parts in on[mesh]["state"]:
            (part,) = parts  # The devices hold equal ones.
            is_divided = mesh in MODEL and math.prod(shape) >= MIN_DIVIDED
            assert math.prod(part) * (MODEL[mesh] if is_divided else 1) == math.prod(shape), (mesh, name)
    for mesh in MODEL:  # Two kernels, and their momentum.
        assert sum(parts != [shape] for _, shape, parts in on[mesh]["state"]) == 4


@pytest.mark.parametrize("step", ["without_placement", "by_example"])
def test_a_users_step_keeps_the_state_divided(on, step):
    assert on[step]["distance"] <= BOUND
    assert on[step]["state"] == on["data=4,model=2"]["state"]
    assert on[step]["programs"] == 1


def check_only_gradients_are_added(found):
    assert {kind for kind, _ in found["collectives"]} == {"all-reduce"}
    assert len(shapes_of_params(found)) > 4
    assert results(found, "all-reduce") == sorted(shapes_of_params(found).values())


def check_each_divided_parameter_is_gathered_alone(found):
    assert {kind for kind, _ in found["collectives"]} == {"all-gather", "all-reduce"}
    gathered = [results for kind, results in found["collectives"] if kind == "all-gather"]
    assert max(map(len, gathered)) == 1  # XLA could combine them.
    assert results(found, "all-gather") == divided(found)  # No activations of the batch, for example.
    assert len(gathered) == len(divided(found)) >= 2
    # Gradients, whole or divided: among those that hold parts, and then among those that hold the same part.
    params = [(tuple(shape), tuple(parts[0])) for name, shape, parts in found["state"] if name.startswith("0/")]
    added = {tuple(shape) for shape in results(found, "all-reduce")}
    assert added <= {shape for both in params for shape in both}
    assert all({*both} & added for both in params)
    assert len(results(found, "all-reduce")) <= len(params) + len(divided(found))


def test_copies_of_the_state_only_add_up_their_gradients(on):
    check_only_gradients_are_added(on["data=8"])


@pytest.mark.parametrize("mesh", MODEL)
def test_each_divided_parameter_is_gathered_alone_and_nothing_else_is(on, mesh):
    check_each_divided_parameter_is_gathered_alone(on[mesh])


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["0", "1"])
def test_convolutions_communicate_no_more(convolutions, kernels):
    check_only_gradients_are_added(convolutions[f"data=8 {kernels}"])
    check_each_divided_parameter_is_gathered_alone(convolutions[f"data=4,model=2 {kernels}"])


def test_a_run_uses_all_devices(on):
    assert on["run on 8"]["sha256"]["params"] == on["data=8"]["params"]
    assert on["run on 8"]["num_test_examples"] == 170


def test_the_largest_number_of_devices_that_divides_the_batch(on):
    assert on["6 examples on 4"] == 3
    assert place(16).num_devices == len(jax.devices())


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("data=8", (8, 1)),
        ("model=8", (1, 8)),
        ("data=4,model=2", (4, 2)),
        ("model=2,data=4", (4, 2)),
        ("data=1", (1, 1)),
    ],
)
def test_a_mesh_is_parsed(text, sizes):
    assert parse_mesh(text) == sizes


@pytest.mark.parametrize(
    "text",
    ["", "8", "data", "data=", "data=0", "data=-2", "data=2,", "data=2,data=2", "data=2,data=4", "batch=2", "data=2.0",
     "data=2;model=2", "data=2, model=2", "DATA=2", "data=02", "data=1000000000", "data=2model=2"],
)  # fmt: skip
def test_anything_else_is_refused(text):
    with pytest.raises(
        UserError, match="`mesh` must be sizes of the axes data and model, such as data=8 or data=4,mod"
    ):
        parse_mesh(text)


def data_that_must_not_be_loaded():
    raise AssertionError


@pytest.mark.parametrize("train", [train_and_evaluate, partial(train_seeds, seeds=(0, 1))])
def test_a_mesh_of_another_form_is_refused_before_the_data_are_loaded(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"`mesh` must be sizes of the axes data and model, .* got 'eight'"):
        train(Config(dataset=data_that_must_not_be_loaded), mesh="eight")
    assert not [*tmp_path.iterdir()]


class Device:
    """A device of a process that does not exist."""

    def __init__(self, process_index):
        self.process_index = process_index


@pytest.mark.parametrize(
    ("batch_size", "processes", "mesh", "message"),
    [
        (16, [0], "data=2", "`mesh` must be at most as large as the number of devices, got data=2 on 1 device."),
        (16, [0] * 4, "data=4,model=2", "at most as large as the number of devices, got data=4,model=2 on 4 devices."),
        (15, [0] * 4, "data=2,model=2", "`batch_size` must be a multiple of the 4 devices of the mesh, got 15."),
        (15, [0, 0, 1, 1], None, "`batch_size` must be a multiple of the 4 devices of several processes, which share"),
        (
            16,
            [0, 0, 1, 1],
            "data=2",
            "`mesh` must be all 4 devices of several processes, which share each batch, got d",
        ),
    ],
)
def test_a_mesh_that_does_not_fit(batch_size, processes, mesh, message):
    with pytest.raises(UserError, match=message):
        place(batch_size, [Device(index) for index in processes], mesh)


def placement_of(data, model):
    """Returns a placement on devices that do not exist."""
    mesh = AbstractMesh((data, model), AXES, axis_types=(AxisType.Auto,) * 2)
    return Placement(mesh)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((784, 512), PartitionSpec("model")),
        ((512, 784), PartitionSpec(None, "model")),
        ((512, 512), PartitionSpec("model")),  # Of equals, the first.
        ((3, 3, 64, 64), PartitionSpec(None, None, "model")),
        ((783, 512), PartitionSpec(None, "model")),  # 4 does not divide 783.
        ((783, 511), PartitionSpec()),
        ((MIN_DIVIDED,), PartitionSpec("model")),
        ((MIN_DIVIDED - 4,), PartitionSpec()),
        ((), PartitionSpec()),
    ],
)
def test_the_largest_dimension_that_can_be_divided_is(shape, spec):
    state = {"params": jax.ShapeDtypeStruct(shape, jnp.float32)}
    assert placement_of(2, 4).of_state(state)["params"].spec == spec
    assert placement_of(8, 1).of_state(state)["params"].spec == PartitionSpec()


def test_one_process_holds_all_rows():
    assert place(6).local_rows(6).tolist() == np.arange(6).tolist()
