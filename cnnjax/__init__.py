"""cnnjax: the functional JAX/Flax way to train image classifiers. The README lists the public interface."""

from etils import epy as _epy

with _epy.lazy_api_imports(globals()):  # `cnnjax --help` does not wait for jax.
    from cnnjax.cli.main import run_experiment
    from cnnjax.compiler import compiler_options
    from cnnjax.config import Config
    from cnnjax.data.augment import Augment, CutMix, Mixup
    from cnnjax.data.datasets import load_dataset
    from cnnjax.data.photo_augment import PhotoAugment
    from cnnjax.data.weights import load_weights
    from cnnjax.errors import NonFiniteLossError, UserError
    from cnnjax.evaluation import evaluate
    from cnnjax.export.bundle import export_run
    from cnnjax.layers.general import conv_general_dilated
    from cnnjax.loader import DataLoader
    from cnnjax.losses import CrossEntropy, softmax_cross_entropy
    from cnnjax.lr_find import RangeTest, find_learning_rate
    from cnnjax.metrics import Metrics, Scores
    from cnnjax.models.cnn import CNN
    from cnnjax.models.efficientnet import EfficientNetLite0
    from cnnjax.models.mlp import MLP
    from cnnjax.models.resnet import ResNet18, ResNet50
    from cnnjax.models.speednet import SpeedNet
    from cnnjax.network import Functions
    from cnnjax.optim.optimizer import Optimizer, ParamGroup
    from cnnjax.optim.recipes import SGD, Adam, Muon
    from cnnjax.process.console import Report
    from cnnjax.process.settings import keep_memory
    from cnnjax.process.signals import Interrupted
    from cnnjax.report.range_test import write_range_test
    from cnnjax.report.write import write_report
    from cnnjax.runs.loggers import Logger
    from cnnjax.runs.predictions import FilePrediction, predict_files
    from cnnjax.runs.run import Run, load_run
    from cnnjax.runs.tensorboard import TensorBoard
    from cnnjax.runs.trackers import MLflow, WandB
    from cnnjax.state import TrainState, eval_params, init_from_data, init_from_weights, init_state
    from cnnjax.step import apply_gradients, eval_step, mean_loss, train_step
    from cnnjax.train import train_and_evaluate
    from cnnjax.typing import Batch

__version__ = "0.1.0"

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
    "DataLoader",
    "EfficientNetLite0",
    "FilePrediction",
    "Functions",
    "Interrupted",
    "Logger",
    "MLflow",
    "Metrics",
    "Mixup",
    "Muon",
    "NonFiniteLossError",
    "Optimizer",
    "ParamGroup",
    "PhotoAugment",
    "RangeTest",
    "Report",
    "ResNet18",
    "ResNet50",
    "Run",
    "Scores",
    "SpeedNet",
    "TensorBoard",
    "TrainState",
    "UserError",
    "WandB",
    "apply_gradients",
    "compiler_options",
    "conv_general_dilated",
    "eval_params",
    "eval_step",
    "evaluate",
    "export_run",
    "find_learning_rate",
    "init_from_data",
    "init_from_weights",
    "init_state",
    "keep_memory",
    "load_dataset",
    "load_run",
    "load_weights",
    "mean_loss",
    "predict_files",
    "run_experiment",
    "softmax_cross_entropy",
    "train_and_evaluate",
    "train_step",
    "write_range_test",
    "write_report",
]
