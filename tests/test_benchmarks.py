"""The benchmarks: their harness, their programs at a small size, and the variants of the ladder."""

import importlib
import os
import re
import subprocess
import sys
import threading
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest

from cnnjax import program as programs
from cnnjax.cli.experiment import load_experiment
from cnnjax.data.batches import Pixels, pixel_statistics
from cnnjax.data.order import epoch_plan
from cnnjax.layers import conv, norm, ops
from cnnjax.models import speednet
from cnnjax.onednn.library import processor_flags
from cnnjax.optim import transforms
from cnnjax.state import abstract_state

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
HERE = EXPERIMENTS / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Imports a file of the benchmarks as their programs do."""
    monkeypatch.syspath_prepend(str(HERE))
    return importlib.import_module


def run(*arguments, into):
    """Runs a benchmark at a small size; returns the rows of each part's tables, without heads."""
    command = [sys.executable, str(HERE / arguments[0]), "--small", "--into", str(into), *arguments[1:]]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    texts = {path.stem: re.sub(r"(?m)^.*\n\| --- .*\n", "", path.read_text()) for path in into.glob("*.md")}
    return {part: [row.split(" | ") for row in text.splitlines() if row[:2] == "| "] for part, text in texts.items()}


@pytest.mark.parametrize(
    ("script", "prefix", "count"),
    [("cpu", "", 7), ("gpu", "gpu ", 11), ("runs", "", 3), ("images", "images ", 3), ("streaming", "streaming ", 1)],
)
def test_every_part_of_a_benchmark_has_a_place_in_the_report(load, script, prefix, count):
    harness, parts = load("harness"), load(script).PARTS
    assert len(parts) == count
    report = harness.REPORT.read_text()
    for part in parts:
        text = harness.replaced(report, prefix + part, "Measured today.\n")
        assert f"<!-- {prefix}{part} -->\nMeasured today.\n<!-- end of {prefix}{part} -->\n" in text
        assert text.count("<!--") == report.count("<!--")
    with pytest.raises(SystemExit, match="must contain <!-- other --> and <!-- end of other --> exactly once, got 0"):
        harness.replaced(report, "other", "")


def test_contenders_take_turns_and_the_first_turn_warms_up(load):
    harness, calls = load("harness"), []
    work = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    assert harness.take_turns(work, turns=2) == {"a": [3, 5], "b": [4, 6]}
    assert calls == ["a", "b"] * 3
    assert harness.spread([3, 5, 1000]) == "5 (3 to 1,000)"
    assert harness.ratio([2, 30, 4], [1, 10, 4]) == 2  # Of the ratios 2, 3 and 1; the ratio of the medians is 1.
    assert (
        harness.table(["name", "s"], [["a", 3], ["failed"]]) == "| name | s |\n| --- | --- |\n| a | 3 |\n| failed |  |"
    )


def test_a_process_answers_until_it_ends_or_its_time_is_over(load, capsys):
    harness = load("harness")
    command = (sys.executable, str(HERE / "harness.py"))
    with harness.worker(*command, JAX_PLATFORMS="cpu", CNNJAX_ONEDNN="0") as ask:
        found = ask("environment", "-")
        assert f"; Python {sys.version.split()[0]}, jax {jax.__version__}, " in found
        assert "; jax on cpu, kernels of XLA (" in found
        assert ask("unknown", until=time.monotonic() + 60) is None
        with pytest.raises(SystemExit, match="ended without an answer"):
            ask("environment", "-")
    with harness.worker(*command) as ask:
        assert ask("environment", "-", until=time.monotonic()) is None


def test_a_contender_that_cannot_run_is_left_out_with_the_reason(load, monkeypatch, capsys):
    cpu = load("cpu")
    monkeypatch.setattr(cpu, "PEERS", Path(sys.executable))  # An environment without Keras, and one that crashes.
    assert cpu.images_per_second(["Keras 3 float32"], (4,), Namespace(small=True, turns=1)) == {}
    assert "Keras 3 float32 is left out: ModuleNotFoundError: No module named 'keras'\n" in capsys.readouterr().err
    monkeypatch.setattr(cpu, "RUNNER", "-c")
    assert cpu.images_per_second(["Keras 3 float32"], (4,), Namespace(small=True, turns=1)) == {}
    assert "Keras 3 float32 is left out: its process ended\n" in capsys.readouterr().err


