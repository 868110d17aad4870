"""A trained run, which the commands share."""

import pytest

from cnnjax.cli.main import main


@pytest.fixture(scope="session")
def train(prepared_dir):
    """Returns a function that trains in a directory."""
    options = ["--dataset", "generated", "--data-dir", str(prepared_dir)]
    options += ["--model", "mlp", "--num-epochs", "3", "--batch-size", "32", "--no-report"]
    return lambda run_dir, *more: main(["train", *options, "--run-dir", str(run_dir), *more])


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory, train):
    """Returns the directory of a run with test-time augmentation, which tests must not change."""
    run_dir = tmp_path_factory.mktemp("main") / "run"
    train(run_dir, "--tta", "flip")
    return run_dir
