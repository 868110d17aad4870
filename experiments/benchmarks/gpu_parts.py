"""The parts of gpu.py. Each adds its jobs, and returns a function that makes the table of what is measured so far."""

import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import harness
import numpy as np
from device import Part, Table
from harness import HERE, run_experiment, spread, table
from variants import ANY_KERNELS, GRAPHS, MUON, NINETY_SIX, TUTORIAL, VARIANTS

from cnnjax.runs.statistics import summarize

MISSING = "failed, or out of time"


@dataclass
class Result:
    """What a process measured: the seconds to compile, and accuracy (%) and seconds on the records' clock by seed."""

    compilation: float = 0.0
    accuracies: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass
class Contender:
    """A process that trains on the records' clock, and its number of seeds."""

    name: str
    start: Callable[[], AbstractContextManager[Any]]
    count: int


def train_seeds(part: Part, row: int, contender: Contender, result: Result) -> None:
    name, count = contender.name, contender.count
    with contender.start() as ask:
        if (compilation := ask("warm_up")) is None:
            return
        result.compilation = compilation
        print(f"{name}: ready after {compilation:.0f} s", flush=True)
        for seed, run in enumerate(part.turns(row, [partial(ask, "train_seed", seed) for seed in range(count)])):
            parts = ", ".join(f"{seconds:.3f}" for seconds in run["seconds"])
            print(f"{name}: seed {seed}, {run['accuracy']:.2%}, {parts} s, {run.get('digest', '')}", flush=True)
            result.accuracies.append(100 * run["accuracy"])
            result.seconds.append(run["seconds"][0])
            part.save()


def ladder(part: Part) -> Table:
    """Scores held-out images: choices must not be made on the test set."""
    names = part.args.variants or list(VARIANTS)
    results = {name: Result() for name in names}
    for row, name in enumerate(names):
        # Autotuning beside others is noisy; variants with the same flags share what it selected.
        cache = part.folder / (re.sub(r"\W+", "", VARIANTS[name].flags) or "default")
        cache.mkdir(exist_ok=True)
        flag = f"--xla_gpu_per_fusion_autotune_cache_dir={cache}"
        start = partial(part.start, name, "--held-out", "0.1", flags=flag)
        part.job(train_seeds, row, Contender(name, start, 1 if part.args.small else 3), results[name])

    def render() -> str:
        base, rows = results.get("as it is", Result()).seconds, []
        for name, result in results.items():
            cells = [MISSING]
            if result.seconds:
                comparable = base and VARIANTS[name].recipe == MUON
                share = f"{statistics.median(result.seconds) / statistics.median(base):.2f} ×" if comparable else "–"
                accuracy, count = f"{statistics.mean(result.accuracies):.2f}%", len(result.seconds)
                cells = [spread(result.seconds, ".3f"), share, accuracy, count, f"{result.compilation:.0f}"]
            rows.append([name, *cells])
        head = ["variant", "s, records' clock", "of `as it is`", "validation accuracy", "seeds", "s to compile"]
        return table(head, rows)

    return render


def to_94(part: Part) -> Table:
    return race(
        part,
        recipe(part, MUON, "any kernels", 50),
        *script(part, "airbench94_muon.py", 50),
        recipe(part, MUON, "as it is", 50),
        recipe(part, "cifar10_airbench94", "any kernels", 10),
    )


def to_96(part: Part) -> Table:
    return race(
        part,
        recipe(part, NINETY_SIX, "any kernels", 10),
        *script(part, "airbench96_faster.py", 10),
        recipe(part, NINETY_SIX, "as it is", 3),
    )


def race(part: Part, *contenders: Contender) -> Table:
    results = {contender.name: Result() for contender in contenders}
    for row, contender in enumerate(contenders):
        part.job(train_seeds, row, contender, results[contender.name])

    def render() -> str:
        rows = []
        for name, result in results.items():
            cells = [MISSING]
            if result.seconds:
                scores = summarize(result.accuracies)
                half = "" if scores.n == 1 else f"± {scores.high - scores.mean:.2f}"
                cells = [f"{scores.mean:.2f}%", half, spread(result.seconds, ".3f"), scores.n]
            rows.append([name, *cells])
        return table(["recipe", "test accuracy", "95% interval", "s, records' clock", "runs"], rows)

    return render


