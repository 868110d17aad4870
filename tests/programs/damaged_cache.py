"""Trains twice with the compiled programs of an earlier process: as they are, and truncated or with a flipped bit.

Usage: damaged_cache.py FOLDER [OPTIONS OF cnnjax train]. The run directories are FOLDER/intact and FOLDER/damaged.
JAX_LOG_COMPILES=1 prints to standard error which programs come from the cache in $XDG_CACHE_HOME.
"""

import os
import sys
from pathlib import Path

import jax

from cnnjax.cli.main import main

folder, options = sys.argv[1], sys.argv[2:]
main(["train", *options, "--no-report", "--run-dir", f"{folder}/intact"])
for i, path in enumerate(sorted(Path(os.environ["XDG_CACHE_HOME"]).rglob("*-cache"))):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle] ^= 1
    path.write_bytes(content[:middle] if i % 2 else content)
jax.clear_caches()  # As in another process.
print("damaged:", file=sys.stderr)
main(["train", *options, "--no-report", "--run-dir", f"{folder}/damaged"])
