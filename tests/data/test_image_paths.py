import os
import unicodedata
from pathlib import Path

import pytest

from cnnjax import UserError
from cnnjax.data.image_files import on_all_cores
from cnnjax.data.image_paths import find_images, find_labelled, read_names

NAMES = ("cat", "café", "dog")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(*paths):
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_a_folder_is_searched_at_any_depth_in_natural_order(folder):
    touch("a/img10.jpg", "a/IMG2.jpg", "a/9/b.jpg", "a/.hidden.jpg", "a/Thumbs.db", "a/.git/x", "elsewhere/y.jpg")
    Path("a/loop").symlink_to(folder / "a")
    Path("a/link").symlink_to(folder / "elsewhere")
    assert find_images("a") == ["a/9/b.jpg", "a/IMG2.jpg", "a/img10.jpg", "a/link/y.jpg"]


def test_a_pattern_matches_files_and_folders_unless_there_is_a_file_of_that_name(folder):
    touch("x10.jpg", "x2.jpg", "x1/y.jpg", "x1/z/y.jpg", "[x].jpg", "x.jpg", "nothing.png")
    assert find_images("x[0-9]*") == ["x1/y.jpg", "x1/z/y.jpg", "x2.jpg", "x10.jpg"]
    assert find_images("**/y.jpg") == ["x1/y.jpg", "x1/z/y.jpg"]
    assert find_images("x1/**") == ["x1/y.jpg", "x1/z/y.jpg"]
    assert find_images("[x].jpg") == ["[x].jpg"]
    assert find_images("missing.jpg") == ["missing.jpg"]


def test_nothing_to_find_is_an_error(folder):
    touch("a/.hidden.jpg")
    with pytest.raises(UserError, match=r"`images` must hold a file, got a\."):
        find_images("a")
    with pytest.raises(UserError, match=r"`images` must match a file, got \*\.gif\."):
        find_images("*.gif")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (b"a b.png\n\n\xff.png\nlast", ["a b.png", os.fsdecode(b"\xff.png"), "last"]),
        (b"a\nb.png\0c.png\0", ["a\nb.png", "c.png"]),
        (b"\xef\xbb\xbfa.png\r\n\r\nb.png\r\n", ["a.png", "b.png"]),  # Of Windows.
        (b"x" * 70_000 + b"\ny", ["x" * 70_000, "y"]),  # More than one block.
        (b"", []),
    ],
)
def test_names_are_read_by_lines_or_by_nul(text, names, folder):
    Path("names").write_bytes(text)
    with open("names") as file:
        assert list(read_names(file.fileno())) == names


def test_a_labelled_folder_needs_neither_all_classes_nor_two_images(folder):
    decomposed = unicodedata.normalize("NFD", "café")
    touch("flat/dog/2.jpg", f"flat/{decomposed}/1.jpg")
    found = find_labelled(Path("flat"), NAMES)
    assert dict(zip(map(str, found.paths), found.labels, strict=True)) == {
        f"flat/{decomposed}/1.jpg": 1,
        "flat/dog/2.jpg": 2,
    }
    assert found.split is None


def test_of_several_splits_the_test_split_is_used(folder):
    touch("a/train/cat/1.jpg", "a/val/cat/2.jpg", "a/Test/dog/3.jpg", "b/train/cat/1.jpg", "b/val/dog/2.jpg")
    assert find_labelled(Path("a"), NAMES) == ([Path("a/Test/dog/3.jpg")], [2], "test")
    assert find_labelled(Path("b"), NAMES) == ([Path("b/val/dog/2.jpg")], [2], "validation")
    assert find_labelled(Path("a/val"), NAMES) == ([Path("a/val/cat/2.jpg")], [0], None)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a/dogg/1.jpg"], r"`data` must hold classes of the run, got 'dogg' \('dogg/1.jpg'\). Did you mean dog\?"),
        (["a/1.jpg"], "`data` must hold each image in the folder of its class, got '1.jpg' in a"),
        (["a/val/cat/1.jpg", "a/valid/dog/1.jpg"], "`data` must have one folder for each split, got val and valid"),
        (["a/cat/1.jpg", "a/test/cat/2.jpg"], "`data` must hold folders of splits or folders of classes, got cat next"),
        (["a/.hidden"], "`data` must hold a folder of images per class, got a without one"),
        (["a"], r"`data` must be a folder of images, or an existing file .csv or .jsonl, got a\."),
    ],
)
def test_what_is_no_labelled_folder_is_an_error(files, message, folder):
    touch(*files)
    with pytest.raises(UserError, match=message):
        find_labelled(Path("a"), NAMES)


def test_few_items_are_in_work_and_the_rest_is_left_when_the_consumer_stops():
    taken = []
    results = on_all_cores(lambda i: -i, (taken.append(i) or i for i in range(1000)), ahead=5)
    assert [next(results) for _ in range(3)] == [0, -1, -2]
    assert len(taken) == 7
    results.close()
    assert len(taken) == 7
    assert list(on_all_cores(lambda i: -i, range(7), ahead=5)) == [0, -1, -2, -3, -4, -5, -6]
