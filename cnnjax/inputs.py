"""The inputs that a configuration names: its data set, and the pretrained weights of its network."""

import os
from collections.abc import Callable
from typing import NamedTuple

from cnnjax.config import Config
from cnnjax.data.datasets import ImageDataset, load_dataset
from cnnjax.data.weights import load_weights, weights_of
from cnnjax.errors import check, user_code
from cnnjax.memory import explain_out_of_memory
from cnnjax.pretrained import Weights


class Inputs(NamedTuple):
    """The inputs of a run, which many seeds share."""

    dataset: ImageDataset
    weights: Weights | None


@explain_out_of_memory()
def load_inputs(
    config: Config,
    data_dir: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] = print,
    *,
    version: str | None = None,
    stream: bool | None = None,
) -> Inputs:
    """Loads the weights that the network names, and the data set with the size and interpolation that they expect.

    Args:
      version: the version of the set to use if it is prepared; the newest one otherwise.
      say, stream: see `load_dataset`.
    """
    check("stream", "True, False or None", stream is None or isinstance(stream, bool), repr(stream))
    weights = None
    if weights_of(config.model) is not None:
        with user_code("`model.weights`"):
            weights = load_weights(config.model, say)
    options = config.data_options()
    if weights is not None:
        expected = weights.preprocessing
        options |= {"default_size": expected.image_size, "interpolation": expected.interpolation}
    return Inputs(load_dataset(config.dataset, data_dir, say, version=version, stream=stream, **options), weights)
