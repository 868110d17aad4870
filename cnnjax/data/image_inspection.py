"""Reads every file of a folder of images once: what is in it, what is wrong with it, and a report on both."""

import hashlib
import os
import re
import statistics
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from cnnjax.data.image_files import on_all_cores, open_image
from cnnjax.data.image_layout import File, check_counts, refuse
from cnnjax.errors import UserError, option
from cnnjax.files import file_sha256, open_regular
from cnnjax.process.console import track
from cnnjax.process.tables import MANY_CLASSES, table

SHOWN = 5  # Files in a line of the report.
_CHANGED = "it is being written"
_PIXELS = 1 << 20  # Number of pixels to hash at a time.
_TICK = 0.05  # Seconds. Changes within a tick of the file system's clock, of up to 0.01 s, have the same time.


class Record(NamedTuple):
    """A file and what was found in it. If `problem` is not empty, it says why the file cannot be used."""

    file: File
    width: int = 0  # Upright by the EXIF orientation.
    height: int = 0
    format: str = ""
    mode: str = ""  # Pillow's mode, as stored.
    sha256: str = ""  # The digest of the file.
    pixels: str = ""  # SHA-256 of the pixels in RGB, or in RGBA if there is transparency.
    problem: str = ""


@dataclass(frozen=True)
class Inspection:
    """A `Listing` whose files have been read.

    Attributes:
      class_names: in order.
      others: the files that belong to no class.
      records: one per file, in the order of the listing.
    """

    class_names: tuple[str, ...]
    others: tuple[str, ...]
    records: tuple[Record, ...]

    @property
    def images(self) -> list[Record]:
        """The files that can be used."""
        return [record for record in self.records if not record.problem]


# --- Reading --------------------------------------------------------------------------------------------------------


def read_files(
    root: Path, files: Sequence[File], encode: Callable[[Image.Image], bytes]
) -> Iterator[tuple[Record, bytes]]:
    """Reads files on all cores, with a progress bar.

    Args:
      root: the folder of the paths.
      files: see `image_layout.scan`.
      encode: is applied to each image in the same threads.

    Yields:
      What was found in each file, in order, and the encoded image.
    """
    if time.time() - max((file.ctime_ns for file in files), default=0) / 1e9 < _TICK:
        time.sleep(_TICK)  # A change from now on gets another time.
    # The `catch_warnings` of a thread restores the filters that another thread has set.
    with warnings.catch_warnings(action="ignore"):
        found = on_all_cores(lambda file: _read(root / file.path, file, encode), files)
        yield from track(found, "reading images", total=len(files))


def _read(path: Path, file: File, encode: Callable[[Image.Image], bytes]) -> tuple[Record, bytes]:
    encoded = b""
    try:
        image = open_image(path)
        with open_regular(path) as stream, Image.open(stream) as header:
            kind = header.format or "", header.mode
        record = Record(file, *image.size, *kind, file_sha256(path), _pixel_sha256(image))
        encoded = encode(image)
    except (UserError, OSError) as error:
        why = str(error).partition(f", got {path} ")[2].rstrip(".") or str(error)
        why = re.sub(r"^\((.*)\)$", r"\1", why)
        record = Record(file, problem=f"{why}; is it still being written?" if "truncated" in why.lower() else why)
    try:
        status = os.stat(path)
    except OSError:
        status = None
    if status is None or (status.st_size, status.st_mtime_ns, status.st_ctime_ns) != file[3:]:
        return Record(file, problem=_CHANGED), b""
    return record, encoded


