"""Which image files a user names: files, folders, patterns, names on standard input; and labelled folders and lists."""

import codecs
import glob
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cnnjax.data.image_layout import SPLITS, Row, entries, natural_order, read_list, scan_classes
from cnnjax.data.stored import LISTS
from cnnjax.errors import UserError, unknown_name

_BLOCK = 1 << 16  # Bytes.


def find_images(name: str) -> list[str]:
    """Returns the files that a name stands for.

    Args:
      name: a file, which need not exist; a folder, whose files are found at any depth, in natural order, without hidden
        files and Thumbs.db; or a pattern such as "photos/**/*.jpg", whose matches may be folders, too, unless it
        contains **.

    Raises:
      UserError: a folder holds no file or cannot be read, or nothing matches a pattern.
    """
    if not os.path.lexists(name):
        name = os.path.expanduser(name)
    if os.path.isdir(name):
        found = list(_files_in(name, ()))
        rule = "hold a file"
    elif re.search(r"[*?[]", name) and not os.path.lexists(name):
        matches = sorted(glob.glob(name, recursive=True), key=natural_order)
        folders = {match for match in matches if os.path.isdir(match)}
        inside = {} if "**" in name else {match: _files_in(match, ()) for match in folders}
        found = [file for match in matches for file in (inside.get(match, ()) if match in folders else (match,))]
        rule = "match a file"
    else:
        return [name]
    if not found:
        raise UserError(f"`images` must {rule}, got {name}.")
    return found


def _files_in(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Yields the files of a folder.

    Args:
      above: identifies the folders that contain it: a link to one of them is not followed.
    """
    status = os.stat(folder)
    if (this := (status.st_dev, status.st_ino)) in above:
        return
    folders, files = entries(Path(folder), "images")
    inner = {*folders}
    for name in sorted(folders + files, key=natural_order):
        path = os.path.join(folder, name)
        yield from _files_in(path, (*above, this)) if name in inner else (path,)


def read_names(descriptor: int) -> Iterator[str]:
    """Yields file names, one per line; or each ended by NUL, if the first block has one, as that of `find -print0` has.

    Args:
      descriptor: of an open file, which is read when the names are needed.
    """
    block = os.read(descriptor, _BLOCK).removeprefix(codecs.BOM_UTF8)
    end, rest = b"\0" if b"\0" in block else b"\n", b""
    last = b"\r" if end == b"\n" else b""  # Lines of Windows.
    while block:
        *names, rest = (rest + block).split(end)
        yield from (os.fsdecode(name.removesuffix(last)) for name in names if name.removesuffix(last))
        block = os.read(descriptor, _BLOCK)
    if rest.removesuffix(last):
        yield os.fsdecode(rest.removesuffix(last))


class LabelledFiles(NamedTuple):
    """Files with their classes.

    Attributes:
      paths: of the files.
      labels: the index of the class of each file.
      split: that the files are of, if there are several; None: there is only one.
    """

    paths: list[Path]
    labels: list[int]
    split: str | None


def find_labelled(path: Path, class_names: Sequence[str]) -> LabelledFiles:
    """Finds the files of a labelled folder, or of a list, for an evaluation.

    The layouts are those of `image_layout.scan`, but any number of classes and of images is accepted. Of several splits
    the test split is used, or else the validation split.

    Args:
      class_names: the known classes. Those of the folder may be any of them.

    Raises:
      UserError: the layout is another one, or a class is unknown.
    """
    try:
        rows, splits = _read_folder(path, class_names) if os.path.isdir(path) else _read_list(path)
    except UserError as error:  # In training, `dataset` is the folder.
        raise UserError(str(error).replace("`dataset`", "`data`")) from error
    if not rows:
        raise UserError(f"`data` must hold a folder of images per class, got {path} without one.")
    known = {unicodedata.normalize("NFC", name): k for k, name in enumerate(class_names)}  # macOS stores NFD.
    labels = [known.get(unicodedata.normalize("NFC", row.label), -1) for row in rows]
    if -1 in labels:
        unknown = rows[labels.index(-1)]
        hint = str(unknown_name("data", unknown.label, class_names)).partition(f"got {unknown.label!r}. ")[2]
        raise UserError(f"`data` must hold classes of the run, got {unknown.label!r} ({unknown.path!r}). {hint}")
    root = path if os.path.isdir(path) else path.parent
    return LabelledFiles([root / row.path for row in rows], labels, rows[0].split if len(splits) > 1 else None)


def _read_folder(root: Path, class_names: Sequence[str]) -> tuple[list[Row], set[str]]:
    """Returns the files of the chosen split, and the names of all splits."""
    folders, loose = entries(root)
    named = [(SPLITS[name.lower()], name) for name in folders if name.lower() in SPLITS and name not in class_names]
    if twice := [name for split, name in named if [split for split, _ in named].count(split) > 1]:
        raise UserError(f"`data` must have one folder for each split, got {' and '.join(twice)} in {root}. Merge them.")
    splits: Any = {SPLITS.get(name.lower()): name for name in folders if name not in class_names}
    if not splits or None in splits:
        return scan_classes(root, "", folders, loose, "train")[0], set()
    if mixed := [name for name in folders if name in class_names]:
        raise UserError(
            f"`data` must hold folders of splits or folders of classes, got {mixed[0]} next to "
            f"{next(iter(splits.values()))} in {root}. Move one of them away."
        )
    split = _choose(splits)
    inner, loose = entries(root / splits[split])
    return scan_classes(root, f"{splits[split]}/", inner, loose, split)[0], {*splits}


def _read_list(path: Path) -> tuple[list[Row], set[str]]:
    if not path.exists() or path.suffix.lower() not in LISTS:
        raise UserError(f"`data` must be a folder of images, or an existing file {' or '.join(LISTS)}, got {path}.")
    rows = read_list(path)
    splits = {row.split for row in rows}
    return [row for row in rows if row.split == _choose(splits)], splits


def _choose(splits: Any) -> str:
    return next(name for name in ("test", "validation", "train") if name in splits)
