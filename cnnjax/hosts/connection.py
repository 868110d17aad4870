"""Connects the processes of a run through `jax.distributed`."""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import jax
from jax._src import clusters, distributed, xla_bridge
from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

from cnnjax.errors import UserError, check, describe
from cnnjax.hosts.aborts import on_abort
from cnnjax.hosts.launch import Launch, plan_launch, split_address
from cnnjax.hosts.meeting import meet
from cnnjax.hosts.watch import REQUEUE, Watch, exit_now

T = TypeVar("T")

_FOREVER = 7 * 24 * 3600 * 1000  # Milliseconds. The watcher ends a process that would wait for a lost one.


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Hosts:
    """The processes of a run. All of them call the same methods in the same order.

    Attributes:
      index: the number of this process.
      count: the number of processes.
      names: the host name of each process.
      leads: whether this is process 0, which alone writes logs and reports.
    """

    def __init__(self, index: int = 0, names: tuple[str, ...] = ("localhost",), watch: Watch | None = None):
        self.index = index
        self.count = len(names)
        self.names = names
        self.leads = index == 0
        self._watch = watch
        self._client: Any = None
        self._prefix = ""
        self._owned = False
        self._stopped = self._closed = False
        self._shared = self._barriers = 0

    def share(self, compute: Callable[[], T]) -> T:
        """Returns the result of `compute`, which process 0 alone calls, in all processes.

        An exception of `compute` is raised in process 0; when it leaves the context, the other processes end.

        Args:
          compute: returns what JSON can represent; tuples arrive as lists.
        """
        if self._watch is None:
            return compute()
        key, self._shared = f"{self._prefix}shared/{self._shared}", self._shared + 1
        if self.leads:
            value = compute()
            self._client.key_value_set(key, json.dumps(value))
            return json.loads(json.dumps(value))
        return json.loads(self._client.blocking_key_value_get(key, _FOREVER))

    def barrier(self, name: str) -> None:
        """Waits until all processes have called this."""
        if self._watch is None:
            return
        self._barriers += 1
        self._client.wait_at_barrier(f"{self._prefix}barrier/{self._barriers}/{name}", _FOREVER)

    def agreed(self, step: int, *, stop: int | None, save: bool) -> tuple[int | None, bool]:
        """Returns the signal to stop for, or None, and whether to save: the same in all processes at the same step.

        Call it at each boundary between steps. It takes microseconds unless something is asked for; then the processes
        need a few tenths of a second to choose a boundary, often a later one than this.

        Args:
          step: the number of steps so far.
          stop: the signal that this process has received, or None.
          save: whether a checkpoint is due; process 0 decides.
        """
        if self._watch is None:
            return stop, save
        answer = self._watch.agreement.arrive(stop, save and self.leads)
        self._stopped |= answer[0] is not None
        return answer

    def explain(self, error: BaseException) -> None:
        """Waits for the reason of an error that may come from the loss of another process; `close` calls it.

        If one is lost or has ended, this process ends with a message that names it; else it returns after some seconds.
        """
        # A collective of XLA raises JaxRuntimeError, or ValueError if it is dispatched from Python.
        text = str(error).lower()
        if (
            self._watch is not None
            and isinstance(error, (RuntimeError, ValueError))
            and any(
                word in text
                for word in ("gloo", "nccl", "connection", "socket", "peer", "unavailable", "grpc", "aborted")
            )
        ):
            self._watch.explain()

    def close(self, error: BaseException | None = None) -> None:
        """Leaves together with the other processes; if there is an error, tells them why they have to end, instead."""
        if self._closed:
            return
        self._closed = True
        together = error is None or (self._stopped and isinstance(error, KeyboardInterrupt))
        if self._watch is not None:
            if together:
                self._watch.leave()
            elif error is not None:
                self.explain(error)
                self._watch.tell(*_reason(error))
        if not together and self.count > 1:
            _abandon()
        elif self._owned:
            jax.distributed.shutdown()

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Closes with the exception that leaves the context, but not without one."""
        try:
            yield
        except BaseException as error:
            self.close(error)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close(error)


_hosts: Hosts | None = None  # Of this process, like `jax.distributed` itself.
_num_opened = 0


def alone() -> Hosts:
    """Returns a single process."""
    return Hosts()


def current() -> Hosts:
    """Returns the processes that `connect`, or the user's own `jax.distributed.initialize`, has connected."""
    global _hosts  # noqa: PLW0603
    if _hosts is not None and not _hosts._closed:
        return _hosts
    if not jax.distributed.is_initialized():
        return alone()
    _hosts = _open(host_timeout=60.0)
    _close_at_exit()
    return _hosts


