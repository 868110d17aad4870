"""manifest.json: the environment of a run, and the history of its sessions, each from a start to a stop."""

import hashlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cnnjax.cli.process import processor
from cnnjax.cli.signals import Interrupted
from cnnjax.errors import UserError
from cnnjax.layers import onednn
from cnnjax.runs.files import SUMS, changes, read_json, write_file, write_json, write_sums

FORMAT = 2  # Of the run directory.
PACKAGES = ("cnnjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy", "scipy")
ACCELERATOR_PACKAGES = ("jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "libtpu")
# What determines the bits, besides configuration and data.
CODE = ("commit", "package_commit", "diff_sha256", "files")
DECISIVE = (*CODE, "versions", "device", "num_devices", "processor", "cores", "driver", "kernels", "flags")
SOURCE = (".py", ".toml")  # The untracked files that the diff includes.
DIFF_LIMIT = 1 << 20  # Bytes; a larger untracked file is data.


def environment(devices: Sequence[Any]) -> dict[str, Any]:
    """Returns what the bits of a run depend on besides its configuration and data, as JSON.

    Args:
      devices: those that share a batch.
    """
    first = devices[0]
    nvidia = Path("/proc/driver/nvidia/version")
    flags = {
        name: value for name, value in sorted(os.environ.items()) if name == "XLA_FLAGS" or name.startswith("JAX_")
    }
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_LOG_COMPILES"):  # They change no bits.
        flags.pop(name, None)
    driver = [first.client.platform_version, nvidia.read_text().split("\n")[0] if nvidia.exists() else ""]
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "device": first.device_kind if first.platform == "cpu" else f"{first.platform}, {first.device_kind}",
        "num_devices": len(devices),
        "processor": processor(),
        "cores": num_cores(),
        "driver": " ".join(driver),
        "kernels": "oneDNN" if first.platform == "cpu" and onednn.in_use() else "XLA",
        "flags": flags,
        "host": platform.node(),
        "system": platform.platform(),
    }


def num_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def source_code() -> tuple[dict[str, Any], str]:
    """Returns the commit of the code and, if the tree is dirty, the diff against it.

    "commit" belongs to the repository of the working directory; None if there is none. The diff covers its tracked
    files, and small untracked ones of `SOURCE` that git does not ignore. If the package lies in another repository,
    "package_commit" names that one's commit, and the SHA-256 of its diff if it is dirty.
    """
    here, package = _root(Path.cwd()), _root(Path(__file__).parent)
    found: dict[str, Any] = {"commit": None if here is None else _git(here, "rev-parse", "HEAD").strip()}
    if package is not None and package != here:
        diff = _diff(package)
        changed = f" and a diff, SHA-256 {_sha256(diff)}" if diff else ""
        found["package_commit"] = _git(package, "rev-parse", "HEAD").strip() + changed
    diff = "" if here is None else _diff(here)
    return found | {"dirty": bool(diff)}, diff


def _root(folder: Path) -> Path | None:
    """Returns the root of the repository that contains `folder` and has a commit."""
    with suppress(OSError, subprocess.CalledProcessError):
        _git(folder, "rev-parse", "HEAD")
        return Path(_git(folder, "rev-parse", "--show-toplevel").strip())
    return None


def _diff(root: Path) -> str:
    diff = _git(root, "diff", "--binary", "HEAD")
    for name in _git(root, "ls-files", "-z", "--others", "--exclude-standard").split("\0")[:-1]:
        path = root / name
        if path.suffix in SOURCE and not path.is_symlink() and path.is_file() and path.stat().st_size <= DIFF_LIMIT:
            diff += _git(root, "diff", "--binary", "--no-index", "--", os.devnull, name, expected=(0, 1))
    return diff


