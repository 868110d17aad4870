"""The capacity plan: its formulas against numbers worked out by hand, its tables, and the benchmark at a small size."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from cnnjax.models.resnet import ResNet50
from cnnjax.state import abstract_state
from cnnjax.summary import forward_flops

HERE = Path(__file__).parent.parent / "experiments" / "benchmarks"


@pytest.fixture(scope="module")
def load():
    """Imports a file of the benchmarks as their programs do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        yield importlib.import_module


@pytest.fixture(scope="module")
def capacity(load):
    return load("capacity")


@pytest.fixture(scope="module")
def cluster(capacity):
    """10^14 operations per second, 100 GB/s inside a host of eight devices, 10 GB/s between hosts."""
    return capacity.Cluster("devices", 1e15, 0.1, 100e9, 10e9, cores=128)


@pytest.fixture(scope="module")
def measured(capacity):
    values = {"num_params": 10, "norm_channels": 2, "forward_flops": 10**9, "reduced_bytes": 10**9}
    seconds = {
        "stall_seconds": 1.0,
        "save_seconds": 2.0,
        "restore_seconds": 3.0,
        "start_seconds": 5.0,
        "compile_seconds": 7.0,
    }
    return capacity.Measured(**values, num_reductions=10, images_per_core=50.0, checkpoint_bytes=136, **seconds)


def test_bytes(capacity):
    assert capacity.reduced_bytes(num_params=10, norm_channels=2) == 4 * 16
    assert capacity.state_bytes(num_params=10, norm_channels=2) == 4 * (30 + 4)
    assert [capacity.ring_bytes(1000, n) for n in (1, 2, 4, 8)] == [0, 1000, 1500, 1750]


def test_the_duration_of_computation_and_communication(capacity, cluster):
    assert capacity.compute_seconds(100, 1e9, cluster) == pytest.approx(0.003)  # 100 * 3e9 / 1e14
    assert capacity.utilization(1000, 1e9, 10e12) == pytest.approx(0.3)
    assert capacity.all_reduce_seconds(1e9, 4, cluster) == pytest.approx(0.015)  # 1.5 GB at 100 GB/s
    assert capacity.all_reduce_seconds(1e9, 8, cluster) == pytest.approx(0.0175)
    # Each of two devices sends its eighth of 1 GB to the other host at 10 GB/s: 12.5 ms more.
    assert capacity.all_reduce_seconds(1e9, 16, cluster) == pytest.approx(0.03)
    assert capacity.latency_seconds(8, 8) == pytest.approx(11.68e-6)  # 4.4 + 2 * 7 * 0.52 µs
    assert capacity.latency_seconds(64, 8) == pytest.approx(47.504e-6)  # 4.4 + 2 * (7 * 0.936 + 3 * 5) µs


def test_the_global_batch_is_limited(capacity):
    assert [capacity.batch_per_device(n) for n in (8, 32, 64, 512)] == [256, 256, 128, 16]


def test_the_steps_on_two_hosts(capacity, cluster, measured):
    x = capacity.scaling(16, cluster, measured)
    assert x.images_per_device == 256
    assert x.compute_seconds == pytest.approx(7.68e-3)
    assert x.gradient_seconds == pytest.approx(30e-3)
    assert x.statistics_seconds == pytest.approx(0.27504e-3)  # 10 * (4.4 + 2 * (7 * 0.936 + 5)) µs
    assert x.step_seconds == pytest.approx(37.95504e-3)
    assert x.efficiency == pytest.approx(7.68 / 37.95504)
    assert x.sent_bytes == 1.875e9
    assert x.images_per_host == pytest.approx(53_958.6, rel=1e-5)  # 8 * 256 / 0.03795504
    assert x.cores == pytest.approx(1079.17, rel=1e-5)
    assert x.run_seconds == pytest.approx(90 * 313 * 37.95504e-3)  # 1,281,167 / 4,096 = 312.8 steps per epoch
    assert x.run_seconds_on_cores == pytest.approx(x.run_seconds * 1079.17 / 128, rel=1e-5)
    assert capacity.scaling(16, cluster._replace(cores=2000), measured).run_seconds_on_cores == x.run_seconds


def test_failures(capacity, measured):
    assert abs(capacity.HARDWARE_FAILURES - 0.173) < 5e-4  # 419 / 16,384 / 0.1478 years
    assert capacity.seconds_between_failures(10, 0.5) == 31_557_600 / 5
    assert capacity.optimal_interval(2, 100) == 20
    assert capacity.restart_seconds(measured) == 197  # 120 + 60 + 5 + 7 + 3 + 2
    assert capacity.goodput(90, 10, 1000, 1e12) == pytest.approx(0.9)  # Without failures.
    best = capacity.optimal_interval(2, 1e4)
    at_best, *others = (capacity.goodput(best * factor, 2, 60, 1e4) for factor in (1, 0.7, 1.4))
    assert at_best > max(others)


