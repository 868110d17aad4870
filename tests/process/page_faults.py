"""Writes and frees a block of the size of a step's scratch memory 20 times and prints the number of page faults.

Usage: page_faults.py import|call|main: what happens before.
"""

import resource
import sys
from contextlib import redirect_stdout, suppress

import cnnjax
from cnnjax.cli.main import main

if sys.argv[1] == "call":
    cnnjax.keep_memory()
elif sys.argv[1] == "main":
    with suppress(SystemExit), redirect_stdout(sys.stderr):
        main(["--help"])

before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    b"x" * 2**26
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
