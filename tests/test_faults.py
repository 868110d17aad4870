"""What a fault of the machine may not do: real processes, on a disk that is full, read-only or damaged."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

TRAIN = [sys.executable, "-m", "cnnjax", "train", "--dataset", "generated", "--model.name", "mlp"]
TRAIN += ["--num-epochs", "3", "--batch-size", "32"]
# Linux lets a process see a file system of its own.
MOUNTS = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], check=False, capture_output=True)
needs_mount = pytest.mark.skipif(MOUNTS.returncode != 0, reason="needs unshare -rm")


def run(command, expected=0, **environment):
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    assert done.returncode == expected, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done


def result_of(run_dir):
    return json.loads((run_dir / "result.json").read_text())["sha256"]


@pytest.fixture(scope="module")
def whole(prepared_dir, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run([*TRAIN, "--data-dir", str(prepared_dir), "--run-dir", str(run_dir)])
    return run_dir


@pytest.fixture(scope="module")
def whole_by_xla(prepared_dir, tmp_path_factory):
    """Without oneDNN's kernels, whose programs are never kept; beside the run, the cache."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    settings = {"XDG_CACHE_HOME": str(run_dir.with_name("cache")), "CNNJAX_ONEDNN": "0"}
    run([*TRAIN, "--data-dir", str(prepared_dir), "--run-dir", str(run_dir)], **settings)
    return run_dir


@needs_mount
def test_a_full_disk_stops_the_run_and_it_goes_on_once_there_is_room(whole, prepared_dir, tmp_path):
    """The parameters and Adam's moments take 8 MB: the disk holds two checkpoints, not three."""
    disk = tmp_path / "disk"
    disk.mkdir()
    train = " ".join([*TRAIN, "--data-dir", str(prepared_dir), "--run-dir", str(disk / "run")])
    script = f"""
        mount -t tmpfs -o size=16M tmpfs {disk}
        {train}; echo "status $?"
        ls {disk}/run/checkpoints
        {sys.executable} -m cnnjax eval {disk}/run --data-dir {prepared_dir}; echo "eval $?"
        mount -o remount,size=200M {disk}
        {train} --resume; echo "status $?"
        cp -r {disk}/run {tmp_path}/run
    """
    out = run(["unshare", "-rm", "sh", "-c", script])
    assert re.findall(r"status (\d+)", out.stdout) == ["1", "0"], out.stdout + out.stderr
    assert "No space left on device" in out.stderr and "make room, and go on by --resume" in out.stderr
    assert "eval 0" in out.stdout and "test accuracy" in out.stdout  # What was saved is readable.
    assert "resuming at step" in out.stdout
    assert result_of(tmp_path / "run") == result_of(whole)


@needs_mount
def test_a_cache_that_cannot_be_written_is_told_and_does_not_matter(whole_by_xla, prepared_dir, tmp_path):
    (tmp_path / "cache").mkdir()
    train = " ".join([*TRAIN, "--data-dir", str(prepared_dir), "--run-dir", str(tmp_path / "run")])
    script = f"mount -t tmpfs -o ro tmpfs {tmp_path}/cache && {train}"
    out = run(["unshare", "-rm", "sh", "-c", script], XDG_CACHE_HOME=str(tmp_path / "cache"), CNNJAX_ONEDNN="0")
    assert "cannot be written, so compiled programs are not kept: each start compiles again" in out.stdout
    assert result_of(tmp_path / "run") == result_of(whole_by_xla)


@pytest.mark.parametrize("damage", ["truncated", "a bit flipped"])
def test_a_damaged_compilation_cache_changes_no_bit(damage, whole_by_xla, prepared_dir, tmp_path):
    """A kill within the first compilation can leave half an entry; a disk can flip a bit."""
    cache = shutil.copytree(whole_by_xla.with_name("cache"), tmp_path / "cache")
    entries = list(cache.rglob("*-cache"))
    assert entries
    for path in entries:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else content)
    train = [*TRAIN, "--data-dir", str(prepared_dir), "--run-dir", str(tmp_path / "run")]
    run(train, XDG_CACHE_HOME=str(cache), CNNJAX_ONEDNN="0")
    assert result_of(tmp_path / "run") == result_of(whole_by_xla)


def test_a_damaged_checkpoint_is_told_and_the_run_ends_in_the_same_bits(whole, prepared_dir, tmp_path):
    run_dir = shutil.copytree(whole, tmp_path / "run")
    train = [*TRAIN, "--data-dir", str(prepared_dir), "--run-dir", str(run_dir)]
    (run_dir / "result.json").unlink()  # As if it had been killed just before its end.
    data = max((p for p in (run_dir / "checkpoints" / "39").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[-100] ^= 4
    data.write_bytes(content)
    again = run([*train, "--resume"])
    assert "The checkpoint of step 39 cannot be used: state/" in again.stdout
    assert "resuming at step 26 of 39" in again.stdout
    assert result_of(run_dir) == result_of(whole)
    sessions = json.loads((run_dir / "manifest.json").read_text())["sessions"]
    assert [s["resumed_from"] for s in sessions] == [None, 26]