def recipe(part: Part, name: str, variant: str, count: int) -> Contender:
    kernels = "deterministic kernels" if variant == "as it is" else variant
    start = partial(part.start, variant, "--recipe", name, name=f"{name}, {kernels}")
    return Contender(f"`{name}`, {kernels}", start, 2 if part.args.small else count)


def script(part: Part, name: str, count: int) -> list[Contender]:
    @contextmanager
    def start() -> Iterator[Any]:
        data = part.folder / "cifar10"  # Where its loader looks before it downloads the set.
        data.mkdir()
        with harness.worker(part.args.peers, str(HERE / "peers.py")) as ask:
            ask("write_airbench_data", harness.save_cifar10(part.folder / "cifar10.npz"), str(data))
        command = [part.args.peers, str(HERE / "peers.py"), str(part.args.airbench / name), str(part.folder)]
        with harness.worker(*command, log=part.log(name)) as ask:
            yield partial(ask, until=part.until)

    return [] if part.args.small else [Contender(f"airbench: `{name}`", start, count)]  # It needs a GPU.


def overhead(part: Part) -> Table:
    found: dict[str, list[tuple[list[float], list[float]]]] = {}

    def measure(part: Part, row: int, variant: str, label: str, turns: int) -> None:
        with part.start(variant) as ask:
            if ask("warm_up") is None:
                return
            calls = []
            for i in range(1 + turns):  # The first turn compiles the rest of a run.
                calls += [partial(ask, "train_seed", i), partial(ask, "run", i, str(part.folder / f"{row}-{i}"))]
            results = part.turns(row, calls)
            for i, (bare, run) in enumerate(zip(results, results, strict=False)):
                print(f"{label}: bare {bare['seconds']} s, whole run {run['seconds']} s", flush=True)
                if i > 0:
                    found.setdefault(label, []).append((bare["seconds"], run["seconds"]))
                    part.save()

    turns = [1, 1] if part.args.small else [5, 2]
    part.job(measure, 0, "as it is", f"`{MUON}`", turns[0])
    part.job(measure, 1, "tutorial, 3 epochs", f"`{TUTORIAL}`, 3 epochs", turns[1])

    def render() -> str:
        rows = []
        for label, pairs in found.items():
            columns = [
                [bare[2] for bare, _ in pairs],
                [run[1] for _, run in pairs],
                [run[1] - bare[2] for bare, run in pairs],
                [bare[3] for bare, _ in pairs],
                [run[2] for _, run in pairs],
                [run[0] for _, run in pairs],
            ]
            rows.append([label, *(spread(column, ".3f") for column in columns)])
        head = ["s", "its steps alone", "its training", "difference", "scoring alone", "from the last epoch to the end"]
        return table([*head, "from the call to the first step"], rows)

    return render


def profile(part: Part) -> Table:
    texts: list[str] = []

    def measure(part: Part) -> None:
        trace, run_dir = part.folder / "trace", part.folder / "run"
        with part.start("any kernels") as ask:
            if ask("warm_up") is None:
                return
            calls = [partial(ask, "profile", str(trace)), partial(ask, "run", 0, str(run_dir), False, True)]
            for result in part.turns(0, calls):
                if isinstance(result, str):
                    texts.append(result)
                else:
                    utilization = ", ".join(f"{value:.0%}" for value in result["utilization"]) or "unknown"
                    said = [line for line in result["lines"] if line.startswith(("Profile", "  ", "The profile"))]
                    texts.extend(["", *said, f"FLOPs utilization by epoch: {utilization}"])
                part.save()

    part.job(measure)
    return lambda: "\n".join(["```", *texts, "```"])


def predict(part: Part) -> Table:
    found: dict[str, list[float]] = {}

    def measure(part: Part) -> None:
        run_dir, tiles, count = part.folder / "run", part.folder / "tiles", 16 if part.args.small else 10_000
        tiles.mkdir()
        with part.start("as it is") as ask:
            if ask("warm_up") is None or ask("make_tiles", str(tiles), count) is None:
                return
            calls = [partial(ask, "run", 0, str(run_dir)), partial(ask, "predict", str(run_dir), str(tiles))]
            for result in part.turns(0, calls):
                if "digests" not in result:
                    found.update(result)
                    part.save()

    part.job(measure)
    head = [f"`{MUON}`, PNG files of 32×32 pixels", "images/s"]
    return lambda: table(head, [[name, spread(values)] for name, values in found.items()])


