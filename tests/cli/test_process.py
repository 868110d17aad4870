import os
import pwd
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from cnnjax.cli.process import set_flags, start_jax, use_compilation_cache
from cnnjax.errors import UserError
from cnnjax.layers import onednn

DETERMINISM = "--xla_gpu_deterministic_ops"
CONVOLUTION = "--xla_cpu_experimental_ynn_fusion_type"
SCHEDULER = "--xla_cpu_scheduler_type"


def names(flags):
    return [flag.split("=")[0] for flag in flags.split()]


def test_importing_cnnjax_sets_the_flags():
    assert {DETERMINISM, CONVOLUTION} <= set(names(os.environ["XLA_FLAGS"]))  # conftest.py imports cnnjax.


@pytest.mark.parametrize(
    ("jaxlib", "expected"),
    [
        ("0.10.2", [DETERMINISM, CONVOLUTION, SCHEDULER]),
        ("0.12.0", [DETERMINISM, CONVOLUTION]),
        ("0.13.0", [DETERMINISM]),
    ],
)
def test_flags_are_set_once_for_the_versions_that_know_them(jaxlib, expected, monkeypatch):
    """XLA aborts the process if it does not know a flag."""
    monkeypatch.setattr("cnnjax.cli.process.version", lambda package: {"jaxlib": jaxlib}[package])
    monkeypatch.setenv("XLA_FLAGS", "")
    set_flags()
    set_flags()
    assert names(os.environ["XLA_FLAGS"]) == expected


def test_flags_of_the_user_are_kept(monkeypatch):
    own = f"{CONVOLUTION}=-reduce {DETERMINISM}=false"
    monkeypatch.setattr("cnnjax.cli.process.version", lambda package: "0.12.0")
    monkeypatch.setenv("XLA_FLAGS", own)
    set_flags()
    assert os.environ["XLA_FLAGS"] == own


def page_faults(**environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    script = Path(__file__).with_name("page_faults.py")
    return int(subprocess.check_output([sys.executable, script], env=clean | environment))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_freed_memory_is_reused_unless_the_user_tunes_malloc():
    assert page_faults() < page_faults(MALLOC_TRIM_THRESHOLD_="131072") / 5


SLOWER = "JAX_COMPILATION_CACHE_DIR is set, so XLA's slower kernels are used. Unset it to use oneDNN's."
GRAPHS = "JAX_COMPILATION_CACHE_DIR is set: cached programs with CUDA graphs of convolutions may fail."
NEEDS_ONEDNN = pytest.mark.skipif(not onednn.available(), reason="jaxlib has no oneDNN kernels on this platform")


@pytest.mark.parametrize(
    ("backend", "name", "value", "warning"),
    [
        ("cpu", "CNNJAX_ONEDNN", "0", None),
        pytest.param("cpu", "CNNJAX_ONEDNN", "1", SLOWER, marks=NEEDS_ONEDNN),
        ("gpu", "XLA_FLAGS", "", None),
        ("gpu", "XLA_FLAGS", "--xla_gpu_enable_command_buffer=+CUBLAS", None),
        ("gpu", "XLA_FLAGS", "--xla_gpu_enable_command_buffer=+CONVOLUTION", GRAPHS),
        ("gpu", "XLA_FLAGS", f"{DETERMINISM}=true --xla_gpu_enable_command_buffer=FUSION,CONVOLUTION", GRAPHS),
    ],
)
def test_programs_are_cached_unless_they_cannot_be(backend, name, value, warning, monkeypatch, tmp_path):
    """Programs with oneDNN's kernels cannot be serialized; CUDA graphs of convolutions failed after loading."""
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


def test_without_a_home_directory_nothing_is_cached(monkeypatch):
    """As of a user whom a container does not know."""

    def getpwuid(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    for name in ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CNNJAX_ONEDNN", "0")
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


@pytest.mark.parametrize(
    ("option", "value", "valid"),
    [("jax_numpy_dtype_promotion", "strict", "standard"), ("jax_transfer_guard", "disallow", "allow")],
)
def test_options_of_jax_that_forbid_what_we_do_are_refused(option, value, valid):
    before = getattr(jax.config, option)
    jax.config.update(option, value)
    try:
        with pytest.raises(UserError, match=f"`{option.upper()}` must be {valid}, got {value}. Unset it."):
            start_jax()
    finally:
        jax.config.update(option, before)
