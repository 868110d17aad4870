import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cnnjax import AugmentConfig, Config, ModelConfig, UserError
from cnnjax.cli.main import REQUEUE, main
from cnnjax.evaluate import train_steps
from cnnjax.runs import directory as rundir
from cnnjax.runs.inspection import diff, find_runs, read_info, reproduce, scores, verify
from cnnjax.runs.seeds import parse_seeds, train_seeds

CONFIG = Config(
    dataset="generated",
    num_epochs=2,
    batch_size=32,
    augment=AugmentConfig(flip="random"),
    model=ModelConfig(name="mlp", dense_dropout=0.2),
)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory, prepared_dir):
    """Three seeds of a configuration, trained in one process; the results, and how often the step compiled."""
    folder = tmp_path_factory.mktemp("runs")
    before = train_steps._cache_size()
    results = train_seeds(CONFIG, (0, 1, 2), folder=folder / "a", data_dir=prepared_dir)
    return folder, results, train_steps._cache_size() - before


@pytest.fixture
def run_dir(seeds, tmp_path):
    """A copy of a run that ended, to damage."""
    return shutil.copytree(seeds[0] / "a" / "seed0", tmp_path / "run")


def change(path, **values):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **values}))


def test_seeds_are_ranges_or_lists():
    assert parse_seeds("0:3") == (0, 1, 2)
    assert parse_seeds("5,0,7") == (5, 0, 7)
    assert parse_seeds("4") == (4,)
    for text in ("", "3:3", "1,1", "a", "0:10:2", "-1"):
        with pytest.raises(UserError, match=r"`seeds` must be a range such as 0:10 \(0 to 9\) or a list .*, got "):
            parse_seeds(text)


def test_many_seeds_compile_once_and_are_runs_of_their_own(seeds, prepared_dir, tmp_path):
    folder, results, compiled = seeds
    assert compiled == 1
    assert [result["seed"] for result in results] == [0, 1, 2]
    assert [path.name for path in find_runs(folder / "a")] == ["seed0", "seed1", "seed2"]
    from cnnjax import train_and_evaluate

    alone = train_and_evaluate(replace(CONFIG, seed=1), run_dir=tmp_path / "run", data_dir=prepared_dir)
    assert alone["sha256"] == results[1]["sha256"]
    again = train_seeds(CONFIG, (0, 1, 2), folder=folder / "a", data_dir=prepared_dir, resume=True)
    assert again == results
    with pytest.raises(UserError, match="seed1 exists already"):  # Before seed 3 is trained.
        train_seeds(CONFIG, (3, 1), folder=folder / "a", data_dir=prepared_dir)
    assert not (folder / "a" / "seed3").exists()


