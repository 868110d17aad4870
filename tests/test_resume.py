"""A resumed run with the compiled programs of users; most tests of runs compile without optimizations."""

from dataclasses import replace

import pytest
from programs import research

from cnnjax import train_and_evaluate


def test_a_run_that_is_killed_within_an_epoch_is_resumed_to_the_bit(tmp_path):
    """With dropout, augmentation and batch statistics; no other test uses this width, so that nothing is shared."""
    config = replace(research.CONFIG, model=research.Net(width=12))

    def kill(step, metrics):
        if step == 9:  # Of 6 per epoch.
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train_and_evaluate(config, run_dir=tmp_path / "killed", on_step=kill, checkpoint_seconds=0.0)
    resumed = train_and_evaluate(config, run_dir=tmp_path / "killed", resume=True)
    whole = train_and_evaluate(config, run_dir=tmp_path / "whole")
    assert resumed.finished_result()["sha256"] == whole.finished_result()["sha256"]
