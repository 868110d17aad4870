"""cnnjax: the functional JAX/Flax way to train image classifiers. The README lists the public interface."""

from typing import TYPE_CHECKING, Any

from cnnjax.cli.process import keep_memory, set_flags

if TYPE_CHECKING:
    from cnnjax.cli.main import run_experiment
    from cnnjax.cli.signals import Interrupted
    from cnnjax.config import AugmentConfig, Config, ModelConfig, OptimConfig
    from cnnjax.data.datasets import load_dataset
    from cnnjax.errors import NonFiniteLossError, UserError
    from cnnjax.models.models import CNN, MLP, SpeedNet
    from cnnjax.models.whitening import whiten
    from cnnjax.step import Batch, Metrics, TrainState, eval_step, init_state, softmax_cross_entropy, train_step
    from cnnjax.train import train_and_evaluate

# Where each public name lives. They are imported when first used, so that `cnnjax --help` does not wait for jax.
_HOME = {
    "run_experiment": "cli.main",
    **dict.fromkeys(("AugmentConfig", "Config", "ModelConfig", "OptimConfig"), "config"),
    "load_dataset": "data.datasets",
    **dict.fromkeys(("NonFiniteLossError", "UserError"), "errors"),
    "train_and_evaluate": "train",
    **dict.fromkeys(("CNN", "MLP", "SpeedNet"), "models.models"),
    "Interrupted": "cli.signals",
    **dict.fromkeys(
        ("Batch", "Metrics", "TrainState", "eval_step", "init_state", "softmax_cross_entropy", "train_step"), "step"
    ),
    "whiten": "models.whitening",
}
__all__ = [
    "CNN",
    "MLP",
    "AugmentConfig",
    "Batch",
    "Config",
    "Interrupted",
    "Metrics",
    "ModelConfig",
    "NonFiniteLossError",
    "OptimConfig",
    "SpeedNet",
    "TrainState",
    "UserError",
    "eval_step",
    "init_state",
    "load_dataset",
    "run_experiment",
    "softmax_cross_entropy",
    "train_and_evaluate",
    "train_step",
    "whiten",
]

set_flags()
keep_memory()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cnnjax' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"cnnjax.{_HOME[name]}"), name)
