"""Loggers: what TensorBoard, Weights & Biases and MLflow read back, and loggers of a user's own."""

import csv
import importlib.util
import json
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from generated import Lines
from programs import research
from programs.research import CONFIG
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.get_experiment import Handler as GetExperiment
from tensorboard.plugins.hparams.list_session_groups import Handler as ListSessionGroups

from cnnjax import SGD, Interrupted, Logger, MLflow, Run, TensorBoard, UserError, WandB, train_and_evaluate
from cnnjax.cli.main import main
from cnnjax.process.signals import Stop
from cnnjax.runs import trackers
from cnnjax.runs.inspection import verify
from cnnjax.runs.loggers import Loggers, check_loggers
from cnnjax.runs.manifest import read_manifest

PROGRAMS = Path(research.__file__).parent


class Record(Logger):
    """Keeps its calls; what it does to its arguments affects nothing."""

    def __init__(self):
        self.calls = []

    def start(self, run, step):
        assert run.result is None and run.facts.class_names
        self.calls.append(("start", run.run_dir, step))

    def on_step(self, step, metrics):
        self.calls.append((step, {**metrics}))
        metrics.clear()

    def on_epoch(self, row, state):
        self.calls.append(("epoch", {**row}))
        row.clear()

    def finish(self, result):
        self.calls.append(("finish", result))


class Failing(Logger):
    def __init__(self, method):
        self.method = method

    def start(self, run, step):
        if self.method == "start":
            raise OSError("no such server")

    def on_step(self, step, metrics):
        if self.method == "on_step" and step == 2:
            raise KeyError("a key")


class Deleting(Logger):
    def on_epoch(self, row, state):
        for leaf in jax.tree.leaves(state):
            leaf.delete()


class Exiting(Logger):
    def finish(self, result):
        sys.exit(3)


def read_events(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def scalars(events):
    """Returns {tag: [(step, value)]}."""
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def text(events, tag):
    (event,) = events.Tensors(f"{tag}/text_summary")
    return event.tensor_proto.string_val[0].decode()


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """The same run with TensorBoard and a logger of our own; returns the run, and the calls of the latter."""
    record = Record()
    run_dir = tmp_path_factory.mktemp("logged") / "run"
    return train_and_evaluate(CONFIG, run_dir=run_dir, loggers=[record, TensorBoard()]), record.calls


def test_loggers_change_no_bit_and_are_called_in_order(research_run, logged):
    run, calls = logged
    assert run.result["sha256"] == research_run.result["sha256"]
    assert calls[0] == ("start", run.run_dir, 0)
    assert [c[0] if c[0] != "epoch" else f"epoch {c[1]['epoch']}" for c in calls[1:-1]] == [
        *range(1, 7), "epoch 1", *range(7, 13), "epoch 2", *range(13, 19), "epoch 3"
    ]  # fmt: skip
    assert calls[-1] == ("finish", run.result)


def test_tensorboard_reads_the_metrics_the_scores_and_the_configuration(logged):
    run, calls = logged
    events = read_events(run.run_dir / "tensorboard")
    found = scalars(events)
    of_steps = [call for call in calls if isinstance(call[0], int)]
    for name in ("loss", "accuracy", "grad_norm", "learning_rate"):
        steps, values = zip(*found.pop(f"batch/{name}"), strict=True)
        assert steps == tuple(range(1, 19))
        np.testing.assert_array_equal(np.float32(values), np.float32([metrics[name] for _, metrics in of_steps]))
    rates = [metrics["learning_rate"] for _, metrics in of_steps]
    np.testing.assert_allclose(rates, [0.1] * 6 + [0] * 4 + [-2] * 2 + [0] * 6, rtol=1e-6)  # Of research.py.
    rows = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    for name in rows[0].keys() - {"epoch", "step", "params_sha256"}:
        expected = [(row["step"], np.float32(row[name])) for row in rows]
        assert found.pop(name.replace("_", "/", 1)) == expected
    assert found.pop("images_per_second") == [
        (6 * (i + 1), np.float32(x)) for i, x in enumerate(run.history["images_per_second"])
    ]
    assert [step for step, _ in found.pop("seconds")] == [6, 12, 18]
    assert found.pop("learning_rate") == [(6, np.float32(0.1)), (12, -2), (18, 0)]  # Of the optimizer in research.py.
    for name in ("accuracy", "balanced_accuracy", "loss", "macro_precision", "macro_recall", "macro_f1"):
        assert found.pop(f"test/{name}") == [(18, np.float32(run.result[f"test_{name}"]))]
    for name in ("top2", "probability"):  # Of research.py.
        assert found.pop(f"test/{name}") == [(18, np.float32(run.result["test_metrics"][name]))]
    assert not found
    matrix = [
        [int(cell) for cell in row.split("|")[2:-1]] for row in text(events, "test/confusion_matrix").split("\n")[2:]
    ]
    assert matrix == run.result["confusion_matrix"]
    assert {"| optim.momentum | 0.5 |", "| seed | 3 |"} < {*text(events, "config").split("\n")}


def test_the_hparams_tab_of_tensorboard_has_the_options_and_the_test_accuracy(logged):
    run, _ = logged
    logdir = str(run.run_dir)
    multiplexer = EventMultiplexer().AddRunsFromDirectory(logdir)
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, logdir)
    context = Context(TBContext(data_provider=provider, logdir=logdir, multiplexer=multiplexer))
    known = GetExperiment(RequestContext(), context, "", api_pb2.GetExperimentRequest(include_metrics=True)).run()
    assert "test/accuracy" in {metric.name.tag for metric in known.metric_infos}
    request = api_pb2.ListSessionGroupsRequest(slice_size=1, allowed_statuses=[api_pb2.STATUS_SUCCESS])
    (group,) = ListSessionGroups(RequestContext(), context, "", request).run().session_groups
    assert group.hparams["optim.momentum"].number_value == 0.5
    shown = {metric.name.tag: metric.value for metric in group.metric_values}
    assert shown["test/accuracy"] == np.float32(run.result["test_accuracy"])


