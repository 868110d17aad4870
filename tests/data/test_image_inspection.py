"""Reading the files of a folder: what is found in each, what is refused, and the report."""

import hashlib
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from cnnjax import UserError
from cnnjax.data import image_files
from cnnjax.data.image_inspection import Inspection, Record, check_usable, read_files, report
from cnnjax.data.image_layout import File, scan


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(root, **images):
    """Writes arrays as PNG files; __ separates the folders of a name."""
    for name, image in images.items():
        path = root / f"{name.replace('__', '/')}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return root


def inspect(root, encode=lambda image: b""):
    listing = scan(root)
    records = tuple(record for record, _ in read_files(listing.root, listing.files, encode))
    return Inspection(listing.class_names, listing.others, records)


def four(root):
    return save(root, **{f"{label}__{i}": noise(i + 2 * ord(label), 6, 8, 3) for label in "ab" for i in range(2)})


def test_the_facts_of_each_file(tmp_path):
    image, exif = noise(9, 6, 8, 3), Image.Exif()
    exif[0x0112] = 6  # Orientation: rotated by a quarter.
    four(tmp_path)
    Image.fromarray(image).save(tmp_path / "a" / "rotated.png", exif=exif)
    Image.fromarray(image[..., 0]).save(tmp_path / "a" / "gray.tiff")
    Image.fromarray(image).save(tmp_path / "b" / "photo.JPG")
    records = {record.file.path: record for record in inspect(tmp_path).records}
    assert list(records) == ["a/0.png", "a/1.png", "a/gray.tiff", "a/rotated.png", "b/0.png", "b/1.png", "b/photo.JPG"]
    assert records["a/rotated.png"][1:5] == (6, 8, "PNG", "RGB")
    assert records["a/gray.tiff"][1:5] == (8, 6, "TIFF", "L")
    assert records["b/photo.JPG"][1:5] == (8, 6, "JPEG", "RGB")
    for name, record in records.items():
        content = (tmp_path / name).read_bytes()
        assert (record.file.size, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    upright = np.rot90(image, -1)
    assert records["a/rotated.png"].pixels == hashlib.sha256(b"RGB 6 8" + upright.tobytes()).hexdigest()


def test_pixels_are_identical_in_any_format_and_mode(tmp_path, monkeypatch):
    gray, opaque = noise(0, 6, 8), np.full((6, 8, 1), 255, np.uint8)
    color = np.stack([gray] * 3, -1)
    one_clear = np.concatenate([color, opaque], -1)
    one_clear[0, 0, 3] = 0
    monkeypatch.setattr("cnnjax.data.image_inspection._PIXELS", 17)  # Hashes two rows at a time.
    save(tmp_path, a__gray=gray, a__color=color, b__opaque=np.concatenate([color, opaque], -1), b__clear=one_clear)
    Image.fromarray(gray).save(tmp_path / "a" / "gray.bmp")
    pixels = {record.file.path: record.pixels for record in inspect(tmp_path).records}
    assert len({pixels.pop("b/clear.png"), *pixels.values()}) == 2
    assert {*pixels.values()} == {hashlib.sha256(b"RGB 8 6" + color.tobytes()).hexdigest()}


def bomb(width, height):
    """Returns the beginning of a PNG file of this size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + struct.pack(">II", zlib.crc32(header), 1 << 20) + b"IDAT"


def test_files_that_cannot_be_read_are_named_with_the_reason(tmp_path):
    whole = (four(tmp_path) / "a" / "0.png").read_bytes()
    damaged = {
        "bomb.png": (bomb(20_000, 15_000), "Image size (300000000 pixels) exceeds limit of 178956970 pixels"),
        "cut.png": (whole[: len(whole) // 2], "image file is truncated"),
        "empty.png": (b"", "of an unknown format"),
        "notes.txt": (b"notes", "of an unknown format"),
    }
    for name, (content, _) in damaged.items():
        (tmp_path / "a" / name).write_bytes(content)
    Image.new("F", (8, 8)).save(tmp_path / "a" / "wide.tiff")
    inspection = inspect(tmp_path)
    problems = {record.file.path: record.problem for record in inspection.records if record.problem}
    assert list(problems) == ["a/bomb.png", "a/cut.png", "a/empty.png", "a/notes.txt", "a/wide.tiff"]
    for name, (_, reason) in damaged.items():
        assert problems[f"a/{name}"].startswith(reason)
    assert problems["a/wide.tiff"] == "32 bits, mode F"
    rule = r"`dataset` must hold images that can be read, got 'a/bomb.png' \(Image size .*\), 'a/cut.png' .* and 2 more"
    with pytest.raises(UserError, match=rf"{rule} in {tmp_path}\. Repair .*: skip_unreadable=True\."):
        check_usable(inspection, tmp_path, skip_unreadable=False)
    check_usable(inspection, tmp_path, skip_unreadable=True)
    *_, line = report(inspection)
    assert line.startswith("WARNING: files that cannot be read (5): 'a/bomb.png' (Image size")
    assert "'a/wide.tiff' (32 bits, mode F)" in line


def test_what_remains_without_the_unreadable_files_must_suffice(tmp_path):
    save(tmp_path, **{f"train__{name}": noise(i, 4, 4) for i, name in enumerate(["a__0", "a__1", "b__0"])})
    for path in (tmp_path / "train" / "b" / "1.png", tmp_path / "test" / "a" / "2.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with pytest.raises(UserError, match="at least two training images of each class, got 1 of 'b' in"):
        check_usable(inspect(tmp_path), tmp_path, skip_unreadable=True)
    save(tmp_path, train__b__1=noise(3, 4, 4))
    with pytest.raises(UserError, match="have a readable image in each split, got test in"):
        check_usable(inspect(tmp_path), tmp_path, skip_unreadable=True)


@pytest.mark.parametrize("change", ["append", "replace", "remove"])
def test_a_file_that_is_being_written_is_refused(change, tmp_path):
    path = four(tmp_path) / "a" / "1.png"
    Image.fromarray(noise(0, 5, 5)).save(path)

    def encode(image):
        if image.size == (5, 5):  # This file is being read.
            match change:
                case "append":
                    path.write_bytes(path.read_bytes() + b"more")
                case "replace":  # An equal file of the same modification time.
                    before, new = path.stat(), path.with_name("1.new")
                    new.write_bytes(path.read_bytes())
                    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
                    new.rename(path)
                case "remove":
                    path.unlink()
        return b"encoded"

    files = scan(tmp_path).files
    found = {record.file.path: (record.problem, encoded) for record, encoded in read_files(tmp_path, files, encode)}
    assert found.pop("a/1.png") == ("it is being written", b"")
    assert found == dict.fromkeys(("a/0.png", "b/0.png", "b/1.png"), ("", b"encoded"))
    Image.fromarray(noise(0, 5, 5)).save(path)
    with pytest.raises(UserError, match=rf"hold files that nobody is writing, got 'a/1.png' in {tmp_path}\. Wait"):
        check_usable(inspect(tmp_path, encode), tmp_path, skip_unreadable=True)


def test_a_report_on_splits_sizes_formats_and_copies(tmp_path):
    same, other = noise(0, 4, 4), noise(1, 4, 4)
    images = {f"train__{label}__{i}": noise(ord(label) + 300 * i, 6, 8, 3) for label in "ab" for i in range(3)}
    save(tmp_path, **images, train__a__x=same, train__a__y=same, test__a__x=same, train__b__z=other, test__a__z=other)
    save(tmp_path, validation__b__v=noise(2, 100, 50))
    (tmp_path / "LICENSE").touch()
    assert list(report(inspect(tmp_path))) == [
        "12 images of 2 classes: 9 train, 1 validation, 2 test",
        "class  train  validation  test",
        "a      5      0           2",
        "b      4      1           0",
        "no validation image of 'a'",
        "no test image of 'b'",
        "width × height: 4×4 to 50×100 pixels; most often 8×6 (50%); median 8×6",
        "formats and modes: PNG L 6, PNG RGB 6",
        "not used, because they are in no class folder: 'LICENSE'",
        "WARNING: identical pixels under two labels, one of which is wrong (1): 'test/a/z.png' = 'train/b/z.png'",
        "WARNING: identical pixels in two splits, which makes scores too high (2): 'test/a/x.png' = 'train/a/x.png', "
        "'test/a/z.png' = 'train/b/z.png'",
        "identical pixels within a split: 1 more than necessary",
    ]


def test_a_report_on_many_classes_is_short():
    records = []
    for k in range(1000):
        for i in range(2 + (k > 3)):
            found = ("", "no image") if i == 2 and k % 2 else (f"{k} {i // 2}", "")  # Its pixels and its problem.
            records.append(Record(File(f"c{k}/{i}.gif", "train", k, 9, 0, 0), 1, 1, "GIF", "P", "", *found))
    assert list(report(Inspection(tuple(f"c{k}" for k in range(1000)), (), tuple(records)))) == [
        "2,498 images of 1,000 classes: 2,498 train",
        "training images per class: 2 (median), at most 3; fewest: 'c0' 2, 'c1' 2, 'c2' 2, 'c3' 2, 'c5' 2",
        "width × height: 1×1 pixels",
        "formats and modes: GIF P 2,498",
        "identical pixels within a split: 1,000 more than necessary",
        "WARNING: files that cannot be read (498): 'c5/2.gif' (no image), 'c7/2.gif' (no image), "
        "'c9/2.gif' (no image), 'c11/2.gif' (no image), 'c13/2.gif' (no image) and 493 more",
    ]


def test_warnings_of_threads_leave_the_filters_as_they_were(tmp_path, monkeypatch):
    """Pillow warns of each of these images; a warning is an error here."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    monkeypatch.setattr(image_files, "num_cores", lambda: 8)
    save(tmp_path, **{f"{label}__{i}": noise(i, 6, 8) for label in "ab" for i in range(100)})
    filters = [*image_files.warnings.filters]
    assert not [record.problem for record in inspect(tmp_path).records if record.problem]
    assert [*image_files.warnings.filters] == filters