@contextmanager
def session(run_dir: Path, about: dict[str, Any], files: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Records a session in manifest.json: how it began, and how it ended.

    Args:
      run_dir: locked by this process.
      about: what is known at the start, as JSON.
      files: the other files of the run directory; SHA256SUMS covers those that exist at the end.

    Yields:
      The session; entries that the caller adds are written at its end.
    """
    path = run_dir / "manifest.json"
    sessions = read_manifest(run_dir)["sessions"] if path.exists() else []
    # A session that is still "running" does not hold the lock anymore.
    sessions = [{**s, "state": "killed"} if s["state"] == "running" else s for s in sessions]
    code, diff = source_code()
    name = f"session-{len(sessions)}.diff"
    this: dict[str, Any] = {"state": "running", "command": sys.orig_argv, "started": _now(), **code, **about}
    if diff:
        write_file(run_dir / name, diff)
        this |= {"diff": name, "diff_sha256": _sha256(diff)}
    begin = time.perf_counter()
    content = {"format": FORMAT, "sessions": [*sessions, this]}
    (run_dir / SUMS).unlink(missing_ok=True)  # It describes a state that this session changes.
    write_json(path, content)

    def end(**outcome: str) -> None:
        this.update(outcome, ended=_now(), seconds=time.perf_counter() - begin)
        write_json(path, content)
        diffs = [path.name for path in run_dir.glob("session-*.diff")]
        write_sums(run_dir, [name for name in (*files, *diffs, path.name) if (run_dir / name).exists()])

    try:
        yield this
    except BaseException as error:
        with suppress(OSError):  # On a full disk; the manifest keeps saying "running".
            state = "interrupted" if isinstance(error, Interrupted) else "failed"
            end(state=state, error=str(error) or type(error).__name__)
        raise
    end(state="finished")


def is_closed(run_dir: Path) -> bool:
    """Returns whether the last session finished: a kill can come between result.json and the checksums."""
    finished = (run_dir / "manifest.json").exists() and read_manifest(run_dir)["sessions"][-1]["state"] == "finished"
    return finished and (run_dir / SUMS).exists()


def read_manifest(run_dir: Path) -> dict[str, Any]:
    """Reads manifest.json.

    Raises:
      UserError: it is missing, damaged, or of another format.
    """
    path = run_dir / "manifest.json"
    content = read_json(path)
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT or not isinstance(content.get("sessions"), list) or not content["sessions"]:
        raise UserError(
            f"{path} must be of format {FORMAT}, got {found}: another version of cnnjax wrote it. Use that version, or "
            "train in another directory."
        )
    return content


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns what determines the bits and differs between two sessions: {dotted name: (old, new)}."""
    return changes(*({name: session.get(name) for name in DECISIVE} for session in (old, new)))


def environment_changes(sessions: list[dict[str, Any]], environment: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns what determines the bits and differs between `sessions` and one that would begin now."""
    code, diff = source_code()
    now = environment | code | ({"diff_sha256": _sha256(diff)} if diff else {})
    found = {}
    for session in sessions:
        found |= differences(session, now)
    return found


def changes_since_last_session(run_dir: Path, environment: dict[str, Any]) -> list[str]:
    """Returns the lines to show before a run resumes in another environment, or with a clock that went back."""
    if not (run_dir / "manifest.json").exists():
        return []
    last = read_manifest(run_dir)["sessions"][-1]
    lines = [f"{name} was {old} and is {new}" for name, (old, new) in environment_changes([last], environment).items()]
    if lines:
        lines = [f"This run resumes in another environment, so its bits may differ: {'; '.join(lines)}."]
    before = last.get("ended") or last["started"]
    if before > _now():
        lines.append(
            f"The clock says {_now()}, before the last session of this run ({before}). The dates in manifest.json are "
            "those of the clock; durations are not affected."
        )
    return lines


def _versions() -> dict[str, str]:
    found = {}
    for name in (*PACKAGES, *ACCELERATOR_PACKAGES):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _git(folder: Path, *arguments: str, expected: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, check=False)
    if done.returncode not in expected:
        raise subprocess.CalledProcessError(done.returncode, "git")
    return done.stdout.decode(errors="surrogateescape")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
