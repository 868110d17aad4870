"""How fast the records' accuracies are reached on one GPU, beside airbench itself. `make bench-gpu` runs it.

    .venv/bin/python experiments/benchmark_gpu.py            # all parts: about an hour, most of it airbench's
    .venv/bin/python experiments/benchmark_gpu.py clock      # these parts
    .venv/bin/python experiments/benchmark_gpu.py --small    # tries every part of cnnjax in some minutes, on a CPU

clock      94% and 96%: each recipe by many seeds, on the records' own clock; a seed before them warms up
airbench   airbench94_muon.py and airbench96 by their author's scripts, from his repository, on the same clock
flags      the recipe for 94% under XLA's flags for CUDA graphs, and without the deterministic kernels
start      process start to result of the recipe for 94%, with what XLA compiled before
tutorial   the tutorial's network, 200 epochs at batch 32

The records' clock runs from the whitening of the first layer, through all epochs, to the score of the test set by six
views; loading, the copy to the device, compilation and warm-up come before. It is synchronised at both ends. Each part
writes its table into experiments/BENCHMARKS.md.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from benchmark import ENVIRONMENT, HERE, check_sections, describe, write_section

from cnnjax import Config, load_dataset

PEERS = HERE.parent / ".venv-peers-gpu" / "bin" / "python"
REPOSITORY = "https://github.com/KellerJordan/cifar10-airbench"
RECIPES = {"cifar10_airbench94_muon": 50, "cifar10_airbench94": 50, "cifar10_airbench96": 10}  # Seeds.
SCRIPTS = {"airbench94_muon.py": 50, "legacy/airbench96.py": 10, "airbench96_faster.py": 10}  # Runs.
FLAGS = (
    "",
    "--xla_gpu_deterministic_ops=false",
    "--xla_gpu_enable_command_buffer=+CONVOLUTION",
    "--xla_gpu_enable_command_buffer=+CONVOLUTION,+WHILE",
)
HEAD = "| {} | test accuracy | 95% interval | s, records' clock | runs |\n| --- | --- | --- | --- | --- |"


def contend(config: Config, seeds: int) -> None:
    """Prints the accuracy and the seconds of each seed, in one process."""
    import jax
    import jax.numpy as jnp

    from cnnjax.batches import Pixels, standardize
    from cnnjax.epoch import evaluate
    from cnnjax.experiment import set_up
    from cnnjax.report import Report
    from cnnjax.step import init_state
    from cnnjax.whitening import NUM_IMAGES, whiten
    from cnnjax.xla import use_compilation_cache

    use_compilation_cache(print)
    run, _, _ = set_up(config, Path("unused"), None, None, Report(quiet=True))
    pixels = run.train.standardization
    test = jax.device_put(Pixels(*run.dataset.load("test"), pixels), run.placement.state)
    for seed in range(-1, seeds):  # The first warms up.
        init_key, train_key = jax.random.split(jax.random.key(seed % 2**32))
        run = run._replace(config=replace(config, seed=seed % 2**32), train_key=train_key)
        state = init_state(init_key, jnp.zeros((1, *run.train.image.shape[1:])), model=run.model, tx=run.tx)
        jax.block_until_ready(state)
        start = time.perf_counter()
        state = whiten(state, standardize(run.train.image[:NUM_IMAGES], pixels))
        step, steps = 0, run.steps_per_epoch * config.num_epochs
        plan = run.plan(step)
        while step < steps:
            state, _ = run.train_steps(state, plan)
            step += run.steps_per_dispatch
            if step < steps:
                plan = run.plan(step)  # While the device works.
        scores = evaluate(state, test, model=run.model, views=config.views)  # Waits for the device.
        if seed >= 0:
            print("result", scores.accuracy, time.perf_counter() - start, flush=True)


def results(
    command: list[str], count: int, environment: dict[str, str], pattern: str, folder: Path
) -> list[list[float]]:
    """Runs a process until it has printed `count` lines of the pattern; returns accuracies and seconds."""
    found = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder) as process:
        for line in process.stdout:
            if match := re.match(pattern, line):
                found.append((100 * float(match[1]), float(match[2])))
                print(f"\r{' '.join(command[1:3])}: run {len(found)} of {count}", end="", file=sys.stderr)
            if len(found) == count:
                break
        process.kill()
    print(file=sys.stderr)
    if len(found) < count:
        sys.exit(f"`{' '.join(command)}` ended after {len(found)} of {count} runs.")
    return [list(column) for column in zip(*found, strict=True)]


def line_of(label: str, accuracies: list[float], seconds: list[float]) -> str:
    n = len(accuracies)
    half = 1.96 * statistics.stdev(accuracies) / n**0.5 if n > 1 else float("nan")
    times = f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
    return f"| {label} | {statistics.mean(accuracies):.2f}% | ± {half:.2f} | {times} | {n} |"


def ours(name: str, seeds: int, small: bool, flags: str = "") -> list[list[float]]:
    command = [sys.executable, __file__, "--contend", name, str(seeds), *(["--small"] if small else [])]
    environment = ENVIRONMENT | {"XLA_FLAGS": f"{ENVIRONMENT.get('XLA_FLAGS', '')} {flags}".strip()}
    return results(command, seeds, environment, r"result (\S+) (\S+)", HERE)


def clock(small: bool, airbench: str | None) -> str:
    lines = [line_of(name, *ours(name, 2 if small else seeds, small)) for name, seeds in RECIPES.items()]
    return "\n".join([HEAD.format("cnnjax"), *lines])


def airbench(small: bool, airbench: str | None) -> str:
    if small:
        return "Left out: it needs a GPU."
    if not PEERS.exists():
        sys.exit(f"PyTorch must be installed in {PEERS.parent.parent}. Use: make bench-gpu")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(airbench or f"{temporary}/airbench")
        if airbench is None:
            subprocess.run(["git", "clone", "--quiet", "--depth", "1", REPOSITORY, folder], check=True)
        commit = subprocess.check_output(["git", "-C", folder, "rev-parse", "--short", "HEAD"], text=True).strip()
        data = Path(temporary, "work", "cifar10")
        data.mkdir(parents=True)
        for split in ("train", "test"):  # As its loader writes them, which would download the set.
            examples = load_dataset("cifar10").load(split)
            np.savez(data / f"{split}.npz", images=examples.image, labels=examples.label.astype(np.int64))
            code = (
                "import sys, numpy, torch; a = numpy.load(sys.argv[1] + '.npz'); "
                "b = {name: torch.tensor(a[name]) for name in ('images', 'labels')} | {'classes': list('0123456789')}; "
                "torch.save(b, sys.argv[1] + '.pt')"
            )
            subprocess.run([PEERS, "-c", code, data / split], check=True)
        lines = []
        # Of its table: run, epoch, and at last the accuracy by six views and the seconds of the whole run.
        pattern = r"\|.*\|\s+(0\.\d+)\s+\|\s+(\d+\.\d+)\s+\|\s*$"
        for script, runs in SCRIPTS.items():
            found = results([str(PEERS), str(folder / script)], runs + 1, ENVIRONMENT, pattern, data.parent)
            lines.append(line_of(script, *(column[1:] for column in found)))  # The first warms up.
    return "\n".join([HEAD.format(f"airbench, commit {commit}"), *lines])


def flags(small: bool, airbench: str | None) -> str:
    seeds = 1 if small else 10
    lines = [line_of(f"`{set_ or 'as it is'}`", *ours("cifar10_airbench94_muon", seeds, small, set_)) for set_ in FLAGS]
    return "\n".join([HEAD.format("cifar10_airbench94_muon under flags"), *lines])


def start(small: bool, airbench: str | None) -> str:
    options = ["--num-epochs", "1", "--model.widths", "8", "16", "16"] if small else []
    with tempfile.TemporaryDirectory() as cache:  # Empty, so that the first start compiles.
        environment = ENVIRONMENT | {"XDG_CACHE_HOME": cache}
        runs = [train("cifar10_airbench94_muon", options, environment) for _ in range(2 if small else 4)]
    later = [wall for wall, _ in runs[1:]]
    times = f"{statistics.median(later):.1f} ({min(later):.1f} to {max(later):.1f})"
    return (
        f"Process start to result of `cifar10_airbench94_muon`: {runs[0][0]:.1f} s, then, compiled before, {times} s."
    )


def tutorial(small: bool, airbench: str | None) -> str:
    options = ["--num-epochs", "1", "--batch-size", "512"] if small else []
    wall, result = train("cifar10_tutorial", options, ENVIRONMENT)
    return (
        f"`cifar10_tutorial`, {result['num_epochs']} epochs: {result['training_seconds']:.0f} s of training, "
        f"{wall:.0f} s from process start to result, {result['test_accuracy']:.2%} on the test set."
    )


def train(experiment: str, options: list[str], environment: dict[str, str]) -> tuple[float, dict]:
    """Returns the seconds of a whole process, and its result."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE / f"{experiment}.py"), "--run-dir", f"{folder}/run", *options]
        begin = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        return time.perf_counter() - begin, json.loads(Path(folder, "run", "result.json").read_text())


PARTS = {"clock": clock, "airbench": airbench, "flags": flags, "start": start, "tutorial": tutorial}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all when none is named")
    parser.add_argument("--small", action="store_true", help="try the parts at small size; writes nothing")
    parser.add_argument(
        "--airbench", metavar="DIR", help="a checkout of airbench's repository, where it is out of reach"
    )
    parser.add_argument("--contend", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contend:
        import importlib

        config = importlib.import_module(args.contend[0]).CONFIG
        if args.small:
            config = replace(config, num_epochs=1, model=replace(config.model, widths=(8, 16, 16)))
        return contend(config, int(args.contend[1]))
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"`PART` must be of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}.")
    import jax

    if not args.small and jax.default_backend() != "gpu":
        parser.error(f"jax must see a GPU, got {jax.default_backend()}. Install cnnjax[cuda], or try --small.")
    if not args.small:
        check_sections([f"gpu {part}" for part in args.parts or PARTS])
        about = describe(PEERS)
    for part in args.parts or PARTS:
        table = PARTS[part](args.small, args.airbench)
        print(f"\n{table}\n", flush=True)
        if not args.small:
            write_section(f"gpu {part}", table, about)
    return None


if __name__ == "__main__":
    main()
