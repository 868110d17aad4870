"""Checkpoints: the last and the best by validation, written by Orbax while training goes on.

The only module that knows Orbax, whose v1 interface is still marked experimental.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from cnnjax.errors import UserError
from cnnjax.step import TrainState


class Checkpoints:
    """The checkpoints of one run, numbered by step.

    Kept are the latest, and the best by validation accuracy (the later one of equals).
    """

    def __init__(self, directory: Path, *, read_only: bool = False):
        policies = ocp.training.preservation_policies
        best = policies.BestN(get_metric_fn=_accuracy, n=1, keep_checkpoints_without_metrics=False)
        preserved: Any = policies.AnyPreservationPolicy([policies.LatestN(1), best])
        self._checkpointer = ocp.training.Checkpointer(
            str(directory.absolute()),
            save_decision_policy=_Always(),
            preservation_policy=preserved,
            cleanup_tmp_directories=not read_only,  # What a killed save left behind.
        )

    def latest(self) -> int | None:
        """Returns the step of the latest checkpoint, or None."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def best(self) -> int | None:
        """Returns the step of the checkpoint with the best validation accuracy (the latest of equals), or None."""
        scored = [(_accuracy(c.metrics), c.step) for c in self._checkpointer.checkpoints if c.metrics is not None]
        return max(scored)[1] if scored else None

    def save(self, state: TrainState, progress: dict[str, Any], validation: dict[str, Any] | None = None) -> None:
        """Starts to save; waits only for a save that is under way, and for the device.

        Args:
          state: may be donated afterwards: it is copied first.
          progress: what the loop knows besides the state; any JSON.
          validation: the scores at the end of an epoch ("accuracy" ranks them); None within one.
        """
        self.wait()
        copy = jax.tree.map(jnp.copy, state)
        self._checkpointer.save_checkpointables_async(
            int(state.step), {"state": copy}, metrics=validation, custom_metadata=progress
        )

    def wait(self) -> None:
        """Waits until what was saved is on disk."""
        self._checkpointer.wait()

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restores a checkpoint onto the first device.

        Args:
          step: one of `latest()` and `best()`.
          like: gives structure, shapes and dtypes; arrays of `jax.eval_shape` will do.

        Returns:
          The state, and the `progress` that was saved with it.

        Raises:
          UserError: the checkpoint is of another model or optimizer, or damaged.
        """
        path = self._checkpointer.directory / str(step)
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like)
        try:
            metadata: Any = self._checkpointer.checkpointables_metadata(step)
            _check_same(path, wanted=_leaves(target), saved=_leaves(metadata.metadata["state"]))
            state = self._checkpointer.load_checkpointables(step, {"state": target})["state"]
        except UserError:
            raise
        except Exception as error:  # Orbax raises many types for missing or truncated files.
            raise UserError(
                f"The checkpoint {path} cannot be read ({type(error).__name__}: {str(error)[:200]}). If it is damaged, "
                "move it away: the run then goes on from an earlier one, or anew where there is none."
            ) from error
        return state, metadata.custom_metadata

    def close(self) -> None:
        """Waits until all is on disk and ends Orbax's threads."""
        self._checkpointer.close()


def all_finite(state: TrainState) -> bool:
    """Returns whether every parameter is a finite number. Waits for the device."""
    return all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(state.params))


def _leaves(tree: Any) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Returns shape and dtype of each leaf by its path; Orbax's metadata has dicts where we have named tuples."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (tuple(leaf.shape), leaf.dtype) for path, leaf in leaves
    }


def _check_same(path: Any, wanted: dict[str, Any], saved: dict[str, Any]) -> None:
    for name in sorted({*wanted, *saved}):
        if wanted.get(name) != saved.get(name):
            raise UserError(
                f"The checkpoint {path} must be of the same model and optimizer; `{name}` has "
                f"{_describe(saved.get(name))} there and {_describe(wanted.get(name))} here."
            )


def _describe(leaf: tuple[tuple[int, ...], Any] | None) -> str:
    return "no values" if leaf is None else f"shape {leaf[0]} ({leaf[1]})"


class _Always:
    """Orbax's default policy skips a save while another is under way; here each one counts."""

    def should_save(self, *args: Any, **kwargs: Any) -> bool:
        return True


def _accuracy(metrics: Any) -> float:
    return metrics["accuracy"]
