"""The run directory: config.json, metrics.jsonl and timing.jsonl (one line per epoch), checkpoints/, manifest.json (see
`manifest`) and, at the end, result.json. Its content is data; none of it is executed.
"""

import errno
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cnnjax.config import Config
from cnnjax.errors import UserError, option
from cnnjax.files import (
    SUMS,
    changes,
    check_local,
    check_sums,
    file_changes,
    move_into,
    open_regular,
    read_json,
    write_json,
)
from cnnjax.hosts import Hosts, alone
from cnnjax.process.console import Report
from cnnjax.process.signals import Stop, stop_signals
from cnnjax.runs import manifest
from cnnjax.runs.checkpoints import Checkpoints, check_characters
from cnnjax.runs.codec import encode
from cnnjax.runs.records import Record, read_record, write_record
from cnnjax.runs.recovery import recover, usable_step
from cnnjax.runs.schema import DataFacts, EncodedConfig, Result
from cnnjax.runs.source import NO_SOURCE, SourceCode, source_of

FILES = ("config.json", "metrics.jsonl", "timing.jsonl", "result.json")  # Besides manifest.json and its diffs.
LOCK = "lock"
# What a kill, or a session that fails, leaves before config.json is written.
_BEGUN = rf"{LOCK}|manifest\.json|{SUMS}|session-\d+\.diff|.*\.partial"


@dataclass
class OpenRun:
    """A run directory that this process has locked.

    Attributes:
      run_dir: the directory.
      config: the configuration of the run.
      report: receives messages and metrics.
      stop: the signal that asks to stop, if one arrived.
      code: what trains, as it was when the directory was opened.
      hosts: the processes that train it. Process 0 alone has locked the directory, and writes all but checkpoints.
      checkpoints: those of the run, after `begin`.
    """

    run_dir: Path
    config: Config
    report: Report
    stop: Stop
    code: SourceCode = NO_SOURCE
    hosts: Hosts = field(default_factory=alone)
    checkpoints: Checkpoints = field(init=False)
    _stack: ExitStack = field(default_factory=ExitStack)
    _lock: BufferedReader | None = None  # In process 0.

    def check_in_place(self) -> None:
        """Checks that the run directory is still the one that this process has locked; process 0 alone does.

        Otherwise a part of the run would be written in a new directory.

        Raises:
          UserError: it was moved, deleted or replaced.
        """
        if self._lock is None or _is_at(self._lock, self.run_dir / LOCK):
            return
        raise UserError(
            f"{self.run_dir} must stay in place during training, but it, or its file {LOCK}, was moved, deleted or "
            f"replaced. If the directory was moved, resume the run there: {option('run_dir', 'DIR')}, "
            f"{option('resume')}."
        )

    def finished(self) -> Result | None:
        """Returns the content of result.json if nothing is left to do.

        A damaged result.json is moved to damaged/: the last checkpoint gives the same one.
        """
        return self.hosts.share(self._finished)

    def _finished(self) -> Result | None:
        path = self.run_dir / "result.json"
        if not path.exists():
            return None
        try:
            result = read_json(path, Result)
        except UserError:
            moved = move_into(self.run_dir / "damaged", path)
            self.report.say(f"{path} was damaged. It has been moved to {moved}, and is computed again.")
            return None
        status = check_sums(self.run_dir)
        intact = all(status.get(name) == "ok" for name in FILES)  # A kill can come before the checksums.
        if result["num_epochs"] < self.config.num_epochs or not intact or not manifest.is_finished(self.run_dir):
            return None
        if edited := file_changes(read_record(self.run_dir).files, self.code.facts["files"]):
            self.report.say(
                f"{', '.join(edited)} changed after this run had finished, so this is its old result. To train the new "
                f"code, choose another directory: {option('run_dir', 'DIR')}."
            )
        saved = manifest.read_manifest(self.run_dir)["sessions"][-1].get("checkpoints", [])
        if lost := [step for step in saved if not (self.run_dir / "checkpoints" / str(step)).exists()]:
            self.report.say(
                f"{self.run_dir} has a result, but the checkpoints of steps {', '.join(map(str, lost))} are missing. "
                "`eval` and `predict` need the best one. `cnnjax reproduce` trains it again."
            )
        return result

    def begin(self, facts: DataFacts, environment: dict[str, Any]) -> None:
        """Begins a session: checks the data, writes manifest.json, and sets damaged checkpoints aside.

        From here on a signal waits until the loop looks at `stop`: inside Orbax it would turn into a failure. When the
        context of `open_run` ends, the manifest records how the session ended.

        Raises:
          UserError: the directory holds a run on other data, or a finished one without checkpoints.
        """
        self.hosts.check_same("data_dir", "the same data in all processes", asdict(facts))
        check_data(self.run_dir, facts)
        if self.hosts.leads:
            self._check_longer()
        self.hosts.barrier("the data are the same")  # Otherwise process 0 would write.
        self._stack.enter_context(self.stop.held())
        session = self._begin_session(environment | self.code.facts) if self.hosts.leads else {}
        self.hosts.barrier("the session has begun")
        self.checkpoints = Checkpoints(self.run_dir / "checkpoints", self.hosts, self.check_in_place)
        if self.hosts.leads:
            self._stack.callback(lambda: session.update(checkpoints=self.checkpoints.steps()))
            session["resumed_from"] = self.checkpoints.latest()
        self._stack.enter_context(closing(self.checkpoints))

    def _check_longer(self) -> None:
        """Checks that a finished run that is trained longer has a checkpoint to continue from.

        Otherwise training would start from scratch, and remove its result.
        """
        if not (self.run_dir / "result.json").exists():
            return
        longer = read_record(self.run_dir).config["num_epochs"] < self.config.num_epochs
        if longer and usable_step(self.run_dir / "checkpoints") is None:
            raise UserError(
                f"{self.run_dir} must have its checkpoints to be trained longer, got none that can be used. Train in "
                f"another directory: {option('run_dir', 'DIR')}."
            )

    def _begin_session(self, environment: dict[str, Any]) -> dict[str, Any]:
        self.check_in_place()
        for line in (*manifest.changes_since_last_session(self.run_dir, environment), *self.code.warnings()):
            self.report.say(line)
        about = environment | {"seed": self.config.seed, "resumed_from": None}
        session = self._stack.enter_context(
            manifest.session(self.run_dir, about, FILES, self.code.diff, self.check_in_place)
        )
        recover(self.run_dir / "checkpoints", self.report.say)
        return session

    def write_config(self, facts: DataFacts, *, only_new: bool = False) -> None:
        """Writes config.json; if it is not `only_new`, removes the result of a shorter run.

        Call it without `only_new` once nothing can be refused anymore.
        """
        if self.hosts.leads and not (only_new and (self.run_dir / "config.json").exists()):
            self.check_in_place()
            write_record(self.run_dir, Record(encode(self.config), facts, self.code.facts["files"]))

    def write_result(self, result: Result) -> None:
        """Writes result.json, in process 0."""
        if self.hosts.leads:
            self.check_in_place()
            write_json(self.run_dir / "result.json", result)


