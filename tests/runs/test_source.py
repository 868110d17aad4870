import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from cnnjax.cli.main import main
from cnnjax.runs import source
from cnnjax.runs.source import source_code

# What a user may configure, of which the diff must not depend.
CONFIGURATION = """
[color]
ui = always
diff = always
[core]
quotePath = false
autocrlf = true
safecrlf = true
attributesFile = {home}/attributes
fsmonitor = {home}/monitor
abbrev = 4
[diff]
external = /bin/false
noprefix = true
mnemonicPrefix = true
context = 0
interHunkContext = 9
submodule = log
ignoreSubmodules = all
wordRegex = .
orderFile = {home}/order
relative = true
algorithm = patience
renames = copies
suppressBlankEmpty = true
indentHeuristic = false
[diff "shout"]
textconv = tr a-z A-Z <
xfuncname = ^.*$
[filter "shout"]
clean = tr a-z A-Z
required = true
[status]
showUntrackedFiles = no
"""


def git(folder, *arguments):
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def commit(folder):
    git(folder, "add", "--all", "--force")
    git(folder, "commit", "-qm", "a commit")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Replaces the configuration of the user."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / ".gitconfig").write_text('[user]\nname = a\nemail = a@b.c\n[protocol "file"]\nallow = always\n')
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    return folder


