import hashlib
import os
import subprocess
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import UserError
from cnnjax.runs.files import check_sums, read_json, tree_sha256, write_json, write_sums, write_whole


def test_a_reader_sees_the_old_file_or_the_new_never_a_part(tmp_path):
    path, contents = tmp_path / "file", {b"a" * 300_000, b"b" * 500_000}
    write_whole(path, b"a" * 300_000)
    done = threading.Event()

    def write():
        for _ in range(30):
            for content in contents:
                write_whole(path, content)
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not done.is_set():
        assert path.read_bytes() in contents
    thread.join()


def test_a_write_that_fails_keeps_the_old_file(tmp_path, monkeypatch):
    write_whole(tmp_path / "file", "old")

    def fsync(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "file", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


def test_json_that_is_missing_or_damaged(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, None]})
    assert read_json(tmp_path / "a.json") == {"x": [1, None]}
    with pytest.raises(UserError, match=r"b\.json must be a readable JSON file, got .*No such file"):
        read_json(tmp_path / "b.json")
    for content in (b'{"x": ', b"\xff\xfe{"):
        (tmp_path / "b.json").write_bytes(content)
        with pytest.raises(UserError, match=r"b\.json must be a readable JSON file, got "):
            read_json(tmp_path / "b.json")


def test_the_digest_of_a_tree_is_that_of_its_description_and_bytes():
    kernel, bias = np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros(3, np.int32)
    expected = hashlib.sha256(
        b"['bias'] int32 [3]\n" + bias.tobytes() + b"['kernel'] float32 [2, 3]\n" + kernel.tobytes()
    ).hexdigest()
    assert tree_sha256({"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}) == expected


@pytest.mark.parametrize(
    "other",
    [
        {"a": jnp.float32(-0.0)},  # Equal to 0.0, but not in its bits.
        {"b": jnp.float32(0.0)},
        {"a": jnp.int32(0)},
        {"a": jnp.zeros((1,))},
        {"a": jnp.float32(1e-45)},
    ],
)
def test_the_digest_of_a_tree_sees_name_dtype_shape_and_every_bit(other):
    assert tree_sha256({"a": jnp.float32(0.0)}) != tree_sha256(other)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_bytes(b"content")
    (folder / "sub" / "b").write_bytes(b"")
    write_sums(folder, ["sub/b", "a"])
    return folder


def test_coreutils_agree_with_our_checksums(folder):
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["a: OK", "sub/b: OK"]
    assert check_sums(folder) == {"a": "ok", "sub/b": "ok"}


def test_what_is_wrong_with_files(folder, tmp_path):
    (folder / "a").write_bytes(b"c0ntent")
    (folder / "sub" / "b").unlink()
    (folder / "sub" / "c").touch()
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    assert check_sums(folder) == {
        "a": "damaged",
        "sub/b": "missing",
        "sub/c": "no checksum",
        "link": "leads out of the folder",
    }


def test_a_checksum_file_that_is_damaged_or_leads_out(folder, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"content")
    line = f"{hashlib.sha256(b'content').hexdigest()}  "
    for name in ("../secret", str(secret)):
        (folder / "SHA256SUMS").write_text(f"{line}{name}\n")
        assert check_sums(folder)[name] == "leads out of the folder"
    (folder / "SHA256SUMS").write_text("no checksum\n")
    assert check_sums(folder)["SHA256SUMS"] == "damaged"
    (folder / "SHA256SUMS").unlink()
    assert check_sums(folder) == {"SHA256SUMS": "missing"}
