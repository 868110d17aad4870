"""Measures how fast the records' accuracies are reached on one GPU, beside airbench itself. `make bench-gpu` runs it.

    make bench-gpu                         # all parts: up to an hour each for five of them
    make bench-gpu ARGS="ladder clock"     # these parts
    make bench-gpu ARGS=--small            # try every part of cnnjax, on a CPU
    make bench-gpu ARGS="--python python3 --peers python3 --airbench airbench --into out"    # without a registry

ladder     the recipe for 94% with one difference at a time: XLA flags, network, optimizer, program; that for 96%
clock      94% and 96%: each recipe with many seeds, on the records' clock, with deterministic kernels and with any
profile    what the device does in one warm run of the recipe for 94%: kernels by their share, and idle time
airbench   airbench94_muon and airbench96 by their author's scripts, on the same clock
bits       the recipe for 94% in two processes, and killed and resumed: the same digests? And process start to result
agree      the first 25 steps of cifar10_cnn on the CPU and on the GPU
tutorial   the tutorial's network, 200 epochs at batch size 32
seeds      four seeds one after another, batched by vmap, and in a process each

The records' clock runs from the whitening of the first layer, through all epochs, to the score of the test set with
test-time augmentation, synchronized at both ends; loading, the copy to the device, compilation and warm-up come before.
Results are printed as they come; each part writes its table into BENCHMARKS.md, or into the directory of --into.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import harness
import numpy as np
from harness import HERE, run_experiment, spread, table, xla_flags
from variants import ANY_KERNELS, MUON, TUTORIAL, VARIANTS

from cnnjax.runs.statistics import summarize

PEERS = harness.ROOT / ".venv-peers-gpu" / "bin" / "python"
REPOSITORY = "https://github.com/KellerJordan/cifar10-airbench"
RECIPES = {MUON: 50, "cifar10_airbench94": 50, "cifar10_airbench96": 10}  # Number of seeds.
SCRIPTS = {"airbench94_muon.py": 50, "legacy/airbench96.py": 10, "airbench96_faster.py": 10}  # Number of runs.
TOGETHER = 10  # Number of workers that compile, and use the GPU, at the same time: each needs 4 GB.


@dataclass
class Result:
    """What a process measured: the seconds to compile, and accuracy (%) and seconds on the records' clock by seed."""

    compilation: float = 0.0
    accuracies: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def start(args: argparse.Namespace, variant: str, *options: str, flags: str = "", **more: Any) -> Any:
    """Starts the process of a variant, see `harness.worker`."""
    command = [args.python, str(HERE / "variants.py"), "--variant", variant, *options, *["--small"] * args.small]
    return harness.worker(*command, XLA_FLAGS=xla_flags(VARIANTS[variant].flags, flags), **more)


def measure(asks: dict[str, Any], seeds: Iterable[int], ready_by: float, until: float) -> dict[str, Result]:
    """Compiles all at the same time; those that are ready in time train the seeds and take turns."""
    with ThreadPoolExecutor(len(asks)) as threads:
        ready = threads.map(lambda ask: ask("warm_up", until=ready_by), asks.values())
        found = {name: Result(seconds) for name, seconds in zip(asks, ready, strict=True) if seconds is not None}
    print(*(f"{name}: ready after {result.compilation:.0f} s" for name, result in found.items()), sep="\n", flush=True)
    for seed in seeds:
        for name, result in found.items():
            if (run := asks[name]("train_seed", seed, until=until)) is not None:
                parts = ", ".join(f"{part:.3f}" for part in run["seconds"])
                print(f"{name}: seed {seed}, {run['accuracy']:.2%}, {parts} s, {run['digest']}", flush=True)
                result.accuracies.append(100 * run["accuracy"])
                result.seconds.append(run["seconds"][0])
    return found


