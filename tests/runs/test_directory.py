import json
from dataclasses import replace

import pytest

from cnnjax import MLP, SGD, Adam, Config, Interrupted, ParamGroup, UserError
from cnnjax.cli.console import Report
from cnnjax.data.batches import pixel_statistics
from cnnjax.data.datasets import load_dataset
from cnnjax.runs.directory import (
    DataFacts,
    check_run,
    is_locked,
    make_facts,
    open_run,
    read_record,
    read_result,
    read_rows,
    write_rows,
)
from cnnjax.runs.files import write_json
from cnnjax.runs.manifest import read_manifest

CONFIG = Config(dataset="generated", num_epochs=2, model=MLP(), optim=Adam())
FACTS = DataFacts(
    image_shape=(28, 28, 1),
    class_names=("no", "yes"),
    sha256={"train": "a", "test": "b"},
    version="1.0.0",
    source="a test",
    mean=(33.5,),
    std=(78.0,),
)
QUIET = Report(quiet=True)


def begin(run_dir, config=CONFIG, *, resume=False, facts=FACTS):
    """Begins a session and ends it at once."""
    with open_run(run_dir, config, QUIET, resume=resume) as run:
        run.begin(facts, {"cores": 2})


def test_a_record_holds_the_configuration_and_the_facts_of_the_data(tmp_path, prepared_dir):
    dataset = load_dataset("generated", prepared_dir)
    statistics = pixel_statistics(dataset.load("train").image)
    facts = make_facts(dataset, (28, 28, 1), statistics)
    begin(tmp_path, facts=facts)
    record = read_record(tmp_path)
    assert record.data == facts
    assert record.decode({}) == CONFIG
    assert record.files == {}
    assert facts.class_names[:2] == ("T-shirt/top", "Trouser")
    assert (facts.standardization.mean, facts.standardization.std) == (statistics.mean, statistics.std)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"config": {"seed": 0}, "data": {}, "files": {}}', '{"config": {"seed": 0, "num_epochs": 1}}'],
)
def test_a_record_of_another_version(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=rf"`run` must be the directory of a run of this version, .*, got {tmp_path} "):
        read_record(tmp_path)


def test_a_record_with_a_missing_part_of_the_configuration(tmp_path):
    begin(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["config"]["dataset"]
    write_json(tmp_path / "config.json", content)
    with pytest.raises(
        UserError, match=r"`run` must be the directory of a run .*\(KeyError\('seed, num_epochs or dataset"
    ):
        read_record(tmp_path)


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
    with pytest.raises(UserError, match=r"`run_dir` .* exists already\. Resume that run with --resume, or"):
        begin(tmp_path)
    with pytest.raises(UserError, match=r"`run_dir` .* exists already\. It holds another configuration\. Choose"):
        begin(tmp_path, replace(CONFIG, batch_size=8))


def test_a_run_is_resumed_with_its_own_configuration(tmp_path):
    begin(tmp_path)
    other = replace(CONFIG, batch_size=8, model=MLP(dense_dropout=0.2))
    with pytest.raises(UserError) as error:
        begin(tmp_path, other, resume=True)
    assert str(error.value) == (
        f"{tmp_path} must be resumed with its own configuration: `batch_size` is 128 there and 8 here; "
        "`model.dense_dropout` is 0.5 there and 0.2 here. Pass the same values, or choose another directory: "
        "--run-dir DIR."
    )
    with pytest.raises(UserError, match=r"`optim\.class` is 'cnnjax\.Adam' there and 'cnnjax\.SGD' here"):
        begin(tmp_path, replace(CONFIG, optim=SGD()), resume=True)


def test_a_run_is_trained_longer_if_no_step_depends_on_its_length(tmp_path):
    begin(tmp_path)
    write_json(tmp_path / "result.json", {"num_epochs": 2})
    longer = replace(CONFIG, num_epochs=3)
    with pytest.raises(UserError, match="exists already"):
        begin(tmp_path, longer)
    begin(tmp_path, longer, resume=True)
    assert read_record(tmp_path).decode({}) == longer
    assert read_result(tmp_path) is None  # It was that of the shorter run.
    with pytest.raises(UserError, match="`num_epochs` is 3 there and 2 here"):
        begin(tmp_path, CONFIG, resume=True)
    with pytest.raises(UserError, match="`num_epochs` is 3 there and 4 here; `batch_size` is 128 there and 8 here"):
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


@pytest.mark.parametrize("change", [{"sha256": {"train": "a", "test": "c"}}, {"mean": (33.0,)}, {"std": (77.0,)}])
def test_a_run_is_resumed_with_its_own_data(change, tmp_path):
    begin(tmp_path)
    with pytest.raises(UserError, match=r"must be resumed with its own data, SHA-256 {'train': 'a', 'test': 'b'}, "):
        begin(tmp_path, resume=True, facts=replace(FACTS, **change))
    begin(tmp_path, resume=True, facts=replace(FACTS, source="another source"))


def test_a_run_is_finished_when_its_last_session_is(tmp_path):
    begin(tmp_path)
    result = {"num_epochs": 2}
    write_json(tmp_path / "result.json", result)
    with open_run(tmp_path, CONFIG, QUIET, resume=True) as run:
        assert run.finished() == result
    with open_run(tmp_path, replace(CONFIG, num_epochs=3), QUIET, resume=True) as run:
        assert run.finished() is None  # More epochs.
    (tmp_path / "SHA256SUMS").unlink()
    with open_run(tmp_path, CONFIG, QUIET, resume=True) as run:
        assert run.finished() is None  # Killed before the checksums were written.


def test_the_end_of_each_session_is_recorded_and_another_environment_is_reported(tmp_path, capsys):
    begin(tmp_path)
    with pytest.raises(ZeroDivisionError), open_run(tmp_path, CONFIG, Report(), resume=True) as run:
        run.begin(FACTS, {"cores": 1})
        raise ZeroDivisionError
    assert [s["state"] for s in read_manifest(tmp_path)["sessions"]] == ["finished", "failed"]
    expected = "This run resumes in another environment, so its bits may differ: cores was 2 and is 1.\n"
    assert capsys.readouterr().out == expected


def test_a_directory_of_something_else(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"`run_dir` must be empty or hold a run, got .* with thesis\.tex\. Choose"):
        begin(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_a_directory_in_which_a_kill_came_before_the_configuration(tmp_path):
    for name in ("manifest.json", "session-0.diff", "config.json.partial", "lock"):
        (tmp_path / name).touch()
    check_run(tmp_path, CONFIG, resume=False)


def test_a_directory_without_a_manifest_is_of_another_version(tmp_path):
    begin(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"must have a manifest\.json, got none: another version of cnnjax wrote it"):
        begin(tmp_path, resume=True)


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"`run_dir` .*file/run cannot be written \(.*\)\. Choose another: --run-dir"):
        begin(tmp_path / "file" / "run")
    with pytest.raises(UserError, match=r"`run_dir` must be a directory, got the file"):
        begin(tmp_path / "file")


def test_rows_are_one_json_object_per_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_rows(path) == []
    rows = [{"epoch": 1, "train_loss": 0.5}, {"epoch": 2, "train_loss": 0.1}]
    write_rows(path, rows)
    write_rows(path, rows)
    assert read_rows(path) == rows
    path.write_text('{"epoch": 1}\n{"epo')
    with pytest.raises(UserError, match=r"metrics\.jsonl must hold one JSON object per line, got .*resume it with"):
        read_rows(path)
