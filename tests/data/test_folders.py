"""The tfds directory: names, versions and faults; processes that prepare a set at the same time, or are killed."""

import errno
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from filelock import FileLock
from PIL import Image

from cnnjax import UserError
from cnnjax.data import datasets
from cnnjax.data.cache import CACHE
from cnnjax.data.folders import default_data_dir, exclusive, prepared_folder, publish, staging
from cnnjax.data.named import NAMED_SETS
from cnnjax.data.tfds_prepare import prepare_other

PROGRAM = Path(__file__).parents[1] / "programs" / "prepare.py"
MOUNTS = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], check=False, capture_output=True)


def silent(line):
    pass


load_dataset = functools.partial(datasets.load_dataset, say=silent)


@pytest.fixture
def data_dir(prepared_dir, tmp_path):
    """A copy of the generated set, without cached arrays, that a test may damage."""
    shutil.copytree(prepared_dir / "generated", tmp_path / "tfds" / "generated", ignore=shutil.ignore_patterns(CACHE))
    return tmp_path / "tfds"


# --- Names and versions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, near",
    [
        ("cifr10", "cifar10"),
        ("fashion-mnist", "fashion_mnist"),
        ("CIFAR10", "cifar10"),
        ("generatd", "generated"),
        ("photo", "photos"),  # A folder here.
    ],
)
def test_an_unknown_name_suggests_similar_ones(name, near, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match=f"`dataset` must be a known name, got '{name}'. Did you mean .*{near}"):
        load_dataset(name, data_dir)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "", "x" + "/x" * 300, "mnist/../x\n"], ids=repr)
def test_a_name_that_can_be_no_folder(name, data_dir):
    with pytest.raises(UserError, match=r"`dataset` (must be a known name|.* is not prepared in)"):
        load_dataset(name, data_dir)
    assert [path.name for path in data_dir.iterdir()] == ["generated"]


def test_a_mistyped_data_dir_is_named_instead_of_another_set(data_dir, tmp_path):
    mistyped, absent = tmp_path / "tfd", r"There is no folder \w+ here, either\.$"
    for name in ("generated", *(() if importlib.util.find_spec("tensorflow") else ("svhn_cropped",))):
        with pytest.raises(
            UserError,
            match=rf"'{name}'.* The folder {mistyped} \(`data_dir`\) does not exist\.( {absent})?$",
        ) as error:
            load_dataset(name, mistyped)
        assert "Did you mean" not in str(error.value)
    assert not mistyped.exists()
    with pytest.raises(UserError, match=rf"got 'mine'\. {data_dir} holds generated\. {absent}"):
        load_dataset("mine", data_dir)
    (mistyped / "mine" / "config").mkdir(parents=True)
    with pytest.raises(
        UserError,
        match=rf"{mistyped / 'mine'} holds no finished version, only config\. {absent}",
    ):
        load_dataset("mine", mistyped)
    with pytest.raises(UserError, match=rf"{mistyped} holds no prepared set\. {absent}"):
        load_dataset("generated", mistyped)
    shutil.copytree(data_dir / "generated", mistyped / "mine" / "config", dirs_exist_ok=True)
    with pytest.raises(UserError, match=rf"{mistyped} holds mine/config\. {absent}"):
        load_dataset("generated", mistyped)
    assert load_dataset("mine/config", mistyped).num_classes == 10


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="TensorFlow would prepare the set")
@pytest.mark.parametrize("name", ["svhn_cropped", "imagenet_resized/8x8"])
def test_a_set_that_is_not_prepared_needs_tensorflow(name, tmp_path):
    with pytest.raises(UserError, match=f"`dataset` '{name}' is not prepared in {tmp_path}, and only TensorFlow"):
        load_dataset(name, tmp_path)


def test_the_newest_version_is_chosen_or_that_of_the_run(data_dir):
    assert prepared_folder("absent", data_dir) is None
    for version in ("3.0.9", "3.0.10", "incomplete.ABC_3.0.11"):
        shutil.copytree(data_dir / "generated" / "3.0.1", data_dir / "generated" / version)
    (data_dir / "generated" / "3.1.0").mkdir()  # Empty: not prepared.
    for version, chosen in ((None, "3.0.10"), ("3.0.9", "3.0.9"), ("3.1.0", "3.0.10"), ("0123456789ab", "3.0.10")):
        assert prepared_folder("generated", data_dir, version) == data_dir / "generated" / chosen
    assert load_dataset("generated", data_dir, version="3.0.9").version == "3.0.9"
    assert load_dataset("generated", data_dir).version == "3.0.10"


