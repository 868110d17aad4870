import json
import os
import subprocess
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from cnnjax import UserError
from cnnjax.process.signals import Interrupted
from cnnjax.runs import manifest
from cnnjax.runs.manifest import (
    changes_since_last_session,
    differences,
    environment,
    environment_changes,
    is_finished,
    num_cores,
    read_manifest,
    session,
)

ABOUT = {"cores": 2, "num_devices": 1}


def test_a_session_records_how_it_ended(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with session(run_dir, ABOUT | {"seed": 3}, ("config.json",)) as this:
        assert read_manifest(run_dir)["sessions"][0]["state"] == "running"
        this["resumed_from"] = 7
    for error in (Interrupted(15, 7), ValueError("wrong")):
        with pytest.raises(type(error)), session(run_dir, ABOUT | {"seed": 3}, (), b"a diff \xff"):
            raise error
    sessions = read_manifest(run_dir)["sessions"]
    assert [s["state"] for s in sessions] == ["finished", "interrupted", "failed"]
    assert [s.get("error") for s in sessions] == [
        None,
        "Stopped by SIGTERM; the checkpoint of step 7 is saved.",
        "wrong",
    ]
    assert [s.get("resumed_from") for s in sessions] == [7, None, None]
    for s in sessions:
        assert s["seed"] == 3 and s["seconds"] >= 0
        assert s["command"] and s["started"] <= s["ended"]
    assert [s.get("diff") for s in sessions] == [None, "session-1.diff", "session-2.diff"]
    assert (run_dir / "session-2.diff").read_bytes() == b"a diff \xff"


def test_a_session_that_was_killed_is_recorded_by_the_next(tmp_path):
    with pytest.raises(SystemExit), session(tmp_path, ABOUT, ()):
        raise SystemExit
    content = json.loads((tmp_path / "manifest.json").read_text())
    content["sessions"][0]["state"] = "running"  # As a killed process leaves it.
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    (tmp_path / "SHA256SUMS").unlink()
    with session(tmp_path, ABOUT, ()):
        assert [s["state"] for s in read_manifest(tmp_path)["sessions"]] == ["killed", "running"]
    assert [s["state"] for s in read_manifest(tmp_path)["sessions"]] == ["killed", "finished"]


def test_checksums_cover_the_files_at_the_end_and_are_absent_during_a_session(tmp_path):
    """A kill must not leave those of an earlier session."""
    for content in ("1", "2"):
        with session(tmp_path, ABOUT, ("result.json", "metrics.jsonl"), b"a diff"):
            assert not (tmp_path / "SHA256SUMS").exists()
            assert not is_finished(tmp_path)
            (tmp_path / "result.json").write_text(content)
        assert is_finished(tmp_path)
        subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=tmp_path, check=True)
    names = {line.split()[1] for line in (tmp_path / "SHA256SUMS").read_text().splitlines()}
    assert names == {"manifest.json", "result.json", "session-0.diff", "session-1.diff"}


def test_differences_are_of_what_determines_the_bits():
    old = {"commit": "a", "versions": {"jax": "1", "numpy": "2"}, "cores": 2, "host": "x", "started": "1"}
    new = {"commit": "b", "versions": {"jax": "3", "numpy": "2"}, "cores": 2, "host": "y", "started": "2"}
    assert differences(old, new) == {"commit": ("a", "b"), "versions.jax": ("1", "3")}


def test_every_part_of_a_session_s_environment_is_compared_except_its_hosts():
    now = environment(jax.devices()[:1])
    assert environment_changes([now], now) == {}
    code = {"commit": "a", "package_commit": "b", "diff_sha256": "c", "files": {"own.py": "d"}}
    then = {**now, **code}
    compared = {name for name in then if differences(then, {**then, name: "other"})}
    assert compared == {*then} - {"host", "hosts", "system"}


