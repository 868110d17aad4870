"""Checkpoints: the last and the best by validation, written by Orbax while training goes on, each with its checksums.

The only module that knows Orbax, whose v1 interface is still marked experimental. Orbax loads a file of which a bit has
changed without a word, so every checkpoint gets a SHA256SUMS once it is whole, and is loaded only where all agree.
"""

import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree
from orbax.checkpoint import v1 as ocp

from cnnjax.errors import StorageError, UserError
from cnnjax.runs.files import SUMS, check_sums, write_sums
from cnnjax.step import TrainState

# What Orbax's threads signal to each other is the process's, not a save's: two saves at a time, of two seeds, wait for
# each other for ever.
_ORBAX = threading.Lock()


class Checkpoints:
    """The checkpoints of one run, numbered by step.

    Kept are the latest two, and the best two by validation accuracy (the later one of equals): with one damaged, there
    is still one to go on from, and the best of the epochs before it.
    """

    def __init__(self, directory: Path, *, read_only: bool = False):
        policies = ocp.training.preservation_policies
        best = policies.BestN(get_metric_fn=_accuracy, n=2, keep_checkpoints_without_metrics=False)
        preserved: Any = policies.AnyPreservationPolicy([policies.LatestN(2), best])
        self._checkpointer = ocp.training.Checkpointer(
            str(directory.absolute()),
            save_decision_policy=_Always(),
            preservation_policy=preserved,
            cleanup_tmp_directories=not read_only,  # What a killed save left behind.
        )
        self._thread = ThreadPoolExecutor(1, "checkpoint")
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
        """Starts to save; waits only for a save that is under way, and for the device.

        Args:
          state: may be donated afterwards: it is copied first.
          progress: what the loop knows besides the state; any JSON. "best_step" names the checkpoint it needs.
          validation: the scores at the end of an epoch ("accuracy" ranks them, where it is there); None within one.

        Raises:
          StorageError: the save before this one could not be written.
        """
        self.wait()
        copy = _copy(state)
        self._pending = self._thread.submit(self._save, int(state.step), copy, progress, validation)

    def _save(self, step: int, state: TrainState, progress: dict[str, Any], validation: dict[str, Any] | None) -> None:
        with _ORBAX:
            self._checkpointer.save_checkpointables(
                step, {"state": state}, metrics=validation, custom_metadata=progress
            )
        folder = Path(self._checkpointer.directory) / str(step)
        write_sums(folder, (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()))

    def wait(self) -> None:
        """Waits until what was saved is on disk.

        Raises:
          StorageError: it could not be written, because the disk is full or not writable; earlier ones are kept.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except Exception as error:  # Orbax raises many types for a disk that is full.
                raise StorageError(
                    f"A checkpoint could not be written in {self._checkpointer.directory} ({_reason(error)}). "
                    "What was saved before is in place: make room, and go on by --resume."
                ) from error

    def restore(
        self, step: int, like: TrainState, sharding: jax.sharding.Sharding | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """Restores a checkpoint, once its checksums are verified.

        Args:
          step: one of `latest()` and `best()`.
          like: gives structure, shapes and dtypes; arrays of `jax.eval_shape` will do.
          sharding: where the arrays go; the first device when None.

        Returns:
          The state, and the `progress` that was saved with it.

        Raises:
          UserError: the checkpoint is of another model or optimizer, or damaged.
        """
        path = Path(self._checkpointer.directory) / str(step)
        if wrong := faults(path):
            raise UserError(
                f"The checkpoint {path} must agree with its checksums, got {wrong[0]}. A run that is not finished goes "
                "on from an earlier one: --resume. A finished one is made again: cnnjax reproduce."
            )
        sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like)
        try:
            with _ORBAX:
                metadata: Any = self._checkpointer.checkpointables_metadata(step)
                _check_same(path, wanted=_leaves(target), saved=_leaves(metadata.metadata["state"]))
                state = self._checkpointer.load_checkpointables(step, {"state": target})["state"]
        except UserError:
            raise
        except Exception as error:  # Intact, so another version wrote it; Orbax raises many types.
            raise _other_version(path, error) from error
        return state, metadata.custom_metadata

    def close(self) -> None:
        """Waits until all is on disk and ends the threads."""
        self._thread.shutdown()
        try:
            self._checkpointer.close()
        except Exception:  # Orbax tells again of the save that failed.
            self.wait()


def recover(directory: Path, say: Callable[[str], None]) -> None:
    """Leaves in `directory` the checkpoints that a run can go on from.

    That is the latest one that agrees with its checksums and whose best checkpoint does, too, and those before it. The
    user is told of every other: a damaged one, and one that lacks its best, are moved to `directory`/../damaged; what a
    kill left half written or half removed is removed.

    Raises:
      UserError: another version of the package or of Orbax wrote an intact one.
    """
    steps = sorted((int(path.name) for path in directory.glob("*") if path.name.isdecimal()), reverse=True)
    wrong = {step: faults(directory / str(step)) for step in steps}
    intact = [step for step in steps if not wrong[step]]
    best = {step: _best_step(directory / str(step)) for step in intact}
    usable = next((step for step in intact if best[step] in (None, *intact)), None)
    to = "from the start" if usable is None else f"from the checkpoint of step {usable}"
    for step in steps:
        path = directory / str(step)
        if not wrong[step] and usable is not None and step <= usable:
            continue
        older = usable is not None and step < usable
        if f"{SUMS} is missing" in wrong[step] or (
            older and all(fault.endswith("is missing") for fault in wrong[step])
        ):
            shutil.rmtree(path)
            say(f"The checkpoint of step {step} was left half written or half removed. It is removed; going on {to}.")
            continue
        why = wrong[step][0] if wrong[step] else f"the best checkpoint of its run, {best[step]}, is missing or damaged"
        moved = _set_aside(path, directory.parent / "damaged")
        say(f"The checkpoint of step {step} cannot be used: {why}. It is now {moved}; going on {to}.")


def faults(path: Path) -> list[str]:
    """Returns what is wrong with a checkpoint's files, in words."""
    if path.is_symlink():
        return [f"{path.name} leads out of the folder"]
    return [
        f"{name} {_WORDS.get(what, what)}"
        for name, what in check_sums(path).items()
        if what not in ("ok", "no checksum")
    ]


