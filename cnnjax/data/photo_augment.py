"""The augmentation of photos: random resized crops of growing images, RandAugment, mixup and CutMix."""

from dataclasses import dataclass, replace
from functools import partial
from math import inf

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Num

from cnnjax.data.augment import Augment, CutMix, Mixup, check_keys
from cnnjax.data.crop import random_resized_crop
from cnnjax.data.rand_augment import MAX_MAGNITUDE, rand_augment
from cnnjax.data.stored import MAX_SIDE
from cnnjax.errors import UserError, check
from cnnjax.typing import Batch


@dataclass(frozen=True, kw_only=True)
class PhotoAugment(Augment):
    """Random resized crops, RandAugment, and mixup or CutMix, each if it is set; all on the device.

    Crops are parts of the stored images, which evaluation sees whole: store them larger than the crops, for example
    with 256 pixels (`image_size`) for crops of up to 224. Flips are drawn as in every `Augment`.
    """

    train_sizes: tuple[int, ...] = ()
    """Sides in pixels of the square crops that the network is trained on, each for an equal part of the epochs;
    several: progressive resizing; empty: crops of the stored size. Each distinct one is compiled."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest area of a random resized crop, as fractions of the image's; 1 1: the whole image."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a crop."""
    num_ops: int = 0
    """Number of operations of RandAugment (Cubuk et al. 2019) per image; 0: none."""
    magnitude: float = 9.0
    """Magnitude of the operations of RandAugment, from 0 to 30."""
    mixup: float = 0.0
    """Alpha of mixup, see `Mixup`; 0: none. With both, each image gets mixup or CutMix, with probability 1/2."""
    cutmix: float = 0.0
    """Alpha of CutMix, see `CutMix`; 0: none."""
    num_classes: int = 10
    """Number of classes; set from the data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = all(1 <= size <= MAX_SIDE for size in self.train_sizes)
        check("augment.train_sizes", f"from 1 to {MAX_SIDE}", sizes, self.train_sizes)
        for name, largest, rule in (("scale", 1, "at most 1"), ("ratio", inf, "finite")):
            low, high = values = getattr(self, name)
            valid = 0 < low <= high <= largest and high < inf
            check(f"augment.{name}", f"two numbers above 0 and {rule}, the smaller one first", valid, values)
        check("augment.num_ops", "at least 0", self.num_ops >= 0, self.num_ops)
        valid = 0 <= self.magnitude <= MAX_MAGNITUDE
        check("augment.magnitude", f"from 0 to {MAX_MAGNITUDE}", valid, self.magnitude)
        for name in ("mixup", "cutmix"):
            check(f"augment.{name}", "at least 0 and finite", 0 <= getattr(self, name) < inf, getattr(self, name))

    def output_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Returns the size of the crops; of several, the last."""
        return (self.train_sizes[-1], self.train_sizes[-1]) if self.train_sizes else image_size

    def at_epoch(self, epoch: int, num_epochs: int) -> "PhotoAugment":
        """Returns the augmentation with the size of an epoch; the last epoch always has the last size."""
        left = (num_epochs - 1 - epoch) * len(self.train_sizes) // num_epochs  # Sizes that come later.
        return replace(self, train_sizes=self.train_sizes[-1 - left :][:1])

    def depends_on_length(self) -> bool:
        """Returns whether the size, or what a subclass decides, changes during a run."""
        return len({*self.train_sizes}) > 1 or type(self).at_epoch is not PhotoAugment.at_epoch

    def transform_pixels(self, key: Key[Array, " B"], image: Num[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
        """Returns crops, after RandAugment."""
        check_keys(key, image)
        keys = jax.vmap(jax.random.split)(key)  # [B 2]
        crop_key, ops_key = keys[:, 0], keys[:, 1]
        _, height, width, _ = image.shape
        size = self.output_size((height, width))
        image = random_resized_crop(crop_key, image, size=size, scale=self.scale, ratio=self.ratio)
        if not self.num_ops:
            return image
        if (channels := image.shape[-1]) not in (1, 3):
            raise UserError(f"`augment.num_ops` must be 0 for images of {channels} channels, got {self.num_ops}.")
        return rand_augment(ops_key, jnp.round(image), num_ops=self.num_ops, magnitude=self.magnitude)

    def transform(self, key: Key[Array, " B"], batch: Batch) -> Batch:
        """Returns the mixed batch."""
        check_keys(key, batch.image)
        keys = jax.vmap(lambda k: jax.random.split(k, 3))(key)  # [B 3]
        mixup_key, cutmix_key, choice_key = keys[:, 0], keys[:, 1], keys[:, 2]
        batches = []
        if self.mixup:
            batches.append(Mixup(alpha=self.mixup, num_classes=self.num_classes).transform(mixup_key, batch))
        if self.cutmix:
            batches.append(CutMix(alpha=self.cutmix, num_classes=self.num_classes).transform(cutmix_key, batch))
        if len(batches) < 2:
            return batches[0] if batches else batch
        first = jax.vmap(partial(jax.random.bernoulli, p=jnp.float32(0.5)))(choice_key)  # [B]
        one, other = batches
        image = jnp.where(first[:, None, None, None], one.image, other.image)
        return batch._replace(image=image, label=jnp.where(first[:, None], one.label, other.label))
