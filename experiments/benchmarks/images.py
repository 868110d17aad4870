"""Measures how fast image files are read and prepared.

    .venv/bin/python experiments/benchmarks/images.py decode     # photos, per core, next to plain Pillow
    .venv/bin/python experiments/benchmarks/images.py folder     # 100,000 small files become a prepared set

`decode`: the readers take turns on the same JPEG files, which the system has in memory, with the process on one core. A
"first reading" is what `cnnjax data` and the preparation do: file and pixels are hashed, and the image is encoded as
PNG. `folder`: a process prepares the folder, and another one finds it prepared; each includes the start of Python.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import harness
import numpy as np
from harness import ratio, seconds, spread, table, take_turns
from PIL import Image, ImageOps

SHAPE = (224, 224, 3)
PHOTOS = {"photo, 4000×3000": (4000, 3000, 16), "small photo, 640×480": (640, 480, 400)}  # Size and number.
PREPARE = """
import sys
from pathlib import Path
from cnnjax.data.image_folder import prepare_folder
prepare_folder(Path(sys.argv[1]), Path(sys.argv[2]), image_shape=(32, 32, 3))
"""


def save_photos(folder: Path, size: tuple[int, int], count: int) -> list[Path]:
    """Writes JPEG files with the frequencies of a photo: smooth, with a little noise."""
    rng, (width, height) = np.random.default_rng(0), size
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        noisy = np.asarray(coarse) + rng.normal(0, 4, (height, width, 3))
        path = folder / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return sorted(folder.rglob("*.jpg"))


def read_with_pillow(paths: Sequence[Path]) -> None:
    for path in paths:
        with Image.open(path) as image:
            np.asarray(ImageOps.fit(image.convert("RGB"), (SHAPE[1], SHAPE[0]), Image.Resampling.LANCZOS))


def read_with_cnnjax(paths: Sequence[Path]) -> None:
    from cnnjax.data.image_files import read_image

    for path in paths:
        read_image(path, SHAPE)


def read_first(folder: Path) -> None:
    from cnnjax.data.image_files import fit_image
    from cnnjax.data.image_inspection import read_files
    from cnnjax.data.image_layout import scan
    from cnnjax.data.tfds_format import png

    for record, _ in read_files(folder, scan(folder).files, lambda image: png(fit_image(image, SHAPE))):
        assert not record.problem


def decode(args: argparse.Namespace) -> str:
    cores, rows = os.sched_getaffinity(0), []
    for name, (width, height, number) in PHOTOS.items():
        count = 4 if args.small else number
        with tempfile.TemporaryDirectory() as temporary:
            paths = save_photos(folder := Path(temporary), (width, height), count)

            def on_cores(read: partial[None], chosen: set[int]) -> float:
                os.sched_setaffinity(0, chosen)  # The threads are as many.
                try:
                    return seconds(read) * len(chosen)
                finally:
                    os.sched_setaffinity(0, cores)

            readers = {
                "Pillow: open, convert, fit": (partial(read_with_pillow, paths), {min(cores)}),
                "`read_image`, as `predict`": (partial(read_with_cnnjax, paths), {min(cores)}),
                "first reading, on one core": (partial(read_first, folder), {min(cores)}),
                f"first reading, on {len(cores)} cores": (partial(read_first, folder), cores),
            }
            times = take_turns({reader: partial(on_cores, *how) for reader, how in readers.items()}, args.turns)
            pillow = next(iter(times.values()))
            for reader, found in times.items():
                speed = spread([count / x for x in found], ",.1f")
                rows.append([name, reader, speed, f"{ratio(pillow, found):.2f}"])
    return table(["files", "reader", "images/s per core", "× Pillow"], rows)


def folder(args: argparse.Namespace) -> str:
    rng, count, rows = np.random.default_rng(0), 200 if args.small else 100_000, []
    with tempfile.TemporaryDirectory() as temporary:
        root, data_dir = Path(temporary, "many"), Path(temporary, "data")
        for label in range(100):
            (root / str(label)).mkdir(parents=True)
            for i, image in enumerate(rng.integers(0, 256, (count // 100, 32, 32, 3), np.uint8)):
                Image.fromarray(image).save(root / str(label) / f"{i}.png")
        for name in ("the first start", "the second start"):
            command = [sys.executable, "-c", PREPARE, str(root), str(data_dir)]
            start = time.perf_counter()
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=harness.ENVIRONMENT) as process:
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                sys.exit(f"`{' '.join(command[:2])}` ended with {process.returncode}.")
            rows.append([name, f"{time.perf_counter() - start:.1f}", f"{usage.ru_maxrss / 2**20:.2f}"])  # From KiB.
    return table([f"{count:,} PNG files of 32×32 pixels in 100 classes", "seconds", "GiB of memory"], rows)


PARTS = {f.__name__: f for f in (decode, folder)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    args = harness.parse(parser, list(PARTS), list(PARTS))
    if args.small:
        args.turns = 1
    harness.write_tables(args, PARTS, "" if args.small else harness.describe("-"), "images ")


if __name__ == "__main__":
    main()