def test_the_learning_rate_is_that_of_the_last_update(research_run, tmp_path):
    """One cycle over 3 epochs of 2 updates, of 3 batches each."""
    optim, logger = SGD(learning_rate=0.6, schedule="one_cycle", warmup=0.5, accumulate_steps=3), TensorBoard()
    logger_run, record = Run(tmp_path, replace(CONFIG, optim=optim), research_run.facts, None), Record()
    loggers = Loggers([logger, record])
    with loggers.started(logger_run, 0, 18, Stop()):
        for epoch in (1, 2, 3):
            loggers.on_epoch({"epoch": epoch, "step": 6 * epoch}, research_run.state)
        for step in (1, 3, 4, 6, 12, 18):
            loggers.on_step(step, {})
    rates = scalars(read_events(tmp_path / "tensorboard"))["learning_rate"]
    np.testing.assert_allclose(rates, [(6, 0.2), (12, 0.6), (18, 0.2)], rtol=1e-6)  # Updates 1, 3 and 5.
    rates = [call[1]["learning_rate"] for call in record.calls[1:-1]]
    np.testing.assert_allclose(rates, [0.2, 0.6, 0.2, 0, 0, 0.2, 0.2, 0.6, 0.2], rtol=1e-6)


def test_an_epoch_that_ends_within_an_update_has_the_learning_rate_of_its_last_step(research_run, tmp_path):
    optim, record = SGD(learning_rate=0.6, schedule="one_cycle", warmup=0.5, accumulate_steps=4), Record()
    loggers = Loggers([record])
    with loggers.started(Run(tmp_path, replace(CONFIG, optim=optim), research_run.facts, None), 0, 12, Stop()):
        loggers.on_step(6, {})
        loggers.on_epoch({"epoch": 1, "step": 6}, research_run.state)
    (_, of_step), (_, of_epoch) = record.calls[1:-1]
    assert of_step["learning_rate"] == of_epoch["learning_rate"] > 0


