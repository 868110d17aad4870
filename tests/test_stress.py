import pytest
from stress import MOMENTS, Moment, outcome, stress

from cnnjax.cli.main import main


@pytest.fixture(scope="module")
def arguments(prepared_dir):
    """Arguments of `cnnjax train`."""
    arguments = ["--dataset", "generated", "--data-dir", str(prepared_dir)]
    return [*arguments, "--model", "mlp", "--num-epochs", "3", "--batch-size", "32"]


@pytest.fixture(scope="module")
def expected(arguments, tmp_path_factory):
    """The outcome of a run without interruptions."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    main(["train", *arguments, "--run-dir", str(run_dir)])
    return outcome(run_dir)


@pytest.mark.slow
def test_a_run_that_is_killed_twice_ends_in_the_same_bits(arguments, expected, tmp_path):
    moments = {"end of an epoch": Moment(1, 0.2), "checkpoint write": Moment(1, 0.1)}
    hits, _, _ = stress(2, [*arguments, "--checkpoint-seconds", "0.1"], expected, tmp_path, seed=5, moments=moments)
    assert sum(hits.values()) == 2


@pytest.mark.slow
def test_runs_that_are_killed_at_random_moments_end_in_the_same_bits(arguments, expected, tmp_path):
    hits, _, _ = stress(20, [*arguments, "--checkpoint-seconds", "0.1"], expected, tmp_path, seed=2)
    assert sum(hits.values()) == 20
    assert {moment for moment, _ in hits} == {*MOMENTS}
