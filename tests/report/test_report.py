"""The report as a file: what it contains, what it says if something is missing, and its figures."""

import base64
import fcntl
import io
import json
import os
import re
import shlex
import shutil
import signal
from dataclasses import replace
from xml.etree import ElementTree

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cnnjax import UserError, load_run
from cnnjax.cli.lr_find import LrFind
from cnnjax.cli.main import main
from cnnjax.cli.report import report_on_run, report_on_seeds
from cnnjax.cli.train_command import Train
from cnnjax.data.stored import Examples
from cnnjax.process.signals import stop_signals
from cnnjax.report import single
from cnnjax.report.activations import FeatureMap, _reduce
from cnnjax.report.commands import command_for, resume_command
from cnnjax.report.images import filter_pictures, maps_picture
from cnnjax.report.several import group_runs
from cnnjax.report.write import write_report
from cnnjax.runs.directory import LOCK
from cnnjax.runs.statistics import describe, verdicts


@pytest.fixture
def copy(trained, tmp_path):
    """Returns a function that copies a run, and changes JSON files of the copy."""

    def make(seed=0, name="run", **changes):
        folder = shutil.copytree(trained.runs[seed].run_dir, tmp_path / name)
        for file, change in changes.items():
            (folder / "SHA256SUMS").unlink(missing_ok=True)
            path = folder / f"{file}.json"
            content = json.loads(path.read_text())
            change(content)
            path.write_text(json.dumps(content))
        return load_run(folder, trained.run.config)

    return make


def test_the_same_run_gives_the_same_bytes(trained, tmp_path):
    first, second = (
        write_report(trained.run, tmp_path / name, data_dir=trained.data_dir).read_bytes()
        for name in ("a.html", "b.html")
    )
    assert first == second
    later = write_report(trained.runs[0], tmp_path / "c.html", data_dir=trained.data_dir).read_bytes()
    assert first == later  # Whose probabilities are computed again, see `score`.
    assert len(first) < 1.5e6
    assert b"<script>alert" not in first


def test_figures_are_svg_files_without_variables(trained, tmp_path):
    write_report(trained.run, tmp_path / "a.html", data_dir=trained.data_dir, figures=tmp_path / "one")
    write_report(trained.runs, tmp_path / "b.html", figures=tmp_path / "three")
    names = {"learning_curves", "confusion", "calibration", "certain", "filters", "feature_maps"}
    assert names <= {path.stem for path in tmp_path.glob("one/*")} <= names | {"mistakes"}
    assert {path.stem for path in tmp_path.glob("three/*")} == {"learning_curves", "scores"}
    panels = (tmp_path / "three/learning_curves.svg").read_text()
    assert all(f"{part} {metric}" in panels for part in ("Training", "Validation") for metric in ("loss", "accuracy"))
    assert "Validation top2" in panels and "Training top2" not in panels  # A score of the user.
    page = (tmp_path / "a.html").read_text()
    assert re.search(rf"<dt>Test top2</dt><dd>[^/]*{trained.run.result['test_metrics']['top2']:.4f}<", page)
    assert 'id="metric-top2"' in page and 'id="metric-result"' in page
    for path in tmp_path.glob("*/*.svg"):
        content = path.read_text()
        assert ElementTree.fromstring(content).tag.endswith("svg")
        assert "var(--" not in content
    matrix = trained.run.result["confusion_matrix"]
    texts = ElementTree.parse(tmp_path / "one/confusion.svg").iter("{http://www.w3.org/2000/svg}text")
    counts = sorted(int(x.text) for x in texts if x.text and x.text.isdecimal())
    assert counts == sorted(count for row in matrix for count in row if count)


def test_the_probabilities_of_the_test_score_are_those_of_predict(trained):
    scored = single.score(trained.run, trained.data_dir)
    again = single.score(trained.runs[0], trained.data_dir)
    np.testing.assert_allclose(scored.probabilities, again.probabilities, atol=1e-6)
    accuracy = (scored.probabilities.argmax(axis=1) == scored.examples.label).mean()
    assert accuracy == trained.run.test_accuracy


def test_a_report_without_the_test_images_says_so(trained, tmp_path, capsys, monkeypatch):
    run_dir = shutil.copytree(trained.runs[1].run_dir, tmp_path / "run")
    monkeypatch.setattr("cnnjax.cli.inspection.config_of", lambda run, experiment: trained.run.config)
    main(["report", str(run_dir), "--data-dir", str(tmp_path / "nothing")])
    captured = capsys.readouterr()
    assert captured.out == f"Report: {run_dir}/report.html\n"
    assert captured.err.startswith("The report lacks calibration and example images: `dataset` must be a known name")
    assert captured.err.count("\n") == 1
    page = (run_dir / "report.html").read_text()
    assert "The report lacks calibration and example images" in page
    assert "Confusion matrix" in page and 'id="h-calibration"' not in page and "First filters" in page


