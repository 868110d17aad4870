import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_raw

from cnnjax import (
    CNN,
    AugmentConfig,
    Config,
    ModelConfig,
    OptimConfig,
    UserError,
    experiment,
    init_state,
    loop,
    train_and_evaluate,
)
from cnnjax.cli.main import REQUEUE
from cnnjax.cli.signals import Interrupted, stop_signals
from cnnjax.data.batches import Pixels, make_batch, pixel_statistics, row, split_validation, standardize
from cnnjax.data.datasets import Examples, load_dataset
from cnnjax.data.named import NAMED_SETS
from cnnjax.data.tfds_writer import write_tfds
from cnnjax.errors import NonFiniteLossError
from cnnjax.evaluate import evaluate
from cnnjax.runs.checkpoints import Checkpoints
from cnnjax.runs.inspection import verify
from cnnjax.runs.trained import load_trained, score

# Dropout, augmentation and a partial last batch on: 390 training examples make 25 steps an epoch, the last of 6.
CONFIG = Config(
    experiment="test",
    dataset="generated",
    num_epochs=2,
    batch_size=16,
    augment=AugmentConfig(flip="random", translate=1, cutout=2),
    label_smoothing=0.1,
    model=ModelConfig(name="mlp", dense_dropout=0.2),
    optim=OptimConfig(learning_rate=1e-3, schedule="one_cycle"),
)


def last_state(run_dir, model="mlp"):
    """The arrays of the latest checkpoint."""
    checkpoints = Checkpoints(run_dir / "checkpoints", read_only=True)
    made = experiment.make_model(ModelConfig(name=model), 10)
    like = init_state(jax.random.key(0), jnp.zeros((1, 28, 28, 1)), model=made, tx=experiment.make_tx(CONFIG.optim, 1))
    state, _ = checkpoints.restore(checkpoints.latest(), like)
    checkpoints.close()
    return jax.tree.map(np.asarray, state)


