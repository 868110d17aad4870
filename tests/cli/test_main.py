import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from cnnjax import Config, ModelConfig, OptimConfig, UserError
from cnnjax.cli.main import main

COMMON = ["--batch-size", "16", "--model.name", "mlp", "--num-epochs", "1"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, prepared_dir):
    run_dir = tmp_path_factory.mktemp("cli") / "run"
    where = ["--data-dir", str(prepared_dir), "--run-dir", str(run_dir)]
    main(["train", "--dataset", "generated", *COMMON, "--optim.learning-rate", "3e-3", *where])
    return run_dir


def fails(capsys, *argv):
    """Runs a command that must end with status 2; returns its message, which must be no traceback."""
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    return re.sub(r"[│╭╮╰╯─\s]+", " ", captured.err + captured.out)


def test_train_takes_any_value_by_its_name(run_dir):
    config = json.loads((run_dir / "config.json").read_text())["config"]
    assert config["optim"]["learning_rate"] == 3e-3
    assert (config["dataset"], config["batch_size"], config["model"]["name"]) == ("generated", 16, "mlp")


def test_eval_prints_the_score_of_every_test_image(run_dir, prepared_dir, capsys):
    main(["eval", str(run_dir), "--data-dir", str(prepared_dir)])
    result = json.loads((run_dir / "result.json").read_text())
    assert f"test accuracy {result['test_accuracy']:.2%}, loss {result['test_loss']:.4f}, on all 170 images" in (
        capsys.readouterr().out
    )


def test_predict_prints_the_top_classes(run_dir, tmp_path, capsys):
    for name in ("a.png", "b.jpg"):
        Image.new("RGB", (40, 30), "grey").save(tmp_path / name)
    main(["predict", str(run_dir), str(tmp_path / "a.png"), str(tmp_path / "b.jpg"), "--top", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(tmp_path / "a.png"), str(tmp_path / "b.jpg")]
    assert all(re.search(r": [\w/ -]+ \d+\.\d%, [\w/ -]+ \d+\.\d%$", line) for line in lines)


def test_predict_hints_at_images_of_reversed_brightness(run_dir, prepared_dir, tmp_path, capsys):
    from cnnjax.data.datasets import load_dataset

    dataset = load_dataset("generated", prepared_dir)
    examples = dataset.load("test")
    Image.new("L", (28, 28), "white").save(tmp_path / "white.png")
    main(["predict", str(run_dir), str(tmp_path / "white.png")])
    assert "white.png is much brighter than the training images; try --invert" in capsys.readouterr().err
    Image.fromarray(255 - examples.image[0, ..., 0]).save(tmp_path / "negative.png")
    main(["predict", str(run_dir), str(tmp_path / "negative.png"), "--invert"])
    captured = capsys.readouterr()
    assert f"negative.png: {dataset.class_names[examples.label[0]]} " in captured.out
    assert captured.err == ""


def test_data_prints_what_the_set_holds(prepared_dir, capsys):
    main(["data", "generated", "--data-dir", str(prepared_dir)])
    out = capsys.readouterr().out
    assert "train: 430×28×28×1, SHA-256 " in out
    assert "10 classes: T-shirt/top, Trouser," in out


def test_unknown_names_list_the_nearest(prepared_dir, tmp_path, capsys):
    where = ("--data-dir", str(prepared_dir))
    assert "Did you mean cifar10 or cifar100" in fails(capsys, "train", "--dataset", "cifr10", *where)
    assert "Did you mean cnn?" in fails(capsys, "train", "--model.name", "cmn")
    assert "--optim.learning-rate" in fails(capsys, "train", "--optim.learning-rat", "1e-3")
    assert "must be a known name, got 'generatd'. Did you mean generated" in fails(capsys, "data", "generatd", *where)


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("--num-epochs", "0", "`num_epochs` must be at least 1, got 0"),
        ("--batch-size", "0", "`batch_size` must be at least 1, got 0"),
        ("--validation-fraction", "1", "`validation_fraction` must be at least 0 and below 1, got 1"),
        ("--validation-fraction", "-1", "`validation_fraction` must be at least 0 and below 1, got -1"),
        ("--checkpoint-seconds", "nan", "`checkpoint_seconds` must be at least 0, got nan"),
        ("--seed", "-1", "`seed` must be between 0 and 2**32 - 1, got -1"),
        ("--label-smoothing", "1", "`label_smoothing` must be at least 0 and below 1, got 1"),
        ("--optim.learning-rate", "-1", "`optim.learning_rate` must be above 0 and finite, got -1"),
        ("--optim.learning-rate", "nan", "`optim.learning_rate` must be above 0 and finite, got nan"),
        ("--optim.warmup", "1", "`optim.warmup` must be at least 0 and below 1, got 1"),
        ("--optim.weight-decay", "-1", "`optim.weight_decay` must be at least 0 and finite, got -1"),
        ("--optim.end", "2", "`optim.end` must be between 0 and 1, got 2"),
        ("--optim.lookahead", "-1", "`optim.lookahead` must be at least 0, got -1"),
        ("--optim.accumulate", "0", "`optim.accumulate` must be at least 1, got 0"),
        ("--optim.bias-scale", "inf", "`optim.bias_scale` must be at least 0 and finite, got inf"),
        ("--augment.flip", "rando", "`augment.flip` must be a known name, got 'rando'. Did you mean random"),
        ("--augment.translate", "-1", "`augment.translate` must be at least 0, got -1"),
        ("--views", "shifed", "`views` must be a known name, got 'shifed'. Did you mean shifted"),
        ("--model.name", "speed", "`model.name` must be a known name, got 'speed'. Did you mean speednet"),
        ("--model.dtype", "float31", "`model.dtype` must be a known name, got 'float31'. Did you mean float32"),
        ("--model.depth", "4", "`model.depth` must be 2 or 3, got 4"),
        ("--model.conv-dropout", "1", "`model.conv_dropout` must be between 0 and 0.99, got 1"),
        ("--model.dense-dropout", "-1", "`model.dense_dropout` must be between 0 and 0.99, got -1"),
    ],
)
def test_values_out_of_range(option, value, rule, capsys):
    assert rule in fails(capsys, "train", option, value)


