"""manifest.json: the environment of a run, and the history of its sessions, each from a start to a stop."""

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cnnjax.compiler import compiler_options
from cnnjax.errors import UserError
from cnnjax.files import (
    SUMS,
    file_changes,
    file_sha256,
    read_json,
    show,
    write_file,
    write_json,
    write_sums,
)
from cnnjax.onednn.library import kernels
from cnnjax.process.settings import num_cores, processor
from cnnjax.process.signals import Interrupted
from cnnjax.runs.schema import FORMAT, Manifest, Session, Versioned

PACKAGES = (
    "cnnjax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tensorflow-datasets",
    "numpy",
    "pillow",
    "scipy",
)
ACCELERATOR_PACKAGES = ("jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "libtpu")
# What determines the bits, besides configuration and data.
CODE = ("commit", "package_commit", "diff_sha256", "files")
MACHINE = ("versions", "device", "num_devices", "mesh", "stream", "processor", "cores", "driver", "kernels")
DECISIVE = (*CODE, *MACHINE, "flags", "compiler_options")


def environment(
    devices: Sequence[Any], mesh: str | None = None, hosts: Sequence[str] = (), *, stream: bool | None = None
) -> dict[str, Any]:
    """Returns what the bits of a run depend on besides its configuration and data, as JSON.

    Args:
      devices: those that share a batch.
      mesh: how they share the state, if they do not hold copies.
      hosts: the host name of each process.
      stream: whether images are read while training, which affects the bits only on an accelerator.
    """
    first = devices[0]
    nvidia = Path("/proc/driver/nvidia/version")
    flags = {
        name: value
        for name, value in sorted(os.environ.items())
        if name == "XLA_FLAGS" or name.startswith(("JAX_", "ONEDNN_", "DNNL_"))
    }
    # They change no bits.
    harmless = ("JAX_COMPILATION_CACHE_DIR", "JAX_LOG_COMPILES", "ONEDNN_VERBOSE", "DNNL_VERBOSE")
    connection = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    for name in (*harmless, *connection):
        flags.pop(name, None)
    driver = [first.client.platform_version, nvidia.read_text().split("\n")[0] if nvidia.exists() else ""]
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "device": first.device_kind if first.platform == "cpu" else f"{first.platform}, {first.device_kind}",
        "num_devices": len(devices),
        "mesh": mesh,
        "stream": None if first.platform == "cpu" else stream,
        "hosts": list(hosts) if len(hosts) > 1 else None,
        "processor": processor(),
        "cores": num_cores(),
        "driver": " ".join(driver),
        "kernels": kernels().name if first.platform == "cpu" else "XLA",
        "flags": flags,
        "compiler_options": compiler_options(),
        "host": platform.node(),
        "system": platform.platform(),
    }


@contextmanager
def session(
    run_dir: Path,
    about: dict[str, Any],
    files: tuple[str, ...],
    diff: bytes = b"",
    check_in_place: Callable[[], object] = lambda: None,
) -> Iterator[dict[str, Any]]:
    """Records a session in manifest.json: how it began, and how it ended.

    A session of a finished run that fails before it changes anything is not recorded: the run stays finished.

    Args:
      run_dir: locked by this process.
      about: what is known at the start, as JSON.
      files: the other files of the run directory; SHA256SUMS covers those that exist at the end.
      diff: of the source code, see `source.source_code`.
      check_in_place: raises a `UserError` if the run directory was moved or deleted; nothing is written then.

    Yields:
      The session; entries that the caller adds are written at its end.
    """
    path = run_dir / "manifest.json"
    sessions = read_manifest(run_dir)["sessions"] if path.exists() else []
    # A session that is still "running" does not hold the lock anymore.
    sessions = [{**s, "state": "killed"} if s["state"] == "running" else s for s in sessions]
    this: dict[str, Any] = {"state": "running", "command": sys.orig_argv, "started": _now(), **about}
    if diff:
        this["diff"] = f"session-{len(sessions)}.diff"
        write_file(run_dir / this["diff"], diff)
    begin = time.perf_counter()
    before = {name: (run_dir / name).read_bytes() for name in (path.name, SUMS) if (run_dir / name).exists()}
    finished = _digests(run_dir, files) if path.exists() and is_finished(run_dir) else {}
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
        with suppress(OSError, UserError):  # On a full disk, say: the file keeps "running".
            check_in_place()
            if "result.json" in finished and finished == _digests(run_dir, files):  # The run stays finished.
                for name, old in before.items():
                    write_file(run_dir / name, old)
                if diff:
                    (run_dir / this["diff"]).unlink()
            else:
                state = "interrupted" if isinstance(error, Interrupted) else "failed"
                end(state=state, error=str(error) or type(error).__name__)
        raise
    check_in_place()
    end(state="finished")


def _digests(run_dir: Path, files: Sequence[str]) -> dict[str, str]:
    return {name: file_sha256(run_dir / name) for name in files if (run_dir / name).exists()}


def is_finished(run_dir: Path) -> bool:
    """Returns whether the last session finished."""
    return (run_dir / "manifest.json").exists() and read_manifest(run_dir)["sessions"][-1]["state"] == "finished"


def read_manifest(run_dir: Path) -> Manifest:
    """Reads manifest.json.

    Raises:
      UserError: it is missing, damaged, or of another format.
    """
    path = run_dir / "manifest.json"
    check_format(path)
    return read_json(path, Manifest)


def check_format(path: Path) -> None:
    """Raises a `UserError` if a manifest.json is damaged, or of another format."""
    found = read_json(path, Versioned, listed=False)["format"]
    if found != FORMAT:
        raise UserError(
            f"{path} must be of format {FORMAT}, got {found}: another version of cnnjax wrote it. Use that version, or "
            "train in another directory."
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns what determines the bits and differs between two sessions: {dotted name: (old, new)}."""
    # Runs of an earlier version did not record `stream`.
    recorded = [name for name in DECISIVE if name != "stream" or (name in old and name in new)]
    return file_changes(*({name: session.get(name) for name in recorded} for session in (old, new)), prefix="files.")


def environment_changes(sessions: list[Session], environment: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns what determines the bits and differs between `sessions` and `environment`, that of a new session."""
    found = {}
    for session in sessions:
        found |= differences(session, environment)
    return found


def changes_since_last_session(run_dir: Path, environment: dict[str, Any]) -> list[str]:
    """Returns the lines to show before a run resumes in another environment, or with a clock that went back."""
    if not (run_dir / "manifest.json").exists():
        return []
    last = read_manifest(run_dir)["sessions"][-1]
    changed = environment_changes([last], environment).items()
    lines = [f"{name} was {show(old)} and is {show(new)}" for name, (old, new) in changed]
    if lines:
        lines = [f"This run resumes in another environment, so its bits may differ: {'; '.join(lines)}."]
    old, new = last.get("on_epoch"), environment.get("on_epoch")
    if "on_epoch" in last and old != new:
        lines.append(
            f"`on_epoch`, which may stop the run, was {show(old)} and is {show(new)}: it may end in another epoch."
        )
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


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