def all_finite(state: TrainState) -> bool:
    """Returns whether every parameter is a finite number. Waits for the device."""
    return bool(_all_finite(state.params))


@jax.jit
def _all_finite(params: PyTree) -> Bool[Array, ""]:
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]))


@jax.jit
def _copy(state: TrainState) -> TrainState:
    return jax.tree.map(jnp.copy, state)


_WORDS = {"missing": "is missing", "damaged": "is damaged"}


def _best_step(path: Path) -> int | None:
    """Returns the step of the best checkpoint so far, as the intact one in `path` knows it."""
    try:
        progress: Any = ocp.checkpointables_metadata(str(path.absolute())).custom_metadata
        return progress["best_step"]
    except Exception as error:  # Orbax raises many types.
        raise _other_version(path, error) from error


def _other_version(path: Path, error: Exception) -> UserError:
    return UserError(
        f"The checkpoint {path} is intact and must be of this version of cnnjax and Orbax, got {_reason(error)}. "
        "manifest.json names the versions that wrote it: install those, or train in another directory."
    )


def _set_aside(path: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    target = next(t for i in range(10_000) if not (t := folder / (path.name + (f".{i}" if i else ""))).exists())
    return path.rename(target)


def _reason(error: BaseException) -> str:
    """Returns the system's own words where they are in the message, else the error's type and its beginning."""
    known = re.search("No space left on device|Disk quota exceeded|Read-only file system|Permission denied", str(error))
    return known[0] if known else f"{type(error).__name__}: {str(error)[:200]}"


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
                f"{_describe(saved.get(name))} there and {_describe(wanted.get(name))} here. If they are the same, "
                "another version of cnnjax wrote it: manifest.json names its commit."
            )


def _describe(leaf: tuple[tuple[int, ...], Any] | None) -> str:
    return "no values" if leaf is None else f"shape {leaf[0]} ({leaf[1]})"


class _Always:
    """Orbax's default policy skips a save while another is under way; here each one counts."""

    def should_save(self, *args: Any, **kwargs: Any) -> bool:
        return True


def _accuracy(metrics: Any) -> float:
    return metrics.get("accuracy", 0.0)  # 0 without validation: the latest is the best.
