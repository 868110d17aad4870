"""Measures how fast image files are read and prepared.

    .venv/bin/python experiments/benchmarks/images.py decode     # photos, per core, next to plain Pillow
    .venv/bin/python experiments/benchmarks/images.py folder     # 100,000 small files become a prepared set
    .venv/bin/python experiments/benchmarks/images.py predict --run runs/cifar10_fast-seed0   # next to decoding alone

`decode`: the readers take turns on the same JPEG files, which the system has in memory, with the process on one core. A
"first reading" is what `cnnjax data` and the preparation do: file and pixels are hashed, and the image is encoded as
PNG. `folder`: a process prepares the folder, and another one finds it prepared; each includes the start of Python.
`predict`: `Run.predict_files` and its parts, with the same threads, compiled before. On a CPU the network and the
decoders share the cores: "the sum of both" is the speed at which they would take turns.
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
from typing import Any

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


def save_photos(folder: Path, size: tuple[int, int], count: int, noise: float = 4.0) -> list[Path]:
    """Writes JPEG files with the frequencies of a photo: smooth, with a little noise."""
    rng, (width, height) = np.random.default_rng(0), size
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        noisy = np.asarray(coarse) + rng.normal(0, noise, (height, width, 3))
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


def save_tiles(folder: Path, count: int) -> list[Path]:
    """Writes tiles of a photo as PNG files of 32×32 pixels."""
    with Image.open(save_photos(folder, (640, 480), 1)[0]) as photo:
        pixels = np.asarray(photo)
    rng = np.random.default_rng(0)
    paths = [folder / f"{i}.png" for i in range(count)]
    for path, top, left in zip(paths, rng.integers(0, 448, count), rng.integers(0, 608, count), strict=True):
        Image.fromarray(pixels[top : top + 32, left : left + 32]).save(path)
    return paths


def small_run(run_dir: Path) -> Any:
    """Returns a run that trains a network on noise of 32×32 pixels."""
    from cnnjax import MLP, Config, train_and_evaluate

    image, label = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8), np.arange(40) % 2
    config = Config(dataset=(image, label, image, label), model=MLP(), num_epochs=1, tta="flip")
    return train_and_evaluate(config, run_dir=run_dir)


def decode_all(paths: Sequence[Path], **kind: Any) -> None:
    from cnnjax.data.image_files import on_all_cores, read_image

    for _ in on_all_cores(partial(read_image, **kind), paths):
        pass


def predict_all(run: Any, paths: Sequence[Path], tta: str) -> None:
    for _ in run.predict_files(paths, tta=tta):
        pass


def predict(args: argparse.Namespace) -> str:
    from cnnjax import load_run

    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, save, number in (
            ("photo, 640×480, JPEG", partial(save_photos, size=(640, 480)), 2000),
            ("tile, 32×32, PNG", save_tiles, 10_000),
        ):
            (folder := Path(temporary, name[:5])).mkdir()
            paths = save(folder, count=16 if args.small else number)
            run = load_run(args.run) if args.run else small_run(folder / "run")
            facts, tta = run.facts, run.config.tta
            images = np.zeros((len(paths), *facts.image_shape), np.uint8)
            kind = {"resize": facts.resize, "interpolation": facts.interpolation}
            work: dict[str, Any] = {"decoding alone": partial(decode_all, paths, image_shape=facts.image_shape, **kind)}
            for views in dict.fromkeys(("none", tta)):
                work[f"network alone, views: {views}"] = partial(run.predict, images, tta=views)
                work[f"`predict_files`, views: {views}"] = partial(predict_all, run, paths, tta=views)
            times = take_turns({way: partial(seconds, function) for way, function in work.items()}, args.turns)
            decoding = times["decoding alone"]
            for way, found in times.items():
                _, _, views = way.partition("`predict_files`, ")
                both = zip(decoding, times[f"network alone, {views}"], strict=True) if views else ()
                sum_of_both = f"{ratio([a + b for a, b in both], found):.2f}" if views else ""
                speed = spread([len(paths) / x for x in found])
                rows.append([name, way, speed, f"{ratio(decoding, found):.2f}", sum_of_both])
    return table(["files", "what", "images/s", "× decoding", "× the sum of both"], rows)


PARTS = {f.__name__: f for f in (decode, folder, predict)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--run", type=Path, help="a run for `predict`; a small network by default")
    args = harness.parse(parser, list(PARTS), list(PARTS))
    if args.small:
        args.turns = 1
    harness.write_tables(args, PARTS, "" if args.small else harness.describe("-"), "images ")


if __name__ == "__main__":
    main()
