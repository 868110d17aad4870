"""Predictions for files, and scores of labelled folders."""

import csv
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from generated import status
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss

from cnnjax import UserError, load_run
from cnnjax.cli.main import main
from cnnjax.data.datasets import load_dataset
from cnnjax.metrics import Scores
from cnnjax.runs.predictions import check_ensemble, evaluate_ensemble, predict_files


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory, train):
    """Returns the directory of a run with another seed and image size, without test-time augmentation."""
    run_dir = tmp_path_factory.mktemp("other") / "run"
    train(run_dir, "--num-epochs", "1", "--seed", "1", "--image-size", "14")
    return run_dir


@pytest.fixture(scope="module")
def test_images(prepared_dir):
    return load_dataset("generated", prepared_dir).load("test")


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image[..., 0]).save(path)
    return path


def test_a_run_with_scores_of_its_own_needs_its_file_only_to_be_scored(
    run_dir, prepared_dir, test_images, tmp_path, capsys
):
    copy = shutil.copytree(run_dir, tmp_path / "run")
    (copy / "SHA256SUMS").unlink()
    content = json.loads((copy / "config.json").read_text())
    assert "metrics" not in content["config"]  # As in the runs of earlier versions.
    content["config"]["metrics"] = {"function": "top2"}
    (copy / "config.json").write_text(json.dumps(content))
    coat = test_images.label.tolist().index(4)
    image = save(test_images.image[coat], tmp_path / "photos" / "Coat" / "0.png")
    main(["predict", str(copy), str(image)])
    capsys.readouterr()
    experiment = tmp_path / "own.py"
    experiment.write_text(
        "import numpy as np\nfrom cnnjax import Config\n\n\ndef top2(logits, label):\n"
        "    of_label = np.take_along_axis(logits, label[:, None], axis=1)\n"
        '    return {"top2": np.mean((logits > of_label).sum(1) < 2), "nan": np.nan}\n\n\n'
        "CONFIG = Config(metrics=top2)\n"
    )
    for options in ([], ["--ensemble", str(run_dir)], ["--data", str(tmp_path / "photos")]):
        command = ["eval", str(copy), "--data-dir", str(prepared_dir), *options]
        with pytest.raises(SystemExit) as stopped:
            main(command)
        out, err = capsys.readouterr()
        assert stopped.value.code == 2 and "accuracy 100.00%, loss" in out and "top2" not in out
        assert "`metrics` of this run is top2, which is not part of cnnjax, and a run directory imports no" in err
        main([*command, "--experiment", str(experiment)])
        assert ", top2 1.0000, nan nan, on all " in capsys.readouterr().out
        main([*command, "--experiment", str(experiment), "--json"])
        assert json.loads(capsys.readouterr().out)["metrics"] == {"top2": 1.0, "nan": None}


