"""on_step, on_epoch and early stopping."""

import json
import math
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generated import Lines
from programs import research
from programs.research import CONFIG, make_arrays

from cnnjax import SGD, Augment, CrossEntropy, Interrupted, Report, UserError, load_run, train_and_evaluate
from cnnjax.cli.main import main
from cnnjax.data.order import split_validation
from cnnjax.files import tree_sha256
from cnnjax.metrics import Metrics
from cnnjax.prepare import set_up
from cnnjax.program import train_steps
from cnnjax.runs.inspection import reproduce, verify
from cnnjax.runs.manifest import read_manifest
from cnnjax.runs.progress import Callbacks
from cnnjax.sharding import fetch
from cnnjax.state import TrainState

PROGRAMS = Path(research.__file__).parent


def read_rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


class Linear(nn.Module):
    @nn.compact
    def __call__(self, image):
        return nn.Dense(4)(image.reshape(image.shape[0], -1))


CONSTANT = replace(CONFIG, model=Linear(), optim=SGD(learning_rate=0.05))


class Calls:
    """Records the calls of both callbacks."""

    def __init__(self):
        self.steps, self.rows, self.states, self.order = [], [], [], []

    def on_step(self, step, metrics):
        self.steps.append((step, metrics))
        self.order.append(f"step {step}")
        metrics.clear()  # What a callback does to its arguments affects nothing.

    def on_epoch(self, row, state):
        self.rows.append(dict(row))
        self.states.append(state)
        self.order.append(f"epoch {row['epoch']}")
        row.clear()

    def stop_after_one(self, row, state):
        self.on_epoch(row, state)
        return True


def never(row, state):
    raise AssertionError("called again")


def stop_after_two(row, state):
    return row["epoch"] == 2