# Kernels: the flags of runs, and whether they share a cache of programs, or load what one process has selected.
KERNELS = {
    "deterministic kernels": ("", "neither"),
    "any kernels, with the cache of programs": (ANY_KERNELS, "cache"),
    "any kernels, selected once": (ANY_KERNELS, "load"),
    "deterministic operations, kernels selected once": ("--xla_gpu_deterministic_ops=true", "load"),
}


def bits(part: Part) -> Table:
    rows: dict[str, list[str]] = {label: [MISSING] for label in KERNELS}

    def measure(part: Part, row: int, label: str) -> None:
        (flags, shared), folder = KERNELS[label], part.folder / str(row)
        selected, environment = folder / "kernels.pbtxt", dict[str, str]()
        folder.mkdir()

        def answers(name: str, flags: str, *questions: tuple[Any, ...]) -> list[Any]:
            with part.start("as it is", name=f"{label}, {name}", flags=flags, **environment) as ask:
                ready = ask("warm_up") is not None
                return list(part.turns(row, [partial(ask, *question) for question in questions if ready]))

        if shared == "cache":
            environment["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")
            environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"  # As on the command line.
        if shared == "load":
            answers("selection", f"{ANY_KERNELS} --xla_gpu_dump_autotune_results_to={selected}")
            flags += f" --xla_gpu_load_autotune_results_from={selected}" if selected.exists() else ""
        first, killed, second = (str(folder / name) for name in ("first", "killed", "second"))
        clock = [("train_seed", seed) for seed in range(1 if part.args.small else 3)]
        found = answers("process 1", flags, ("run", 0, first), *clock, ("run", 0, killed, True))
        found += answers("process 2", flags, ("run", 0, killed), ("run", 0, second))
        digests = [run["digests"] for run in found if "digests" in run]
        if len(digests) < 3:  # Of the first, the resumed and the second run.
            return
        same = ["the same bits" if digest == digests[0] else "**other bits**" for digest in digests]
        sessions = json.loads(Path(killed, "manifest.json").read_text())["sessions"]
        if len(sessions) < 2 or sessions[-1]["resumed_from"] is None:
            same[1] = "not tested: nothing was resumed"
        seconds = spread([run["seconds"][0] for run in found if "digests" not in run], ".3f")
        note = "XLA has written no selection" if shared == "load" and not selected.exists() else ""
        rows[label] = [same[2], same[1], seconds, note]
        print(label, *rows[label], *(digest["params"][:8] for digest in digests), sep=", ", flush=True)
        part.save()

    for row, label in enumerate(KERNELS):
        part.job(measure, row, label)
    head = [f"`{MUON}`", "two processes", "killed and resumed", "s, records' clock", ""]
    return lambda: table(head, [[label, *cells] for label, cells in rows.items()])


def start(part: Part) -> Table:
    rows: list[list[str]] = []

    def measure(part: Part) -> None:
        options = ["--num-epochs", "3", "--model.widths", "8", "16", "16"] if part.args.small else []
        run = partial(run_experiment, MUON, python=part.args.python, XDG_CACHE_HOME=str(part.folder), until=part.until)
        names = ("with compilation", "with the programs of the first start")
        calls = [partial(run, part.folder / name, *options) for name in names]
        for name, found in zip(names, part.turns(0, calls), strict=False):
            rows.append([name, f"{found.seconds:.1f}" if found.result else MISSING])
            print(*rows[-1], sep=", ", flush=True)
            part.save()

    part.job(measure)
    return lambda: table(["`cifar10_airbench94_muon`", "process start to result, s"], rows)


def agree(part: Part) -> Table:
    count, rows = 5 if part.args.small else 25, []

    def params(part: Part, name: str, **environment: str) -> np.ndarray:
        path = part.folder / f"{name}.npy"
        with part.start("as it is", "--recipe", "cifar10_cnn", name=name, **environment) as ask:
            return np.load(ask("first_steps", count, str(path)))

    def measure(part: Part) -> None:
        expected = params(part, "cpu", JAX_PLATFORMS="cpu")
        for label, precision in (("float32 with TF32 products, JAX's default", "default"), ("float32", "highest")):
            got = params(part, precision, JAX_DEFAULT_MATMUL_PRECISION=precision)
            rows.append([label, f"{np.linalg.norm(got - expected) / np.linalg.norm(expected):.1e}"])
            part.save()

    part.job(measure)
    head = [f"`cifar10_cnn`, parameters after {count} steps: GPU against CPU", "difference, relative to their norm"]
    return lambda: table(head, rows)


