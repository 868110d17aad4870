"""Training batches for a loop of one's own."""

from collections.abc import Iterator
from functools import partial
from operator import index
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from cnnjax.checks import check_augment
from cnnjax.compiler import jit
from cnnjax.config import check_part
from cnnjax.data.arrays import check_images, own_images
from cnnjax.data.augment import Augment
from cnnjax.data.batches import Pixels, Standardization, make_batch, pixel_statistics, standardize
from cnnjax.data.order import Plan, epoch_plan, steps_per_epoch
from cnnjax.errors import check, describe_shapes, user_code
from cnnjax.typing import AnyArray, BatchLike


class DataLoader:
    """Makes the batches of a loop around `train_step`: those that a run trains on, from images in memory.

    Order, augmentation and keys depend on the seed and the number of the epoch alone, so a loop can resume at any
    epoch. The images are kept on the device as bytes. `len` is the number of batches per epoch, all of one size: the
    last one is padded with examples that its mask leaves out.

    Example:
      >>> data = load_dataset("cifar10")
      >>> loader = DataLoader(*data.load("train"), batch_size=128, seed=0, augment=Augment(flip="random"))
      >>> for epoch in range(10):
      ...     for batch in loader.epoch(epoch):
      ...         state, metrics = train_step(state, batch, train_key, model=model, tx=tx)
      >>> test = data.load("test")
      >>> evaluate(state, loader.standardize(test.image), test.label, model=model)

    A run of the same seed trains on the batches of `load_parts(seed, validation_fraction)[0]` instead of
    `load("train")`, and splits `jax.random.key(seed)` into three keys, the first for `init_state`, the second for
    `train_step`. The two agree up to rounding.

    Attributes:
      standardization: mean and standard deviation of each channel of the images, float32 [C], from 0 to 255.
    """

    standardization: Standardization

    def __init__(
        self,
        image: Any,
        label: PyTree,
        *,
        batch_size: int,
        seed: int,
        augment: Augment | None = None,
        num_epochs: int | None = None,
        standardization: tuple[Any, Any] | None = None,
    ):
        """Copies the examples.

        Args:
          image: uint8 [N H W C] or [N H W].
          label: integers [N]; or a pytree of arrays [N ...] for a loss of your own, such as several labels, or a
            teacher's logits. No augmentation moves them with the images.
          batch_size: the number of examples per batch.
          seed: from 0 to 2**32 - 1.
          augment: no augmentation if None. `Mixup` and `CutMix` need their `num_classes`.
          num_epochs: the number of epochs of the loop, for an augmentation that depends on it.
          standardization: mean and standard deviation [C] from 0 to 255, such as `load_weights(model).standardization`;
            None: those of `image`.

        Raises:
          UserError: an argument is wrong, or the augmentation does not fit it.
        """
        augment = augment or Augment()
        check_part("augment", augment, Augment, "Augment(), PhotoAugment(), Mixup() or CutMix()")
        images = own_images("image", image)
        labels = jax.tree_util.tree_map_with_path(partial(_own_label, len(images)), label)
        check("label", "an array, or a pytree of arrays", bool(jax.tree.leaves(labels)), repr(label))
        self._batch_size = _integer("batch_size", batch_size, 1, 2**31)
        self._seed = _integer("seed", seed, 0, 2**32)
        self._num_epochs = None if num_epochs is None else _integer("num_epochs", num_epochs, 1, 2**31)
        rule = f"the number of epochs for {type(augment).__name__}, which depends on it"
        check("num_epochs", rule, num_epochs is not None or not augment.depends_on_length(), num_epochs)
        self._steps = steps_per_epoch(len(images), self._batch_size)
        self._augment = augment
        self._key = jax.random.split(jax.random.key(self._seed), 3)[2]  # As a run does.
        self.standardization = _standardization(images, standardization)
        self._pixels = Pixels(jnp.asarray(images), labels, self.standardization)
        self._checked: Augment | None = None
        self._augment_of(0)

    def __len__(self) -> int:
        return self._steps

    def epoch(self, epoch: int) -> Iterator[BatchLike]:
        """Returns the batches of an epoch (from 0), on the device: standardized images, float32 [B H W C].

        Raises:
          UserError: there is no such epoch, or the augmentation of this epoch is wrong.
        """
        epoch = _integer("epoch", epoch, 0, self._num_epochs or 2**31)
        augment, (count, *size, _) = self._augment_of(epoch), self._pixels.image.shape
        plan = epoch_plan(
            self._seed, epoch, count, batch_size=self._batch_size, augment=augment, image_size=(size[0], size[1])
        )
        key = jax.random.fold_in(self._key, epoch)
        return (_make(self._pixels, plan.row(step), key, augment=augment) for step in range(self._steps))

    def standardize(self, image: Any) -> Float[np.ndarray, "N H W C"]:
        """Returns other images as the network is trained on them, float32, such as those of the test set.

        Args:
          image: uint8 [N H W C] of the shape of the training images, or [N H W].

        Raises:
          UserError: `image` has another dtype or shape.
        """
        return np.asarray(standardize(check_images(image, self._pixels.image.shape[1:]), self.standardization))

    def _augment_of(self, epoch: int) -> Augment:
        """Returns the augmentation of an epoch, once it is checked."""
        image = self._pixels.image
        with user_code("`augment.at_epoch`"):
            augment = self._augment.at_epoch(epoch, self._num_epochs or epoch + 1)
        check("augment.at_epoch", "a method that returns an Augment", isinstance(augment, Augment), repr(augment))
        if augment != self._checked:
            height, width, channels = image.shape[1:]
            with user_code("`augment`"):
                augment.check_size((height, width))
                shape = (*augment.output_size((height, width)), channels)
            _check_num_classes(augment, self._pixels.label)
            check_augment(augment, self._pixels, self._batch_size, shape, self._key)
            self._checked = augment
        return augment


