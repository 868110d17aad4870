"""The test score, and what result.json contains."""

import math

import numpy as np

from cnnjax.class_scores import class_scores, confusion_matrix, own_scores
from cnnjax.data.batches import Pixels
from cnnjax.data.feed import StreamedSet
from cnnjax.errors import NonFiniteLossError, UserError
from cnnjax.evaluation import evaluate_pixels
from cnnjax.files import file_sha256, tree_sha256
from cnnjax.runs.directory import OpenRun
from cnnjax.runs.progress import Progress, add_user_scores, best_row
from cnnjax.runs.schema import Result
from cnnjax.setup import Setup, count_params, device_name
from cnnjax.state import TrainState


def score_test_set(
    setup: Setup, last: TrainState, progress: Progress, run: OpenRun, pixels: Pixels | StreamedSet
) -> tuple[Result, TrainState, np.ndarray | None]:
    """Scores the best epoch on the test split; returns the content of result.json, its state, and the logits.

    Its checkpoint is restored, unless it is the last epoch, whose checkpoint may still be being written.

    Args:
      pixels: the test set.
    """
    best, config = best_row(progress.rows, setup.config.best_by), setup.config
    if best is None:
        raise UserError(f"The checkpoints in {run.run_dir} must include the end of an epoch, got none. Train again.")
    state = last
    if best["step"] != int(last.step):
        state, _ = run.checkpoints.restore(best["step"], last, setup.placement.of_state(last))
    scores = evaluate_pixels(
        state, pixels, model=config.model, tta=config.tta, placement=setup.placement, keep_logits=True
    )
    scores = add_user_scores(run, scores, pixels.label)
    if not math.isfinite(scores.loss):
        raise NonFiniteLossError(f"The test loss must be finite, got {scores.loss}. Try a lower `optim.learning_rate`.")
    names = setup.facts.class_names
    classes = class_scores(scores.confusion, len(names))
    means = classes.means()
    params_sha256 = tree_sha256(last.params)
    result: Result = {
        "test_accuracy": scores.accuracy,
        "test_balanced_accuracy": means["recall"],
        "test_macro_precision": means["precision"],
        "test_macro_recall": means["recall"],
        "test_macro_f1": means["f1"],
        "test_loss": scores.loss,
        "num_test_examples": scores.num_examples,
        "best_validation_accuracy": best.get("validation_accuracy"),
        "best_validation_balanced_accuracy": best.get("validation_balanced_accuracy"),
        "best_validation_loss": best.get("validation_loss"),
        "best_epoch": best["epoch"],
        "num_epochs": config.num_epochs,
        "stopped_epoch": len(progress.rows) if progress.stopped else None,
        "training_seconds": progress.timing[-1]["seconds"],
        "num_params": count_params(state),
        "seed": config.seed,
        "device": device_name(setup.placement.device),
        "sha256": {
            "params": params_sha256,
            "model_state": tree_sha256(last.model_state),
            "opt_state": tree_sha256(last.opt_state),
            "best_params": params_sha256 if state is last else tree_sha256(state.params),
            "metrics": run.hosts.share(lambda: file_sha256(run.run_dir / "metrics.jsonl")),
        },
        "classes": classes.rows(names),
        "confusion_matrix": confusion_matrix(scores.confusion, len(names)),
    }
    if config.metrics is not None:
        result["test_metrics"] = scores.metrics
        result["best_validation_metrics"] = own_scores(best)
    return result, state, scores.logits