def test_after_a_kill_every_step_is_there_once(tmp_path):
    """Within the second epoch. A copy of the run directory is what a kill leaves: nothing is lost in a buffer."""
    run_dir = tmp_path / "copy"

    def kill(step, metrics):
        if step == 10:
            while not (tmp_path / "run/checkpoints/6/SHA256SUMS").exists():
                time.sleep(0.01)
            shutil.copytree(tmp_path / "run", run_dir)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_and_evaluate(CONFIG, run_dir=tmp_path / "run", loggers=[TensorBoard()], on_step=kill)
    check_killed(run_dir)


@pytest.mark.slow
def test_after_a_real_kill_every_step_is_there_once(tmp_path):
    command = [sys.executable, str(PROGRAMS / "killed_with_logger.py"), str(tmp_path / "run")]
    killed = subprocess.run(command, check=False)
    assert killed.returncode == -signal.SIGKILL
    check_killed(tmp_path / "run")


def check_killed(run_dir):
    """Resumes a run that was killed after step 10: its steps after the checkpoint of step 6 are logged again."""
    before = scalars(read_events(run_dir / "tensorboard"))
    assert [step for step, _ in before["batch/loss"]] == [*range(1, 11)]
    record = Record()
    run = train_and_evaluate(CONFIG, run_dir=run_dir, resume=True, loggers=[TensorBoard(), record])
    assert record.calls[0] == ("start", run_dir, 6) and record.calls[1][0] == 7
    found = scalars(read_events(run_dir / "tensorboard"))
    assert [step for step, _ in found["batch/loss"]] == [*range(1, 19)]
    assert [step for step, _ in found["train/loss"]] == [6, 12, 18]
    assert found["test/accuracy"] == [(18, np.float32(run.result["test_accuracy"]))]
    assert {*verify(run_dir).values()} == {"ok"}
    assert len([*(run_dir / "tensorboard").iterdir()]) == 2


def test_a_run_that_is_stopped_and_a_finished_one(research_run, tmp_path):
    def interrupt(step, metrics):
        if step == 8:
            signal.raise_signal(signal.SIGTERM)

    record, report = Record(), Lines()
    with pytest.raises(Interrupted):
        train_and_evaluate(CONFIG, run_dir=tmp_path, loggers=[record], on_step=interrupt)
    assert record.calls[-1] == ("finish", None)
    record.calls.clear()
    run = train_and_evaluate(CONFIG, run_dir=tmp_path, resume=True, loggers=[record])
    assert record.calls[0] == ("start", tmp_path, 8) and record.calls[-1] == ("finish", run.result)
    assert run.result["sha256"] == research_run.result["sha256"]
    record.calls.clear()
    train_and_evaluate(CONFIG, run_dir=tmp_path, resume=True, loggers=[record], report=report)
    assert record.calls == []
    assert f"{tmp_path} is finished: there is nothing to log, and no step to profile." in report.lines


def test_a_logger_that_fails_is_reported_once_and_the_run_continues(research_run, tmp_path):
    record, report = Record(), Lines()
    loggers = [Failing("on_step"), Deleting(), Exiting(), record]
    run = train_and_evaluate(CONFIG, run_dir=tmp_path, loggers=loggers, report=report)
    assert run.result["sha256"] == research_run.result["sha256"]
    line, last = [line for line in report.lines if line.startswith("The logger")]
    where = r"The logger failing failed: .*test_loggers\.py, line \d+"
    assert re.fullmatch(rf"{where}: KeyError: 'a key'\. The run continues without it\.", line)
    assert re.fullmatch(r"The logger exiting failed: .*: SystemExit: 3\. The run is not affected\.", last)
    assert record.calls[-1] == ("finish", run.result)


def test_without_a_report_a_logger_that_fails_is_a_warning(tmp_path):
    with pytest.warns(UserWarning, match=r"^The logger failing failed: .*KeyError: 'a key'\. The run continues"):
        train_and_evaluate(replace(CONFIG, num_epochs=1), run_dir=tmp_path, loggers=[Failing("on_step")])