def tutorial(part: Part) -> Table:
    folders = [part.folder / f"seed{seed}" for seed in range(1 if part.args.small else 3)]

    def measure(part: Part) -> None:
        with part.start("as it is", "--recipe", TUTORIAL, name=TUTORIAL, flags=f"{GRAPHS},+WHILE") as ask:
            if ask("warm_up") is None:
                return
            calls = [partial(ask, "run", seed, str(folder)) for seed, folder in enumerate(folders)]
            for run in part.turns(0, calls):
                print(f"{TUTORIAL}: {run['accuracy']:.2%}, {run['seconds']} s", flush=True)
                part.save()
        part.save()

    def render() -> str:
        rows = []
        for seed, folder in enumerate(folders):
            if not (folder / "timing.jsonl").exists():
                continue
            epochs, timing = (read_lines(folder / f"{name}.jsonl") for name in ("metrics", "timing"))
            if not epochs or not timing:
                continue
            best = max(epochs, key=lambda row: row["validation_accuracy"])
            validation = [
                f"{best['validation_accuracy']:.2%} ({best['epoch']})",
                f"{epochs[-1]['validation_accuracy']:.2%}",
            ]
            path = folder / "result.json"
            score = f"{json.loads(path.read_text())['test_accuracy']:.2%}" if path.exists() else "not scored"
            rows.append([seed, len(epochs), score, *validation, f"{timing[-1]['seconds']:.0f}"])
        head = ["`cifar10_tutorial`, seed", "epochs", "test accuracy", "best validation (epoch)"]
        return table([*head, "validation of the last epoch", "training, s"], rows)

    part.job(measure)
    return render


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def seeds(part: Part) -> Table:
    """Training only: no whitening, no scores."""
    count = 2 if part.args.small else 4
    titles = {"as it is": f"`{MUON}`", "tutorial, 3 epochs": f"`{TUTORIAL}`, 3 epochs"}
    columns: dict[str, dict[str, list[float]]] = {title: {} for title in titles.values()}
    ways: list[str] = ["sequential", "vmap", "processes"]

    def measure(part: Part, row: int, variant: str) -> None:
        with ExitStack() as stack, ThreadPoolExecutor(16) as threads:
            asks = [stack.enter_context(part.start(variant, name=f"{variant}, {i}")) for i in range(2 + count)]
            groups = dict(zip(ways, (asks[:1], asks[1:2], asks[2:]), strict=True))

            def seconds(way: str, first_seed: int = 0) -> tuple[str, float] | None:
                """Trains all seeds; returns None if a worker failed."""
                begin, group = time.perf_counter(), groups[way]
                share, of_one = count // len(group), "sequential" if way == "processes" else way
                jobs = [
                    threads.submit(ask, "train_many", of_one, first_seed + i * share, share)
                    for i, ask in enumerate(group)
                ]
                failed = None in [job.result() for job in jobs]
                return None if failed else (way, time.perf_counter() - begin)

            with ThreadPoolExecutor(len(ways)) as together:  # Compiles.
                if None in list(together.map(seconds, ways, repeat(1_000_000))):
                    return
            calls = [partial(seconds, way) for _ in range(1 if part.args.small else 3) for way in ways]
            for way, value in part.turns(row, calls):
                columns[titles[variant]].setdefault(way, []).append(value)
                print(f"{variant}, {way}: {value:.2f} s", flush=True)
                part.save()

    for row, variant in enumerate(titles):
        part.job(measure, row, variant)

    def render() -> str:
        rows = []
        for way in ways:
            rows.append([way])
            for times in columns.values():
                values, base = times.get(way), times.get("sequential")
                share = f"{statistics.median(base) / statistics.median(values):.2f}" if values and base else ""
                rows[-1] += [spread(values, ".2f") if values else MISSING, share]
        head = [title for name in columns for title in (f"{name}, s", "× sequential")]
        return table([f"{count} seeds", *head], rows)

    return render


PARTS = {f.__name__: f for f in (ladder, bits, overhead, profile, predict, to_96, to_94, start, agree, seeds, tutorial)}