def test_the_environment_has_versions_device_and_kernels(monkeypatch):
    device = jax.devices()[0]
    assert device.platform == "cpu"
    monkeypatch.setenv("XLA_FLAGS", "--a --b")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "somewhere")  # Changes no bits, and neither do the next two.
    monkeypatch.setenv("ONEDNN_VERBOSE", "1")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:8476")
    found = environment([device, device])
    assert found["flags"] == {"JAX_PLATFORMS": "cpu", "ONEDNN_DEFAULT_FPMATH_MODE": "BF16", "XLA_FLAGS": "--a --b"}
    assert (found["num_devices"], found["cores"], found["device"]) == (2, num_cores(), device.device_kind)
    assert {"python", "jax", "jaxlib", "flax", "optax", "numpy"} <= {*found["versions"]}
    assert found["versions"]["jax"] == version("jax")
    assert environment([device], stream=True)["stream"] is None  # A CPU gives the same bits either way.
    monkeypatch.setenv("CNNJAX_ONEDNN", "0")
    assert environment([device])["kernels"] == "XLA"


def test_a_streamed_run_on_an_accelerator_is_another_environment():
    client = SimpleNamespace(platform_version="1")
    gpu: Any = SimpleNamespace(platform="cuda", device_kind="H200", client=client)
    streamed, in_memory = environment([gpu], stream=True), environment([gpu], stream=False)
    assert differences(streamed, in_memory) == {"stream": (True, False)}
    before = {name: value for name, value in streamed.items() if name != "stream"}  # Of a session that was not asked.
    assert differences(before, in_memory) == {}


def test_runs_that_were_compiled_with_other_options_differ(tmp_path, monkeypatch):
    """Whatever XLA_FLAGS contains: XLA may have read it before it was changed."""
    ours = environment(jax.devices()[:1])
    monkeypatch.setattr(manifest, "compiler_options", lambda: {"xla_gpu_deterministic_ops": True})
    with session(tmp_path, environment(jax.devices()[:1]), ()):
        pass
    saved = read_manifest(tmp_path)["sessions"][0]
    missing = ours["compiler_options"].keys() - {"xla_gpu_deterministic_ops"}
    assert missing
    assert differences(ours, saved) == {
        f"compiler_options.{name}": (ours["compiler_options"][name], None) for name in missing
    }


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_the_cores_are_those_of_the_process():
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        assert num_cores() == 1
    finally:
        os.sched_setaffinity(0, cores)
    assert num_cores() == len(cores)


def test_a_session_in_another_environment_or_under_a_clock_that_went_back(tmp_path):
    environment = ABOUT | {"versions": {"jax": "0.9.0"}, "files": {"own.py": "a"}}
    assert changes_since_last_session(tmp_path, environment) == []
    with session(tmp_path, environment, ()):
        pass
    assert changes_since_last_session(tmp_path, environment) == []
    other = {**environment, "versions": {"jax": "0.10.2"}, "files": {"own.py": "b"}}
    with session(tmp_path, {**environment, "on_epoch": "patience"}, ()):  # Those before recorded none.
        pass
    (line,) = changes_since_last_session(tmp_path, {**environment, "on_epoch": None})
    assert line == "`on_epoch`, which may stop the run, was patience and is None: it may end in another epoch."
    assert changes_since_last_session(tmp_path, {**environment, "on_epoch": "patience"}) == []
    (line,) = changes_since_last_session(tmp_path, {**other, "on_epoch": "patience"})
    assert line == (
        "This run resumes in another environment, so its bits may differ: files.own.py was a and is b; "
        "versions.jax was 0.9.0 and is 0.10.2."
    )
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    content["sessions"][-1]["ended"] = "2999-01-01T00:00:00+00:00"
    path.write_text(json.dumps(content))
    (tmp_path / "SHA256SUMS").unlink()
    (line,) = changes_since_last_session(tmp_path, {**environment, "on_epoch": "patience"})
    assert line.startswith("The clock says 20")
    assert "before the last session of this run (2999-01-01T00:00:00+00:00). The dates in" in line


def test_a_manifest_of_another_version(tmp_path):
    (tmp_path / "manifest.json").write_text('{"format": 1, "runs": [{}]}')
    with pytest.raises(UserError, match=r"manifest\.json must be of format 5, got 1: another version of cnnjax wrote"):
        read_manifest(tmp_path)