def read_rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def read_metrics(run_dir):
    return (run_dir / "metrics.jsonl").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, prepared_dir):
    """A run without interruptions."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    result = train_and_evaluate(CONFIG, run_dir=run_dir, data_dir=prepared_dir)
    return run_dir, result


def test_a_run_learns_and_leaves_its_directory(whole, prepared_dir):
    run_dir, result = whole
    files = {"config.json", "manifest.json", "metrics.jsonl", "timing.jsonl", "result.json", "SHA256SUMS", "lock"}
    assert {path.name for path in run_dir.iterdir()} - {"session-0.diff"} == files | {"checkpoints"}
    assert json.loads((run_dir / "result.json").read_text()) == result
    assert result["test_accuracy"] > 0.4  # Of 10 classes, after 50 steps with all that augmentation.
    assert result["num_test_examples"] == 170
    assert result["num_params"] == 784 * 512 + 512 + 512 * 512 + 512 + 5120 + 10
    rows = read_rows(run_dir)
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 25), (2, 50)]
    best = max(row["validation_accuracy"] for row in rows)
    assert result["best_validation_accuracy"] == best
    assert rows[result["best_epoch"] - 1]["validation_accuracy"] == best
    assert last_state(run_dir).step == 50


def test_a_seed_gives_the_same_bits_and_another_seed_others(whole, prepared_dir, tmp_path):
    train_and_evaluate(CONFIG, run_dir=tmp_path / "again", data_dir=prepared_dir)
    jax.tree.map(np.testing.assert_array_equal, last_state(tmp_path / "again"), last_state(whole[0]))
    other = Config(**{**vars(CONFIG), "seed": 1})
    train_and_evaluate(other, run_dir=tmp_path / "other", data_dir=prepared_dir)
    kernel = last_state(tmp_path / "other").params["Dense_0"]["kernel"]
    assert not np.array_equal(kernel, last_state(whole[0]).params["Dense_0"]["kernel"])


@pytest.mark.parametrize("stop_at", [10, 25, 33], ids=["in epoch 1", "at its end", "in epoch 2"])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(stop_at, whole, prepared_dir, tmp_path, monkeypatch):
    step = experiment.train_steps

    def train_step_and_stop(state, *args, **kwargs):
        if state.step == stop_at - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(state, *args, **kwargs)

    monkeypatch.setattr(experiment, "train_steps", train_step_and_stop)
    with pytest.raises(Interrupted, match=f"Stopped by SIGTERM; the checkpoint of step {stop_at} is saved"):
        train_and_evaluate(CONFIG, run_dir=tmp_path / "run", data_dir=prepared_dir)
    monkeypatch.undo()
    assert last_state(tmp_path / "run").step == stop_at

    result = train_and_evaluate(CONFIG, run_dir=tmp_path / "run", data_dir=prepared_dir, resume=True)

    jax.tree.map(np.testing.assert_array_equal, last_state(tmp_path / "run"), last_state(whole[0]))
    assert read_metrics(tmp_path / "run") == read_metrics(whole[0])
    assert result["test_loss"] == whole[1]["test_loss"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_real_process_is_stopped_and_resumed(signum, whole, prepared_dir, tmp_path):
    script = tmp_path / "experiment.py"
    script.write_text(
        "from cnnjax import AugmentConfig, Config, ModelConfig, OptimConfig, experiment, run_experiment\n"
        "import sys, time\n"
        "step = experiment.train_steps\n"
        "def slow_step(*args, **kwargs):\n"
        "    time.sleep(0.2 if args[0].step >= 25 else 0)\n"  # In the second epoch.
        "    return step(*args, **kwargs)\n"
        "if '--resume' not in sys.argv:\n"
        "    experiment.train_steps = slow_step\n"
        f"run_experiment({CONFIG!r})\n"
    )
    command = [sys.executable, str(script), "--data-dir", str(prepared_dir), "--run-dir", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    while not line.startswith("epoch 1/2"):
        assert line, process.communicate()[1]
        line = process.stdout.readline()
    while not (tmp_path / "run" / "checkpoints" / "25").exists():
        time.sleep(0.01)
    time.sleep(0.3)  # Into the second epoch (5 s), where nothing but the signal saves.
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)

    if signum == signal.SIGKILL:
        assert process.returncode == -signum
    else:
        assert process.returncode == REQUEUE
        assert f"Stopped by {signum.name}" in errors
        assert f"{' '.join(command)} --resume" in errors  # How to go on.
        assert 25 < last_state(tmp_path / "run").step < 50
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=True)
    assert "resuming at step" in again.stdout
    assert again.stdout.splitlines()[-1].startswith("Test accuracy ")
    jax.tree.map(np.testing.assert_array_equal, last_state(tmp_path / "run"), last_state(whole[0]))
    assert read_metrics(tmp_path / "run") == read_metrics(whole[0])


def test_a_run_that_ended_is_not_run_again(whole, prepared_dir, monkeypatch):
    monkeypatch.setattr(loop, "fit", None)
    assert train_and_evaluate(CONFIG, run_dir=whole[0], data_dir=prepared_dir, resume=True) == whole[1]


@pytest.mark.parametrize("call", range(1, 9))
def test_a_kill_at_any_write_is_mended_by_resume(call, whole, prepared_dir, tmp_path):
    """Of manifest, configuration, metrics, result and checksums; the process dies at the moment of the rename."""
    code = (
        "import os, sys\n"
        "from cnnjax import AugmentConfig, Config, ModelConfig, OptimConfig, train_and_evaluate\n"
        "from pathlib import Path\n"
        "replace, calls = Path.replace, []\n"
        "def killed(path, target):\n"
        "    if target.parent.name == 'run':\n"
        "        calls.append(target)\n"
        "        if len(calls) == int(sys.argv[3]): os.kill(os.getpid(), 9)\n"
        "    return replace(path, target)\n"
        "Path.replace = killed\n"
        f"train_and_evaluate({CONFIG!r}, run_dir=Path(sys.argv[1]), data_dir=Path(sys.argv[2]), resume=True)\n"
    )
    run_dir = tmp_path / "run"
    command = [sys.executable, "-c", code, str(run_dir), str(prepared_dir)]
    assert subprocess.run([*command, str(call)], check=False).returncode == -signal.SIGKILL
    result = train_and_evaluate(CONFIG, run_dir=run_dir, data_dir=prepared_dir, resume=True)
    assert result["sha256"] == whole[1]["sha256"]
    assert read_metrics(run_dir) == read_metrics(whole[0])
    assert {*verify(run_dir).values()} == {"ok"}
    states = [s["state"] for s in json.loads((run_dir / "manifest.json").read_text())["sessions"]]
    assert states[-1] == "finished" and {*states[:-1]} <= {"killed", "finished"}


def test_a_run_directory_in_use(whole, prepared_dir):
    with pytest.raises(UserError, match=r"`run_dir` .* exists already\. Go on with that run by --resume, or name"):
        train_and_evaluate(CONFIG, run_dir=whole[0], data_dir=prepared_dir)
    other = Config(**{**vars(CONFIG), "batch_size": 8})
    with pytest.raises(UserError, match=r"`run_dir` .* exists already\. It holds another configuration\. Name another"):
        train_and_evaluate(other, run_dir=whole[0], data_dir=prepared_dir)


def test_resuming_with_another_configuration(whole, prepared_dir):
    other = Config(**{**vars(CONFIG), "batch_size": 8, "optim": OptimConfig(learning_rate=0.5, schedule="one_cycle")})
    with pytest.raises(
        UserError, match=r"`batch_size` is 16 there and 8 here; `optim.learning_rate` is 0.001 there and"
    ):
        train_and_evaluate(other, run_dir=whole[0], data_dir=prepared_dir, resume=True)


def test_a_run_at_a_constant_rate_can_be_trained_longer(whole, prepared_dir, tmp_path):
    two, one = (
        Config(**{**vars(CONFIG), "num_epochs": num_epochs, "optim": OptimConfig(learning_rate=1e-3)})
        for num_epochs in (2, 1)
    )
    train_and_evaluate(two, run_dir=tmp_path / "at once", data_dir=prepared_dir)
    train_and_evaluate(one, run_dir=tmp_path / "longer", data_dir=prepared_dir)
    with pytest.raises(UserError, match="exists already"):
        train_and_evaluate(two, run_dir=tmp_path / "longer", data_dir=prepared_dir)
    result = train_and_evaluate(two, run_dir=tmp_path / "longer", data_dir=prepared_dir, resume=True)
    assert result["num_epochs"] == 2
    assert loop.rundir.read_run(tmp_path / "longer")[0] == two
    assert read_metrics(tmp_path / "longer") == read_metrics(tmp_path / "at once")
    with pytest.raises(UserError, match="`num_epochs` is 2 there and 1 here"):
        train_and_evaluate(one, run_dir=tmp_path / "longer", data_dir=prepared_dir, resume=True)
    averaged = Config(**{**vars(two), "optim": OptimConfig(lookahead=5)})
    longer = Config(**{**vars(averaged), "num_epochs": 3})
    assert not loop.rundir._is_longer(longer, averaged)  # How much of the average remains depends on the last step.
    frozen = Config(**{**vars(two), "optim": OptimConfig(accumulate=2, whiten_epochs=1)})
    assert not loop.rundir._is_longer(Config(**{**vars(frozen), "num_epochs": 3}), frozen)  # Its end is rounded.
    more = Config(**{**vars(CONFIG), "num_epochs": 3})
    with pytest.raises(UserError, match="`num_epochs` is 2 there and 3 here"):  # Its learning rate is on a schedule.
        train_and_evaluate(more, run_dir=whole[0], data_dir=prepared_dir, resume=True)


def test_resuming_with_other_data(whole, prepared_dir, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(whole[0], run_dir)
    (run_dir / "result.json").unlink()
    other = tmp_path / "tfds"
    write_tfds(NAMED_SETS["fashion_mnist"], make_raw((28, 28, 1), 430, 100), other, say=lambda line: None)
    (other / "fashion_mnist").rename(other / "generated")
    with pytest.raises(UserError, match=r"must be resumed with its own data, SHA-256 {'train'"):
        train_and_evaluate(CONFIG, run_dir=run_dir, data_dir=other, resume=True)


def test_a_run_directory_that_another_process_trains_in(prepared_dir, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    locked = str(run_dir / "lock")
    code = (
        f"import fcntl, os, time; fcntl.flock(os.open({locked!r}, os.O_CREAT), fcntl.LOCK_EX); print(); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-uc", code], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(UserError, match=r"`run_dir` .* is in use by another process"):
            train_and_evaluate(CONFIG, run_dir=run_dir, data_dir=prepared_dir)
    finally:
        process.kill()
        process.communicate()


def test_metrics_are_restored_from_the_checkpoint(whole, prepared_dir, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(whole[0], run_dir)
    (run_dir / "result.json").unlink()
    (run_dir / "metrics.jsonl").write_text('{"epoch": 1')
    train_and_evaluate(CONFIG, run_dir=run_dir, data_dir=prepared_dir, resume=True)
    assert read_metrics(run_dir) == read_metrics(whole[0])


def test_parameters_that_are_not_finite_are_never_saved(prepared_dir, tmp_path, monkeypatch):
    """The last step of the epoch blows up: no loss has seen it yet."""
    tx = optax.sgd(lambda step: jnp.where(step < 24, 1e-3, jnp.inf))
    monkeypatch.setattr(experiment, "make_tx", lambda config, num_steps, num_epochs: tx)
    with pytest.raises(NonFiniteLossError, match=r"parameters became infinite or nan .* there is no checkpoint yet"):
        train_and_evaluate(CONFIG, run_dir=tmp_path, data_dir=prepared_dir)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_resuming_where_there_is_nothing_starts_anew(whole, prepared_dir, tmp_path, capsys):
    report = loop.Report()
    train_and_evaluate(CONFIG, run_dir=tmp_path / "run", data_dir=prepared_dir, resume=True, report=report)
    assert "There is nothing to resume in" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, last_state(tmp_path / "run"), last_state(whole[0]))


def test_a_directory_of_something_else(prepared_dir, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"`run_dir` must be empty or hold a run, got .* with thesis\.tex"):
        train_and_evaluate(CONFIG, run_dir=tmp_path, data_dir=prepared_dir)


def test_a_checkpoint_of_another_model(whole, prepared_dir, tmp_path):
    run_dir = tmp_path / "run"
    cnn = Config(**{**vars(CONFIG), "model": ModelConfig(name="cnn")})
    run_dir.mkdir()
    loop.rundir.write_run(run_dir, cnn, loop.rundir.read_run(whole[0])[1])
    shutil.copytree(whole[0] / "checkpoints", run_dir / "checkpoints")
    with pytest.raises(UserError, match=r"must have a manifest.json, got none: another version of cnnjax wrote it"):
        train_and_evaluate(cnn, run_dir=run_dir, data_dir=prepared_dir, resume=True)
    shutil.copy(whole[0] / "manifest.json", run_dir)
    with pytest.raises(UserError, match=r"must be of the same model and optimizer"):
        train_and_evaluate(cnn, run_dir=run_dir, data_dir=prepared_dir, resume=True)


def test_a_batch_larger_than_the_set_leaves_no_directory(prepared_dir, tmp_path):
    config = Config(**{**vars(CONFIG), "batch_size": 391})
    with pytest.raises(UserError, match=r"`batch_size` must be between 1 and the 390 training examples, got 391"):
        train_and_evaluate(config, run_dir=tmp_path / "run", data_dir=prepared_dir)
    assert not (tmp_path / "run").exists()


def test_an_augmentation_larger_than_the_images_leaves_no_directory(prepared_dir, tmp_path):
    config = Config(**{**vars(CONFIG), "augment": AugmentConfig(cutout=29)})
    with pytest.raises(UserError, match=r"`augment.cutout` must be at most 28 for images of 28×28 pixels, got 29"):
        train_and_evaluate(config, run_dir=tmp_path / "run", data_dir=prepared_dir)
    assert not (tmp_path / "run").exists()


def test_images_too_small_for_the_network_leave_no_directory(tmp_path):
    write_tfds(NAMED_SETS["fashion_mnist"], make_raw((8, 28, 1), 100, 50), tmp_path / "data", say=lambda line: None)
    (tmp_path / "data" / "fashion_mnist").rename(tmp_path / "data" / "generated")
    config = Config(**{**vars(CONFIG), "model": ModelConfig("speednet", widths=(4, 4, 4))})
    with pytest.raises(UserError, match=r"9×9 pixels at least for `model.name` speednet, got 8×28"):
        train_and_evaluate(config, run_dir=tmp_path / "run", data_dir=tmp_path / "data")
    assert not (tmp_path / "run").exists()


def test_a_directory_that_cannot_be_written(prepared_dir, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"`run_dir` must be a directory that can be written, got .*file/run"):
        train_and_evaluate(CONFIG, run_dir=tmp_path / "file" / "run", data_dir=prepared_dir)
    with pytest.raises(UserError, match=r"`run_dir` must be a directory, got the file"):
        train_and_evaluate(CONFIG, run_dir=tmp_path / "file", data_dir=prepared_dir)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_finite_checkpoint(prepared_dir, tmp_path, monkeypatch):
    """Diverges for real: after the first epoch the gradients are scaled beyond float32."""

    def make_tx(config, num_steps, num_epochs):
        return optax.sgd(lambda step: jnp.where(step < 30, 1e-3, 1e30))

    monkeypatch.setattr(experiment, "make_tx", make_tx)
    pattern = (
        r"the loss became (nan|inf) between steps 3\d and 3\d; the last finite checkpoint is of step 25\. Try a lower"
    )
    with pytest.raises(NonFiniteLossError, match=pattern):
        train_and_evaluate(CONFIG, run_dir=tmp_path, data_dir=prepared_dir)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["25"]
    assert len(read_rows(tmp_path)) == 1


def test_evaluation_of_a_size_that_the_batch_does_not_divide_equals_numpy():
    rng = np.random.default_rng(0)
    examples = Examples(rng.integers(0, 256, (703, 8, 8, 3), np.uint8), rng.integers(0, 10, 703).astype(np.int32))
    statistics, model = pixel_statistics(examples.image), CNN(10)
    state = init_state(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), model=model, tx=optax.adam(1e-3))
    logits = np.asarray(
        model.apply({"params": state.params}, standardize(examples.image, statistics), train=False), np.float64
    )
    log_probability = logits - np.log(np.exp(logits).sum(1, keepdims=True))

    scores = evaluate(state, Pixels(*examples, statistics), model=model)

    assert scores.num_examples == 703
    assert scores.accuracy == (logits.argmax(1) == examples.label).mean()
    assert scores.loss == pytest.approx(-log_probability[np.arange(703), examples.label].mean(), rel=1e-5)


def test_a_speed_recipe_without_validation_is_resumed_to_the_bit_and_tests_its_last_epoch(
    prepared_dir, tmp_path, monkeypatch
):
    config = Config(
        dataset="generated",
        num_epochs=3,
        batch_size=16,
        validation_fraction=0.0,
        label_smoothing=0.2,
        views="shifted",
        model=ModelConfig(name="speednet", widths=(8, 8, 8), depth=3, dtype="bfloat16"),
        optim=OptimConfig("muon", 0.1, "one_cycle", bias_scale=64.0, whiten_epochs=2, lookahead=5, accumulate=2),
        augment=AugmentConfig(flip="alternating", translate=2, cutout=3),
    )
    whole = train_and_evaluate(config, run_dir=tmp_path / "whole", data_dir=prepared_dir)
    assert whole["best_epoch"] == 3 and whole["best_validation_accuracy"] is None
    assert whole["test_accuracy"] > 0.15  # Of 10 classes of noise that no mirror image resembles.
    step = experiment.train_steps

    def train_step_and_stop(state, *args, **kwargs):
        if state.step == 40:  # Within the second epoch, between two accumulated batches' update and lookahead.
            os.kill(os.getpid(), signal.SIGTERM)
        return step(state, *args, **kwargs)

    monkeypatch.setattr(experiment, "train_steps", train_step_and_stop)
    with pytest.raises(Interrupted, match="the checkpoint of step 41 is saved"):
        train_and_evaluate(config, run_dir=tmp_path / "run", data_dir=prepared_dir)
    monkeypatch.undo()
    resumed = train_and_evaluate(config, run_dir=tmp_path / "run", data_dir=prepared_dir, resume=True)
    assert resumed["sha256"] == whole["sha256"]
    assert resumed["test_loss"] == whole["test_loss"]
    again = score(load_trained(tmp_path / "run"), "test", prepared_dir)
    assert (again.accuracy, again.loss) == (whole["test_accuracy"], whole["test_loss"])


def test_training_never_sees_the_held_out_examples(prepared_dir, tmp_path, monkeypatch):
    seen = []
    step = experiment.train_steps

    def record(state, pixels, plan, *args, augment, **kwargs):
        seen.append(make_batch(pixels, row(plan, 0), augment).image)
        return step(state, pixels, plan, *args, augment=augment, **kwargs)

    monkeypatch.setattr(experiment, "train_steps", record)
    config = Config(**{**vars(CONFIG), "num_epochs": 1, "augment": AugmentConfig()})
    train_and_evaluate(config, run_dir=tmp_path, data_dir=prepared_dir)
    examples = load_dataset("generated", prepared_dir).load("train")
    train, validation = split_validation(0, examples.label, 0.1)
    statistics = pixel_statistics(examples.image[train])
    pixels = np.rint(np.concatenate(seen) * statistics.std + statistics.mean).astype(np.uint8)
    trained_on = {image.tobytes() for image in pixels}
    assert trained_on == {image.tobytes() for image in examples.image[train]}
    assert not trained_on & {image.tobytes() for image in examples.image[validation]}


def test_a_second_signal_ends_at_once():
    with stop_signals() as stop:
        with pytest.raises(Interrupted, match=r"Stopped by SIGINT; nothing is lost\."), stop.held():
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signum == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_before_the_first_step_ends_the_run_and_leaves_nothing(prepared_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "load_dataset", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match=r"Stopped by SIGTERM; nothing is lost\."):
        train_and_evaluate(CONFIG, run_dir=tmp_path / "run", data_dir=prepared_dir)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_epoch_on_the_real_mnist_scores_every_test_image(tmp_path):
    config = Config(dataset="mnist", num_epochs=1, model=ModelConfig(name="mlp", dense_dropout=0.2))
    result = train_and_evaluate(config, run_dir=tmp_path / "run")
    assert result["num_test_examples"] == 10_000
    assert result["test_accuracy"] > 0.94