def clock_table(name: str, results: dict[str, Result]) -> str:
    rows = []
    for label, result in results.items():
        cells = ["failed, or out of time"]
        if result.seconds:
            scores = summarize(result.accuracies)
            half = "" if scores.n == 1 else f"± {scores.high - scores.mean:.2f}"
            cells = [f"{scores.mean:.2f}%", half, spread(result.seconds, ".3f"), scores.n]
        rows.append([label, *cells])
    return table([name, "test accuracy", "95% interval", "s, records' clock", "runs"], rows)


# --- Parts: each returns a table ------------------------------------------------------------------------------------


def ladder(args: argparse.Namespace) -> str:
    """Scores held-out images: choices must not be made on the test set."""
    until, names, found = time.monotonic() + args.seconds, args.variants or list(VARIANTS), {}
    with tempfile.TemporaryDirectory() as temporary:
        for i in range(0, len(names), TOGETHER):
            share = (until - time.monotonic()) * min(1.0, TOGETHER / (len(names) - i))
            ready_by = time.monotonic() + 0.8 * share  # Those that take longer are skipped.
            with ExitStack() as stack:
                asks = {}
                for name in names[i : i + TOGETHER]:
                    # Autotuning beside others is noisy; variants with the same flags share what it selected.
                    cache = Path(temporary, re.sub(r"\W+", "", VARIANTS[name].flags) or "default")
                    cache.mkdir(exist_ok=True)
                    flag = f"--xla_gpu_per_fusion_autotune_cache_dir={cache}"
                    log = Path(args.into or temporary, f"{re.sub(r'[^a-z0-9]+', '_', name.lower())}.log")
                    asks[name] = stack.enter_context(start(args, name, "--held-out", "0.1", flags=flag, log=log))
                found |= measure(asks, range(1 if args.small else 3), ready_by, until)
    base, rows = found.get("as it is", Result()).seconds, []
    for name in names:
        cells, result = ["failed, or out of time"], found.get(name, Result())
        if result.seconds:
            comparable = base and VARIANTS[name].recipe == MUON
            share = f"{statistics.median(result.seconds) / statistics.median(base):.2f} ×" if comparable else "–"
            accuracy, count = f"{statistics.mean(result.accuracies):.2f}%", len(result.seconds)
            cells = [spread(result.seconds, ".3f"), share, accuracy, count, f"{result.compilation:.0f}"]
        rows.append([name, *cells])
    head = ["variant", "s, records' clock", "of `as it is`", "validation accuracy", "seeds", "s to compile"]
    return table(head, rows)


def clock(args: argparse.Namespace) -> str:
    until, results = time.monotonic() + args.seconds, {}
    for recipe, seeds in RECIPES.items():
        with ExitStack() as stack:
            asks = {}
            for label, variant in (("deterministic kernels", "as it is"), ("any kernels", "any kernels")):
                asks[f"`{recipe}`, {label}"] = stack.enter_context(start(args, variant, "--recipe", recipe))
            results |= dict.fromkeys(asks, Result())
            results |= measure(asks, range(2 if args.small else args.seeds or seeds), until, until)
    return clock_table("cnnjax", results)


def profile(args: argparse.Namespace) -> str:
    until = time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory() as folder, start(args, "any kernels") as ask:
        found = ask("warm_up", until=until) and ask("profile", folder, until=until)
    return f"```\n{found or 'It did not finish in time.'}\n```"


def airbench(args: argparse.Namespace) -> str:
    if args.small:
        return "Left out: it needs a GPU."
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.airbench or f"{temporary}/airbench").resolve()
        if args.airbench is None:
            subprocess.run(["git", "clone", "--quiet", "--depth", "1", REPOSITORY, folder], check=True)
        data = Path(temporary, "work", "cifar10")  # Where its loader looks before it downloads the set.
        data.mkdir(parents=True)
        with harness.worker(args.peers, str(HERE / "peers.py")) as ask:
            ask("write_airbench_data", harness.save_cifar10(Path(temporary, "cifar10.npz")), str(data))
        until, results = time.monotonic() + args.seconds, {}
        for script, count in SCRIPTS.items():
            command = [args.peers, str(folder / script)]
            runs = airbench_runs(command, (args.seeds or count) + 1, data.parent, until)[1:]  # The first one warms up.
            results[script] = Result(accuracies=[a for a, _ in runs], seconds=[s for _, s in runs])
    return clock_table("airbench", results)


