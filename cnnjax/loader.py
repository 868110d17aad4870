"""Training batches for a loop of one's own."""

from collections.abc import Iterator
from functools import partial
from operator import index
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from cnnjax.checks import check_augment
from cnnjax.compiler import jit
from cnnjax.config import BALANCING, check_hashable, check_part
from cnnjax.data.arrays import MAX_CLASSES, check_images, check_plain, own_images
from cnnjax.data.augment import Augment, CutMix, Mixup, augment_of_epoch
from cnnjax.data.batches import Pixels, Standardization, make_batch, pixel_statistics, standardize
from cnnjax.data.order import Plan, epoch_plan, steps_per_epoch
from cnnjax.data.photo_augment import PhotoAugment
from cnnjax.errors import check, check_name, describe_shapes, user_code
from cnnjax.typing import BatchLike


class DataLoader:
    """Makes shuffled, augmented and standardized batches for `train_step`, as a run does, from images in memory.

    An epoch is a function of the arguments and its number alone, so a loop can resume at any epoch. The images are kept
    on one device, jax's default device, as bytes.

    Example:
      >>> data = load_dataset("cifar10")
      >>> loader = DataLoader(*data.load("train"), batch_size=128, seed=0, augment=Augment(flip="random"))
      >>> tx = optax.adam(optax.cosine_decay_schedule(1e-3, 10 * loader.steps_per_epoch))
      >>> for epoch in range(10):
      ...     for batch in loader.epoch(epoch):
      ...         state, metrics = train_step(state, batch, train_key, model=model, tx=tx)
      >>> test = data.load("test")
      >>> evaluate(state, loader.standardize(test.image), test.label, model=model)

    A run trains on these batches if it has the same seed, batch size, augmentation, sampling, number of epochs,
    standardization and training examples, which are `data.load_parts(seed, validation_fraction)[0]`. It splits
    `jax.random.key(seed)` into three keys: for `init_state`, for `train_step`, and for the augmentation. The loader
    uses the third; do not use it again.

    Args:
      image: uint8 [N H W C] or [N H W]. Copied, unless it is a mapped file, which must not change.
      label: integers [N], which become int32; or a pytree of arrays [N ...], such as several labels or the logits of a
        teacher, for a loss of your own. Values are not checked, such as -1 for an image without a label. Augmentations
        do not move labels with the images; those that mix images need classes [N].
      batch_size: the number of examples per batch. The last batch of an epoch is padded with the first examples of the
        epoch, which are masked.
      seed: from 0 to 2**32 - 1.
      augment: no augmentation if None. If it mixes labels, set its `num_classes`: only a run does that itself.
      num_epochs: the number of epochs of the loop, for an augmentation that depends on it.
      sampling: see `Config`; "balanced" needs integers [N].
      standardization: mean and standard deviation of each channel [C], in pixel units (0 to 255), such as
        `load_weights(model).standardization`; None: those of `image`.

    Attributes:
      standardization: mean and standard deviation of each channel, float32 [C], in pixel units (0 to 255).
      steps_per_epoch: the number of batches of an epoch.

    Raises:
      UserError: an argument is wrong, or the augmentation does not fit the images or the labels.
    """

    def __init__(
        self,
        image: Any,
        label: PyTree,
        *,
        batch_size: int,
        seed: int,
        augment: Augment | None = None,
        num_epochs: int | None = None,
        sampling: str = "none",
        standardization: tuple[Any, Any] | None = None,
    ):
        augment = Augment() if augment is None else augment
        check_part("augment", augment, Augment, "Augment(), PhotoAugment(), Mixup() or CutMix()")
        check_hashable("augment", augment)
        images = own_images("image", image)
        labels = jax.tree_util.tree_map_with_path(partial(_copy_label, len(images)), label)
        check("label", "an array, or a pytree of arrays", bool(jax.tree.leaves(labels)), repr(label))
        is_class = isinstance(labels, np.ndarray) and labels.ndim == 1 and labels.dtype == np.int32
        self._classes = labels if is_class else None
        check_name("sampling", sampling, BALANCING)
        rule = "none if `label` is not integers [N]"
        check("sampling", rule, sampling == "none" or is_class, sampling)
        self._batch_size = _integer("batch_size", batch_size)
        self._seed = _integer("seed", seed, 0, 2**32)
        self._num_epochs = None if num_epochs is None else _integer("num_epochs", num_epochs, 1, 2**31)
        rule = f"the number of epochs for {type(augment).__name__}, which depends on it"
        check("num_epochs", rule, num_epochs is not None or not augment.depends_on_length(), num_epochs)
        self.steps_per_epoch = steps_per_epoch(len(images), self._batch_size)
        self.standardization = _standardization(images, standardization)
        self._augment = augment
        self._balanced_label = self._classes if sampling == "balanced" else None
        self._device = next(iter(jnp.zeros(()).devices()))
        own = Standardization(*map(np.array, self.standardization))  # The caller may change the public one.
        # On this device, but not bound to it: batches go where the state is.
        with jax.default_device(self._device):
            self._pixels = jax.device_put(Pixels(images, labels, own))
            self._key = jax.random.split(jax.random.key(self._seed), 3)[2]
        self._checked: set[Augment] = set()
        changes = type(augment).at_epoch is not Augment.at_epoch
        for epoch in range((self._num_epochs or 1) if changes else 1):
            self._augment_of(epoch)

    def epoch(self, epoch: int) -> Iterator[BatchLike]:
        """Returns an iterator over the batches of an epoch (from 0): standardized images, float32 [B H W C].

        Raises:
          UserError: `epoch` is not below `num_epochs`, or its augmentation is wrong.
        """
        epoch = _integer("epoch", epoch, 0, self._num_epochs or 2**31)
        augment = self._augment_of(epoch)
        count, height, width, _ = self._pixels.image.shape
        plan = epoch_plan(
            self._seed,
            epoch,
            count,
            batch_size=self._batch_size,
            augment=augment,
            image_size=augment.output_size((height, width)),
            balanced_label=self._balanced_label,
        )

        def make(step: int) -> BatchLike:
            with jax.default_device(self._device):
                key = jax.random.fold_in(self._key, jax.device_put(np.uint32(epoch)))
                return _make_batch(self._pixels, jax.device_put(plan.row(step)), key, augment=augment)

        return map(make, range(self.steps_per_epoch))

    def standardize(self, image: Any) -> Float[np.ndarray, "N H W C"]:
        """Returns images, such as those of the test set, standardized as those of the training, float32.

        Args:
          image: uint8 [N H W C] of the shape of the training images, or [N H W].

        Raises:
          UserError: `image` has another dtype or shape.
        """
        image = check_images("image", image, self._pixels.image.shape[1:])
        return np.asarray(standardize(image, self.standardization))

    def _augment_of(self, epoch: int) -> Augment:
        """Returns the augmentation of an epoch, once it is checked."""
        with user_code("`augment.at_epoch`"):
            augment = augment_of_epoch(self._augment, epoch, self._num_epochs or epoch + 1)
        check_hashable("augment.at_epoch", augment)
        if augment not in self._checked:
            height, width, channels = self._pixels.image.shape[1:]
            with user_code("`augment`"):
                augment.check_size((height, width))
                shape = (*augment.output_size((height, width)), channels)
            check_augment(augment, self._pixels, self._batch_size, shape, self._key)
            if self._classes is not None:
                _check_mixed(augment, self._classes)
            self._checked.add(augment)
        return augment


