"""cnnjax: the functional JAX/Flax way to train image classifiers. The README lists the public interface."""

from etils import epy as _epy

from cnnjax.cli.process import keep_memory as _keep_memory
from cnnjax.cli.process import set_flags as _set_flags

# The only side effects of the import, for speed and correctness on a CPU: XLA reads its flags, and glibc its options,
# before jax computes anything.
_set_flags()
_keep_memory()

with _epy.lazy_api_imports(globals()):  # `cnnjax --help` does not wait for jax.
    from cnnjax.cli.main import run_experiment
    from cnnjax.cli.signals import Interrupted
    from cnnjax.config import Config
    from cnnjax.data.augment import Augment, CutMix, Mixup
    from cnnjax.data.datasets import load_dataset
    from cnnjax.errors import NonFiniteLossError, UserError
    from cnnjax.losses import CrossEntropy, softmax_cross_entropy
    from cnnjax.models.cnn import CNN
    from cnnjax.models.mlp import MLP
    from cnnjax.models.speednet import SpeedNet
    from cnnjax.optim.optimizer import Optimizer, ParamGroup
    from cnnjax.optim.recipes import SGD, Adam, Muon
    from cnnjax.runs.trained import load_trained
    from cnnjax.step import Metrics, TrainState, eval_step, init_from_data, init_state, train_step
    from cnnjax.train import train_and_evaluate
    from cnnjax.typing import Batch

__all__ = [
    "CNN",
    "MLP",
    "SGD",
    "Adam",
    "Augment",
    "Batch",
    "Config",
    "CrossEntropy",
    "CutMix",
    "Interrupted",
    "Metrics",
    "Mixup",
    "Muon",
    "NonFiniteLossError",
    "Optimizer",
    "ParamGroup",
    "SpeedNet",
    "TrainState",
    "UserError",
    "eval_step",
    "init_from_data",
    "init_state",
    "load_dataset",
    "load_trained",
    "run_experiment",
    "softmax_cross_entropy",
    "train_and_evaluate",
    "train_step",
]