def test_goodput_equals_a_simulation(capacity):
    rng, interval, save, restart, between = np.random.default_rng(0), 100, 10, 30, 200
    elapsed, kept = 0.0, 0
    needed, until = interval + save, rng.exponential(between)
    for _ in range(40_000):  # Attempts, each of which ends with a checkpoint or at a failure.
        if until >= needed:
            elapsed, until, kept, needed = elapsed + needed, until - needed, kept + 1, interval + save
        else:
            elapsed, until, needed = elapsed + until, rng.exponential(between), restart + interval + save
    assert capacity.goodput(interval, save, restart, between) == pytest.approx(kept * interval / elapsed, rel=0.01)


def test_the_measured_values_are_those_of_the_network(capacity):
    values = json.loads((HERE / "capacity.json").read_text())
    model, shape = ResNet50(1000), (224, 224, 3)
    state = abstract_state(shape, model=model, tx=optax.identity())
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    norm_channels = sum(leaf.size for leaf in jax.tree.leaves(state.model_state)) // 2
    assert values["num_params"] == num_params == 25_557_032
    assert values["norm_channels"] == norm_channels
    assert values["forward_flops"] == forward_flops(model, shape)
    # Apart from the loss, the accuracy and the number of examples; and three counters.
    assert 0 < values["reduced_bytes"] - capacity.reduced_bytes(num_params, norm_channels) <= 16
    assert 0 < values["checkpoint_bytes"] - capacity.state_bytes(num_params, norm_channels) <= 16


def test_the_plan_in_the_report_is_that_of_the_measured_values(load, capacity, monkeypatch):
    scale = load("scale")
    plan = capacity.plan(scale.read_values())
    assert f"<!-- plan -->\n{plan}\n\n" in scale.REPORT.read_text()
    monkeypatch.setitem(scale.found, "images_per_core", 1.0)
    assert capacity.plan(scale.read_values()) != plan
    monkeypatch.setattr(scale, "VALUES", HERE / "none.json")
    with pytest.raises(SystemExit, match=r"`plan` needs measured values, got none for checkpoint_bytes, .*bench-scale"):
        scale.read_values()


def test_every_part_has_a_place_in_the_report(load):
    harness, scale = load("harness"), load("scale")
    report = scale.REPORT.read_text()
    for part in (*scale.PARTS, *load("gpu_collectives").PARTS):
        assert f"<!-- {part} -->\nNew.\n<!-- end of {part} -->\n" in harness.replaced(report, part, "New.\n")


def test_the_communication_that_kernels_hide(load):
    cells = load("gpu_collectives").communication_cells(
        [
            ("all-reduce", 450_000_000, 8, 1_675_000_000),  # Sends 787.5 MB in 1.75 ms; kernels take 0.5 ms.
            ("all-gather", 900_000_000, 2, 10**11),  # 450 MB in 1 ms, which is hidden.
            ("reduce-scatter", 90_000_000, 6, 0),  # 450 MB in 1 ms, in the open.
            ("all-reduce", 4096, 8, 0),
            ("all-reduce", 4096, 8, 10**11),
        ]
    )
    assert cells == ["1 all-reduce, 1 all-gather, 1 reduce-scatter", "1,688", "3.75", "1.50", "2", "1"]


@pytest.mark.slow
def test_the_benchmark_measures_every_input(tmp_path):
    before = (HERE / "capacity.json").read_bytes(), (HERE / "CAPACITY.md").read_bytes()
    command = [sys.executable, str(HERE / "scale.py"), "--small", "--into", str(tmp_path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert ((HERE / "capacity.json").read_bytes(), (HERE / "CAPACITY.md").read_bytes()) == before
    rows = {path.stem: re.findall(r"(?m)^\| (.*) \|$", path.read_text())[2:] for path in tmp_path.glob("*.md")}
    assert [len(rows[part]) for part in ("decode", "checkpoint", "startup")] == [6, 4, 3]
    assert all(float(row.split(" | ")[2].split()[0]) > 0 for row in rows["decode"])
    # Of the ResNet-18 of this size; besides, the sums of the metrics.
    (total,) = (row.split(" | ")[2] for row in rows["collectives"] if row.startswith("in total"))
    assert 0 < int(total.replace(",", "")) - 4 * (11_181_642 + 3 * 4800) <= 16
    assert len(rows["plan"]) == 3 * 9 - 2  # Three tables.