@pytest.fixture
def repository(home, tmp_path, monkeypatch):
    folder = tmp_path / "repository"
    (folder / "cnnjax").mkdir(parents=True)
    (folder / "train.py").write_text("print(1)\n")
    (folder / ".gitignore").write_text("runs/\n")
    git(folder, "init", "-q")
    commit(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(source, "__file__", str(folder / "cnnjax" / "source.py"))  # As an editable installation.
    return folder


def tree(folder):
    """Returns the mode and content of every file, by its name as bytes."""
    found = {}
    for top, folders, files in os.walk(os.fsencode(folder)):
        folders[:] = [name for name in folders if name != b".git"]
        for path in (os.path.join(top, name) for name in files):
            name = os.path.relpath(path, os.fsencode(folder))
            if os.path.islink(path):
                found[name] = os.readlink(path)
            else:
                found[name] = (os.stat(path).st_mode & 0o100, Path(os.fsdecode(path)).read_bytes())
    return found


def restored(repository, code, folder):
    """Returns the tree of a clean checkout of the recorded commit with the diff applied."""
    (folder / "diff").write_bytes(code.diff)
    if code.facts["commit"]:
        git(folder, "clone", "-q", "--no-checkout", str(repository), "clone")
        git(folder / "clone", "checkout", "-q", code.facts["commit"])
    else:
        git(folder, "init", "-q", "clone")
    git(folder / "clone", "apply", str(folder / "diff"))
    return tree(folder / "clone")


def write(folder, **contents):
    for name, content in contents.items():
        (folder / f"{name}.py").write_bytes(content)


def change_everything(folder):
    """Commits files, and changes them in every way."""
    write(
        folder,
        gone=b"1\n",
        old=b"2\n" * 9,
        mode=b"3\n",
        end=b"4",
        crlf=b"5\r\n6\n",
        hidden=b"7\n",
        both=b"8\n",
        kind=b"",
    )
    (folder / "picture.bin").write_bytes(bytes(range(256)) * 9)
    (folder / "link.py").symlink_to("old.py")
    (folder / "swap").write_text("a file\n")
    (folder / "pws").mkdir()
    (folder / "pws" / "in.py").write_text("in a folder\n")
    (folder / "long.txt").write_text("".join(f"def f{i}():\n    return {i}\n\n" for i in range(99)))
    commit(folder)
    (folder / "gone.py").unlink()
    git(folder, "mv", "old.py", "new name.py")
    (folder / "mode.py").chmod(0o755)
    git(folder, "update-index", "--assume-unchanged", "hidden.py")
    write(folder, end=b"4\n5", crlf=b"5\n6\r\n", hidden=b"8\n", both=b"9\n")
    git(folder, "add", "both.py")
    write(folder, both=b"10\n", empty=b"", marked=b"later\n", staged=b"staged\n", same=b"print(1)\n")
    (folder / "picture.bin").write_bytes(bytes(range(255, -1, -1)) * 8)
    (folder / "link.py").unlink()
    (folder / "link.py").symlink_to("nowhere")
    (folder / "kind.py").unlink()
    (folder / "kind.py").symlink_to("train.py")
    (folder / "swap").unlink()
    (folder / "swap").mkdir()
    (folder / "swap" / "in.py").write_text("in a folder\n")
    shutil.rmtree(folder / "pws")
    (folder / "pws").write_text("a file\n")
    (folder / "long.txt").write_text((folder / "long.txt").read_text().replace("return 42", "return 0\n\n# \xe4"))
    (folder / "data.bin").write_bytes(b"\0\1" * 99)
    git(folder, "add", "staged.py", "data.bin", "pws")
    git(folder, "add", "--intent-to-add", "marked.py")
    for name in (
        'a "quote".py',
        "a\ttab.py",
        "a\nline.py",
        "\xe4 \u4e2d.py",
        os.fsdecode(b"\xff\xfe.py"),
        "-x.py",
        ":(top).py",
    ):
        (folder / name).write_bytes(os.fsencode(name) + b"\r\n")


def test_a_clean_tree_is_its_commit(repository):
    facts, diff = source_code()
    assert (facts, diff) == ({"commit": git(repository, "rev-parse", "HEAD"), "dirty": False}, b"")
    assert source_code().warnings() == []


def test_a_folder_without_a_repository_has_no_commit(repository, tmp_path, monkeypatch):
    shutil.rmtree(repository / ".git")
    monkeypatch.setenv("PATH", str(tmp_path))  # No git, which is not needed.
    assert source_code() == ({"commit": None, "dirty": False}, b"")
    (tmp_path / "deleted").mkdir()
    monkeypatch.chdir(tmp_path / "deleted")
    (tmp_path / "deleted").rmdir()
    assert source_code() == ({"commit": None, "dirty": False}, b"")


def test_a_package_in_another_repository_is_recorded(repository, tmp_path, monkeypatch):
    package = tmp_path / "package"
    git(tmp_path, "clone", "-q", str(repository), "package")
    monkeypatch.setattr(source, "__file__", str(package / "source.py"))
    commit = git(package, "rev-parse", "HEAD")
    assert source_code().facts["package_commit"] == commit
    (package / "train.py").write_text("print(3)\n")
    facts, diff = source_code()
    assert facts["package_commit"].startswith(f"{commit} and a diff, SHA-256 ")
    assert not facts["dirty"] and diff == b""
    (package / ".git" / "index").write_bytes(b"broken")
    facts, _ = source_code()
    assert facts["package_commit"] == commit and facts["dirty"]
    (left_out,) = facts["left_out"]
    assert left_out.startswith("the changes since the commit (git ls-files: ") and left_out.endswith(f") in {package}")
    monkeypatch.chdir(package)
    assert "package_commit" not in source_code().facts


def test_the_diff_restores_every_kind_of_change(repository, tmp_path):
    change_everything(repository)
    code = source_code()
    assert code.facts["dirty"] and code.warnings() == []
    (repository / "untracked.bin").touch()  # No source.
    (repository / "runs").mkdir()
    (repository / "runs" / "ignored.py").touch()
    assert source_code() == code
    (repository / "untracked.bin").unlink()
    shutil.rmtree(repository / "runs")
    assert restored(repository, code, tmp_path) == tree(repository)


def test_the_diff_does_not_depend_on_configuration_times_or_the_working_directory(repository, home, monkeypatch):
    change_everything(repository)
    expected = source_code()
    with (home / ".gitconfig").open("a") as file:
        file.write(CONFIGURATION.format(home=home))
    attributes = "*.py diff=shout\n*.txt diff=shout -text\n*.bin diff=shout\n"
    (home / "monitor").write_text(f"#!/bin/sh\ntouch '{home}/ran'\n")
    (home / "monitor").chmod(0o755)
    (home / "git").mkdir()
    (home / "git" / "attributes").write_text("*.txt -diff\n")
    (home / "order").write_text("staged.py\n")
    (home / "attributes").write_text(attributes)
    (repository / ".git" / "info" / "attributes").write_text(attributes)
    for path in repository.rglob("*.py"):
        os.utime(path, (1, 1), follow_symlinks=False)
    monkeypatch.chdir(repository / "swap")
    for name in (
        "DIR",
        "INDEX_FILE",
        "WORK_TREE",
        "OBJECT_DIRECTORY",
        "EXTERNAL_DIFF",
        "DIFF_OPTS",
        "LITERAL_PATHSPECS",
    ):
        monkeypatch.setenv(f"GIT_{name}", f"{home}/nowhere/{name}")
    assert source_code() == expected
    assert not (home / "ran").exists()


def test_a_working_tree_of_git_worktree_has_the_same_diff(repository, monkeypatch):
    write(repository, train=b"print(2)\n")
    expected = source_code()
    git(repository, "worktree", "add", "-q", "--detach", "../tree")
    write(repository.parent / "tree", train=b"print(2)\n")
    monkeypatch.chdir(repository.parent / "tree")
    monkeypatch.setattr(source, "__file__", str(repository.parent / "tree" / "source.py"))
    assert source_code() == expected


def test_the_user_s_repository_is_only_read(repository):
    change_everything(repository)

    def state():
        paths = [repository / ".git", *(repository / ".git").rglob("*")]
        return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in paths}

    for path in (repository / ".git" / "objects").rglob("*"):
        os.utime(path, (1, 1))
    before = state()
    assert source_code().diff
    assert state() == before