def _pixel_sha256(image: Image.Image) -> str:
    is_opaque = image.mode != "RGBA" or image.getchannel("A").getextrema() == (255, 255)
    mode, (width, height) = "RGB" if is_opaque else "RGBA", image.size
    hasher, rows = hashlib.sha256(f"{mode} {width} {height}".encode()), max(1, _PIXELS // width)
    for top in range(0, height, rows):  # A copy of a photograph is large.
        hasher.update(image.crop((0, top, width, min(top + rows, height))).convert(mode).tobytes())
    return hasher.hexdigest()


def check_usable(inspection: Inspection, path: Path, skip_unreadable: bool) -> None:
    """Checks that a network can be trained on a folder.

    Raises:
      UserError: a file was changed while it was read, a file cannot be read and is not to be skipped, or too few
        images remain.
    """
    changed = [repr(record.file.path) for record in inspection.records if record.problem == _CHANGED]
    refuse(changed, "hold files that nobody is writing", path, "Wait until they are complete.")
    problems = [] if skip_unreadable else [r for r in inspection.records if r.problem]
    fix = f"Repair or remove them, or leave them out in training: {option('skip_unreadable')}."
    refuse([f"{r.file.path!r} ({r.problem})" for r in problems], "hold images that can be read", path, fix)
    train = (record.file for record in inspection.images if record.file.split == "train")
    check_counts(Counter(inspection.class_names[file.label] for file in train), inspection.class_names, path)
    listed, left = ({record.file.split for record in part} for part in (inspection.records, inspection.images))
    refuse(sorted(listed - left), "have a readable image in each split", path, "Repair or remove the others.")


# --- The report -----------------------------------------------------------------------------------------------------


def report(inspection: Inspection) -> Iterator[str]:
    """Yields lines that describe a folder: classes, sizes, formats, and everything that may be a mistake."""
    names, images = inspection.class_names, inspection.images
    splits = [s for s in ("train", "validation", "test") if any(record.file.split == s for record in images)]
    counts = Counter((record.file.split, record.file.label) for record in images)
    totals = Counter(record.file.split for record in images)
    parts = ", ".join(f"{totals[split]:,} {split}" for split in splits) or "none that can be read"
    yield f"{len(images):,} images of {len(names):,} classes: {parts}"
    if len(names) > MANY_CLASSES:
        order = sorted(range(len(names)), key=lambda k: counts["train", k])
        few = ", ".join(f"{names[k]!r} {counts['train', k]:,}" for k in order[:SHOWN])
        middle, most = counts["train", order[len(order) // 2]], counts["train", order[-1]]
        yield f"training images per class: {middle:,} (median), at most {most:,}; fewest: {few}"
    else:
        yield from table([["class", *splits], *([n, *_row(counts, splits, k)] for k, n in enumerate(names))])
    for split in splits:
        missing = [repr(name) for k, name in enumerate(names) if not counts[split, k]]
        if missing:
            yield f"no {split} image of {_some(missing)}"
    if images:
        yield from _sizes_and_formats(images)
    if inspection.others:
        yield f"not used, because they are in no class folder: {_some([*map(repr, inspection.others)])}"
    yield from _duplicates(images)
    problems = [f"{record.file.path!r} ({record.problem})" for record in inspection.records if record.problem]
    if problems:
        yield f"WARNING: files that cannot be read ({len(problems):,}): {_some(problems)}"


def _row(counts: Counter[tuple[str, int]], splits: Sequence[str], label: int) -> list[str]:
    return [f"{counts[split, label]:,}" for split in splits]


def _sizes_and_formats(images: list[Record]) -> Iterator[str]:
    sizes = Counter((record.width, record.height) for record in images)
    by_area = sorted(sizes, key=lambda size: size[0] * size[1])
    (common, count), *_ = sizes.most_common(1)
    median = tuple(statistics.median_low(sides) for sides in zip(*(r[1:3] for r in images), strict=True))
    small, large, common, median = (f"{w}×{h}" for w, h in (by_area[0], by_area[-1], common, median))
    rest = f" to {large} pixels; most often {common} ({count / len(images):.0%}); median {median}"
    yield f"width × height: {small}{rest if len(sizes) > 1 else ' pixels'}"
    formats = Counter(f"{record.format} {record.mode}" for record in images)
    yield f"formats and modes: {', '.join(f'{name} {count:,}' for name, count in formats.most_common())}"


def _duplicates(images: list[Record]) -> Iterator[str]:
    """Yields warnings about images with the same pixels."""
    groups = defaultdict(list)
    for record in images:
        groups[record.pixels].append(record.file)
    same = [group for group in groups.values() if len(group) > 1]
    labels = [_paths(group, "label") for group in same if len({file.label for file in group}) > 1]
    if labels:
        yield f"WARNING: identical pixels under two labels, one of which is wrong ({len(labels):,}): {_some(labels)}"
    splits = [_paths(group, "split") for group in same if len({file.split for file in group}) > 1]
    if splits:
        yield f"WARNING: identical pixels in two splits, which makes scores too high ({len(splits):,}): {_some(splits)}"
    copies = sum(count - 1 for group in same for count in Counter(file.split for file in group).values())
    if copies:
        yield f"identical pixels within a split: {copies:,} more than necessary"


def _paths(group: list[File], field: str) -> str:
    """Returns the paths of the first file with each value of a field."""
    first = {getattr(file, field): file.path for file in reversed(group)}
    return " = ".join(map(repr, sorted(first.values())[:SHOWN]))


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:SHOWN]) + (f" and {len(items) - SHOWN:,} more" if len(items) > SHOWN else "")
