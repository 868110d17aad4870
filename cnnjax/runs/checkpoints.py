"""Checkpoints: the latest and the best of a run, written by Orbax in the background, with checksums.

This is the only module that uses Orbax, whose v1 interface is still marked experimental. Orbax silently loads corrupted
files, so a checkpoint has a SHA256SUMS file, and is loaded only if it names every file and all of them match:

    checkpoints/120/            of step 120, which plain Orbax loads, too
    checkpoints/120/progress.json, SHA256SUMS
    checkpoints/160.partial/    being written; renamed when it is complete
    checkpoints/40.removed/     being deleted
"""

import errno
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from cnnjax.errors import StorageError, UserError, option
from cnnjax.files import is_key, raw_keys, sync, tree_sha256, write_json, write_sums
from cnnjax.hosts import Hosts, alone
from cnnjax.runs.records import run_argument
from cnnjax.runs.recovery import PROGRESS, find_faults, list_steps, read_progress
from cnnjax.runs.schema import SavedProgress
from cnnjax.sharding import fetch
from cnnjax.state import TrainState

_SYSTEM = re.compile("|".join(re.escape(os.strerror(code)) for code in errno.errorcode))
# Orbax's threads synchronize through state of the process. Without this lock, simultaneous saves of two seeds deadlock.
_ORBAX = threading.Lock()