def test_an_unfinished_run_has_a_report_without_scores(trained, copy):
    def interrupt(manifest):
        command = ["python", "bin/cnnjax", "train", "tiny", "--name", "a b"]
        manifest["sessions"][-1].update(state="interrupted", command=command)

    run = copy(manifest=interrupt)
    (run.run_dir / "result.json").unlink()
    path = write_report(load_run(run.run_dir, trained.run.config), data_dir=trained.data_dir)
    assert path == run.run_dir / "report.html"
    page = path.read_text()
    assert "This run is not finished (interrupted, 3 of 3 epochs), so it has no test score yet." in page
    assert "Learning curves" in page and "Confusion matrix" not in page
    resume = f"bin/cnnjax train tiny --name &#39;a b&#39; --run-dir {run.run_dir} --resume"
    assert f'<code id="resume">{resume}</code>' in page and "trains it again" not in page
    manifest = run.run_dir / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"interrupted"', '"running"'))
    with open(run.run_dir / LOCK, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # As in a process that trains.
        page = write_report(load_run(run.run_dir, trained.run.config), data_dir=trained.data_dir).read_text()
    assert "not finished (running" in page and 'id="resume"' not in page


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["python", "train.py"], None),
        (["python", "-m", "pytest", "test.py"], None),
        (["python", "-u", "mine.py", "--seed", "1"], "python -u mine.py --seed 1 --run-dir {} --resume"),
        (["python", "elsewhere.py"], "python elsewhere.py --run-dir {} --resume"),
        (["python", "-X", "dev", "mine.py"], "python -X dev mine.py --run-dir {} --resume"),
        (["python", "-m", "cnnjax", "train", "--seeds", "0:3"], "python -m cnnjax train --seeds 0:3 --resume"),
        (["python", "-u", "-m", "cnnjax", "train"], "python -u -m cnnjax train --run-dir {} --resume"),
        (["python", "bin/cnnjax", "train", "--run-dir", "a", "b"], "bin/cnnjax train b --run-dir {} --resume"),
        (
            ["bin/cnnjax", "reproduce", "a", "--run-dir=b", "--resume"],
            "bin/cnnjax reproduce a --resume --run-dir {}",
        ),
    ],
)
def test_a_command_resumes_a_run_of_the_command_line(copy, tmp_path, monkeypatch, command, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("CONFIG = 1")
    (tmp_path / "train.py").write_text("train()")
    run = copy(manifest=lambda manifest: manifest["sessions"][-1].update(command=command))
    run = load_run(run.run_dir.relative_to(tmp_path), run.config)
    assert resume_command(run) == (expected and expected.format(tmp_path / run.run_dir))


def test_a_page_of_1000_classes_stays_below_5_mb(trained, copy, monkeypatch):
    rng, names = np.random.default_rng(0), [f"class {k}" for k in range(1000)]

    def widen(result):
        row = {"count": 3, "precision": 0.5, "recall": 0.5, "f1": 0.5}
        result.update(classes=[{"name": name, **row} for name in names], confusion_matrix=None)

    run = copy(config=lambda content: content["data"].update(class_names=names), result=widen)
    images = rng.integers(0, 256, (3000, 96, 96, 3), np.uint8)  # PNG cannot compress noise.
    scored = single.Scored(Examples(images, np.arange(3000) % 1000), rng.dirichlet(np.ones(1000), 3000))
    monkeypatch.setattr(single, "score", lambda *arguments: scored)
    lines = []
    path = write_report(run, warn=lines.append)
    assert path.stat().st_size < 5e6
    page = path.read_text()
    assert "980 classes are left out" in page and "These are the 300 of" in page
    assert "no confusion matrix of more than 300 classes" in page
    assert len(lines) == 1 and lines[0].startswith("The report lacks the layers of the network: ")


def test_runs_that_differ_in_their_seed_are_one_group(trained, copy, tmp_path):
    def slower(content):
        content["config"]["optim"]["learning_rate"] = 0.5

    others = [copy(seed, f"other{seed}", config=slower) for seed in (0, 1)]
    groups = group_runs([*trained.runs, *others])
    assert [(group.label, len(group.runs)) for group in groups] == [("tiny (1)", 3), ("tiny (2)", 2)]
    page = write_report([*trained.runs, *others], tmp_path / "several.html").read_text()
    lines = verdicts({group.label: group.scores for group in groups})["tiny (1)", "tiny (2)"]
    assert re.sub("&#39;", "'", re.findall(r'class="verdict"><b>.*?</b> (.*?)</p>', page)[0]) == " ".join(lines)
    rows = re.findall(r'<th scope="row">([\w.]+)</th><td>(.*?)</td><td>(.*?)</td></tr>', page)
    assert rows == [("optim.learning_rate", "0.003", "0.5")]
    own = page.partition("<h3>top2, by which checkpoints are selected</h3>")[2]  # The score that selects them.
    scores = {run.config.seed: run.result["test_metrics"]["top2"] for run in trained.runs}
    assert f"<b>tiny (1):</b> {describe([*scores.values()], 'test_top2')}" in own
    lines = verdicts({"tiny (1)": scores, "tiny (2)": {k: scores[k] for k in (0, 1)}}, "test_top2")
    assert " ".join(lines["tiny (1)", "tiny (2)"]).replace("'", "&#39;") in own
    alone = write_report([trained.runs[0], others[0]], tmp_path / "alone.html").read_text()
    assert alone.count("Train at least two seeds of each group to compare them: --seeds.") == 2
    assert len(re.findall(r"<p><b>tiny \([12]\):</b> No run clearly over-fits\.", page)) == 2


def test_seeds_with_the_same_score_have_no_interval(trained, copy, tmp_path):
    runs = [copy(seed, f"same{seed}", result=lambda result: result.update(test_accuracy=0.5)) for seed in (0, 1)]
    page = write_report(runs, tmp_path / "same.html").read_text()
    assert "unknown<small>all seeds have the same score</small>" in page and "nan%" not in page
    for run in runs:
        config = run.run_dir / "config.json"
        config.write_text(config.read_text().replace('"batch_size": 20', '"batch_size": 21'))
    page = write_report([*trained.runs, *runs], tmp_path / "two.html").read_text()
    assert "<small>the same for all 2 seeds</small>" in page and "nan%" not in page


def test_two_runs_of_one_seed_are_two_groups(trained):
    assert len(group_runs([trained.runs[0], trained.runs[0]])) == 2


def test_wrong_arguments_fail_before_anything_is_computed(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(single, "run_content", None)
    with pytest.raises(UserError, match="`runs` must be at least one run, got none"):
        write_report([])
    run = trained.runs[0]
    again = replace(run, run_dir=run.run_dir / ".." / run.run_dir.name)
    with pytest.raises(UserError, match="`runs` must be different runs, got "):
        write_report([run, again])
    with pytest.raises(UserError, match=f"`path` must be a file, got the folder {tmp_path}"):
        write_report(run, tmp_path)
    with pytest.raises(UserError, match=r"`path` must be an \.html file, got .*config\.json"):
        write_report(run, run.run_dir / "config.json")
    (tmp_path / "file").touch()
    for options in ({"path": tmp_path / "file/a.html"}, {"path": tmp_path / "a.html", "figures": tmp_path / "file"}):
        name = [*options][-1]
        with pytest.raises(UserError, match=rf"`{name}` must be a .*folder that can be written, got {tmp_path}/file"):
            write_report(run, **options)
    if os.getuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(UserError, match=r"`path` must be a file in a folder that can be written, got .*closed/a"):
            write_report(run, tmp_path / "closed/a.html")


def test_the_plot_of_a_range_test_is_no_folder(tmp_path):
    (tmp_path / "a.svg").mkdir()
    with pytest.raises(UserError, match=r"`plot` must be a file .svg or .html, got .*a.svg"):
        LrFind(plot=tmp_path / "a.svg")


def test_a_page_of_large_images_and_many_layers_stays_below_5_mb(trained, monkeypatch, tmp_path):
    rng = np.random.default_rng(0)

    def program(x):
        return [_reduce(jnp.tile(x, (1, 1, 16))[:: 2**i, :: 2**i]) for i in range(4)]

    large = rng.normal(size=(500, 500, 1)).astype(np.float32)  # PNG cannot compress noise.
    maps = [
        FeatureMap(f"layer {i}.{k}", "convolution", (500 >> k, 500 >> k, 64), np.asarray(x), tuple(range(16)))
        for i in range(50)
        for k, x in enumerate(program(large))
    ]
    monkeypatch.setattr(single, "feature_maps", lambda run, image: maps)
    images = rng.integers(0, 256, (120, 500, 500, 3), np.uint8)
    scored = single.score(trained.runs[0], trained.data_dir)
    monkeypatch.setattr(single, "score", lambda *_: scored._replace(examples=Examples(images, scored.examples.label)))
    page = write_report(trained.runs[0], tmp_path / "new/folder/a.html").read_text()
    assert len(page) < 5e6
    assert "60 of 200 operations are shown" in page and page.count("<b>layer ") == 60
    assert "<b>layer 0.0</b>" in page and "<b>layer 49.3</b>" in page


def test_pictures_show_every_filter_and_map():
    def pixels(uri):
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))))

    kernel = np.zeros((2, 2, 3, 2), np.float32)
    kernel[0, 1, 2, 0], kernel[1, 0, 0, 1] = 2.0, -2.0
    first, second = map(pixels, filter_pictures(kernel))
    np.testing.assert_array_equal(first[0, 1], [128, 128, 255])
    np.testing.assert_array_equal(second[1, 0], [0, 128, 128])
    maps = np.zeros((48, 48, 9), np.float32)
    maps[:, :, 8] = 1.0
    sheet = pixels(maps_picture(maps))
    assert sheet.shape == (48 * 2 + 2, 48 * 8 + 2 * 7)
    assert (sheet[:48, :48] == 0).all() and (sheet[50:, :48] == 254).all() and (sheet[:, 48:50] == 255).all()