@pytest.mark.parametrize("name", ["sha1", "sha256"])
def test_a_repository_without_a_commit(name, repository, tmp_path):
    shutil.rmtree(repository / ".git")
    git(repository, "init", "-q", f"--object-format={name}")
    (repository / "new.py").write_text("print(3)\n")
    git(repository, "add", ".gitignore")
    code = source_code()
    assert code.facts["commit"] is None and code.facts["dirty"] and code.warnings() == []
    assert restored(repository, code, tmp_path) == tree(repository)
    commit(repository)
    assert source_code() == ({"commit": git(repository, "rev-parse", "HEAD"), "dirty": False}, b"")


def test_what_exceeds_the_limits_is_named_and_the_rest_applies(repository, tmp_path, monkeypatch):
    """The user's own files lie near the root."""
    for name in ("weights.bin", "same.bin", "same too.bin"):
        (repository / name).write_bytes(os.urandom(3000))
    commit(repository)
    monkeypatch.setattr(source, "NUM_FILES", 3)
    monkeypatch.setattr(source, "FILE_LIMIT", 1024)
    monkeypatch.setattr(source, "DIFF_LIMIT", 4096)
    for i in range(9):
        (repository / "env" / f"p{i}").mkdir(parents=True)
        (repository / "env" / f"p{i}" / "m.py").write_text(f"{i}\n")
    write(repository, mine=b"1\n", large=b"#" * 1025, train=b"print(2)\n")
    (repository / "weights.bin").write_bytes(os.urandom(3000))
    git(repository, "rm", "-q", "--cached", "train.py")
    code = source_code()
    assert code.facts["left_out"] == [
        "weights.bin, env/p2/m.py, env/p3/m.py and 5 more (beyond 3 untracked files or 0 MiB)",
        "large.py (untracked and above 1 KiB)",
    ]
    (line,) = code.warnings()
    assert line.startswith("The record of this run's source code lacks weights.bin, env/p2/m.py") and line[-1] == "."
    found = restored(repository, code, tmp_path)
    names = {b"train.py", b"mine.py", b"env/p0/m.py", b"env/p1/m.py", b".gitignore"}
    assert {name: x for name, x in tree(repository).items() if name in names} == {name: found[name] for name in names}
    assert found.keys() == names | {b"weights.bin", b"same.bin", b"same too.bin"}
    (repository / "weights.bin").write_bytes(b"")  # The diff contains the old content, too.
    monkeypatch.setattr(source, "DIFF_LIMIT", 2999)
    assert "weights.bin" in str(source_code().facts["left_out"])


def test_the_number_of_processes_does_not_grow_with_the_number_of_files(repository, monkeypatch):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *args, **options: (started.append(args), popen(*args, **options))[1]
    )
    write(repository, train=b"print(2)\n", **{f"new{i}": b"1\n" for i in range(60)})
    assert source_code().diff.count(b"\nnew file mode") == 60
    assert len(started) < 20


def test_a_run_directory_that_is_tracked_does_not_record_itself(repository):
    run_dir = repository / "runs" / "mine"
    run_dir.mkdir(parents=True)
    (run_dir / "manifest.json").write_text("1")
    commit(repository)
    (run_dir / "manifest.json").write_text("2")
    (run_dir / "own.py").write_text("2")
    git(repository, "add", "--force", "runs")
    assert source_code(Path("runs/mine")).diff == b""
    assert b"manifest.json" in source_code(repository / "runs" / "mine2").diff
    assert source_code(repository / "runs" / "mine2", run_dir).diff == b""