@contextmanager
def open_run(
    run_dir: Path,
    config: Config,
    report: Report,
    *,
    resume: bool,
    stop: Stop | None = None,
    code: SourceCode | None = None,
    hosts: Hosts | None = None,
) -> Iterator[OpenRun]:
    """Locks a run directory, which is created, and turns SIGINT, SIGTERM and SIGHUP into `Interrupted`.

    The system releases the lock when the process ends, however it ends. A directory that stayed empty is removed.

    Args:
      stop: receives signals, for a caller that trains in several threads; None: this context handles them.
      code: what trains, if the caller has recorded it.
      hosts: the processes that train the run; this one alone if None.

    Raises:
      UserError: another process trains in the directory, it cannot be written, a part of the configuration is
        missing, or `check_run` fails.
    """
    check_path(run_dir)
    hosts, encoded = hosts or alone(), encode(config)  # Nothing is written for a configuration that cannot be.
    for name, value in (("run_dir", str(run_dir.absolute())), ("resume", resume), ("config", encoded)):
        hosts.check_same(name, "the same in all processes", value)
    hosts.barrier("the run is the same")  # Otherwise process 0 would create a directory.
    if not hosts.leads:
        with ExitStack() as stack:
            stop = stop or stack.enter_context(stop_signals())
            hosts.barrier("the run directory is open")
            if not (run_dir / LOCK).exists():
                raise UserError(
                    f"`run_dir` must be on a file system that all processes share, got {run_dir.absolute()}, which "
                    f"process {hosts.index} on {hosts.names[hosts.index]} does not see. Choose another: "
                    f"{option('run_dir', 'DIR')}."
                )
            config = _with_recorded_name(run_dir, config)
            yield OpenRun(run_dir, config, report, stop, code or NO_SOURCE, hosts, _stack=stack)
        return
    if run_dir.is_dir():
        check_run(run_dir, config, resume)
    lock = FileLock(run_dir / LOCK, timeout=1, fallback_to_soft=False)  # `is_locked` holds it for an instant.
    new = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
    is_new = not (run_dir / LOCK).exists()
    with ExitStack() as stack:
        stack.callback(_remove_empty, new)
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            file = stack.enter_context(open_regular(run_dir / LOCK))
        except (OSError, NotImplementedError) as error:
            raise UserError(
                f"`run_dir` {run_dir} {_why_not(error)}. Choose another: {option('run_dir', 'DIR')}."
            ) from error
        release = partial(_release, lock, file, run_dir, is_new)
        stack.callback(release)
        stack.enter_context(hosts.before_end(lambda: (release(), _remove_empty(new))))
        stop = stop or stack.enter_context(stop_signals())
        check_run(run_dir, config, resume)
        hosts.barrier("the run directory is open")
        config = _with_recorded_name(run_dir, config)
        yield OpenRun(
            run_dir, config, report, stop, code or source_of(config, run_dir), hosts, _stack=stack, _lock=file
        )


