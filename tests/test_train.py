import gc
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from filelock import FileLock
from programs import research
from programs.research import Derailed, Net, focal_loss, make_arrays

from cnnjax import (
    CNN,
    MLP,
    SGD,
    Adam,
    Augment,
    Batch,
    Config,
    CrossEntropy,
    Logger,
    Mixup,
    Muon,
    NonFiniteLossError,
    Optimizer,
    ParamGroup,
    SpeedNet,
    UserError,
    init_state,
    load_dataset,
    load_run,
    train_and_evaluate,
    train_step,
)
from cnnjax.cli.main import REQUEUE
from cnnjax.data.batches import make_batch
from cnnjax.data.named import NAMED_SETS
from cnnjax.data.order import epoch_plan, split_validation
from cnnjax.data.sources import RawSet, RawSplit
from cnnjax.data.tfds_format import write_tfds
from cnnjax.dispatch import open_dispatches
from cnnjax.inputs import load_inputs
from cnnjax.prepare import set_up
from cnnjax.process.console import Report
from cnnjax.process.signals import Interrupted, stop_signals
from cnnjax.program import train_steps
from cnnjax.runs.checkpoints import Checkpoints
from cnnjax.runs.codec import encode
from cnnjax.runs.directory import check_run
from cnnjax.runs.inspection import reproduce, verify
from cnnjax.runs.manifest import read_manifest
from cnnjax.runs.progress import best_row
from cnnjax.runs.records import Record, read_record, write_record

# Dropout, augmentation and a partial last batch: 390 training examples make 25 steps per epoch, the last with 6.
CONFIG = Config(
    name="test",
    dataset="generated",
    seed=5,
    num_epochs=2,
    batch_size=16,
    augment=Augment(flip="random", translate=1, cutout=2),
    loss=CrossEntropy(label_smoothing=0.1),
    model=MLP(dense_dropout=0.2),
    optim=Adam(learning_rate=1e-3, schedule="one_cycle"),
)
# A network, optimizer, augmentation, loss and data of the user: 88 training examples make 6 steps per epoch, of 3.
RESEARCH = research.CONFIG
PROGRAMS = Path(research.__file__).parent
quick = pytest.mark.usefixtures("quick_compilation")  # For tests that share no compiled program with others.


class Watch(Report):
    """Records what a run reports, and sends a signal to this process after a step."""

    def __init__(self, stop_at=None, signum=signal.SIGTERM):
        super().__init__(quiet=True)
        self.steps, self.lines = [], []
        self._stop_at, self._signum = stop_at, signum

    def say(self, line):
        self.lines.append(line)

    def step(self, step, means):
        self.steps.append(step)
        if step == self._stop_at:
            signal.raise_signal(self._signum)


def read_rows(run_dir, name="metrics.jsonl"):
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def train(*args, **options):
    """Returns the content of result.json."""
    return train_and_evaluate(*args, **options).result


