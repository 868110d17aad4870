"""The calls of oneDNN: errors, threads and processes, memory. tests/layers compares their values with NumPy."""

import ctypes
import gc
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax.onednn import calls, elementwise, library

pytestmark = pytest.mark.skipif(library.kernels().version is None, reason=str(library.kernels()))
SAME = ((1, 1), (1, 1))
PROGRAM = Path(__file__).parents[1] / "programs" / "onednn_bits.py"


def test_an_error_of_onednn_names_the_operation_and_the_switch():
    f = jax.jit(partial(calls.convolution, padding=((-1, 0), (0, 0))))
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        f(jnp.zeros((2, 5, 4, 3)), jnp.zeros((3, 3, 3, 8)))
    assert str(raised.value) == (
        "INTERNAL: oneDNN failed to compute a convolution (status 2: invalid arguments), shapes [2 5 4 3] and "
        "[3 3 3 8]. Set CNNJAX_ONEDNN=0 to use XLA's kernels."
    )


def test_sums_over_no_images_are_zero():
    gradients = calls.kernel_grad(jnp.ones((0, 4, 4, 3)), jnp.ones((0, 4, 4, 8)), size=(3, 3), padding=SAME, bias=True)
    assert [(x.shape, bool(x.any())) for x in gradients] == [((3, 3, 3, 8), False), ((8,), False)]
    assert jax.vmap(partial(calls.convolution, padding=SAME), (0, None))(
        jnp.ones((0, 2, 4, 4, 3)), jnp.ones((3, 3, 3, 8))
    ).shape == (0, 2, 4, 4, 8)