def test_results_of_airbench_are_read_from_the_last_columns_of_its_table(load):
    result = load("peers").airbench_result
    assert result("|     3  |    eval   |     0.9710  |   0.9321  |       0.9405  |        2.5873  |") == (
        0.9405,
        2.5873,
    )
    for line in (
        "|  run   |   epoch   |  train_acc  |  val_acc  |  tta_val_acc  |  time_seconds  |\n",
        "|     3  |        7  |     0.9710  |   0.9321  |               |                |\n",
        "Mean: 0.9401    Std: 0.0014\n",
    ):
        assert result(line) is None


SCRIPT = """
import sys
with open(sys.argv[0]) as f:
    assert "def main" in f.read()

def main(run):
    open(f"begun-{run}", "w").close()
    print("|", run, "|", "7", "|", "", "|")
    print("|", run, "|", 0.9 + run / 100, "|", 2.5 + run, "|")

if __name__ == "__main__":
    for run in range(4):
        main(run)
"""


def test_a_script_of_airbench_trains_once_per_question(load, tmp_path):
    (script := tmp_path / "script.py").write_text(SCRIPT)
    with load("harness").worker(sys.executable, str(HERE / "peers.py"), str(script), str(tmp_path)) as ask:
        assert 0 < ask("warm_up") < 60
        assert ask("train_seed", 0) == {"accuracy": 0.91, "seconds": [3.5]}
        assert ask("train_seed", 1) == {"accuracy": 0.92, "seconds": [4.5]}
        assert {path.name for path in tmp_path.glob("begun-*")} == {"begun-0", "begun-1", "begun-2"}


def test_timed_calls_take_turns_by_part_and_row_and_end_in_time(load):
    device, log, running = load("device").Device(time.monotonic() + 60), [], []
    first = threading.Event()

    def call(name):
        first.wait()
        assert not running
        running.append(name)
        time.sleep(0.01)  # Time for others to begin.
        log.append(running.pop())
        return name

    def job(part, row, count):
        calls = [lambda i=i: call((part, row, i)) for i in range(count)]
        return [*device.calls(lambda i: (part, i, row), calls)]

    with ThreadPoolExecutor(4) as threads:
        early = threads.submit(job, 9, 0, 2)  # Has the device before the others are ready.
        while not device._taken:
            time.sleep(0.01)
        jobs = [threads.submit(job, *arguments) for arguments in ((1, 1, 2), (1, 0, 2), (0, 0, 1))]
        while len(device._ranks) < 4:
            time.sleep(0.01)
        first.set()
        assert early.result() == [(9, 0, 0), (9, 0, 1)]
        assert [len(job.result()) for job in jobs] == [2, 2, 1]
    assert log == [(9, 0, 0), (0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 0, 1), (1, 1, 1), (9, 0, 1)]
    failed = device.calls(lambda i: (0, i, 0), [lambda: 1, lambda: None, lambda: 3])
    assert [*failed] == [1]
    late = load("device").Device(time.monotonic())
    assert [*late.calls(lambda i: (0, i, 0), [lambda: 1])] == []


def test_the_layers_are_measured(tmp_path):
    rows = run("cpu.py", "layers", into=tmp_path)["layers"]
    assert [row[0] for row in rows[:2]] == ["| 3 → 32 at 32×32", "| 32 → 32 at 32×32"]
    assert len(rows) == 9
    assert all(float(row[1].split()[0].replace(",", "")) >= 0 for row in rows)


@pytest.mark.slow
def test_the_benchmarks_of_a_cpu_produce_their_tables(tmp_path):
    tables = run("cpu.py", "step", "speednet", "residual", "sizes", "accuracy", into=tmp_path)
    has_bfloat16 = "avx512_bf16" in processor_flags().split()
    for part, name in (("step", "| cnnjax float32"), ("speednet", "| cnnjax bfloat16, Muon"))[: 1 + has_bfloat16]:
        assert [row[0] for row in tables[part]].count(name) == 2
    assert [row[0] for row in tables["residual"]].count("| jax's convolution, float32") == 2
    assert len(tables["sizes"]) == 1 + has_bfloat16
    assert "GiB" in tables["accuracy"][0][-1]
    tables = run("runs.py", into=tmp_path)
    assert (len(tables["cost"]), len(tables["rest"])) == (6, 2)
    assert [row[0] for row in tables["seeds"]] == ["| sequential", "| vmap", "| devices", "| processes"]
    tables = run("images.py", into=tmp_path)
    assert [len(tables[part]) for part in ("decode", "folder", "predict")] == [8, 2, 10]


