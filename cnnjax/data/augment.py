"""Data augmentation: geometry, which the order of an epoch draws, and transformations of a batch on the device."""

from dataclasses import dataclass
from math import inf
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Num

from cnnjax.errors import ArgumentError, UserError, check, check_name, describe_shapes
from cnnjax.fields import check_fields
from cnnjax.typing import AnyArray, Batch


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Flips, translation and cutout of training images. A subclass may define more; its fields are options.

    An image is shifted and mirrored, then `transform_pixels` sees it; then it is standardized, cutout follows, and
    `transform` is last.
    """

    flip: str = "none"
    """none, random (mirror with probability 1/2), or alternating (each image flips every epoch)."""
    translate: int = 0
    """Maximum random shift in pixels, with reflect padding."""
    cutout: int = 0
    """Side of a random square that is set to the mean (DeVries and Taylor 2017), inside the image; 0: none."""

    def __post_init__(self) -> None:
        check_fields(self, "augment")
        check_name("augment.flip", self.flip, ("none", "random", "alternating"))
        check("augment.translate", "at least 0", self.translate >= 0, self.translate)
        check("augment.cutout", "at least 0", self.cutout >= 0, self.cutout)

    def transform_pixels(self, key: Key[Array, " B"], image: Num[Array, "B H W C"]) -> Num[Array, "B H2 W2 C"]:
        """Transforms images before they are standardized. Runs on the device and must be pure.

        Args:
          key: one key per example, as in `transform`, but independent of it.
          image: shifted and mirrored, uint8.

        Returns:
          Images in the same unit, from 0 to 255, of the size that `output_size` states; uint8 or float32.
        """
        return image

    def output_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Returns the size [H W] to which `transform_pixels` brings images [H W]."""
        return image_size

    def at_epoch(self, epoch: int, num_epochs: int) -> "Augment":
        """Returns the augmentation of an epoch (from 0), such as images that grow during a run of `num_epochs`.

        Return few distinct ones, since each is compiled, and the same one for the same arguments.
        """
        return self

    def depends_on_length(self) -> bool:
        """Returns whether the augmentation of an epoch depends on the number of epochs."""
        return type(self).at_epoch is not Augment.at_epoch

    def transform(self, key: Key[Array, " B"], batch: Batch) -> Batch:
        """Transforms a batch, after everything else. Runs on the device and must be pure.

        Args:
          key: one key per example, which depends only on seed, epoch and example; if an epoch draws an example several
            times, each draw has its own.
          batch: standardized images, float32 [B H W C]; int32 labels [B].

        Returns:
          A batch of the same image shape; its labels may be class probabilities, float32 [B K].
        """
        return batch

    def check_size(self, image_size: tuple[int, int]) -> None:
        """Checks that images [H W] are large enough.

        Raises:
          UserError: `translate` or `cutout` is too large for them.
        """
        output_size = self.output_size(image_size)
        limits = {"translate": (min(image_size) - 1, image_size), "cutout": (min(output_size), output_size)}
        for name, (limit, size) in limits.items():
            if (value := getattr(self, name)) > limit:
                pixels = "×".join(map(str, size))
                raise UserError(f"`augment.{name}` must be at most {limit} for images of {pixels} pixels, got {value}.")


def augment_of_epoch(augment: Augment, epoch: int, num_epochs: int) -> Augment:
    """Returns what `augment.at_epoch` returns.

    Raises:
      UserError: it is no augmentation.
    """
    found = augment.at_epoch(epoch, num_epochs)
    got = f"{found!r} for epoch {epoch}"
    check("augment.at_epoch", "a method that returns an Augment", isinstance(found, Augment), got)
    return found


@dataclass(frozen=True)
class Mixup(Augment):
    """Mixes each image, and its label, with its neighbor in the batch.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization" (2018); here each example draws its own weight.
    """

    alpha: float = 0.2
    """Weights are drawn from Beta(alpha, alpha)."""
    num_classes: int = 10
    """Number of classes; set from the data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check("augment.alpha", "above 0 and finite", 0 < self.alpha < inf, self.alpha)

    def transform(self, key: Key[Array, " B"], batch: Batch) -> Batch:
        """Returns the mixed batch."""
        check_keys(key, batch.image)
        weight = _beta(key, self.alpha)  # [B]
        image = _mix(batch.image, weight[:, None, None, None])
        return batch._replace(image=image, label=_mix_labels(batch.label, weight, self.num_classes))


@dataclass(frozen=True)
class CutMix(Augment):
    """Replaces a random rectangle of each image by that of its neighbor in the batch, and mixes the labels by area.

    Source: Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers" (2019), section 3.1.
    """

    alpha: float = 1.0
    """The share of an image that is kept is drawn from Beta(alpha, alpha)."""
    num_classes: int = 10
    """Number of classes; set from the data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check("augment.alpha", "above 0 and finite", 0 < self.alpha < inf, self.alpha)

    def transform(self, key: Key[Array, " B"], batch: Batch) -> Batch:
        """Returns the mixed batch."""
        check_keys(key, batch.image)
        keys = jax.vmap(jax.random.split)(key)  # [B 2]
        half = jnp.sqrt(1 - _beta(keys[:, 0], self.alpha)) / 2  # [B], as a fraction of the side
        center = jax.vmap(lambda k: jax.random.uniform(k, (2,), jnp.float32))(keys[:, 1])  # [B 2]
        b, h, w, _ = batch.image.shape

        def inside(size: int, center: Float[Array, " B"]) -> Array:
            low, high = (jnp.clip(jnp.round(size * (center + sign * half)), 0, size) for sign in (-1, 1))
            pixel = jnp.arange(size, dtype=jnp.float32)[None]
            return (pixel >= low[:, None]) & (pixel < high[:, None])  # [B size]

        mask = inside(h, center[:, 0])[:, :, None] & inside(w, center[:, 1])[:, None, :]  # [B H W]
        image = jnp.where(mask[..., None], jnp.roll(batch.image, 1, axis=0), batch.image)
        weight = 1 - mask.reshape(b, -1).mean(axis=1, dtype=jnp.float32)
        return batch._replace(image=image, label=_mix_labels(batch.label, weight, self.num_classes))


def check_keys(key: Any, image: AnyArray) -> None:
    """Raises a `ValueError` unless there is one key per image."""
    if jnp.shape(key) != image.shape[:1]:
        raise ArgumentError(
            f"`key` must be one key per example, of shape {image.shape[:1]}, got {describe_shapes(key)}. Split it: "
            "`jax.random.split(key, batch_size)`."
        )


def _beta(key: Key[Array, " B"], alpha: float) -> Float[Array, " B"]:
    return jax.vmap(lambda k: jax.random.beta(k, alpha, alpha, dtype=jnp.float32))(key)


def _mix(x: AnyArray, weight: Array) -> Array:
    return weight * x + (1 - weight) * jnp.roll(x, 1, axis=0)


def _mix_labels(label: Int[AnyArray, " B"], weight: Float[Array, " B"], num_classes: int) -> Float[Array, "B K"]:
    if getattr(label, "shape", None) != weight.shape or not jnp.issubdtype(label.dtype, jnp.integer):
        raise ArgumentError(
            f"`batch.label` must be class indices, int [B], to be mixed, got {describe_shapes(label)}. Use "
            "`label.ravel()` for a column; mix others in `transform` of an Augment of your own."
        )
    return _mix(jax.nn.one_hot(label, num_classes, dtype=jnp.float32), weight[:, None])
