"""Traces of some steps, and how close training comes to the peak of a device."""

import errno
import re
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from generated import Lines
from programs.research import CONFIG

from cnnjax import MLP, UserError, train_and_evaluate
from cnnjax.cli.main import main
from cnnjax.prepare import set_up
from cnnjax.runs.profile import Profile, covered, parse_steps, summarize
from cnnjax.throughput import peak_flops, seconds_at_peak

# jaxlib 0.12 warns when it makes this type, and with warnings as errors the process aborts.
pytestmark = [
    pytest.mark.filterwarnings("ignore:builtin type event_stats:DeprecationWarning"),
]


# --- Profiles -------------------------------------------------------------------------------------------------------


def traced(run_dir):
    """Returns what jax's own reader finds out about each event of a trace."""
    (path,) = (run_dir / "profile").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    return [dict(event.stats) for plane in planes for line in plane.lines for event in line.events]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """A run with a profile over the end of an epoch, which takes long, on a device whose peak is known.

    Returns the run, and what it reports.
    """
    report, run_dir = Lines(), tmp_path_factory.mktemp("profiled") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cnnjax.throughput.PEAKS", {jax.devices()[0].device_kind: 1e9})
        options = {"report": report, "on_epoch": lambda row, state: time.sleep(0.8)}
        return train_and_evaluate(CONFIG, run_dir=run_dir, profile=(4, 8), **options), report.lines


def test_a_profile_changes_no_bit_and_is_a_trace_of_these_steps(profiled, research_run, tmp_path):
    run, lines = profiled
    assert run.result["sha256"] == research_run.result["sha256"]
    runs = {stats["run_id"] for stats in traced(run.run_dir) if stats.get("hlo_module") == "jit_train_steps"}
    assert len(runs) == 4
    i = next(i for i, line in enumerate(lines) if line.startswith("Profile of the steps 4:8: "))
    assert float(re.search(r"([\d.]+) ms per step", lines[i])[1]) < 150  # The end of the epoch would add 200.
    assert "running on XLA's threads" in lines[i]
    assert lines[i + 6] == f"To see the trace: pip install xprof; xprof --logdir {run.run_dir}/profile"
    jax.profiler.start_trace(str(tmp_path))  # No other trace is running.
    jax.profiler.stop_trace()


def test_on_an_accelerator_whole_epochs_are_traced(tmp_path, monkeypatch):
    """An epoch is one program; the steps 2:8 are in the first and the second."""

    def set_up_for_accelerator(*args, **options):
        setup, state = set_up(*args, **options)
        return setup._replace(steps_per_dispatch=setup.steps_per_epoch), state

    monkeypatch.setattr("cnnjax.train.set_up", set_up_for_accelerator)
    report = Lines()
    run = train_and_evaluate(CONFIG, run_dir=tmp_path / "a", profile=(2, 8), report=report)
    assert any(line.startswith("Profile of the steps 0:12: ") for line in report.lines)
    assert not [stats for stats in traced(tmp_path / "a") if "jit_train_steps" in str(stats.get("module"))]  # Compiled.
    assert run.result["sha256"] == train_and_evaluate(CONFIG, run_dir=tmp_path / "b").result["sha256"]


def test_steps_that_are_done_or_beyond_the_end_are_errors(tmp_path):
    def check(profile, rule):
        with pytest.raises(UserError, match=f"^`profile` must be within the steps {rule} that are left, got "):
            train_and_evaluate(CONFIG, run_dir=tmp_path / "run", profile=profile, resume="auto")

    check((10, 19), "0:18")
    check((-1, 3), "0:18")
    check((5, 5), "0:18")
    assert not (tmp_path / "run").exists()

    def fail(row, state):
        if row["epoch"] == 2:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        train_and_evaluate(CONFIG, run_dir=tmp_path / "run", on_epoch=fail)
    check((4, 8), "6:18")