def test_a_logger_with_a_misspelled_method_is_refused(tmp_path):
    class Misspelled(Logger):
        def log_step(self, step, metrics):
            pass

    message = (
        "`loggers` must be loggers with a method start, on_step, on_epoch or finish, got Misspelled, which has none of "
        "its own."
    )
    with pytest.raises(UserError, match=re.escape(message)):
        train_and_evaluate(CONFIG, run_dir=tmp_path, loggers=[Misspelled()])


def test_ctrl_c_in_finish_finishes_the_other_loggers(research_run):
    class Interrupted(Logger):
        def finish(self, result):
            raise KeyboardInterrupt

    for result, message in ((None, "^$"), (research_run.result, "^The result of the run is saved[.]$")):
        record = Record()
        loggers = Loggers([Interrupted(), record])
        run = Run(research_run.run_dir, CONFIG, research_run.facts, None)
        with pytest.raises(KeyboardInterrupt, match=message), loggers.started(run, 0, 18, Stop()):
            if result is not None:
                loggers.result(result)
        assert record.calls[-1] == ("finish", result)


def test_a_logger_that_cannot_start_ends_the_run_before_its_first_step(research_run, tmp_path):
    record = Record()
    with pytest.raises(UserError, match=r"The logger failing could not start: .*no such server.*resume=True\."):
        train_and_evaluate(CONFIG, run_dir=tmp_path, loggers=[record, Failing("start")])
    assert [call[0] for call in record.calls] == ["start", "finish"]
    assert read_manifest(tmp_path)["sessions"][-1]["state"] == "failed"
    assert train_and_evaluate(CONFIG, run_dir=tmp_path, resume=True).result["sha256"] == research_run.result["sha256"]


class Waiting(Logger):
    """Receives Ctrl-C while it searches for a server, which needs a library."""

    libraries = ("xml.dom.minicompat",)

    def start(self, run, step):
        assert {*self.libraries} <= {*sys.modules}
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the signal has no effect")


def test_ctrl_c_interrupts_the_start_of_a_logger(research_run, tmp_path):
    record = Record()
    with pytest.raises(Interrupted, match="nothing is lost"):
        train_and_evaluate(CONFIG, run_dir=tmp_path, loggers=[record, Waiting()])
    assert [call[0] for call in record.calls] == ["start", "finish"]
    assert read_manifest(tmp_path)["sessions"][-1]["state"] == "interrupted"
    assert train_and_evaluate(CONFIG, run_dir=tmp_path, resume=True).result["sha256"] == research_run.result["sha256"]


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("loggers", "message"),
    [
        ([Record], "a list of loggers, got the class Record. Write loggers=[TensorBoard()]."),
        (["tensorboard"], "a list of loggers, got 'tensorboard'. Write loggers=[TensorBoard()]."),
        ("tensorboard", "a list of loggers, got 'tensorboard'. Write loggers=[TensorBoard()]."),
        (TensorBoard(), "a list of loggers, got TensorBoard. Write loggers=[TensorBoard()]."),
        ([TensorBoard(), TensorBoard()], "objects of different classes, got TensorBoard, TensorBoard."),
    ],
)
def test_other_values_of_loggers_are_errors(loggers, message, tmp_path):
    with pytest.raises(UserError, match=f"^{re.escape(f'`loggers` must be {message}')}$"):
        train_and_evaluate(CONFIG, run_dir=tmp_path / "run", loggers=loggers)
    assert not (tmp_path / "run").exists()


# --- The command line -----------------------------------------------------------------------------------------------

EXPERIMENT = """
import flax.linen as nn
from programs.research import make_arrays

from cnnjax import SGD, Config, Logger

class Linear(nn.Module):
    @nn.compact
    def __call__(self, image):
        return nn.Dense(4)(image.reshape(len(image), -1))

class Csv(Logger):
    def start(self, run, step):
        self.file = open(run.run_dir / "loss.csv", "a")

    def on_step(self, step, metrics):
        print(step, metrics["loss"], sep=",", file=self.file)

    def finish(self, result):
        self.file.close()

DATA = {"dataset": make_arrays(), "validation_fraction": 0.0}
CONFIG = Config(model=Linear(), optim=SGD(), num_epochs=2, batch_size=22, **DATA)
"""

