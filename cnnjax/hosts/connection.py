"""Connects the processes of a run through `jax.distributed`."""

import atexit
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
from jax._src import clusters, distributed, xla_bridge
from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

from cnnjax.errors import UserError, check
from cnnjax.hosts.aborts import on_abort
from cnnjax.hosts.group import Hosts
from cnnjax.hosts.launch import Launch, plan_launch, split_address
from cnnjax.hosts.meeting import meet
from cnnjax.hosts.watch import Watch, exit_now
from cnnjax.process.signals import REQUEUE


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


_hosts: Hosts | None = None  # One per process, like `jax.distributed` itself.
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
    check("host_timeout", "from 1 to 1e6 seconds", 1 <= host_timeout <= 1e6, host_timeout)
    check("connect_timeout", "positive, and at most 1e6 seconds", 0 < connect_timeout <= 1e6, connect_timeout)
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
    # On a CPU, programs that run at the same time would take each other's messages.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
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


def end_process(code: int) -> None:
    """Ends this process at once if it has told the others why it ends; else returns. Call it after the last message.

    While Python cleans up, process 0 might end, and jax would fill the terminal of this process.
    """
    if _hosts is not None and _hosts._watch is not None:
        _hosts._watch.exit(code)


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
    client: Any = state.client  # Not None if there are several processes.
    index, count = state.process_id, state.num_processes
    if count == 1:
        return Hosts(names=(_host_name(),))
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


def _close_at_exit() -> None:
    """Leaves at the end of a program that has called `jax.distributed.initialize` itself."""

    def close() -> None:
        if _hosts is not None:
            _hosts.close(getattr(sys, "last_value", None))

    atexit.register(close)  # It is called before jax's own, which was registered earlier.
