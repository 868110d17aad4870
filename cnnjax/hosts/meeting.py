"""The meeting of all processes at the coordinator's address, before jax connects them.

jax aborts a process that cannot connect in time, and does not say which are missing. So process 0 first listens at the
address itself, until each process has said its number.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing, suppress
from typing import Any, NoReturn

from cnnjax.errors import MissingProcessError, UserError
from cnnjax.hosts.launch import split_address

_PATIENCE = 5.0  # Seconds, for one connection to say its line.


def meet(address: str, count: int, index: int, *, timeout: float, say: Callable[[str], None]) -> None:
    """Returns once all processes have met.

    Args:
      address: HOST:PORT of process 0.
      count: the number of processes.
      index: the number of this one.
      timeout: seconds.
      say: receives a line if the others are late.

    Raises:
      UserError: process 0 cannot be reached or cannot listen, other processes are missing, or two have one number.
    """
    if index == 0:
        _listen(address, count, timeout, say)
    else:
        _arrive(address, count, index, timeout=timeout, say=say)


def _listen(address: str, count: int, timeout: float, say: Callable[[str], None]) -> None:
    deadline = time.monotonic() + timeout
    late = time.monotonic() + _PATIENCE
    met: dict[int, socket.socket] = {}
    with ExitStack() as stack:
        try:
            server = stack.enter_context(_open_server(address))
        except OSError as error:
            raise UserError(
                f"`coordinator` must be an address where process 0 can listen, got {address} ({error.strerror}). "
                "Choose another port."
            ) from error
        while len(met) < count - 1:
            missing = ", ".join(str(i) for i in range(1, count) if i not in met)
            server.settimeout(min(1, max(deadline - time.monotonic(), 0.001)))
            try:
                connection = stack.enter_context(closing(server.accept()[0]))
            except TimeoutError:
                if time.monotonic() > deadline:
                    _refuse(
                        met.values(),
                        f"All {count} processes must meet at {address} within {timeout:g} s, but these did not come: "
                        f"{missing}. Start them with the same `coordinator` and `num_processes`; their logs may say "
                        "why they failed.",
                        MissingProcessError,
                    )
                if time.monotonic() > late:
                    say(f"Waiting at {address} for the processes {missing}.")
                    late = deadline
                continue
            connection.settimeout(_PATIENCE)
            hello = _receive(connection)
            if hello is None or "index" not in hello:  # Not one of ours.
                continue
            other = hello["index"]
            met = {i: earlier for i, earlier in met.items() if not _has_gone(earlier)}
            if hello["count"] != count:
                _refuse(
                    [*met.values(), connection],
                    f"`num_processes` must be the same in all processes, got {count} in process 0 and "
                    f"{hello['count']} in process {other}.",
                )
            if other in met or other == 0:
                _refuse(
                    [*met.values(), connection],
                    f"`process_id` must be different in all processes, got {other} twice.",
                )
            met[other] = connection
        _answer(met.values(), {"met": count})


def _refuse(connections: Iterable[socket.socket], text: str, error: type[UserError] = UserError) -> NoReturn:
    _answer(connections, {"error": text, "late": error is MissingProcessError})
    raise error(text)


def _answer(connections: Iterable[socket.socket], line: dict[str, Any]) -> None:
    for connection in connections:
        connection.settimeout(_PATIENCE)
        _send(connection, line)
        with suppress(OSError):  # The other side closes first, or the port would stay occupied.
            connection.recv(1)


def _arrive(address: str, count: int, index: int, *, timeout: float, say: Callable[[str], None]) -> None:
    deadline, late, reason = time.monotonic() + timeout, time.monotonic() + _PATIENCE, ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(split_address(address), timeout=min(left, _PATIENCE)) as connection:
                _send(connection, {"index": index, "count": count})
                connection.settimeout(left + 1)  # Process 0 waits for the others.
                answer = _receive(connection)
            if answer is not None and "error" in answer:
                raise (MissingProcessError if answer.get("late") else UserError)(answer["error"])
            if answer is not None and "met" in answer:
                return
            reason = "what answers there is not process 0 of this run, or it has ended"
        except OSError as error:
            reason = error.strerror or "it did not answer in time"
        if time.monotonic() > late:
            say(f"Waiting for process 0 at {address}.")
            late = deadline
        time.sleep(min(0.2, max(left, 0)))
    raise MissingProcessError(
        f"`coordinator` must be an address where process 0 listens, got {address}, which process {index} could not "
        f"reach within {timeout:g} s ({reason}). Check the address, and that process 0 is running."
    )


def _open_server(address: str) -> socket.socket:
    bound = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")  # Where jax will listen afterwards.
    host, port = split_address(bound or address)
    if bound:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _has_gone(connection: socket.socket) -> bool:
    connection.settimeout(0)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _send(connection: socket.socket, line: dict[str, Any]) -> None:
    with suppress(OSError):  # It has gone; whoever waits for it will notice.
        connection.sendall(json.dumps(line).encode() + b"\n")


def _receive(connection: socket.socket) -> dict[str, Any] | None:
    """Returns the next line, or None if there is none that we wrote."""
    text = b""
    try:
        while not text.endswith(b"\n") and len(text) < 10_000:
            if not (part := connection.recv(4096)):
                break
            text += part
        line = json.loads(text)
    except (OSError, ValueError):
        return None
    return line if isinstance(line, dict) else None
