import hashlib
import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import Field, FiniteFloat
from typing_extensions import TypedDict

from cnnjax import UserError
from cnnjax.files import (
    atomic_write,
    cache_dir,
    check_local,
    check_sums,
    read_json,
    tree_sha256,
    write_file,
    write_json,
    write_sums,
)


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


class Inner(TypedDict):
    size: Annotated[int, Field(ge=1)]
    share: FiniteFloat


class Content(TypedDict):
    name: str
    parts: list[Inner]


VALID = {"name": "é漢", "parts": [{"size": 2, "share": 1}]}


def test_a_json_file_is_read_as_it_was_written(tmp_path):
    write_json(tmp_path / "a.json", VALID)
    assert read_json(tmp_path / "a.json", Content) == VALID
    write_json(tmp_path / "a.json", {**VALID, "name": os.fsdecode(b"a\xff")})  # A file name that is not UTF-8.
    assert read_json(tmp_path / "a.json", Content)["name"] == "a\\udcff"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"a\.json must be JSON, got EOF .*\. Restore the file, or train again\."),
        ("[" * 200_000, r"a\.json must be JSON, got recursion limit exceeded"),
        (b"\xff\xfe{", r"a\.json must be JSON, got "),
        ("5", r"a\.json must be an object, got 5\."),
        ("{}", r"`name` in .*a\.json must be there, got nothing\."),
        ('{"name": null, "parts": []}', r"`name` in .*a\.json must be a valid string, got None\."),
        ('{"name": "", "parts": [{"size": 1.0, "share": 1}]}', r"`parts\.0\.size` .* a valid integer, got 1\.0\."),
        ('{"name": "", "parts": [{"size": true, "share": 1}]}', r"`parts\.0\.size` .* a valid integer, got True\."),
        (
            '{"name": "", "parts": [{"size": 0, "share": 1}]}',
            r"`parts\.0\.size` .* greater than or equal to 1, got 0\.",
        ),
        ('{"name": "", "parts": [{"size": 1, "share": NaN}]}', r"`parts\.0\.share` .* a finite number, got nan\."),
        ('{"name": "", "parts": [{"size": 1, "share": "1"}]}', r"`parts\.0\.share` .* a valid number, got '1'\."),
    ],
)
def test_the_content_of_a_json_file_is_checked(content, message, tmp_path):
    (tmp_path / "a.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        read_json(tmp_path / "a.json", Content)


def test_a_json_file_that_cannot_be_read(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(UserError, match=r"a\.json must be a readable JSON file, got .*No such file.* Restore the file"):
        read_json(path, Content)
    path.symlink_to(path)
    with pytest.raises(UserError, match=r"a\.json must be a readable JSON file, got .*Too many levels"):
        read_json(path, Content)
    path.unlink()
    os.mkfifo(path)  # Opening it would wait for a writer.
    with pytest.raises(UserError, match=r"a\.json must be a readable JSON file, got .*Not a regular file"):
        read_json(path, Content)


def test_a_url_is_not_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for url in ("gs://bucket/run", "s3://bucket", "file:///run"):
        with pytest.raises(UserError, match=rf"`run_dir` must be a local folder, got {url[:3]}.*\. Mount it"):
            check_local("run_dir", Path(url))
    (tmp_path / "gs:").mkdir()
    for path in ("gs:/bucket", "runs/gs:/a", "/gs:/a", "c:/a", "a b:/c", ""):
        check_local("run_dir", Path(path))


def test_a_relative_cache_home_is_ignored(monkeypatch, tmp_path):
    """As the XDG Base Directory Specification demands."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, folder in (("/a", "/a"), ("a", f"{tmp_path}/.cache"), ("", f"{tmp_path}/.cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_dir() == Path(folder, "cnnjax")


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
    assert check_sums(folder) == {"SHA256SUMS": "damaged"}
    sums.write_text(f"{'0' * 64}  a\0b\n")
    assert check_sums(folder) == {"a": "no checksum", "sub/b": "no checksum", "SHA256SUMS": "damaged"}
    sums.unlink()
    assert check_sums(folder) == {"SHA256SUMS": "missing"}
