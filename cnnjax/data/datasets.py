"""Image classification sets in TensorFlow Datasets' format: decoded once, kept as arrays, checked by digest."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import threading
import tokenize
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnnjax.data.named import NAMED_SETS
from cnnjax.data.sources import NamedSet, fetch
from cnnjax.data.tfds_reader import Examples, class_names, decode
from cnnjax.errors import UserError, unknown_name

CACHE = "cnnjax_arrays"  # The folder of the decoded arrays, beside the shards of the prepared version.


@dataclass(frozen=True)
class ImageDataset:
    """A prepared set. `load` reads a split; nothing is held in memory until then.

    Attributes:
      name: the tfds name.
      source: where the pixels came from, in words.
      class_names: of each label, in order.
      sha256: of each split, `digest` of its decoded images and labels.
      folder: the prepared version.
    """

    name: str
    source: str
    class_names: tuple[str, ...]
    sha256: dict[str, str]
    folder: Path

    @property
    def num_classes(self) -> int:
        """The number of classes, K."""
        return len(self.class_names)

    def load(self, split: str) -> Examples:
        """Reads a split ("train" or "test") and verifies its digest.

        Where the decoded arrays are missing or damaged, the shards are decoded and the arrays written again.

        Raises:
          UserError: the shards hold other images or labels than before.
        """
        examples = _read_arrays(self.folder, split, self.sha256[split])
        if examples is None:
            examples = decode(self.folder, split)
            got = digest(examples)
            if got != self.sha256[split]:
                raise _mismatch(self.name, split, f"{self.folder}, from {self.source}", self.sha256[split], got)
            _write_arrays(self.folder, split, examples)
        return examples


def default_data_dir() -> Path:
    """Returns the folder that tfds uses: $TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def load_dataset(name: str, data_dir: Path | None = None, say: Callable[[str], None] = print) -> ImageDataset:
    """Finds a set in `data_dir`, or fetches and prepares it there.

    Args:
      name: a tfds name, "cifar10" or "name/config".
      data_dir: the tfds directory; `default_data_dir()` when None.
      say: told what is done, a line at a time.

    Raises:
      UserError: the name is unknown, no source can be reached, a digest does not match, the set is no image
        classification set, or `data_dir` cannot be written.
    """
    name = name.strip("/")
    data_dir = default_data_dir() if data_dir is None else data_dir.expanduser().absolute()
    named = NAMED_SETS.get(name)
    folder = prepared_folder(name, data_dir)
    if folder is None:
        folder, source = _prepare(name, named, data_dir, say)
    else:
        source = None
        cached = _read_facts(name, folder)
        if cached is not None and (named is None or named.sha256 in ({}, cached.sha256)):
            return cached
    try:
        return _decode_all(name, named, folder, source or f"the prepared tfds directory {folder}", say)
    except UserError:
        if named is not None and source is not None:  # Leave nothing behind of what this very call fetched in vain.
            shutil.rmtree(folder)
        raise


def prepared_folder(name: str, data_dir: Path) -> Path | None:
    """Returns the newest prepared version of `name` below `data_dir`, or None."""
    versions = [
        (tuple(map(int, info.parent.name.split("."))), info.parent)
        for info in (data_dir / name).glob("*/dataset_info.json")
        if re.fullmatch(r"\d+\.\d+\.\d+", info.parent.name)
    ]
    return max(versions)[1] if versions else None


def digest(examples: Examples) -> str:
    """Returns the SHA-256 of the images' shape and bytes, then the labels as little-endian int32."""
    image = np.ascontiguousarray(examples.image)
    hasher = hashlib.sha256(f"{image.dtype}{list(image.shape)}".encode())
    hasher.update(image.data)
    hasher.update(np.ascontiguousarray(examples.label, "<i4").data)
    return hasher.hexdigest()


# --- Preparing ------------------------------------------------------------------------------------------------------


