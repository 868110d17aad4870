import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import optax
import pandas
import pytest

import cnnjax
from cnnjax import Config, load_run
from cnnjax.cli.experiment import load_experiment
from cnnjax.cli.main import main
from cnnjax.cli.train_command import parse_train
from cnnjax.data.named import NAMED_SETS
from cnnjax.data.sources import RawSet, RawSplit
from cnnjax.data.tfds_format import write_tfds

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXPERIMENT, STEPS, LOOP, _, LIBRARY = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
OPTIONS = re.findall(r"cnnjax train (\w+) ([^#\n]+?)\s*(?:#.*)?$", README, re.MULTILINE)
OPTIONS += re.findall(r"make train EXPERIMENT=(\w+) ARGS=\"(.+?)\"", README)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Makes a directory with experiments/mine.py the working directory."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "mine.py").write_text(EXPERIMENT)
    monkeypatch.chdir(tmp_path)


def test_the_experiment_file_trains_and_is_scored(mine, capsys):
    main(["train", "mine", "--num-epochs", "1", "--model.width", "4", "--optim.b1", "0.95"])
    main(["eval", "runs/mine-seed0", "--experiment", "mine"])
    out = capsys.readouterr().out
    assert re.findall(r"Test accuracy (\S+)%", out) == re.findall(r"test accuracy (\S+)%", out) != []
    run = load_run("runs/mine-seed0", load_experiment("mine").config)
    image, label = run.load_data("test")
    margin = run.logits(image) @ [-1.0, 1.0]
    pairs = margin[label == 1][:, None] - margin[label == 0]
    auroc = np.mean((pairs > 0) + 0.5 * (pairs == 0))
    assert run.finished_result()["test_metrics"]["auroc"] == pytest.approx(auroc)
    assert re.findall(r"[Tt]est accuracy .*?auroc (\d\.\d{4})", out) == 2 * [f"{auroc:.4f}"]


@pytest.mark.parametrize("name", ["adversarial", "clipped"])
def test_the_steps_train(name, mine):
    text = EXPERIMENT.replace("CONFIG =", f"from cnnjax import train_step\n{STEPS}\nCONFIG =").replace("SAM()", name)
    Path("experiments/mine.py").write_text(text)
    main(["train", "mine", "--num-epochs", "1", "--model.width", "4"])
    run = load_run("runs/mine-seed0", load_experiment("mine").config)
    assert run.config.train_step.__name__ == name
    assert np.isfinite(run.history["train_loss"]).all() and (run.history["train_grad_norm"] > 0).all()


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_its_commands_have_options_that_exist(name, options, mine, monkeypatch):
    if name != "mine":
        monkeypatch.chdir(ROOT)
    parse_train(load_experiment(name), shlex.split(options))


def test_the_training_loop_runs_and_learns(tmp_path, monkeypatch, capsys):
    """On images of Fashion-MNIST's shape whose brightness is the class, without the pinned digest of the real."""
    label = np.arange(3200, dtype=np.uint8) % 10
    image = np.broadcast_to(20 * label[:, None, None, None], (3200, 28, 28, 1)).copy()
    split = RawSplit(image, {"label": label})
    write_tfds(NAMED_SETS["fashion_mnist"], RawSet({"train": split, "test": split}, {}), tmp_path, lambda line: None)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setitem(NAMED_SETS, "fashion_mnist", replace(NAMED_SETS["fashion_mnist"], sha256={}))
    scope = {}
    exec(LOOP, scope)
    assert scope["state"].step == 100
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"step 100: \d+\.\d% of the batch is correct", lines[-2])
    assert re.match(r"\d+\.\d+% of the test set is correct", lines[-1])
    assert scope["metrics"].correct > 16  # Chance is 6.4 of 64, give or take 2.4.
    assert scope["scores"].accuracy > 0.2


def test_the_loop_as_a_function(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng, steps = np.random.default_rng(0), []
    images, label = rng.integers(0, 256, (60, 8, 8, 1), np.uint8), np.arange(60) % 4
    config = Config(dataset=(images, label, images, label), num_epochs=1, batch_size=20)
    scope = {name: getattr(cnnjax, name) for name in cnnjax.__all__}
    scope |= {"config": config, "log": lambda *args: steps.append(args), "images": images}
    scope |= {"load_run": lambda run_dir: load_run("runs/mine", config), "optax": optax, "pandas": pandas}
    exec(LIBRARY, scope)
    assert [step for step, _ in steps] == [1, 2, 3]
    assert pandas.DataFrame(scope["run"].history)["train_loss"].shape == (1,)
    assert scope["old"].predict(images).shape == (60, 4)
    assert scope["state"].step == 0


@pytest.mark.parametrize(
    "path", sorted({*re.findall(r"(?:experiments|tests)/[\w/]+\.\w+", README)} - {"experiments/mine.py"})
)
def test_the_files_that_it_names_exist(path):
    assert (ROOT / path).exists()