@jit(static_argnames=("augment",))
def _make_batch(pixels: Pixels, plan: Plan, key: Key[Array, ""], *, augment: Augment) -> BatchLike:
    return make_batch(pixels, plan, augment, key)


def _integer(name: str, value: Any, low: int | None = None, below: int = 0) -> int:
    """Returns an integer; if `low` is not None, from `low` to `below` - 1."""
    try:
        number = None if isinstance(value, (bool, np.bool_)) else index(value)
    except TypeError:
        number = None
    rule = "an integer" + ("" if low is None else f" from {low} to {below - 1}")
    valid = number is not None and (low is None or low <= number < below)
    check(name, rule, valid, repr(value))
    return int(value)


def _copy_label(count: int, path: Any, label: Any) -> np.ndarray:
    """Returns a copy of an array of labels [N ...]."""
    name = f"label{jax.tree_util.keystr(path)}"
    check_plain(name, label)
    fix = f". Number the classes: names, {name} = np.unique({name}, return_inverse=True)"
    numeric = jnp.issubdtype(label.dtype, jnp.number) or label.dtype == bool
    check(name, "numbers or bools", numeric, f"{label.dtype}{fix if label.dtype.kind in 'USO' else ''}")
    rule = f"[N ...] with N = {count}, the number of images"
    check(name, rule, label.shape[:1] == (count,), describe_shapes(label))
    label = np.array(label)
    if not jnp.issubdtype(label.dtype, jnp.integer):
        return label
    if label.size:
        low, high = int(label.min()), int(label.max())
        check(name, "between -2**31 and 2**31 - 1", low >= -(2**31) and high < 2**31, f"{low} to {high}")
    return label.astype(np.int32)


def _standardization(images: np.ndarray, given: tuple[Any, Any] | None) -> Standardization:
    if given is None:
        return pixel_statistics(images)
    try:
        pair = [np.array(x, np.float32) for x in given]
    except (TypeError, ValueError):
        pair = []
    rule = f"a pair (mean, std) of arrays [{images.shape[-1]}] from 0 to 255, with std above 0"
    fits = len(pair) == 2 and all(x.shape == images.shape[-1:] and (x >= 0).all() and (x <= 255).all() for x in pair)
    check("standardization", rule, fits and bool((pair[1] > 0).all()), repr(given))
    if max(x.max() for x in pair) <= 1 and not (pair[0].max() == 0 and pair[1].min() == 1):
        fits = pixel_statistics(images).std.max() < 8 * pair[1].max()
        check("standardization", "in pixel units (0 to 255)", bool(fits), f"{given!r}. Multiply it by 255")
    return Standardization(*pair)


def _check_mixed(augment: Augment, label: Int[np.ndarray, " N"]) -> None:
    """Checks the classes that one of our augmentations mixes: the probabilities of others would be zero."""
    mixes = isinstance(augment, (Mixup, CutMix))
    if isinstance(augment, PhotoAugment):
        mixes = augment.mixup > 0 or augment.cutmix > 0
    if mixes:
        ours: Any = augment
        low, high, num_classes = int(label.min()), int(label.max()), ours.num_classes
        rule = f"from 0 to {num_classes - 1}, as `augment.num_classes` is {num_classes}"
        fix = f"Set it to {high + 1}" if low >= 0 and high < MAX_CLASSES else "Number the classes from 0"
        check("label", rule, low >= 0 and high < num_classes, f"{low} to {high}. {fix}")
