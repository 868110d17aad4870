"""XLA, the compiler: the flags that a version of jaxlib needs, and the cache of what it has compiled."""

import hashlib
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

# jaxlib 0.10's default CPU convolutions are slow (see experiments/BENCHMARKS.md), and some are wrong (jax issues 39103,
# 39257 and 40412). Without this fusion it takes the older, right ones.
CONVOLUTION_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
# GPU kernels that give the same bits each time; it also keeps XLA from picking kernels by timing them.
DETERMINISM_FLAG = "--xla_gpu_deterministic_ops"


def set_flags() -> None:
    """Adds our flags to XLA_FLAGS, but for those that are there. Must run before jax makes its first array."""
    flags = os.environ.get("XLA_FLAGS", "")
    ours = {DETERMINISM_FLAG: "true"}  # Known to every jaxlib that the package admits.
    # XLA ends the process on a flag that it does not know: this one only for versions that were tried.
    if version("jaxlib").startswith("0.10."):
        ours[CONVOLUTION_FLAG] = "-individual_convolution"
    added = [f"{flag}={value}" for flag, value in ours.items() if flag not in flags]
    os.environ["XLA_FLAGS"] = " ".join([*flags.split(), *added])


def use_compilation_cache(say: Callable[[str], None]) -> None:
    """Keeps compiled steps in ~/.cache/cnnjax (or $XDG_CACHE_HOME), unless $JAX_COMPILATION_CACHE_DIR names another.

    A second start saves most of the seconds before its first step; the bits of a run stay the same.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        cache = home / "cnnjax" / f"xla-{processor()}"
        with suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
        if not os.access(cache, os.W_OK):  # No reason not to train.
            say(f"{cache} cannot be written, so compiled steps are not kept: each start compiles again.")
            return
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def processor() -> str:
    """Returns a name of the processor's instruction set: what was compiled for one may crash on another."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