# --- Folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "name", "message"),
    [
        ("mnist", "data", "`data_dir` must be a directory that can be written, got {} ([Errno 17] File exists"),
        (
            "mnist",
            "data/below",
            "`data_dir` must be a directory that can be written, got {} ([Errno 20] Not a directory",
        ),
        ("mnist", "loop", "`data_dir` must be a directory that can be read, got {}/mnist (Too many levels"),
        ("generated", "data", "`dataset` must be a known name, got 'generated'. {} is not a folder."),
        ("generated", "data/below", "'generated'. The folder {} (`data_dir`) does not exist."),
        ("generated", "loop", "`data_dir` must be a directory that can be read, got {}/generated (Too many levels"),
    ],
)
def test_a_data_dir_that_is_no_folder_is_an_error(dataset, name, message, tmp_path):
    (tmp_path / "data").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=re.escape(message.format(tmp_path / name))):
        load_dataset(dataset, tmp_path / name)


def test_a_url_is_no_data_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for url in ("gs://bucket/x", "s3://bucket", "file:///tmp/x"):
        with pytest.raises(UserError, match="`data_dir` must be a local"):
            load_dataset("mnist", Path(url))
        with pytest.raises(UserError, match=f"`dataset` must be a name or a local path, got '{url}'. Mount it, or"):
            load_dataset(url, tmp_path)
        monkeypatch.setenv("TFDS_DATA_DIR", url)
        with pytest.raises(UserError, match="`data_dir` must be a local"):
            load_dataset("mnist")
    assert not list(tmp_path.iterdir())


