"""Prints what `cnnjax --help` imports, and whether `cnnjax train --help` starts jax."""

import sys
from contextlib import suppress

from cnnjax.cli.main import main

with suppress(SystemExit):
    main(["--help"])
print(f"jax is imported: {'jax' in sys.modules}")
with suppress(SystemExit):
    main(["train", "--help"])

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 3)  # Fails once jax has started.
print(f"{jax.local_device_count()} devices")
