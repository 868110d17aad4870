"""The path of a new user: a folder of photos, a trained network, predictions, scores, and the same bits again."""

import json

import numpy as np
import pytest
from PIL import Image

from cnnjax.cli.main import main

COLORS = {"blue sky": (60, 120, 220), "grass": (40, 160, 50), "красный": (210, 40, 40)}


def photo(color, seed):
    """Returns a photo of noise around a color, wide or tall."""
    rng = np.random.default_rng(seed)
    size = (rng.integers(40, 60), rng.integers(60, 90))
    pixels = np.clip(rng.normal(color, 40, (*(size if seed % 2 else size[::-1]), 3)), 0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for k, (name, color) in enumerate(COLORS.items()):
        (tmp_path / "my photos" / name).mkdir(parents=True)
        for i in range(20 if k else 8):  # Uneven.
            photo(color, 100 * k + i).save(tmp_path / "my photos" / name / f"IMG {i}.jpg", quality=95)
    (tmp_path / "my photos" / "grass" / "Thumbs.db").write_bytes(b"no image")
    photo(COLORS["красный"], 1001).save(tmp_path / "new.webp")
    return tmp_path


def run(capsys, *arguments):
    """Returns the lines of a command that succeeds."""
    try:
        main(list(arguments))
    except SystemExit as stopped:
        assert not stopped.code, capsys.readouterr()
    return capsys.readouterr().out.splitlines()


def test_from_a_folder_of_photos_to_predictions_and_scores(photos, capsys):
    report = run(capsys, "data", "my photos", "--data-dir", "tfds")
    assert "48 images of 3 classes" in report[1]
    assert any(line.split() == ["grass", "20"] for line in report)

    train = ("train", "--dataset", "my photos", "--data-dir", "tfds", "--model", "mlp", "--num-epochs", "6")
    train = (*train, "--class-weights", "balanced", "--best-by", "balanced_accuracy", "--optim.learning-rate", "1e-4")
    lines = run(capsys, *train)
    assert any(line.startswith("my photos has no test split: 20% of each class") for line in lines)
    run_dir = photos / "runs" / "my-photos_mlp-seed0"
    result = json.loads((run_dir / "result.json").read_text())
    assert [(c["name"], c["count"]) for c in result["classes"]] == [("blue sky", 2), ("grass", 4), ("красный", 4)]
    assert lines[-1].startswith(f"Test accuracy {result['test_accuracy']:.2%}, balanced accuracy ")
    assert result["test_balanced_accuracy"] == 1.0

    (line,) = run(capsys, "predict", str(run_dir), "new.webp", "--top", "1")
    assert line.startswith("new.webp: красный ")
    table = run(capsys, "eval", str(run_dir), "--data-dir", "tfds")
    assert any(line.split()[:3] == ["2", "красный", "4"] for line in table)
    assert table[-1].startswith("test accuracy 100.00%")

    again = run(capsys, "reproduce", str(run_dir), "--data-dir", "tfds")
    assert any("are the same, bit for bit" in line for line in again)
    (photos / "my photos" / "grass" / "IMG 3.jpg").unlink()
    again = run(capsys, "eval", str(run_dir), "--data-dir", "tfds")  # The run goes on with the images that it had.
    assert again[-1] == table[-1]
