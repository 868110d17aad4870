"""The complete predictor of a run, bytes in and probabilities out, as one function and as StableHLO."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from jaxtyping import Array, Float, UInt8

from cnnjax.data.batches import standardize
from cnnjax.data.tta import mean_logits
from cnnjax.errors import UserError, describe
from cnnjax.layers.derivatives import plain_operations
from cnnjax.network import apply_in_evaluation, logits_of
from cnnjax.runs.run import Run
from cnnjax.state import eval_params
from cnnjax.typing import AnyArray

PLATFORMS = ("cpu", "cuda", "tpu")

PredictFn = Callable[[Any], Any]  # uint8 images [B H W C] -> float32 probabilities [B K]


def any_batch(run: Run) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of a batch of images, uint8 [b H W C], of any size b from 1 on."""
    return jax.ShapeDtypeStruct((*export.symbolic_shape("b"), *run.facts.image_shape), jnp.uint8)


def make_predictor(run: Run, tta: str) -> PredictFn:
    """Returns the network of a run as a function of images, with its arrays as constants.

    It accepts `any_batch`. A network that needs a batch of known size, for `len(image)`, is mapped over single images.

    Args:
      run: a run.
      tta: the test-time augmentation; not "uncertain", in which the images of a batch depend on each other.
    """
    model, standardization = run.config.model, run.facts.standardization
    params, model_state = eval_params(run.state), run.state.model_state

    def logits_fn(image: Float[AnyArray, "B H W C"]) -> Float[Array, "B K"]:
        return logits_of(apply_in_evaluation(model, params, model_state, image))

    def predict(image: UInt8[AnyArray, "B H W C"]) -> Float[Array, "B K"]:
        logits = mean_logits(logits_fn, standardize(image, standardization), tta)
        return jax.nn.softmax(logits.astype(jnp.float32))

    try:
        with plain_operations():
            jax.eval_shape(predict, any_batch(run))
    except Exception:  # The errors of `len`, of comparisons and of reshapes have no common class.
        return jax.vmap(lambda image: predict(image[None])[0])
    return predict


def to_stablehlo(
    predict: PredictFn, image: jax.ShapeDtypeStruct, platforms: tuple[str, ...] | None = PLATFORMS
) -> bytes:
    """Returns a predictor as StableHLO, which `jax.export.deserialize` reads.

    It contains only operations and calls of which JAX promises that later versions read them.

    Args:
      predict: of `make_predictor`.
      image: of `any_batch`.
      platforms: the platforms; None: that of this process.

    Raises:
      UserError: the network has others, or does not accept a batch of any size.
    """
    try:
        with plain_operations(), _without_paths():
            return bytes(export.export(jax.jit(predict), platforms=platforms)(image).serialize())
    except Exception as error:  # Raised by the network, or by JAX, which names the calls.
        raise UserError(
            f"`formats` must be without stablehlo for this network, which cannot be exported: {describe(error)}"
        ) from error


@contextmanager
def _without_paths() -> Iterator[None]:
    """Keeps the names of source files, which are paths of this machine, out of programs."""
    name = "jax_hlo_source_file_canonicalization_regex"
    before = jax.config.values[name]
    jax.config.update(name, ".*")
    try:
        yield
    finally:
        jax.config.update(name, before)


def read_stablehlo(content: bytes) -> PredictFn:
    """Returns the predictor in a file of `to_stablehlo`, compiled."""
    return jax.jit(export.deserialize(bytearray(content)).call)