def _prepare(name: str, named: NamedSet | None, data_dir: Path, say: Callable[[str], None]) -> tuple[Path, str]:
    """Prepares a set in `data_dir`; returns its folder and the source that served it."""
    if named is None:
        return _prepare_with_tensorflow(name, data_dir, say), "tfds's own download"
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        raw, source = fetch(named, data_dir / "downloads" / "cnnjax" / name, say)
        from cnnjax.data.tfds_writer import write_tfds  # Imports tfds: 1.1 s that a prepared set does not pay.

        folder = write_tfds(named, raw, data_dir, say)
    except OSError as error:
        raise UserError(
            f"`data_dir` must be a directory that can be written, got {data_dir} ({error}). "
            "Mend that, or give another: --data-dir DIR."
        ) from error
    say(f"{name} was served by {source}")
    return folder, source


def _prepare_with_tensorflow(name: str, data_dir: Path, say: Callable[[str], None]) -> Path:
    import tensorflow_datasets as tfds

    base = name.split("/", 1)[0]
    known = tfds.list_builders(with_community_datasets=False)  # The community's are listed on the network.
    if base not in known:
        prepared = {info.parent.parent.name for info in data_dir.glob("*/*/dataset_info.json")}
        raise unknown_name("dataset", name, {*NAMED_SETS, *prepared, *known})
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"`dataset` {name!r} is not prepared in {data_dir}, and only TensorFlow can prepare it. Either run "
            f"`pip install tensorflow` and the command again, or copy a directory that was prepared elsewhere to "
            f"{data_dir / name}."
        )
    say(f"tfds prepares {name} below {data_dir}")
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # tfds raises many types: no network, files to be brought by hand, a full disk.
        raise UserError(f"tfds could not prepare {name!r} below {data_dir}: {error}") from error
    return Path(builder.data_dir)


def _decode_all(
    name: str, named: NamedSet | None, folder: Path, source: str, say: Callable[[str], None]
) -> ImageDataset:
    """Decodes and checks both splits, and keeps the arrays and the facts beside the shards."""
    say(f"decoding {name} from {folder} (once)")
    sha256, kept = {}, True
    for split in ("train", "test"):
        examples = decode(folder, split)
        sha256[split] = digest(examples)
        pinned = named.sha256.get(split) if named else None
        if pinned not in (None, sha256[split]):
            raise _mismatch(name, split, source, pinned, sha256[split])
        kept = _write_arrays(folder, split, examples) and kept
    dataset = ImageDataset(name, source, class_names(folder), sha256, folder)
    if not (kept and _write_facts(dataset)):
        say(f"{folder} cannot be written, so the decoded arrays are not kept: each start decodes {name} again")
    return dataset


def _mismatch(name: str, split: str, source: str, expected: str | None, got: str) -> UserError:
    return UserError(
        f"The {split} split of {name!r} from {source} is not the known one: the SHA-256 of its images and labels "
        f"must be {expected}, got {got}. Move the prepared directory away, if it is there, and run the command again "
        "to fetch the set anew."
    )


# --- The decoded arrays ---------------------------------------------------------------------------------------------


def _read_facts(name: str, folder: Path) -> ImageDataset | None:
    try:
        facts = json.loads((folder / CACHE / "facts.json").read_text())
        return ImageDataset(**{**facts, "name": name, "class_names": tuple(facts["class_names"])}, folder=folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_arrays(folder: Path, split: str, sha256: str) -> Examples | None:
    """Returns the decoded arrays, or None where they are missing or not what `sha256` says."""
    try:
        examples = Examples(*(np.load(folder / CACHE / f"{split}_{name}.npy") for name in Examples._fields))
    except (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError):  # The last two: a damaged header.
        return None
    return examples if digest(examples) == sha256 else None


def _write_facts(dataset: ImageDataset) -> bool:
    facts = asdict(dataset)
    del facts["folder"]  # People move and mount these directories elsewhere.
    return _write(dataset.folder / CACHE / "facts.json", lambda file: file.write(json.dumps(facts, indent=2).encode()))


def _write_arrays(folder: Path, split: str, examples: Examples) -> bool:
    """Writes the decoded arrays; returns whether that went well."""
    return all(
        _write(folder / CACHE / f"{split}_{name}.npy", lambda file, array=array: np.save(file, array))
        for name, array in examples._asdict().items()
    )


def _write(path: Path, write: Callable[[Any], object]) -> bool:
    """Writes a file whole or not at all; returns whether that went well."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        path.parent.mkdir(exist_ok=True)
        with partial.open("wb") as file:
            write(file)
        partial.replace(path)
    except OSError:
        return False
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return True
