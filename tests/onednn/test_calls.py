"""The calls of oneDNN: errors, threads and processes, memory. tests/layers compares their values with NumPy."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from cnnjax.onednn import calls, library

pytestmark = pytest.mark.skipif(library.kernels().version is None, reason=str(library.kernels()))
PROGRAM = Path(__file__).parents[1] / "programs" / "onednn_bits.py"


def test_an_error_of_onednn_names_the_operation_and_the_switch():
    f = jax.jit(partial(calls.convolution, padding=((-1, 0), (0, 0))))
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        f(jnp.zeros((2, 5, 4, 3)), jnp.zeros((3, 3, 3, 8)))
    assert str(raised.value) == (
        "INTERNAL: oneDNN failed to compute a convolution (status 2: invalid arguments), shapes [2 5 4 3] and "
        "[3 3 3 8]. Set CNNJAX_ONEDNN=0 to use XLA's kernels."
    )


def test_the_bits_are_the_same_on_one_and_two_cores_in_many_threads_and_in_children():
    ways = [("1",), ("2",), ("2", "threads"), ("2", "fork"), ("2", "spawn")]
    command = [sys.executable, str(PROGRAM)]
    processes = [subprocess.Popen([*command, *way], stdout=subprocess.PIPE, text=True) for way in ways]
    found = {way: process.communicate(timeout=120)[0] for way, process in zip(ways, processes, strict=True)}
    assert len(found["1",].split()) == 4
    assert found == dict.fromkeys(ways, found["1",])


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_memory_is_freed_with_the_programs():
    def grow(count):
        before = resident_bytes()
        for size in range(count):  # A program of its own each.
            f = jax.jit(partial(calls.kernel_grad, size=(3, 3), padding=((1, 1), (1, 1))))
            jax.block_until_ready(f(jnp.ones((8, 8 + size % 2, 8, 64)), jnp.ones((8, 8 + size % 2, 8, 256))))
            jax.clear_caches()
        return resident_bytes() - before

    grow(10)
    assert grow(30) < 30 * 64 * 256 * 9 * 4 / 2  # Half a kernel each: a leak would keep nine and the code.
