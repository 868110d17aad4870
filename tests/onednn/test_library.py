"""Which kernels are used, and the compilation of kernels.c."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import jax.numpy as jnp
import pytest

from cnnjax.onednn import calls, library

INSTALLED = library._find(library.PACKAGES[0], "oneapi/dnnl/dnnl.h") is not None
pytestmark = pytest.mark.skipif(not INSTALLED, reason="oneDNN is not installed")


@pytest.fixture
def load(monkeypatch, tmp_path):
    """A function that looks for the kernels as a new process does, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("register_ffi_type", "register_ffi_target"):  # Once per process.
        monkeypatch.setattr(library.jax.ffi, name, lambda *args, **kwargs: None)
    return library._load.__wrapped__


def test_oneDNN_is_used_for_what_it_supports_unless_it_is_disabled(monkeypatch):  # noqa: N802
    assert str(library.kernels()) == "oneDNN 3.2.0"
    assert [calls.in_use(dtype) for dtype in (jnp.float32, jnp.bfloat16, jnp.float16)] == [True, True, False]
    image, kernel = jnp.zeros((2, 4, 5, 3)), jnp.zeros((3, 3, 3, 8))
    paddings = {(1, 1): True, (2, 0): True, (3, 0): False, (-1, 1): False}  # 3: not smaller than the kernel.
    assert {pads: calls.convolves(image, kernel, ((1, 1), pads)) for pads in paddings} == paddings
    assert not calls.convolves(image[:0], kernel, ((1, 1), (1, 1)))
    assert not calls.convolves(image[:, :1], kernel, ((0, 0), (1, 1)))  # The kernel is larger than the image.
    monkeypatch.setenv("CNNJAX_ONEDNN", "0")
    assert str(library.kernels()) == "XLA (CNNJAX_ONEDNN is 0)"
    assert not calls.in_use()


def test_kernels_are_compiled_once_and_again_if_the_result_is_damaged(load, monkeypatch, tmp_path):
    run, compilations = subprocess.run, []

    def counted(*args, **kwargs):
        compilations.append(args)
        return run(*args, **kwargs)

    monkeypatch.setattr(subprocess, "run", counted)
    assert load() == load() == library.kernels()
    (kept,) = (tmp_path / "cnnjax").iterdir()
    assert len(compilations) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    damaged = tmp_path / "other" / "cnnjax" / kept.name
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(kept.read_bytes()[:1000])  # A process that loads it crashes.
    assert load() == library.kernels()
    assert len(compilations) == 2
    assert damaged.read_bytes() == kept.read_bytes()


def test_a_cache_that_cannot_be_written_does_not_matter(load, monkeypatch, tmp_path):
    (tmp_path / "cnnjax").write_text("not a folder")
    assert load() == library.kernels()
    monkeypatch.setattr(library, "cache_dir", lambda: None)  # No home directory.
    assert load() == library.kernels()


def test_without_a_compiler_the_reason_is_named(load, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert str(load()) == "XLA (no C compiler was found, such as gcc)"
    monkeypatch.setenv("CC", "missing-compiler -O1")
    assert str(load()) == "XLA ([Errno 2] No such file or directory: 'missing-compiler')"


def test_an_error_of_the_compiler_is_the_reason(load, monkeypatch, tmp_path):
    source = tmp_path / "kernels.c"
    source.write_text("int broken(")
    monkeypatch.setattr(library, "SOURCE", source)
    assert re.match(r"XLA \(the C compiler failed: \S*kernels\.c:1:", str(load()))


def test_without_the_package_or_on_other_platforms_the_reason_is_named(load, monkeypatch):
    monkeypatch.setattr(library, "_find", lambda package, path: None)
    assert str(load()) == "XLA (onednn-devel-cpu-gomp is not installed: pip install 'cnnjax[onednn]')"
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert str(load()) == "XLA (oneDNN is used on Linux with x86-64 only)"


def test_the_compiler_of_CC_is_used_even_if_it_does_not_know_the_processor(load, monkeypatch, tmp_path):  # noqa: N802
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("gcc is not installed")
    wrapper = tmp_path / "my-gcc"
    old = f'case "$*" in *-march=*) exit 1;; esac\necho "$1" > {tmp_path}/first\nexec {gcc} "$@"\n'
    wrapper.write_text(f"#!/bin/sh\n{old}")
    wrapper.chmod(0o755)
    monkeypatch.setenv("CC", f"{wrapper} -Wall")
    monkeypatch.setenv("PATH", os.path.dirname(gcc))
    assert load() == library.kernels()
    assert Path(tmp_path, "first").read_text() == "-Wall\n"
