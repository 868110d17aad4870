"""Resumes a run while a path of it cannot be used, once for each, and ends after the last time.

Usage: no_permission.py RUN_DIR [OPTIONS OF cnnjax train]
"""

import sys
from pathlib import Path

from cnnjax.cli.main import main

run_dir, options = Path(sys.argv[1]), sys.argv[2:]
for path, mode in (
    (run_dir / "config.json", 0),
    (run_dir / "checkpoints", 0),
    (run_dir / "checkpoints" / "26" / "SHA256SUMS", 0),
    (run_dir / "checkpoints", 0o555),  # The last one, because only this session starts to write.
):
    before = path.stat().st_mode
    path.chmod(mode)
    try:
        main(["train", *options, "--run-dir", str(run_dir), "--resume"])
    except SystemExit as stopped:
        print(f"status {stopped.code}", file=sys.stderr)
    path.chmod(before)
