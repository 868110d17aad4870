"""One process of several, for the tests of cnnjax.hosts: passes boundaries with random delays and prints what it did.

Usage: hosts.py SCENARIO COORDINATOR NUM_PROCESSES PROCESS_ID HOST_TIMEOUT
"""

import json
import os
import random
import signal
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from cnnjax.errors import UserError
from cnnjax.hosts import connect, current

scenario, coordinator, num_processes, process_id, host_timeout = sys.argv[1:]
index = int(process_id)
delays = random.Random(index)


received = []  # Signals.
signal.signal(signal.SIGTERM, lambda signum, frame: received.append(signum))  # Before jax connects.


def report(**facts):
    print(json.dumps(facts), flush=True)


def train(hosts, *, reduces, seconds=60.0):
    """Passes boundaries until all agree to stop; with `reduces`, no process can be a step ahead of another."""
    report(ready=os.getpid())
    saved, last, step, end = [], time.monotonic(), 0, time.monotonic() + seconds
    while time.monotonic() < end:
        step += 3
        time.sleep(delays.random() * 0.02 if not reduces else 0.002)
        if reduces:
            multihost_utils.process_allgather(np.ones(3))
        due = time.monotonic() - last > 0.3 + 10 * index  # Process 0 decides.
        stop, save = hosts.agreed(stop=received[0] if received else None, save=due)
        if save:
            saved.append(step)
            last = time.monotonic()
        if stop is not None:
            report(step=step, stop=stop, saved=saved)
            raise KeyboardInterrupt("stopped")
    report(step=step, stop=None, saved=saved)


def run(hosts):
    if scenario == "agree":
        # Without collectives processes are far apart: they reach the boundary late, but it is the same.
        train(hosts, reduces=False)
    elif scenario == "reduce":
        train(hosts, reduces=True)
    elif scenario == "share":
        value = hosts.share(lambda: {"from": index, "list": (1, 2.5, None)})
        hosts.barrier("first")
        total = multihost_utils.process_allgather(np.array([index + 1])).sum()
        report(value=value, names=hosts.names, count=hosts.count, leads=hosts.leads, total=int(total))
    elif scenario == "share_error":
        hosts.share(refuse)
    elif scenario in ("user_error", "slow_end"):
        if index == 1:
            refuse()
        hosts.barrier("never")
    elif scenario == "late_error":  # The others have called `leave` before.
        if index == 1:
            time.sleep(1)
            refuse()
    elif scenario == "crash":
        if index == 0:
            raise ZeroDivisionError("a bug")
        hosts.barrier("never")
    elif scenario == "wait":
        report(ready=os.getpid())
        hosts.barrier("never") if index else time.sleep(600)
    elif scenario == "compile":
        begin = time.monotonic()
        if index == 1:  # It speaks all the while. Tracing and compiling of many different convolutions.

            def network(x):
                for i in range(12):
                    x = jnp.tanh(jax.lax.conv(x, jnp.ones((4 + i % 3, x.shape[1], 3, 3)) * i, (1, 1), "SAME"))
                return x.sum()

            while time.monotonic() - begin < 3 * float(host_timeout):
                jax.jit(jax.grad(network)).lower(jnp.ones((8, 3, 16, 16))).compile()
                jax.clear_caches()
        hosts.barrier("compiled")
        report(seconds=time.monotonic() - begin)


def refuse():
    raise UserError("`batch_size` must be even, got 3.")


if __name__ == "__main__":
    try:
        if scenario == "library":
            jax.distributed.initialize(coordinator, int(num_processes), index)
            report(count=current().count, names=current().names, same=current() is current())
            train(current(), reduces=False, seconds=0.5)
            if index == 1:
                time.sleep(1)
        else:
            with connect(
                coordinator, int(num_processes), index, host_timeout=float(host_timeout), connect_timeout=10
            ) as hosts:
                run(hosts)
    except UserError as error:
        print(f"UserError: {error}", file=sys.stderr)
        if scenario == "slow_end":  # Process 0 does not wait that long.
            time.sleep(2 * float(host_timeout))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(75)