def test_messages_of_the_user_s_mistakes(run_dir, prepared_dir, tmp_path, capsys):
    where = ("--dataset", "generated", "--data-dir", str(prepared_dir))
    (tmp_path / "no.png").write_text("no image")
    assert "exists already" in fails(capsys, "train", *where, *COMMON, "--run-dir", str(run_dir))
    assert "`image` must be an image file" in fails(capsys, "predict", str(run_dir), str(tmp_path / "no.png"))
    assert "`run` must be the directory of a run" in fails(capsys, "eval", str(tmp_path))
    assert "`images` must name a file" in fails(capsys, "predict", str(run_dir))
    assert "`top` be at least 1, got 1 files and 0" in fails(capsys, "predict", str(run_dir), "a.png", "--top", "0")
    message = fails(capsys, "train", *where, *COMMON, "--batch-size", "1000", "--run-dir", str(tmp_path / "run"))
    assert "`batch_size` must be between 1 and the 390 training examples, got 1000" in message


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (OSError(28, "No space left on device", "metrics.jsonl"), 1, "No space left on device: 'metrics.jsonl'"),
        (KeyboardInterrupt(), 130, "Stopped at once; whatever was not saved is lost."),
    ],
)
def test_the_system_s_errors_are_messages(error, status, message, monkeypatch, capsys):
    def load_dataset(*args):
        raise error

    monkeypatch.setattr("cnnjax.data.datasets.load_dataset", load_dataset)
    with pytest.raises(SystemExit) as stopped:
        main(["data", "cifar10"])
    assert stopped.value.code == status
    assert message in capsys.readouterr().err


def test_help_does_not_wait_for_jax():
    code = "import sys, cnnjax.cli.main\ntry: cnnjax.cli.main.main(['train', '--help'])\nfinally: print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert "--optim.learning-rate" in done.stdout


def test_output_that_is_no_terminal_has_no_progress_bar(prepared_dir, tmp_path):
    command = [sys.executable, "-m", "cnnjax", "train", "--dataset", "generated", *COMMON]
    where = ["--data-dir", str(prepared_dir), "--run-dir", str(tmp_path / "run")]
    done = subprocess.run([*command, *where], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[-2].startswith("epoch 1/1  loss ")
    assert re.match(r"Test accuracy \d+\.\d\d% \(loss .*\) on all 170 test images", lines[-1])


def test_a_terminal_shows_a_progress_bar(prepared_dir, tmp_path):
    command = [sys.executable, "-m", "cnnjax", "train", "--dataset", "generated", *COMMON]
    command += ["--data-dir", str(prepared_dir), "--run-dir", str(tmp_path / "run")]
    terminal, other = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    process = subprocess.Popen(command, stdin=other, stdout=other, stderr=other, env=environment)
    os.close(other)
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 1 << 16)
        except OSError:  # The process has ended.
            break
    assert process.wait() == 0
    text = shown.decode()
    assert re.search(r"epoch 1/1.*/25.*loss \d\.\d{3}  accuracy \d+\.\d%.*images/s", text)


def test_the_configuration_is_checked_where_it_is_made():
    with pytest.raises(UserError, match=r"`batch_size` must be at least 1, got -5\."):
        Config(batch_size=-5)
    with pytest.raises(UserError, match=r"`optim.learning_rate` must be above 0 and finite, got 0.0\."):
        OptimConfig(learning_rate=0.0)
    with pytest.raises(UserError, match=r"`optim.schedule` must be a known name, .* Did you mean one_cycle"):
        OptimConfig(schedule="one_cycel")
    with pytest.raises(UserError, match=r"`model.kernel_init` must be a known name, .* Did you mean he_normal"):
        ModelConfig(kernel_init="he_norm")


def test_a_second_start_takes_the_compiled_step_from_the_cache(prepared_dir, tmp_path):
    command = [sys.executable, "-m", "cnnjax", "train", "--dataset", "generated", *COMMON]
    for run in ("first", "second"):
        where = ["--data-dir", str(prepared_dir), "--run-dir", str(tmp_path / run)]
        env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_LOG_COMPILES": "1", "CNNJAX_ONEDNN": "0"}
        done = subprocess.run([*command, *where], capture_output=True, text=True, check=True, env=env)
        hits = re.findall(r"Persistent compilation cache hit for '(\w+)'", done.stderr)
        assert ("jit_train_steps" in hits) == (run == "second"), done.stderr[-2000:]
    metrics = [
        re.sub(r'"(images_per_second|seconds)": [\d.]+', "", (tmp_path / run / "metrics.jsonl").read_text())
        for run in ("first", "second")
    ]
    assert metrics[0] == metrics[1]


def test_the_public_interface_is_what_the_readme_lists():
    import cnnjax

    readme = (Path(__file__).parent.parent / "README.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \|", readme, re.MULTILINE)
    assert sorted(listed) == sorted(cnnjax.__all__)
    assert all(getattr(cnnjax, name).__doc__ for name in listed)
    with pytest.raises(AttributeError, match="module 'cnnjax' has no attribute 'nothing'"):
        cnnjax.nothing  # noqa: B018