class Checkpoints:
    """The checkpoints of one run, numbered by step.

    Keeps the latest two and the best two by validation score (the later ones if several are equal). If one is damaged,
    an earlier one remains to resume from, with the best checkpoint of the epochs before it.

    Several processes write a checkpoint together: each its shards, process 0 everything else. They save at the same
    step, and wait until it is on disk, because Orbax has them communicate.

    Args:
      directory: contains the checkpoints.
      hosts: the processes; this one alone if None.
      check_in_place: raises a `UserError` if the run directory was moved or deleted.
    """

    def __init__(
        self, directory: Path, hosts: Hosts | None = None, check_in_place: Callable[[], object] = lambda: None
    ):
        self._directory, self._hosts = directory.absolute(), hosts or alone()
        self._check_in_place = check_in_place
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saved: dict[int, SavedProgress] = {}
        self._damaged: list[int] = []  # After `recover` there are none.
        for step in list_steps(directory):
            try:
                self._saved[step] = read_progress(directory / str(step))
            except UserError:
                self._damaged.append(step)
        self._has_read_back = False
        self._pending: Future[None] | None = None
        self._seconds = 0.0  # The duration of the last save.
        self._saved_at = time.perf_counter()

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, in order."""
        return sorted(self._saved)

    def latest(self) -> int | None:
        """Returns the step of the latest checkpoint, or None."""
        return max(self._saved, default=None)

    def best(self) -> int | None:
        """Returns the best step that the latest checkpoint names, else the latest end of an epoch, or None.

        Raises:
          UserError: a later checkpoint is damaged.
        """
        latest = self.latest() or 0
        if self._damaged and self._damaged[-1] > latest:
            raise UserError(
                f"The checkpoint {self._directory / str(self._damaged[-1])} is damaged. Resume the run, "
                f"which uses an earlier one: {option('resume')}."
            )
        named = self._saved[latest]["best_step"] if latest else None
        return next(iter(self._ends()), None) if named is None else named

    def _ends(self) -> list[int]:
        """Returns the ends of epochs, the best first. Without validation all are equal, and the latest is the best."""
        scored = [(x["validation"].get("score", 0.0), step) for step, x in self._saved.items() if x["validation"]]
        return [step for _, step in sorted(scored, reverse=True)]

    def save(self, state: TrainState, progress: Mapping[str, Any], validation: dict[str, Any] | None = None) -> None:
        """Starts to save a checkpoint. Waits for the previous save and for `state`.

        Args:
          state: must not be donated afterwards; see `copy_state`.
          progress, validation: the content of `SavedProgress`.

        Raises:
          StorageError: if the previous checkpoint could not be written.
          UserError: the run directory was moved or deleted.
        """
        self.wait()
        self._check_in_place()
        self._saved_at = time.perf_counter()
        saved: Any = {**progress, "validation": validation}
        self._pending = self._thread.submit(self._save, int(state.step), state, saved)
        if self._hosts.count > 1:
            self.wait()

    def is_due(self, seconds: float) -> bool:
        """Returns whether the last save, or else this object, began at least this long ago."""
        return time.perf_counter() - self._saved_at >= seconds

    def is_busy(self) -> bool:
        """Returns whether the last save is still being written, or took more than a tenth of the time since it began.

        Several processes always save together: their clocks would decide differently.
        """
        if self._pending is None or self._hosts.count > 1:
            return False
        return not self._pending.done() or not self.is_due(10 * self._seconds)

    def _save(self, step: int, state: TrainState, saved: SavedProgress) -> None:
        folder, partial = self._directory / str(step), self._directory / f"{step}.partial"
        state, context = raw_keys(state), ocp.Context()  # Orbax saves no keys.
        # Else, if a directory cannot be made, its threads wait for it for minutes, also when the process ends.
        context.asynchronous.create_directories_asynchronously = False
        context.array.saving.use_compression = (
            False  # Compressing takes a tenth of the time, and saves 8% of the bytes.
        )
        with _ORBAX, context:
            ocp.save_checkpointables(str(partial), {"state": state}, overwrite=True)
        if not self._has_read_back:  # Once per session: at the end of training it would be too late.
            _read_back(partial, state)
            self._has_read_back = True
        self._hosts.barrier("a checkpoint is written")
        if self._hosts.leads:
            self._complete(partial, folder, saved)
        self._hosts.barrier("a checkpoint is complete")
        self._saved[step] = saved
        for old in {*self._saved} - {*self.steps()[-2:], *self._ends()[:2]}:
            if self._hosts.leads:
                _remove(self._directory / str(old))
            del self._saved[old]
        self._seconds = time.perf_counter() - self._saved_at

    def _complete(self, partial: Path, folder: Path, saved: SavedProgress) -> None:
        """Adds progress and checksums to a checkpoint, and gives it its name."""
        files = [path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file()]
        write_json(partial / PROGRESS, {**saved, "files": sorted(files)})
        write_sums(partial, [*files, PROGRESS])
        # So that a power failure, too, leaves this checkpoint complete, or the old ones.
        sync(*partial.rglob("*"), partial)
        partial.rename(folder)
        sync(self._directory)

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
          StorageError: if it could not be written, for example because the disk is full. Earlier checkpoints are kept.
          UserError: the run directory was moved or deleted meanwhile.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except Exception as error:  # Orbax raises many types if the disk is full.
                self._hosts.explain(error)  # Or if another process was killed meanwhile.
                self._check_in_place()
                if not isinstance(error, OSError) and not _SYSTEM.search(str(error)):
                    raise
                raise StorageError(
                    f"A checkpoint could not be written in {self._directory} ({_reason(error)}). The earlier "
                    f"checkpoints of the run are kept: remove the cause, then resume it: {option('resume')}."
                ) from error

    def restore(
        self, step: int, abstract_state: TrainState, sharding: PyTree = None
    ) -> tuple[TrainState, SavedProgress]:
        """Restores a checkpoint after verifying its checksums.

        Args:
          step: `latest()` or `best()`, for example.
          abstract_state: gives the structure, shapes and dtypes, for example from `jax.eval_shape`.
          sharding: where to put each array; all on the first device if None.

        Returns:
          The state, and the progress that was saved with it.

        Raises:
          UserError: if the checkpoint is damaged, or belongs to another model, optimizer or version.
        """
        check_characters(run_argument(), self._directory.parent)
        path = self._directory / str(step)
        if faults := self._hosts.share(lambda: find_faults(path)):
            raise UserError(
                f"The checkpoint {path} must match its checksums, but {faults[0]}. If the run is not finished, resume "
                f"it, which uses an earlier checkpoint: {option('resume')}. If it is finished, repeat it with "
                "`cnnjax reproduce`."
            )
        if sharding is None:
            first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            sharding = jax.tree.map(lambda _: first, abstract_state)
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(raw_keys, abstract_state),
            sharding,
        )
        with _reading(path):
            metadata: Any = ocp.checkpointables_metadata(str(path)).metadata
            _check_leaves(path, metadata["state"], target)
            state = ocp.load_checkpointables(str(path), {"state": target})["state"]
        state = jax.tree.map(lambda leaf, x: jax.random.wrap_key_data(x) if is_key(leaf) else x, abstract_state, state)
        return state, read_progress(path)

    def close(self) -> None:
        """Waits for the last save and ends the thread.

        Raises:
          StorageError, UserError: if the last save failed and `wait` has not raised it yet.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()