def airbench_runs(command: list[str], count: int, folder: Path, until: float) -> list[tuple[float, float]]:
    """Runs one of its scripts until it has printed `count` results, or until a time; returns accuracies and seconds."""
    found, pipe = [], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, text=True, env=harness.ENVIRONMENT, cwd=folder) as process:
        with harness.killed_at(process, until):
            for line in process.stdout or ():
                if result := airbench_result(line):
                    found.append(result)
                    print(f"{Path(command[-1]).name}: {result[0]:.2f}%, {result[1]} s", flush=True)
                if len(found) == count:
                    break
        process.kill()
    return found


def airbench_result(line: str) -> tuple[float, float] | None:
    """Returns accuracy in percent and seconds of a run, the last two columns of a complete row of airbench's table."""
    found = re.match(r"\|.*\|\s+(0\.\d+)\s+\|\s+(\d+\.\d+)\s+\|\s*$", line)
    return (100 * float(found[1]), float(found[2])) if found else None


def bits(args: argparse.Namespace) -> str:
    options, rows = ["--num-epochs", "3", "--model.widths", "8", "16", "16"] if args.small else [], []
    for label, flags in [("deterministic kernels", ""), ("any kernels", ANY_KERNELS)][: 1 if args.small else 2]:
        with tempfile.TemporaryDirectory() as cache:  # Empty, so that the first start compiles.
            run = partial(run_experiment, MUON, python=args.python, XDG_CACHE_HOME=cache, XLA_FLAGS=xla_flags(flags))
            first, second = (run(Path(cache, name), *options) for name in ("first", "second"))
            run(Path(cache, "killed"), *options, kill=True)
            resumed = run(Path(cache, "killed"), *options, "--resume")
            manifest = Path(cache, "killed", "manifest.json")
            sessions = json.loads(manifest.read_text())["sessions"] if resumed.result else []
        cells = []
        for a, b in ((first.result, second.result), (first.result, resumed.result)):
            same = "the same bits" if a and b and a["sha256"] == b["sha256"] else "**other bits**"
            cells.append(same if a and b else "failed")
        if sessions and sessions[-1]["resumed_from"] is None:
            cells[1] = "not tested: nothing was resumed"
        rows.append([label, *cells, f"{first.seconds:.1f}", f"{second.seconds:.1f}"])
        print(*rows[-1], sep=", ", flush=True)
    head = ["`cifar10_airbench94_muon`", "two processes", "killed and resumed", "s, first start", "s, second start"]
    return table(head, rows)


def agree(args: argparse.Namespace) -> str:
    count, rows = 5 if args.small else 25, []

    def params(**environment: Any) -> np.ndarray:
        with (
            tempfile.TemporaryDirectory() as folder,
            start(args, "as it is", "--recipe", "cifar10_cnn", **environment) as ask,
        ):
            return np.load(ask("first_steps", count, f"{folder}/params.npy"))

    expected = params(JAX_PLATFORMS="cpu")
    for label, precision in (("float32 with TF32 products, JAX's default", "default"), ("float32", "highest")):
        got = params(JAX_DEFAULT_MATMUL_PRECISION=precision)
        rows.append([label, f"{np.linalg.norm(got - expected) / np.linalg.norm(expected):.1e}"])
    return table(
        [f"`cifar10_cnn`, parameters after {count} steps: GPU against CPU", "difference, relative to their norm"], rows
    )


def tutorial(args: argparse.Namespace) -> str:
    options, rows = ["--num-epochs", "1", "--batch-size", "512"] if args.small else [], []
    for seed in range(1 if args.small else 3):
        with tempfile.TemporaryDirectory() as folder:
            run_dir = Path(folder, "run")
            run = run_experiment("cifar10_tutorial", run_dir, "--seed", str(seed), *options, python=args.python)
        cells = ["failed", "", ""]
        if (result := run.result) is not None:
            accuracy, training = f"{result['test_accuracy']:.2%}", f"{result['training_seconds']:.0f}"
            cells = [result["num_epochs"], accuracy, training]
        rows.append([seed, *cells, f"{run.seconds:.0f}"])
        print(*rows[-1], sep=", ", flush=True)
    head = ["`cifar10_tutorial`, seed", "epochs", "test accuracy", "training, s", "process start to result, s"]
    return table(head, rows)


