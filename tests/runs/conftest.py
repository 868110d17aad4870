"""Fixtures for the tests of what a run records."""

import resource
import shutil
from typing import Any, NamedTuple, cast

import pytest

from cnnjax import MLP, Adam, Augment, Config, ParamGroup
from cnnjax.program import train_steps
from cnnjax.runs.seeds import train_seeds

# The group's learning rate is that of the other parameters, and it is never frozen.
CONFIG = Config(
    dataset="generated",
    num_epochs=2,
    batch_size=32,
    augment=Augment(flip="random"),
    model=MLP(dense_dropout=0.2),
    optim=Adam(groups=(ParamGroup("^Dense_0/", num_epochs=2),)),
)


class Seeds(NamedTuple):
    """Three seeds of one configuration, trained in one process."""

    config: Config
    folder: Any
    results: list[dict[str, Any]]
    num_compilations: int  # Of the step.


@pytest.fixture(scope="session")
def seeds(tmp_path_factory, prepared_dir):
    folder, step = tmp_path_factory.mktemp("seeds"), cast(Any, train_steps)
    before = step._cache_size()
    results = train_seeds(CONFIG, (0, 1, 2), folder=folder, data_dir=prepared_dir)
    return Seeds(CONFIG, folder, results, step._cache_size() - before)


@pytest.fixture
def run_dir(seeds, tmp_path):
    """A copy of a finished run, to damage."""
    return shutil.copytree(seeds.folder / "seed0", tmp_path / "run")


@pytest.fixture
def small_disk():
    """Limits the size of a file to 500 kB. Larger writes fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
