import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cnnjax import UserError, train_and_evaluate
from cnnjax.cli.main import main
from cnnjax.process.console import Report
from cnnjax.process.settings import num_cores
from cnnjax.runs.directory import open_run
from cnnjax.runs.inspection import diff, find_runs, read_info, reproduce, scores, verify
from cnnjax.runs.manifest import read_manifest
from cnnjax.runs.records import read_record


def change(path, **values):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **values}))
    path.with_name("SHA256SUMS").unlink(missing_ok=True)


def change_last_session(run_dir, **values):
    *earlier, last = read_manifest(run_dir)["sessions"]
    change(run_dir / "manifest.json", sessions=[*earlier, {**last, **values}])


def add_earlier_session(run_dir, **values):
    sessions = read_manifest(run_dir)["sessions"]
    change(run_dir / "manifest.json", sessions=[{**sessions[0], "state": "interrupted", **values}, *sessions])


def exits(capsys, *arguments):
    """Runs a command that must exit with status 1; returns its output."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 1
    return capsys.readouterr().out


def test_a_run_in_training_is_running_and_cannot_be_verified(seeds, run_dir):
    change_last_session(run_dir, state="running")
    with open_run(run_dir, seeds.config, Report(quiet=True), resume=True):
        assert read_info(run_dir).state == "running"
        with pytest.raises(UserError, match=r"`run` must not be training while it is verified, got .*run\. Wait"):
            verify(run_dir)
    assert read_info(run_dir).state == "killed"


def test_verify_finds_every_file_with_changed_bytes(run_dir, capsys):
    found = verify(run_dir)
    assert {*found.values()} == {"ok"}
    assert {"config.json", "manifest.json", "metrics.jsonl", "timing.jsonl", "result.json"} <= {*found}
    assert any(name.startswith("checkpoints/26/state/") for name in found)
    main(["verify", str(run_dir)])
    assert f"{len(found)} of {len(found)} files agree with their checksums." in capsys.readouterr().out
    for name in found:
        before = (run_dir / name).read_bytes()
        if before:
            (run_dir / name).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
            assert {k for k, what in verify(run_dir).items() if what != "ok"} == {name}
            (run_dir / name).write_bytes(before)
    (run_dir / "timing.jsonl").unlink()
    out = exits(capsys, "verify", str(run_dir))
    assert f"{run_dir}/timing.jsonl: missing" in out
    assert f"{len(found) - 1} of {len(found)} files agree" in out
    assert "Resume the run with --resume, which writes timing.jsonl again." in out


def test_verify_of_a_killed_run_expects_only_the_checksums_that_it_could_write(run_dir):
    change_last_session(run_dir, state="running")
    shutil.copytree(run_dir / "checkpoints/26", run_dir / "checkpoints/39.partial")
    found = verify(run_dir)
    assert found["metrics.jsonl"] == found["manifest.json"] == "no checksum"
    assert {what for name, what in found.items() if name.startswith("checkpoints/")} == {"ok"}
    (run_dir / "checkpoints/26/SHA256SUMS").unlink()  # A checkpoint gets its name when it is complete.
    assert verify(run_dir)["checkpoints/26/SHA256SUMS"] == "missing"
    change_last_session(run_dir, state="finished")
    assert verify(run_dir)["SHA256SUMS"] == "missing"


def test_the_advice_of_verify_works(seeds, run_dir, prepared_dir, tmp_path, capsys):
    expected = seeds.results[0]["sha256"]
    (run_dir / "metrics.jsonl").write_text("5\n")
    (run_dir / "result.json").write_text("{}")
    advice = "Resume the run with --resume, which writes metrics.jsonl, result.json again."
    assert advice in exits(capsys, "verify", str(run_dir))
    config = replace(seeds.config, seed=0)
    train_and_evaluate(config, run_dir=run_dir, data_dir=prepared_dir, resume=True)
    assert {*verify(run_dir).values()} == {"ok"}
    (run_dir / "checkpoints/26/progress.json").unlink()
    advice = "The result of the run is intact. Train it again for its checkpoints: cnnjax reproduce"
    assert advice in exits(capsys, "verify", str(run_dir))
    assert reproduce(run_dir, config, into=tmp_path / "again", data_dir=prepared_dir).same
    (run_dir / "result.json").unlink()
    change_last_session(run_dir, state="running")
    advice = "Resume the run with --resume: it starts from the latest intact checkpoint."
    assert advice in exits(capsys, "verify", str(run_dir))
    result = train_and_evaluate(config, run_dir=run_dir, data_dir=prepared_dir, resume=True).finished_result()
    assert result["sha256"] == expected
    (run_dir / "config.json").unlink()
    advice = "config.json cannot be computed again. Restore it from a backup, or train again in another directory."
    assert advice in exits(capsys, "verify", str(run_dir))


def test_verify_of_a_damaged_manifest_or_configuration(run_dir):
    with (run_dir / "config.json").open("a") as file:
        file.write("\n")
    assert verify(run_dir)["config.json"] == "damaged"
    with pytest.raises(UserError, match=r"config\.json must match its checksum in SHA256SUMS, got other bytes"):
        read_info(run_dir)
    (run_dir / "manifest.json").write_text("{")
    assert verify(run_dir)["manifest.json"] == "damaged"
    (run_dir / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match=r"manifest\.json must be JSON"):
        read_info(run_dir)
    with pytest.raises(UserError, match=r"`run` must be the directory of a run, got "):
        verify(run_dir / "checkpoints")


def test_verify_finds_what_is_missing_or_not_listed(run_dir, capsys):
    sums = run_dir / "SHA256SUMS"
    sums.write_text("".join(line for line in sums.read_text().splitlines(keepends=True) if "metrics" not in line))
    assert verify(run_dir)["metrics.jsonl"] == "not listed in SHA256SUMS"
    (run_dir / "notes.txt").touch()
    assert verify(run_dir)["notes.txt"] == "no checksum"  # Not ours.
    (run_dir / "checkpoints/26/SHA256SUMS").write_text("")
    assert verify(run_dir)["checkpoints/26/progress.json"] == "not listed in SHA256SUMS"
    shutil.rmtree(run_dir / "checkpoints")
    found = verify(run_dir)
    assert found["checkpoints/13"] == found["checkpoints/26"] == "missing"
    assert f"{run_dir}/checkpoints/26: missing" in exits(capsys, "verify", str(run_dir))


def test_a_run_directory_must_not_lead_out_of_itself(run_dir, tmp_path):
    shutil.move(run_dir / "checkpoints", tmp_path / "elsewhere")
    (run_dir / "checkpoints").symlink_to(tmp_path / "elsewhere")
    for command in (read_info, verify):
        with pytest.raises(UserError, match=r"must not contain a link that leads out of it, got .*checkpoints\. Remov"):
            command(run_dir)


def test_diff_shows_configuration_data_environment_and_outcome(seeds, run_dir, capsys):
    versions = read_manifest(run_dir)["sessions"][0]["versions"]
    change_last_session(run_dir, versions={**versions, "jax": "0.9.0"}, kernels="others")
    add_earlier_session(run_dir, device="another")
    found = diff(run_dir, seeds.folder / "seed1")
    assert found["configuration"] == {"seed": (0, 1)}
    assert found["environment"] == {
        "versions.jax": ("0.9.0", versions["jax"]),
        "kernels": ("others", found["environment"]["kernels"][1]),
    }
    assert (
        {"sha256.params", "test_loss"}
        <= {*found["outcome"]}
        <= {
            "best_epoch",
            *("test_accuracy", "test_balanced_accuracy"),
            *("best_validation_accuracy", "best_validation_balanced_accuracy", "best_validation_loss"),
            *("test_macro_precision", "test_macro_recall", "test_macro_f1"),
            "test_loss",
            *(f"sha256.{name}" for name in ("params", "opt_state", "best_params", "metrics")),
        }
    )  # Neither the seed nor the time.
    assert {*found["data"]} == {"mean", "std"}  # Of another training part of the same images.
    lines = exits(capsys, "diff", str(run_dir), str(seeds.folder / "seed0")).splitlines()
    assert lines[:3] == ["configuration: the same", "data: the same", "environment:"]
    assert f"  versions.jax: 0.9.0 | {versions['jax']}" in lines
    assert lines[-1] == "outcome: the same"
    main(["diff", str(run_dir), str(run_dir)])  # Exits with 0.


def test_reproduce_gives_the_same_bits(run_dir, prepared_dir, capsys):
    main(["reproduce", str(run_dir), "--data-dir", str(prepared_dir)])
    out, new = capsys.readouterr().out, run_dir.with_name(f"reproduced-{run_dir.name}")
    assert f"{run_dir} and {new} are the same, bit for bit: parameters," in out
    with pytest.raises(SystemExit) as stopped:
        main(["reproduce", str(run_dir), "--data-dir", str(prepared_dir)])
    assert stopped.value.code == 2
    assert "exists already" in capsys.readouterr().err


@pytest.fixture
def all_cores():
    """Gives this process its cores back."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    yield
    if cores:
        os.sched_setaffinity(0, cores)


