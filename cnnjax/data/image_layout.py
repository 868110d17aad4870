"""Folders and lists of image files: the class and the split of each file. Opens no image."""

import csv
import hashlib
import io
import json
import os
import re
import stat
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, NotRequired

from PIL import Image
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12.

from cnnjax.data.stored import LISTS
from cnnjax.errors import UserError
from cnnjax.files import is_inside, open_regular, parse_json
from cnnjax.process.streams import reason

SPLITS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
_IGNORED = ("thumbs.db", "desktop.ini", "__macosx")  # Files of Windows and macOS; hidden names are ignored, too.
_LIST_FIX = "Write one line per image, with the columns path and label, and perhaps split."


class File(NamedTuple):
    """A file of a listing."""

    path: str  # Relative to the folder, with /.
    split: str  # "train", "validation" or "test".
    label: int
    size: int  # Bytes.
    mtime_ns: int
    ctime_ns: int  # Changes with the content even if the modification time is restored.


@dataclass(frozen=True)
class Listing:
    """The files of a folder or a list.

    Attributes:
      root: the folder.
      class_names: in natural order.
      files: sorted by split and path. Whether they are images is not known yet.
      others: the files next to the class folders, which belong to no class.
    """

    root: Path
    class_names: tuple[str, ...]
    files: tuple[File, ...]
    others: tuple[str, ...]

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of everything but `root`. It differs if a file was changed, added, removed or renamed."""
        return hashlib.sha256(json.dumps([self.class_names, self.files, self.others]).encode()).hexdigest()


class Row(NamedTuple):
    """A file that belongs to a class; its path is relative to the folder, with /."""

    path: str
    label: str
    split: str


def scan(path: Path) -> Listing:
    """Lists the images of a folder, or of a list.

    A folder holds one folder of files per class, or `train/CLASS/*` and perhaps `val`, `valid` or `validation`, and
    `test`. A list is a .csv or .jsonl file with path (relative to its folder), label, and perhaps split; other columns
    are ignored. Every file of a class counts as an image; those that cannot be read are found later. Hidden files,
    Thumbs.db and desktop.ini are ignored.

    Raises:
      UserError: the layout is another one, a file is outside of the folder or missing, two names differ only in case,
        or a class has too few images.
    """
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError) as error:
        raise UserError(
            f"`dataset` must be an existing folder or list, got {path} ({reason(error)}). Check the path."
        ) from error
    if not is_folder and path.suffix.lower() not in LISTS:
        raise UserError(f"`dataset` must be a folder, or a file {' or '.join(LISTS)}, got {path}.")
    root = path if is_folder else path.parent
    rows, classes, others = _scan_folder(root) if is_folder else (read_list(path), set(), [])
    _check_names(classes | {row.label for row in rows}, path)
    _check_paths([row.path for row in rows], path)
    classes |= {row.label for row in rows if row.split == "train"}
    unknown = {row.label: row.path for row in reversed(rows) if row.label not in classes}
    found = [f"{label!r} ({where!r})" for label, where in unknown.items()]
    refuse(found, "have training images of every class", path, "Add some, or remove the class.")
    check_counts(Counter(row.label for row in rows if row.split == "train"), classes, path)
    class_names = tuple(sorted(classes, key=natural_order))
    index = {name: i for i, name in enumerate(class_names)}
    status = _stat(root, [row.path for row in rows], path)
    files = (
        File(row.path, row.split, index[row.label], s.st_size, s.st_mtime_ns, s.st_ctime_ns)
        for row, s in zip(rows, status, strict=True)
    )
    readable = tuple(os.fsencode(name).decode(errors="backslashreplace") for name in others)  # Perhaps no UTF-8.
    return Listing(root, class_names, tuple(sorted(files, key=lambda file: (file.split, file.path))), readable)


def natural_order(name: str) -> tuple[Any, ...]:
    """Returns a key that sorts numbers by their value and ignores case at first: img2 < IMG10 < img10."""
    parts = re.split(r"(\d+)", name.casefold())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name  # type: ignore


def check_counts(counts: Counter[str], class_names: Iterable[str], path: Path) -> None:
    """Checks that the training images suffice.

    Args:
      counts: the number of training images of each class.
      class_names: the names of all classes.
      path: the folder or list.

    Raises:
      UserError: there are fewer than two classes, or fewer than two images of a class.
    """
    names = sorted(class_names, key=natural_order)
    if len(names) < 2:
        got = f"only {names[0]!r}" if names else "no class folder"
        raise UserError(f"`dataset` must have at least two classes, got {got} in {path}. Make one folder per class.")
    few = [f"{counts[name]} of {name!r}" for name in names if counts[name] < 2]
    refuse(few, "have at least two training images of each class", path, "Add images, or remove the class.")


def refuse(found: Sequence[str], rule: str, path: Path, fix: str) -> None:
    """Raises a `UserError` with the first three that were `found`, and the number of the others, if there are any."""
    if found:
        more = f" and {len(found) - 3:,} more" if len(found) > 3 else ""
        raise UserError(f"`dataset` must {rule}, got {', '.join(found[:3])}{more} in {path}. {fix}")


# --- Folders --------------------------------------------------------------------------------------------------------


def _scan_folder(root: Path) -> tuple[list[Row], set[str], list[str]]:
    """Returns the files, the classes of the training split, and the names of other files."""
    folders, others = entries(root)
    splits = [name for name in folders if name.lower() in SPLITS]
    train = next((name for name in splits if SPLITS[name.lower()] == "train"), None)
    if train is None or not entries(root / train)[0]:
        found = [repr(f"{name}/") for name in splits] if len(splits) == len(folders) else []
        refuse(found, "have a folder train with a folder per class", root, "Move the class folders there.")
        rows, classes = scan_classes(root, "", folders, others, "train")
        return rows, classes, others
    extra = [repr(f"{name}/") for name in folders if name not in splits]
    refuse(extra, "hold no folders besides train, validation and test", root, "Move the others away.")
    twice = [repr(f"{name}/") for name in splits if [SPLITS[n.lower()] for n in splits].count(SPLITS[name.lower()]) > 1]
    refuse(twice, "have one folder for each split", root, "Merge them.")
    rows, classes = [], set()
    for name in splits:
        inner, loose = entries(root / name)
        found, labels = scan_classes(root, f"{name}/", inner, loose, split := SPLITS[name.lower()])
        refuse([] if found else [repr(f"{name}/")], "hold images in each split", root, "Add images, or remove it.")
        rows += found
        classes |= labels if split == "train" else set()
        others += [f"{name}/{file}" for file in loose]
    return rows, classes, others


def scan_classes(
    root: Path, prefix: str, folders: list[str], loose: list[str], split: str
) -> tuple[list[Row], set[str]]:
    """Returns the files of the class folders below `prefix`, and the names of the classes."""
    images = [repr(prefix + name) for name in loose if Path(name).suffix.lower() in Image.registered_extensions()]
    refuse(images, "hold each image in the folder of its class", root, "Move them, or remove them.")
    rows, deep = [], []
    for label in folders:
        inner, names = entries(root / prefix / label)
        deep += [repr(f"{prefix}{label}/{name}/") for name in inner]
        rows += [Row(f"{prefix}{label}/{name}", label, split) for name in names]
    fix = "Name the folder that holds the class folders, or move the images up."
    refuse(deep, "hold no folders inside those of the classes", root, fix)
    return rows, {*folders}


def entries(folder: Path, parameter: str = "dataset") -> tuple[list[str], list[str]]:
    """Returns the names of the folders and of the other entries, sorted, without those that are ignored."""
    folders, others = [], []
    try:
        with os.scandir(folder) as scanned:
            for entry in scanned:
                if not entry.name.startswith(".") and entry.name.lower() not in _IGNORED:
                    linked = entry.is_symlink() and os.path.isdir(entry.path)  # `is_dir` would raise for a loop.
                    (folders if linked or entry.is_dir(follow_symlinks=False) else others).append(entry.name)
    except OSError as error:
        raise UserError(
            f"`{parameter}` must be readable, got {folder} ({reason(error)}). Fix its permissions."
        ) from error
    return sorted(folders), sorted(others)


# --- Lists ----------------------------------------------------------------------------------------------------------


class _Line(TypedDict):
    path: str
    label: str | int
    split: NotRequired[str]


def read_list(path: Path) -> list[Row]:
    """Returns the lines of a list, with the split "train" if it has no column split."""
    try:
        with open_regular(path) as file:
            text = file.read().decode("utf-8-sig")
        lines = _read_csv(text, path) if path.suffix.lower() == ".csv" else _read_jsonl(text, path)
    except OSError as error:
        raise UserError(f"`dataset` must be readable, got {path} ({reason(error)}).") from error
    except UnicodeDecodeError as error:
        raise UserError(f"`dataset` must be UTF-8, got {path} ({error}). Save it in this encoding.") from error
    except csv.Error as error:
        raise UserError(f"`dataset` must be a CSV file, got {path} ({error}). {_LIST_FIX}") from error
    refuse([] if lines else ["none"], "name images", path, _LIST_FIX)
    has_split = [f"line {number}" for number, line in lines if "split" in line]
    if len(has_split) < len(lines):
        refuse(has_split, "have a split in every line or in none", path, _LIST_FIX)
    splits = [(number, line.get("split", "train")) for number, line in lines]
    wrong = [f"{split!r} (line {number})" for number, split in splits if split.lower() not in SPLITS]
    refuse(wrong, f"have the splits {', '.join(SPLITS)}", path, _LIST_FIX)
    rows, places = [], defaultdict(list)
    for (number, line), (_, split) in zip(lines, splits, strict=True):
        place = str(PurePosixPath(line["path"]))  # Without ./ and //.
        places[place].append(number)
        rows.append(Row(place, str(line["label"]), SPLITS[split.lower()]))
    twice = [f"{name!r} (lines {', '.join(map(str, n))})" for name, n in places.items() if len(n) > 1]
    refuse(twice, "name each file once", path, "Remove the duplicate lines.")
    return rows


def _read_csv(text: str, path: Path) -> list[tuple[int, _Line]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    names = [name.strip().lower() for name in reader.fieldnames or ()]
    columns = [repr(name) for name in names or ["no line"]]
    reader.fieldnames = names
    if not {"path", "label"} <= {*names} or len({*names}) < len(names):
        refuse(
            columns,
            "have the columns path and label, separated by commas",
            path,
            _LIST_FIX,
        )
    lines: list[tuple[int, Any]] = [(reader.line_num, row) for row in reader]
    wrong = [f"line {number}" for number, row in lines if None in row or None in row.values()]
    refuse(wrong, f"have {len(columns)} values in each line", path, _LIST_FIX)
    empty = [f"line {number}" for number, row in lines if "" in (row["path"], row["label"].strip())]
    refuse(empty, "have a path and a label in each line", path, _LIST_FIX)
    return lines


def _read_jsonl(text: str, path: Path) -> list[tuple[int, _Line]]:
    lines = enumerate(text.split("\n"), 1)
    return [(n, parse_json(line, _Line, f"line {n} of {path}", _LIST_FIX)) for n, line in lines if line.strip()]


# --- Names and files ------------------------------------------------------------------------------------------------


def _check_names(classes: Iterable[str], path: Path) -> None:
    """Checks that class names are distinct, and can be the lines of a text file."""
    _check_case(classes, path)
    bad = [
        repr(name)
        for name in sorted(classes)
        if name != name.strip() or not 0 < len(name) < 256 or {*map(unicodedata.category, name)} & {"Cc", "Cs"}
    ]
    fix = "Rename the classes: UTF-8, no control characters, no space at the ends."
    refuse(bad, "have class names of 1 to 255 plain characters", path, fix)


def _check_case(names: Iterable[str], path: Path) -> None:
    same = defaultdict(list)
    for name in sorted(names):
        same[unicodedata.normalize("NFC", name.casefold())].append(repr(name))
    found = [" and ".join(group) for group in same.values() if len(group) > 1]
    refuse(found, "have names that differ in more than case", path, "Rename them: other systems confuse them.")


def _check_paths(paths: list[str], path: Path) -> None:
    bad = [repr(name) for name in paths if "\0" in name or any("\ud800" <= c <= "\udfff" for c in name)]
    refuse(bad, "have file names in UTF-8", path, "Rename the files.")
    outside = [repr(name) for name in paths if name.startswith("/") or ".." in name.split("/")]
    refuse(outside, "name files inside of its folder", path, "Write paths relative to it, without ..")
    _check_case(paths, path)


def _stat(root: Path, names: list[str], path: Path) -> list[os.stat_result]:
    """Returns the status of regular files inside of `root`."""
    inside = {folder: is_inside(root / folder, root) for folder in {os.path.dirname(name) for name in names}}
    found, outside, missing, special = [], [], [], []
    for name in names:
        full = os.path.join(root, name)
        try:
            status = os.lstat(full)
            is_link = stat.S_ISLNK(status.st_mode)
            if not inside[os.path.dirname(name)] or (is_link and not is_inside(Path(full), root)):
                outside.append(repr(name))
                continue
            found.append(status := os.stat(full) if is_link else status)
            if not stat.S_ISREG(status.st_mode):
                special.append(repr(name))
        except OSError as error:
            missing.append(f"{name!r} ({reason(error)})")
    fix = "Copy the files into it instead of linking them."
    refuse(outside, "hold no links to files outside of its folder", path, fix)
    refuse(missing, "name existing files", path, "Restore them, or remove the links or entries that name them.")
    refuse(special, "hold regular files", path, "Remove pipes, devices and folders from the classes.")
    return found