def test_a_run_that_ends_within_the_trace_says_so(tmp_path):
    report = Lines()

    def stop(row, state):
        return True

    train_and_evaluate(CONFIG, run_dir=tmp_path, profile=(4, 9), report=report, on_epoch=stop)
    assert "The run ended before step 9: there is no complete profile." in report.lines
    jax.profiler.start_trace(str(tmp_path / "again"))
    jax.profiler.stop_trace()


def test_a_profile_that_cannot_be_written_does_not_end_the_run(research_run, tmp_path, monkeypatch):
    def block(step, metrics):
        (tmp_path / "profile").touch()

    tracers, traces = [], Profile.traces
    monkeypatch.setattr(Profile, "traces", lambda self, *steps: tracers.append(traces(self, *steps)) or tracers[-1])
    report = Lines()
    run = train_and_evaluate(CONFIG, run_dir=tmp_path, profile=(2, 5), report=report, on_step=block)
    assert run.result["sha256"] == research_run.result["sha256"]
    (line,) = [line for line in report.lines if line.startswith("The profile")]
    assert re.fullmatch(r"The profile failed: FileExistsError: .*\. The run continues without it\.", line)
    assert sum(tracers) > 3  # These steps still count as traced: other processes trace them.


def test_a_profile_that_fails_does_not_hide_another_exception(tmp_path, monkeypatch):
    def fill_disk():
        stop_trace()
        raise OSError(errno.ENOSPC, "No space left on device")

    def fail(step, metrics):
        raise ZeroDivisionError

    report, stop_trace = Lines(), jax.profiler.stop_trace
    monkeypatch.setattr("jax.profiler.stop_trace", fill_disk)
    with pytest.raises(ZeroDivisionError):
        train_and_evaluate(CONFIG, run_dir=tmp_path, profile=(0, 5), report=report, on_step=fail)
    (line,) = [line for line in report.lines if line.startswith("The profile")]
    assert "No space left on device" in line


@pytest.mark.parametrize("text", ["10", "20:10", "5:5", "a:b", "-1:3", "1:2:3", ""])
def test_a_range_is_two_numbers(text):
    with pytest.raises(UserError, match=r"`profile` must be two numbers of steps such as 10:20, the second .* larger"):
        parse_steps(text)


def test_a_profile_with_seeds_is_an_error(capsys):
    assert parse_steps("10:20") == (10, 20)
    with pytest.raises(SystemExit):
        main(["train", "--profile", "2:10", "--seeds", "0:2"])
    assert capsys.readouterr().err == "`profile` must be left out with --seeds, got 2:10.\n"


def event(name, start, stop, **stats):
    return SimpleNamespace(name=name, start_ns=start * 1e6, duration_ns=(stop - start) * 1e6, stats=stats.items())


def mark(start, stop, epoch=0):
    return event("cnnjax.train_steps", start, stop, epoch=epoch)


def plane(name, **lines):
    return SimpleNamespace(name=name, lines=[SimpleNamespace(name=n, events=e) for n, e in lines.items()])


def test_the_share_of_the_time_on_a_cpu():
    """10 ms: operations from 1 to 4, and from 3 to 8 in another thread, where an event ends one of them."""
    threads = {
        "python": [event("PjitFunction", 0, 10), mark(0, 5), mark(5, 10)],
        "tf_XLAEigen/1": [event("dot.1", 1, 4, hlo_op="dot.1"), event("while.2", 1, 4, hlo_op="while.2")],
        "tf_XLAEigen/2": [event("convolution.3", 3, 4, hlo_op="convolution.3", _p=7)],
        "tf_XLAEigen/3": [event("end: convolution.3", 7, 8, _c=7), event("end: dot.1", 9, 10, _c=8)],
    }
    planes = [plane("/host:metadata"), plane("/host:CPU", **threads)]
    lines = summarize(SimpleNamespace(planes=planes), (10, 14))
    assert lines[0].startswith("Profile of the steps 10:14: 2.50 ms per step. During 70% of this time at least one ")
    assert "running on XLA's threads" in lines[0]
    assert lines[1:] == ["   62% convolution.3", "   38% dot.1"]  # 5 and 3 of 8 ms.


