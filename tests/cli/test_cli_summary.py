"""The command `cnnjax summary`."""

import pytest

from cnnjax.cli.main import main


def printed(capsys, *arguments):
    main(["summary", *map(str, arguments)])
    return capsys.readouterr().out.splitlines()


def test_the_table_of_a_run_and_of_an_experiment(run_dir, prepared_dir, capsys):
    """MLP on images of 28×28: 784·512 + 512, 512·512 + 512, and 512·10 + 10 parameters."""
    lines = printed(capsys, run_dir)
    rows = [line.split() for line in lines]
    assert rows[0] == ["layer", "kind", "output", "parameters", "FLOPs"]
    assert rows[1:3] == [["image", "28×28×1"], ["Dense_0", "Dense", "512", "401,920", "802,816"]]
    assert rows[-2] == ["total", "669,706", "1,337,344"]
    options = ["mnist_mlp", "--dataset", "generated", "--data-dir", prepared_dir]
    assert printed(capsys, *options, "--name", "a")[: len(lines)] == lines
    details = printed(capsys, *options, "--details")
    assert details[: len(lines)] == lines and "Total Parameters: 669,706" in "".join(details)
    assert printed(capsys, "tests/programs/plain_network.py", *options[1:], "--model.width", "7")[3].split() == [
        "head",
        "parameters",
        "70",
        "0",
    ]


def test_errors_of_the_summary(run_dir, prepared_dir, capsys):
    options = ["--dataset", "generated", "--data-dir", str(prepared_dir), "--details"]
    for arguments, message in (
        (["tests/programs/plain_network.py", *options], "`details` must be left out for a network that is not a Linen"),
        (["cifar10_fats"], "`EXPERIMENT` must be a known name, got 'cifar10_fats'. Did you mean cifar10_fast"),
        ([str(run_dir.parent)], "config.json"),
        ([f"{run_dir}s"], f"`run` must be the directory of a run, with a config.json, got {run_dir}s. Did you"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["summary", *arguments])
        assert message in capsys.readouterr().err
