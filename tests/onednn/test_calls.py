"""The calls of oneDNN: errors, threads and processes, memory. tests/layers compares their values with NumPy."""

import ctypes
import gc
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import ClassVar

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
    assert len(found["1",].split()) == 7
    assert found == dict.fromkeys(ways, found["1",])


class Mallinfo2(ctypes.Structure):
    names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_: ClassVar = [(name, ctypes.c_size_t) for name in names]


def heap_bytes():
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo2
    gc.collect()
    found = mallinfo2()
    return found.uordblks + found.hblkhd


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc 2.33 counts the memory")
def test_memory_is_freed_with_the_programs():
    def grow(count):
        before = heap_bytes()
        for size in range(count):  # A program of its own each.
            f = jax.jit(partial(calls.kernel_grad, size=(3, 3), padding=((1, 1), (1, 1))))
            jax.block_until_ready(f(jnp.ones((8, 8 + size % 2, 8, 64)), jnp.ones((8, 8 + size % 2, 8, 256))))
            jax.clear_caches()
        return heap_bytes() - before

    grow(40)
    assert grow(30) < 30 * 6_000  # Bytes: a leaked call site has 18 kB, and 1 kB is XLA's.
