"""What the files of a run directory may contain. The commands that read them are tested in tests/cli."""

import json
import math
import os
import re
from pathlib import Path

import pytest

from cnnjax import UserError
from cnnjax.files import write_json
from cnnjax.runs.inspection import read_info, verify
from cnnjax.runs.manifest import read_manifest
from cnnjax.runs.records import read_record, read_result, read_rows, write_rows
from cnnjax.runs.schema import DataFacts


def edit(path, *keys, value=None):
    """Replaces a value in a JSON file, or removes it if `value` is None."""
    content = json.loads(path.read_text())
    part = content
    for key in keys[:-1]:
        part = part[key]
    if value is None:
        del part[keys[-1]]
    else:
        part[keys[-1]] = value
    path.write_text(json.dumps(content))
    path.with_name("SHA256SUMS").unlink(missing_ok=True)


def test_a_run_is_read_as_it_was_written(seeds, prepared_dir):
    run_dir = seeds.folder / "seed0"
    record = read_record(run_dir)
    assert record.decode({}) == seeds.config
    assert record.files == {}
    assert record.data.class_names[:2] == ("T-shirt/top", "Trouser")
    assert record.data.image_shape == (28, 28, 1)
    assert read_result(run_dir) == seeds.results[0]
    assert [row["epoch"] for row in read_rows(run_dir)] == [1, 2]


def test_another_path_suggests_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, hint in (("photos-seed0", ""), ("photos-seed0", " Did you mean runs/photos-seed0?")):
        with pytest.raises(UserError, match=rf"of a run, with a config\.json, got {path}\.{re.escape(hint)}$"):
            read_record(Path(path))
        Path("runs/photos-seed0").mkdir(parents=True, exist_ok=True)
        Path("runs/photos-seed0/config.json").touch()
    for path in ("runs", "runs/xyz"):
        with pytest.raises(UserError, match=rf"got {path}\. Runs: runs/photos-seed0\.$"):
            read_record(Path(path))
    with pytest.raises(UserError, match=r"got runs/photos\. Did you mean runs/photos-seed0\?$"):
        verify(Path("runs/photos"))


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["data", "mean"], [None], "`data.mean.0` in .* must be a valid number, got None"),
        (["data", "mean"], [math.nan], "`data.mean.0` in .* must be a finite number, got nan"),
        (["data", "mean"], [1.0, 2.0], "config.json: `mean` must be one value for each of 1 channels, got \\(1.0, 2.0"),
        (["data", "std"], [0], "`data.std.0` in .* must be greater than 0, got 0"),
        (["data", "image_shape"], "28", "`data.image_shape` in .* must be a valid array, got '28'"),
        (["data", "image_shape"], [28, 28], "`data.image_shape` in .* must have at least 3 items"),
        (["data", "class_names"], [], "`data.class_names` in .* must have at least 1 item"),
        (["data", "class_names"], 7, "`data.class_names` in .* must be a valid array, got 7"),
        (["data", "sha256"], {}, "`data.sha256` in .* must have at least 1 item"),
        (["data"], [], "`data` in .* must be an object, got "),
        (["data"], None, "`data` in .* must be there, got nothing"),
        (["config", "seed"], 0.5, "`config.seed` in .* must be a valid integer, got 0.5"),
        (["config", "seed"], None, "`config.seed` in .* must be there, got nothing"),
        (["config", "num_epochs"], 1.5, "`config.num_epochs` in .* must be a valid integer, got 1.5"),
        (["config", "dataset"], None, "`config.dataset` in .* must be there, got nothing"),
        (["config"], 5, "`config` in .* must be an object, got 5"),
        (["files"], ["a.py"], "`files` in .* must be an object, got "),
    ],
)
def test_a_changed_configuration_is_not_used(keys, value, message, run_dir):
    edit(run_dir / "config.json", *keys, value=value)
    with pytest.raises(UserError, match=message):
        read_record(run_dir)


