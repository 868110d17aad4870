import hashlib
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import UserError
from cnnjax.runs.files import atomic_write, check_sums, read_json, tree_sha256, write_file, write_json, write_sums


def test_readers_see_the_old_or_the_new_file_but_no_part_of_it(tmp_path):
    path, contents = tmp_path / "file", (b"a" * 300_000, b"b" * 500_000)
    write_file(path, contents[0])
    done = threading.Event()

    def write():
        for content in contents * 30:
            write_file(path, content)
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not done.is_set():
        assert path.read_bytes() in contents
    thread.join()


def test_shared_file_is_complete_with_several_writers(tmp_path):
    path, contents = tmp_path / "file", [bytes([i]) * 200_000 for i in range(4)]
    together = threading.Barrier(4, timeout=5)

    def write(content):
        for _ in range(5):
            with atomic_write(path, shared=True) as file:
                file.write(content[:100_000])
                together.wait()
                file.write(content[100_000:])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, contents))
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


def test_failed_write_keeps_the_old_file(tmp_path, small_disk):
    write_file(tmp_path / "file", "old")
    with pytest.raises(OSError, match="File too large"):
        write_file(tmp_path / "file", "new" * 200_000)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


def test_json_file_must_exist_and_be_valid(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, None]})
    assert read_json(tmp_path / "a.json") == {"x": [1, None]}
    with pytest.raises(UserError, match=r"b\.json must be a readable JSON file, got .*No such file"):
        read_json(tmp_path / "b.json")
    for content in (b'{"x": ', b"\xff\xfe{"):
        (tmp_path / "b.json").write_bytes(content)
        with pytest.raises(UserError, match=r"b\.json must be a readable JSON file, got "):
            read_json(tmp_path / "b.json")


def test_tree_digest_by_hand():
    kernel, bias = np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros(3, np.int32)
    expected = hashlib.sha256(
        b"['bias'] int32 [3]\n" + bias.tobytes() + b"['kernel'] float32 [2, 3]\n" + kernel.tobytes()
    ).hexdigest()
    assert tree_sha256({"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}) == expected


@pytest.mark.parametrize(
    "other",
    [
        {"a": jnp.float32(-0.0)},  # Equals 0.0, but its bits differ.
        {"b": jnp.float32(0.0)},
        {"a": jnp.int32(0)},
        {"a": jnp.zeros((1,))},
        {"a": jnp.float32(1e-45)},
    ],
)
def test_tree_digest_depends_on_name_dtype_shape_and_every_bit(other):
    assert tree_sha256({"a": jnp.float32(0.0)}) != tree_sha256(other)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_bytes(b"content")
    (folder / "sub" / "b").write_bytes(b"")
    write_sums(folder, ["sub/b", "a"])
    return folder


def test_checksums_have_the_format_of_coreutils(folder):
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["a: OK", "sub/b: OK"]
    assert check_sums(folder) == {"a": "ok", "sub/b": "ok"}


def test_status_of_changed_missing_new_and_linked_files(folder, tmp_path):
    (folder / "a").write_bytes(b"c0ntent")
    (folder / "sub" / "b").unlink()
    (folder / "sub" / "c").touch()
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    assert check_sums(folder) == {
        "a": "damaged",
        "sub/b": "missing",
        "sub/c": "no checksum",
        "link": "outside the folder",
    }


def test_files_outside_the_folder_are_not_read(folder, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"content")
    for name in ("../secret", str(secret)):
        (folder / "SHA256SUMS").write_text(f"{hashlib.sha256(b'content').hexdigest()}  {name}\n")
        assert check_sums(folder)[name] == "outside the folder"


def test_damaged_or_missing_checksum_file(folder):
    sums = folder / "SHA256SUMS"
    sums.write_text(sums.read_text() + "no checksum\n")
    assert check_sums(folder) == {"a": "ok", "sub/b": "ok", "SHA256SUMS": "damaged"}
    sums.write_bytes(b"\xff")
    assert check_sums(folder) == {"SHA256SUMS": "missing"}
    sums.unlink()
    assert check_sums(folder) == {"SHA256SUMS": "missing"}