def seeds(args: argparse.Namespace) -> str:
    """Training only: no whitening, no scores."""
    count, until, columns = 2 if args.small else 4, time.monotonic() + args.seconds, {}
    titles = {"as it is": f"`{MUON}`", "tutorial, 3 epochs": f"`{TUTORIAL}`, 3 epochs"}
    for variant, title in list(titles.items())[: 1 if args.small else 2]:
        with ExitStack() as stack, ThreadPoolExecutor(16) as threads:
            asks = [stack.enter_context(start(args, variant)) for _ in range(2 + count)]
            groups = {"sequential": asks[:1], "vmap": asks[1:2], "processes": asks[2:]}

            def seconds(way: str, group: list[Any], first_seed: int = 0) -> float | None:
                """Trains all seeds; returns None if a worker failed."""
                begin, share = time.perf_counter(), count // len(group)
                of_one = "sequential" if way == "processes" else way
                jobs = [
                    threads.submit(ask, "train_many", of_one, first_seed + i * share, share, until=until)
                    for i, ask in enumerate(group)
                ]
                failed = None in [job.result() for job in jobs]
                return None if failed else time.perf_counter() - begin

            with ThreadPoolExecutor(len(groups)) as together:  # Compiles.
                ready = list(together.map(seconds, groups, groups.values(), repeat(1_000_000)))
            times = {way: [] for way, value in zip(groups, ready, strict=True) if value is not None}
            for _ in range(1 if args.small else 3):
                for way, values in times.items():
                    if (value := seconds(way, groups[way])) is not None:
                        values.append(value)
                        print(f"{variant}, {way}: {value:.2f} s", flush=True)
        columns[title] = times
    rows = []
    for way in ("sequential", "vmap", "processes"):
        rows.append([way])
        for times in columns.values():
            values, base = times.get(way), times.get("sequential")
            share = f"{statistics.median(base) / statistics.median(values):.2f}" if values and base else ""
            rows[-1] += [spread(values, ".2f") if values else "failed, or out of time", share]
    head = [title for name in columns for title in (f"{name}, s", "× sequential")]
    return table([f"{count} seeds", *head], rows)


PARTS = {f.__name__: f for f in (ladder, clock, profile, airbench, bits, agree, tutorial, seeds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--python", metavar="PYTHON", default=sys.executable, help="run cnnjax with it: one that has jax for the GPU")
    add("--peers", metavar="PYTHON", default=str(PEERS), help="run airbench with it: one that has PyTorch")
    add("--airbench", metavar="DIR", help="airbench's sources, if its repository is out of reach")
    add("--seconds", type=float, default=3600.0, help="limit of each of ladder, clock, profile, airbench, seeds")
    add("--seeds", type=int, help="of clock and airbench, instead of 50 for 94%% and 10 for 96%%")
    add("--variants", nargs="+", choices=VARIANTS, metavar="NAME", help="of the ladder, not all; after the parts")
    args = harness.parse(parser, list(PARTS), list(PARTS))
    for name, needed in (("python", True), ("peers", "airbench" in args.parts and not args.small)):
        if (path := shutil.which(getattr(args, name))) is None and needed:
            parser.error(f"`--{name}` must be an interpreter, got {getattr(args, name)}. `make bench-gpu` creates one.")
        setattr(args, name, os.path.abspath(path or "-"))
    about = "" if args.small else harness.describe(args.peers, args.python)
    if not args.small and "; jax on gpu;" not in about:
        parser.error(f"jax must use a GPU. Install cnnjax[cuda], or try --small. Found: {about}")
    harness.write_tables(args, PARTS, about, "gpu ")


if __name__ == "__main__":
    main()
