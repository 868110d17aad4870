import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock
from generated import Lines

from cnnjax import MLP, SGD, Adam, Config, Interrupted, ParamGroup, UserError
from cnnjax.files import write_json, write_sums
from cnnjax.process.console import Report
from cnnjax.runs import directory
from cnnjax.runs.directory import FILES, check_run, is_locked, open_run
from cnnjax.runs.manifest import read_manifest
from cnnjax.runs.records import read_record, read_result, write_rows
from cnnjax.runs.schema import DataFacts

CONFIG = Config(dataset="generated", num_epochs=2, model=MLP(), optim=Adam())
FACTS = DataFacts(
    image_shape=(28, 28, 1),
    class_names=("no", "yes"),
    sha256={"train": "a" * 64, "test": "b" * 64},
    version="1.0.0",
    source="a test",
    mean=(33.5,),
    std=(78.0,),
    resize="crop",
    interpolation="lanczos",
    weights_sha256=None,
)
RESULT = {
    "test_accuracy": 0.5,
    "test_balanced_accuracy": 0.5,
    "test_macro_precision": 0.5,
    "test_macro_recall": 0.5,
    "test_macro_f1": 0.5,
    "test_loss": 1.5,
    "num_test_examples": 10,
    "best_validation_accuracy": None,
    "best_validation_balanced_accuracy": None,
    "best_epoch": 2,
    "num_epochs": 2,
    "stopped_epoch": None,
    "training_seconds": 1.5,
    "num_params": 3,
    "seed": 0,
    "device": "cpu",
    "sha256": dict.fromkeys(("params", "model_state", "opt_state", "best_params", "metrics"), "c" * 64),
    "classes": [{"name": name, "count": 5, "precision": 0.5, "recall": 0.5, "f1": 0.5} for name in FACTS.class_names],
    "confusion_matrix": [[3, 2], [3, 2]],
}
QUIET = Report(quiet=True)


def begin(run_dir, config=CONFIG, *, resume=False, facts=FACTS):
    """Begins a session and ends it at once."""
    with open_run(run_dir, config, QUIET, resume=resume) as run:
        run.begin(facts, {"cores": 2, "num_devices": 1})
        run.write_config(facts)


def test_a_session_that_ends_before_it_begins_leaves_no_directory(tmp_path):
    with pytest.raises(Interrupted), open_run(tmp_path / "run", CONFIG, QUIET, resume=False):
        assert is_locked(tmp_path / "run")
        raise Interrupted(15)
    assert [*tmp_path.iterdir()] == []


def test_a_directory_is_locked_during_a_session(tmp_path):
    run_dir = tmp_path / "run"
    assert not is_locked(run_dir)
    begin(run_dir)
    assert not is_locked(run_dir)  # The file remains, its lock does not.
    with open_run(run_dir, CONFIG, QUIET, resume=True):
        assert is_locked(run_dir)
        with pytest.raises(UserError, match=r"`run_dir` .*run is in use by another process\. Choose another"):
            begin(run_dir, resume=True)
    begin(run_dir, resume=True)


def test_a_directory_with_a_run_is_not_overwritten(tmp_path):
    begin(tmp_path)
    with pytest.raises(UserError, match=r"`run_dir` .* exists already\. Resume that run, resume=True, or"):
        begin(tmp_path)
    with pytest.raises(
        UserError,
        match=r"exists already\. It holds another configuration: `batch_size` is None there and 8 here\. Choose",
    ):
        begin(tmp_path, replace(CONFIG, batch_size=8))


def test_a_resumed_run_keeps_its_name_which_decides_no_bit(tmp_path):
    begin(tmp_path, replace(CONFIG, name="first"))
    before = read_record(tmp_path).config
    begin(tmp_path, replace(CONFIG, name="second"), resume=True)
    assert read_record(tmp_path).config == before and before["name"] == "first"


def test_a_run_is_resumed_with_its_own_configuration(tmp_path):
    begin(tmp_path)
    other = replace(CONFIG, batch_size=8, model=MLP(dense_dropout=0.2))
    with pytest.raises(UserError) as error:
        begin(tmp_path, other, resume=True)
    assert str(error.value) == (
        f"{tmp_path} must be resumed with its own configuration: `batch_size` is None there and 8 here; "
        "`model.dense_dropout` is 0.5 there and 0.2 here. Pass the same values, or choose another directory: "
        "run_dir=DIR."
    )
    with pytest.raises(UserError, match=r"`optim\.class` is 'cnnjax\.Adam' there and 'cnnjax\.SGD' here"):
        begin(tmp_path, replace(CONFIG, optim=SGD()), resume=True)


