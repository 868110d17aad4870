"""How fast the records' accuracies are reached on one GPU, beside airbench itself. `make bench-gpu` runs it.

    make bench-gpu                         # all parts: up to an hour each for four of them
    make bench-gpu ARGS="ladder clock"     # these parts
    make bench-gpu ARGS=--small            # tries every part of cnnjax, on a CPU
    make bench-gpu ARGS="--python python3 --peers python3 --airbench airbench --into out"    # without a registry

ladder     the recipe for 94% with one thing done differently at a time: flags of XLA, network, optimizer, program
clock      94% and 96%: each recipe by many seeds, on the records' own clock, with deterministic kernels and with any
profile    what the device does in one warm run of the recipe for 94%: kernels by their share, and idle time
airbench   airbench94_muon and airbench96 by their author's scripts, on the same clock
bits       the recipe for 94% in two processes, and killed and resumed: the same digests? And process start to result
agree      the first 25 steps of cifar10_cnn on the CPU and on the GPU
tutorial   the tutorial's network, 200 epochs at batch 32

The records' clock runs from the whitening of the first layer, through all epochs, to the score of the test set by its
views; loading, the copy to the device, compilation and warm-up come before. It is synchronised at both ends. Results
are printed as they come; each part writes its table into experiments/BENCHMARKS.md, or into the folder of --into.
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from benchmark import ENVIRONMENT, HERE, check_sections, spread, write_section
from benchmark_gpu_process import Contender, command_line, line_of
from benchmark_gpu_variants import ANY_KERNELS, MUON, VARIANTS

from cnnjax import load_dataset

PEERS = HERE.parent / ".venv-peers-gpu" / "bin" / "python"
REPOSITORY = "https://github.com/KellerJordan/cifar10-airbench"
RECIPES = {MUON: 50, "cifar10_airbench94": 50, "cifar10_airbench96": 10}  # Seeds.
SCRIPTS = {"airbench94_muon.py": 50, "legacy/airbench96.py": 10, "airbench96_faster.py": 10}  # Runs.
HEAD = "| {} | test accuracy | 95% interval | s, records' clock | runs |\n| --- | --- | --- | --- | --- |"
TOGETHER = 10  # Contenders that compile, and lie on the GPU, at a time: each needs 4 GB.


# --- Parts: each returns a table --------------------------------------------------------------------------------------


def ladder(args: argparse.Namespace) -> str:
    """Scores held-out images: choices are not made on the test set."""
    until, done = time.monotonic() + args.seconds, []
    names = args.variants or list(VARIANTS)
    with tempfile.TemporaryDirectory() as cache:
        for i in range(0, len(names), TOGETHER):
            wave = []
            for name in names[i : i + TOGETHER]:
                # Autotuning beside others is noisy; variants with the same flags share what it picked.
                folder = Path(cache, re.sub(r"\W+", "", VARIANTS[name].flags) or "default")
                folder.mkdir(exist_ok=True)
                flag = f"--xla_gpu_per_fusion_autotune_cache_dir={folder}"
                log = Path(cache, f"{len(done) + len(wave)}.log")
                wave.append(Contender(args, name, "--config", '{"validation_fraction": 0.1}', flags=flag, log=log))
            share = (until - time.monotonic()) * min(1.0, TOGETHER / (len(names) - i))
            last = time.monotonic() + 0.8 * share  # Contenders that have not compiled by then are skipped.
            ready = [contender for contender in wave if contender.wait(last)]
            for seed in range(1 if args.small else 3):
                for contender in ready:
                    contender.train(seed, until)
            for contender in wave:
                contender.close()
            done += wave
        if args.into:
            for i, contender in enumerate(done):
                shutil.copy(Path(cache, f"{i}.log"), args.into / f"{re.sub(r'[^a-z0-9]+', '_', contender.name)}.log")
    lines = ["| variant | s, records' clock | of `as it is` | validation accuracy | seeds | s to compile |"]
    lines.append("|" + " --- |" * 6)
    base = next((statistics.median(c.seconds()) for c in done if c.results and c.name == "as it is"), None)
    for contender in done:
        if not (times := contender.seconds()):
            lines.append(f"| {contender.name} | failed, or out of time | | | | |")
            continue
        accuracy = statistics.mean(result[0] for result in contender.results)
        comparable = base is not None and VARIANTS[contender.name].recipe == MUON
        ratio = f"{statistics.median(times) / base:.2f} ×" if comparable else "–"
        cells = f"{spread(times, '.3f')} | {ratio} | {accuracy:.2%} | {len(times)} | {contender.ready:.0f}"
        lines.append(f"| {contender.name} | {cells} |")
    return "\n".join(lines)


def clock(args: argparse.Namespace) -> str:
    lines, until = [HEAD.format("cnnjax")], time.monotonic() + args.seconds
    for recipe, seeds in RECIPES.items():
        contenders = [Contender(args, variant, "--recipe", recipe) for variant in ("as it is", "any kernels")]
        for contender in [c for c in contenders if c.wait(until)]:
            for seed in range(2 if args.small else args.seeds or seeds):
                contender.train(seed, until)
        for contender, kernels in zip(contenders, ("deterministic kernels", "any kernels"), strict=True):
            contender.close()
            done = contender.results
            lines.append(
                contender.line(f"`{recipe}`, {kernels}") if done else f"| `{recipe}`, {kernels} | failed | | | |"
            )
    return "\n".join(lines)


def profile(args: argparse.Namespace) -> str:
    with tempfile.TemporaryDirectory() as folder:
        until = time.monotonic() + args.seconds
        contender = Contender(args, "any kernels")
        lines = contender.profile(Path(folder), until) if contender.wait(until) else ["It did not compile in time."]
        contender.close()
    return "\n".join(["```", *lines, "```"])


def airbench(args: argparse.Namespace) -> str:
    if args.small:
        return "Left out: it needs a GPU."
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.airbench or f"{temporary}/airbench").resolve()
        if args.airbench is None:
            subprocess.run(["git", "clone", "--quiet", "--depth", "1", REPOSITORY, folder], check=True)
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
            subprocess.run([args.peers, "-c", code, data / split], check=True)
        lines, until = [HEAD.format("airbench")], time.monotonic() + args.seconds
        for script, runs in SCRIPTS.items():
            found = airbench_runs([args.peers, str(folder / script)], (args.seeds or runs) + 1, data.parent, until)
            # The first warms up.
            lines.append(
                line_of(script, *(c[1:] for c in found))
                if found and len(found[0]) > 1
                else f"| {script} | failed, or out of time | | | |"
            )
    return "\n".join(lines)


def airbench_runs(command: list[str], count: int, folder: Path, until: float) -> list[list[float]]:
    """Runs one of its scripts until it has printed `count` results, or for the instant; returns accuracies, seconds."""
    found = []
    # Of its table: run, epoch, and at last the accuracy by six views and the seconds of the whole run.
    pattern = r"\|.*\|\s+(0\.\d+)\s+\|\s+(\d+\.\d+)\s+\|\s*$"
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=folder) as process:
        timer = threading.Timer(max(0.0, until - time.monotonic()), process.kill)
        timer.start()
        for line in process.stdout:
            if match := re.match(pattern, line):
                found.append((100 * float(match[1]), float(match[2])))
                print(f"{Path(command[1]).name}: {found[-1][0]:.2f}%, {found[-1][1]} s", flush=True)
            if len(found) == count:
                break
        timer.cancel()
        process.kill()
    return [list(column) for column in zip(*found, strict=True)]


def bits(args: argparse.Namespace) -> str:
    options = ["--num-epochs", "3", "--model.widths", "8", "16", "16"] if args.small else []
    lines = ["| `cifar10_airbench94_muon` | two processes | killed and resumed | s, first start | s, second start |"]
    lines.append("|" + " --- |" * 5)
    for label, flags in (("deterministic kernels", ""), ("any kernels", ANY_KERNELS)):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            environment = ENVIRONMENT | {
                "XDG_CACHE_HOME": str(folder),  # Empty, so that the first start compiles.
                "XLA_FLAGS": f"{ENVIRONMENT.get('XLA_FLAGS', '')} {flags}".strip(),
            }
            runs = [command_line(MUON, folder / run, options, environment) for run in ("first", "second")]
            _, early = command_line(MUON, folder / "killed", options, environment, kill="epoch 2/")
            runs.append(command_line(MUON, folder / "killed", [*options, "--resume"], environment))
        cells = []
        for _, result in runs[1:]:
            same = None not in (runs[0][1], result) and result["sha256"] == runs[0][1]["sha256"]
            cells.append("failed" if None in (runs[0][1], result) else "the same bits" if same else "**other bits**")
        if early is not None:
            cells[1] = "not tested: it ended before the kill"
        cells += [f"{wall:.1f}" for wall, _ in runs[:2]]
        lines.append(f"| {label} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def agree(args: argparse.Namespace) -> str:
    lines = [
        "| `cifar10_cnn`, parameters after 25 steps: GPU against CPU | difference, of their norm |",
        "| --- | --- |",
    ]
    with tempfile.TemporaryDirectory() as folder:

        def run(name: str, **environment: str) -> np.ndarray:
            file = f"{folder}/{name}.npy"
            command = [sys.executable, str(HERE / "benchmark_gpu_contender.py"), "--recipe", "cifar10_cnn"]
            subprocess.run([*command, "--first-steps", "25", file], check=True, env=ENVIRONMENT | environment)
            return np.load(file)

        wanted = run("cpu", JAX_PLATFORMS="cpu")
        for label, precision in (("float32 with TF32 products, JAX's default", "default"), ("float32", "highest")):
            got = run(precision, JAX_DEFAULT_MATMUL_PRECISION=precision)
            lines.append(f"| {label} | {np.linalg.norm(got - wanted) / np.linalg.norm(wanted):.1e} |")
    return "\n".join(lines)


def tutorial(args: argparse.Namespace) -> str:
    options = ["--num-epochs", "1", "--batch-size", "512"] if args.small else []
    lines = ["| `cifar10_tutorial`, seed | epochs | test accuracy | training, s | process start to result, s |"]
    lines.append("|" + " --- |" * 5)
    for seed in range(1 if args.small else 3):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder, "run")
            wall, result = command_line("cifar10_tutorial", run, ["--seed", str(seed), *options], ENVIRONMENT)
        cells = "failed | | "
        if result is not None:
            accuracy, training = f"{result['test_accuracy']:.2%}", f"{result['training_seconds']:.0f}"
            cells = f"{result['num_epochs']} | {accuracy} | {training}"
        lines.append(f"| {seed} | {cells} | {wall:.0f} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


PARTS = {
    "ladder": ladder,
    "clock": clock,
    "profile": profile,
    "airbench": airbench,
    "bits": bits,
    "agree": agree,
    "tutorial": tutorial,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all when none is named")
    parser.add_argument("--small", action="store_true", help="try the parts at small size; BENCHMARKS.md stays")
    parser.add_argument(
        "--python", metavar="PYTHON", help="runs cnnjax instead of this Python: one that has jax for the GPU"
    )
    parser.add_argument("--peers", metavar="PYTHON", default=str(PEERS), help="runs airbench: one that has PyTorch")
    parser.add_argument("--airbench", metavar="DIR", help="airbench's sources, where its repository is out of reach")
    parser.add_argument("--into", metavar="DIR", type=Path, help="write the tables there, not into BENCHMARKS.md")
    parser.add_argument(
        "--seconds", type=float, default=3600.0, help="limit of each of ladder, clock, profile, airbench"
    )
    parser.add_argument(
        "--seeds", type=int, help="of the clock and of airbench, instead of 50 for 94%% and 10 for 96%%"
    )
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, metavar="NAME", help="of the ladder, instead of all; after the parts"
    )
    args = parser.parse_args()
    if args.python and "CNNJAX_BENCH_PYTHON" not in os.environ:
        if (python := shutil.which(args.python)) is None:
            parser.error(f"`--python` must be an interpreter, got {args.python}.")
        path = os.pathsep.join(filter(None, [str(HERE.parent.resolve()), os.environ.get("PYTHONPATH")]))
        environment = ENVIRONMENT | {"PYTHONPATH": path, "CNNJAX_BENCH_PYTHON": python}
        os.execve(python, [python, *sys.argv], environment)
    parts = args.parts or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"`PART` must be of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}.")
    if "airbench" in parts and not args.small and shutil.which(args.peers) is None:
        parser.error(f"PyTorch must be installed for {args.peers}. Use: make bench-gpu")
    if not args.small:
        query = "import jax; print(jax.default_backend())"  # In a process of its own: jax would take the GPU's memory.
        backend = subprocess.check_output([sys.executable, "-c", query], text=True, env=ENVIRONMENT).strip()
        if backend != "gpu":
            parser.error(f"jax must see a GPU, got {backend}. Install cnnjax[cuda], or try --small.")
    if args.into:
        try:
            args.into.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"`--into` must be a folder that can be made, got {args.into} ({error.strerror}).")
    elif not args.small:
        check_sections([f"gpu {part}" for part in parts])
    about = "" if args.small else describe_gpu(args.peers)
    for part in parts:
        table = PARTS[part](args)
        print(f"\n{table}\n", flush=True)
        if args.into:
            (args.into / f"{part}.md").write_text(f"{table}\n\n{about}\n")
        elif not args.small:
            write_section(f"gpu {part}", table, about)


def describe_gpu(peers: str) -> str:
    """Returns what `describe` does, of a process that ends: this one must leave the GPU's memory alone."""
    path = shutil.which(peers) or "-"
    code = f"from pathlib import Path; from benchmark import describe; print(describe(Path({path!r})))"
    environment = ENVIRONMENT | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return subprocess.check_output([sys.executable, "-c", code], text=True, env=environment, cwd=HERE).strip()


if __name__ == "__main__":
    main()
