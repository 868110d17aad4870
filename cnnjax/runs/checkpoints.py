"""Checkpoints: the latest and the best of a run, written by Orbax in the background, with checksums.

This is the only module that uses Orbax, whose v1 interface is still marked experimental. Orbax silently loads corrupted
files, so every finished checkpoint gets a SHA256SUMS file, and it is loaded only if all of its files match.
"""

import itertools
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from cnnjax.errors import StorageError, UserError
from cnnjax.runs.files import SUMS, check_sums, write_sums
from cnnjax.step import TrainState

# Orbax's threads synchronize through state of the process. Without this lock, simultaneous saves of two seeds deadlock.
_ORBAX = threading.Lock()


class Checkpoints:
    """The checkpoints of one run, numbered by step.

    Keeps the latest two and the best two by validation accuracy; of equals, the later ones. If one is damaged, an
    earlier one remains to resume from, with the best checkpoint of the epochs before it.

    Attributes:
      saved_at: when the last save, or else this object, began, as `time.perf_counter()`.
    """

    def __init__(self, directory: Path, *, read_only: bool = False):
        policies = ocp.training.preservation_policies
        best = policies.BestN(get_metric_fn=_accuracy, n=2, keep_checkpoints_without_metrics=False)
        preserved: Any = policies.AnyPreservationPolicy([policies.LatestN(2), best])
        self._checkpointer = ocp.training.Checkpointer(
            str(directory.absolute()),
            preservation_policy=preserved,
            cleanup_tmp_directories=not read_only,  # A killed save leaves them.
        )
        self._directory = directory.absolute()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self.saved_at = time.perf_counter()
        self._pending: Future[None] | None = None

    def latest(self) -> int | None:
        """Returns the step of the latest checkpoint, or None."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def best(self) -> int | None:
        """Returns the step of the checkpoint with the best validation accuracy (the latest of equals), or None."""
        scored = [(_accuracy(c.metrics), c.step) for c in self._checkpointer.checkpoints if c.metrics is not None]
        return max(scored)[1] if scored else None

    def save(self, state: TrainState, progress: dict[str, Any], validation: dict[str, Any] | None = None) -> None:
        """Starts to save a checkpoint. Waits for the previous save and for `state`.

        Args:
          state: must not be donated afterwards; see `copy_state`.
          progress: what `restore` returns with the state, as JSON. "best_step" is the step of the best checkpoint.
          validation: the scores at the end of an epoch, ranked by "accuracy" if present; None within an epoch.

        Raises:
          StorageError: if the previous checkpoint could not be written.
        """
        self.wait()
        self.saved_at = time.perf_counter()
        self._pending = self._thread.submit(self._save, int(state.step), state, progress, validation)

    def is_saving(self) -> bool:
        """Returns whether the last save is still being written."""
        return self._pending is not None and not self._pending.done()

    def _save(self, step: int, state: TrainState, progress: dict[str, Any], validation: dict[str, Any] | None) -> None:
        with _ORBAX:
            self._checkpointer.save_checkpointables(
                step, {"state": state}, force=True, metrics=validation, custom_metadata=progress
            )
        folder = self._directory / str(step)
        write_sums(folder, (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()))

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
          StorageError: if it could not be written, for example because the disk is full. Earlier checkpoints are kept.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except Exception as error:  # Orbax raises many types if the disk is full.
                raise StorageError(
                    f"A checkpoint could not be written in {self._directory} ({_reason(error)}). The earlier "
                    "checkpoints of the run are kept: free disk space or allow writing, then resume it with --resume."
                ) from error

    def restore(
        self, step: int, abstract_state: TrainState, sharding: jax.sharding.Sharding | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """Restores a checkpoint after verifying its checksums.

        Args:
          step: `latest()` or `best()`, for example.
          abstract_state: gives the structure, shapes and dtypes, for example from `jax.eval_shape`.
          sharding: where to put the arrays; the first device if None.

        Returns:
          The state and the `progress` that was saved with it.

        Raises:
          UserError: if the checkpoint is damaged, or belongs to another model, optimizer or version.
        """
        path = self._directory / str(step)
        if faults := _faults(path):
            raise UserError(
                f"The checkpoint {path} must match its checksums, but {faults[0]}. If the run is not finished, resume "
                "it with --resume: an earlier checkpoint is used. If it is finished, repeat it with `cnnjax reproduce`."
            )
        sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract_state
        )
        with _reading(path):
            metadata: Any = self._checkpointer.checkpointables_metadata(step)
            _check_leaves(path, metadata.metadata["state"], target)
            state = self._checkpointer.load_checkpointables(step, {"state": target})["state"]
        return state, metadata.custom_metadata

    def close(self) -> None:
        """Waits for the last save and ends the threads.

        Raises:
          StorageError: if the last save failed and `wait` has not raised it yet.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            with suppress(Exception):  # Orbax raises the error of a failed save again.
                self._checkpointer.close()


