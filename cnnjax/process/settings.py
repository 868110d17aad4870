"""Settings of the whole process: memory allocation, cores, ports, and the cache of compiled programs."""

import ctypes
import hashlib
import os
import platform
import re
import resource
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cnnjax.errors import UserError


def keep_memory() -> None:
    """Makes glibc keep the memory that this process frees, which makes training on a CPU faster.

    The command line and `run_experiment` call it. In a script, call it before jax starts. It has no effect without
    glibc, or if the user has set a variable that begins with `MALLOC_`.

    XLA frees the scratch memory of each step, and glibc returns such large blocks to the system. Mapping them again,
    page by page, takes a quarter of the next step (see BENCHMARKS.md). With a single arena and without
    mmap for large blocks, glibc keeps them. Source: mallopt(3).
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = ctypes.CDLL(None).mallopt
    m_trim_threshold, m_top_pad, m_mmap_max, m_arena_max = -1, -2, -4, -8  # malloc.h
    mallopt(m_arena_max, 1)
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 2**26)


def write_exit_code(status: Any) -> None:
    """Writes the exit code into the file that $CNNJAX_EXIT_CODE names: make itself ends with 2 instead."""
    if file := os.environ.get("CNNJAX_EXIT_CODE"):
        try:
            Path(file).write_text(f"{status}\n")
        except OSError as error:
            rule = "must name a file that can be written"
            print(f"`CNNJAX_EXIT_CODE` {rule}, got {file}: {error.strerror}.", file=sys.stderr)


def num_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def raise_file_limit() -> None:
    """Lets this process open up to 8,192 files: each shard of a set is one, and ImageNet has more than 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8192 if hard == resource.RLIM_INFINITY else min(8192, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # The system may allow less than it states.
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def start_jax() -> None:
    """Starts jax on its devices. Run before anything else uses them, because jax's own errors are long tracebacks.

    Raises:
      UserError: jax cannot start, or the environment forbids transfers.
    """
    import jax

    config: Any = jax.config
    if (value := config.jax_transfer_guard) not in (None, "log", "allow"):
        raise UserError(f"`JAX_TRANSFER_GUARD` must be allow, got {value}. Unset it.")
    names = ["JAX_PLATFORM_NAME", "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES"]
    try:
        jax.local_devices()
        names = ["JAX_DEFAULT_DEVICE"]
        jax.device_put(0)
    except (RuntimeError, AssertionError) as error:  # AssertionError: there is no plugin for JAX_PLATFORMS.
        name = next((name for name in names if os.environ.get(name)), names[0])
        got = repr(os.environ.get(name, "")) + (f": {error}" if str(error) else "")
        raise UserError(
            f"`{name}` must name what jax finds here, such as cpu, got {got.rstrip('.')}. Correct or unset it."
        ) from error


def use_compilation_cache(say: Callable[[str], None]) -> None:
    """Caches compiled programs in `cache_dir`, unless $JAX_COMPILATION_CACHE_DIR is set.

    A second start then saves most of the seconds before its first step and gives the same bits. Nothing is cached in
    two cases: for several simulated devices, because oneDNN's calls then have another key at each start; and if
    XLA_FLAGS enables CUDA graphs of convolutions, because cuDNN failed in such a program when it was loaded from the
    cache (jaxlib 0.11.2, H100).
    """
    import jax

    from cnnjax.files import cache_dir
    from cnnjax.onednn.library import kernels

    start_jax()
    graphs = re.search(r"command_buffer=\S*(?<![-\w])CONVOLUTION", os.environ.get("XLA_FLAGS", "")) is not None
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        if graphs:
            say("JAX_COMPILATION_CACHE_DIR is set: cached programs with CUDA graphs of convolutions may fail.")
        return
    divided = jax.default_backend() == "cpu" and jax.local_device_count() > 1 and kernels().version is not None
    if graphs or divided:
        return
    if (folder := cache_dir()) is None:
        say("There is no home directory, so compiled programs are not kept: each start compiles again. Set HOME.")
        return
    cache = folder / f"xla-{processor()}"
    with suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
    if not os.access(cache, os.W_OK):  # Training does not need the cache.
        say(f"{cache} cannot be written, so compiled programs are not kept: each start compiles again.")
        return
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def processor() -> str:
    """Identifies the processor's instruction sets: a program compiled for one processor may crash on another."""
    from cnnjax.onednn.library import processor_flags

    flags = processor_flags() or platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def free_port() -> int:
    """Returns a port of this machine that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
