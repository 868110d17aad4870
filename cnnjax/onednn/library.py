"""Finds oneDNN and a C compiler, compiles kernels.c, and registers its handlers with XLA.

oneDNN is the package onednn-cpu-gomp. kernels.c is compiled at its first use, in less than a second, because it needs
the header of the installed jaxlib. The result is kept in `cache_dir`.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax

from cnnjax.files import atomic_write, cache_dir, file_sha256

PACKAGES = ("onednn-devel-cpu-gomp", "onednn-cpu-gomp")  # Headers, library.
KINDS = ("convolution", "image_grad", "kernel_grad", "matmul")  # The calls, in the order of kernels.c.
AVX512_BF16 = 0xE7  # dnnl_cpu_isa_avx512_core_bf16: a set of bits.
SOURCE = Path(__file__).with_name("kernels.c")
_lock = threading.Lock()
if hasattr(os, "register_at_fork"):  # A child must not inherit a lock that another thread holds.
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class Kernels(NamedTuple):
    """The kernels of programs for a CPU.

    Attributes:
      version: of oneDNN; None: they are XLA's.
      reason: why they are XLA's.
      bfloat16: whether oneDNN computes in bfloat16 on this processor.
    """

    version: str | None
    reason: str = ""
    bfloat16: bool = False

    @property
    def name(self) -> str:
        """Returns "XLA", or oneDNN with its version."""
        return f"oneDNN {self.version}" if self.version else "XLA"

    def __str__(self) -> str:
        return self.name + (f" ({self.reason})" if self.reason else "")


@cache  # The processor does not change.
def processor_flags() -> str:
    """Returns the line of /proc/cpuinfo with the processor's instruction sets, or "" if there is none."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def kernels() -> Kernels:
    """Returns the kernels that programs for a CPU use. The first call may run a compiler.

    $CNNJAX_ONEDNN is read at each call: 0 selects XLA's kernels.
    """
    if os.environ.get("CNNJAX_ONEDNN", "1") == "0":
        return Kernels(None, "CNNJAX_ONEDNN is 0")
    with _lock:
        return _load()


def required_kernels() -> Kernels:
    """Returns oneDNN's kernels, whose handlers are then registered with XLA.

    Raises:
      RuntimeError: oneDNN is not available.
    """
    found = kernels()
    if found.version is None:
        raise RuntimeError(f"oneDNN must be available, got {found}.")
    return found


@cache
def _load() -> Kernels:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return Kernels(None, "oneDNN is used on Linux with x86-64 only")
    header, library = _find(PACKAGES[0], "oneapi/dnnl/dnnl.h"), _find(PACKAGES[1], "/libdnnl.so.3")
    if header is None or library is None:
        return Kernels(None, f"{PACKAGES[0]} is not installed: pip install 'cnnjax[onednn]'")
    try:
        handlers = _open(library, header.parents[2])
    except subprocess.CalledProcessError as error:
        reason = " ".join(error.stderr.split())[:300] or f"exit status {error.returncode}"
        return Kernels(None, f"the C compiler failed: {reason}")
    except (OSError, ValueError) as error:  # ValueError: $CC has an open quotation.
        return Kernels(None, " ".join(str(error).split()))
    if (version := handlers.cnnjax_open()) == 0:
        return Kernels(None, "oneDNN could not be initialized")

    def capsule(name: str) -> Any:
        return jax.ffi.pycapsule(ctypes.byref(ctypes.c_char.in_dll(handlers, f"cnnjax_{name}")))

    # The type of the state that a call site keeps.
    state: Any = {name: capsule(name) for name in ("type_id", "type_info")}
    jax.ffi.register_ffi_type("cnnjax_site", state, platform="cpu")
    stages = {stage: capsule(stage) for stage in ("instantiate", "execute")}
    for kind in KINDS:
        jax.ffi.register_ffi_target(f"cnnjax_{kind}", stages, platform="cpu")
    jax.ffi.register_ffi_target("cnnjax_elementwise", capsule("elementwise"), platform="cpu")
    bfloat16 = handlers.dnnl_get_effective_cpu_isa() & AVX512_BF16 == AVX512_BF16  # Obeys $ONEDNN_MAX_CPU_ISA.
    return Kernels(f"{version // 10000}.{version // 100 % 100}.{version % 100}", bfloat16=bfloat16)


def _find(package: str, path: str) -> Path | None:
    """Returns the installed file of a package whose path ends with `path`."""
    with suppress(metadata.PackageNotFoundError):
        for file in metadata.files(package) or ():
            if str(file).endswith(path):
                return Path(str(file.locate())).resolve()
    return None


def _open(library: Path, headers: Path) -> ctypes.CDLL:
    """Loads the compiled kernels.c; compiles it if no earlier process did.

    Raises:
      OSError: there is no compiler, or the result cannot be loaded.
      subprocess.CalledProcessError: the compiler failed.
    """
    # Without contraction, the bits do not depend on the compiler, if it knows the processor's instructions. GCC prefers
    # vectors of 256 bits, which are slower.
    options = ["-O3", "-ffp-contract=off", "-shared", "-fPIC", "-std=gnu11"]
    options += [f"-I{headers}", f"-I{jax.ffi.include_dir()}"]
    native = ["-march=native", "-mprefer-vector-width=512"]
    options += [str(SOURCE), str(library), f"-Wl,-rpath,{library.parent}"]
    about = [*options, *native, processor_flags(), *(metadata.version(package) for package in ("jaxlib", *PACKAGES))]
    sources = b"".join(path.read_bytes() for path in sorted(SOURCE.parent.glob("*.c")))
    key = hashlib.sha256("\0".join(about).encode() + sources).hexdigest()[:16]
    with tempfile.TemporaryDirectory() as folder:
        cache = cache_dir() or Path(folder)
        with suppress(OSError):  # It was compiled on a system with another C library.
            for kept in cache.glob(f"onednn-{key}-*.so"):
                if file_sha256(kept)[:16] == kept.stem[-16:]:  # A damaged library can crash the process.
                    return ctypes.CDLL(str(kept))
        compiler = shlex.split(os.environ.get("CC", "")) or [c for c in ("cc", "gcc", "clang") if shutil.which(c)][:1]
        if not compiler:
            raise OSError("no C compiler was found, such as gcc")
        new = Path(folder, "onednn.so")
        for more in (native, []):  # A compiler may not know these options, but its loops are then slower.
            command = [*compiler, *options, *more, "-o", str(new)]
            # A session of its own: Ctrl-C is for this process, and must not look like an error of the compiler.
            result = subprocess.run(
                command, check=False, capture_output=True, text=True, errors="replace", start_new_session=True
            )
            if result.returncode == 0:
                break
        result.check_returncode()
        with suppress(OSError):  # The cache cannot be written.
            cache.mkdir(parents=True, exist_ok=True)
            kept = cache / f"onednn-{key}-{file_sha256(new)[:16]}.so"
            with atomic_write(kept, shared=True) as file:
                file.write(new.read_bytes())
            return ctypes.CDLL(str(kept))
        return ctypes.CDLL(str(new))
