"""Prepares a folder or a list of images as a set in a tfds directory: once for each content and image shape."""

import hashlib
import io
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from cnnjax.data.folders import check_free, exclusive, publish, staging
from cnnjax.data.image_files import check_channels, fit_image
from cnnjax.data.image_inspection import Inspection, check_usable, read_files, report
from cnnjax.data.image_layout import Listing, scan
from cnnjax.data.image_parts import Parts
from cnnjax.data.stored import LISTS
from cnnjax.data.tfds_format import png, write_examples
from cnnjax.errors import StorageError, UserError, option
from cnnjax.files import atomic_write, file_sha256, read_json, write_sums
from cnnjax.runs.schema import ImageShape, Sha256

FILES, SOURCE = "files.json", "source.json"  # In the folder of a version, with their checksums.
_VERSION = "1.0.0"


class _Settings(NamedTuple):
    image_shape: ImageShape
    resize: str
    interpolation: str


@dataclass(frozen=True)
class _Source:
    """The content of source.json: which listing a set was prepared from, and how."""

    listing: Sha256
    settings: _Settings


def prepare_folder(
    path: Path,
    data_dir: Path,
    *,
    image_shape: tuple[int, ...],
    resize: str = "crop",
    interpolation: str = "lanczos",
    skip_unreadable: bool = False,
    version: str | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Finds a folder or a list of images as a prepared set in `data_dir`, or prepares it there.

    The name of the set ends with 12 hexadecimal digits of the SHA-256 of its content (paths, labels, splits, bytes) and
    of the settings. The files are read again only if the path, the size or a time of one of them differs. If a process
    is killed, the next one reads the remaining files.

    Args:
      path: the folder or list, see `image_layout.scan`.
      data_dir: the tfds directory.
      image_shape: (H, W, C), with C from 1 to 4.
      resize, interpolation: see `image_files.fit_image`.
      skip_unreadable: leaves out the files that cannot be read.
      version: the 12 digits of a set to use if it is prepared, even if the folder has changed or is gone.
      say: receives messages and the report on the folder, one line each.

    Returns:
      The folder of the version, `data_dir/NAME_DIGITS/1.0.0`.

    Raises:
      UserError: the folder cannot be used, see `image_layout.scan` and `image_inspection.check_usable`.
      StorageError: `data_dir` is full or cannot be written.
    """
    check_channels(image_shape)
    is_version = re.fullmatch("[0-9a-f]{12}", version or "")
    if is_version and (sources := sorted(data_dir.glob(f"*_{version}/{_VERSION}/{SOURCE}"))):
        own = data_dir / f"{_slug(path)}_{version}" / _VERSION / SOURCE
        source = own if own in sources else sources[0]  # Another folder has the same content.
        name = source.parent.parent.name
        if not os.path.exists(path):
            say(f"{path} does not exist here; {name} is used, which was prepared from the same images")
        elif not _is_unchanged(path, source):
            say(f"{path} is not as it was when {name} was prepared, which is used")
        return source.parent
    listing, settings = scan(path), _Settings(image_shape, resize, interpolation)
    work = f"{_slug(path)}_{_digits(os.path.realpath(path), settings)}"
    try:
        if (found := _find(path, data_dir, listing, settings)) is None:
            data_dir.mkdir(parents=True, exist_ok=True)
            with exclusive(work, data_dir, say) as locked, staging(work, data_dir, locked) as stage:
                found = _find(path, data_dir, listing, settings)  # The process that had the lock prepared it.
                if found is None:
                    parts = Parts(data_dir / f".cnnjax-{work}.parts" if locked else stage / "parts")
                    inspection = _read(path, listing, settings, parts, say)
                    _report(inspection, path, skip_unreadable, say)
                    source = _Source(listing.sha256, settings)
                    return _write(source, inspection, parts, path=path, data_dir=data_dir, stage=stage, say=say)
        folder, inspection = found
        _report(inspection, path, skip_unreadable, say)
        return folder
    except UserError:
        raise
    except OSError as error:
        raise StorageError(
            f"`data_dir` must be a directory that can be written, got {data_dir} ({error}). Fix this, and run the "
            f"command again: it continues. Or choose another one: {option('data_dir', 'DIR')}."
        ) from error


def pixels_of(folder: Path, files: Sequence[str]) -> tuple[bytes, ...]:
    """Returns what identifies the pixels of files of a prepared folder, as they were before they were resized."""
    found = {record.file.path: record.pixels.encode() for record in read_json(folder / FILES, Inspection).records}
    return tuple(found[file] for file in files)


def check_folder(path: Path, data_dir: Path) -> None:
    """Prints a report on a folder or a list of images, and checks that a network can be trained on it.

    Writes no file.

    Raises:
      UserError: it cannot be used.
    """
    listing = scan(path)
    found = _find(path, data_dir, listing, None)
    _report(found[1] if found else _read(path, listing, None, None, print), path, False, print)


def _report(inspection: Inspection, path: Path, skip_unreadable: bool, say: Callable[[str], None]) -> None:
    for line in report(inspection):
        say(line)
    check_usable(inspection, path, skip_unreadable)


def _slug(path: Path) -> str:
    """Returns the name of a folder or list as an identifier of tfds."""
    path = Path(os.path.abspath(path))
    name = unicodedata.normalize("NFKD", path.stem if path.suffix.lower() in LISTS else path.name).lower()
    slug = re.sub(r"[^a-z0-9]+", "_", "".join(c for c in name if not unicodedata.combining(c))).strip("_")[:100]
    return slug if slug[:1].isalpha() else f"images_{slug}".strip("_")


def _digits(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


# --- Prepared sets --------------------------------------------------------------------------------------------------


def _find(path: Path, data_dir: Path, listing: Listing, settings: _Settings | None) -> tuple[Path, Inspection] | None:
    """Returns a set that was prepared from this listing, with these settings or any, or None."""
    for source in sorted(data_dir.glob(f"{_slug(path)}_*/{_VERSION}/{SOURCE}")):
        with suppress(UserError):  # A damaged file counts as absent.
            known = read_json(source, _Source)
            if known.listing == listing.sha256 and settings in (None, known.settings):
                return source.parent, read_json(source.with_name(FILES), Inspection)
    return None


def _is_unchanged(path: Path, source: Path) -> bool:
    """Returns whether a folder holds what was prepared, perhaps with other times, as a copy does."""
    with suppress(UserError, OSError):
        listing = scan(path)
        if listing.sha256 == read_json(source, _Source).listing:
            return True
        records = read_json(source.with_name(FILES), Inspection).records
        now, then = ([file[:4] for file in files] for files in (listing.files, [record.file for record in records]))
        return now == then and all(
            record.problem or file_sha256(listing.root / record.file.path) == record.sha256 for record in records
        )
    return False


def _write(
    source: _Source,
    inspection: Inspection,
    parts: Parts,
    *,
    path: Path,
    data_dir: Path,
    stage: Path,
    say: Callable[[str], None],
) -> Path:
    """Writes and publishes a set, unless there is one with the same content; then removes the parts."""
    images = [(*record.file[:3], record.sha256) for record in inspection.images]
    name = f"{_slug(path)}_{_digits(inspection.class_names, images, source.settings)}"
    folder = data_dir / name / _VERSION
    is_new = not (folder / SOURCE).exists()
    if is_new:
        check_free(folder)
        say(f"writing {name} in the format of TensorFlow Datasets")
        folder = _write_shards(name, stage, source.settings.image_shape, inspection, parts)
    for file, content in ((FILES, inspection), (SOURCE, source)):
        with atomic_write(folder / file, shared=True) as stream:
            stream.write(json.dumps(vars(content)).encode())
    write_sums(folder, [FILES, SOURCE], shared=True)
    folder = publish(folder, stage, data_dir) if is_new else folder
    parts.remove()
    return folder


def _write_shards(name: str, stage: Path, image_shape: tuple[int, ...], inspection: Inspection, parts: Parts) -> Path:
    import tensorflow_datasets as tfds

    def info(builder: Any) -> Any:
        features = {
            "image": tfds.features.Image(shape=image_shape, encoding_format="png"),
            "label": tfds.features.ClassLabel(names=inspection.class_names),
            "file": tfds.features.Text(doc="The path of the file, relative to the folder."),
        }
        return tfds.core.DatasetInfo(
            builder=builder,
            description="A folder of images, prepared by cnnjax.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def examples(split: str, _: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        files = (record.file for record in inspection.images if record.file.split == split)
        for key, file in enumerate(files):
            yield key, {"image": io.BytesIO(parts.image(file)), "label": file.label, "file": file.path}

    splits = sorted({record.file.split for record in inspection.images})
    return write_examples(name, _VERSION, info, {split: partial(examples, split) for split in splits}, stage)


# --- Reading --------------------------------------------------------------------------------------------------------


def _read(
    path: Path, listing: Listing, settings: _Settings | None, parts: Parts | None, say: Callable[[str], None]
) -> Inspection:
    """Reads the files that are not in `parts`, and adds those that are images."""

    def encode(image: Image.Image) -> bytes:
        return b"" if settings is None else png(fit_image(image, *settings))

    found = {} if parts is None else parts.records()
    missing = [file for file in listing.files if file not in found]
    kept = f", and {len(listing.files) - len(missing):,} were read before" if found else ""
    say(f"reading {len(missing):,} files of {path}" + ("" if parts is None else f" (once{kept})"))
    for record, encoded in read_files(listing.root, missing, encode):
        found[record.file] = record
        if parts is not None and not record.problem:
            parts.add(record, encoded)
    if parts is not None:
        parts.save()
    return Inspection(listing.class_names, listing.others, tuple(found[file] for file in listing.files))
