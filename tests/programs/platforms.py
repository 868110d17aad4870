"""Prints how the command line and the library refuse a platform that jax does not have.

Usage: JAX_PLATFORMS=... platforms.py RUN_DIR DATA_DIR
"""

import sys

from cnnjax import Config, UserError, load_run, train_and_evaluate
from cnnjax.cli.main import main

run_dir, data_dir = sys.argv[1:]
for command in (["train", "--dataset", "generated", "--data-dir", data_dir], ["eval", run_dir, "--data-dir", data_dir]):
    try:
        main(command)
    except SystemExit as stopped:
        print(f"status {stopped.code}", file=sys.stderr)
for use in (lambda: train_and_evaluate(Config(dataset="generated")), lambda: load_run(run_dir).state):
    try:
        use()
    except UserError as error:
        print(error, file=sys.stderr)
