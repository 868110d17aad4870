"""Starts itself in several processes. Each says what it got, and does what the words for its index say.

Usage: launched.py WORDS-OF-0 WORDS-OF-1 ..., where WORDS are separated by commas: exit=CODE, kill=SIGNAL, wait (ends
with 75 at a signal), deaf (ignores SIGTERM), write=TEXT (to standard output), warn=TEXT (to standard error).
"""

import os
import signal
import sys
import time

from cnnjax.cli.launch import follow_launcher, is_launched, launch

if not is_launched():
    sys.exit(launch(len(sys.argv) - 1, grace_seconds=float(os.environ.get("GRACE", "20"))))

index = int(os.environ["JAX_PROCESS_ID"])


def stop(signum, frame):
    print(f"{index} stops by {signal.Signals(signum).name}", flush=True)
    sys.exit(75)


for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(signum, stop)
follow_launcher(1)
count, cores = os.environ["JAX_NUM_PROCESSES"], sorted(os.sched_getaffinity(0))
print(f"{index} of {count} at {os.environ['JAX_COORDINATOR_ADDRESS']} on {cores}, pid {os.getpid()}", flush=True)
for word in sys.argv[1 + index].split(","):
    match word.split("="):
        case ["exit", code]:
            sys.exit(int(code))
        case ["kill", name]:
            signal.signal(signal.Signals[name], signal.SIG_DFL) if name != "SIGKILL" else None
            os.kill(os.getpid(), signal.Signals[name])
        case ["deaf"]:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        case ["wait"]:
            time.sleep(60)
        case ["write", text]:
            print(text, flush=True)
        case ["warn", text]:
            print(text, file=sys.stderr, flush=True)
