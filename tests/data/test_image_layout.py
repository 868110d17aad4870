"""Folders and lists of images: which file belongs to which class and split, and every layout that is refused."""

import json
import os
import re
import tempfile
from pathlib import Path

import pytest

from cnnjax import UserError
from cnnjax.data.image_layout import natural_order, scan


def make(root, *names):
    """Creates empty files; a name that ends with / is a folder, and CLASS*2 stands for two files."""
    for name in names:
        label, _, count = name.partition("*")
        for path in [f"{label}/{i}.png" for i in range(int(count))] if count else [name]:
            target = Path(root, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.mkdir(exist_ok=True) if path.endswith("/") else target.touch()
    return root


def found(path):
    listing = scan(path)
    return listing.class_names, [(file.path, file.split, listing.class_names[file.label]) for file in listing.files]


def expected(label, split, folder, count=2):
    return [(f"{folder}/{i}.png", split, label) for i in range(count)]


# --- Layouts --------------------------------------------------------------------------------------------------------


def test_a_folder_per_class(tmp_path):
    junk = ["Thumbs.db", ".DS_Store", "cat/._0.png", "cat/desktop.ini", ".git/config", "__MACOSX/cat/._0.png"]
    make(tmp_path, "dog*2", "cat*2", *junk, "README.md", "cat/notes.txt")
    rows = [*expected("cat", "train", "cat"), ("cat/notes.txt", "train", "cat"), *expected("dog", "train", "dog")]
    assert found(tmp_path) == (("cat", "dog"), rows)
    assert scan(tmp_path).others == ("README.md",)


@pytest.mark.parametrize("validation", ["val", "Valid", "VALIDATION"])
def test_a_folder_per_split(validation, tmp_path):
    make(tmp_path, "Train/a*3", "Train/b*2", f"{validation}/b*1", "TEST/a*1", "TEST/b*1", "TEST/labels.txt")
    rows = [*expected("a", "test", "TEST/a", 1), *expected("b", "test", "TEST/b", 1)]
    rows += [*expected("a", "train", "Train/a", 3), *expected("b", "train", "Train/b")]
    assert found(tmp_path) == (("a", "b"), [*rows, *expected("b", "validation", f"{validation}/b", 1)])
    assert scan(tmp_path).others == ("TEST/labels.txt",)


def test_a_class_may_have_the_name_of_a_split(tmp_path):
    assert found(make(tmp_path, "train*2", "bus*2"))[0] == ("bus", "train")


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_list(suffix, tmp_path):
    make(tmp_path, "in/a.png", "b.png", "c.png", "d, e.png", "f.png")
    labels = {"./in//a.png": "10", "b.png": "10", "c.png": "9", "d, e.png": "9", "f.png": "9"}
    path = tmp_path / f"list.{suffix}"
    rows = [{"label": label, "path": name, "width": "1"} for name, label in labels.items()]
    if suffix == "csv":  # As Excel writes it: with a mark of the encoding, and CRLF.
        text = "\r\n".join(["label,path,width", *(f'{label},"{name}",1' for name, label in labels.items())])
        path.write_text(text, "utf-8-sig")
    else:
        rows[0]["label"] = 10
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names, files = found(path)
    assert names == ("9", "10")
    assert files == sorted((os.path.normpath(name), "train", label) for name, label in labels.items())
    splits = dict(zip(labels, ["train", "TRAIN", "train", "train", "val"], strict=True))
    if suffix == "csv":
        path.write_text("path,label,split\n" + "".join(f'"{n}",{labels[n]},{s}\n' for n, s in splits.items()))
    else:
        path.write_text(
            "".join(json.dumps({"path": n, "label": labels[n], "split": s}) + "\n" for n, s in splits.items())
        )
    assert [split for _, split, _ in found(path)[1]] == ["train"] * 4 + ["validation"]


def test_class_names_in_natural_order_in_any_language(tmp_path):
    names = ["img1", "img2", "IMG10", "Äpfel", "хлеб", "کتاب\u200cها", "猫2", "猫10", "2", "١٠"]
    for name in names:
        make(tmp_path, f"{name}*2")
    expected = ("2", "١٠", "img1", "img2", "IMG10", "Äpfel", "хлеб", "کتاب\u200cها", "猫2", "猫10")
    assert found(tmp_path)[0] == expected
    assert sorted(["a", "B", "b", "A"], key=natural_order) == ["A", "a", "B", "b"]


def test_links_inside_of_the_folder_are_followed(tmp_path):
    make(tmp_path, "a*2", "b*2")
    (tmp_path / "a" / "link.png").symlink_to("../b/0.png")
    (tmp_path / "c").symlink_to("b")
    assert found(tmp_path)[0] == ("a", "b", "c")
    outside = tmp_path.with_name("link")
    outside.symlink_to(tmp_path)
    assert scan(outside).sha256 == scan(tmp_path).sha256


def test_the_listing_changes_with_each_file(tmp_path):
    a, b = make(tmp_path, "a*3", "b*2") / "a", tmp_path / "b"
    seen = {scan(tmp_path).sha256}
    for change, *arguments in (
        ((a / "0.png").write_text, "x"),
        ((a / "3.png").touch,),
        ((a / "3.png").rename, b / "3.png"),
        ((a / "1.png").unlink,),
        (b.rename, tmp_path / "c"),
    ):
        assert scan(tmp_path).sha256 in seen
        change(*arguments)
        assert scan(tmp_path).sha256 not in seen
        seen.add(scan(tmp_path).sha256)


# --- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "have at least two classes, got no class folder in {}. Make one folder per class."),
        (["x.PNG", "y.jpg"], "hold each image in the folder of its class, got 'x.PNG', 'y.jpg' in {}."),
        (["a*2", "b*2", "x.webp"], "hold each image in the folder of its class, got 'x.webp' in {}."),
        (["a*2"], "have at least two classes, got only 'a' in {}."),
        (["a*2", "b*1"], "have at least two training images of each class, got 1 of 'b' in {}."),
        (["a*2", "b/"], "have at least two training images of each class, got 0 of 'b' in {}."),
        (["a*2", *(f"b{i}*1" for i in range(9))], "got 1 of 'b0', 1 of 'b1', 1 of 'b2' and 6 more in {}."),
        (["a/x/1.png", "b*2"], "hold no folders inside those of the classes, got 'a/x/' in {}. Name the folder"),
        (["data/train/a*2", "data/train/b*2"], "hold no folders inside those of the classes, got 'data/train/' in {}."),
        (["train*2", "test*2"], "have a folder train with a folder per class, got 'test/', 'train/' in {}."),
        (["test/a*2", "val/a*2"], "have a folder train with a folder per class, got 'test/', 'val/' in {}."),
        (["train/a*2", "train/b*2", "more/a*2"], "besides train, validation and test, got 'more/' in {}."),
        (["train/a*2", "train/b*2", "val/a*1", "valid/a*1"], "one folder for each split, got 'val/', 'valid/' in {}."),
        (["train/a*2", "train/b*2", "test/1.png"], "hold each image in the folder of its class, got 'test/1.png'"),
        (["train/a*2", "train/b*2", "test/"], "hold images in each split, got 'test/' in {}."),
        (["train/a*2", "train/b*2", "test/c*1"], "training images of every class, got 'c' ('test/c/0.png') in {}."),
        (["Cat*2", "cat*2"], "have names that differ in more than case, got 'Cat' and 'cat' in {}."),
        (
            ["a*2", "b/É.png", "b/e\u0301.png"],
            "that differ in more than case, got 'b/e\u0301.png' and 'b/É.png' in {}.",
        ),
        (["train/Cat*2", "train/dog*2", "test/cat*2"], "that differ in more than case, got 'Cat' and 'cat' in {}."),
        (["a *2", "b*2"], "have class names of 1 to 255 plain characters, got 'a ' in {}."),
        (["a\n*2", "b*2"], "have class names of 1 to 255 plain characters, got 'a\\n' in {}."),
        (["a\udcff*2", "b*2"], "have class names of 1 to 255 plain characters, got 'a\\udcff' in {}."),
        (["a*2", "b*1", "b/\udcff.png"], "have file names in UTF-8, got 'b/\\udcff.png' in {}."),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_folder_that_is_refused(names, message, tmp_path):
    with pytest.raises(UserError) as error:
        scan(make(tmp_path, *names))
    assert str(error.value).startswith("`dataset` must ")
    assert message.format(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("special", "message"),
    [
        (lambda path: path.symlink_to("/etc/passwd"), "hold no links to files outside of its folder, got 'a/x'"),
        (lambda path: path.symlink_to("../.."), "hold no folders inside those of the classes, got 'a/x/'"),
        (lambda path: path.symlink_to("x"), "name existing files, got 'a/x' (Too many levels of symbolic links)"),
        (lambda path: path.symlink_to("y"), "name existing files, got 'a/x' (No such file or directory)"),
        (os.mkfifo, "hold regular files, got 'a/x'"),
        (lambda path: (path.parent.parent / "c").symlink_to("/etc/ssl"), "hold no "),
    ],
    ids=["outside", "folder", "loop", "broken", "fifo", "class"],
)
def test_links_and_special_files_are_refused(special, message, tmp_path):
    special(make(tmp_path, "a*2", "b*2") / "a" / "x")
    with pytest.raises(UserError, match=re.escape(f"`dataset` must {message}")):
        scan(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "have the columns path and label, separated by commas, got 'no line' in {}."),
        ("path,label\n", "name images, got none in {}."),
        ("path;label\na.png;x\n", "have the columns path and label, separated by commas, got 'path;label' in {}."),
        ("file,label\na.png,x\n", "have the columns path and label, separated by commas, got 'file', 'label' in {}."),
        ("path,label\na.png\n", "have 2 values in each line, got line 2 in {}."),
        ("path,label\na.png,x\nb.png,x,1\n", "have 2 values in each line, got line 3 in {}."),
        ("path,label\n,x\n", "have a path and a label in each line, got line 2 in {}."),
        ("path,label\na.png,x\nb.png,\n", "have a path and a label in each line, got line 3 in {}."),
        ("path,label\na.png,x\na.png,x\n./a.png,x\n", "name each file once, got 'a.png' (lines 2, 3, 4) in {}."),
        ("path,label,split\na.png,x,train\nb.png,x,dev\n", "validation, test, got 'dev' (line 3) in {}."),
        (
            "path,label\na.png,x\nb.png,x\nc.png,y\nno.png,y\n",
            "existing files, got 'no.png' (No such file or directory)",
        ),
        ("path,label\na.png,x\nb.png,x\nc.png,y\n.,y\n", "hold regular files, got '.' in {}."),
        ("path,label\na.png,x\n../b.png,x\n", "name files inside of its folder, got '../b.png' in {}."),
        ("path,label\na.png,x\n/etc/passwd,x\n", "name files inside of its folder, got '/etc/passwd' in {}."),
        (
            "path,label\na.png,x\nb.png,x\nc.png,y\nout/hosts,y\n",
            "no links to files outside of its folder, got 'out/hosts'",
        ),
        ("path,label\na\0.png,x\n", "have file names in UTF-8, got 'a\\x00.png' in {}."),
        ("path,label\nä.png,x\n".encode("latin-1"), "be UTF-8, got {} ('utf-8' codec can't decode byte 0xe4"),
        (f"path,label\n{'a' * 200_000},x\n", "be a CSV file, got {} (field larger than field limit (131072))."),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_csv_list_that_is_refused(content, message, tmp_path):
    path = make(tmp_path, "a.png", "b.png", "c.png") / "list.CSV"
    (tmp_path / "out").symlink_to("/etc")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=re.escape(message.format(path))):
        scan(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 of {} must be JSON, got EOF"),
        ("[1]", "line 2 of {} must be "),
        ('{"label": "x"}', "`path` in line 2 of {} must be there, got nothing."),
        ('{"path": "b.png", "label": 0.5}', "` in line 2 of {} must be a valid "),
        (
            '{"path": "b.png", "label": "x", "split": "test"}',
            "have a split in every line or in none, got line 2 in {}.",
        ),
    ],
)
def test_a_json_list_that_is_refused(line, message, tmp_path):
    path = make(tmp_path, "a.png", "b.png") / "list.jsonl"
    path.write_text(f'{{"path": "a.png", "label": "x"}}\n{line}\n')
    with pytest.raises(UserError, match=re.escape(message.format(path))):
        scan(path)


def test_a_path_that_is_neither_a_folder_nor_a_list(tmp_path):
    make(tmp_path, "x.txt")
    os.mkfifo(tmp_path / "x.csv")
    for name, message in {
        "x.txt": "must be a folder, or a file .csv or .jsonl, got {}.",
        "y": "must be an existing folder or list, got {} (No such file or directory). Check the path.",
        "y\0": "must be an existing folder or list, got {} (",
        "x.csv": "must be readable, got {} (Not a regular file).",
    }.items():
        with pytest.raises(UserError, match=re.escape(message.format(tmp_path / name))):
            scan(tmp_path / name)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_folder_without_permission():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(make(folder, "a*2", "b*2"), 0o755)
        os.chmod(Path(folder, "a"), 0)
        os.seteuid(54321)
        try:
            with pytest.raises(UserError, match=f"`dataset` must be readable, got {folder}/a .Permission denied.*Fix"):
                scan(Path(folder))
        finally:
            os.seteuid(0)