def saved_steps(run_dir):
    return sorted(int(path.name) for path in (run_dir / "checkpoints").glob("*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, prepared_dir):
    """A run of CONFIG without interruptions: its directory and its result."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    return run_dir, train(CONFIG, run_dir=run_dir, data_dir=prepared_dir)


@pytest.fixture(scope="module")
def whole_research(research_run):
    """A run of RESEARCH without interruptions: its directory and its result."""
    return research_run.run_dir, research_run.result


# --- A run ----------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_its_directory(whole):
    run_dir, result = whole
    files = {"config.json", "manifest.json", "metrics.jsonl", "timing.jsonl", "result.json", "SHA256SUMS", "lock"}
    assert {path.name for path in run_dir.iterdir()} - {"session-0.diff"} == files | {"checkpoints"}
    assert json.loads((run_dir / "result.json").read_text()) == result
    assert result["test_accuracy"] > 0.4  # Of 10 classes, after 50 steps with all that augmentation.
    assert result["num_test_examples"] == 170
    assert result["num_params"] == 784 * 512 + 512 + 512 * 512 + 512 + 5120 + 10
    assert (result["seed"], result["num_epochs"]) == (5, 2)
    assert [(row["epoch"], row["step"]) for row in read_rows(run_dir)] == [(1, 25), (2, 50)]
    assert saved_steps(run_dir) == [25, 50]


@quick
def test_a_run_equals_a_loop_by_hand(whole_research):
    """A second implementation, from the seed to the result: data, keys, initialization, steps, the best epoch, TTA."""
    run_dir, result = whole_research
    x_train, y_train, x_test, y_test = make_arrays()
    kept, held_out = split_validation(3, y_train, 0.2)
    mean, std = x_train[kept].mean((0, 1, 2)), x_train[kept].std((0, 1, 2))
    train, validation, test = (
        ((x - mean) / std).astype(np.float32) for x in (x_train[kept], x_train[held_out], x_test)
    )
    model, tx = Net(), RESEARCH.optim.make_tx(num_steps=18, num_epochs=3)

    def scores(logits, label):
        log_p = jax.nn.log_softmax(logits)
        loss = -log_p[np.arange(len(label)), label].mean()
        return pytest.approx(float(loss), rel=1e-3), (logits.argmax(1) == label).mean()

    def logits_of(state, image) -> Any:
        return model.apply({"params": state.params, **state.model_state}, image, train=False)

    init_key, train_key, augment_key = jax.random.split(jax.random.key(3), 3)
    state = init_state(init_key, train[:1], model=model, tx=tx)
    features = train.reshape(88, -1) @ state.params["Dense_0"]["kernel"]
    state = state._replace(
        model_state={"batch_stats": {"BatchNorm_0": {"mean": features.mean(0), "var": features.var(0)}}}
    )
    states, rows, grad_norms = [], [], []
    for epoch in range(3):
        plan, totals = epoch_plan(3, epoch, 88, batch_size=16, augment=RESEARCH.augment, image_size=(6, 5)), []
        epoch_key = jax.random.fold_in(augment_key, epoch)
        for i in range(6):
            row = plan.row(i)
            image = np.where(row.mirrored[:, None, None, None], train[row.example, :, ::-1], train[row.example])
            keys = [jax.random.fold_in(epoch_key, example) for example in row.example]
            noise = np.stack([jax.random.normal(key, (6, 5, 3)) for key in keys])
            batch = Batch(image + 0.3 * noise, y_train[kept][row.example].astype(np.int32), row.mask)
            state, metrics = train_step(state, batch, train_key, model=model, tx=tx, loss_fn=focal_loss)
            totals.append(metrics)
        loss, correct = (float(sum(getattr(m, name) for m in totals)) for name in ("loss", "correct"))
        assert sum(m.num_examples for m in totals) == 88
        grad_norms.append(pytest.approx(np.mean([float(m.grad_norm) for m in totals]), rel=1e-3))
        validation_loss, validation_accuracy = scores(logits_of(state, validation), y_train[held_out])
        rows.append((pytest.approx(loss / 88, rel=1e-3), correct / 88, validation_loss, validation_accuracy))
        states.append(jax.device_get(state))

    names = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy")
    assert [tuple(row[name] for name in names) for row in read_rows(run_dir)] == rows
    assert [row["train_grad_norm"] for row in read_rows(run_dir)] == grad_norms
    # Three epochs, three kinds of best: otherwise a wrong choice would not show.
    assert np.argmax([row[3] for row in rows]) == 0 and np.argmax([row[1] for row in rows]) == 1
    assert result["best_epoch"] == 1 and result["best_validation_accuracy"] == rows[0][3]
    facts = read_record(run_dir).data
    counts = (len(y_train) - len(y_train[held_out]), len(y_train[held_out]))
    assert (facts.num_train_examples, facts.num_validation_examples) == counts
    mirrored = (logits_of(states[0], test) + logits_of(states[0], test[:, :, ::-1])) / 2
    assert (result["test_loss"], result["test_accuracy"]) == scores(mirrored, y_test)
    assert result["test_loss"] != scores(logits_of(states[0], test), y_test)[0]
    digests = [row["params_sha256"] for row in read_rows(run_dir)]
    assert (result["sha256"]["best_params"], result["sha256"]["params"]) == (digests[0], digests[2])
    biases = [state.params["Dense_1"]["bias"] for state in states]
    np.testing.assert_array_equal(biases[2], biases[0])  # Frozen after an epoch.
    trained = load_run(run_dir, RESEARCH).state
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), trained, states[0])


def test_the_best_epoch_is_that_of_the_best_validation_score():
    def best(*scores, name="validation_accuracy", by="accuracy"):
        rows = [{"epoch": i, "train_accuracy": i / 10, name: value} for i, value in enumerate(scores, 1)]
        row = best_row(rows, by)
        return None if row is None else row["epoch"]

    assert best(0.5, 0.8, 0.7) == 2
    assert best(0.5, 0.8, 0.8, 0.7) == 3  # The latest of equals.
    assert best(0.5, 0.4, name="other") == 2  # Without validation, the latest.
    assert best(0.5, 0.4, name="validation_balanced_accuracy") == 2
    assert best(0.5, 0.4, name="validation_balanced_accuracy", by="balanced_accuracy") == 1
    assert best(0.5, 0.4, 0.4, 0.6, name="validation_loss", by="loss") == 3
    assert best(-0.5, -0.4, -0.6, name="validation_score", by="score") == 2
    assert best() is None


def test_a_seed_gives_the_same_bits_and_another_seed_gives_others(whole, prepared_dir, tmp_path):
    again = train(CONFIG, run_dir=tmp_path / "again", data_dir=prepared_dir)
    assert again["sha256"] == whole[1]["sha256"]
    assert (again["test_accuracy"], again["test_loss"]) == (whole[1]["test_accuracy"], whole[1]["test_loss"])
    other = train(replace(CONFIG, seed=6), run_dir=tmp_path / "other", data_dir=prepared_dir)
    assert other["sha256"]["params"] != whole[1]["sha256"]["params"]


def test_training_depends_on_each_training_example_and_on_no_other(whole_research, tmp_path):
    x_train, y_train, *test = make_arrays()
    kept, held_out = split_validation(RESEARCH.seed, y_train, RESEARCH.validation_fraction)
    found = {}
    for name, changed in {"held out": held_out, "trained on": kept[-1:]}.items():
        image = x_train.copy()
        image[changed] = 255 - image[changed]
        config = replace(RESEARCH, dataset=(image, y_train, *test))
        found[name] = train(config, run_dir=tmp_path / name)["sha256"]
    expected = whole_research[1]["sha256"]
    assert found["held out"]["params"] == expected["params"]
    assert found["held out"]["metrics"] != expected["metrics"]
    assert found["trained on"]["params"] != expected["params"]


@dataclass(frozen=True)
class ShowKey(Augment):
    """Replaces each image by a random number that its key determines."""

    def transform(self, key, batch):
        value = jax.vmap(jax.random.uniform)(key)
        return batch._replace(image=jnp.broadcast_to(value[:, None, None, None], batch.image.shape))


@quick
def test_the_keys_of_augmentation_depend_on_seed_epoch_and_example_only(tmp_path):
    make = jax.jit(make_batch, static_argnums=2)

    def keys(steps, start=0, **changes):
        """Returns {(epoch, example): key} for some steps."""
        config = replace(RESEARCH, augment=ShowKey(), **changes)
        setup, _ = set_up(config, load_inputs(config), None, title="", say=print)
        found = {}
        with open_dispatches(setup, start) as dispatches:
            for step, (_, pixels, plan, key, _) in enumerate(islice(dispatches, steps), start):
                batch, epoch = make(pixels, plan.row(0), config.augment, key), step // setup.steps_per_epoch
                values = zip(plan.example[0], batch.image[:, 0, 0, 0], strict=True)
                found |= {(epoch, int(example)): float(value) for example, value in values}
        return found, setup

    whole, setup = keys(12)
    assert len(whole) == len({*whole.values()}) == 2 * 88
    assert keys(8, batch_size=22)[0] == whole
    resumed, _ = keys(5, start=7)
    assert resumed.items() < whole.items() and {epoch for epoch, _ in resumed} == {1}
    assert not {*keys(6, seed=4)[0].values()} & {*whole.values()}
    assert jax.random.key_data(setup.train_key).tolist() != jax.random.key_data(setup.augment_key).tolist()


# --- Stop and resume ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [10, 25, 33], ids=["within epoch 1", "at its end", "within epoch 2"])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(stop_at, whole, prepared_dir, tmp_path):
    where = {"run_dir": tmp_path / "run", "data_dir": prepared_dir}
    with pytest.raises(Interrupted, match=f"Stopped by SIGTERM; the checkpoint of step {stop_at} is saved"):
        train(CONFIG, **where, report=Watch(stop_at))
    assert saved_steps(tmp_path / "run")[-1] == stop_at

    report = Watch()
    result = train(CONFIG, **where, resume=True, report=report)

    assert report.steps == list(range(stop_at + 1, 51))
    assert f"resuming at step {stop_at} of 50" in report.lines
    assert result["sha256"] == whole[1]["sha256"]
    assert result["test_loss"] == whole[1]["test_loss"]
    sessions = read_manifest(tmp_path / "run")["sessions"]
    assert [(s["state"], s["resumed_from"]) for s in sessions] == [("interrupted", None), ("finished", stop_at)]


def test_a_run_of_the_users_own_classes_is_resumed_to_the_bit(whole_research, tmp_path):
    with pytest.raises(Interrupted, match="the checkpoint of step 9 is saved"):
        train(RESEARCH, run_dir=tmp_path / "run", report=Watch(stop_at=9))
    result = train(RESEARCH, run_dir=tmp_path / "run", resume=True)
    assert result["sha256"] == whole_research[1]["sha256"]
    assert result["test_loss"] == whole_research[1]["test_loss"]


def test_an_epoch_is_saved_and_reported_while_the_next_one_trains(monkeypatch, tmp_path):
    events = []

    class Events(Report):
        def epoch(self, row, num_epochs):
            events.append(f"epoch {row['epoch']}")

    def dispatch(state, *args, **kwargs):
        events.append("step")
        return train_steps(state, *args, **kwargs)

    monkeypatch.setattr("cnnjax.loop.train_steps", dispatch)
    train(RESEARCH, run_dir=tmp_path, report=Events(quiet=True))
    six = ["step"] * 6
    assert events == [*six, "step", "epoch 1", *six, "epoch 2", *six[1:], "epoch 3"]


def test_no_state_of_an_earlier_epoch_stays_in_memory(tmp_path):
    counts = []

    def on_step(step, metrics):
        if step in (6, 12):  # The last steps of epochs 1 and 2.
            for _ in range(100):
                gc.collect()
                counts.append(sum(array.shape == (90, 19) for array in jax.live_arrays()))
                if counts[-1] == counts[0]:
                    return
                time.sleep(0.1)  # The checkpoint of epoch 1 may still be being written.

    train(replace(RESEARCH, model=Net(width=19)), run_dir=tmp_path, on_step=on_step)
    assert counts[-1] == counts[0] > 0


def test_a_run_saves_within_an_epoch_and_counts_the_time_of_all_sessions(whole_research, tmp_path):
    class Fails(Report):
        def step(self, step, means):
            if step == 7:  # The time until step 8 is saved with it.
                time.sleep(0.5)
            if step == 9:
                raise RuntimeError("a power failure")

    with pytest.raises(RuntimeError, match="a power failure"):
        train(RESEARCH, run_dir=tmp_path, checkpoint_seconds=0.0, report=Fails(quiet=True))
    assert saved_steps(tmp_path)[-1] == 8
    before = read_rows(tmp_path, "timing.jsonl")
    result = train(RESEARCH, run_dir=tmp_path, resume=True)
    assert result["sha256"] == whole_research[1]["sha256"]
    assert read_rows(tmp_path, "timing.jsonl")[:1] == before
    assert result["training_seconds"] > before[0]["seconds"] + 0.5


def test_a_process_stopped_by_sigint_is_resumed_to_the_bit(whole_research, tmp_path):
    """The next test sends SIGKILL; tests/cli/test_experiment.py sends SIGTERM."""
    run_dir = tmp_path / "run"
    command = [sys.executable, str(PROGRAMS / "research.py"), "--run-dir", str(run_dir)]
    command += ["--checkpoint-seconds", "0"]  # Each step is saved, so that the signal arrives before the last one.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith("epoch 1/3"):
        assert line, process.communicate()[1]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == REQUEUE
    step = saved_steps(run_dir)[-1]
    assert 6 <= step < 18
    assert f"Stopped by SIGINT; the checkpoint of step {step} is saved. Resume with:" in errors
    assert f"{' '.join(command)} --resume\n" in errors
    result = train(RESEARCH, run_dir=run_dir, resume=True)
    assert result["sha256"] == whole_research[1]["sha256"]
    assert read_manifest(run_dir)["sessions"][-1]["resumed_from"] == step


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("config.json", 1),
        ("metrics.jsonl", 2),
        ("SHA256SUMS", 1),
        pytest.param("manifest.json", 1, marks=pytest.mark.slow),
        pytest.param("manifest.json", 2, marks=pytest.mark.slow),
        pytest.param("metrics.jsonl", 1, marks=pytest.mark.slow),
        pytest.param("timing.jsonl", 3, marks=pytest.mark.slow),
        pytest.param("result.json", 1, marks=pytest.mark.slow),
    ],
)
def test_a_kill_at_any_write_is_repaired_by_resuming(name, count, whole_research, tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, str(PROGRAMS / "killed_at_write.py"), name, str(count), "--run-dir", str(run_dir)]
    killed = subprocess.run(command, check=False)
    assert killed.returncode == -signal.SIGKILL
    result = train(RESEARCH, run_dir=run_dir, resume=True)
    assert result["sha256"] == whole_research[1]["sha256"]
    assert {*verify(run_dir).values()} == {"ok"}
    sessions = read_manifest(run_dir)["sessions"]
    states = [session["state"] for session in sessions]
    assert states[-1] == "finished" and {*states[:-1]} <= {"killed", "finished"}
    if name == "SHA256SUMS":  # Written last.
        assert sessions[-1]["resumed_from"] == 18


def test_a_finished_run_is_not_trained_again(whole, tmp_path):
    report = Watch()
    again = train(CONFIG, run_dir=whole[0], data_dir=tmp_path / "no data", resume=True, report=report)
    assert again == whole[1]
    assert report.steps == []


def test_metrics_are_restored_from_the_last_checkpoint_and_no_data_are_opened(whole_research, tmp_path, monkeypatch):
    run_dir = shutil.copytree(whole_research[0], tmp_path / "run")
    (run_dir / "result.json").unlink()
    (run_dir / "metrics.jsonl").write_text('{"epoch": 1')
    monkeypatch.setattr("cnnjax.loop.open_dispatches", lambda *arguments: pytest.fail("No step is left."))
    train(RESEARCH, run_dir=run_dir, resume=True)
    assert read_rows(run_dir) == read_rows(whole_research[0])


def test_a_run_whose_best_checkpoint_is_damaged_is_repeated(whole_research, tmp_path):
    run_dir = shutil.copytree(whole_research[0], tmp_path / "run")
    (run_dir / "result.json").unlink()
    assert saved_steps(run_dir) == [6, 12, 18]
    files = [path for path in (run_dir / "checkpoints" / "6").rglob("*") if path.is_file()]
    max(files, key=lambda path: path.stat().st_size).write_bytes(b"")
    report = Watch()
    result = train(RESEARCH, run_dir=run_dir, resume=True, report=report)
    assert report.steps == list(range(1, 19))
    assert result["sha256"] == whole_research[1]["sha256"]


def test_resuming_where_there_is_nothing_starts_from_scratch(whole_research, tmp_path):
    report = Watch()
    result = train(RESEARCH, run_dir=tmp_path / "run", resume=True, report=report)
    assert any(line.startswith("There is nothing to resume in") for line in report.lines)
    assert result["sha256"] == whole_research[1]["sha256"]


class Linear(nn.Module):
    num_classes: int = 2

    @nn.compact
    def __call__(self, image, *, train):
        return nn.Dense(self.num_classes)(image.reshape(image.shape[0], -1))


class Refuses(Logger):
    """Cannot start."""

    def start(self, run, step):
        raise UserError("Log in first.")


@quick
def test_a_run_at_a_constant_learning_rate_can_be_trained_longer(tmp_path):
    two = replace(RESEARCH, num_epochs=2, model=Linear(), optim=SGD(learning_rate=0.05), augment=Augment())
    one = replace(two, num_epochs=1)
    at_once = train(two, run_dir=tmp_path / "at once")
    train(one, run_dir=tmp_path / "longer")
    with pytest.raises(UserError, match="exists already"):
        train(two, run_dir=tmp_path / "longer")
    files = [tmp_path / "longer" / name for name in ("config.json", "result.json")]
    before = [file.read_bytes() for file in files]
    for refused, message in (({"profile": (4, 8)}, "`profile` must be within"), ({"loggers": [Refuses()]}, "Log in")):
        with pytest.raises(UserError, match=message):
            train(two, run_dir=tmp_path / "longer", resume=True, **refused)
        assert [file.read_bytes() for file in files] == before
        assert {*verify(tmp_path / "longer").values()} == {"ok"}
        assert [session["state"] for session in read_manifest(tmp_path / "longer")["sessions"]] == ["finished"]
    lost = shutil.copytree(tmp_path / "longer", tmp_path / "lost")
    shutil.rmtree(lost / "checkpoints")
    with pytest.raises(UserError, match=r"lost must have its checkpoints to be trained longer, got none that can be u"):
        train(two, run_dir=lost, resume=True)
    assert {name: what for name, what in verify(lost).items() if what == "ok"}.keys() >= {
        "result.json",
        "manifest.json",
    }
    result = train(two, run_dir=tmp_path / "longer", resume=True)
    assert result["num_epochs"] == 2
    assert result["sha256"] == at_once["sha256"]
    assert read_record(tmp_path / "longer").config == encode(two)
    with pytest.raises(UserError, match="`num_epochs` is 2 there and 1 here"):
        train(one, run_dir=tmp_path / "longer", resume=True)


@pytest.mark.parametrize(
    "optim",
    [
        Adam(schedule="one_cycle"),
        Adam(lookahead=5),  # The share of the average that remains depends on the last step.
        Adam(accumulate_steps=2, groups=(ParamGroup("bias", num_epochs=1),)),  # The update at its end is rounded.
        Derailed(),  # Its schedule may depend on the length.
    ],
    ids=["schedule", "lookahead", "a group's end", "own schedule"],
)
def test_a_run_whose_steps_depend_on_its_length_cannot_be_trained_longer(optim, whole_research, tmp_path):
    config = replace(RESEARCH, optim=optim)
    write_record(tmp_path, Record(encode(config), read_record(whole_research[0]).data))
    with pytest.raises(UserError, match="`num_epochs` is 3 there and 4 here"):
        check_run(tmp_path, replace(config, num_epochs=4), resume=True)


@quick
def test_a_speed_recipe_without_validation_is_resumed_to_the_bit_and_scored_with_its_last_epoch(tmp_path, monkeypatch):
    groups = (ParamGroup("whiten", multiplier=8.0, num_epochs=2), ParamGroup("bias", multiplier=8.0))
    config = Config(
        dataset=make_arrays(shape=(9, 10, 3)),
        num_epochs=3,
        batch_size=8,
        validation_fraction=0.0,
        tta="flip_translate",
        loss=CrossEntropy(label_smoothing=0.2),
        model=SpeedNet(widths=(64, 64, 64), dtype="bfloat16"),
        optim=Muon(learning_rate=0.3, schedule="one_cycle", groups=groups, lookahead=5, accumulate_steps=2),
        augment=Mixup(flip="alternating", translate=1, cutout=2),  # Its labels are class probabilities.
    )
    steps: Any = train_steps
    compiled = steps._cache_size()
    whole = train(config, run_dir=tmp_path / "whole")
    assert steps._cache_size() == compiled + 1  # On a CPU, frozen parameters are not worth another program.
    assert whole["best_epoch"] == 3 and whole["best_validation_accuracy"] is None
    assert read_record(tmp_path / "whole").data.num_validation_examples == 0
    assert whole["sha256"]["params"] == whole["sha256"]["best_params"]
    assert whole["test_loss"] < np.log(4) - 0.05  # Better than chance.
    with pytest.raises(Interrupted, match="the checkpoint of step 23 is saved"):
        # Within the second epoch, between the two batches of an update, between two lookaheads.
        train(config, run_dir=tmp_path / "run", report=Watch(stop_at=23))
    # On a slow disk: no epoch waits for a save, and neither a stopped run nor its last epoch is lost.
    monkeypatch.setattr(Checkpoints, "is_busy", lambda _: True)
    with pytest.raises(Interrupted, match="the checkpoint of step 33 is saved"):
        train(config, run_dir=tmp_path / "run", resume=True, report=Watch(stop_at=33))
    assert saved_steps(tmp_path / "run") == [14, 23, 33]
    resumed = train(config, run_dir=tmp_path / "run", resume=True)
    assert resumed["sha256"] == whole["sha256"]
    assert resumed["test_loss"] == whole["test_loss"]
    assert not (tmp_path / "run" / "damaged").exists()
    assert load_run(tmp_path / "run", config).state.step == 3 * 14


def test_a_second_signal_stops_immediately():
    with stop_signals() as stop:
        with pytest.raises(Interrupted, match=r"Stopped by SIGINT; nothing is lost\."), stop.held():
            signal.raise_signal(signal.SIGINT)
            assert stop.signum == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)


def interrupted_arrays():
    """A data set that takes long to make, so that the user loses patience."""
    signal.raise_signal(signal.SIGTERM)


def test_a_signal_before_the_first_step_ends_the_run_and_leaves_no_directory(tmp_path):
    with pytest.raises(Interrupted, match=r"Stopped by SIGTERM; nothing is lost\."):
        train(replace(RESEARCH, dataset=interrupted_arrays), run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- A loss or a parameter that is not finite -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Diverges(Optimizer):
    """SGD with a huge learning rate from some update on."""

    update: int
    huge: float

    def transform(self, learning_rate):
        return optax.sgd(lambda update: jnp.where(jnp.asarray(update) < self.update, 1e-3, self.huge))


@quick
def test_a_loss_that_is_not_finite_stops_the_run_and_the_last_finite_checkpoint_is_kept(tmp_path):
    config = replace(RESEARCH, model=Linear(), optim=Diverges(update=7, huge=1e38), augment=Augment())
    pattern = (
        r"The loss became (nan|inf) between steps 8 and 9; last finite checkpoint: step 6\. Try a lower "
        r"`optim\.learning_rate` \(now 0\.001\)"
    )
    with pytest.raises(NonFiniteLossError, match=pattern):
        train(config, run_dir=tmp_path)
    assert saved_steps(tmp_path) == [6]
    assert len(read_rows(tmp_path)) == 1


@quick
def test_parameters_that_are_not_finite_are_never_saved(tmp_path):
    """The last step of an epoch diverges: no loss shows it yet."""
    config = replace(RESEARCH, model=Linear(), optim=Diverges(update=5, huge=float("inf")), augment=Augment())
    with pytest.raises(NonFiniteLossError, match=r"parameters became infinite or nan between steps 5 and 6; there is"):
        train(config, run_dir=tmp_path)
    assert saved_steps(tmp_path) == []


@quick
def test_an_epoch_that_a_slow_disk_skips_is_checked_too(monkeypatch, tmp_path):
    optim = Diverges(update=6, huge=float("inf"))
    config = replace(RESEARCH, validation_fraction=0.0, model=Linear(), optim=optim, augment=Augment())
    monkeypatch.setattr(Checkpoints, "is_busy", lambda _: True)
    with pytest.raises(NonFiniteLossError, match=r"parameters became infinite or nan between steps 6 and 7; there is"):
        train(config, run_dir=tmp_path)
    assert read_rows(tmp_path) == []


@quick
def test_a_slow_disk_delays_a_checkpoint_by_no_more_than_checkpoint_seconds(monkeypatch, tmp_path):
    config = replace(RESEARCH, validation_fraction=0.0, num_epochs=2)  # 7 steps per epoch.
    config = replace(config, model=Linear(), optim=SGD(learning_rate=0.05), augment=Augment())
    monkeypatch.setattr(Checkpoints, "is_busy", lambda _: True)
    for seconds, first_epoch_is_saved in ((60.0, False), (0.0, True)):
        run_dir = tmp_path / str(seconds)
        train(config, run_dir=run_dir, checkpoint_seconds=seconds)
        assert (7 in saved_steps(run_dir)) == first_epoch_is_saved


# --- What the user has to fix ---------------------------------------------------------------------------------------


def test_a_run_directory_that_exists(whole, prepared_dir):
    with pytest.raises(UserError, match=r"`run_dir` .* exists already\. Resume that run, resume=True, or choose"):
        train(CONFIG, run_dir=whole[0], data_dir=prepared_dir)
    with pytest.raises(UserError, match=r"`run_dir` .* exists already\. It holds another configuration: .*\. Choose"):
        train(replace(CONFIG, batch_size=8), run_dir=whole[0], data_dir=prepared_dir)


def test_resuming_with_another_configuration(whole, prepared_dir):
    other = replace(CONFIG, batch_size=8, optim=replace(CONFIG.optim, learning_rate=0.5))
    with pytest.raises(
        UserError, match=r"`batch_size` is 16 there and 8 here; `optim.learning_rate` is 0.001 there and 0.5 here"
    ):
        train(other, run_dir=whole[0], data_dir=prepared_dir, resume=True)


def test_resuming_with_other_data(whole_research, tmp_path):
    run_dir = shutil.copytree(whole_research[0], tmp_path / "run")
    (run_dir / "result.json").unlink()
    other = replace(RESEARCH, dataset=make_arrays(num_test=20))
    with pytest.raises(UserError, match=r"must hold the data that .* was trained on, .*sha256.t"):
        train(other, run_dir=run_dir, resume=True)


def test_a_run_continues_with_its_version_of_a_set_beside_a_newer_one(whole, prepared_dir, tmp_path):
    _, expected = whole
    data_dir = shutil.copytree(prepared_dir, tmp_path / "data")
    with pytest.raises(Interrupted):
        train(CONFIG, run_dir=tmp_path / "run", data_dir=data_dir, report=Watch(stop_at=10))
    old = load_dataset("generated", data_dir)
    splits = {split: old.load(split) for split in ("train", "test")}
    inverted = {split: RawSplit(255 - x.image, {"label": x.label}) for split, x in splits.items()}
    newer = replace(NAMED_SETS["fashion_mnist"], version="3.1.0")
    folder = write_tfds(newer, RawSet(inverted, {}), tmp_path / "newer", say=lambda line: None)
    shutil.copytree(folder, data_dir / "generated" / "3.1.0")
    assert load_dataset("generated", data_dir).version == "3.1.0"
    result = train(CONFIG, run_dir=tmp_path / "run", data_dir=data_dir, resume=True)
    assert result["sha256"] == expected["sha256"]
    assert load_run(tmp_path / "run").evaluate("test", data_dir=data_dir).accuracy == expected["test_accuracy"]
    config = read_record(tmp_path / "run").decode({})
    into = tmp_path / "again"
    assert reproduce(tmp_path / "run", config, into=into, data_dir=data_dir).same
    assert read_record(into).data.version == old.version


@quick
def test_a_refusal_changes_nothing(tmp_path):
    """A finished run is to be trained longer, but its latest checkpoint is of another network."""
    short = replace(RESEARCH, num_epochs=1, model=Linear(), optim=SGD(learning_rate=0.05), augment=Augment())
    train(short, run_dir=tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in ("config.json", "result.json", "metrics.jsonl")}
    shutil.rmtree(tmp_path / "checkpoints")
    other = tmp_path / "other"
    train(replace(short, dataset=make_arrays(shape=(3, 5, 3))), run_dir=other)
    (other / "checkpoints").rename(tmp_path / "checkpoints")
    shutil.rmtree(other)
    with pytest.raises(UserError, match=r"must match the model and the optimizer, but `params/.*` has shape"):
        train(replace(short, num_epochs=2), run_dir=tmp_path, resume=True)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("happens", ["deleted", "moved", "replaced"])
def test_a_run_directory_that_disappears_during_training(happens, whole_research, tmp_path):
    """Nothing is written in its place, and a run that was moved resumes to the same bits."""
    run_dir, moved = tmp_path / "run", tmp_path / "moved"

    def disappear(row, state):
        if row["epoch"] == 2:
            deadline = time.monotonic() + 30  # Orbax may still write the checkpoint of the first epoch.
            while time.monotonic() < deadline and not any(p.name.isdigit() for p in run_dir.glob("checkpoints/*")):
                time.sleep(0.01)
            run_dir.rename(moved)
            if happens == "replaced":
                run_dir.mkdir()
                (run_dir / "lock").touch()
            if happens == "deleted":
                shutil.rmtree(moved)

    with pytest.raises(UserError, match=r"must stay in place during training, but it, or its file lock, was moved, "):
        train_and_evaluate(RESEARCH, run_dir=run_dir, on_epoch=disappear)
    assert [path.name for path in run_dir.glob("*")] == (["lock"] if happens == "replaced" else [])
    if happens == "moved":
        assert train(RESEARCH, run_dir=moved, resume=True)["sha256"] == whole_research[1]["sha256"]


def test_a_run_directory_that_is_locked(whole):
    with FileLock(whole[0] / "lock"):
        with pytest.raises(UserError, match=r"`run_dir` .* is in use by another process"):
            train(CONFIG, run_dir=whole[0], resume=True)


def test_a_directory_of_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(
        UserError, match=r"`run_dir` must be empty or hold a run with a config\.json, got .* with thesis\.tex"
    ):
        train(CONFIG, run_dir=tmp_path)


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"`run_dir` .*file/run cannot be written"):
        train(CONFIG, run_dir=tmp_path / "file" / "run")
    with pytest.raises(UserError, match=r"`run_dir` must be a directory, got the file"):
        train(CONFIG, run_dir=tmp_path / "file")


@quick
def test_a_checkpoint_of_another_model(whole_research, tmp_path):
    wide = replace(RESEARCH, model=Net(width=32))
    write_record(tmp_path, Record(encode(wide), read_record(whole_research[0]).data))
    shutil.copytree(whole_research[0] / "checkpoints", tmp_path / "checkpoints")
    with pytest.raises(UserError, match=r"must have a manifest.json, got none: another version of cnnjax wrote it"):
        train(wide, run_dir=tmp_path, resume=True)
    shutil.copy(whole_research[0] / "manifest.json", tmp_path)
    with pytest.raises(UserError, match=r"must match the model and the optimizer, but .* has shape \(16,\)"):
        train(wide, run_dir=tmp_path, resume=True)


class ThreeClasses(nn.Module):
    @nn.compact
    def __call__(self, image, *, train):
        return nn.Dense(3)(image.mean((1, 2)))


def column_loss(logits, batch):
    return CrossEntropy()(logits, batch)[:, None]


def mean_loss(logits, batch):
    return CrossEntropy()(logits, batch).mean()


@dataclass(frozen=True)
class Crop(Augment):
    def transform(self, key, batch):
        return batch._replace(image=batch.image[:, 1:])


@quick
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 89}, "`batch_size` must be between 1 and the 88 training examples, got 89"),
        ({"augment": Augment(cutout=6)}, "`augment.cutout` must be at most 5 for images of 6×5 pixels, got 6"),
        ({"model": SpeedNet()}, "Images must have at least 9×9 pixels for SpeedNet, got 6×5"),
        ({"model": MLP(num_classes=7)}, "`model.num_classes` must be the 4 of the data, got 7. Leave it out"),
        ({"model": ThreeClasses(), "optim": SGD()}, "`model` must return logits of shape (16, 4), got float32[16, 3]"),
        (
            {"loss": column_loss},
            "`loss` must return floating-point values of shape (16,), one per example, got float32[16, 1]",
        ),
        (
            {"loss": mean_loss},
            "`loss` must return floating-point values of shape (16,), one per example, got float32[]",
        ),
        (
            {"augment": Crop()},
            "`augment.transform` must return images of shape (16, 6, 5, 3), got float32[16, 5, 5, 3]",
        ),
    ],
    ids=["batch size", "cutout", "image size", "num_classes", "logits", "loss column", "mean loss", "cropped images"],
)
def test_what_does_not_fit_the_data_leaves_no_directory(changes, message, tmp_path):
    pattern = re.escape(message)
    report = Watch()
    with pytest.raises(UserError, match=pattern):
        train(replace(RESEARCH, **changes), run_dir=tmp_path / "run", report=report)
    assert report.steps == []
    assert not (tmp_path / "run").exists()


def test_the_number_of_classes_is_set_from_the_data():
    config = Config(model=Linear(), augment=Mixup(), loss=CrossEntropy()).with_num_classes(4)
    assert (config.model, config.augment, config.loss) == (Linear(4), Mixup(num_classes=4), CrossEntropy())
    assert config.with_num_classes(4) == config
    with pytest.raises(UserError, match=r"`model\.num_classes` must be the 5 of the data, got 4"):
        config.with_num_classes(5)
    with pytest.raises(UserError, match=r"`augment\.num_classes` must be the 5 of the data, got 4"):
        replace(config, model=CNN()).with_num_classes(5)
    assert replace(config, model=Net()).with_num_classes(4).model == Net()


@pytest.mark.slow
def test_an_epoch_on_the_real_mnist_scores_every_test_image(tmp_path):
    config = Config(dataset="mnist", num_epochs=1, model=MLP(dense_dropout=0.2))
    result = train(config, run_dir=tmp_path / "run")
    assert result["num_test_examples"] == 10_000
    assert result["test_accuracy"] > 0.94
