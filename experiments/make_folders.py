"""Writes parts of well-known sets as folders of PNG files, for the experiments with folders of images.

    .venv/bin/python experiments/make_folders.py

data/cifar10_1000: 100 training images of each class of CIFAR-10, and all 10,000 test images.
data/fashion_mnist_uneven: Fashion-MNIST with 5% of the training images of one class, the shirts.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from cnnjax import load_dataset
from cnnjax.data.order import split_validation
from cnnjax.data.stored import Examples, select

SEED = 0


def write(folder: Path, split: str, examples: Examples, class_names: tuple[str, ...]) -> None:
    """Writes one PNG file per example, folder/split/class/number.png."""
    names = [name.replace("/", "-") for name in class_names]
    for name in names:
        (folder / split / name).mkdir(parents=True, exist_ok=True)
    for i, (image, label) in enumerate(zip(examples.image, examples.label, strict=True)):
        pixels = image.squeeze(-1) if image.shape[-1] == 1 else image
        Image.fromarray(pixels).save(folder / split / names[label] / f"{i:05d}.png", compress_level=1)
    print(f"{folder / split}: {len(examples.label):,} images")


def main() -> None:
    """Writes both folders."""
    cifar10, folder = load_dataset("cifar10"), Path("data/cifar10_1000")
    train = cifar10.load("train")
    _, drawn = split_validation(SEED, train.label, 1000 / len(train.label))
    write(folder, "train", select(train, drawn), cifar10.class_names)
    write(folder, "test", cifar10.load("test"), cifar10.class_names)

    fashion, folder = load_dataset("fashion_mnist"), Path("data/fashion_mnist_uneven")
    train, shirt = fashion.load("train"), fashion.class_names.index("Shirt")
    _, few = split_validation(SEED, train.label, 0.05)
    kept = np.sort(np.concatenate([np.flatnonzero(train.label != shirt), few[train.label[few] == shirt]]))
    write(folder, "train", select(train, kept), fashion.class_names)
    write(folder, "test", fashion.load("test"), fashion.class_names)


if __name__ == "__main__":
    main()