def test_training_writes_a_report_and_an_error_does_not_fail_it(trained, monkeypatch, tmp_path, capsys):
    run, lines = trained.run, []
    report_on_run(run, trained.data_dir, lines.append)
    assert lines == [f"Report: {run.run_dir}/report.html"]
    assert (run.run_dir / "report.html").exists()

    def fail(*arguments, **options):
        raise ValueError("no\nluck")

    monkeypatch.setattr("cnnjax.report.write.write_report", fail)
    report_on_run(run, trained.data_dir, lines.append)
    assert lines[1:] == []
    assert capsys.readouterr().err == "The report cannot be written: ValueError: no luck\n"
    finished_before = trained.runs[0]
    report_on_run(finished_before, trained.data_dir, lines.append)
    assert lines[1:] == [f"Report: {run.run_dir}/report.html"]
    os.utime(run.run_dir / "report.html", ns=(0, (run.run_dir / "result.json").stat().st_mtime_ns - 1))
    report_on_run(finished_before, tmp_path / "a b", lines.append)
    command = f"cnnjax report {run.run_dir} --experiment EXPERIMENT.py --data-dir '{tmp_path}/a b'"
    assert lines[2:] == [f"Report: run {command}"]


@pytest.mark.parametrize(
    ("command", "program", "options"),
    [
        (
            ["python", "bin/cnnjax", "train", "my net", "--data_dir", "d"],
            "bin/cnnjax",
            ["--experiment", "my net", "--data-dir", "d"],
        ),
        (
            ["python", "-m", "cnnjax", "train", "a/b.py", "--data-dir=d/e"],
            "python -m cnnjax",
            ["--experiment", "a/b.py", "--data-dir", "d/e"],
        ),
        (["python", "mine.py", "--optim.learning-rate", "1"], "cnnjax", ["--experiment", "mine.py"]),
        (["python", "bin/cnnjax", "reproduce", "run", "--experiment", "x"], "bin/cnnjax", ["--experiment", "x"]),
        (["python", "-m", "pytest", "test.py"], "cnnjax", ["--experiment", "EXPERIMENT.py"]),
    ],
)
def test_a_command_names_the_experiment_and_the_data(copy, tmp_path, monkeypatch, command, program, options):
    monkeypatch.chdir(tmp_path)
    for name, text in (("mine.py", "from base import Net\nCONFIG = 1"), ("base.py", "class Net:\n"), ("test.py", "")):
        (tmp_path / name).write_text(text)
    run = copy(
        manifest=lambda manifest: manifest["sessions"][-1].update(command=command),
        config=lambda content: content.update(files={"base.py": "0" * 64}),
    )
    start = [*program.split(), "reproduce", str(run.run_dir)]
    assert shlex.split(command_for(run, "reproduce")) == [*start, *options]
    given = shlex.split(command_for(run, "reproduce", experiment="given.py"))
    assert given == [*start, "--experiment", "given.py", *options[2:]]


def test_seeds_have_one_report_next_to_their_folders(trained):
    lines, folder = [], trained.run.run_dir.parent
    report_on_seeds(trained.run.config, (0, 1, 2), folder, trained.data_dir, lines.append)
    assert lines == [f"Report: {folder}/tiny.html"]
    assert "the mean of 3 seeds" in (folder / "tiny.html").read_text()


def test_ctrl_c_during_the_report_leaves_a_finished_run(trained, tmp_path, monkeypatch, capsys):
    score = single.score

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return score(*arguments)

    monkeypatch.setattr(single, "score", interrupted)
    monkeypatch.setattr("cnnjax.cli.report.report_on_run", report_on_run)  # See `no_reports`.
    train = Train(replace(trained.run.config, seed=7), run_dir=tmp_path / "run", data_dir=trained.data_dir)
    with stop_signals():  # As in `main`.
        train()
    assert capsys.readouterr().out.splitlines()[-1] == f"Report: {tmp_path}/run/report.html"
    assert load_run(tmp_path / "run", train.config).result is not None
    replace(train, resume=True, report=False)()
    assert "Report" not in capsys.readouterr().out
