"""The calls of oneDNN on several devices and under `vmap`, against one device and XLA.

The number of devices is fixed before jax starts, in another process.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cnnjax.onednn import library

pytestmark = pytest.mark.skipif(library.kernels().version is None, reason=str(library.kernels()))
PROGRAM = Path(__file__).parents[1] / "programs" / "partition.py"
ONCE = {"convolution": 1, "image_grad": 1, "kernel_grad": 1}
CLOSE = 2e-6  # Relative to the largest value.


@pytest.fixture(scope="module")
def found():
    """How calls with 16 examples were divided, by case."""
    done = subprocess.run([sys.executable, "-W", "error", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("case", "num_examples"),
    [("batch", 2), ("against XLA", 2), ("two axes", 2), ("scan", 2), ("shard_map", 2), ("shard_map of one axis", 4)],
)
def test_each_device_computes_its_examples(found, case, num_examples):
    assert found[case]["batches"] == [num_examples]
    assert found[case]["gathered"] == []
    assert found[case]["sums"] == 1  # Of both gradients.
    assert found[case]["calls"] == ONCE
    assert found[case]["error"] < CLOSE


def test_batch_norm_adds_up_its_sums_over_all_devices(found):
    assert found["norm"]["error"] < CLOSE
    assert {name: found["norm"][name] for name in ("calls", "batches", "gathered", "sums")} == {
        "calls": {"elementwise": 4},
        "batches": [2],
        "gathered": [],
        "sums": 2,  # Of the forward and of the backward pass.
    }


def test_replicated_arrays_are_not_communicated(found):
    assert found["replicated"] == {"error": 0, "calls": ONCE, "batches": [16], "gathered": [], "sums": 0}


def test_a_replicated_image_is_divided_as_the_gradient_of_the_result_is(found):
    case = dict(found["replicated image"])
    assert case.pop("error") < CLOSE
    assert case == {"calls": ONCE, "batches": [2, 16], "gathered": [], "sums": 1}  # 16: the result itself.


@pytest.mark.parametrize(("case", "num_examples"), [("sharded weights", 2), ("weights on another axis", 4)])
def test_sharded_weights_are_gathered_and_the_batch_is_not(found, case, num_examples):
    assert found[case]["batches"] == [num_examples]
    assert found[case]["error"] < CLOSE
    shapes = {shape.split("{")[0] for shape in found[case]["gathered"]}
    channels_of_g = {"f32[4,9,7,8]"} if case == "weights on another axis" else set()
    assert shapes == {"f32[3,3,5,8]", "f32[8]"} | channels_of_g


@pytest.mark.parametrize(
    ("case", "num_examples"), [("uneven", 15), ("height", 16), ("explicit", 16), ("without Shardy", 16)]
)
def test_any_other_division_is_gathered(found, case, num_examples):
    assert found[case]["batches"] == [num_examples]
    assert found[case]["sums"] == 0
    assert found[case]["error"] == 0  # Each device computes the same bits as one device.


def test_a_training_step_gathers_nothing(found):
    step = found["step"]
    assert step["error"] < CLOSE
    assert step["gathered"] == []
    assert step["batches"] == [8]
    assert {kind: step["calls"][kind] for kind in ONCE} == {"convolution": 4, "image_grad": 3, "kernel_grad": 4}


def test_the_program_of_one_device_has_only_the_calls(found):
    assert found["one device"] == {"same": True, "calls": 3}


def test_programs_that_differ_in_their_options_have_different_keys_in_the_compilation_cache(found):
    without_relu, again, with_relu = found["programs"]  # Without what the keys ignore.
    assert without_relu == again != with_relu


def test_vmap(found):
    assert len(found["vmap"]) == 4
    assert max(found["vmap"].values()) < CLOSE, found["vmap"]


def test_vmap_over_images_is_one_call(found):
    images = found["vmap of images"]
    assert images["error"] < CLOSE
    assert (images["calls"], images["loops"]) == (1, 0)
