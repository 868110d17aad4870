"""Fixtures: a small generated data set that a network can learn, in the format of tfds; quick compilation."""

import os
import signal

import jax
import jaxtyping
import outer_functions  # noqa: F401
import pytest
from generated import make_raw
from programs import research

from cnnjax import train_and_evaluate
from cnnjax.data.named import NAMED_SETS
from cnnjax.data.tfds_format import write_tfds

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