def recover(directory: Path, say: Callable[[str], None]) -> None:
    """Leaves only those checkpoints in `directory` that a run can resume from.

    These are the latest intact checkpoint whose best checkpoint is also intact, and the intact ones before it.
    Checkpoints that a killed process left incomplete are deleted. Damaged ones, and those without their best
    checkpoint, are moved to `directory`/../damaged. `say` receives a line for each of them.

    Raises:
      UserError: if an intact checkpoint was written by another version of the package or of Orbax.
    """
    steps = sorted((int(path.name) for path in directory.glob("*") if path.name.isdecimal()), reverse=True)
    faults = {step: _faults(directory / str(step)) for step in steps}
    best = {step: _best_step(directory / str(step)) for step in steps if not faults[step]}
    usable = next((step for step in best if best[step] in (None, *best)), None)
    start = "Training starts again from step 0." if usable is None else f"Training resumes from step {usable}."
    for step in steps:
        path, wrong = directory / str(step), faults[step]
        older = usable is not None and step <= usable
        if older and not wrong:
            continue
        # SHA256SUMS is written last. Orbax deletes the files of an old checkpoint one by one.
        if f"{SUMS} is missing" in wrong or (older and all(fault.endswith("is missing") for fault in wrong)):
            shutil.rmtree(path)
            say(f"The checkpoint of step {step} was incomplete and has been deleted. {start}")
        else:
            reason = wrong[0] if wrong else f"its best checkpoint, of step {best[step]}, is missing or damaged"
            moved = _move_to(directory.parent / "damaged", path)
            say(f"The checkpoint of step {step} cannot be used: {reason}. It has been moved to {moved}. {start}")


def all_finite(params: PyTree) -> bool:
    """Returns whether all parameters are finite. Computes on the host: the device may be busy with the next epoch."""
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(params)))


def _accuracy(metrics: Any) -> float:
    return metrics.get("accuracy", 0.0)  # Without validation all are equal, and the latest is the best.


def _faults(path: Path) -> list[str]:
    """Describes each file of a checkpoint that does not match its checksum."""
    if path.is_symlink():
        return [f"{path.name} is outside the folder"]
    return [f"{name} is {status}" for name, status in check_sums(path).items() if status not in ("ok", "no checksum")]


def _best_step(path: Path) -> int | None:
    """Returns the step of the best checkpoint at the time when `path` was saved."""
    with _reading(path):
        progress: Any = ocp.checkpointables_metadata(str(path.absolute())).custom_metadata
        return progress["best_step"]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Explains the errors of reading an intact checkpoint."""
    try:
        with _ORBAX:
            yield
    except UserError:
        raise
    except Exception as error:  # Orbax raises many types.
        raise UserError(
            f"The checkpoint {path} is intact but must be from this version of cnnjax and Orbax, got {_reason(error)}. "
            "manifest.json names the versions that wrote it: install them, or train in another directory."
        ) from error


def _reason(error: BaseException) -> str:
    """Returns the message of the operating system, if any, or else the type and the beginning of the error."""
    known = "No space left on device|Disk quota exceeded|File too large|Read-only file system|Permission denied"
    found = re.search(known, str(error))
    return found[0] if found else f"{type(error).__name__}: {str(error)[:200]}"


def _move_to(folder: Path, path: Path) -> Path:
    """Moves `path` into `folder`, under a name that is free."""
    folder.mkdir(exist_ok=True)
    targets = (folder / (f"{path.name}.{i}" if i else path.name) for i in itertools.count())
    return path.rename(next(target for target in targets if not target.exists()))


def _check_leaves(path: Path, saved: PyTree, target: PyTree) -> None:
    there, here = (  # By path alone: Orbax's metadata has dicts instead of our named tuples.
        {
            jax.tree_util.keystr(keys, simple=True, separator="/"): f"shape {tuple(leaf.shape)} ({leaf.dtype})"
            for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (saved, target)
    )
    if different := sorted(there.items() ^ here.items()):
        name = different[0][0]
        raise UserError(
            f"The checkpoint {path} must match the model and the optimizer, but `{name}` has "
            f"{there.get(name, 'no value')} there and {here.get(name, 'no value')} here. If they are the same, another "
            "version of cnnjax wrote it: manifest.json names its commit."
        )