def test_changes_in_submodules_and_other_repositories_are_named(repository, tmp_path):
    git(tmp_path, "clone", "-q", str(repository), "library")
    git(repository, "submodule", "--quiet", "add", str(tmp_path / "library"), "clean")
    git(repository, "submodule", "--quiet", "add", str(tmp_path / "library"), "dirty")
    git(repository, "submodule", "--quiet", "add", str(tmp_path / "library"), "moved")
    commit(repository)
    index = repository / ".git" / "modules" / "clean" / "index"
    before = index.read_bytes()
    os.utime(repository / "clean" / "train.py", (1, 1))
    assert source_code().facts["dirty"] is False and index.read_bytes() == before
    git(repository, "clone", "-q", str(tmp_path / "library"), "nested")
    (repository / "dirty" / "new.py").touch()
    git(repository / "moved", "commit", "-q", "--allow-empty", "-m", "another")
    moved = git(repository / "moved", "rev-parse", "HEAD")
    (repository / "train.py").write_text("print(2)\n")
    code = source_code()
    assert code.facts["left_out"] == ["dirty (changes in a submodule)", "nested/ (another repository)"]
    assert f"+Subproject commit {moved}\n".encode() in code.diff and b"dirty" not in code.diff
    assert restored(repository, code, tmp_path)[b"train.py"][1] == b"print(2)\n"


def test_large_files_and_those_that_a_filter_converts_are_named_if_they_changed(repository, tmp_path, monkeypatch):
    """As those of git-lfs, whose content is not in git; git-lfs itself may be absent."""
    (repository / ".gitattributes").write_text("*.bin filter=lfs\n")
    for name in ("same", "changed"):
        (repository / f"{name}.bin").write_bytes(b"pixels")
        os.utime(repository / f"{name}.bin", (1, 1))  # As if written long before the index.
    monkeypatch.setattr(source, "DIFF_LIMIT", 1 << 20)
    for name in ("large", "larger"):
        (repository / name).write_bytes(bytes(1 << 21))
        os.utime(repository / name, (1, 1))
    git(repository, "config", "filter.lfs.clean", "sha256sum")
    git(repository, "config", "filter.lfs.required", "true")
    commit(repository)
    git(repository, "config", "filter.lfs.clean", "git-lfs-is-not-installed")
    assert source_code().facts["dirty"] is False
    (repository / "changed.bin").write_bytes(b"other pixels")
    (repository / "larger").write_bytes(bytes(1 << 22))
    (repository / "train.py").write_text("print(2)\n")
    code = source_code()
    assert code.facts["left_out"] == ["larger (above 1 MiB)", "changed.bin (converted by a filter of git)"]
    assert restored(repository, code, tmp_path)[b"train.py"][1] == b"print(2)\n"


def test_a_sparse_checkout_and_a_conflict(repository, tmp_path):
    (repository / "other").mkdir()
    (repository / "other" / "absent.py").write_text("1\n")
    commit(repository)
    git(repository, "checkout", "-q", "-b", "side")
    write(repository, train=b"print(2)\n")
    commit(repository)
    git(repository, "checkout", "-q", "-")
    write(repository, train=b"print(3)\n")
    commit(repository)
    write(repository / "other", lost=b"1\n")
    git(repository, "add", "other")
    git(repository, "sparse-checkout", "set", "--no-cone", "/*", "!/other/")
    git(repository, "update-index", "--skip-worktree", "other/lost.py")
    shutil.rmtree(repository / "other", ignore_errors=True)
    assert not (repository / "other").exists() and not source_code().facts["dirty"]
    git(repository, "update-index", "--force-remove", "other/lost.py")
    with pytest.raises(subprocess.CalledProcessError):
        git(repository, "merge", "side")
    code = source_code()
    assert b"<<<<<<<" in code.diff and b"absent" not in code.diff
    assert restored(repository, code, tmp_path)[b"train.py"][1] == (repository / "train.py").read_bytes()


def remove_object(repository, name):
    path = repository / ".git" / "objects" / name[:2] / name[2:]
    path.unlink()


def no_blob(repository, _):
    remove_object(repository, git(repository, "rev-parse", "HEAD:train.py"))


def no_tree(repository, _):
    remove_object(repository, git(repository, "rev-parse", "HEAD^{tree}"))


def no_commit(repository, _):
    remove_object(repository, git(repository, "rev-parse", "HEAD"))