def _with_recorded_name(run_dir: Path, config: Config) -> Config:
    """Returns the configuration with the name that a run began with: no bit depends on it."""
    if not (run_dir / "config.json").exists():
        return config
    return replace(config, name=read_record(run_dir).config["name"])


def check_path(run_dir: Path) -> None:
    """Checks that a run can be written to, and read from, a path.

    Raises:
      UserError: it is a URL or a file, or Orbax could not read its checkpoints there.
    """
    check_local("run_dir", run_dir)
    if not run_dir.is_dir() and run_dir.exists():
        raise UserError(f"`run_dir` must be a directory, got the file {run_dir}.")
    check_characters("run_dir", run_dir)


def _why_not(error: Exception) -> str:
    if isinstance(error, Timeout):
        return "is in use by another process"
    if isinstance(error, NotImplementedError) or getattr(error, "errno", None) in (errno.ENOLCK, errno.EOPNOTSUPP):
        return f"must be on a file system that can lock files, against a second process in the same run, got: {error}"
    return f"cannot be written ({error})"


def _release(lock: FileLock, file: BufferedReader, run_dir: Path, is_new: bool) -> None:
    if is_new and not (run_dir / "manifest.json").exists() and _is_at(file, run_dir / LOCK):
        (run_dir / LOCK).unlink(missing_ok=True)  # The run has not begun: nothing remains of it.
    lock.release()


def _is_at(file: BufferedReader, path: Path) -> bool:
    """Returns whether `path` is that of an open file, and not of another one that has replaced it."""
    try:
        return not file.closed and os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ELOOP):
            raise
        return False


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):  # It is not empty, or was never created.
        for folder in folders:
            folder.rmdir()


def is_locked(run_dir: Path) -> bool:
    """Returns whether a process trains in the directory now."""
    try:
        with open_regular(run_dir / LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # Shared: it works in a directory that is not ours.
    except BlockingIOError:
        return True
    except OSError:  # There is no lock, or the file system has none.
        return False
    return False


def check_run(run_dir: Path, config: Config, resume: bool) -> None:
    """Checks that a run may start, or resume, in `run_dir`.

    Raises:
      UserError: the directory is in use and `resume` is off, or holds a run of another configuration or version.
    """
    if not os.path.lexists(run_dir / "config.json"):
        others = [path.name for path in run_dir.iterdir() if not re.fullmatch(_BEGUN, path.name)]
        if others:
            raise UserError(
                f"`run_dir` must be empty or hold a run with a config.json, got {run_dir} with {min(others)}. Choose "
                f"another: {option('run_dir', 'DIR')}."
            )
        return
    if (run_dir / "checkpoints").exists() and not os.path.lexists(run_dir / "manifest.json"):
        raise UserError(
            f"{run_dir} must have a manifest.json, got none: another version of cnnjax wrote it. Use that version, or "
            f"choose another directory: {option('run_dir', 'DIR')}."
        )
    saved = read_record(run_dir).config
    changed = changes(saved | {"name": config.name}, encode(config))  # The recorded name is kept.
    if _is_longer(config, saved):
        changed = {}
    listed = "; ".join(f"`{name}` is {old!r} there and {new!r} here" for name, (old, new) in changed.items())
    if not resume:
        hint = (
            f"It holds another configuration: {listed}. Choose"
            if changed
            else f"Resume that run, {option('resume')}, or choose"
        )
        raise UserError(f"`run_dir` {run_dir} exists already. {hint} another: {option('run_dir', 'DIR')}.")
    if changed:
        raise UserError(
            f"{run_dir} must be resumed with its own configuration: {listed}. Pass the same values, or choose another "
            f"directory: {option('run_dir', 'DIR')}."
        )


def _is_longer(config: Config, saved: EncodedConfig) -> bool:
    """Returns whether `config` is `saved` with more epochs, none of whose steps depends on their number."""
    depends = config.optim.depends_on_length() or config.augment.depends_on_length()
    if depends or not config.num_epochs > saved["num_epochs"]:
        return False
    return encode(replace(config, num_epochs=saved["num_epochs"], name=saved["name"])) == saved


def check_data(run_dir: Path, facts: DataFacts) -> None:
    """Checks that an existing run was on these data.

    Raises:
      UserError: it was on other data.
    """
    if (run_dir / "config.json").exists():
        ours = {"version": "", "source": ""}  # The same data may come from elsewhere.
        if changed := changes(read_record(run_dir).data.decisive() | ours, facts.decisive() | ours):
            if changed.keys() == {"weights_sha256"}:
                old, new = changed["weights_sha256"]
                raise UserError(
                    f"`model.weights` must be the file that {run_dir} began with, SHA-256 {old}, got {new}. Restore it."
                )
            listed = "; ".join(f"`{name}` is {old!r} there and {new!r} here" for name, (old, new) in changed.items())
            raise UserError(
                f"`data_dir` must hold the data that {run_dir} was trained on, but in version {facts.version} from "
                f"{facts.source}, {listed}. Pass the same {option('data_dir', 'DIR')}, or restore config.json."
            )