def test_the_kernel_gradient_of_a_stride_beyond_the_image_ignores_old_memory():
    """oneDNN reads scratch memory that it did not write."""
    ones = partial(jnp.ones, dtype=jnp.bfloat16)
    for size, values in ((9, 1e30), (1, 1)):  # First fills the memory.
        g = ones((16, -(-size // 2), -(-size // 2), 32))
        found = calls.kernel_grad(values * ones((16, size, size, 16)), g, size=(3, 3), padding=SAME, stride=2)[0]
    assert (found[1, 1] == 16).all()
    assert not found.at[1, 1].set(0).any()


# Images and gradients of an output in bands of a few images, in bands of rows, and with a row of its own band; kernels
# whose rows and columns do not fill the tiles, of a stride, and with different padding on each side.
KERNEL_GRADS = [
    ((61, 7, 6, 16), (3, 3), 32, SAME, 1),
    ((9, 32, 31, 5), (3, 3), 24, SAME, 1),
    ((3, 2, 230, 4), (2, 3), 7, ((1, 0), (2, 1)), 1),
    ((10, 19, 17, 3), (7, 7), 17, ((3, 3), (3, 3)), 2),
    ((17, 5, 5, 12), (1, 1), 33, ((0, 0), (0, 0)), 3),
    ((2, 4, 4, 1), (3, 3), 8, SAME, 1),
]
# Chunks of many images and of parts of one; channels that fill blocks, that do not, and one more than a block; padding
# on any side.
AMX_KERNEL_GRADS = [
    ((61, 3, 3, 128), (3, 3), 32, SAME, 1),
    ((9, 90, 21, 40), (3, 3), 17, ((1, 0), (1, 0)), 1),
    ((3, 150, 23, 33), (2, 3), 33, ((1, 0), (2, 1)), 1),
    ((10, 19, 17, 32), (7, 5), 16, ((3, 2), (4, 0)), 1),
    ((8, 6, 6, 34), (2, 2), 18, ((0, 1), (0, 1)), 1),
    ((5, 9, 8, 35), (3, 4), 24, ((0, 2), (1, 3)), 1),
    ((20, 5, 5, 36), (3, 3), 19, ((0, 0), (0, 0)), 1),
    ((17, 5, 5, 72), (1, 1), 64, ((0, 0), (0, 0)), 1),
]
# Too few channels, an output that is long, or small, a stride.
OTHER_BFLOAT16_KERNEL_GRADS = [
    ((4, 5, 5, 31), (3, 3), 32, SAME, 1),
    ((4, 5, 5, 37), (3, 3), 15, SAME, 1),
    ((2, 3, 25, 38), (3, 3), 16, SAME, 1),
    ((8, 4, 4, 48), (4, 4), 16, ((0, 0), (0, 0)), 1),
    ((6, 9, 9, 64), (3, 3), 40, SAME, 2),
]
BFLOAT16_KERNEL_GRADS = AMX_KERNEL_GRADS + OTHER_BFLOAT16_KERNEL_GRADS


@pytest.mark.parametrize(
    ("dtype", "shape", "size", "channels", "padding", "stride"),
    [("float32", *case) for case in KERNEL_GRADS] + [("bfloat16", *case) for case in BFLOAT16_KERNEL_GRADS],
)
def test_gradients_of_kernels_and_biases_match_numpy(dtype, shape, size, channels, padding, stride):
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.normal(size=shape), dtype)
    padded = np.pad(np.asarray(image, np.float64), ((0, 0), *padding, (0, 0)))
    height, width = ((n - k) // stride + 1 for n, k in zip(padded.shape[1:3], size, strict=True))
    g = jnp.asarray(rng.normal(size=(shape[0], height, width, channels)), dtype)
    expected = np.empty((*size, shape[3], channels))
    for i, j in np.ndindex(*size):
        met = padded[:, i : i + stride * height : stride, j : j + stride * width : stride][:, :height, :width]
        expected[i, j] = met.reshape(-1, shape[3]).T @ np.asarray(g, np.float64).reshape(-1, channels)
    for _ in range(2):  # The second time, memory is not new.
        kernel, bias = calls.kernel_grad(image, g, size=size, padding=padding, stride=stride, bias=True)
        np.testing.assert_allclose(kernel, expected, rtol=1e-5, atol=2e-4)
        np.testing.assert_allclose(bias, np.asarray(g, np.float64).sum((0, 1, 2)), rtol=1e-5, atol=2e-4)
    (alone,) = calls.kernel_grad(image, g, size=size, padding=padding, stride=stride)
    np.testing.assert_array_equal(alone, kernel)


@pytest.mark.skipif("avx512f" not in library.processor_flags(), reason="those tests ran without AVX-512")
def test_gradients_of_kernels_match_numpy_without_avx512():
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "match_numpy and float32"]
    done = subprocess.run(command, env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}, check=False, capture_output=True)
    assert f"{len(KERNEL_GRADS)} passed" in done.stdout.decode()


@pytest.mark.skipif("amx_bf16" not in library.processor_flags(), reason="the processor has no AMX")
def test_gradients_of_kernels_are_those_of_amx_where_these_are_faster():
    """oneDNN lists what it computes."""
    code = f"""if True:
        import jax.numpy as jnp
        from cnnjax.onednn import calls
        for shape, size, channels, padding, stride in {BFLOAT16_KERNEL_GRADS}:
            sides = zip(shape[1:3], padding, size)
            g = jnp.ones((shape[0], *((n + sum(p) - k) // stride + 1 for n, p, k in sides), channels), jnp.bfloat16)
            calls.kernel_grad(jnp.ones(shape, jnp.bfloat16), g, size=size, padding=padding, stride=stride)
    """
    environment = {**os.environ, "ONEDNN_VERBOSE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if "backward_weights" in line]
    found = {(int(ic), int(oc)) for line in lines for ic, oc in re.findall(r"_ic(\d+)oc(\d+)_", line)}
    assert found == {(case[0][3], case[2]) for case in OTHER_BFLOAT16_KERNEL_GRADS}


@pytest.mark.skipif(not library.kernels().bfloat16, reason="the processor has no bfloat16")
def test_a_last_part_of_another_size_has_fast_kernels_and_the_right_values():
    """Its preferred layout may be another one: oneDNN has only reference kernels for that of the other parts."""
    code = """if True:
        import jax.numpy as jnp
        import numpy as np
        from cnnjax.onednn import calls
        rng = np.random.default_rng(0)
        for size, channels, stride in ((15, 256, 1), (15, 256, 2), (32, 48, 1)):
            image = jnp.asarray(rng.normal(size=(27, size, size, 64)), jnp.bfloat16)
            kernel = jnp.asarray(rng.normal(size=(3, 3, 64, channels)), jnp.bfloat16)
            options = {"padding": ((1, 1), (1, 1)), "stride": stride}
            y = calls.convolution(image, kernel, **options)
            grads = [calls.image_grad(g, kernel, size=(size, size), **options) for g in (y, y[24:])]
            kernel_grad = [calls.kernel_grad(image[i], y[i], size=(3, 3), **options)[0] for i in np.s_[:, :24, 24:]]
            for found, expected in (
                (y[24:], calls.convolution(image[24:], kernel, **options)),
                (grads[0][24:], grads[1]),
                (kernel_grad[0], kernel_grad[1] + kernel_grad[2]),
            ):
                found, expected = (np.asarray(x, np.float32) for x in (found, expected))
                np.testing.assert_allclose(found, expected, rtol=0.02, atol=2e-3 * np.abs(expected).max())
    """
    environment = {**os.environ, "ONEDNN_VERBOSE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if ",convolution," in line]
    assert {re.search(r"mb(\d+)_", line)[1] for line in lines} >= {"4", "3"}
    assert not [line for line in lines if ",ref" in line]


def test_gradients_of_wrong_shapes_are_errors():
    image, kernel_grad = jnp.ones((2, 5, 4, 8)), partial(calls.kernel_grad, size=(3, 3))
    for g, padding in ((jnp.ones((2, 5, 5, 8)), SAME), (jnp.ones((2, 1, 2, 8)), ((-1, -1), (0, 0)))):
        with pytest.raises(jax.errors.JaxRuntimeError, match="oneDNN failed to compute the gradient of a kernel"):
            kernel_grad(image, g, padding=padding)


def test_operands_of_other_dtypes_are_converted():
    image, kernel = jnp.ones((2, 4, 4, 3)), jnp.ones((3, 3, 3, 8), jnp.float16)
    bias = jnp.arange(8, dtype=jnp.float16)
    y = calls.convolution(image, kernel, bias, padding=((0, 0), (0, 0)))
    np.testing.assert_array_equal(y, np.broadcast_to(27.0 + np.arange(8), y.shape))
    y = calls.convolution(image, kernel, bias.astype(jnp.bfloat16), padding=((0, 0), (0, 0)))
    np.testing.assert_array_equal(y, np.broadcast_to(27.0 + np.arange(8), y.shape))


def test_calls_without_onednn_are_refused(monkeypatch):
    monkeypatch.setenv("CNNJAX_ONEDNN", "0")
    for call in (elementwise.gelu, partial(calls.convolution, kernel=jnp.ones((1, 1, 3, 2)), padding=((0, 0), (0, 0)))):
        with pytest.raises(RuntimeError, match=r"^oneDNN must be available, got XLA \(CNNJAX_ONEDNN is 0\)\.$"):
            call(jnp.ones((2, 3, 3, 3)))


def test_a_child_can_load_onednn_if_another_thread_did_so_at_the_fork():
    code = """if True:
        import os, threading, time
        from cnnjax.onednn import library
        def hold():
            with library._lock:
                time.sleep(1)
        threading.Thread(target=hold).start()
        while not library._lock.locked():
            time.sleep(0.01)
        child = os.fork()
        if child == 0:
            os._exit(0 if library._lock.acquire(timeout=5) else 1)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_the_bits_are_the_same_on_one_and_two_cores_in_many_threads_and_in_children():
    command = [sys.executable, str(PROGRAM)]
    ways = [("1", "here"), ("2", "fork", "here", "threads", "spawn")]
    processes = [subprocess.Popen([*command, *way], stdout=subprocess.PIPE, text=True) for way in ways]
    (on_one_core,), on_two_cores = (process.communicate(timeout=120)[0].splitlines() for process in processes)
    assert len(on_one_core.split()) == 11
    assert on_two_cores == 4 * [on_one_core]


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
    # Of NumPy: arrays of JAX would compile programs, too, after their caches are cleared.
    images, kernel = [np.ones((8, height, 8, 64), np.float32) for height in (8, 9)], np.ones((3, 3, 64, 8), np.float32)

    def grow(count):
        before = heap_bytes()
        for size in range(count):  # A program of its own each.
            f = jax.jit(partial(calls.convolution, padding=((1, 1), (1, 1))))
            jax.block_until_ready(f(images[size % 2], kernel))
            jax.clear_caches()
        return heap_bytes() - before

    grow(40)
    assert grow(30) < 30 * 6_000  # Bytes: a leaked call site has 18 kB, and 1 kB is XLA's.


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE", "AVX512_CORE_BF16"])
def test_the_layers_are_right_with_the_kernels_of_older_processors(isa):
    """Those without AVX-512, without bfloat16, and without AMX."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "test_conv.py", "test_depthwise.py"]
    folder, environment = Path(__file__).parents[1] / "layers", {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run(command, cwd=folder, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