def test_reproduce_shows_what_differs_and_how_far_the_numbers_moved(
    run_dir, prepared_dir, tmp_path, capsys, all_cores, monkeypatch
):
    """The first layer, which the recorded run trained in both epochs, is frozen after the first."""
    cores_at_start = []
    monkeypatch.setattr("cnnjax.process.settings.use_compilation_cache", lambda say: cores_at_start.append(num_cores()))
    config = read_record(run_dir).config
    config["optim"]["groups"][0]["num_epochs"] = 1
    change(run_dir / "config.json", config=config)
    versions = read_manifest(run_dir)["sessions"][0]["versions"]
    change_last_session(run_dir, versions={**versions, "optax": "0.2.7"}, cores=1)
    out = exits(capsys, "reproduce", str(run_dir), "--data-dir", str(prepared_dir), "--run-dir", str(tmp_path / "new"))
    lines = out.splitlines()
    assert f"versions.optax is 0.2.7 there and {versions['optax']} here: the bits may differ" in lines
    verdict = lines.index(
        f"{run_dir} and {tmp_path / 'new'} are not the same: parameters, optimizer state, batch statistics and metrics."
    )
    assert lines[verdict + 1] == "The parameters differ from epoch 2 on."
    test = json.loads((run_dir / "result.json").read_text())["test_accuracy"]
    assert lines[verdict + 2].startswith(f"  test accuracy: {test:.2%} there, ")
    distance = re.search(r"best parameters: by (\S+) of their norm", out)
    assert distance is not None and 1e-3 < float(distance[1]) < 1
    # The new run has the cores of the recorded one, so they do not differ.
    assert lines[-2:] == ["What differs between the two:", f"  versions.optax: 0.2.7 | {versions['optax']}"]
    if hasattr(os, "sched_getaffinity"):
        assert len(os.sched_getaffinity(0)) == 1
        assert cores_at_start == [1]  # jax, which starts there, makes as many threads.