def test_a_run_is_trained_longer_if_no_step_depends_on_its_length(tmp_path, monkeypatch):
    begin(tmp_path)
    write_json(tmp_path / "result.json", RESULT)
    monkeypatch.setattr(directory, "usable_step", lambda checkpoints: 5)
    longer = replace(CONFIG, num_epochs=3)
    with pytest.raises(UserError, match="exists already"):
        begin(tmp_path, longer)
    begin(tmp_path, longer, resume=True)
    assert read_record(tmp_path).decode({}) == longer
    assert read_result(tmp_path) is None  # It was that of the shorter run.
    with pytest.raises(UserError, match="`num_epochs` is 3 there and 2 here"):
        begin(tmp_path, CONFIG, resume=True)
    with pytest.raises(UserError, match="`num_epochs` is 3 there and 4 here; `batch_size` is None there and 8 here"):
        begin(tmp_path, replace(CONFIG, num_epochs=4, batch_size=8), resume=True)


@pytest.mark.parametrize(
    "optim",
    [
        Adam(schedule="one_cycle"),
        Adam(lookahead=5),
        Adam(accumulate_steps=2, groups=(ParamGroup("bias", num_epochs=1),)),  # Its last update is rounded.
    ],
)
def test_a_run_whose_steps_depend_on_its_length_is_not_trained_longer(optim, tmp_path):
    begin(tmp_path, replace(CONFIG, optim=optim))
    with pytest.raises(UserError, match="`num_epochs` is 2 there and 3 here"):
        check_run(tmp_path, replace(CONFIG, optim=optim, num_epochs=3), resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": {"train": "a" * 64, "test": "c" * 64}}, "`sha256.test` is 'bbb.*' there and 'ccc.*' here"),
        ({"mean": (33.0,)}, r"`mean` is \(33.5,\) there and \(33.0,\) here"),
        ({"std": (77.0,)}, r"`std` is \(78.0,\) there and \(77.0,\) here"),
        ({"class_names": ("no", "maybe")}, r"`class_names` is \('no', 'yes'\) there and \('no', 'maybe'\) here"),
    ],
)
def test_a_run_is_resumed_with_its_own_data(change, message, tmp_path):
    begin(tmp_path)
    with pytest.raises(
        UserError,
        match=rf"must hold the data that .* was trained on, but in .*, {message}\. Pass the same data_dir=",
    ):
        begin(tmp_path, resume=True, facts=replace(FACTS, **change))
    begin(tmp_path, resume=True, facts=replace(FACTS, source="another source", version="2.0.0"))
    begin(tmp_path, resume=True, facts=replace(FACTS, num_train_examples=9))  # Which an earlier version did not record.
    assert read_record(tmp_path).data.num_train_examples == 9


def finish(run_dir):
    """Begins a session that ends with a result."""
    with open_run(run_dir, CONFIG, QUIET, resume=False) as run:
        run.begin(FACTS, {"cores": 2, "num_devices": 1})
        run.write_config(FACTS)
        for name in ("metrics.jsonl", "timing.jsonl"):
            write_rows(run_dir / name, [])
        write_json(run_dir / "result.json", RESULT)


def resume(run_dir, config=CONFIG):
    """Returns what `finished` returns, and what it says."""
    with open_run(run_dir, config, Lines(), resume=True) as run:
        return run.finished(), run.report.lines


def test_a_run_is_finished_when_its_last_session_is(tmp_path):
    finish(tmp_path)
    assert resume(tmp_path) == (RESULT, [])
    assert resume(tmp_path, replace(CONFIG, num_epochs=3)) == (None, [])  # More epochs.
    (tmp_path / "SHA256SUMS").unlink()
    assert resume(tmp_path) == (None, [])  # Killed before the checksums were written.


