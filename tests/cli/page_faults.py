"""Writes and frees a block of the size of a step's scratch memory 20 times and prints the number of page faults."""

import resource

import cnnjax  # noqa: F401  Its import sets the options of malloc.

before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    b"x" * 2**26
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
