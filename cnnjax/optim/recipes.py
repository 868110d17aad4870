"""The built-in optimizers."""

import math
from dataclasses import dataclass

import jax
import optax
from jaxtyping import Array, PyTree

from cnnjax.errors import check
from cnnjax.optim.optimizer import Optimizer
from cnnjax.optim.transforms import keep_norm, orthogonalize


@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam; with decoupled weight decay of the kernels (AdamW) if `weight_decay` is set."""

    b1: float = 0.9
    """Decay rate of the first moment."""
    b2: float = 0.999
    """Decay rate of the second moment."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check("optim.b1", "at least 0 and below 1", 0 <= self.b1 < 1, self.b1)
        check("optim.b2", "at least 0 and below 1", 0 <= self.b2 < 1, self.b2)

    def transform(self, learning_rate: optax.Schedule) -> optax.GradientTransformation:
        """Returns Adam or AdamW."""
        if not self.weight_decay:
            return optax.adam(learning_rate, self.b1, self.b2)
        return optax.adamw(learning_rate, self.b1, self.b2, weight_decay=self.weight_decay, mask=_is_kernel)


@dataclass(frozen=True)
class SGD(Optimizer):
    """SGD with Nesterov momentum; weight decay of all parameters, within the momentum."""

    momentum: float = 0.85
    """Decay rate of the momentum."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check("optim.momentum", "at least 0 and below 1", 0 <= self.momentum < 1, self.momentum)

    def transform(self, learning_rate: optax.Schedule) -> optax.GradientTransformation:
        """Returns SGD."""
        return _sgd(learning_rate, self.momentum, self.weight_decay)


@dataclass(frozen=True)
class Muon(Optimizer):
    """Muon for convolution kernels, SGD for all other parameters; weight decay of the latter, within the momentum.

    Parameters of four dimensions are treated as kernels [I J C K], except [1 1 1 K]. Each keeps the norm sqrt(K).

    Source: Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024), and airbench94_muon.
    """

    momentum: float = 0.6
    """Decay rate of Muon's momentum."""
    sgd_momentum: float = 0.85
    """Decay rate of SGD's momentum."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("momentum", "sgd_momentum"):
            check(f"optim.{name}", "at least 0 and below 1", 0 <= getattr(self, name) < 1, getattr(self, name))

    def transform(self, learning_rate: optax.Schedule) -> optax.GradientTransformation:
        """Returns Muon and SGD, each for its parameters."""
        muon = optax.chain(
            optax.trace(self.momentum, nesterov=True),
            orthogonalize(),
            optax.scale_by_learning_rate(learning_rate),
            keep_norm(),
        )
        sgd = _sgd(learning_rate, self.sgd_momentum, self.weight_decay)
        return optax.partition({"muon": muon, "sgd": sgd}, _muon_labels)


def _muon_labels(params: PyTree) -> PyTree:
    def label(leaf: Array) -> str:
        return "muon" if leaf.ndim == 4 and math.prod(leaf.shape[:3]) > 1 else "sgd"  # Not for a scale [1 1 1 C].

    return jax.tree.map(label, params)


def _sgd(learning_rate: optax.Schedule, momentum: float, weight_decay: float) -> optax.GradientTransformation:
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.trace(momentum, nesterov=True),
        optax.scale_by_learning_rate(learning_rate),
    )


def _is_kernel(params: PyTree) -> PyTree:
    """Marks the leaves that decay: biases and scales are vectors."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)