def broken_index(repository, _):
    (repository / ".git" / "index").write_bytes(b"DIRC" + bytes(99))


def broken_branch(repository, _):
    (repository / ".git" / git(repository, "symbolic-ref", "HEAD")).write_text("broken\n")


def broken_head(repository, _):
    (repository / ".git" / "HEAD").write_text("broken\n")


def hangs(repository, monkeypatch):
    (repository / ".git" / "index").unlink()
    os.mkfifo(repository / ".git" / "index")
    monkeypatch.setattr(source, "TIMEOUT", 0.5)


def not_installed(repository, monkeypatch):
    monkeypatch.setenv("PATH", str(repository))


def no_space(repository, monkeypatch):
    def full(**options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(source, "TemporaryDirectory", full)


def pipe(repository, _):
    (repository / "train.py").unlink()
    os.mkfifo(repository / "train.py")


@pytest.mark.parametrize(
    ("damage", "has_commit", "left_out"),
    [
        (no_blob, True, "train.py (whose old content is missing from git's objects)"),
        (no_tree, True, "the changes since the commit (git ls-tree: "),
        (no_commit, True, "the changes since the commit (git ls-tree: "),
        (broken_index, True, "the changes since the commit (git ls-files: "),
        (broken_branch, False, "the commit and the changes since (git log: "),
        (broken_head, False, "the commit and the changes since (git rev-parse: "),
        (hangs, True, "the changes since the commit (git took too long)"),
        (not_installed, False, "the commit and the changes since ([Errno 2] "),
        (no_space, True, "the changes since the commit ([Errno 28] No space"),
        (pipe, True, "train.py (not a regular file)"),
    ],
)
def test_what_git_cannot_read_is_named_and_stops_no_run(damage, has_commit, left_out, repository, monkeypatch):
    head = git(repository, "rev-parse", "HEAD")
    write(repository, train=b"print(2)\n", new=b"3\n")
    damage(repository, monkeypatch)
    facts, diff = source_code()
    assert facts["commit"] == (head if has_commit else None)
    assert facts["dirty"]
    (found,) = facts["left_out"]
    assert found.startswith(left_out)
    assert (b"new.py" in diff) == (damage in (no_blob, pipe))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process as another user")
def test_another_user_s_repository_and_unreadable_files(repository):
    program = (
        "import json, os; from cnnjax.runs import source; os.setgid(65534); os.setuid(65534);"
        "source.__file__ = os.path.abspath('source.py'); code = source.source_code();"
        "print(json.dumps([code.facts['left_out'], code.diff.decode()]))"
    )
    (repository / "folder").mkdir()
    write(repository / "folder", inside=b"1\n")
    commit(repository)
    write(repository, train=b"print(2)\n", new=b"3\n", secret=b"4\n")
    with TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(repository, folder / "copy")
        (folder / "gitconfig").touch()
        environment = {**os.environ, "GIT_CONFIG_GLOBAL": str(folder / "gitconfig")}

        def run():
            command = [sys.executable, "-c", program]
            return json.loads(subprocess.check_output(command, cwd=folder / "copy", env=environment))

        (left_out,), diff = run()
        assert left_out.startswith("the commit and the changes since (git rev-parse: fatal: ") and diff == ""
        assert "ownership" in left_out
        (folder / "gitconfig").write_text("[safe]\ndirectory = *\n")
        (folder / "copy" / "folder").chmod(0)
        for unreadable in ("train.py", "secret.py"):
            (folder / "copy" / unreadable).chmod(0)
        left_out, diff = run()
        assert left_out == ["folder/inside.py, train.py, secret.py (unreadable)"]
        assert "new.py" in diff and "train.py" not in diff


def test_training_reports_what_it_could_not_record(repository, prepared_dir, capsys):
    (repository / ".git" / "index").write_bytes(b"DIRC" + bytes(99))
    words = f"--dataset generated --data-dir {prepared_dir} --model mlp --num-epochs 1 --batch-size 32 --run-dir runs/a"
    main(["train", *words.split()])
    printed = " ".join(capsys.readouterr().out.split())
    assert "The record of this run's source code lacks the changes since the commit (git ls-files: error: " in printed
    (session,) = json.loads(Path("runs/a/manifest.json").read_text())["sessions"]
    assert session["state"] == "finished" and session["commit"] == git(repository, "rev-parse", "HEAD")
    assert session["left_out"][0].startswith("the changes since the commit (git ls-files: ") and "diff" not in session