@jit(static_argnames=("augment",))
def _make(pixels: Pixels, plan: Plan, key: Key[Array, ""], *, augment: Augment) -> BatchLike:
    return make_batch(pixels, plan, augment, key)


def _integer(name: str, value: Any, low: int, end: int) -> int:
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    check(name, f"an integer from {low} to {end - 1}", is_integer and bool(low <= value < end), repr(value))
    return index(value)


def _own_label(count: int, path: Any, label: Any) -> Array:
    """Returns a copy of an array of labels [N ...] on the device."""
    name = f"label{jax.tree_util.keystr(path)}"
    check(name, "a NumPy or JAX array", isinstance(label, AnyArray), repr(label))
    masked = isinstance(label, np.ma.MaskedArray)
    check(name, "an array without a mask", not masked, "a masked one. Remove the examples that are masked")
    numeric = jnp.issubdtype(label.dtype, jnp.number) or label.dtype == bool
    check(name, "an array of numbers", numeric, describe_shapes(label))
    shape = label.shape
    check(name, f"[N ...], one for each of {count} images", shape[:1] == (count,), describe_shapes(label))
    if jnp.issubdtype(label.dtype, jnp.integer) and label.size:
        low, high = int(label.min()), int(label.max())
        check(name, "integers of 32 bits", low >= -(2**31) and high < 2**31, f"{low} to {high}")
        label = label.astype(np.int32)
    return jnp.array(label)


def _standardization(images: np.ndarray, given: tuple[Any, Any] | None) -> Standardization:
    if given is None:
        return pixel_statistics(images)
    rule, shape = "a pair (mean, std) of finite numbers [C], with std above 0", images.shape[-1:]
    pair = [np.asarray(x, np.float32) for x in given] if isinstance(given, (tuple, list)) else []
    fits = len(pair) == 2 and all(x.shape == shape and np.isfinite(x).all() for x in pair)
    check("standardization", rule, fits and bool((pair[1] > 0).all()), repr(given))
    return Standardization(*pair)


def _check_num_classes(augment: Augment, label: PyTree) -> None:
    """Checks that an augmentation that mixes labels knows their classes: others would have probability 0."""
    num_classes = getattr(augment, "num_classes", None)
    if num_classes is not None and isinstance(label, Array) and label.ndim == 1 and label.dtype == jnp.int32:
        least = int(label.max()) + 1
        check(
            "augment.num_classes", f"at least {least} for labels up to {least - 1}", num_classes >= least, num_classes
        )