def test_reproduce_needs_a_finished_run_with_its_metrics(seeds, run_dir, tmp_path):
    (run_dir / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"metrics\.jsonl must be the one that result\.json names, SHA-256 \w{64}\."):
        reproduce(run_dir, seeds.config, into=tmp_path / "new")
    (run_dir / "result.json").unlink()
    with pytest.raises(UserError, match=r"`run` must be finished, got .*run\. Resume it with --resume first"):
        reproduce(run_dir, seeds.config, into=tmp_path / "new")


def test_compare_tests_two_experiments_over_their_seeds(seeds, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in range(3):
        for name, gain in (("good", 0.0), ("bad", -0.1 - 0.01 * seed)):
            run_dir = Path(shutil.copytree(seeds.folder / f"seed{seed}", f"runs/{name}-seed{seed}"))
            accuracy = 0.9 + 0.001 * seed + gain
            change(run_dir / "result.json", test_accuracy=accuracy, test_loss=1 - accuracy)
    assert scores("good", "test_accuracy") == ({0: 0.9, 1: 0.901, 2: 0.902}, [])
    assert scores("runs/good", "test_loss")[0] == {
        0: pytest.approx(0.1),
        1: pytest.approx(0.099),
        2: pytest.approx(0.098),
    }
    main(["compare", "good", "bad"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "good: test_accuracy 90.10% ± 0.10% (sample deviation), 95% interval of the mean 89.85% to 90.35%, n = 3"
    )
    difference = "bad minus good: -11.00 points (95% interval -13.48 to -8.52), p = 0.0027"
    assert lines[2] == f"{difference} (paired t test, the same seeds)."
    assert lines[3] == "The difference is resolved: good is better."
    main(["compare", "bad", "good", "--metric", "test_loss"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("good minus bad: -0.1100 (95% interval -0.1348 to -0.0852), p = 0.0027")
    assert lines[3] == "The difference is resolved: good is better."  # Its loss is lower.
    Path("runs/bad-seed2/result.json").unlink()
    change(Path("runs/bad-seed0/result.json"), test_accuracy=0.95)
    main(["compare", "good", "bad"])
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert captured.err == f"Not finished, so left out: {Path('runs/bad-seed2')}\n"
    assert lines[1].endswith("95% interval of the mean 0.00% to 100.00%, n = 2")
    assert "Welch's t test" in lines[2]
    more = re.fullmatch(
        r"The difference is not resolved\. One of this size would take about (\d+) more seeds of good and (\d+) more "
        r"seeds of bad \(for a probability of 80% of detecting it\)\.",
        lines[3],
    )
    assert more is not None and int(more[1]) == int(more[2]) - 1  # There are three of good, and two of bad.
    for seed in range(3):
        run_dir = Path(shutil.copytree(seeds.folder / f"seed{seed}", f"runs/best-seed{seed}"))
        change(run_dir / "result.json", test_accuracy=0.99 + 0.002 * seed)
    main(["compare", "good", "bad", "best"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:3]] == ["good", "bad", "best"]
    pairs = ["bad minus good", "best minus good", "best minus bad"]
    assert [line.partition(":")[0] for line in lines[3::2]] == pairs
    assert all(line.endswith(" corrected for 3 comparisons.") for line in lines[3::2])
    assert lines[6] == "The difference is resolved: best is better."
    with pytest.raises(SystemExit):
        main(["compare", "good"])
    assert "`experiment` must be the names of at least two experiments, got good." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["compare", "good", "runs/good"])
    assert "without a common run, got good and runs/good, which share " in capsys.readouterr().err
    for record in Path("runs").glob("bad-seed*/config.json"):
        data = json.loads(record.read_text())["data"]
        change(record, data={**data, "sha256": {**data["sha256"], "test": 64 * "0"}})
    main(["compare", "good", "bad"])
    assert capsys.readouterr().out.splitlines()[-1] == "Their images or labels have different digests."


def test_compare_accepts_the_scores_of_every_class(seeds, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "T-shirt: 赤 %s"
    for seed in range(3):
        for experiment, gain in (("a", 0.0), ("b", 0.02)):
            run_dir = Path(shutil.copytree(seeds.folder / f"seed{seed}", f"runs/{experiment}-seed{seed}"))
            first, second, *others = json.loads((run_dir / "result.json").read_text())["classes"]
            score = 0.975 + gain + 0.001 * seed * (1 + gain)
            classes = [{**first, "name": name, "recall": score}, {**second, "f1": None}, *others]
            own = {"test_metrics": {"cost": -40 * score}, "best_validation_metrics": {"cost": 2.0, "odd": math.inf}}
            change(run_dir / "result.json", classes=classes, test_macro_f1=score - 0.5, **own)
    main(["compare", "a", "b", "--metric", f"recall:{name}"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == (
        f"b: recall:{name} 99.60% ± 0.10% (sample deviation), 95% interval of the mean 99.35% to 99.86%, n = 3"
    )
    assert lines[2].startswith("b minus a: +2.00 points (95% interval +2.00 to +2.01)")
    assert lines[3] == "The difference is resolved: b is better."
    main(["compare", "b", "a", "--metric", "test_macro_f1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("b: test_macro_f1 49.60% ± 0.10%")
    assert lines[3] == "The difference is resolved: b is better."
    main(["compare", "b", "a", "--metric", "test_cost"])  # Of `Config.metrics`.
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "b: test_cost -39.8408 ± 0.0408 (sample deviation), 95% interval of the mean -39.9422 to "
    )
    assert lines[2].startswith("a minus b: +0.8008 (95% interval +0.7988 to +0.8028)")
    assert lines[3] == "The difference is resolved: a is higher."  # Whether that is better is not known.
    assert scores("a", "best_validation_cost")[0] == {0: 2.0, 1: 2.0, 2: 2.0}
    for metric, message in (
        ("test_costs", r"`metric` must be a score of runs/a-seed0, got 'test_costs'\. Did you mean test_cost or "),
        ("precision:Coatt", r"`precision:CLASS` must be a known name, got 'Coatt'\. Did you mean Coat\?"),
        ("f1:????????", r"`f1:CLASS` must be a known name, got '\?{8}'\. Valid names: .*, T-shirt: 赤 %s, "),
        (
            "test_balanced",
            r"`metric` must be a score of runs/a-seed0, got 'test_balanced'\. Did you mean test_bal",
        ),
        ("best_validation_odd", "`metric` must be finite in every run, got best_validation_odd inf in runs/a-seed0"),
        ("f1:Trouser", "`metric` must be one that every run has, got f1:Trouser, which runs/a-seed0 lacks"),
    ):
        with pytest.raises(UserError, match=message):
            scores("a", metric)


def test_compare_names_what_it_misses(seeds, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for target in ("nothing", "empty", "runs/nothing", ""):
        with pytest.raises(UserError, match=rf"a folder of finished runs, or the name .*, got '{target}' without a ru"):
            scores(target, "test_accuracy")
    shutil.copytree(seeds.folder / "seed0", "runs/wide_mlp-seed0")
    for target in ("wide_mpl", "runs/wide_mpl"):
        with pytest.raises(UserError, match=r"must be a known name, got 'wide_mpl'\. Did you mean wide_mlp"):
            scores(target, "test_accuracy")
    Path("wide_mlp").mkdir()  # A folder without runs does not hide the name.
    assert [*scores("wide_mlp", "test_accuracy")[0]] == [0]
    Path("runs/wide_mlp-seed0/result.json").unlink()
    with pytest.raises(UserError, match=r"got 'wide_mlp' with unfinished runs only: runs/wide_mlp-seed0\. Resume"):
        scores("wide_mlp", "test_accuracy")


def test_compare_refuses_runs_of_different_experiments(seeds, run_dir, tmp_path):
    config = read_record(run_dir).config
    other = shutil.copytree(run_dir, tmp_path / "other")
    with pytest.raises(UserError, match=r"must have different seeds, got seed 0 in .*other and in .*run\."):
        scores(str(tmp_path), "test_accuracy")
    change(other / "config.json", config={**config, "batch_size": 8, "seed": 5})
    with pytest.raises(
        UserError, match=r"must differ only in their seed, got `batch_size` 8 in .*other and 32 in .*run"
    ):
        scores(str(tmp_path), "test_accuracy")
    change(run_dir / "result.json", best_validation_accuracy=None)
    with pytest.raises(UserError, match="`metric` must be one that every run has, got best_validation_accuracy, w"):
        scores(str(run_dir), "best_validation_accuracy")


def test_runs_are_found_in_a_folder_and_its_subfolders(run_dir, tmp_path):
    deep = shutil.copytree(run_dir, tmp_path / "sub" / "run")
    assert find_runs(tmp_path) == [run_dir, deep]
