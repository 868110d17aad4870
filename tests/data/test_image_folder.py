"""Folders of images as prepared sets: content, changes, and processes that are killed or simultaneous."""

import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from cnnjax import UserError
from cnnjax.cli.main import main
from cnnjax.data import image_folder
from cnnjax.data.datasets import load_dataset
from cnnjax.data.image_files import read_image

PROGRAM = Path(__file__).parents[1] / "programs" / "prepare_folder.py"
MOUNTS = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], check=False, capture_output=True)
start = partial(subprocess.Popen, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Two classes of six images."""
    for i in range(12):
        path = tmp_path / "My photos" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(i, 64, 64, 3)).save(path, compress_level=0)  # All have the same size.
    return tmp_path / "My photos"


def prepare(folder, said=None, **options):
    """Prepares a folder in data/ next to it."""
    said = [] if said is None else said
    return image_folder.prepare_folder(
        folder, folder.parent / "data", say=said.append, **{"image_shape": (64, 64, 3), **options}
    )


def rows(version, split="train"):
    """Returns the examples of a split, by the name of the file, as plain tfds reads them."""
    builder = tfds.builder_from_directory(version)
    return {row["file"].decode(): row for row in builder.as_data_source(split=split)}, builder.info


def is_reading(lines):
    return any(line.startswith("reading") for line in lines)


def test_a_file_beside_the_classes_whose_name_is_not_utf_8(folder):
    (folder / os.fsdecode(b"r\xe9sum\xe9.txt")).touch()
    data_dir, lines = folder.parent / "data", []
    for _ in range(2):
        assert len(load_dataset(folder, data_dir, lines.append, image_size=64).load("train").label) == 10
    assert sum(line.startswith("reading") for line in lines) == 1
    assert any(line.startswith(r"not used, because they are in no class folder: 'r\\xe9sum") for line in lines)


# --- The content ----------------------------------------------------------------------------------------------------


def test_every_kind_of_image_has_the_pixels_that_predict_reads(tmp_path):
    root, color, exif = tmp_path / "train" / "猫", noise(0, 20, 30, 3), Image.Exif()
    exif[0x0112] = 6  # Orientation: rotated by a quarter.
    for label in (root, root.with_name("dog")):
        label.mkdir(parents=True)
        Image.fromarray(color[:16, :12]).save(label / "plain.png")
        Image.fromarray(color[0]).save(label / "gray.png")
    image = Image.fromarray(color)
    image.save(root / "gedreht ä.jpg", exif=exif)
    image.convert("CMYK").save(root / "cmyk.jpg")
    image.convert("P").save(root / "palette.gif")
    image.convert("1").save(root / "1.tiff")
    image.save(root / "animation.webp", save_all=True, append_images=[Image.new("RGB", (30, 20))])
    Image.fromarray(np.uint16(color[..., 0]) * 257).save(root / "16 bits.png")
    Image.fromarray(noise(1, 20, 30, 4)).save(root / "alpha.png")
    for options in (
        {"image_shape": (16, 12, 3)},
        {"image_shape": (16, 12, 4), "resize": "pad", "interpolation": "bilinear"},
        {"image_shape": (8, 24, 1), "resize": "stretch"},
    ):
        found, info = rows(prepare(tmp_path / "train", **options))
        assert info.features["label"].names == ["dog", "猫"]
        assert len(found) == 11
        shape, *fit = options.values()
        for name, row in found.items():
            expected = read_image(tmp_path / "train" / name, shape, **dict(zip([*options][1:], fit, strict=True)))
            np.testing.assert_array_equal(row["image"], expected, strict=True)
            assert row["label"] == (name[0] == "猫")


def test_splits_are_kept_and_files_that_cannot_be_read_are_left_out(tmp_path):
    lines = ["path,label,split"]
    for i, split in enumerate(["train"] * 5 + ["test"] * 2 + ["valid"]):
        Image.fromarray(noise(i, 8, 8)).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{'yx'[i % 2]},{split}")
    (tmp_path / "4.png").write_text("no image")
    (tmp_path / "2024 Fälle.csv").write_text("\n".join(lines))
    path = tmp_path / "2024 Fälle.csv"
    for _ in range(2):  # The second time, it is known.
        with pytest.raises(UserError, match=r"hold images that can be read, got '4\.png' \(of an unknown format\) in"):
            prepare(path, image_shape=(8, 8, 1))
        version = prepare(path, said := [], image_shape=(8, 8, 1), skip_unreadable=True)
        assert "WARNING: files that cannot be read (1): '4.png' (of an unknown format)" in said
    assert re.fullmatch(r"images_2024_falle_[0-9a-f]{12}", version.parent.name)
    labels = {s: {n: row["label"] for n, row in rows(version, s)[0].items()} for s in ("train", "validation", "test")}
    assert labels == {
        "train": {"0.png": 1, "1.png": 0, "2.png": 1, "3.png": 0},
        "validation": {"7.png": 0},
        "test": {"5.png": 0, "6.png": 1},
    }


# --- Changes --------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_again_only_if_it_has_changed(folder):
    first = prepare(folder, said := [])
    assert is_reading(said)
    assert prepare(folder, said := []) == first
    assert not is_reading(said)
    assert said[0] == "12 images of 2 classes: 12 train"  # The report is printed at each start.
    for options in ({"image_shape": (32, 64, 3)}, {"image_shape": (64, 64, 1)}, {"resize": "pad"}):
        assert prepare(folder, **options) != first
    (first / "files.json").write_text("damaged")
    assert prepare(folder, said := []) == first
    assert is_reading(said)
    # Other times, the same content.
    path = folder / "a" / "0.png"
    os.utime(path, (0, 0))
    shards = {file: file.stat().st_mtime_ns for file in first.glob("*array_record*")}
    assert prepare(folder, said := []) == first
    assert is_reading(said)
    assert shards == {file: file.stat().st_mtime_ns for file in first.glob("*array_record*")}
    # Other content of the same size and modification time.
    before = path.stat()
    Image.fromarray(noise(99, 64, 64, 3)).save(path, compress_level=0)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    second = prepare(folder)
    assert second != first
    np.testing.assert_array_equal(rows(second)[0]["a/0.png"]["image"], noise(99, 64, 64, 3))
    # A file less.
    (folder / "b" / "1.png").unlink()
    assert prepare(folder) not in (first, second)


def test_the_version_of_a_run_is_used_even_if_the_folder_is_gone(folder):
    first = prepare(folder)
    digits = first.parent.name.rpartition("_")[2]
    assert prepare(folder, said := [], version=digits) == first
    assert said == []
    (folder / "a" / "0.png").unlink()
    assert prepare(folder) != first
    assert prepare(folder, said := [], version=digits) == first
    assert said == [f"{folder} is not as it was when {first.parent.name} was prepared, which is used"]
    shutil.rmtree(folder)
    assert prepare(folder, said := [], version=digits) == first
    assert said == [
        f"{folder} does not exist here; {first.parent.name} is used, which was prepared from the same images"
    ]
    with pytest.raises(UserError, match="must be an existing folder"):
        prepare(folder, version="0123456789ab")
    with pytest.raises(UserError, match="must be an existing folder"):
        prepare(folder, version="*")


def test_of_two_folders_with_the_same_content_a_run_uses_its_own(folder):
    copy = folder.with_name("zz_copy")
    shutil.copytree(folder, copy)
    first, second = prepare(folder), prepare(copy)
    digits = second.parent.name.rpartition("_")[2]
    assert first.parent.name.endswith(digits) and second != first
    assert [prepare(path, version=digits) for path in (folder, copy)] == [first, second]


# --- Processes ------------------------------------------------------------------------------------------------------


def test_a_killed_preparation_continues_with_what_it_had(folder):
    data_dir = folder.parent / "data"
    command = [sys.executable, PROGRAM, folder, data_dir, "kill", "5"]
    killed = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (killed.returncode, killed.stdout) == (-9, f"reading 12 files of {folder} (once)\n")
    parts, *_ = data_dir.glob(".cnnjax-my_photos_*.parts")
    (parts / "000002.images").write_bytes(b"damaged")
    Image.fromarray(noise(50, 64, 64, 3)).save(folder / "a" / "0.png")  # The first one that was read.
    version = prepare(folder, said := [])
    assert said[0] == f"reading 10 files of {folder} (once, and 2 were read before)"
    assert not parts.exists()
    found, _ = rows(version)
    for name, row in found.items():
        np.testing.assert_array_equal(row["image"], read_image(folder / name, (64, 64, 3)))
    assert len(found) == 12
    (folder.parent / "uninterrupted").mkdir()
    shutil.copytree(folder, copy := folder.parent / "uninterrupted" / "My photos")
    again = prepare(copy)
    names = sorted(path.name for path in version.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    for name in (name for name in names if "array_record" in name):
        assert (version / name).read_bytes() == (again / name).read_bytes()


def test_of_two_processes_one_prepares_the_folder(folder):
    data_dir = folder.parent / "data"
    with start([sys.executable, PROGRAM, folder, data_dir, "wait", "3"]) as first:
        try:
            while first.stdout.readline() != "halfway\n":
                assert first.poll() is None
            with start([sys.executable, PROGRAM, folder, data_dir, "wait", "3"]) as second:
                try:
                    assert second.stdout.readline().startswith("waiting for another process, which prepares my_photos_")
                    *_, version = first.communicate("\n")[0].splitlines()
                    lines = second.communicate()[0].splitlines()
                finally:
                    second.kill()
        finally:
            first.kill()
    assert lines[-1] == version
    assert not is_reading(lines)
    assert len(rows(Path(version))[0]) == 12


@pytest.mark.skipif(MOUNTS.returncode != 0, reason="needs unshare -rm")
def test_a_full_disk_is_one_message_and_what_was_read_is_kept(folder):
    data_dir = folder.parent / "data"
    data_dir.mkdir()
    command = ["unshare", "-rm", sys.executable, PROGRAM, folder, data_dir, "size", "100k"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    reading, full, left, again, *_, version = done.stdout.splitlines()
    assert reading == f"reading 12 files of {folder} (once)"
    assert re.match(
        f"`data_dir` must be a directory that can be written, got {data_dir} .*No space left on device.*it continues",
        full,
    )
    assert re.fullmatch(r"left: \.cnnjax-my_photos_\w+\.lock \.cnnjax-my_photos_\w+\.parts", left)
    kept = re.fullmatch(rf"reading \d files of {folder} \(once, and (\d) were read before\)", again)
    assert kept and int(kept[1]) > 3
    assert version.startswith(f"{data_dir}/my_photos_")


def test_a_data_dir_that_is_a_file(folder):
    (folder.parent / "data").touch()
    with pytest.raises(
        UserError, match=f"`data_dir` must be a directory that can be written, got {folder.parent}/data "
    ):
        prepare(folder)


# --- The command ----------------------------------------------------------------------------------------------------


def test_the_command_prints_the_report_and_exits_with_2_if_training_would_refuse_the_folder(folder, capsys):
    command = ["data", str(folder), "--data-dir", str(folder.parent / "data")]
    main(command)
    assert f"reading 12 files of {folder}\n12 images of 2 classes: 12 train\n" in capsys.readouterr().out
    assert not (folder.parent / "data").exists()
    prepare(folder)
    main(command)
    assert capsys.readouterr().out.startswith("12 images of 2 classes: 12 train\n")  # As they were read then.
    (folder / "a" / "notes.txt").touch()
    with pytest.raises(SystemExit) as stopped:
        main(command)
    captured = capsys.readouterr()
    assert (stopped.value.code, captured.err.count("\n")) == (2, 1)
    assert "WARNING: files that cannot be read (1): 'a/notes.txt'" in captured.out
    assert captured.err.startswith("`dataset` must hold images that can be read, got 'a/notes.txt'")


def test_the_drawn_test_set_is_the_same_at_every_size(tmp_path, monkeypatch):
    """Otherwise two runs would be compared on different images. It is found again after the folder has moved."""
    monkeypatch.chdir(tmp_path)
    rng, found = np.random.default_rng(0), []
    for i in range(40):
        color = np.array([6 * i, 255 - 6 * i, 40], np.uint8)  # Tells the images apart at any size.
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.broadcast_to(color, (*rng.integers(20, 40, 2), 3))).save(path)
    for size in (8, 16):
        dataset = load_dataset("photos", tmp_path / "data", lambda line: None, image_size=size)
        found.append(sorted(dataset.load("test").image[:, 0, 0, 0].tolist()))
    assert found[0] == found[1] and len(found[0]) == 8
    shutil.copytree(tmp_path / "photos", tmp_path / "copy", copy_function=shutil.copyfile)  # With other times.
    lines = []
    load_dataset("copy", tmp_path / "data", lines.append, image_size=16, version=dataset.version)
    assert lines == []  # The same content.
    (tmp_path / "photos").rename(tmp_path / "moved")
    again = load_dataset("photos", tmp_path / "data", lambda line: None, image_size=16, version=dataset.version)
    np.testing.assert_array_equal(again.load("test").image, dataset.load("test").image)
