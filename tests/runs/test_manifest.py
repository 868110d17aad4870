import json
import subprocess

import pytest

from cnnjax import UserError
from cnnjax.cli.signals import Interrupted
from cnnjax.runs import manifest
from cnnjax.runs.manifest import changes_since_last_session, differences, read_manifest, session, source_code


def git(folder, *arguments):
    name = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    done = subprocess.run(["git", *name, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "train.py").write_text("print(1)\n")
    (folder / ".gitignore").write_text("runs/\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    monkeypatch.chdir(folder)
    return folder


def test_a_clean_tree_is_its_commit(repository):
    code, diff = source_code()
    assert (code["commit"], code["dirty"], diff) == (git(repository, "rev-parse", "HEAD"), False, "")


def test_a_package_in_another_repository_is_recorded(repository, tmp_path, monkeypatch):
    package = tmp_path / "package"
    git(tmp_path, "clone", "-q", str(repository), "package")
    monkeypatch.setattr(manifest, "__file__", str(package / "manifest.py"))
    commit = git(package, "rev-parse", "HEAD")
    assert source_code()[0]["package_commit"] == commit
    (package / "train.py").write_text("print(3)\n")
    code, diff = source_code()
    assert code["package_commit"].startswith(f"{commit} and a diff, SHA-256 ")
    assert not code["dirty"] and diff == ""
    monkeypatch.chdir(package)
    assert "package_commit" not in source_code()[0]


def test_the_diff_of_a_dirty_tree_restores_it(repository, tmp_path, monkeypatch):
    (repository / "train.py").write_text("print(2)\n")
    (repository / "new file.py").write_text("print('ä')\n")
    (repository / "runs").mkdir()
    (repository / "runs" / "ignored").touch()
    monkeypatch.setattr(manifest, "DIFF_LIMIT", 1000)
    (repository / "data.bin").write_bytes(b"\0")  # No source.
    (repository / "large.py").write_bytes(b"#" * 1001)
    (repository / "nowhere.py").symlink_to(tmp_path / "nowhere")
    code, diff = source_code()
    assert code["dirty"]
    git(tmp_path, "clone", "-q", str(repository), "clone")
    (tmp_path / "diff").write_text(diff)
    git(tmp_path / "clone", "apply", str(tmp_path / "diff"))
    names = {path.name: path.read_text() for path in (tmp_path / "clone").glob("*.py")}
    assert names == {"train.py": "print(2)\n", "new file.py": "print('ä')\n"}


def test_a_session_records_how_it_ended(repository, tmp_path):
    (repository / "train.py").write_text("print(2)\n")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with session(run_dir, {"seed": 3}, ("config.json",)):
        assert read_manifest(run_dir)["sessions"][0]["state"] == "running"
    for error in (Interrupted(15, 7), ValueError("wrong")):
        with pytest.raises(type(error)), session(run_dir, {"seed": 3}, ()):
            raise error
    sessions = read_manifest(run_dir)["sessions"]
    assert [s["state"] for s in sessions] == ["finished", "interrupted", "failed"]
    assert [s.get("error") for s in sessions] == [
        None,
        "Stopped by SIGTERM; the checkpoint of step 7 is saved.",
        "wrong",
    ]
    for s in sessions:
        assert s["seed"] == 3 and s["commit"] == git(repository, "rev-parse", "HEAD") and s["seconds"] >= 0
        assert s["command"] and s["started"] <= s["ended"]
        assert "print(2)" in (run_dir / s["diff"]).read_text()
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=run_dir, check=True)


def test_what_differs_between_environments():
    old = {"commit": "a", "versions": {"jax": "1", "numpy": "2"}, "cores": 2, "host": "x"}
    new = {"commit": "b", "versions": {"jax": "3", "numpy": "2"}, "cores": 2, "host": "y"}
    assert differences(old, new) == {"commit": ("a", "b"), "versions.jax": ("1", "3")}


def test_a_session_in_another_environment_or_under_a_clock_set_back(repository, tmp_path):
    environment = {"versions": {"jax": "0.9.0"}, "cores": 2}
    assert changes_since_last_session(tmp_path, environment) == []
    with session(tmp_path, environment, ()):
        pass
    assert changes_since_last_session(tmp_path, environment) == []
    (line,) = changes_since_last_session(tmp_path, {**environment, "versions": {"jax": "0.10.2"}})
    assert line == (
        "This run goes on in another environment, so its bits may differ: versions.jax was 0.9.0 and is 0.10.2."
    )
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    content["sessions"][-1]["ended"] = "2999-01-01T00:00:00+00:00"
    path.write_text(json.dumps(content))
    (line,) = changes_since_last_session(tmp_path, environment)
    assert line.startswith("The clock stands at 20") and "(2999-01-01T00:00:00+00:00): the dates in" in line


@pytest.mark.parametrize("content", ['{"format": 2, "sessions": [{}]}', "[]", '{"format": 1, "sessions": []}'])
def test_a_manifest_of_another_version(content, tmp_path):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(
        UserError, match=r"manifest.json must be of format 1, got .*: another version of cnnjax wrote it"
    ):
        read_manifest(tmp_path)