def test_eval_prints_the_score_of_every_image_of_a_split(run_dir, prepared_dir, capsys):
    result = json.loads((run_dir / "result.json").read_text())
    row = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[result["best_epoch"] - 1])
    main(["eval", str(run_dir), "--data-dir", str(prepared_dir)])
    main(["eval", str(run_dir), "--data-dir", str(prepared_dir), "--split", "validation"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * (12 + 12 + 1)  # For each split the classes, the confusion matrix and a sentence.
    for k in (0, 9):
        scores = result["classes"][k]
        percents = (f"{scores[name]:.2%}" for name in ("precision", "recall", "f1"))
        assert lines[1 + k].split() == [str(k), *scores["name"].split(), str(scores["count"]), *percents]
    assert [int(count) for count in lines[14].split()[-10:]] == result["confusion_matrix"][0]
    main(["eval", str(run_dir), "--data-dir", str(prepared_dir), "--json"])
    values = json.loads(capsys.readouterr().out)
    for name in ("accuracy", "balanced_accuracy", "loss"):
        assert values.pop(name) == result[f"test_{name}"]
    for name in ("classes", "confusion_matrix"):
        assert values.pop(name) == result[name]
    low, high = values.pop("accuracy_interval")
    counts = {"num_examples": 170, "num_unreadable": 0, "metrics": {}}
    assert values == {"runs": [str(run_dir)], "unfinished": [], "data": "test", **counts}
    test, validation = lines[24], lines[49]
    assert test == (
        f"test accuracy {result['test_accuracy']:.2%}, loss {result['test_loss']:.4f}, on all 170 images; 95% interval "
        f"of the accuracy 97.79% to 100.00% ({run_dir})"  # Wilson's: 170 / (170 + 1.96²).
    )
    assert f"{low:.2%} to {high:.2%}" in test
    assert validation.startswith(
        f"validation accuracy {row['validation_accuracy']:.2%}, loss {row['validation_loss']:.4f}, on all 40 images"
    )


def test_eval_prints_no_loss_of_minus_zero(run_dir, monkeypatch, capsys):
    scores = Scores(-1e-9, 2, {"accuracy": 1.0}, {(0, 0): 1, (1, 1): 1})
    monkeypatch.setattr("cnnjax.runs.run.evaluate_ours", lambda *arguments, **options: (scores, np.array([0, 1])))
    main(["eval", str(run_dir)])
    assert "loss 0.0000, on all 2 images" in capsys.readouterr().out


def test_predict_prints_the_most_probable_classes_of_each_file(run_dir, prepared_dir, tmp_path, capsys):
    dataset = load_dataset("generated", prepared_dir)
    assert sorted(dataset.class_names) != [*dataset.class_names]
    examples = dataset.load("test")
    paths = [tmp_path / f"{i}.png" for i in range(10)]
    for path, image in zip(paths, examples.image, strict=False):
        Image.fromarray(image[..., 0]).save(path)
    main(["predict", str(run_dir), *map(str, paths), "--top", "2"])
    lines = capsys.readouterr().out.splitlines()
    for line, path, label in zip(lines, paths, examples.label, strict=False):
        found = re.fullmatch(rf"{path}: ([\w/ -]+) (\d+\.\d)%, [\w/ -]+ (\d+\.\d)%", line)
        assert found is not None and found[1] == dataset.class_names[label]
        assert float(found[2]) > 50 > float(found[3])


def test_predict_hints_at_images_of_reversed_brightness(run_dir, prepared_dir, tmp_path, capsys):
    dataset = load_dataset("generated", prepared_dir)
    examples = dataset.load("test")
    Image.fromarray(255 - examples.image[1, ..., 0]).save(tmp_path / "negative.png")
    main(["predict", str(run_dir), *[str(tmp_path / "negative.png")] * 2])
    hint, count = capsys.readouterr().err.splitlines()
    assert hint.endswith("negative.png is much brighter than the training images; try --invert")
    assert count == "2 files are that bright"
    main(["predict", str(run_dir), str(tmp_path / "negative.png"), "--invert"])
    captured = capsys.readouterr()
    assert f"negative.png: {dataset.class_names[examples.label[1]]} " in captured.out
    assert captured.err == ""
    facts = load_run(run_dir).facts
    mean, std = np.mean(facts.mean), np.mean(facts.std)
    Image.new("L", (28, 28), round(mean + 0.9 * std)).save(tmp_path / "bright.png")  # As some training images are.
    Image.new("L", (28, 28), round(min(255, 255 - mean + 0.6 * std))).save(tmp_path / "other.png")
    main(["predict", str(run_dir), *[str(tmp_path / name) for name in ("bright.png", "other.png")]])
    assert capsys.readouterr().err == ""


def test_predict_reads_the_other_files_if_one_is_bad(run_dir, tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["-a.png", "b b.png", "new\nline.png", os.fsdecode(b"\xff.png")]
    for name in names:
        Image.new("L", (28, 28), 60).save(name)
    os.mkfifo("fifo.png")
    Image.new("RGB", (28, 28)).save("bad.tiff")
    content = Path("bad.tiff").read_bytes()
    samples = struct.pack("<HHLH", 277, 3, 1, 3)  # Tag 277: samples per pixel. Pillow logs an error if they are many.
    assert content.count(samples) == 1
    Path("bad.tiff").write_bytes(content.replace(samples, struct.pack("<HHLH", 277, 3, 1, 99)))
    images = [names[1], "no*.gif", "missing\n.png", "fifo.png", "bad.tiff", names[1], *names[2:], "--", names[0]]
    with pytest.raises(SystemExit) as stopped:
        main(["predict", str(run_dir), "--top", "1", *images])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    found = [line.rsplit(": ", 1) for line in captured.out.splitlines()]
    assert [name for name, _ in found] == ["b b.png", "b b.png", "new\\nline.png", "\\udcff.png", "-a.png"]
    assert len({classes for _, classes in found}) == 1
    pattern, missing, fifo, tiff = captured.err.splitlines()
    assert "`images` must match a file, got no*.gif" in pattern
    assert "got missing\\n.png (No such file or directory)" in missing
    assert "got fifo.png (Not a regular file)" in fifo
    assert "got bad.tiff (of an unknown format)" in tiff
    assert not caplog.messages


def test_predict_inverts_colors_and_not_the_alpha_channel(run_dir, tmp_path):
    rng, seen, run = np.random.default_rng(0), [], load_run(run_dir)
    image = rng.integers(0, 256, (28, 28, 4), np.uint8)
    Image.fromarray(image).save(tmp_path / "rgba.png")

    class Alpha:
        run_dir, config = run.run_dir, run.config
        facts = replace(run.facts, image_shape=(28, 28, 4), mean=(99.0,) * 4, std=(1.0,) * 4)

        def predict(self, images, tta):
            seen.append(images[0])
            return np.ones((1, 10), np.float32) / 10

    assert [found.error for found in predict_files([Alpha()], [tmp_path / "rgba.png"], invert=True)] == [None]
    np.testing.assert_array_equal(seen[0], np.dstack([255 - image[..., :3], image[..., 3]]))


def test_json_has_every_file_of_a_folder_in_natural_order_with_the_views_of_the_test_score(
    run_dir, test_images, tmp_path, capsys
):
    names = [f"{k}/img{i}.png" for k in (2, 10) for i in range(160)]  # More than two batches.
    images = np.concatenate([test_images.image, test_images.image])[: len(names)]
    for name, image in zip(names, images, strict=True):
        save(image, tmp_path / name)
    (tmp_path / "2" / "Thumbs.db").touch()
    (tmp_path / "2" / "img5a.png").write_text("no image")
    assert status("predict", run_dir, tmp_path, "--json", "--top", "0") == 2
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (failed,) = (line for line in lines if "error" in line)
    assert failed["file"] == f"{tmp_path}/2/img5a.png" and lines.index(failed) == 6
    assert "(of an unknown format)" in failed["error"] and "classes" not in failed
    lines.remove(failed)
    assert [line["file"] for line in lines] == [f"{tmp_path}/{name}" for name in names]
    run = load_run(run_dir)
    expected, without = run.predict(images, tta="flip"), run.predict(images)
    found = np.array(
        [[dict(zip(*list(line.values())[1:], strict=True))[c] for c in run.facts.class_names] for line in lines]
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.abs(found - without).max() > 0.01
    assert all(line["probabilities"] == sorted(line["probabilities"], reverse=True) for line in lines)


def test_csv_quotes_names_and_keeps_its_columns(run_dir, test_images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = ['a, "b"\n.png', "חתול.png", os.fsdecode(b"\xff.png")]
    for name in names:
        save(test_images.image[0], Path(name))
    assert status("predict", run_dir, names[0], "missing.png", *names[1:], "--csv", "--top", "2", "--tta", "none") == 2
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out, newline="")))
    run = load_run(run_dir)
    probabilities = run.predict(test_images.image[:1])[0]
    best = np.argsort(-probabilities)[:2]
    ranked = [x for k in best for x in (run.facts.class_names[k], str(probabilities[k]))]
    assert rows[0] == ["file", "class_1", "probability_1", "class_2", "probability_2", "error"]
    assert rows[1] == [names[0], *ranked, ""] and rows[3] == [names[1], *ranked, ""]
    assert rows[2][:-1] == ["missing.png", "", "", "", ""] and "No such file" in rows[2][-1]
    assert rows[4] == ["\\udcff.png", *ranked, ""]


def test_names_come_from_standard_input_and_a_closed_pipe_ends_quietly(run_dir, test_images, tmp_path):
    save(test_images.image[0], tmp_path / "two\nlines.png")
    (tmp_path / "names").write_bytes(b"two\nlines.png\0" * 600)  # Several batches: `head` ends before the last one.
    command = f"set -o pipefail; {sys.executable} -m cnnjax predict {run_dir} - --json < names | head -1"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(["bash", "-c", command], check=False, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert json.loads(done.stdout)["file"] == "two\nlines.png"
    assert done.stderr == ""
    assert done.returncode == 128 + 13  # SIGPIPE


def test_standard_input_may_name_no_file(run_dir):
    command = [sys.executable, "-m", "cnnjax", "predict", str(run_dir), "-"]
    done = subprocess.run(command, check=False, input="", capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "Standard input names no file.\n")


def test_an_ensemble_is_the_mean_of_runs_that_prepare_images_in_their_own_way(
    run_dir, other_dir, test_images, prepared_dir, tmp_path, capsys
):
    paths = [save(image, tmp_path / f"{i}.png") for i, image in enumerate(test_images.image[:9])]
    ensemble = ["--ensemble", other_dir]
    assert status("predict", run_dir, *paths, "--json", "--top", "0", *ensemble) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    run, other = load_run(run_dir), load_run(other_dir)
    small = np.stack([np.asarray(Image.open(path).resize((14, 14), Image.Resampling.LANCZOS)) for path in paths])
    expected = (run.predict(test_images.image[:9], tta="flip") + other.predict(small)) / 2
    for line, row in zip(lines, expected, strict=True):
        np.testing.assert_allclose(line["probabilities"], sorted(row.tolist(), reverse=True), rtol=1e-5)
        assert line["classes"][0] == run.facts.class_names[row.argmax()]

    assert status("eval", run_dir, *ensemble, "--data-dir", prepared_dir) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    mean = run.predict(test_images.image, tta="flip") + other.predict(other.load_data(data_dir=prepared_dir).image)
    accuracy, loss = accuracy_score(test_images.label, mean.argmax(1)), log_loss(test_images.label, mean / 2)
    start = f"test accuracy {accuracy:.2%}, loss {loss:.4f}, on all 170 images; 95% interval of the accuracy "
    assert line.startswith(start) and line.endswith(f" ({run_dir}, {other_dir})")

    arrays = load_dataset("generated", prepared_dir)
    (x, y), (x_test, y_test) = arrays.load("train"), arrays.load("test")
    for images, same in ((x_test, True), (x_test[:, ::-1], False)):  # With the same labels.
        config = replace(run.config, dataset=(x, y, images, y_test))
        facts = replace(run.facts, sha256=load_dataset(config.dataset).sha256)
        arrays = replace(run, config=config, facts=facts)
        for first in (run, other):
            if same:
                evaluate_ensemble([first, arrays], data_dir=prepared_dir)
                continue
            with pytest.raises(UserError, match=r"`ensemble` must be runs with the test examples of .*, got .* with o"):
                evaluate_ensemble([first, arrays], data_dir=prepared_dir)

    assert status("eval", run_dir, *ensemble, "--split", "validation") == 2
    assert "`split` must be test for an ensemble" in capsys.readouterr().err
    assert status("eval", run_dir, "--data", "photos", "--split", "validation") == 2
    assert "`split` must be left out with `data`, got validation" in capsys.readouterr().err
    names = ("cat", *run.facts.class_names[1:])
    for arguments, message in {
        (run_dir, "--ensemble", other_dir, paths[0]): "--ensemble takes all names after it",
        (run_dir, paths[0], "--ensemble", "nowhere"): "`ensemble` must be the directory of a run",
        (run_dir, paths[0], "--ensemble", run_dir): "`ensemble` must be different runs",
        (run_dir, ""): "`images` must be names of files, got an empty one",
    }.items():
        assert status("predict", *arguments) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match=r"`ensemble` must be runs .* with class 0 'cat' instead of 'T-shirt/top'\."):
        check_ensemble([run, replace(run, facts=replace(run.facts, class_names=names))])


def test_eval_scores_a_labelled_list_by_the_names_of_its_classes(run_dir, test_images, tmp_path, capsys):
    run = load_run(run_dir)
    names, used = run.facts.class_names, test_images.label[:40] < 6
    images, labels = test_images.image[:40][used], test_images.label[:40][used]
    labels = np.where(np.arange(len(labels)) % 5 == 0, (labels + 1) % 6, labels)  # Wrong ones.
    rows = [["path", "label", "split"], ["bad.png", names[0], "test"], ["other.png", names[0], "train"]]
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        save(image, tmp_path / f"{i}.png")
        rows.append([f"{i}.png", names[label], "test"])
    with open(tmp_path / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    assert status("eval", run_dir, "--data", tmp_path / "list.csv") == 2
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == f"Scoring the test split of {tmp_path / 'list.csv'}."
    assert status("eval", run_dir, "--data", tmp_path / "list.csv", "--json") == 2
    found, errors = capsys.readouterr()
    values = json.loads(found)  # Nothing else is printed there.
    assert lines[0] in errors and values["data"] == str(tmp_path / "list.csv")
    assert (values["num_examples"], values["num_unreadable"]) == (len(labels), 1)
    probabilities = run.predict(images, tta="flip")
    counts = confusion_matrix(labels, probabilities.argmax(1), labels=range(10))
    matrix = [[int(count) for count in line.split()[-10:]] for line in lines[15:25]]
    np.testing.assert_array_equal(matrix, counts)
    accuracy, loss = accuracy_score(labels, probabilities.argmax(1)), log_loss(labels, probabilities, labels=range(10))
    n = len(labels)
    line = lines[-1].replace(f", balanced accuracy {np.mean(np.diag(counts)[:6] / counts.sum(1)[:6]):.2%}", "")
    assert f" accuracy {accuracy:.2%}, loss {loss:.4f}, on {n} of {n + 1} images (1 cannot be read); 95%" in line
    missing, unreadable = captured.err.splitlines()
    assert missing == f"{tmp_path / 'list.csv'} has no image of {', '.join(names[6:])}."
    assert f"got {tmp_path / 'bad.png'} (No such file or directory)" in unreadable
