"""What happens instead of the abort of a process when jax's client loses its coordinator.

jax's client ends the process by SIGABRT as soon as its connection to process 0 closes, or if it cannot connect in time.
It has a callback for this, but cannot call one of Python (jaxlib 0.10.2 to 0.12.0). A handler of the C library is
called by the thread that aborts; one of Python's `signal` module would be called by the main thread, which may be
waiting for another process.
"""

import atexit
import ctypes
import os
import signal
from collections.abc import Callable

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
_handlers: list[object] = []  # C has no references.


def on_abort(decide: Callable[[], None]) -> None:
    """Calls `decide` in a thread that aborts; the abort continues if it returns."""
    if os.name != "posix":
        return
    libc = _libc()

    @_Handler
    def handle(signum: int) -> None:
        try:
            decide()
        finally:
            libc.signal(signal.SIGABRT, None)  # SIG_DFL

    if not _handlers:
        atexit.register(_park_aborts)
    _handlers.append(handle)
    libc.signal(signal.SIGABRT, ctypes.cast(handle, ctypes.c_void_p))


def _park_aborts() -> None:
    """Makes threads that abort wait for the main thread to end the process, without Python, which ends before it."""
    libc = _libc()
    libc.signal(signal.SIGABRT, ctypes.cast(libc.pause, ctypes.c_void_p))


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    return libc
