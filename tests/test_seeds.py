import ast
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from generated import Lines

from cnnjax import Config, Logger, NonFiniteLossError, UserError, train_and_evaluate
from cnnjax.process.settings import num_cores
from cnnjax.runs.inspection import find_runs
from cnnjax.runs.records import read_result
from cnnjax.seeds import parse_seeds, train_seeds

PROGRAM = Path(__file__).parent / "programs" / "two_devices.py"


def test_seeds_are_ranges_or_lists():
    assert parse_seeds("0:3") == (0, 1, 2)
    assert parse_seeds("5,0,7") == (5, 0, 7)
    assert len(parse_seeds("0:10000")) == 10_000
    assert parse_seeds("0,4294967295") == (0, 2**32 - 1)
    wrong = ("", "3:3", "5:2", "1,1", "a", "0:10:2", "-1", "-1:2", "0:10001", "0:99999999999", "0:9999999999")
    for text in (*wrong, "4294967296", f"{10**30}", "0:" + 5000 * "9", "0," * 10**6):
        with pytest.raises(UserError, match=r"`seeds` must be a range .* or a list .* of 1 to 10,000 different seeds "):
            parse_seeds(text)
    with pytest.raises(UserError, match=r"got '4'\. Three seeds are --seeds 0:3; one seed is --seed 4\.$"):
        parse_seeds("4")
    for seeds in ((), (1, 1)):
        with pytest.raises(UserError, match=r"`seeds` must be different, and at least one, got "):
            train_seeds(Config(), seeds)


def test_seeds_share_one_compilation_and_have_the_bits_of_single_runs(seeds, prepared_dir, tmp_path):
    assert seeds.num_compilations == 1
    assert [result["seed"] for result in seeds.results] == [0, 1, 2]
    assert [path.name for path in find_runs(seeds.folder)] == ["seed0", "seed1", "seed2"]
    alone = train_and_evaluate(
        replace(seeds.config, seed=1), run_dir=tmp_path / "run", data_dir=prepared_dir
    ).finished_result()
    assert alone["sha256"] == seeds.results[1]["sha256"]
    assert alone["sha256"]["params"] != seeds.results[0]["sha256"]["params"]


def test_finished_seeds_are_not_trained_again(seeds, prepared_dir, tmp_path):
    without_data = train_seeds(seeds.config, (0, 1), folder=seeds.folder, data_dir=tmp_path / "none", resume=True)
    assert without_data == seeds.results[:2]
    again = train_seeds(seeds.config, (0, 1, 2), folder=seeds.folder, data_dir=prepared_dir, resume=True)
    assert again == seeds.results
    with pytest.raises(UserError, match="seed1 exists already"):  # Before seed 3 is trained.
        train_seeds(seeds.config, (3, 1), folder=seeds.folder, data_dir=prepared_dir)
    assert not (seeds.folder / "seed3").exists()


def test_each_device_trains_a_seed_until_a_signal_stops_them_all(seeds, prepared_dir, tmp_path):
    """Two cores become two devices; a single core simulates them."""
    flags = {} if num_cores() > 1 else {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, str(PROGRAM), str(seeds.folder / "seed0"), str(prepared_dir), str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, **flags}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    devices, stopped, states, *lines, in_use = done.stdout.splitlines()
    assert devices == "2 devices"
    assert re.match("Stopped by SIGTERM; (the checkpoint of step|nothing is lost)", stopped)
    states = ast.literal_eval(states)
    assert states["seed2"] == "interrupted" and "finished" in states.values()  # Seed 2 had to wait for a device.
    assert {*states.values()} == {"finished", "interrupted"}
    assert len(states) <= 4  # None began after the signal.
    assert any(line.startswith("seed 2: epoch 2/2") for line in lines)
    assert in_use.endswith("seed1 is in use by another process. Choose another: --run-dir DIR.")  # In a thread, too.
    for seed in (0, 1, 2):
        result = read_result(tmp_path / f"seed{seed}")
        assert result is not None and result["sha256"] == seeds.results[seed]["sha256"]  # As alone, on one device.


def test_the_source_code_of_seeds_lacks_their_run_directories_only(tmp_path, monkeypatch):
    def record(config, *run_dirs):
        raise UserError(", ".join(path.name for path in run_dirs))

    monkeypatch.setattr("cnnjax.seeds.source_of", record)
    with pytest.raises(UserError, match=r"^seed0, seed3$"):
        train_seeds(Config(), (0, 3), folder=tmp_path)


class Opens(Logger):
    """Opens a file too early."""

    def __init__(self, path):
        self.file = path.open("a")


def test_a_logger_that_cannot_be_copied_is_an_error(tmp_path):
    logger = Opens(tmp_path / "loss.csv")
    rule = (
        r"`loggers` must be loggers that `copy\.deepcopy` can copy for each seed, got opens: TypeError: cannot pickle"
    )
    with pytest.raises(UserError, match=rf"{rule} .* Open files and connections in `start`, not in the constructor\.$"):
        train_seeds(Config(), (0, 1), folder=tmp_path, loggers=[logger])
    logger.file.close()


@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_seed_that_fails_is_reported_at_once_and_the_others_are_trained(num_devices, tmp_path, monkeypatch):
    trained, report = [], Lines()

    def train(config, **options):
        if config.seed in (1, 2):
            raise NonFiniteLossError(f"The loss of {config.seed} became nan.")
        trained.append((config.seed, len(report.lines)))
        return SimpleNamespace(finished_result=lambda: {})

    monkeypatch.setattr("cnnjax.seeds.train_run", train)
    monkeypatch.setattr("cnnjax.seeds.load_inputs", lambda *arguments, **options: None)
    devices = num_devices * jax.local_devices()[:1]
    monkeypatch.setattr("jax.local_devices", lambda: devices)
    with pytest.raises(
        NonFiniteLossError, match=r"^2 of 4 seeds failed: 1, 2\. The first: The loss of 1 became nan\.$"
    ):
        train_seeds(Config(), (0, 1, 2, 3), folder=tmp_path, report=report)
    assert {*report.lines} == {"seed 1: The loss of 1 became nan.", "seed 2: The loss of 2 became nan."}
    assert {seed for seed, _ in trained} == {0, 3}
    assert num_devices > 1 or trained == [(0, 0), (3, 2)]