MORE_LOGGERS = """
class Socket(Logger):
    def __init__(self, port):
        self.port = port

class Broken(Logger):
    def __init__(self):
        raise OSError("no server")
"""


def test_a_logger_of_an_experiment_file_is_a_word_and_each_seed_has_its_log(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(EXPERIMENT)
    main(["train", "mine.py", "--log", "csv", "tensorboard", "--seeds", "3,4"])
    assert "logger" not in capsys.readouterr().out
    losses = {}
    for seed in (3, 4):
        run_dir = Path(f"runs/mine-seed{seed}")
        with (run_dir / "loss.csv").open() as file:
            steps, losses[seed] = zip(*((int(step), float(loss)) for step, loss in csv.reader(file)), strict=True)
        found = scalars(read_events(run_dir / "tensorboard"))["batch/loss"]
        assert found == [(step, np.float32(loss)) for step, loss in zip(steps, losses[seed], strict=True)]
        assert steps == tuple(range(1, 11))
    assert losses[3] != losses[4]
    main(["verify", "runs/mine-seed3"])
    out = capsys.readouterr().out
    assert "loss.csv: no checksum" in out and "tensorboard" not in out


def test_unknown_words_are_errors(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["train", "--log", "tensorbord"])
    assert capsys.readouterr().err == "`log` must be a known name, got 'tensorbord'. Did you mean tensorboard?\n"
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("csv --log tensorboard", "`--log` must be given once, with all names, got 2 times."),
        ("csv csv", "`log` must be different names, got csv, csv."),
        (
            "socket",
            "`log` must be the name of a logger that can be made without arguments, got 'socket'.",
        ),
        ("broken", "The constructor of the logger broken failed at mine.py, line 31: OSError: no server."),
        ("none", "`log` must be a known name, got 'none'. Valid names: broken, csv, mlflow, tensorboard, wandb."),
    ],
)
def test_loggers_that_cannot_be_made_are_errors(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(EXPERIMENT + MORE_LOGGERS)
    with pytest.raises(SystemExit):
        main(["train", "mine.py", "--log", *arguments.split()])
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize("logger", [WandB, MLflow])
def test_a_missing_library_is_an_error_with_the_command(logger, monkeypatch):
    monkeypatch.setattr("cnnjax.runs.trackers.find_spec", lambda name: None)
    name = logger.__name__.lower()
    with pytest.raises(UserError, match=rf"got {name}\. Install it: pip install 'cnnjax\[{name}\]'$"):
        logger()


def test_options_of_wandb_that_a_resumed_run_needs_are_refused(monkeypatch):
    monkeypatch.setattr("cnnjax.runs.trackers.find_spec", lambda name: name)
    with pytest.raises(UserError, match=r"`WandB` must be without the options .*, got id, resume\."):
        WandB(resume="must", id="1", tags=["a"])
    with pytest.raises(UserError, match=r"`config` must be a dict, got 'config.yaml'\."):
        WandB(config="config.yaml")
    assert WandB(config=None).libraries == ("wandb",)


@pytest.mark.usefixtures("no_type_checks")
def test_trackers_name_one_of_several_seeds_with_its_folder():
    names = [trackers._name(SimpleNamespace(run_dir=Path(path))) for path in ("a/seed0", "a/mnist-seed0", "a/seeds")]
    assert names == ["a/seed0", "mnist-seed0", "seeds"]


# --- Weights & Biases, MLflow ---------------------------------------------------------------------------------------


def has(name):
    found = importlib.util.find_spec(name) is not None
    return pytest.mark.skipif(not found, reason=f"needs pip install 'cnnjax[{name}]'")


def interrupted_and_resumed(run_dir, logger):
    """Trains with a logger, in two sessions: the second repeats the steps 7 and 8."""

    class StopError(Exception):
        pass

    def stop(step, metrics):
        if step == 8:
            raise StopError

    with pytest.raises(StopError):
        train_and_evaluate(CONFIG, run_dir=run_dir, loggers=[logger], on_step=stop)
    return train_and_evaluate(CONFIG, run_dir=run_dir, loggers=[logger], resume=True)


@pytest.mark.slow
@has("mlflow")
@pytest.mark.filterwarnings("default")
def test_mlflow_has_one_run_with_every_step_once(research_run, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/store.db")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)
    run = interrupted_and_resumed(tmp_path / "run", MLflow())
    assert run.result["sha256"] == research_run.result["sha256"]
    client = MlflowClient()
    (experiment,) = [e for e in client.search_experiments() if e.name == "cnnjax"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    assert found.data.params["optim.momentum"] == "0.5"
    assert found.data.metrics["test/accuracy"] == run.result["test_accuracy"]
    history = client.get_metric_history(found.info.run_id, "batch/loss")
    assert sorted(point.step for point in history) == [*range(1, 19)]
    rows = client.get_metric_history(found.info.run_id, "train/loss")
    assert {p.step: p.value for p in rows} == dict(zip([6, 12, 18], run.history["train_loss"].tolist(), strict=True))
    artifact = client.download_artifacts(found.info.run_id, "result.json", str(tmp_path))
    assert json.loads(Path(artifact).read_text())["confusion_matrix"] == run.result["confusion_matrix"]


@pytest.mark.slow
@has("mlflow")
@pytest.mark.filterwarnings("default")
def test_mlflow_names_a_store_that_lacks_the_run(research_run, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "mlflow").mkdir(parents=True)
    (tmp_path / "run" / "mlflow" / "id").write_text("0" * 32)  # Of a run in another store.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/store.db")
    with pytest.raises(UserError, match=r"`MLFLOW_TRACKING_URI` must name the store .*store\.db \(.*not found\)\."):
        MLflow().start(Run(tmp_path / "run", CONFIG, research_run.facts, None), 0)


@pytest.mark.slow
@has("wandb")
@pytest.mark.filterwarnings("default")
def test_wandb_offline_has_every_step_under_one_id(research_run, tmp_path, monkeypatch):
    for name, value in {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    run = interrupted_and_resumed(tmp_path / "run", WandB())
    assert run.result["sha256"] == research_run.result["sha256"]
    ids, steps, summary, config = set(), [], {}, {}
    for path in sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")):
        for record in read_wandb(path):
            if record.HasField("run"):
                ids.add(record.run.run_id)
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            history = {"/".join(x.nested_key) or x.key: json.loads(x.value_json) for x in record.history.item}
            if "batch/loss" in history:
                steps.append(history["_step"])
            summary |= {"/".join(x.nested_key) or x.key: json.loads(x.value_json) for x in record.summary.update}
    assert ids == {(tmp_path / "run" / "wandb" / "id").read_text()}
    assert steps == [*range(1, 9), *range(7, 19)]  # W&B drops the steps that it has when the folders are synchronized.
    assert config["optim.momentum"] == 0.5
    assert summary["test/accuracy"] == run.result["test_accuracy"]
    assert {*verify(tmp_path / "run").values()} == {"ok"}


def read_wandb(path):
    """Yields the records of a .wandb file: 7 bytes, then the log format of LevelDB, with blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    content, at, data = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        data += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # A whole record, or its last part.
            yield wandb_internal_pb2.Record.FromString(data)
            data = b""


def test_a_logger_with_a_method_that_nothing_calls_is_an_error():
    class Csv(Logger):
        def start(self, run, step):
            pass

        def on_epoch_end(self, row, state):
            pass

    message = (
        r"`loggers` must have methods with the names of Logger, got Csv\.on_epoch_end, which nothing calls\. Is it "
        r"on_epoch or on_step\? If not, begin its name with an underscore\."
    )
    with pytest.raises(UserError, match=message):
        check_loggers([Csv()])