@pytest.mark.slow
def test_the_benchmarks_of_a_gpu_produce_their_tables(tmp_path):
    tables = run("gpu.py", "--variants", "as it is", "unroll 5", into=tmp_path)
    assert tables["ladder"][0][2] == "1.00 ×"
    assert [[row[4][0] for row in tables[part]] for part in ("to_94", "to_96")] == [["2"] * 3, ["2"] * 2]
    assert [row[1:3] for row in tables["bits"]] == [["the same bits", "the same bits"]] * 4
    assert len(tables["overhead"]) == len(tables["start"]) == 2
    assert [row[1] for row in tables["agree"]] == ["0.0e+00 |"] * 2  # This machine's CPU twice.
    assert tables["tutorial"][0][1] == "2"
    assert [row[0] for row in tables["seeds"]] == ["| sequential", "| vmap", "| processes"]
    assert all(float(row[1].split()[0]) > 0 for row in tables["seeds"])
    assert [row[0] for row in tables["predict"]][:2] == ["| decoding alone", "| `predict`, views: none"]
    found = (tmp_path / "profile.md").read_text()
    assert "no kernels of a GPU" in found and "at least one operation was running on XLA's threads" in found


# --- The ladder -----------------------------------------------------------------------------------------------------


@contextmanager
def restored():
    """Restores the functions of the package that a variant replaces."""
    modules = [conv, norm, ops, programs, speednet, transforms]
    before = [dict(vars(module)) for module in modules]
    try:
        yield
    finally:
        for module, names in zip(modules, before, strict=True):
            vars(module).update(names)
        ops.max_pool_2x2.defvjp(ops._max_pool_fwd, ops._max_pool_bwd)


def program_for_a_gpu(variant):
    """Returns the configuration, and a program of two steps."""
    config = variant.change(load_experiment(str(EXPERIMENTS / f"{variant.recipe}.py")).config)
    program = programs.Program(
        config.model, config.optim, config.augment, config.loss, 16 * config.num_epochs, config.num_epochs
    )
    image = np.zeros((8, 32, 32, 3), np.uint8)
    pixels = jax.device_put(Pixels(image, np.zeros(8, np.int32), pixel_statistics(image)))
    plan = epoch_plan(0, 0, 8, batch_size=4, augment=config.augment, image_size=(32, 32))

    def steps(state, key):
        return programs.train_steps.__wrapped__(state, pixels, plan, key, key, program=program)

    state = abstract_state((32, 32, 3), model=config.model, tx=program.make_tx())
    return config, jax.jit(steps).trace(state, jax.random.key(0)).lower(lowering_platforms=("cuda",)).as_text()


def test_every_variant_of_the_ladder_is_another_program_or_configuration(load, no_type_checks, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    ladder = load("variants")
    base = program_for_a_gpu(ladder.Variant())
    for name, variant in ladder.VARIANTS.items():
        if variant.flags or variant.one_program or variant.recipe != ladder.MUON:
            continue
        with restored():
            assert (program_for_a_gpu(variant) == base) == (name == "as it is"), name
    assert program_for_a_gpu(ladder.Variant()) == base


def test_the_kernels_of_a_step_and_their_bytes_are_read_from_a_compiled_program(load):
    text = """
%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
}

%body (t: (f32[10,4], s32[2])) -> (f32[10,4], s32[2]) {
  %t = (f32[10,4]{1,0}, s32[2]{0}) parameter(0)
  %x = f32[10,4]{1,0} get-tuple-element(%t), index=0
  %i = s32[2]{0} get-tuple-element(%t), index=1
  %conv.1 = (bf16[2,4]{1,0}, u8[0]{0}) custom-call(%x), custom_call_target="__cudnn$convForward"
  %y = bf16[2,4]{1,0} get-tuple-element(%conv.1), index=0
  %loop_add_fusion.7 = bf16[2,4]{1,0} fusion(%y, %i), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/add"}
  ROOT %loop_gather_fusion = f32[2,4]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused
}
"""
    kernels = load("gpu_programs").kernels_of_step(text)
    assert [(*kernel,) for kernel in kernels] == [
        ("convForward", "", 160 + 16),
        ("loop_add_fusion", "jit(f)/add", 16 + 8 + 16),
        ("loop_gather_fusion", "", 32 + 8 + 32),  # A gather reads no more images than it returns.
    ]


@pytest.mark.slow
@pytest.mark.skipif("CNNJAX_CUDA_PYTHON" not in os.environ, reason="needs an interpreter with jax[cuda]")
def test_a_step_is_compiled_for_a_gpu_that_is_not_there():
    names = ["norm's gradient of cee6fb2", "as it is"]
    command = [os.environ["CNNJAX_CUDA_PYTHON"], str(HERE / "gpu_programs.py"), *names]
    table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    assert [row[0] for row in rows] == [f"| {name}" for name in names]
    assert int(rows[1][1]) < int(rows[0][1]) and float(rows[1][2]) < float(rows[0][2])  # Fewer kernels and bytes.