def connect(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    host_timeout: float = 60.0,
    connect_timeout: float = 120.0,
    say: Callable[[str], None] = _say,
) -> Hosts:
    """Connects this process to the others of its run, if there are any; call it before anything else of jax.

    Arguments that are None come from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or else from a
    scheduler that has started several processes: Open MPI, Slurm (a step of several tasks), Cloud TPU. Nothing happens
    if none of them says anything.

    Example:
      >>> with connect() as hosts:
      ...     print(hosts.index, hosts.count)
      0 1

    Args:
      coordinator: HOST:PORT, where process 0 listens.
      num_processes: the number of processes. A single one connects, too, and then sums like several ones.
      process_id: the number of this process, from 0.
      host_timeout: seconds of silence after which a process counts as dead, and the others stop.
      connect_timeout: seconds in which all processes must have started.
      say: receives messages.

    Raises:
      UserError: an argument is wrong or missing, or not all processes came.
    """
    global _hosts  # noqa: PLW0603
    check("host_timeout", "at least 1 second", host_timeout >= 1, host_timeout)
    check("connect_timeout", "positive", connect_timeout > 0, connect_timeout)
    if jax.distributed.is_initialized():
        check_same("num_processes", num_processes, distributed.global_state.num_processes)
        check_same("process_id", process_id, distributed.global_state.process_id)
        hosts = _hosts if _hosts is not None and not _hosts._closed else _open(host_timeout=host_timeout)
        _hosts = hosts
        return hosts
    launch = plan_launch(coordinator, num_processes, process_id, os.environ, tpu_vm=running_in_cloud_tpu_vm)
    if launch is None:
        return alone()
    if xla_bridge.backends_are_initialized():
        raise UserError(
            "`connect` must be called before jax uses a device, got a process whose devices are in use. Call it, or "
            "`jax.distributed.initialize`, first."
        )
    address, num_processes, process_id, local_device_ids = _complete(launch, connect_timeout)
    if num_processes > 1:
        meet(address, num_processes, process_id, timeout=connect_timeout, say=say)
    connecting = [True]
    sigterm = signal.getsignal(signal.SIGTERM)
    text = f"jax could not connect process {process_id} of {num_processes} at {address}, see above."
    on_abort(lambda: exit_now(text, REQUEUE) if connecting else None)
    jax.distributed.initialize(
        address,
        num_processes,
        process_id,
        local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=max(30, int(connect_timeout)),
        # Longer than what the watcher waits, which says who is lost; jax would abort the process.
        heartbeat_timeout_seconds=max(100, int(2 * host_timeout)),
        shutdown_timeout_seconds=max(30, int(host_timeout)),
    )
    connecting.clear()
    if sigterm is not None:
        signal.signal(signal.SIGTERM, sigterm)  # jax's preemption service has replaced it.
    _hosts = _open(host_timeout=host_timeout)
    _hosts._owned = True
    return _hosts


def check_same(name: str, value: int | None, connected: int) -> None:
    """Raises a `UserError` if jax is connected with another value than that of an argument."""
    valid = value is None or value == connected
    check(name, f"{connected}, with which `jax.distributed` is initialized", valid, value)


def _complete(launch: Launch, timeout: float) -> tuple[str, int, int, Any]:
    """Asks jax's detector of the scheduler for what is missing."""
    address, num_processes, process_id, scheduler = launch
    local_device_ids = None
    if scheduler is not None and scheduler.method:
        address, num_processes, process_id, local_device_ids = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            address, num_processes, process_id, None, scheduler.method, int(timeout)
        )
        local_device_ids = None if scheduler.whole_host else local_device_ids
    if address is None or num_processes is None or process_id is None:
        raise UserError(
            f"`coordinator`, `num_processes` and `process_id` must be given: jax did not recognize the scheduler, got "
            f"{address}, {num_processes} and {process_id}."
        )
    if "JAX_LOCAL_DEVICE_IDS" in os.environ:
        local_device_ids = None  # jax reads it.
    return address, num_processes, process_id, local_device_ids


def _open(*, host_timeout: float) -> Hosts:
    """Starts to watch the processes that jax has connected."""
    global _num_opened
    state = distributed.global_state
    index, count, client = state.process_id, state.num_processes, state.client
    if count == 1:
        return Hosts(names=(_host_name(),))
    assert client is not None
    prefix, _num_opened = f"cnnjax/{_num_opened}/", _num_opened + 1
    client.key_value_set(f"{prefix}name/{index:06}", _host_name())
    client.wait_at_barrier(f"{prefix}names", int(1000 * max(120, host_timeout)))
    names = tuple(name for _, name in sorted(client.key_value_dir_get(f"{prefix}name/")))
    watch = Watch(client, index, names, timeout=host_timeout, prefix=prefix)
    hosts = Hosts(index, names, watch)
    hosts._client, hosts._prefix = client, prefix
    jax.devices()  # It waits for all processes: none must wait for another elsewhere meanwhile.
    if index:
        address = state.coordinator_address or ""
        on_abort(lambda: _on_abort(watch, address))
    return hosts


def _on_abort(watch: Watch, coordinator: str) -> None:
    """Decides in a thread that aborts: if process 0 is gone, ends this process with a message."""
    if threading.current_thread() is threading.main_thread():
        return
    try:
        socket.create_connection(split_address(coordinator), timeout=2).close()
    except OSError:
        if not watch.ending:
            watch.lose(0)
        while True:  # The main thread ends the process.
            time.sleep(3600)


def _host_name() -> str:
    return socket.gethostname()


def _reason(error: BaseException | None) -> tuple[str, int]:
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted.", REQUEUE
    if isinstance(error, SystemExit):
        return "it has called sys.exit.", error.code if isinstance(error.code, int) else 1
    return describe(error) if error is not None else "", 1


def _abandon() -> None:
    """Lets jax forget its connection, which aborts the process if it is closed without the other processes."""
    import ctypes

    state = distributed.global_state
    for part in (state.preemption_sync_manager, state.client, state.service):
        if part is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(part))  # Its destructor closes it.
    state.preemption_sync_manager = state.client = state.service = None


def _close_at_exit() -> None:
    """Leaves at the end of a program that has called `jax.distributed.initialize` itself."""
    import atexit

    def close() -> None:
        if _hosts is not None:
            _hosts.close(getattr(sys, "last_value", None))

    atexit.register(close)  # It is called before jax's own, which was registered earlier.
