import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from generated import status

from cnnjax.cli.main import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory, train):
    """A folder with a run, whose name is long, and a copy that claims to be of another seed."""
    folder = tmp_path_factory.mktemp("cli") / "runs"
    run_dir = folder / f"{'a-very-long-name' * 8}-seed0"
    train(run_dir)
    other = Path(shutil.copytree(run_dir, f"{str(run_dir)[:-1]}1"))
    change(other / "config.json", config={**json.loads((other / "config.json").read_text())["config"], "seed": 1})
    return folder


@pytest.fixture
def runs(trained, tmp_path, monkeypatch):
    """A copy to damage, in the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "runs")
    return sorted(Path("runs").iterdir())


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    path.with_name("SHA256SUMS").unlink(missing_ok=True)


def fails(capsys, *arguments):
    assert status(*arguments) == 2
    return capsys.readouterr().err


def test_the_list_shows_state_seed_epochs_accuracy_and_time(runs, capsys):
    first, second = runs
    rows = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    rows = [{**row, "validation_accuracy": accuracy} for row, accuracy in zip(rows, (0.5, 0.75, 0.625), strict=True)]
    (first / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = shutil.copytree(first, Path("runs") / "own")
    rows = [{**row, "validation_auroc": score} for row, score in zip(rows, (0.5, 0.5, 0.75), strict=True)]
    (own / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = json.loads((own / "config.json").read_text())["config"]
    change(own / "config.json", config={**config, "best_by": "auroc", "metrics": {"function": "auroc"}})
    (session,) = json.loads((first / "manifest.json").read_text())["sessions"]
    rows = [json.loads(line) for line in (first / "timing.jsonl").read_text().splitlines()]
    rows[-1]["seconds"] = 12.3  # Of training, in all sessions.
    (first / "timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    change(first / "result.json", test_accuracy=0.875)
    change(second / "manifest.json", sessions=[{**session, "state": "running"}])  # No process holds its lock.
    (second / "result.json").unlink()
    (Path("runs") / "linked").symlink_to(os.path.abspath(first))
    assert status("runs") == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "state", "seed", "epoch", "validation", "test", "time"]
    assert lines[0].split() == [first.name, "finished", "0", "3/3", "75.00%", "87.50%", "12", "s"]  # The best epoch.
    own = lines.pop([line.split()[0] for line in lines].index("own"))
    assert own.split()[4:7] == ["62.50%,", "auroc", "0.7500"]
    assert lines[1].split()[:4] == [second.name, "killed", "1", "3/3"] and lines[1].count("%") == 1


def test_the_list_is_the_same_at_any_width_and_in_a_pipe(runs, capsys):
    """One width is that of a process, because rich looks at it at its import."""
    command = [sys.executable, "-c", "from cnnjax.cli.main import main; main(['runs'])"]
    done = subprocess.run(command, env=os.environ | {"COLUMNS": "300"}, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    main(["runs"])
    output = capsys.readouterr().out
    assert output == done.stdout
    lines = output.splitlines()
    assert [line.split()[0] for line in lines] == ["run", *(run.name for run in runs)]
    assert all(line == line.strip() for line in lines)
    assert len({line.index(word) for line, word in zip(lines, ("state", "finished", "finished"), strict=True)}) == 1


def test_a_run_that_cannot_be_read_does_not_hide_the_others(runs, capsys, monkeypatch):
    from cnnjax.runs import inspection

    broken = [Path(shutil.copytree(runs[0], f"runs/{name}")) for name in "bcdefg"]
    (broken[0] / "config.json").write_text("{")
    (broken[1] / "manifest.json").unlink()
    change(broken[2] / "result.json", test_accuracy=float("nan"))
    (broken[3] / "config.json").unlink()
    os.mkfifo(broken[3] / "config.json")
    for run_dir in broken[4:]:
        (run_dir / "config.json").unlink()
    (broken[4] / "config.json").symlink_to("config.json")
    shutil.copytree(runs[0], "runs/gone")
    read_info = inspection.read_info

    def read(run_dir):
        if run_dir.name == "gone":
            shutil.rmtree(run_dir)
            (run_dir / "config.json").read_text()
        return read_info(run_dir)

    monkeypatch.setattr(inspection, "read_info", read)
    assert status("runs") == 0
    captured = capsys.readouterr()
    assert [line.split()[0] for line in captured.out.splitlines()] == ["run", *(run.name for run in runs)]
    lines = captured.err.splitlines()
    assert len(lines) == 7
    for line, path in zip(lines, [*broken, Path("runs/gone")], strict=True):
        assert str(path) in line


def test_a_run_without_permission_is_named(runs):
    program = """
import os
from cnnjax.cli.main import main
main(["runs"])  # Imports what the next one needs, perhaps from folders of root.
if os.getuid() == 0:
    os.setuid(65534)
main(["runs"])
main(["verify", os.sys.argv[1]])
"""
    runs[1].chmod(0)
    Path.cwd().chmod(0o755)
    done = subprocess.run([sys.executable, "-c", program, runs[1]], check=False, capture_output=True, text=True)
    runs[1].chmod(0o755)
    assert done.returncode == 2
    assert [line.split()[0] for line in done.stdout.splitlines()[-2:]] == ["run", runs[0].name]
    listed, verified = done.stderr.splitlines()[-2:]
    assert listed == f"{runs[1]} cannot be read: Permission denied."
    assert verified == f"`run` must be a directory that can be read, got {runs[1]} (Permission denied)."


def test_the_folder_of_runs_must_exist(runs, capsys, monkeypatch):
    assert fails(capsys, "runs", "nope") == (
        "`folder` must be a folder of runs that can be read, got nope (No such file or directory).\n"
    )
    assert "got runs/" in fails(capsys, "runs", runs[0] / "config.json")
    assert status("runs", runs[0] / "checkpoints") == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"There are no runs in {runs[0] / 'checkpoints'} yet.\n")
    monkeypatch.chdir(runs[0])
    for folder, count in ((".", 1), ("..", 2), ("../", 2)):
        assert status("runs", folder) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines[1:]] == [run.name for run in runs[:count]]


def test_every_command_takes_every_kind_of_path(runs, prepared_dir, capsys, monkeypatch):
    data = ("--data-dir", prepared_dir)
    Path("link").symlink_to(runs[0])
    commands: list[tuple] = [("verify",), ("eval", *data), ("diff", Path(runs[1]).absolute())]
    for name, *more in commands:
        expected = 1 if name == "diff" else 0
        for run in (runs[0], f"{runs[0]}/", "link"):
            assert status(name, run, *more) == expected
        for run in ("/", "nope", "~/nope", Path(__file__)):
            assert "`run` must be the directory of a run" in fails(capsys, name, run, *more)
    new = runs[0].absolute().with_name(f"reproduced-{runs[0].name}")
    for folder, run in ((runs[0], "."), (runs[0] / "checkpoints", "..")):
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            assert status("verify", run) == status("eval", run, *data) == 0
            assert status("reproduce", run, *data) == 0
            assert f"{run} and {new} are the same" in capsys.readouterr().out
            shutil.rmtree(new)
    assert status("reproduce", "link", *data) == 0
    assert Path("reproduced-link/result.json").exists()
    monkeypatch.setenv("HOME", str(Path.cwd() / "home"))
    assert status("reproduce", f"{runs[0]}/", "--run-dir=~/new", *data) == 0
    assert Path("home/new/result.json").exists() and not Path("~").exists()
    assert "`run` must be the directory of a run" in fails(capsys, "reproduce", "/", *data)