def test_what_a_finished_run_lacks_is_reported(tmp_path):
    finish(tmp_path)
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    content["sessions"][0]["checkpoints"] = [13, 26]
    record = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "checkpoints" / "13").mkdir(parents=True)
    write_json(path, content)
    write_json(tmp_path / "config.json", record | {"files": {"mine.py": "0"}})
    write_sums(tmp_path, [*FILES, "manifest.json"])
    result, (edited, lost) = resume(tmp_path)
    assert result == RESULT
    assert edited.startswith("mine.py changed after this run had finished, so this is its old result.")
    assert lost.startswith(
        f"{tmp_path} has a result, but the checkpoints of steps 26 are missing. `eval` and `predict`"
    )


@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl"])
def test_a_run_is_not_finished_if_what_it_can_write_again_is_damaged(tmp_path, name):
    finish(tmp_path)
    (tmp_path / name).write_text("5\n")
    assert resume(tmp_path) == (None, [])


def test_a_damaged_result_is_kept_aside(tmp_path):
    finish(tmp_path)
    (tmp_path / "result.json").write_text("{}")
    result, lines = resume(tmp_path)
    assert result is None
    moved = tmp_path / "damaged" / "result.json"
    assert lines == [f"{tmp_path}/result.json was damaged. It has been moved to {moved}, and is computed again."]
    assert moved.read_text() == "{}"


@pytest.mark.parametrize("name", ["config.json", "manifest.json"])
def test_a_run_is_not_resumed_if_what_only_it_knows_is_damaged(tmp_path, name):
    finish(tmp_path)
    (tmp_path / name).write_text("[" * 200_000)
    with pytest.raises(
        UserError, match=f"{name} must be JSON, got recursion limit .* Restore the file, or train again"
    ):
        begin(tmp_path, resume=True)


def test_the_end_of_each_session_is_recorded_and_another_environment_is_reported(tmp_path, capsys):
    begin(tmp_path)
    with pytest.raises(ZeroDivisionError), open_run(tmp_path, CONFIG, Report(), resume=True) as run:
        run.begin(FACTS, {"cores": 1, "num_devices": 1})
        raise ZeroDivisionError
    assert [s["state"] for s in read_manifest(tmp_path)["sessions"]] == ["finished", "failed"]
    expected = "This run resumes in another environment, so its bits may differ: cores was 2 and is 1.\n"
    assert capsys.readouterr().out == expected


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_refused_run_leaves_nothing_behind(tmp_path):
    (tmp_path / "thesis" / "empty").mkdir(parents=True)
    (tmp_path / "thesis" / "thesis.tex").touch()
    before = tree(tmp_path)
    with pytest.raises(
        UserError, match=r"`run_dir` must be empty or hold a run with a config.json, got .* with empty\. Choose another"
    ):
        begin(tmp_path / "thesis")
    for run_dir in (tmp_path / "thesis" / "empty", tmp_path / "a" / "b" / "c"):
        with pytest.raises(UserError, match="no such set"), open_run(run_dir, CONFIG, QUIET, resume=False):
            raise UserError("no such set")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")])
def test_a_file_system_without_locks(tmp_path, error, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(FileLock, "acquire", fail)
    with pytest.raises(UserError, match=r"must be on a file system that can lock files, .*\. Choose another: run_dir="):
        begin(tmp_path / "run")
    assert tree(tmp_path) == []


def test_a_run_is_not_written_to_a_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="`run_dir` must be a local folder, got gs:"):
        begin(Path("gs://bucket/run"))
    with pytest.raises(UserError, match=r"`run_dir` must be a path in UTF-8 without"):
        begin(tmp_path / "a[b]")
    assert tree(tmp_path) == []


def test_a_directory_in_which_a_kill_came_before_the_configuration(tmp_path):
    for name in ("manifest.json", "session-0.diff", "config.json.partial", "lock", "SHA256SUMS"):
        (tmp_path / name).touch()
    check_run(tmp_path, CONFIG, resume=False)


def test_a_directory_without_a_manifest_is_of_another_version(tmp_path):
    begin(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"must have a manifest\.json, got none: another version of cnnjax wrote it"):
        begin(tmp_path, resume=True)


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"`run_dir` .*file/run cannot be written \(.*\)\. Choose another: run_dir="):
        begin(tmp_path / "file" / "run")
    with pytest.raises(UserError, match=r"`run_dir` must be a directory, got the file"):
        begin(tmp_path / "file")
