"""How the steps call a network: a Flax Linen module, or two pure functions of any library."""

import inspect
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import InvalidRngError
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, Key, PyTree

from cnnjax.errors import ArgumentError, describe_shapes
from cnnjax.typing import AnyArray

OUTPUTS = ("losses", "intermediates")  # Collections that a forward pass writes for its caller.


@runtime_checkable
class Network(Protocol):
    """A Linen module; or any other hashable object with two pure functions, in a frozen dataclass for example.

    A Linen module is called as `model(image)` or `model(image, train=bool)`.

    All of its other attributes are optional.

    Attributes:
      num_classes: a dataclass field, set from the data, see `Config.with_num_classes`.
      image_size: the size to which a folder of images is resized by default, see `Config.image_size`.
      init_from_data: `(variables, image) -> variables`, called with training images, see `step.init_from_data`.
      depths: `() -> names` of the top-level parameters from input to head, for `Optimizer.depth_decay` and
        `freeze_epochs`.
      variables_from_torch: `(tensors) -> variables`, for pretrained weights; see `load_weights`, which lists what else
        these need.
    """

    def init(self, *args: Any, **kwargs: Any) -> Any:
        """`init(key, image) -> variables`.

        A dict with "params", a pytree of the arrays to train, and an entry for each other pytree of arrays that
        training changes, such as "batch_stats".
        """

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """`apply(variables, image, key, train) -> (logits, changed)`.

        `key` is a PRNG key, None in evaluation. `changed` holds the new values of entries other than "params".
        """


@dataclass(frozen=True)
class Functions:
    """A `Network` of two functions: for Flax NNX, Equinox, or no library at all.

    The steps are compiled once for equal functions, so define them once.
    """

    init: Callable[..., Any]
    apply: Callable[..., Any]


class Passed(NamedTuple):
    """The result of a forward pass in training.

    Attributes:
      output: the logits, or a tuple that begins with them.
      model_state: the collections after the pass.
      extra_loss: the sum of what the network has sown into "losses", or None.
    """

    output: Any
    model_state: dict[str, PyTree]
    extra_loss: Float[Array, ""] | None = None


def check_network(model: Any) -> None:
    """Checks that `model` is a `Network`.

    Raises:
      ValueError: it is not.
    """
    if isinstance(model, type) or not isinstance(model, Network):
        got = f"the class {model.__name__}" if isinstance(model, type) else f"an object of {type(model).__name__}"
        raise ArgumentError(
            f"`model` must be a Linen module, or an object with functions init and apply, got {got}. Create an "
            "instance of a class; for Flax NNX, Equinox and other libraries, write the functions (`cnnjax.Functions`)."
        )


def init_variables(key: Key[Array, ""], image: AnyArray, *, model: Network) -> dict[str, PyTree]:
    """Returns the initial variables of a network: "params", and its other collections.

    Args:
      key: the stream "params", of which Flax derives any other stream that `init` requests.

    Raises:
      ValueError: `init` does not return what `Network` describes.
    """
    if isinstance(model, nn.Module):
        variables: Any = model.init(key, image, **mode_of(model, train=False))
        rule = "`model` must have parameters to train"
    else:
        variables = model.init(key, image)
        rule = '`model.init` must return a dict with "params"'
    if not isinstance(variables, dict) or not jax.tree.leaves(variables.get("params")):
        got = sorted(variables) if isinstance(variables, dict) else type(variables).__name__
        raise ArgumentError(f"{rule}, got {got} from {_name(model)}.")
    variables = {name: value for name, value in variables.items() if name not in OUTPUTS}
    for path, leaf in jax.tree.leaves_with_path(variables):
        trained = path[0] == jax.tree_util.DictKey("params")
        if not hasattr(leaf, "dtype") or (trained and not jnp.issubdtype(leaf.dtype, jnp.inexact)):
            raise ArgumentError(
                f'`init` of {_name(model)} must return arrays, in "params" of floating-point numbers, got '
                f"{describe_shapes(leaf)} at {jax.tree_util.keystr(path)}. Return other arrays in another entry, and "
                "keep anything that is not an array in the network."
            )
    return variables


def apply_in_training(
    model: Network, params: PyTree, model_state: dict[str, PyTree], image: AnyArray, key: Key[Array, ""]
) -> Passed:
    """Applies a network in training: every collection is mutable, and every stream that it requests has its own key.

    Args:
      key: the stream "dropout"; the name of any other stream is folded into it.

    Raises:
      ValueError: a sown loss is not a scalar, or `apply` does not return what `Network` describes.
    """
    if not isinstance(model, nn.Module):
        output, changed = _apply(model, {"params": params, **model_state}, image, key)
        return Passed(output, {**model_state, **changed})
    written = {name: value for name, value in model_state.items() if name in OUTPUTS}  # Not to be added to.
    before = {name: value for name, value in model_state.items() if name not in OUTPUTS}
    variables = {"params": params, **before}
    options, mutable = mode_of(model, train=True), [*before, "losses"]
    streams = {"dropout": key}
    while True:
        try:
            output, mutated = model.apply(variables, image, **options, rngs=streams, mutable=mutable)
            break
        except InvalidRngError as error:  # Only Flax knows which streams a network requests.
            name = re.search(r'needs PRNG for "(.+)"', str(error))
            if name is None or name[1] in streams:
                raise
            streams[name[1]] = jax.random.fold_in(key, zlib.crc32(name[1].encode()))
    losses = []
    for path, loss in jax.tree.leaves_with_path(mutated.get("losses", {})):
        if jnp.shape(loss) != ():
            raise ArgumentError(
                f'`model` must sow scalars into "losses", which are added to the mean loss, got the shape '
                f"{jnp.shape(loss)} from {jax.tree_util.keystr(path)}. Sow the sum (from `nn.scan`, return the loss "
                "and sow the sum outside)."
            )
        losses.append(jnp.asarray(loss, jnp.float32))
    extra_loss = jnp.sum(jnp.stack(losses)) if losses else None
    after = {name: _like(name, mutated.get(name, value), value) for name, value in before.items()}
    return Passed(output, {**after, **written}, extra_loss)