@pytest.fixture(scope="module")
def plain(research_run):
    """A run of three epochs without callbacks."""
    return research_run


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped after the second epoch."""
    return train_and_evaluate(CONFIG, run_dir=tmp_path_factory.mktemp("stopped") / "run", on_epoch=stop_after_two)


def test_callbacks_that_change_nothing_change_no_bit_and_come_in_order(plain, tmp_path):
    calls = Calls()
    run = train_and_evaluate(CONFIG, run_dir=tmp_path / "run", on_step=calls.on_step, on_epoch=calls.on_epoch)
    assert run.result["sha256"] == plain.result["sha256"]
    assert run.result["stopped_epoch"] is None
    steps = [f"step {step}" for step in range(1, 19)]
    assert calls.order == [*steps[:6], "epoch 1", *steps[6:12], "epoch 2", *steps[12:], "epoch 3"]
    rows, timing = read_rows(run.run_dir), run.history["seconds"]
    for row, expected, seconds in zip(calls.rows, rows, timing, strict=True):
        assert expected.items() < row.items()
        assert row.keys() - expected.keys() == {"images_per_second", "seconds", "best_epoch"}
        assert row["seconds"] == seconds
    assert [row["best_epoch"] for row in calls.rows] == [1, 1, 1]
    assert [state.step for state in calls.states] == [6, 12, 18]  # Kept, and none was donated.
    assert [tree_sha256(state.params) for state in calls.states] == [row["params_sha256"] for row in rows]


def test_the_steps_of_one_program_are_reported_one_by_one():
    seen = []
    metrics = Metrics(
        np.float32([8, 3]),
        np.int32([4, 2]),
        {"accuracy": np.int32([1, 2]), "kl": np.float32([2, 9])},
        np.float32([5, 6]),
    )
    Callbacks(on_step=lambda step, means: seen.append((step, means))).report_steps(7, metrics)
    assert seen == [
        (7, {"loss": 2.0, "accuracy": 0.25, "kl": 0.5, "grad_norm": 5.0}),
        (8, {"loss": 1.5, "accuracy": 1.0, "kl": 4.5, "grad_norm": 6.0}),
    ]
    assert all(type(value) is float for _, means in seen for value in means.values())


@dataclass(frozen=True)
class OneHot(Augment):
    """Makes the labels probabilities."""

    def transform(self, key, batch):
        return batch._replace(label=jax.nn.one_hot(batch.label, 4))


def named_loss(logits, batch):
    label = batch.label if batch.label.ndim == 2 else jax.nn.one_hot(batch.label, 4)
    values = {"second": label[:, 1], "a_first": label[:, 0], "undefined": jnp.full(len(label), jnp.nan)}
    return CrossEntropy()(logits, batch), values


def test_named_values_of_the_loss_are_recorded_and_accuracy_only_of_class_indices(tmp_path, capsys):
    config, calls = replace(CONFIG, loss=named_loss, augment=OneHot(), num_epochs=2), Calls()
    whole = train_and_evaluate(config, run_dir=tmp_path / "whole", on_step=calls.on_step, report=Report())
    kept, _ = split_validation(3, make_arrays()[1], 0.2)
    share = np.bincount(make_arrays()[1][kept], minlength=4) / 88
    for row in read_rows(whole.run_dir):
        assert (row["train_a_first"], row["train_second"]) == (share[0], share[1])
        assert math.isnan(row["train_undefined"]) and math.isfinite(row["train_loss"])
        assert "train_accuracy" not in row and "validation_accuracy" in row
    assert np.isnan(whole.history["train_undefined"]).all()
    assert f"a_first {share[0]:.4f}  second {share[1]:.4f}" in capsys.readouterr().out

    def interrupt(step, metrics):
        assert metrics.keys() == {"loss", "grad_norm", "a_first", "second", "undefined"}
        if step == 9:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="the checkpoint of step 9 is saved"):
        train_and_evaluate(config, run_dir=tmp_path / "run", on_step=interrupt)
    resumed = train_and_evaluate(config, run_dir=tmp_path / "run", resume=True)
    assert resumed.result["sha256"] == whole.result["sha256"]  # The bytes of metrics.jsonl, too.


@pytest.fixture
def one_program(monkeypatch):
    """Makes each epoch one program, as on an accelerator."""

    def set_up_for_accelerator(*args, **options):
        setup, state = set_up(*args, **options)
        return setup._replace(steps_per_dispatch=setup.steps_per_epoch), state

    monkeypatch.setattr("cnnjax.train.set_up", set_up_for_accelerator)


def test_an_epoch_as_one_program_reports_its_steps_at_its_end_and_may_be_discarded(one_program, tmp_path, monkeypatch):
    dispatched, calls = [], Calls()

    def dispatch(state, pixels, plan, *args, **options):
        dispatched.append(len(plan.example))
        return train_steps(state, pixels, plan, *args, **options)

    monkeypatch.setattr("cnnjax.loop.train_steps", dispatch)
    run = train_and_evaluate(CONFIG, run_dir=tmp_path / "run", on_step=calls.on_step, on_epoch=calls.stop_after_one)
    assert dispatched == [6, 6]
    assert calls.order == [*(f"step {step}" for step in range(1, 7)), "epoch 1"]
    assert run.result["stopped_epoch"] == 1
    assert run.result["sha256"]["params"] == read_rows(tmp_path / "run")[0]["params_sha256"]
    assert run.state.step == 6


@pytest.mark.parametrize(("queued_seconds", "queues"), [(1000.0, True), (0.0, False)])
def test_the_next_epoch_is_queued_before_the_device_has_finished_unless_epochs_are_long(
    queued_seconds, queues, one_program, tmp_path, monkeypatch
):
    order, config = [], replace(CONSTANT, num_epochs=4)

    def dispatch(*args, **options):
        order.append("start")
        return train_steps(*args, **options)

    monkeypatch.setattr("cnnjax.loop.train_steps", dispatch)
    monkeypatch.setattr("cnnjax.loop.QUEUED_SECONDS", queued_seconds)
    monkeypatch.setattr("cnnjax.loop.fetch", lambda metrics: order.append("wait") or fetch(metrics))
    run = train_and_evaluate(
        config, run_dir=tmp_path, on_epoch=lambda row, state: order.append(f"epoch {row['epoch']}")
    )
    usual = ["start", "wait", "start", "epoch 1", "wait", "start", "epoch 2", "wait", "start", "epoch 3", "wait"]
    # How long an epoch takes is known after the first.
    queued = ["start", "wait", "start", "epoch 1", "start", "wait", "epoch 2", "start", "wait", "epoch 3", "wait"]
    assert order == [*(queued if queues else usual), "epoch 4"]
    assert [row["step"] for row in read_rows(tmp_path)] == [6, 12, 18, 24]
    assert run.result["sha256"]["params"] == read_rows(tmp_path)[-1]["params_sha256"]


def test_a_signal_while_an_epoch_is_queued_loses_no_finished_one(one_program, tmp_path, monkeypatch):
    monkeypatch.setattr("cnnjax.loop.QUEUED_SECONDS", 1000.0)
    whole = train_and_evaluate(CONFIG, run_dir=tmp_path / "whole")

    def interrupt(step, metrics):
        if step == 8:  # Of the second epoch; the third is queued.
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="the checkpoint of step 12 is saved"):
        train_and_evaluate(CONFIG, run_dir=tmp_path / "run", on_step=interrupt)
    resumed = train_and_evaluate(CONFIG, run_dir=tmp_path / "run", resume=True)
    assert resumed.result["sha256"] == whole.result["sha256"]


@dataclass(frozen=True)
class FlipsLater(Augment):
    """Flips from the second epoch on."""

    def at_epoch(self, epoch, num_epochs):
        return Augment(flip="random" if epoch else "none")


@pytest.mark.parametrize(("smoothing", "device"), [(0.125, None), (0.25, 0)])
def test_the_programs_of_later_epochs_and_of_the_test_are_compiled_by_a_thread(
    smoothing, device, one_program, tmp_path, caplog
):
    """With a default device, too, as for each of several seeds."""
    # No other test has these programs: each is compiled once per process.
    config = replace(CONSTANT, augment=FlipsLater(), num_epochs=2, loss=CrossEntropy(label_smoothing=smoothing))
    config = replace(config, validation_fraction=0.25 if device is None else 0.3)
    device = None if device is None else jax.local_devices()[device]
    with jax.log_compiles(), jax.default_device(device):
        train_and_evaluate(config, run_dir=tmp_path)
    here = [record for record in caplog.records if record.threadName == threading.current_thread().name]
    compiled = Counter(record.getMessage().split(" with ")[0] for record in here)
    # The steps of the first epoch, and the score of the validation set.
    assert [compiled[f"Compiling jit({name})"] for name in ("train_steps", "_score")] == [1, 1]


# --- Early stopping -------------------------------------------------------------------------------------------------


def test_a_stopped_run_ends_with_the_bits_of_its_last_epoch(plain, stopped):
    calls = Calls()
    run_dir = stopped.run_dir
    assert read_rows(run_dir) == read_rows(plain.run_dir)[:2]
    result = stopped.result
    assert (result["num_epochs"], result["stopped_epoch"], result["best_epoch"]) == (3, 2, 1)
    assert result["test_loss"] == plain.result["test_loss"]  # The best epoch is the first of both.
    assert "after 2 epochs" in repr(stopped)
    assert {*verify(run_dir).values()} == {"ok"}
    again = run_dir.with_name("again")
    train_and_evaluate(CONFIG, run_dir=again, on_epoch=calls.on_epoch)
    for name in ("params", "model_state", "opt_state"):
        assert result["sha256"][name] == tree_sha256(getattr(calls.states[1], name))


def test_a_bool_of_numpy_stops_the_run_and_the_report_gets_its_result(tmp_path):
    report = []

    class Log(Report):
        def result(self, result, run_dir):
            report.append(result)

    run = train_and_evaluate(
        CONFIG,
        run_dir=tmp_path,
        on_epoch=lambda row, state: np.bool_(row["epoch"] >= 2),
        report=Log(quiet=True),
    )
    assert run.result["stopped_epoch"] == 2
    assert report == [run.result]


class Seen(list):
    """A function that is false until it is called."""

    def __call__(self, row, state):
        self.append(row["epoch"])
        return len(self) == 2


def test_the_function_that_may_stop_a_run_is_recorded_by_its_name(tmp_path):
    said, report = [], Report(quiet=True)
    report.say = said.append
    run = train_and_evaluate(CONFIG, run_dir=tmp_path, on_epoch=Seen())
    assert run.result["stopped_epoch"] == 2
    (tmp_path / "result.json").unlink()
    train_and_evaluate(CONFIG, run_dir=tmp_path, on_epoch=never, resume=True, report=report)
    assert [session["on_epoch"] for session in read_manifest(tmp_path)["sessions"]] == ["Seen", "never"]
    assert "`on_epoch`, which may stop the run, was Seen and is never: it may end in another epoch." in said


@pytest.mark.parametrize("size", [110, 64])
def test_what_a_callback_does_to_the_arrays_changes_nothing(size, tmp_path):
    """Not even if jax could use the memory of the training images as it is, which 64 bytes align."""
    arrays = [np.array(array) for array in make_arrays(num_train=size)]
    memory = np.empty(arrays[0].nbytes + 64, np.uint8)
    aligned = memory[-memory.ctypes.data % 64 :][: arrays[0].nbytes].reshape(arrays[0].shape)
    aligned[:] = arrays[0]
    config = replace(CONFIG, dataset=(aligned, *arrays[1:]), validation_fraction=0.0)
    plain = train_and_evaluate(config, run_dir=tmp_path / "plain").result

    def wipe(row, state):
        for array in config.dataset:
            array[:] = 0

    result = train_and_evaluate(config, run_dir=tmp_path / "run", on_epoch=wipe).result
    assert (result["sha256"], result["test_loss"]) == (plain["sha256"], plain["test_loss"])


@pytest.mark.usefixtures("quick_compilation")  # Like the next test that trains these programs.
def test_a_stopped_run_that_gets_more_epochs_says_that_it_continues(tmp_path):
    def stop(row, state):
        return row["epoch"] == 1

    train_and_evaluate(CONSTANT, run_dir=tmp_path, on_epoch=stop)
    report, longer = Lines(), replace(CONSTANT, num_epochs=4)
    run = train_and_evaluate(longer, run_dir=tmp_path, resume=True, on_epoch=stop, report=report)
    line = "`on_epoch` or `patience` stopped the run after epoch 1 of 3. It continues, because `num_epochs` is now 4."
    assert line in report.lines
    assert (run.result["num_epochs"], run.result["stopped_epoch"]) == (4, None)


def test_what_on_epoch_puts_into_its_state_is_not_saved(plain, tmp_path):
    def wipe(row, state):
        for part in state.params.values():
            part.update({name: 0 * value for name, value in part.items()})
        state.model_state.clear()

    run = train_and_evaluate(CONFIG, run_dir=tmp_path, on_epoch=wipe)
    assert run.result["sha256"] == plain.result["sha256"]
    assert tree_sha256(load_run(tmp_path, CONFIG).state.params) == plain.result["sha256"]["best_params"]


def test_a_decision_of_numpy_can_be_sent_to_other_processes(no_type_checks):
    class Two:
        def share(self, compute):
            return json.loads(json.dumps(compute()))

    for value in (np.False_, np.True_, None):
        stops = Callbacks(on_epoch=lambda row, state, value=value: value, hosts=Two()).report_epoch
        assert stops({}, TrainState(jnp.int32(0), {}, {}, ())) == bool(value)


def test_stopping_after_the_last_epoch_is_no_early_stop(plain, tmp_path):
    run = train_and_evaluate(CONFIG, run_dir=tmp_path, on_epoch=lambda row, state: row["epoch"] == 3)
    assert run.result["stopped_epoch"] is None
    assert run.result["sha256"] == plain.result["sha256"]


@pytest.mark.parametrize("value", [1, 0, 0.93, "stop", np.array([True]), jnp.bool_(True)], ids=repr)
def test_another_return_value_is_an_error(value):
    with pytest.raises(UserError, match=r"`on_epoch` must return True to stop, or False or None to continue, got .*"):
        Callbacks(on_epoch=lambda row, state: value).report_epoch({}, TrainState(jnp.int32(0), {}, {}, ()))


def test_a_state_that_was_donated_is_an_error(tmp_path):
    def donate(row, state):
        jax.tree.map(lambda x: x.delete(), state)

    with pytest.raises(UserError, match=r"`on_epoch` must keep its state, got one that was donated\. Pass donate"):
        train_and_evaluate(CONFIG, run_dir=tmp_path, on_epoch=donate)


def test_a_process_killed_at_any_moment_of_a_stop_ends_with_the_same_bits(stopped, tmp_path):
    """Killed before the checkpoint with the decision is complete, before the test, and before result.json."""
    run_dir = tmp_path / "run"
    for moment in ("save", "test", "result"):
        command = [sys.executable, str(PROGRAMS / "stops_early.py"), str(run_dir), moment]
        killed = subprocess.run(command, check=False)
        assert killed.returncode == -signal.SIGKILL
        if moment != "test":  # Then the checkpoint may still be being written.
            assert (run_dir / "checkpoints" / "12").exists() == (moment == "result")
    run = train_and_evaluate(CONFIG, run_dir=run_dir, resume=True, on_step=never, on_epoch=never)
    assert read_rows(run_dir) == read_rows(stopped.run_dir)
    assert run.result["sha256"] == stopped.result["sha256"]
    assert run.result["stopped_epoch"] == 2
    assert [s["state"] for s in read_manifest(run_dir)["sessions"]] == ["killed"] * 3 + ["finished"]


def test_a_signal_and_a_stop_at_the_same_epoch(stopped, tmp_path):
    def interrupt(step, metrics):
        if step == 12:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="the checkpoint of step 12 is saved"):
        train_and_evaluate(CONFIG, run_dir=tmp_path, on_step=interrupt, on_epoch=stop_after_two)
    run = train_and_evaluate(CONFIG, run_dir=tmp_path, resume="auto", on_step=never, on_epoch=never)
    assert run.result["sha256"] == stopped.result["sha256"]


@pytest.mark.usefixtures("quick_compilation")
def test_a_stopped_run_can_be_trained_longer(tmp_path):
    three = CONSTANT
    two, whole = replace(three, num_epochs=2), train_and_evaluate(three, run_dir=tmp_path / "whole")
    run_dir = tmp_path / "run"
    first = train_and_evaluate(two, run_dir=run_dir, on_epoch=lambda row, state: row["epoch"] == 1)
    assert first.result["stopped_epoch"] == 1
    again = train_and_evaluate(two, run_dir=run_dir, resume="auto", on_step=never, on_epoch=never)
    assert again.result == first.result  # It is finished.
    rows = []

    def interrupt(row, state):
        rows.append(row["epoch"])
        if row["epoch"] == 2:
            signal.raise_signal(signal.SIGTERM)

    def fail(step, metrics):
        raise RuntimeError

    with pytest.raises(RuntimeError):  # Before the longer run has a checkpoint.
        train_and_evaluate(three, run_dir=run_dir, resume=True, on_step=fail)
    with pytest.raises(Interrupted):  # The decision of the shorter run is not that of the longer one.
        train_and_evaluate(three, run_dir=run_dir, resume=True, on_epoch=interrupt)
    longer = train_and_evaluate(three, run_dir=run_dir, resume=True)
    assert rows == [2]
    assert (longer.result["sha256"], longer.result["stopped_epoch"]) == (whole.result["sha256"], None)


def test_commands_cope_with_a_stopped_run(plain, stopped, tmp_path, monkeypatch, capsys):
    found = reproduce(stopped.run_dir, CONFIG, into=tmp_path / "again")
    assert found.same and found.first_epoch is None
    assert len(read_rows(tmp_path / "again")) == 2
    monkeypatch.chdir(tmp_path)
    for name, run in (("a", stopped), ("b", plain)):
        shutil.copytree(run.run_dir, f"runs/{name}-seed3")
    main(["runs"])
    a, b = capsys.readouterr().out.splitlines()[1:]
    assert a.split()[:4] == ["a-seed3", "finished", "3", "2/3"] and b.split()[3] == "3/3"
    with pytest.raises(SystemExit):
        main(["diff", "runs/a-seed3", "runs/b-seed3"])
    assert "  stopped_epoch: 2 | None\n" in capsys.readouterr().out
    main(["verify", "runs/a-seed3"])


# --- Exceptions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("callback", ["on_step", "on_epoch"])
def test_what_a_callback_raises_reaches_the_caller_and_the_run_is_resumed(callback, plain, tmp_path):
    error = MemoryError("of the callback")

    def fail(*args):
        if {"on_step": args[0] == 9, "on_epoch": isinstance(args[0], dict) and args[0]["epoch"] == 2}[callback]:
            raise error

    with pytest.raises(MemoryError) as raised:
        train_and_evaluate(CONFIG, run_dir=tmp_path, **{callback: fail})
    assert raised.value is error and error.__cause__ is None
    assert read_manifest(tmp_path)["sessions"][-1]["state"] == "failed"
    assert train_and_evaluate(CONFIG, run_dir=tmp_path, resume=True).result["sha256"] == plain.result["sha256"]


# --- resume ---------------------------------------------------------------------------------------------------------


def test_auto_starts_and_resumes_and_returns_a_finished_run(plain, tmp_path):
    def interrupt(step, metrics):
        if step == 7:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="the checkpoint of step 7 is saved"):
        train_and_evaluate(CONFIG, run_dir=str(tmp_path / "run"), resume="auto", on_step=interrupt)
    resumed = train_and_evaluate(CONFIG, run_dir=str(tmp_path / "run"), resume="auto")
    assert resumed.result["sha256"] == plain.result["sha256"]
    finished = train_and_evaluate(CONFIG, run_dir=str(tmp_path / "run"), resume="auto", on_step=never)
    assert finished.result == resumed.result
    jax.tree.map(np.testing.assert_array_equal, finished.state, resumed.state)


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize("value", ["yes", 1, None])
def test_another_value_of_resume(value, tmp_path):
    with pytest.raises(UserError, match=f"`resume` must be False, True or 'auto', got {value!r}"):
        train_and_evaluate(CONFIG, run_dir=tmp_path / "run", resume=value)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": jax.devices()[0]}, "`devices` must be a sequence of different devices, or None, got "),
        ({"devices": []}, r"`devices` must be a sequence of different devices, or None, got \[\]"),
        ({"devices": ["cpu"]}, "`devices` must be a sequence of different devices, or None, got .'cpu'"),
        ({"devices": 2 * jax.devices()[:1]}, "`devices` must be a sequence of different devices, or None, got "),
        ({"profile": 10}, "`profile` must be two numbers of steps, or None, got 10"),
        ({"checkpoint_seconds": -1.0}, "`checkpoint_seconds` must be a number of at least 0, got -1.0"),
        ({"checkpoint_seconds": float("nan")}, "`checkpoint_seconds` must be a number of at least 0, got nan"),
        ({"checkpoint_seconds": "60"}, "`checkpoint_seconds` must be a number of at least 0, got '60'"),
        ({"mesh": ""}, "`mesh` must be "),
        ({"mesh": 4}, "`mesh` must be "),
    ],
)
def test_other_wrong_arguments_write_nothing(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train_and_evaluate(CONFIG, run_dir=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