def check_characters(parameter: str, run_dir: Path) -> None:
    """Checks that Orbax, which takes the path of a checkpoint for a pattern, can read it back.

    Raises:
      UserError: it cannot.
    """
    path = str(run_dir.absolute())
    if found := re.search(r"\[[^/]*\]|[\\\udc80-\udcff]", path):
        raise UserError(
            f"`{parameter}` must be a path in UTF-8 without [...] and \\, which Orbax cannot read back, got "
            f"{found[0]!r} in {path!r}. Use another directory."
        )


def all_finite(params: PyTree) -> bool:
    """Returns whether all parameters are finite. Computes on the host: the device may be busy with the next epoch."""
    return all(np.isfinite(leaf).all() for leaf in map(fetch, jax.tree.leaves(params)))


def _remove(path: Path) -> None:
    """Deletes a checkpoint. If the process is killed meanwhile, its name says that it is incomplete."""
    removed = path.with_name(f"{path.name}.removed")
    path.rename(removed)
    shutil.rmtree(removed)


def _read_back(path: Path, state: TrainState) -> None:
    """Checks that Orbax loads the bits that it has just written."""
    target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), state)
    with _ORBAX:
        loaded = ocp.load_checkpointables(str(path), {"state": target})["state"]
    if tree_sha256(loaded) != tree_sha256(state):
        raise OSError("it was read back with other values")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Explains the errors of reading an intact checkpoint."""
    try:
        with _ORBAX:
            yield
    except (MemoryError, UserError):
        raise
    except Exception as error:  # Orbax raises many types.
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise UserError(
            f"The checkpoint {path} is intact but must be from this version of cnnjax and Orbax, got {_reason(error)}. "
            "manifest.json names the versions that wrote it: install them, or train in another directory."
        ) from error


def _reason(error: BaseException) -> str:
    """Returns the message of the operating system, if any, or else the type and the beginning of the error."""
    found = _SYSTEM.search(str(error))
    return found[0] if found else f"{type(error).__name__}: {str(error)[:200]}"


def _check_leaves(path: Path, saved: PyTree, target: PyTree) -> None:
    there, here = (  # By path alone: Orbax's metadata has dicts instead of our named tuples.
        {
            jax.tree_util.keystr(keys, simple=True, separator="/"): f"shape {tuple(leaf.shape)} ({leaf.dtype})"
            for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (saved, target)
    )
    if different := there.items() ^ here.items():
        name = min(different, key=lambda item: (not item[0].startswith("params/"), item))[0]
        saved_as, expected = there.get(name, "no value"), here.get(name, "no value")
        fix = "If they are the same, another version of cnnjax wrote it: manifest.json names its commit."
        if len({re.sub(r"(32|64)\)$", ")", text) for text in (saved_as, expected)}) == 1:
            now = "on" if jax.dtypes.canonicalize_dtype(float) == np.float64 else "off"
            fix = f"JAX_ENABLE_X64 must be as it was in training, and is {now} now."
        raise UserError(
            f"The checkpoint {path} must match the model and the optimizer, but `{name}` has {saved_as} there and "
            f"{expected} here. {fix}"
        )
