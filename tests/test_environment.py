"""Processes in any environment: streams that are closed or full, a terminal that closes, signals, make, and jax."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cnnjax import MLP, Config, Interrupted, train_and_evaluate
from cnnjax.cli.main import main

ROOT = Path(__file__).parents[1]
PROGRAMS = Path(__file__).with_name("programs")
CNNJAX = [sys.executable, "-m", "cnnjax"]


@pytest.fixture(scope="module")
def options(prepared_dir):
    """Options of `cnnjax train`: 9 steps in 3 epochs, each of which is saved."""
    options = ["--dataset", "generated", "--data-dir", str(prepared_dir), "--model", "mlp", "--num-epochs", "3"]
    return [*options, "--batch-size", "130", "--checkpoint-seconds", "0", "--no-report"]


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """A run that nothing disturbs."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    main(["train", *options, "--run-dir", str(run_dir)])
    return run_dir


def digests(run_dir):
    return json.loads((run_dir / "result.json").read_text())["sha256"]


@pytest.fixture(autouse=True)
def outside_make(monkeypatch):
    """`make test` passes its own variables on."""
    for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):
        monkeypatch.delenv(name, raising=False)


def shell(script, *arguments, **environment):
    """Runs a script with `arguments` as "$@"."""
    command = ["bash", "-c", script, "bash", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


# --- Streams --------------------------------------------------------------------------------------------------------


def test_training_needs_neither_standard_input_nor_standard_error(whole, options, tmp_path):
    done = shell('"$@" <&- 2>&-', *CNNJAX, "train", *options, "--run-dir", tmp_path / "run")
    assert done.returncode == 0
    assert "Test accuracy" in done.stdout.splitlines()[-1]
    assert digests(tmp_path / "run") == digests(whole)


def test_training_continues_if_its_reader_ends(whole, options, tmp_path):
    done = shell('set -o pipefail; "$@" | head -1', *CNNJAX, "train", *options, "--run-dir", tmp_path / "run")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == "Standard output cannot be written (Broken pipe): the run continues without it.\n"
    assert digests(tmp_path / "run") == digests(whole)


@pytest.mark.parametrize(
    ("script", "status", "message"),
    [
        ('set -o pipefail; "$@" | true', 141, ""),
        ('"$@" > /dev/full', 1, "Standard output cannot be written: No space left on device.\n"),
        ('"$@" 2> /dev/full', 0, ""),
        ('"$@" >&- 2>&- <&-', 0, ""),
    ],
)
def test_output_of_other_commands_that_is_lost(script, status, message):
    for unbuffered in ("", "1"):
        done = shell(script, *CNNJAX, "--help", PYTHONUNBUFFERED=unbuffered)
        assert (done.returncode, done.stderr) == (status, message)


def test_a_narrow_encoding_escapes_what_it_lacks(prepared_dir):
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = shell('"$@"', *CNNJAX, "data", "generated", "--data-dir", prepared_dir, **environment)
    assert done.returncode == 0, done.stderr
    assert r"430\xd728\xd728\xd71" in done.stdout


# --- Signals --------------------------------------------------------------------------------------------------------


def test_a_run_whose_terminal_closes_resumes_to_the_same_bits(whole, options, tmp_path):
    run_dir = tmp_path / "run"
    command = [*CNNJAX, "train", *options, "--run-dir", str(run_dir)]
    terminal = [sys.executable, str(PROGRAMS / "terminal.py"), "epoch 1/3", *command]
    assert subprocess.check_output(terminal, text=True) == "75\n"
    session = json.loads((run_dir / "manifest.json").read_text())["sessions"][-1]
    assert session["error"].startswith("Stopped by SIGHUP; the checkpoint of step ")
    assert not (run_dir / "result.json").exists()
    main(["train", *options, "--run-dir", str(run_dir), "--resume"])
    assert digests(run_dir) == digests(whole)


def test_signals_that_are_ignored_at_the_start_or_arrive_at_the_end_change_nothing(whole, options, tmp_path):
    run_dir = tmp_path / "run"
    command = ["sh", "-c", "trap '' HUP; exec \"$@\"", "sh", *CNNJAX, "train", *options, "--run-dir", str(run_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if line.startswith("epoch 1/3"):
                process.send_signal(signal.SIGHUP)
            if line.startswith("Test accuracy"):
                break
        while process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGINT)
            time.sleep(0.001)
        assert (process.returncode, process.stderr.read()) == (0, "")
    assert digests(run_dir) == digests(whole)


class Signals(MLP):
    """A network during whose initialization a signal arrives."""

    def init_from_data(self, variables, image):
        signal.raise_signal(signal.SIGTERM)
        INITIALIZED.append(image.shape)
        return variables


INITIALIZED = []


def test_a_signal_does_not_interrupt_the_compiler_nor_an_import(prepared_dir, tmp_path, monkeypatch, capsys):
    """Either can crash the process when it ends."""
    config = Config(dataset="generated", model=Signals())
    with pytest.raises(Interrupted, match=r"Stopped by SIGTERM; nothing is lost\."):
        train_and_evaluate(config, run_dir=tmp_path / "run", data_dir=prepared_dir)
    assert INITIALIZED == [(1, 28, 28, 1), (390, 28, 28, 1)]  # Once for the shapes, once for the values.
    assert not (tmp_path / "run").exists()

    def parse_train(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        INITIALIZED.append("parsed")
        return pytest.fail

    monkeypatch.setattr("cnnjax.cli.train_command.parse_train", parse_train)
    with pytest.raises(SystemExit) as stopped:
        main(["train"])
    assert (stopped.value.code, INITIALIZED[2:]) == (75, ["parsed"])
    assert "Stopped by SIGTERM; nothing is lost. Resume with:\n" in capsys.readouterr().err


# --- Make -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path):
    """A folder with our Makefile, in which `make train` calls the installed package, or the `program` in a file."""
    folder = tmp_path / "repository"
    (folder / ".venv" / "bin").mkdir(parents=True)
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)

    def install(program):
        script = folder / ".venv" / "bin" / "cnnjax"
        script.write_text(f"#!/bin/sh\n{program}\n")
        script.chmod(0o755)
        for name in ("installed", "installed-cuda"):
            (folder / ".venv" / name).touch()
        return folder

    return install


WAITS = """trap 'sleep 0.2; echo saved; exit 75' TERM
echo started; while true; do sleep 0.1; done"""


@pytest.mark.parametrize("group", [False, True])
def test_make_passes_a_signal_to_the_training_and_waits(group, repository):
    command = ["make", "-C", str(repository(WAITS)), "train", "ARGS='quotes need a shell'"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert any(line == "started\n" for line in process.stdout)
        (os.killpg if group else os.kill)(process.pid, signal.SIGTERM)
        assert "saved\n" in process.stdout.read()


def test_a_training_of_make_that_is_stopped_prints_a_command_that_resumes(whole, options, repository, tmp_path):
    """The signal comes twice, as from `timeout`, and to make's whole group."""
    folder = repository(f'exec {shlex.join(CNNJAX)} "$@"')
    run_dir = tmp_path / "a $run"  # Quotes, a space and a dollar, for make and for the shell.
    ours = [word for word in options if word not in ("--dataset", "generated", "--model", "mlp")]
    arguments = f"{shlex.join(ours)} --run-dir {shlex.quote(str(run_dir))}"
    command = ["make", "train", "DATASET=generated", "ARGS=" + arguments.replace("$", "$$")]
    environment = {**os.environ, "MODEL": "mlp", "PWD": str(folder), "CNNJAX_EXIT_CODE": "code"}  # PWD as of a shell.
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=-1, stderr=-1, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert any(line.startswith("epoch 1/3") for line in process.stdout)
        for _ in range(2):
            os.killpg(process.pid, signal.SIGTERM)
            time.sleep(0.1)
        errors = process.stderr.read()
    assert process.returncode in (2, -signal.SIGTERM)
    assert (folder / "code").read_text() == "75\n"  # Hence the advice in the README.
    assert re.search(r"Stopped by SIGTERM; the checkpoint of step \d+ is saved", errors)
    (line,) = re.findall("Resume with:\n  (.*)\n", errors)
    assert line.startswith("make train DATASET=generated MODEL=mlp ARGS=")
    done = subprocess.run(["sh", "-c", line], cwd=folder, capture_output=True, text=True, check=False)
    assert "resuming at step" in done.stdout, done.stderr
    assert digests(run_dir) == digests(whole)


def test_make_quotes_paths(repository):
    folder = repository('printf "%s, " "$@"')
    (folder / "photos_cnn.py").touch()  # Not the experiment of "my photos".
    for variable, arguments in {
        "EXPERIMENT=my folder/x's.py": "my folder/x's.py, ",
        "DATASET=my photos": "--dataset, my photos, --model, cnn, ",
    }.items():
        command = ["make", "-s", "-C", str(folder), "train", variable]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.stdout == f"train, {arguments}--seed, 0, ", done.stderr
        done = subprocess.run([*command, "ARGS=--seeds 0:3"], capture_output=True, text=True, check=False)
        assert done.stdout == f"train, {arguments}--seeds, 0:3, ", done.stderr
        done = subprocess.run([*command, "SEED=1", "ARGS=--seeds 0:3"], capture_output=True, text=True, check=False)
        assert done.stdout == f"train, {arguments}--seed, 1, --seeds, 0:3, ", done.stderr
        done = subprocess.run([*command, 'ARGS=--name "its--seeds\'"'], capture_output=True, text=True, check=False)
        assert done.stdout == f"train, {arguments}--seed, 0, --name, its--seeds', " and not done.stderr


def test_make_refuses_a_variable_that_is_misspelt_or_missing(repository):
    folder = repository('echo "$VISIBLE_DEVICES"')
    for command, message in {
        "train dataset=mnist": "make has no variable dataset, but DATASET, MODEL, ",
        "eval": "RUN must name a run, got none: make eval RUN=runs/cifar10_fast-seed0.",
        "export RUN=runs/a": "DIR must name a new folder, got none: make export RUN=runs/a DIR=exported.",
    }.items():
        done = shell(f"make -C {folder} {command}")
        assert done.returncode == 2 and message in done.stderr, done.stderr
    # Others are for the programs that make starts.
    assert shell(f"make -s -C {folder} train VISIBLE_DEVICES=3").stdout == "3\n"


def test_the_command_that_resumes_names_what_is_the_users(repository):
    folder = repository(f'exec {sys.executable} -c "$RESUME" train "$@"')
    print_it = "import sys; from cnnjax.cli.main import _resume_command as f; sys.orig_argv = sys.argv; print(f())"
    for script, expected in {
        "make train": "make train ARGS=--resume",
        "make train DATASET=mnist MODEL=mlp SEED=1": "make train DATASET=mnist MODEL=mlp SEED=1 ARGS=--resume",
        "make train EXPERIMENT=mine ARGS='--seeds 0:3'": "make train EXPERIMENT=mine ARGS='--seeds 0:3 --resume'",
        f"cd / && make -s -C {folder} train ARGS=--resume": f"make -C {folder} train ARGS=--resume",
    }.items():
        environment = {"RESUME": print_it, "PYTHONPATH": str(ROOT)}
        done = shell(f"cd {folder} && {script}", **environment)
        assert done.stdout == expected + "\n", done.stderr


# --- jax ------------------------------------------------------------------------------------------------------------


def test_a_platform_that_jax_lacks_is_a_message_of_every_command_and_function(whole, prepared_dir):
    program = [sys.executable, PROGRAMS / "platforms.py", whole, prepared_dir]
    done = shell('"$@"', *program, JAX_PLATFORMS="nonsense")
    assert done.returncode == 0, done.stderr
    message = "`JAX_PLATFORMS` must name what jax finds here, such as cpu, got 'nonsense'"
    assert [line if line.startswith("status") else line[: len(message)] for line in done.stderr.splitlines()] == [
        message,
        "status 2",
        message,
        "status 2",
        message,
        message,
    ]


def test_a_value_that_jax_refuses_when_it_is_imported_is_a_message():
    done = shell('"$@"', *CNNJAX, "train", JAX_ENABLE_X64="perhaps")
    assert done.returncode == 2
    assert done.stderr.startswith("jax refuses an environment variable: invalid truth value 'perhaps'")
    assert "JAX_ENABLE_X64" in done.stderr
    assert len(done.stderr.splitlines()) == 1
