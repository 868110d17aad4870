"""Pretrained weights in place of the initial variables of a network."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from cnnjax.data.batches import Standardization
from cnnjax.errors import UserError, option
from cnnjax.typing import Preprocessing

VariablePath = tuple[str, ...]  # The keys that lead to an array in the variables.


class Weights(NamedTuple):
    """The content of a file of weights.

    Attributes:
      tensors: by PyTorch's names, in PyTorch's layouts.
      source: in words.
      license: in words.
      sha256: of the file.
      preprocessing: what the weights expect of images.
    """

    tensors: dict[str, np.ndarray]
    source: str
    license: str
    sha256: str
    preprocessing: Preprocessing

    @property
    def standardization(self) -> Standardization:
        """The mean and the standard deviation of the preprocessing."""
        mean, std = self.preprocessing.mean, self.preprocessing.std
        return Standardization(np.array(mean, np.float32), np.array(std, np.float32))


def insert_weights(variables: dict[str, Any], loaded: dict[VariablePath, Array]) -> dict[str, Any]:
    """Returns the initial variables of a network with those of `replacements` in their place."""
    own: Any = flatten_dict(variables)
    return unflatten_dict({**own, **loaded})


def replacements(variables: dict[str, Any], loaded: Weights, model: Any) -> dict[VariablePath, Array]:
    """Returns the loaded weights by their paths in the variables of a network.

    The head, the last of `model.depths()`, is left out if the weights have another number of classes.

    Args:
      variables: arrays or their shapes.

    Raises:
      UserError: another array has another shape than the network's.
    """
    own: Any = flatten_dict(variables)
    new: Any = flatten_dict(model.variables_from_torch(loaded.tensors))
    first, head = model.depths()[0], model.depths()[-1]
    wrong = [path for path in new if path not in own or new[path].shape != own[path].shape]
    for path in wrong:
        if path[1] == head and path in own:
            continue
        expected = list(own[path].shape) if path in own else "nothing"
        fix = ""
        if path[1] == first and path in own and new[path].ndim == 4:
            channels = new[path].shape[2], own[path].shape[2]
            fix = f" They are for images with {channels[0]} channels, not {channels[1]}."
            fix += f" Choose {option('channels', '3')}." if channels[0] == 3 else ""
        got = f"{'/'.join(path[1:])} of shape {list(new[path].shape)} instead of {expected}"
        raise UserError(f"`model.weights` must have the shapes of the network, got {got}.{fix}")
    return {path: jnp.asarray(leaf) for path, leaf in new.items() if not (wrong and path[1] == head)}
