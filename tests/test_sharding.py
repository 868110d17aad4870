"""One global batch on 1, 2, 4 and 8 simulated devices. Their number is fixed before jax starts, in another process."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from cnnjax.sharding import place

PROGRAM = Path(__file__).parent / "programs" / "devices.py"
# Relative to the norm of the parameters, after an epoch of 25 steps. Adam, which divides by the size of the gradient,
# lets rounding grow with the steps.
BOUND = 1e-5


@pytest.fixture(scope="module")
def on(prepared_dir, tmp_path_factory):
    """What a run did on 1, 2, 4 and 8 devices, by their number."""
    command = [sys.executable, str(PROGRAM), str(prepared_dir), str(tmp_path_factory.mktemp("devices"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {int(name) if name.isdecimal() else name: value for name, value in found.items()}


def test_batches_and_dropout_masks_are_the_same_bits(on):
    assert on[1]["count"] == 25
    for key in ("batches", "count", "dropout"):
        assert len({on[n][key] for n in (1, 2, 4, 8)}) == 1, key


def test_devices_share_the_batch_and_each_holds_the_state(on):
    for n in (1, 2, 4, 8):
        assert on[n]["devices of a batch"] == n
        assert on[n]["whole batch on each device"] == (n == 1)
        assert on[n]["whole state on each device"]
        assert on[n]["programs"] == 1


def test_parameters_agree_up_to_rounding(on):
    for n in (2, 4, 8):
        assert on[n]["distance"] <= BOUND
        assert on[n]["loss"] == pytest.approx(on[1]["loss"], rel=1e-5)


def test_a_run_uses_all_devices(on):
    assert on["run on 8"]["sha256"]["params"] == on[8]["params"]
    assert on["run on 8"]["num_test_examples"] == 170


def test_the_largest_number_of_devices_that_divides_the_batch(on):
    assert on["6 examples on 4"] == 3
    assert place(16).num_devices == len(jax.devices())
