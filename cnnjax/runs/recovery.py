"""Finds out which checkpoints of a run directory are intact, and sets the others aside. Does not need Orbax."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from cnnjax.errors import UserError
from cnnjax.files import SUMS, check_sums, move_into, read_json
from cnnjax.runs.schema import SavedProgress

PROGRESS = "progress.json"


def recover(directory: Path, say: Callable[[str], None]) -> None:
    """Leaves only those checkpoints in `directory` that a run can resume from.

    These are the latest intact checkpoint whose best checkpoint is also intact, and the intact ones before it. Damaged
    ones, and those without their best checkpoint, are moved to `directory`/../damaged; `say` receives a line for each.
    What a killed process was writing or deleting is deleted.

    Raises:
      UserError: if a file cannot be read, or if an intact checkpoint was written by another version of the package.
    """
    for path in directory.iterdir() if directory.exists() else ():
        if re.fullmatch(r"\d+\.(partial.*|removed)", path.name) and not path.is_symlink():
            shutil.rmtree(path)
    faults, best, usable = _examine(directory)
    start = "Training starts again from step 0." if usable is None else f"Training resumes from step {usable}."
    for step, wrong in faults.items():
        if wrong or usable is None or step > usable:
            reason = wrong[0] if wrong else f"its best checkpoint, of step {best[step]}, is missing or damaged"
            moved = move_into(directory.parent / "damaged", directory / str(step))
            say(f"The checkpoint of step {step} cannot be used: {reason}. It has been moved to {moved}. {start}")


def usable_step(directory: Path) -> int | None:
    """Returns the step of the checkpoint from which a run would resume, see `recover`, or None. Changes nothing."""
    return _examine(directory)[2]


def _examine(directory: Path) -> tuple[dict[int, list[str]], dict[int, int | None], int | None]:
    """Returns the faults of each checkpoint, the best step that each intact one names, and the `usable_step`.

    The latest comes first.
    """
    faults = {step: find_faults(directory / str(step)) for step in list_steps(directory)[::-1]}
    best = {step: read_progress(directory / str(step))["best_step"] for step in faults if not faults[step]}
    return faults, best, next((step for step in best if best[step] in (None, *best)), None)


def list_steps(directory: Path) -> list[int]:
    """Returns the steps of the checkpoints in a directory, which may be damaged, in order."""
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    return sorted(int(name) for name in names if re.fullmatch(r"\d+", name, re.ASCII))


def read_progress(path: Path) -> SavedProgress:
    """Returns the progress that was saved with a checkpoint.

    Raises:
      UserError: it is missing, damaged, or of another version.
    """
    return read_json(path / PROGRESS, SavedProgress)


def check(path: Path) -> dict[str, str]:
    """Returns the status of each file of a checkpoint, see `files.check_sums`."""
    found = check_sums(path)
    names = [PROGRESS]
    if found.get(PROGRESS) == "ok":  # SHA256SUMS may lack the lines of files that are missing.
        names += read_progress(path)["files"]
    return found if SUMS in found else found | {name: "missing" for name in names if name not in found}


def find_faults(path: Path) -> list[str]:
    """Describes each file of a checkpoint that does not match its checksum, or has none.

    Raises:
      UserError: if a file cannot be read: nothing is known about it.
    """
    if path.is_symlink():
        return [f"{path.name} is outside the folder"]
    found = {name: status for name, status in check(path).items() if status != "ok"}
    for name, status in found.items():
        if status.startswith("unreadable"):
            raise UserError(
                f"The checkpoint {path} must be readable, but {name} is {status}. Allow reading it, or move the "
                "checkpoint to another folder: a run then resumes from an earlier one."
            )
    return [
        f"{name} is {status}" if status != "no checksum" else f"{name} has no checksum"
        for name, status in found.items()
    ]
