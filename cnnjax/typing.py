"""The types that pass between data, models, losses and steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

AnyArray = Array | np.ndarray


class Batch(NamedTuple):
    """Images and labels; padding is masked.

    Padding affects neither loss, gradient nor metrics of a network that treats images independently. Batch statistics
    do include it: pad training batches with real images.

    Attributes:
      image: standardized images.
      label: class indices; or class probabilities, as Mixup makes them.
      mask: whether an example counts.
    """

    image: Float[AnyArray, "B H W C"]
    label: Int[AnyArray, " B"] | Float[AnyArray, "B K"]
    mask: Bool[AnyArray, " B"]


# (logits [B K], label) -> loss [B]
LossFn = Callable[[Float[Array, "B K"], Any], Float[Array, " B"]]
