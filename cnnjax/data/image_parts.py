"""Progress of the preparation of a folder: images that were read and fitted, on disk for the next process."""

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from cnnjax.data.image_inspection import Record
from cnnjax.data.image_layout import File
from cnnjax.errors import UserError
from cnnjax.files import file_sha256, read_json, write_file
from cnnjax.runs.schema import Sha256

_SIZE, _SECONDS = 32 << 20, 10  # Bytes and time after which a part is saved.


@dataclass(frozen=True)
class _Part:
    """The content of PART.json. The images are in PART.images, as PNG, one after the other."""

    records: tuple[Record, ...]
    sizes: tuple[int, ...]
    sha256: Sha256


class Parts:
    """Images that were read and fitted. One process at a time may use a folder.

    Args:
      folder: holds what another process has saved, or is created.

    Raises:
      OSError: from all methods, if the disk is full or cannot be written.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._places: dict[File, tuple[Record, Path, int, int]] = {}  # Record, file of the image, offset, size.
        self._new: list[tuple[Record, bytes]] = []
        self._bytes, self._saved = 0, time.monotonic()
        self._loaded = folder, b""  # The file of the last image, and its content.
        for path in sorted(folder.glob("*.json")):
            with suppress(UserError, OSError):  # A damaged part counts as absent.
                part = read_json(path, _Part, listed=False)
                if file_sha256(images := path.with_suffix(".images")) == part.sha256:
                    self._place(part.records, part.sizes, images)

    def records(self) -> dict[File, Record]:
        """Returns the record of each file that was read."""
        return {file: record for file, (record, *_) in self._places.items()}

    def add(self, record: Record, image: bytes) -> None:
        """Adds an image, and saves a part from time to time."""
        self._new.append((record, image))
        self._bytes += len(image)
        if self._bytes > _SIZE or time.monotonic() - self._saved > _SECONDS:
            self.save()

    def save(self) -> None:
        """Saves the images that were added as a part."""
        if not self._new:
            return
        records, images = zip(*self._new, strict=True)
        number = 1 + max((int(path.stem) for path in self._folder.glob("*.images")), default=0)
        path, content = self._folder / f"{number:06}.images", b"".join(images)
        part = _Part(records, sizes := tuple(map(len, images)), hashlib.sha256(content).hexdigest())
        write_file(path, content)
        write_file(path.with_suffix(".json"), json.dumps(vars(part)))
        self._place(records, sizes, path)
        self._new, self._bytes, self._saved = [], 0, time.monotonic()

    def _place(self, records: Sequence[Record], sizes: Sequence[int], path: Path) -> None:
        for record, end, size in zip(records, accumulate(sizes), sizes, strict=True):
            self._places[record.file] = record, path, end - size, size

    def image(self, file: File) -> bytes:
        """Returns an image as PNG."""
        _, path, offset, size = self._places[file]
        if self._loaded[0] != path:
            self._loaded = path, path.read_bytes()
        return self._loaded[1][offset : offset + size]

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)