def test_the_end_of_an_epoch_does_not_count():
    """3 steps in two epochs: from 0 to 3, with a pause between two steps, and from 8 to 9."""
    marks = [mark(0, 1), mark(2, 3), mark(8, 9, epoch=1)]
    computing = [event("dot.1", start, stop, hlo_op="dot.1") for start, stop in ((0, 1), (2, 4), (5, 7), (8.5, 9))]
    planes = [plane("/host:CPU", python=marks, pool=computing)]
    (line, *_) = summarize(SimpleNamespace(planes=planes), (4, 7))
    assert line.startswith("Profile of the steps 4:7: 1.33 ms per step. During 62% of this time")  # 4 ms, 2.5 ms.


def test_the_share_of_the_time_on_two_gpus():
    """The first computes for 4 of 10 ms in two streams, the second for 8."""
    first = {
        "Stream #1(Compute)": [event("gemm", 0, 2, hlo_op="dot.1"), event("gemm", 1, 3, hlo_op="dot.1")],
        "Stream #2(MemcpyH2D)": [event("MemcpyH2D", 5, 6)],
        "XLA Modules": [event("jit_train_steps", 0, 10)],
    }
    planes = [
        plane("/device:GPU:0", **first),
        plane("/device:GPU:1", **{"Stream #1(Compute)": [event("gemm", 1, 9, hlo_op="dot.1")]}),
        plane("/host:CPU", python=[event("dot.9", 0, 10, hlo_op="dot.9"), mark(0, 10)]),
    ]
    lines = summarize(SimpleNamespace(planes=planes), (0, 1))
    assert "During 60% of this time at least one operation was running on each device (mean)." in lines[0]
    assert lines[1:] == ["   92% dot.1", "    8% MemcpyH2D"]  # 12 and 1 of 13 ms.
    empty = SimpleNamespace(planes=[plane("/host:CPU")])
    assert summarize(empty, (0, 1)) == ["Profile of the steps 0:1: the profiler has recorded no operation."]


def test_the_union_of_intervals():
    rng = np.random.default_rng(0)
    starts = rng.integers(0, 900, 20)
    spans = [(float(start), float(start + size)) for start, size in zip(starts, rng.integers(0, 30, 20), strict=True)]
    inside = np.zeros(1000, bool)
    for start, stop in spans:
        inside[int(start) : int(stop)] = True
    assert covered(spans) == inside.sum()


# --- Utilization ----------------------------------------------------------------------------------------------------


def test_utilization_is_recorded_and_reported_on_a_known_device(profiled):
    """The peak is 10^9 FLOP/s here. The network of research.py has two layers: 90 to 16 and 16 to 4."""
    run, lines = profiled
    flops = 3 * 2 * (90 * 16 + 16 * 4)
    expected = run.history["images_per_second"] * flops / 1e9
    np.testing.assert_allclose(run.history["flops_utilization"], expected, rtol=1e-12)
    assert f" images/s  {expected[2]:.0%} of peak FLOP/s  " in next(x for x in lines if x.startswith("epoch 3/3"))


def test_the_peak_of_a_device():
    kinds = {
        "NVIDIA H100 80GB HBM3": 989.4e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989.4e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA A100 80GB PCIe": 312e12,
        "NVIDIA L4": 121e12,
        "NVIDIA L40S": 362.05e12,
        "Tesla V100-SXM2-16GB": 125e12,
        "NVIDIA GeForce RTX 4090": 165.2e12,
        "TPU v3": 61.5e12,
        "TPU v6 lite": 918e12,
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
        "NVIDIA H20": None,
        "cpu": None,
    }
    assert {kind: peak_flops(kind) for kind in kinds} == kinds
    device = SimpleNamespace(device_kind="NVIDIA H200")
    model = MLP(num_classes=10)
    one, two = (seconds_at_peak(model, (28, 28, 1), [device] * n) for n in (1, 2))
    assert one == 2 * two == 3 * 2 * (784 * 512 + 512 * 512 + 512 * 10) / 989.4e12
    assert seconds_at_peak(model, (28, 28, 1), [SimpleNamespace(device_kind="cpu")]) is None
