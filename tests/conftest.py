"""Fixtures: a small generated data set that a network can learn, in the format of tfds; quick compilation."""

import os
import resource
import shutil
import signal
from typing import Any, NamedTuple, cast

import jax
import jaxtyping
import outer_functions  # noqa: F401
import pytest
from generated import make_raw
from programs import research

from cnnjax import MLP, Adam, Augment, Config, ParamGroup, train_and_evaluate
from cnnjax.data.named import NAMED_SETS
from cnnjax.data.tfds_format import write_tfds
from cnnjax.program import train_steps
from cnnjax.seeds import train_seeds

jax.config.update("jax_numpy_rank_promotion", "raise")

# A shell ignores signals of what it starts in the background, and so would training.
for signum, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(signum) is signal.SIG_IGN:
        signal.signal(signum, handler)


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory):
    """Keeps the tests out of the user's own cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def no_reports():
    """Makes `cnnjax train` skip its report in this process, which takes seconds. The tests of the report undo it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("report_on_run", "report_on_seeds"):
            patch.setattr(f"cnnjax.cli.report.{name}", lambda *arguments: None)
        yield


@pytest.fixture(scope="session")
def raw_fashion_mnist():
    return make_raw((28, 28, 1), num_train=430, num_test=170)


@pytest.fixture(scope="session")
def prepared_dir(tmp_path_factory, raw_fashion_mnist):
    """Returns a tfds directory that contains a generated set with the name "generated"."""
    data_dir = tmp_path_factory.mktemp("tfds")
    write_tfds(NAMED_SETS["fashion_mnist"], raw_fashion_mnist, data_dir, say=lambda line: None)
    (data_dir / "fashion_mnist").rename(data_dir / "generated")
    return data_dir


@pytest.fixture(scope="session")
def research_run(tmp_path_factory):
    """Returns a finished run of research.py, whose directory tests must not change."""
    return train_and_evaluate(research.CONFIG, run_dir=tmp_path_factory.mktemp("research") / "run")


@pytest.fixture
def quick_compilation():
    """Compiles in half the time, for tests that compare values up to rounding.

    A program is compiled once per process, so these must not share one with a test that compares bits.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def no_type_checks():
    """Disables the type checks of the tests, which users do not have."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


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
