"""XLA, the compiler: the flags that a version of jaxlib needs, and the cache of what it has compiled."""

import ctypes
import hashlib
import os
import platform
import re
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

# XLA's default CPU convolutions are slow (see experiments/BENCHMARKS.md), and in jaxlib 0.10 some are wrong (jax issues
# 39103, 39257 and 40412). Without this fusion it takes the older, right ones.
CONVOLUTION_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
# In jaxlib 0.10 operations that run side by side slow each other down; this order leaves fewer of them.
SCHEDULER_FLAG = "--xla_cpu_scheduler_type"
# GPU kernels that give the same bits each time; it also keeps XLA from picking kernels by timing them.
DETERMINISM_FLAG = "--xla_gpu_deterministic_ops"


def set_flags() -> None:
    """Adds our flags to XLA_FLAGS, but for those that are there. Must run before jax makes its first array."""
    flags = os.environ.get("XLA_FLAGS", "")
    ours = {DETERMINISM_FLAG: "true"}  # Known to every jaxlib that the package admits.
    # XLA ends the process on a flag that it does not know: this one only for versions that were tried.
    if version("jaxlib").startswith(("0.10.", "0.11.", "0.12.")):
        ours[CONVOLUTION_FLAG] = "-individual_convolution"
    if version("jaxlib").startswith("0.10."):
        ours[SCHEDULER_FLAG] = "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
    added = [f"{flag}={value}" for flag, value in ours.items() if flag not in flags]
    os.environ["XLA_FLAGS"] = " ".join([*flags.split(), *added])


def keep_memory() -> None:
    """Lets glibc keep freed memory for the next step, unless the user has told it otherwise. Must run before threads.

    XLA frees a step's scratch memory after it, and glibc returns a block of that size to the system: each step would
    map it again, a page at a time, a quarter of the step's time (see experiments/BENCHMARKS.md). With one arena, and no
    maps of their own for large blocks, freed memory stays. Source: mallopt(3).
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = ctypes.CDLL(None).mallopt
    m_trim_threshold, m_top_pad, m_mmap_max, m_arena_max = -1, -2, -4, -8  # malloc.h
    mallopt(m_arena_max, 1)
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 2**26)


def use_compilation_cache(say: Callable[[str], None]) -> None:
    """Keeps compiled programs in ~/.cache/cnnjax (or $XDG_CACHE_HOME), unless $JAX_COMPILATION_CACHE_DIR names another.

    A second start then saves most of the seconds before its first step, and ends in the same bits. Where a CPU has the
    kernels of `onednn` nothing is kept: programs with them cannot be, and are compiled in two seconds. Who names a
    directory there gets XLA's kernels, and their bits. Nor is anything kept where XLA_FLAGS asks for CUDA graphs of
    convolutions: cuDNN failed in such a program that came from the cache (jaxlib 0.11.2, H100).
    """
    import jax

    from cnnjax.layers import onednn

    with_onednn = jax.default_backend() == "cpu" and onednn.AVAILABLE
    graphs = re.search(r"command_buffer=\S*(?<![-\w])CONVOLUTION", os.environ.get("XLA_FLAGS", "")) is not None
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        if with_onednn:
            say(
                "JAX_COMPILATION_CACHE_DIR is set: XLA's own kernels are used, which are slower. Unset it for oneDNN's."
            )
        elif graphs:
            say("JAX_COMPILATION_CACHE_DIR is set: programs with CUDA graphs of convolutions may fail when reused.")
        return
    if with_onednn or graphs:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = home / "cnnjax" / f"xla-{processor()}"
    with suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
    if not os.access(cache, os.W_OK):  # No reason not to train.
        say(f"{cache} cannot be written, so compiled programs are not kept: each start compiles again.")
        return
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def processor() -> str:
    """Returns a name of the processor's instruction set: what was compiled for one may crash on another."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
