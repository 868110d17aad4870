import os
import platform
import pwd
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from cnnjax.errors import UserError
from cnnjax.onednn.library import kernels
from cnnjax.process.settings import start_jax, use_compilation_cache


def page_faults(before, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, Path(__file__).with_name("page_faults.py"), before]
    return int(subprocess.check_output(command, env=clean | environment, stderr=subprocess.DEVNULL))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc")
def test_freed_memory_is_kept_by_the_call_and_the_command_line_unless_the_user_tunes_malloc():
    returned = page_faults("import")
    assert page_faults("call") < returned / 5
    assert page_faults("main") < returned / 5
    assert page_faults("call", MALLOC_TRIM_THRESHOLD_="131072") > returned / 2


GRAPHS = "JAX_COMPILATION_CACHE_DIR is set: cached programs with CUDA graphs of convolutions may fail."


@pytest.mark.parametrize(
    ("backend", "name", "value", "warning"),
    [
        ("cpu", "XLA_FLAGS", "", None),
        ("gpu", "XLA_FLAGS", "", None),
        ("gpu", "XLA_FLAGS", "--xla_gpu_enable_command_buffer=+CUBLAS", None),
        ("gpu", "XLA_FLAGS", "--xla_gpu_enable_command_buffer=+CONVOLUTION", GRAPHS),
        (
            "gpu",
            "XLA_FLAGS",
            "--xla_dump_to=x --xla_gpu_enable_command_buffer=FUSION,CONVOLUTION",
            GRAPHS,
        ),
    ],
)
def test_programs_are_cached_unless_they_cannot_be(backend, name, value, warning, monkeypatch, tmp_path):
    """CUDA graphs of convolutions failed when they were loaded from the cache."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(name, value)
    options, messages = {}, []
    monkeypatch.setattr(jax.config, "update", options.__setitem__)
    use_compilation_cache(messages.append)
    folders = [str(folder) for folder in tmp_path.glob("cnnjax/xla-*")]
    assert len(folders) == (warning is None)
    assert options.get("jax_compilation_cache_dir") == (None if warning else folders[0])
    assert messages == []
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    use_compilation_cache(messages.append)
    assert messages == ([warning] if warning else [])


@pytest.mark.skipif(kernels().version is None, reason=str(kernels()))
def test_programs_for_several_devices_of_a_cpu_are_not_cached(monkeypatch, tmp_path):
    """oneDNN's calls have another key at each start there, so the cache would only grow."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    monkeypatch.setattr(jax.config, "update", pytest.fail)
    use_compilation_cache(pytest.fail)


def test_without_a_home_directory_nothing_is_cached(monkeypatch):
    """As of a user whom a container does not know."""

    def getpwuid(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    for name in ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax.config, "update", pytest.fail)
    messages = []
    use_compilation_cache(messages.append)
    assert messages == [
        "There is no home directory, so compiled programs are not kept: each start compiles again. Set HOME."
    ]


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("JAX_PLATFORMS", "cuda", AssertionError(), "got 'cuda'. Correct or unset it."),
        (
            "JAX_PLATFORM_NAME",
            "gpux",
            RuntimeError("Unknown backend."),
            "got 'gpux': Unknown backend. Correct or unset it.",
        ),
    ],
)
def test_a_device_that_jax_does_not_find_is_a_message(name, value, error, message, monkeypatch):
    def local_devices():
        raise error

    monkeypatch.setattr(jax, "local_devices", local_devices)
    monkeypatch.setenv(name, value)
    rule = f"`{name}` must name what jax finds here, such as cpu, {message}"
    with pytest.raises(UserError, match=re.escape(rule)):
        start_jax()


def test_a_guard_of_jax_that_forbids_transfers_is_refused():
    before = jax.config.jax_transfer_guard
    jax.config.update("jax_transfer_guard", "disallow")
    try:
        with pytest.raises(UserError, match=r"`JAX_TRANSFER_GUARD` must be allow, got disallow\."):
            start_jax()
    finally:
        jax.config.update("jax_transfer_guard", before)
