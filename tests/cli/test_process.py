import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from cnnjax.cli.process import use_compilation_cache

# A block of the size of a step's scratch memory, written and given back 20 times; prints the pages that were mapped.
SCRIPT = """
import resource
import cnnjax
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
for _ in range(20):
    b"x" * 2**26
print(faults() - before)
"""


def page_faults(**environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    return int(subprocess.check_output([sys.executable, "-c", SCRIPT], env=clean | environment))


def test_flags_are_set_once_and_none_that_the_user_set():
    code = "import os; import cnnjax; print(os.environ['XLA_FLAGS'])"
    own = "--xla_cpu_experimental_ynn_fusion_type=-reduce --xla_gpu_deterministic_ops=false"
    clean = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    for env in (clean, clean | {"XLA_FLAGS": own}):
        flags = subprocess.check_output([sys.executable, "-c", code], env=env, text=True).split()
        names = [flag.split("=")[0] for flag in flags]
        assert len(set(names)) == len(names)
        assert {"--xla_cpu_experimental_ynn_fusion_type", "--xla_gpu_deterministic_ops"} <= set(names)
    assert set(own.split()) <= set(flags)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_freed_memory_is_kept_for_the_next_step_unless_the_user_tunes_it():
    assert page_faults() < page_faults(MALLOC_TRIM_THRESHOLD_="131072") / 5


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ("", True),
        ("--xla_gpu_enable_command_buffer=+CUBLAS", True),
        ("--xla_gpu_enable_command_buffer=+CONVOLUTION", False),
        ("--xla_gpu_deterministic_ops=true --xla_gpu_enable_command_buffer=FUSION,CONVOLUTION", False),
    ],
)
def test_a_gpu_s_programs_are_kept_unless_cuda_graphs_hold_convolutions(flags, kept, monkeypatch, tmp_path):
    """Such programs failed when they came from the cache."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", flags)
    options, said = {}, []
    monkeypatch.setattr(jax.config, "update", options.__setitem__)
    use_compilation_cache(said.append)
    folders = [str(folder) for folder in tmp_path.glob("cnnjax/xla-*")]
    assert len(folders) == kept
    assert [options[name] for name in options if name == "jax_compilation_cache_dir"] == folders
    assert said == []
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    use_compilation_cache(said.append)
    assert len(said) == (not kept)
    assert all("CUDA graphs of convolutions may fail when reused" in line for line in said)


def test_operations_equal_their_references_under_xla_s_own_flags_too():
    """The tests of this process run under ours; XLA's kernels, pooling, augmentation and optimizers must not care."""
    flags = os.environ["XLA_FLAGS"]
    for ours, default in (
        ("-individual_convolution", "+individual_convolution"),
        ("CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED", "CPU_SCHEDULER_TYPE_DEFAULT"),
    ):
        flags = flags.replace(ours, default)
    assert flags != os.environ["XLA_FLAGS"]
    files = [str(Path(__file__).with_name(f"test_{module}.py")) for module in ("layers", "batches", "optim")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", "not onednn"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = clean | {"XLA_FLAGS": flags}
    result = subprocess.run([*command, *files], env=environment, text=True, capture_output=True, check=False)
    assert result.returncode == 0, result.stdout
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 100