def test_the_default_data_dir_is_that_of_tfds(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    assert default_data_dir() == tmp_path / "tensorflow_datasets"
    monkeypatch.setenv("TFDS_DATA_DIR", "~/sets")
    assert default_data_dir() == tmp_path / "sets"


def test_load_dataset_searches_the_default_data_dir(data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    assert load_dataset("generated").folder == data_dir / "generated" / "3.0.1"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_user_without_home_or_permission(data_dir):
    """A container may run with a user that the system does not know; the first directory is readable, the rest not."""
    program = """
import os, sys
from pathlib import Path
os.setreuid(54321, 0)  # As root, it can still import.
from cnnjax import UserError
from cnnjax.data.datasets import load_dataset

def attempt(data_dir):
    try:
        print(load_dataset("generated", data_dir and Path(data_dir), say=print).num_classes)
    except UserError as error:
        print(error)

attempt(None)
attempt("~/sets")
attempt("~nobody-at-all/sets")
readable, *others = sys.argv[1:]
attempt(readable)
os.seteuid(54321)
for folder in others:
    attempt(folder)
"""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        damage = {"intact": "intact", "set": "set/generated", "version": "version/generated/3.0.1"}
        for file in ("dataset_info.json", "features.json", "label.labels.txt"):
            damage[file] = f"{file}/generated/3.0.1/{file}"
        for name, closed in {"dir": "dir", **damage}.items():
            shutil.copytree(data_dir, Path(folder, name))
            if name != "intact":
                Path(folder, closed).chmod(0)
        environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "TFDS_DATA_DIR")}
        command = [sys.executable, "-c", program, str(data_dir), *(f"{folder}/{name}" for name in ("dir", *damage))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr, done.stderr
        homeless, absent = done.stdout.splitlines()[:3], "`data_dir` must be without ~ for a user without a home"
        assert [line.partition(" directory,")[0] for line in homeless] == [absent] * 3
        assert done.stdout.splitlines()[3:5] == ["decoding generated 3.0.1 (once)", "10"]
        got = done.stdout.splitlines()[5:]
        assert re.fullmatch(
            rf"`data_dir` must be a directory that can be read, got {folder}/dir.* \(Permission .*", got[0]
        )
        # Without permission to write there, every start decodes it.
        assert got[1] == "decoding generated 3.0.1 (once)"
        assert re.fullmatch("the decoded arrays cannot be cached .*Permission denied.*", got[2])
        assert got[3] == "10"
        assert f"got {folder}/set/generated (Permission denied)" in got[4]
        assert f"got {folder}/version/generated/3.0.1 (Permission denied)" in got[5]
        for file, line in zip(("dataset_info.json", "features.json", "label.labels.txt"), got[7::2], strict=True):
            path = Path(folder, file, "generated", "3.0.1")
            assert (
                line
                == f"{path} must be readable, got [Errno 13] Permission denied: '{path / file}'. Fix its permissions."
            )


# --- Preparing ------------------------------------------------------------------------------------------------------


def next_line(process):
    """Returns the next line that says something about another process, or the last one."""
    return next(line for line in process.stdout if re.match("waiting|halfway|True|False|`", line)).strip()


def test_a_second_process_waits_for_the_first_and_removes_what_it_left_when_killed(tmp_path):
    start = functools.partial(
        subprocess.Popen, [sys.executable, PROGRAM, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    waiting = f"waiting for another process, which prepares fashion_mnist in {tmp_path}"
    with start() as killed, start() as second, start() as third:
        try:
            lines = {next_line(process): process for process in (killed, second, third)}
            assert {*lines} == {"halfway", waiting}
            first = lines["halfway"]
            rest = [process for process in (killed, second, third) if process is not first]
            others = [*tmp_path.glob(".cnnjax-fashion_mnist.????????")]
            assert len(others) == 1
            partial = tmp_path / "downloads" / "cnnjax" / "fashion_mnist" / "archive.12.34.partial"
            for path in (partial, partial.with_name("mine.partial"), tmp_path / "fashion_mnist" / "incomplete.X_3.0.1"):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("")
            first.kill()
            # Whichever gets the lock prepares the set; the last one reads what it has cached.
            for process in rest:
                process.stdin.write("\n")
                process.stdin.flush()
            outputs = sorted((process.communicate()[0] for process in rest), key=len)
        finally:
            for process in (killed, second, third):
                process.kill()
    assert outputs[0] == "True, a mirror\n"
    assert outputs[1].splitlines()[-4:] == [
        *("halfway", "fashion_mnist was served by a mirror", "decoding fashion_mnist 3.0.1 (once)", "True, a mirror")
    ]
    # The second sets up its own folder; what other tools may be writing stays.
    assert not [*tmp_path.glob(".cnnjax-fashion_mnist.????????")]
    assert sorted(path.name for path in (tmp_path / "fashion_mnist").iterdir()) == ["3.0.1", "incomplete.X_3.0.1"]
    assert [path.name for path in partial.parent.iterdir()] == ["mine.partial"]


@pytest.mark.skipif(MOUNTS.returncode != 0, reason="needs unshare -rm")
@pytest.mark.parametrize("size", ["250k", "2600k"])
def test_a_full_disk_leaves_nothing_useless(size, tmp_path):
    """250 kB are too small for the set; 2600 kB hold it and the decoded images of one split."""
    command = ["unshare", "-rm", sys.executable, PROGRAM, tmp_path, size]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert "Traceback" not in done.stderr, done.stderr
    *_, result, left = done.stdout.splitlines()
    if size == "250k":
        assert re.match("`data_dir` must be a directory that can be written, got .*No space left on device", result)
        assert left == "left: .cnnjax-fashion_mnist.lock"
    else:
        assert re.search("the decoded arrays cannot be cached .*/test_image.npy", done.stdout)
        assert result == "True, a mirror"
        assert ".npy" not in left and "dataset_info.json" in left


def test_a_pipe_in_place_of_an_archive_is_an_error(tmp_path):
    downloads = tmp_path / "downloads" / "cnnjax" / "mnist"
    downloads.mkdir(parents=True)
    os.mkfifo(downloads / NAMED_SETS["mnist"].archives()[0].filename)
    with pytest.raises(UserError, match=f"`data_dir` must be a directory .*Not a regular file: '{downloads}"):
        load_dataset("mnist", tmp_path)


def test_leftovers_of_a_cache_are_removed(data_dir):
    cache = data_dir / "generated" / "3.0.1" / CACHE
    cache.mkdir()
    (cache / "train_image.npy.12.34.partial").write_text("")
    load_dataset("generated", data_dir)
    assert not list(cache.glob("*.partial"))


def test_leftovers_of_the_cache_of_a_folder_are_removed(tmp_path):
    for i in range(8):
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), 9 * i).save(path)
    cache = load_dataset(tmp_path / "photos", tmp_path, image_size=4).folder / CACHE
    (cache / "facts.json").unlink()
    (cache / "train_image.npy.12.34.partial").write_text("")
    load_dataset(tmp_path / "photos", tmp_path, image_size=4)
    assert not list(cache.glob("*.partial"))


def test_without_locks_nothing_is_removed(tmp_path, monkeypatch):
    def no_locks(self, timeout=None):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", no_locks)
    left = tmp_path / ".cnnjax-mnist.abcd_123"
    left.mkdir()
    with exclusive("mnist", tmp_path, silent) as locked, staging("mnist", tmp_path, locked) as stage:
        assert not locked
        assert sorted(tmp_path.iterdir()) == sorted([left, stage])
    assert list(tmp_path.iterdir()) == [left]


def test_with_a_lock_the_leftovers_of_this_set_alone_are_removed(tmp_path):
    names = [".cnnjax-mnist.abcd_123", ".cnnjax-mnist.x.abcd_123", ".cnnjax-mnist_x.abcd_123", "abcd_123"]
    for name in names:
        (tmp_path / name / "mnist").mkdir(parents=True)
    with exclusive("mnist", tmp_path, silent) as locked, staging("mnist", tmp_path, locked):
        assert locked
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == sorted(names[1:])


def test_a_folder_that_cannot_be_written_is_named_without_a_temporary_one(tmp_path, monkeypatch):
    def fail(prefix, **options):
        raise PermissionError(errno.EACCES, "Permission denied", f"{options['dir']}/{prefix}12345678")

    monkeypatch.setattr("tempfile.mkdtemp", fail)
    with pytest.raises(PermissionError) as caught, staging("mnist", tmp_path, locked=False):
        pass
    assert caught.value.filename == str(tmp_path)


@pytest.mark.parametrize("there", ["nothing", "empty", "prepared", "other"])
def test_a_version_replaces_no_folder_that_holds_something(there, tmp_path):
    folder, target = tmp_path / "stage" / "mnist" / "3.0.1", tmp_path / "mnist" / "3.0.1"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("new")
    if there != "nothing":
        target.mkdir(parents=True)
    if there in ("prepared", "other"):
        (target / {"prepared": "dataset_info.json", "other": "mine"}[there]).write_text("old")
    if there == "other":
        with pytest.raises(OSError, match="not empty"):
            publish(folder, tmp_path / "stage", tmp_path)
        with pytest.raises(UserError, match=f"^{target} must be .*, got a folder with mine. Move it away.$"):
            load_dataset("mnist", tmp_path)
        assert (target / "mine").read_text() == "old"
    else:
        assert publish(folder, tmp_path / "stage", tmp_path) == target
        assert (target / "dataset_info.json").read_text() == ("old" if there == "prepared" else "new")


class StubBuilder:
    """A builder of tfds whose set has a default config."""

    def __init__(self, name, data_dir):
        self.data_dir = f"{data_dir}/{name}/default/1.0.0"

    def download_and_prepare(self, file_format, download_dir):
        assert file_format == "array_record"
        Path(self.data_dir).mkdir(parents=True)
        if (download_dir / "closed").exists():
            raise ConnectionError("no network")
        Path(self.data_dir, "dataset_info.json").write_text("{}")


def test_tensorflow_prepares_a_set_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds, "builder", StubBuilder)
    (tmp_path / "downloads" / "closed").mkdir(parents=True)

    def prepare():
        with staging("odd", tmp_path, locked=True) as stage:
            return prepare_other("odd", tmp_path, stage, lines.append)

    lines = []
    with pytest.raises(UserError, match=f"tfds could not prepare 'odd' in {tmp_path}: no network"):
        prepare()
    assert [path.name for path in tmp_path.iterdir()] == ["downloads"]
    (tmp_path / "downloads" / "closed").rmdir()
    for _ in range(2):  # The second finds the default config.
        assert prepare() == tmp_path / "odd" / "default" / "1.0.0"
    assert lines == [f"tfds is preparing odd in {tmp_path}"] * 2
    assert [path.name for path in (tmp_path / "odd" / "default" / "1.0.0").iterdir()] == ["dataset_info.json"]
