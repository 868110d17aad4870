"""The tensors of a PyTorch network, by name, as variables of a Linen module."""

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from cnnjax.errors import UserError
from cnnjax.network import init_variables

CONV, DENSE, VECTOR = (2, 3, 1, 0), (1, 0), (0,)  # [K C I J] -> [I J C K], [K N] -> [N K], [C]


class Place(NamedTuple):
    """Where a tensor belongs.

    Attributes:
      path: the names of the collection, the modules, and the variable.
      axes: the axes of the tensor, in the order of the variable.
    """

    path: tuple[str, ...]
    axes: tuple[int, ...]


Names = dict[str, Place]  # By the name of the tensor.


def conv_norm_names(path: tuple[str, ...], conv: str, norm: str) -> Names:
    """Returns the places of the tensors of a `ConvNorm`, given the names of PyTorch's convolution and norm."""
    return {
        f"{conv}.weight": Place(("params", *path, "kernel"), CONV),
        f"{norm}.weight": Place(("params", *path, "norm", "scale"), VECTOR),
        f"{norm}.bias": Place(("params", *path, "norm", "bias"), VECTOR),
        f"{norm}.running_mean": Place(("batch_stats", *path, "norm", "mean"), VECTOR),
        f"{norm}.running_var": Place(("batch_stats", *path, "norm", "var"), VECTOR),
    }


def head_names(path: tuple[str, ...], dense: str) -> Names:
    """Returns the places of the tensors of a dense layer, given the name of PyTorch's layer."""
    return {
        f"{dense}.weight": Place(("params", *path, "kernel"), DENSE),
        f"{dense}.bias": Place(("params", *path, "bias"), VECTOR),
    }


def variables_from_torch(model: nn.Module, tensors: dict[str, np.ndarray], names: Names) -> dict[str, Any]:
    """Returns the variables of a network that hold the tensors of a PyTorch network, as float32.

    Args:
      model: the network; the tensors may be of another number of classes and of any number of image channels.
      tensors: by name. `num_batches_tracked`, the counters of PyTorch's norms, are ignored.
      names: begin with the first convolution, and end with the bias of the logits.

    Raises:
      UserError: a tensor is missing, unexpected, or of another shape or kind.
    """
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
    what = f"`model.weights` must hold the tensors of {type(model).__name__}"
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{what}, got none named {_some(missing)}. The file has {_some(list(found))}.")
    if unexpected := [name for name in found if name not in names]:
        raise UserError(f"{what}, got more: {_some(unexpected)}.")
    for name, (_, axes) in names.items():
        if found[name].ndim != len(axes) or not jax.numpy.issubdtype(found[name].dtype, np.floating):
            got = f"{found[name].dtype}{list(found[name].shape)}"
            raise UserError(f"{what}, got {name} of {got} instead of {len(axes)} dimensions of floating-point numbers.")
    first, last = found[next(iter(names))], found[list(names)[-1]]
    own = model.clone(num_classes=last.shape[0])
    image = jax.ShapeDtypeStruct((1, 32, 32, first.shape[1]), np.float32)
    shapes: Any = flatten_dict(jax.eval_shape(partial(init_variables, model=own), jax.random.key(0), image))
    variables = {}
    for name, (path, axes) in names.items():
        expected = tuple(shapes[path].shape[axes.index(axis)] for axis in range(len(axes)))
        if found[name].shape != expected:
            raise UserError(f"{what}, got {name} of shape {list(found[name].shape)} instead of {list(expected)}.")
        variables[path] = np.ascontiguousarray(found[name].transpose(axes), np.float32)
    return unflatten_dict(variables)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "") if names else "no tensor"
