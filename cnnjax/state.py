"""The state of training: its initialization from a key, data or weights, and the parameters to evaluate."""

from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Float, Int, Key, PyTree

from cnnjax.compiler import jit
from cnnjax.errors import ArgumentError
from cnnjax.network import Network, check_network, init_variables
from cnnjax.optim.transforms import AverageState
from cnnjax.pretrained import VariablePath, Weights, insert_weights, replacements
from cnnjax.typing import AnyArray


class TrainState(NamedTuple):
    """Everything that training changes, as arrays.

    Attributes:
      step: number of updates, int32.
      params: trainable parameters.
      model_state: every other collection of the network by name, such as {"batch_stats": ...}.
      opt_state: state of the optimizer.
    """

    step: Int[Array, ""]
    params: PyTree
    model_state: dict[str, PyTree]
    opt_state: Any


def init_state(
    key: Key[Array, ""], image: Float[AnyArray, "B H W C"], *, model: Network, tx: optax.GradientTransformation
) -> TrainState:
    """Returns the initial state of `model` and `tx`.

    Args:
      key: consumed; draws the initial parameters.
      image: images of the shape to train on; their values do not matter.
      model: a Linen module, called as `model(image)` or `model(image, train=bool)`; or `Functions`.
      tx: an optax optimizer.

    Raises:
      ValueError: `model` is not a network, is not hashable, or has no parameters.
    """
    check_network(model)
    check_tx(tx)
    return _init_state(key, image, model=model, tx=tx)


@jit(static_argnames=("model", "tx"), runs_once=True)
def _init_state(
    key: Key[Array, ""], image: Float[AnyArray, "B H W C"], *, model: Network, tx: optax.GradientTransformation
) -> TrainState:
    variables = init_variables(key, image, model=model)
    params = variables.pop("params")
    return TrainState(jnp.zeros((), jnp.int32), params, variables, init_optimizer(tx, params))


def init_from_data(
    state: TrainState, image: Float[AnyArray, "N H W C"], *, model: Network, tx: optax.GradientTransformation
) -> TrainState:
    """Initializes a network from data, by its method `init_from_data(variables, image) -> variables`.

    Arrays that it returns are copied, except for those of `state`.

    Args:
      image: standardized training images.
    """
    if not hasattr(model, "init_from_data"):
        raise ArgumentError(f"`model` must have a method init_from_data, got {type(model).__name__} without it.")
    before = jax.tree.leaves(state.params)
    network: Any = model
    variables = {**network.init_from_data({"params": state.params, **state.model_state}, image)}
    unchanged = [*map(id, before)] == [*map(id, jax.tree.leaves(variables["params"]))]
    unused = {*map(id, before), *map(id, jax.tree.leaves(state.model_state))}

    def own(x: Any) -> Any:
        """Returns an array of the state at its first use, else a copy: a step donates each array."""
        if id(x) in unused:
            unused.remove(id(x))
            return x
        return jnp.copy(x) if isinstance(x, jax.Array) else x

    variables = jax.tree.map(own, variables)
    params = variables.pop("params")
    opt_state = state.opt_state if unchanged else init_optimizer(tx, params)
    return TrainState(state.step, params, variables, opt_state)


def init_from_weights(
    state: TrainState, weights: Weights, *, model: Network, tx: optax.GradientTransformation
) -> TrainState:
    """Initializes a network from pretrained weights, except for a head with another number of classes.

    Example:
      >>> model = EfficientNetLite0(num_classes=3, weights="imagenet")
      >>> weights = load_weights(model)
      >>> state = init_from_weights(init_state(key, image, model=model, tx=tx), weights, model=model, tx=tx)
      >>> mean, std = weights.standardization
      >>> batch = Batch((image - mean) / std, label, mask)  # image: pixels from 0 to 255, not divided by 255

    Args:
      weights: of `load_weights`.
      model: a network with the methods `variables_from_torch` and `depths`, see `EfficientNetLite0`.

    Raises:
      UserError: an array has another shape than the network's.
    """
    return replace_variables(state, replacements({"params": state.params, **state.model_state}, weights, model), tx=tx)


def replace_variables(
    state: TrainState, loaded: dict[VariablePath, Array], *, tx: optax.GradientTransformation
) -> TrainState:
    """Returns a state with other variables at some paths, and a new optimizer state."""
    variables = insert_weights({"params": state.params, **state.model_state}, loaded)
    params = variables.pop("params")
    return TrainState(state.step, params, variables, init_optimizer(tx, params))


def abstract_state(image_shape: tuple[int, ...], *, model: Network, tx: optax.GradientTransformation) -> TrainState:
    """Returns the shapes and dtypes of a state, initialized from data if the network is, without computing anything.

    Args:
      image_shape: (H, W, C).
    """
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    state = jax.eval_shape(partial(init_state, model=model, tx=tx), jax.random.key(0), image)
    if hasattr(model, "init_from_data"):
        with suppress(jax.errors.JAXTypeError):  # It needs values, so that shapes stay as they are.
            return jax.eval_shape(partial(init_from_data, model=model, tx=tx), state, image)
    return state


@jit
def copy_state(state: TrainState) -> TrainState:
    """Returns a copy that stays valid after `state` is donated."""
    return jax.tree.map(jnp.copy, state)


def strong_type(x: Any) -> Array:
    """Returns an array as a checkpoint restores it: a weak type would promote others in another way."""
    x = jnp.asarray(x)
    return x.astype(x.dtype) if x.weak_type else x


def init_optimizer(tx: optax.GradientTransformation, params: PyTree) -> Any:
    """Returns the initial state of an optimizer.

    Its arrays are distinct from each other and from the parameters, because a step donates each of them. It has no weak
    types: a step changes them, and the next one retraces.
    """
    seen = {*map(id, jax.tree.leaves(params))}

    def own(x: Any) -> Any:
        y = jnp.copy(x) if isinstance(x, jax.Array) and id(x) in seen else x
        seen.add(id(x))
        return y.astype(y.dtype) if getattr(y, "weak_type", False) else y

    return jax.tree.map(own, tx.init(params))


def eval_params(state: TrainState) -> PyTree:
    """Returns the parameters to evaluate: those of a moving average or a schedule-free optimizer, else `state.params`.

    Batch statistics remain those of the training parameters.

    Source: Defazio et al., "The Road Less Scheduled" (2024), as in `optax.contrib.schedule_free_eval_params`.
    """

    def is_average(x: Any) -> bool:
        return isinstance(x, AverageState)

    for found in filter(is_average, jax.tree.leaves(state.opt_state, is_leaf=is_average)):
        return found.params

    def is_schedule_free(x: Any) -> bool:
        return isinstance(x, optax.contrib.ScheduleFreeState)

    params = state.params
    for found in filter(is_schedule_free, jax.tree.leaves(state.opt_state, is_leaf=is_schedule_free)):

        def average(z: Any, p: PyTree, found: Any = found) -> PyTree:
            if isinstance(z, optax.MaskedNode):  # In place of parameters of another optimizer.
                return p
            return optax.contrib.schedule_free_eval_params(found._replace(z=z), p)

        params = jax.tree.map(average, found.z, params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    return params


def check_tx(tx: Any) -> None:
    """Raises a `ValueError` unless `tx` is an optax optimizer."""
    if not hasattr(tx, "update"):
        raise ArgumentError(
            f"`tx` must be an optax optimizer, got {type(tx).__name__}. Make one of a cnnjax `Optimizer` by "
            "`make_tx(num_steps)`."
        )