def test_several_devices_train_a_seed_each(seeds, prepared_dir, tmp_path):
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import test_runs as t\n"
        "from cnnjax.runs.seeds import train_seeds; from cnnjax.cli.console import Report; import jax\n"
        "assert len(jax.devices()) == 2\n"
        "train_seeds(t.CONFIG, (0, 1, 2), folder=Path(sys.argv[3]), data_dir=Path(sys.argv[2]), report=Report())\n"
    )
    flags = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(prepared_dir), str(tmp_path / "runs")]
    done = subprocess.run(command, env=flags, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "seed 2: epoch 2/2" in done.stdout
    for seed in (0, 1, 2):
        result = rundir.read_result(tmp_path / "runs" / f"seed{seed}")
        assert result is not None and result["sha256"] == seeds[1][seed]["sha256"]  # As alone, on one device.
        assert read_info(tmp_path / "runs" / f"seed{seed}").state == "finished"


def test_a_signal_stops_every_seed_that_trains_and_none_begins_after_it(prepared_dir, tmp_path):
    """Two at a time, the signal when the first has ended; a system may give it to any thread: here not the main one."""
    options = ["--dataset", "generated", "--model.name", "mlp", "--num-epochs", "20", "--batch-size", "16"]
    command = [sys.executable, "-u", "-m", "cnnjax", "train", *options, "--data-dir", str(prepared_dir)]
    command += ["--seeds", "0:8", "--run-dir", str(tmp_path / "runs")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "Test accuracy" in line:
            break
    threads = {int(path.name) for path in Path(f"/proc/{process.pid}/task").iterdir()} - {process.pid}
    tgkill = ctypes.CDLL(None).tgkill
    assert any(tgkill(process.pid, thread, signal.SIGTERM) == 0 for thread in threads)  # To the first alive.
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == REQUEUE, errors
    states = [read_info(run_dir).state for run_dir in find_runs(tmp_path / "runs")]
    assert "finished" in states and "running" not in states and "killed" not in states
    assert len(states) <= 4


def test_the_list_shows_state_seed_epochs_and_accuracy(seeds, tmp_path, capsys):
    shutil.copytree(seeds[0] / "a", tmp_path / "a")
    sessions = json.loads((tmp_path / "a" / "seed1" / "manifest.json").read_text())["sessions"]
    change(tmp_path / "a" / "seed1" / "manifest.json", sessions=[{**sessions[0], "state": "running"}])
    (tmp_path / "a" / "seed2" / "config.json").write_text("{}")
    main(["runs", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "state", "seed", "epoch", "validation", "test", "time"]
    accuracy = f"{seeds[1][0]['test_accuracy']:.2%}"
    assert lines[1].split()[:4] == ["a/seed0", "finished", "0", "2/2"] and accuracy in lines[1]
    assert lines[2].split()[:3] == ["a/seed1", "killed", "1"]
    assert "`run` must be the directory of a run of this version" in lines[3]
    main(["runs", str(tmp_path / "nothing")])
    assert "There are no runs in" in capsys.readouterr().out


def test_a_run_that_is_training_shows_as_running(run_dir):
    sessions = json.loads((run_dir / "manifest.json").read_text())["sessions"]
    change(run_dir / "manifest.json", sessions=[{**sessions[0], "state": "running"}])
    with rundir.lock(run_dir):
        assert read_info(run_dir).state == "running"
        with pytest.raises(UserError, match="must not be training while it is verified"):
            verify(run_dir)
    assert read_info(run_dir).state == "killed"


def test_verify_finds_every_file_whose_bytes_changed(run_dir, capsys):
    found = verify(run_dir)
    assert {*found.values()} == {"ok"}
    assert {"config.json", "manifest.json", "metrics.jsonl", "timing.jsonl", "result.json"} <= {*found}
    assert any(name.startswith("checkpoints/26/state/") for name in found)
    main(["verify", str(run_dir)])
    assert f"{len(found)} of {len(found)} files agree" in capsys.readouterr().out
    for name in found:
        before = (run_dir / name).read_bytes()
        if before:
            (run_dir / name).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
            assert {k for k, what in verify(run_dir).items() if what != "ok"} == {name}
            (run_dir / name).write_bytes(before)
    (run_dir / "timing.jsonl").unlink()
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(run_dir)])
    assert stopped.value.code == 1
    assert f"{run_dir}/timing.jsonl: missing" in capsys.readouterr().out


def test_a_damaged_manifest_or_configuration_is_told(run_dir):
    change(run_dir / "config.json", more=1)
    assert verify(run_dir)["config.json"] == "damaged"
    (run_dir / "manifest.json").write_text("{")
    assert verify(run_dir)["manifest.json"] == "damaged"
    with pytest.raises(UserError, match=r"manifest.json must be a readable JSON file"):
        read_info(run_dir)
    with pytest.raises(UserError, match=r"`run` must be the directory of a run, got "):
        verify(run_dir / "checkpoints")


def test_a_run_directory_cannot_lead_out_of_itself(run_dir, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    shutil.move(run_dir / "checkpoints", tmp_path / "elsewhere" / "checkpoints")
    (run_dir / "checkpoints").symlink_to(tmp_path / "elsewhere" / "checkpoints")
    for command in (read_info, verify):
        with pytest.raises(UserError, match=r"must hold no link that leads out of it, got .*checkpoints\. Remove"):
            command(run_dir)
    (run_dir / "checkpoints").unlink()
    config = json.loads((run_dir / "config.json").read_text())["config"]
    for name, value in (
        ("dataset", "../../secret"),
        ("experiment", "../x"),
        ("dataset", "/etc"),
        ("experiment", "a/b"),
    ):
        change(run_dir / "config.json", config={**config, name: value})
        with pytest.raises(UserError, match=rf"`{name}` must be a .*name"):
            read_info(run_dir)


def test_diff_names_configuration_environment_and_outcome(seeds, run_dir, capsys):
    sessions = json.loads((run_dir / "manifest.json").read_text())["sessions"]
    sessions[0]["versions"]["jax"] = "0.9.0"
    change(run_dir / "manifest.json", sessions=sessions)
    found = diff(run_dir, seeds[0] / "a" / "seed1")
    assert found["configuration"] == {"seed": (0, 1)}
    assert found["environment"]["versions.jax"][0] == "0.9.0"
    assert "sha256.params" in found["outcome"]
    assert {*found["data"]} == {"mean", "std"}  # Of another training part, the same images.
    main(["diff", str(run_dir), str(seeds[0] / "a" / "seed0")])
    assert capsys.readouterr().out.splitlines()[:2] == ["configuration: the same", "data: the same"]


def test_reproduce_gives_the_same_bits(seeds, run_dir, prepared_dir, capsys):
    main(["reproduce", str(run_dir), "--data-dir", str(prepared_dir)])
    out = capsys.readouterr().out
    assert f"{run_dir} and {run_dir}-reproduced are the same, bit for bit: parameters," in out
    with pytest.raises(SystemExit) as stopped:
        main(["reproduce", str(run_dir), "--data-dir", str(prepared_dir)])
    assert stopped.value.code == 2
    assert "exists already" in capsys.readouterr().err


def test_reproduce_says_what_differs_and_how_far_the_numbers_moved(
    run_dir, prepared_dir, tmp_path, capsys, monkeypatch
):
    """The code of the step changes in between: another learning rate from the second epoch on."""
    import optax

    from cnnjax import experiment
    from cnnjax.optim import optimizer as optim

    schedule = optax.piecewise_constant_schedule(1e-3, {13: 1.5})
    monkeypatch.setattr(optim, "make_schedule", lambda config, num_steps: schedule)
    monkeypatch.setattr(experiment, "make_tx", optim.make_tx.__wrapped__)  # Not the one that is cached.
    sessions = json.loads((run_dir / "manifest.json").read_text())["sessions"]
    sessions[0]["versions"]["optax"] = "0.2.7"
    change(run_dir / "manifest.json", sessions=sessions)
    with pytest.raises(SystemExit) as stopped:
        main(["reproduce", str(run_dir), "--data-dir", str(prepared_dir), "--run-dir", str(tmp_path / "new")])
    assert stopped.value.code == 1
    out = capsys.readouterr().out
    assert f"{run_dir} and {tmp_path / 'new'} are not the same" in out
    assert "The parameters differ from epoch 2 on." in out
    assert "versions.optax: 0.2.7 | " in out
    assert "of their norm" in out and "test loss: " in out


def test_reproduce_needs_a_run_that_ended(run_dir, tmp_path):
    (run_dir / "result.json").unlink()
    with pytest.raises(UserError, match=r"`run` must have ended, got .*run\. Finish it by --resume first"):
        reproduce(run_dir, into=tmp_path / "new")


def test_compare_two_experiments_over_their_seeds(seeds, prepared_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for result in seeds[1]:
        for name, gain in (("good", 0.0), ("bad", -0.1 - 0.01 * result["seed"])):
            run_dir = shutil.copytree(seeds[0] / "a" / f"seed{result['seed']}", f"runs/{name}-seed{result['seed']}")
            change(Path(run_dir) / "result.json", test_accuracy=0.9 + 0.001 * result["seed"] + gain)
    assert scores("good", "test_accuracy") == ("good", {0: 0.9, 1: 0.901, 2: 0.902})
    main(["compare", "good", "bad"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "good: test_accuracy 90.10% ± 0.10% (sample deviation), 95% interval of the mean 89.85% to 90.35%, n = 3"
    )
    assert lines[2].startswith("difference: -11.00% (95% interval -13.48% to -8.52%), p = 0.0027 (paired t test")
    assert lines[3] == "The difference is resolved: good is better."
    shutil.rmtree("runs/bad-seed2")
    change(Path("runs/bad-seed0/result.json"), test_accuracy=0.95)
    main(["compare", "good", "bad"])
    lines = capsys.readouterr().out.splitlines()
    assert "Welch's t test" in lines[2]
    assert "The difference is not resolved. One of this size would take about " in lines[3]


def test_compare_refuses_runs_that_are_not_of_one_experiment(seeds, run_dir, tmp_path):
    with pytest.raises(UserError, match=r"must be a folder of runs that ended, or the name before -seed<k>.*'nothing'"):
        scores("nothing", "test_accuracy")
    config = json.loads((run_dir / "config.json").read_text())["config"]
    shutil.copytree(run_dir, tmp_path / "other")
    with pytest.raises(UserError, match=r"must have a seed each, got seed 0 in .*other and in .*run\."):
        scores(str(tmp_path), "test_accuracy")
    change(tmp_path / "other" / "config.json", config={**config, "batch_size": 8, "seed": 5})
    with pytest.raises(UserError, match="must differ in their seed alone, got `batch_size`"):
        scores(str(tmp_path), "test_accuracy")


def test_train_takes_an_experiment_by_its_name_and_many_seeds(prepared_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("experiments").mkdir()
    Path("experiments/small.py").write_text(f"from cnnjax import *\nCONFIG = {CONFIG!r}\n")
    main(
        [
            "train",
            "small",
            "--experiment",
            "small",
            "--seeds",
            "0:2",
            "--num-epochs",
            "1",
            "--data-dir",
            str(prepared_dir),
        ]
    )
    assert "2 seeds, 0:2: test_accuracy " in capsys.readouterr().out.splitlines()[-1]
    assert [path.name for path in find_runs(Path("runs"))] == ["small-seed0", "small-seed1"]
    for arguments, message in (
        (["smal"], r"`EXPERIMENT` must be a known name, got 'smal'. Did you mean small"),
        (["small", "--seeds", "x"], "`seeds` must be a range"),
    ):
        with pytest.raises(SystemExit):
            main(["train", *arguments])
        assert message in capsys.readouterr().err