@pytest.mark.parametrize("key", ["batch_size", "tta", "loss"])
def test_a_missing_option_is_not_the_default(key, run_dir):
    edit(run_dir / "config.json", "config", key)
    with pytest.raises(UserError, match=key):
        read_record(run_dir).decode({})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "`test_accuracy` in .* must be there, got nothing"),
        ([], r"result\.json must be an object, got \[\]"),
        ({"test_accuracy": "high"}, "`test_accuracy` in .* must be a valid number, got 'high'"),
        ({"test_accuracy": math.nan}, "`test_accuracy` in .* must be a finite number, got nan"),
        ({"test_accuracy": 1.5}, "`test_accuracy` in .* must be less than or equal to 1, got 1.5"),
        ({"num_epochs": True}, "`num_epochs` in .* must be a valid integer, got True"),
        ({"sha256": {"params": "0"}}, "`sha256.params` in .* must match pattern"),
    ],
)
def test_a_changed_result_is_not_used(content, message, run_dir):
    path = run_dir / "result.json"
    whole = json.loads(path.read_text())
    write_json(path, whole | content if content else content)
    with pytest.raises(UserError, match=rf"{message}.*\. Resume the run, which writes it again: resume=True\."):
        read_result(run_dir)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"sessions": [1]}, "`sessions.0` in .* must be an object, got 1"),
        ({"sessions": [{}]}, "`sessions.0.state` in .* must be there, got nothing"),
        ({"sessions": []}, "`sessions` in .* must have at least 1 item"),
        ({"sessions": None}, "`sessions` in .* must be a valid array, got None"),
        ({"format": 3}, "must be of format 5, got 3: another version of cnnjax wrote it"),
        ({"format": "4"}, "`format` in .* must be a valid integer, got '4'"),
    ],
)
def test_a_changed_manifest_is_not_used(content, message, run_dir):
    path = run_dir / "manifest.json"
    write_json(path, json.loads(path.read_text()) | content)
    for read in (read_manifest, read_info):
        with pytest.raises(UserError, match=message):
            read(run_dir)


def test_a_session_has_the_cores_that_a_reproduction_needs(run_dir):
    edit(run_dir / "manifest.json", "sessions", 0, "cores", value=0.5)
    with pytest.raises(UserError, match=r"`sessions\.0\.cores` in .* must be a valid integer, got 0\.5"):
        read_manifest(run_dir)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("5", "line 3 must be an object, got 5"),
        ('{"epo', "line 3 must be JSON, got EOF"),
        ('{"epoch": 3}', "`step` in .*metrics.jsonl, line 3 must be there, got nothing"),
        ("\x00", "line 3 must be JSON, got expected value"),
    ],
)
def test_a_changed_line_of_metrics_is_not_used(line, message, run_dir):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(UserError, match=rf"{message}.*\. Resume the run, which writes it again: resume=True\."):
        read_rows(run_dir)


@pytest.mark.parametrize("name", ["train_margin", "validation_auroc"])
def test_the_scores_of_a_user_are_numbers(name, tmp_path):
    row = {"epoch": 1, "step": 9, "train_loss": 1.0, "train_grad_norm": 1.0, "params_sha256": 64 * "0"}
    write_rows(tmp_path / "metrics.jsonl", [{**row, name: float("nan")}, {**row, name: 1}])  # type: ignore[list-item]
    assert len(read_rows(tmp_path)) == 2
    write_rows(tmp_path / "metrics.jsonl", [{**row, name: "high"}])  # type: ignore[list-item]
    with pytest.raises(
        UserError, match=rf"^`{name}` in .*metrics\.jsonl, line 1 must be a number, got 'high'\. Resume"
    ):
        read_rows(tmp_path)


def test_rows_are_written_once(seeds, tmp_path):
    assert read_rows(tmp_path) == []
    rows = read_rows(seeds.folder / "seed0")
    for _ in range(2):
        write_rows(tmp_path / "metrics.jsonl", rows)
    assert read_rows(tmp_path) == rows
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("name", ["config.json", "result.json", "manifest.json", "metrics.jsonl"])
def test_pipes_links_and_folders_are_not_read(name, run_dir):
    path = run_dir / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=f"{name} must .*Not a regular file"):
        read_info(run_dir)
    path.unlink()
    path.symlink_to(name)
    with pytest.raises(UserError, match=f"{name} must .*Too many levels of symbolic links"):
        read_info(run_dir)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=f"{name} must .*(Is a directory|Not a regular file)"):
        read_info(run_dir)
    path.rmdir()
    path.symlink_to("/etc/passwd")
    with pytest.raises(UserError, match=f"A run directory must not contain a link that leads out of it, got .*{name}"):
        read_info(run_dir)


def test_facts_are_arrays_for_the_network():
    sha256, fit = {"train": "a" * 64, "test": "b" * 64}, ("crop", "lanczos", None)
    facts = DataFacts((2, 2, 1), ("a", "b"), sha256, "1.0.0", "a test", (33.5,), (78.0,), *fit)
    assert (facts.standardization.mean, facts.standardization.std) == (33.5, 78.0)
