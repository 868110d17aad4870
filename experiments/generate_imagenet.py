"""Generates archives of the shape of ImageNet, to try out training on large sets without ImageNet.

    .venv/bin/python experiments/generate_imagenet.py data/generated 3000 1000
    make train EXPERIMENT=imagenet_resnet50 ARGS="--data-dir data/generated --num-epochs 3 --batch-size 32"

DIR/downloads/manual gets ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar with the given numbers of images: JPEG
files of many sizes, about 500×375 pixels, of the 1,000 classes; some are gray, CMYK, progressive, or PNG files in
disguise, as in the original. Stripes of three colors identify a class, so that the loss falls.
"""

import argparse
import io
import tarfile
from collections import defaultdict
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from cnnjax.data.image_files import on_all_cores
from cnnjax.data.imagenet import ARCHIVES, archive_folder

# Ten colors that differ in hue or brightness; a class is three of them, in order.
PALETTE = np.array(
    [
        (230, 40, 40),
        (240, 150, 30),
        (230, 220, 50),
        (60, 180, 60),
        (50, 190, 200),
        (50, 80, 220),
        (150, 60, 200),
        (240, 130, 190),
        (30, 30, 40),
        (225, 225, 215),
    ]
)
NOISE = np.random.default_rng(0).integers(-24, 25, (1200, 1200, 1), np.int16)


def make_image(seed: tuple[int, int], label: int, long_side: tuple[int, int]) -> bytes:
    """Returns a file of stripes in the three colors of a class, with a random angle, width, brightness and noise.

    Args:
      seed: determines the file.
      label: the class, 0 to 999.
      long_side: the smallest and the largest length of the longer side, in pixels; the median is in the upper half.
    """
    rng = np.random.default_rng(seed)
    low, high = long_side
    length = int(rng.triangular(low, low + 0.75 * (high - low), high + 1))
    sides = [length, max(8, int(length * rng.choice([0.67, 0.75, 0.75, 0.75, 1.0])))]
    width, height = sides if rng.random() < 0.8 else sides[::-1]
    angle, period = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 0.9) * length
    y, x = np.ogrid[:height, :width]
    stripe = np.floor((np.cos(angle) * x + np.sin(angle) * y) * (3 / period) + rng.uniform(0, 3)).astype(int) % 3
    colors = PALETTE[[label // 100, label // 10 % 10, label % 10]] * rng.uniform(0.7, 1.1)
    top, left = rng.integers(0, 600, 2)
    noise = NOISE[top : top + height, left : left + width]
    image = Image.fromarray(np.clip(colors.astype(np.int16)[stripe] + noise, 0, 255).astype(np.uint8))
    kind, file = rng.random(), io.BytesIO()
    if kind < 0.002:
        image.save(file, "PNG", compress_level=1)
    else:
        mode = "L" if kind < 0.02 else "CMYK" if kind < 0.03 else "RGB"
        image.convert(mode).save(file, "JPEG", quality=int(rng.integers(75, 97)), progressive=bool(kind > 0.9))
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds a file to an archive."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_archives(
    data_dir: Path,
    num_train: int,
    num_validation: int,
    *,
    num_classes: int = 1000,
    long_side: tuple[int, int] = (200, 600),
) -> None:
    """Writes both archives for the tfds directory `data_dir`.

    Args:
      num_train: the number of training images, equally many of each class, up to one.
      num_validation: the number of validation images.
      num_classes: that have images; the set always has 1,000 classes.
      long_side: see `make_image`.
    """
    folder, stock = archive_folder(data_dir), files("tensorflow_datasets") / "datasets" / "imagenet2012"
    folder.mkdir(parents=True, exist_ok=True)
    names = (stock / "labels.txt").read_text().split()
    of_class: dict[str, list[int]] = defaultdict(list)
    for i in range(num_train):
        of_class[names[i % num_classes]].append(i)
    with tarfile.open(folder / ARCHIVES["train"], "w") as tar:
        for name, members in of_class.items():
            label, inner = names.index(name), io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as class_tar:
                images = on_all_cores(lambda i, label=label: make_image((0, i), label, long_side), members)
                for i, data in zip(members, images, strict=True):
                    add(class_tar, f"{name}_{i}.JPEG", data)
            add(tar, f"{name}.tar", inner.getvalue())
    # The number in the name of a validation image selects its class.
    labels = [names.index(name) for name in (stock / "validation_labels.txt").read_text().split()]
    numbers = [n for n, label in enumerate(labels, 1) if label < num_classes][:num_validation]
    with tarfile.open(folder / ARCHIVES["validation"], "w") as tar:
        images = on_all_cores(lambda n: make_image((1, n), labels[n - 1], long_side), numbers)
        for n, data in zip(numbers, images, strict=True):
            add(tar, f"ILSVRC2012_val_{n:08d}.JPEG", data)


def main() -> None:
    """Writes the archives that the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path, help="the tfds directory")
    parser.add_argument("train", type=int, help="number of training images")
    parser.add_argument("validation", type=int, help="number of validation images, up to 50000")
    arguments = parser.parse_args()
    write_archives(arguments.dir, arguments.train, arguments.validation)


if __name__ == "__main__":
    main()
