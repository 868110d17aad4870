"""What a fault of the machine must not do: a disk that is full or cannot be written, damaged files."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from stress import AS_USER

from cnnjax.cli.main import main
from cnnjax.runs.manifest import read_manifest

PROGRAMS = Path(__file__).with_name("programs")
# Linux shows a process its own file systems.
MOUNTS = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], check=False, capture_output=True)
CAN_DROP = os.geteuid() != 0 or shutil.which("setpriv") is not None
needs_capabilities = pytest.mark.skipif(not CAN_DROP, reason="permissions do not hold for root without setpriv")
needs_mount = pytest.mark.skipif(MOUNTS.returncode != 0, reason="needs unshare -rm")


@pytest.fixture(scope="module")
def options(prepared_dir):
    """Options of `cnnjax train`: a checkpoint is 8 MB, of parameters and of Adam's moments."""
    options = ["--dataset", "generated", "--data-dir", str(prepared_dir)]
    return [*options, "--model", "mlp", "--num-epochs", "3", "--batch-size", "32"]


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """A run without faults."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    main(["train", *options, "--run-dir", str(run_dir)])
    return run_dir


def digests(run_dir):
    return json.loads((run_dir / "result.json").read_text())["sha256"]


def run(command, **environment):
    """Runs a process that must succeed without a traceback."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done


@needs_mount
def test_a_full_disk_stops_the_run_which_resumes_when_there_is_room(whole, options, tmp_path):
    program = [sys.executable, str(PROGRAMS / "full_disk.py"), str(tmp_path), *options]
    done = run(["unshare", "-rm", *program])
    assert re.findall(r"status (\d)", done.stdout) == ["1", "0", "0"], done.stdout + done.stderr
    assert "No space left on device" in done.stderr
    assert "checkpoints of the run are kept: remove the cause, then resume it: --resume" in done.stderr
    assert "test accuracy" in done.stdout.split("status 0")[0]  # The earlier checkpoints can be read.
    assert "resuming at step" in done.stdout
    assert json.loads(done.stdout[done.stdout.rindex("\n{") :])["sha256"] == digests(whole)


@needs_capabilities
def test_a_folder_that_cannot_be_written_or_read_ends_the_process_at_once(whole, options, tmp_path):
    """Orbax's threads once waited for minutes after the message."""
    run_dir = Path(shutil.copytree(whole, tmp_path / "run"))
    (run_dir / "result.json").unlink()
    shutil.rmtree(run_dir / "checkpoints" / "39")
    command = [*AS_USER, sys.executable, "-m", "cnnjax", "train", *options, "--run-dir", str(run_dir), "--resume"]
    for path, mode, status, message in (
        (run_dir / "checkpoints", 0o555, 1, "could not be written in .* \\(Permission denied\\)"),
        (run_dir / "checkpoints" / "26" / "SHA256SUMS", 0, 2, "26 must be readable, but SHA256SUMS is unreadable"),
        (run_dir / "checkpoints", 0, 1, "Permission denied"),
        (run_dir / "config.json", 0, 2, "config.json must be a readable JSON file, got .*Permission denied"),
    ):
        before = path.stat().st_mode
        path.chmod(mode)
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
        path.chmod(before)
        assert done.returncode == status, done.stdout + done.stderr
        assert re.search(message, done.stderr), done.stderr
        assert "Traceback" not in done.stderr
    done = run(command)
    assert "resuming at step 26 of 39" in done.stdout
    assert digests(run_dir) == digests(whole)


@pytest.mark.slow
def test_a_second_start_uses_compiled_programs_unless_they_are_damaged(options, tmp_path):
    """A kill can leave half a file, and disks flip bits."""
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_LOG_COMPILES": "1"}
    command = [sys.executable, "-m", "cnnjax", "train", *options, "--num-epochs", "1"]
    first = run([*command, "--run-dir", str(tmp_path / "first")], **environment)
    program = [sys.executable, str(PROGRAMS / "damaged_cache.py"), str(tmp_path), *options, "--num-epochs", "1"]
    second = run(program, **environment)
    intact, damaged = second.stderr.split("damaged:\n")
    hit = "Persistent compilation cache hit for 'jit_train_steps'"
    assert [hit in errors for errors in (first.stderr, intact, damaged)] == [False, True, False]
    assert digests(tmp_path / "first") == digests(tmp_path / "intact") == digests(tmp_path / "damaged")


def test_a_cache_that_cannot_be_written_is_reported_and_does_not_matter(whole, options, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    main(["train", *options, "--run-dir", str(tmp_path / "run")])
    assert "cannot be written, so compiled programs are not kept: each start compiles again" in capsys.readouterr().out
    assert digests(tmp_path / "run") == digests(whole)


def test_a_damaged_checkpoint_is_reported_and_the_run_ends_in_the_same_bits(whole, options, tmp_path, capsys):
    run_dir = Path(shutil.copytree(whole, tmp_path / "run"))
    (run_dir / "result.json").unlink()  # As if the process had been killed just before its end.
    files = (path for path in (run_dir / "checkpoints" / "39").rglob("*") if path.is_file())
    data = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[-100] ^= 4
    data.write_bytes(content)
    main(["train", *options, "--run-dir", str(run_dir), "--resume"])
    out = capsys.readouterr().out
    assert "The checkpoint of step 39 cannot be used: state/" in out
    assert "resuming at step 26 of 39" in out
    assert digests(run_dir) == digests(whole)
    assert [session["resumed_from"] for session in read_manifest(run_dir)["sessions"]] == [None, 26]