def _like(name: str, after: PyTree, before: PyTree) -> PyTree:
    """Returns a collection in the dtypes that it had: with float64 enabled, Flax's statistics become wider."""
    if jax.tree.structure(after) != jax.tree.structure(before):
        raise ArgumentError(
            f"`model` must keep the structure of its collection {name!r}, {describe_shapes(before)}, got "
            f"{describe_shapes(after)}. To sow into it, pass `reduce_fn=lambda _, new: new` and an `init_fn`."
        )

    def narrow(new: Array, old: Array) -> Array:
        wider = new.dtype != old.dtype and jnp.promote_types(old.dtype, new.dtype) == new.dtype
        return new.astype(old.dtype) if wider else new

    return jax.tree.map(narrow, after, before)


def apply_in_evaluation(model: Network, params: PyTree, model_state: dict[str, PyTree], image: AnyArray) -> Any:
    """Returns the output of a network in evaluation, where no collection is mutable."""
    variables = {"params": params, **model_state}
    if not isinstance(model, nn.Module):
        return _apply(model, variables, image, None)[0]
    try:
        return model.apply(variables, image, **mode_of(model, train=False))
    except InvalidRngError as error:
        raise ArgumentError(
            f"`model` must draw no random numbers in evaluation, got {' '.join(str(error).split())} Draw them if the "
            "argument `train` is true."
        ) from error


def layers_of(model: nn.Module, params: PyTree, model_state: dict[str, PyTree], image: AnyArray) -> dict[str, Array]:
    """Returns the outputs of the submodules of a Linen module in evaluation, and the values that it sows, by name."""
    _, written = model.apply(
        {"params": params, **model_state},
        image,
        **mode_of(model, train=False),
        capture_intermediates=True,
        mutable=["intermediates"],
    )
    found = {}
    for path, values in flatten_dict(written["intermediates"]).items():
        one = values[0] if isinstance(values, tuple) and len(values) == 1 else values
        if path != ("__call__",) and getattr(one, "shape", ())[:1] == image.shape[:1]:
            found["/".join(path).removesuffix("/__call__")] = one
    return found


def logits_of(output: Any) -> Any:
    """Returns the logits: the output of a network, or its first item."""
    return output[0] if isinstance(output, tuple) else output


def mode_of(model: nn.Module, *, train: bool) -> dict[str, Any]:
    """Returns the argument `train`, if the module accepts it."""
    called: Any = model
    while isinstance(called, nn.Sequential):  # It passes the arguments on to its first layer.
        for layer in called.layers[1:]:
            if isinstance(layer, nn.Module) and "train" in inspect.signature(layer.__call__).parameters:
                raise ArgumentError(
                    "`model` must have the argument 'train' in the first layer of an `nn.Sequential`, which passes it "
                    f"to no other, got it in {_name(layer)}. Write a module that calls the layers."
                )
        called = called.layers[0]
    parameters = inspect.signature(called.__call__ if isinstance(called, nn.Module) else called).parameters.values()
    if any(p.name == "train" or p.kind is p.VAR_KEYWORD for p in parameters):
        return {"train": train}
    if others := {"training", "is_training", "deterministic"} & {p.name for p in parameters}:
        raise ArgumentError(
            f"`model` must be called as model(image) or model(image, train=bool), got the argument {min(others)!r} of "
            f"{_name(model)}. Rename it."
        )
    return {}


def _apply(
    model: Network, variables: dict[str, PyTree], image: AnyArray, key: Key[Array, ""] | None
) -> tuple[Any, dict[str, PyTree]]:
    fresh = jax.tree.map(lambda leaf: leaf, variables)  # An `equinox.nn.State` can be used only once.
    result = model.apply(fresh, image, key, key is not None)
    name, entries = f"`apply` of {_name(model)}", {name: part for name, part in variables.items() if name != "params"}
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
        raise ArgumentError(f"{name} must return (logits, dict of changed entries), got {describe_shapes(result)}.")
    if unknown := result[1].keys() - entries.keys():
        got = sorted(unknown)
        raise ArgumentError(f"{name} must return changed entries of those of `init` ({sorted(entries)}), got {got}.")
    for entry, value in result[1].items():
        if _signature(value) != _signature(entries[entry]):
            raise ArgumentError(
                f"{name} must keep the structure, shapes and dtypes of {entry!r}, {describe_shapes(entries[entry])}, "
                f"got {describe_shapes(value)}."
            )
    return result


def _signature(tree: PyTree) -> tuple[Any, ...]:
    return jax.tree.structure(tree), *((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(tree))


def _name(model: Network) -> str:
    init = getattr(model, "init", None)
    return getattr(init, "__name__", type(init).__name__) if isinstance(model, Functions) else type(model).__name__
