"""How fast this package trains on this machine's CPU, beside its peers. `make bench` runs it: about 25 minutes.

    .venv/bin/python experiments/benchmark.py                # all parts but the last, one after another
    .venv/bin/python experiments/benchmark.py step sizes     # these parts

step       a training step of the tutorial's network at batch 128: cnnjax, plain Flax, PyTorch and Keras 3, alternating
sizes      the same of cnnjax at batch sizes from 32 to 512
layers     each convolution of the tutorial's network, forward and backward, beside the machine's own matrix product
accuracy   `cifar10_fast` from its first step to 78.5% and to 90% of CIFAR-10's test images, by 3 seeds
tutorial   the tutorial's Keras code from `fit` to 78.5%, by 3 seeds: hours more

A contender is a process of its own. Contenders take turns on the same images, so that a change of the machine's speed
meets all of them; a turn is one warm pass, synchronised at both ends. Peers live in an environment of their own,
.venv-peers, which `make bench` makes. Each part writes its table into experiments/BENCHMARKS.md.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from benchmark_contenders import CONTENDERS, NUM_IMAGES

ENVIRONMENT = dict(os.environ)  # Of the contenders: importing cnnjax adds flags for XLA to that of this process.
HERE = Path(__file__).parent
PEERS = HERE.parent / ".venv-peers" / "bin" / "python"
RUNNER = str(HERE / "benchmark_contenders.py")
SIZES = (32, 64, 128, 256, 512)
LAYERS = ((3, 32, 32), (32, 32, 32), (32, 64, 16), (64, 64, 16))  # Channels in and out, height and width.

# --- Parts: each returns a table --------------------------------------------------------------------------------------


def take_turns(names: list[str], sizes: tuple[int, ...], turns: int) -> dict[tuple[str, int], list[float]]:
    """Returns the images a second of each contender and batch size, turn by turn."""
    speed = {(name, size): [] for name in names for size in sizes}
    with contextlib.ExitStack() as stack:
        processes = {}
        for name in names:
            command = [python(name), RUNNER, "pass", name]
            pipe = subprocess.PIPE
            process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=ENVIRONMENT
            )
            processes[name] = stack.enter_context(process)
        for turn in range(-1, turns):  # One more to warm up: it compiles.
            for (name, size), values in speed.items():
                print(f"\rturn {max(turn, 0)} of {turns}: {name}, batch {size}" + 20 * " ", end="", file=sys.stderr)
                process = processes[name]
                process.stdin.write(f"{size}\n")
                process.stdin.flush()
                line = next((line for line in process.stdout if line.startswith("seconds ")), None)
                if line is None:
                    sys.exit(f"\n`{name}` ended without a result. See: {python(name)} {RUNNER} pass '{name}'")
                if turn >= 0:
                    values.append(NUM_IMAGES / float(line.split()[1]))
        print(file=sys.stderr)
        for process in processes.values():
            process.stdin.close()
    return speed


def python(name: str) -> str:
    return str(PEERS) if CONTENDERS[name][1] else sys.executable


def spread(values: list[float], form: str = ",.0f") -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def contenders() -> list[str]:
    """Returns all, but for those in bfloat16 where the processor emulates it: a pass would take minutes."""
    from cnnjax.layers.onednn import HAS_BFLOAT16

    return [name for name in CONTENDERS if HAS_BFLOAT16 or "bfloat16" not in name]


def step(turns: int) -> str:
    names = contenders()
    speed = take_turns(names, (128,), turns)
    ours = [name for name in names if name.startswith("cnnjax")]
    lines = [
        f"| batch 128 | images/s | {' | '.join(f'{our} is' for our in ours)} |",
        f"| --- | --- |{' --- |' * len(ours)}",
    ]
    for name in names:
        values, how = speed[name, 128], CONTENDERS[name][0]
        pairs = (zip(speed[our, 128], values, strict=True) for our in ours)
        ratios = " | ".join(f"{statistics.median(a / b for a, b in pair):.2f} ×" for pair in pairs)
        lines.append(f"| {f'{name}: {how}' if how else name} | {spread(values)} | {ratios} |")
    return "\n".join(lines)


def sizes(turns: int) -> str:
    names = [name for name in contenders() if name.startswith("cnnjax")]
    speed = take_turns(names, SIZES, turns)
    lines = [
        f"| images/s at batch | {' | '.join(map(str, SIZES))} | the slowest, of the fastest |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in names:
        medians = [statistics.median(speed[name, size]) for size in SIZES]
        cells = " | ".join(spread(speed[name, size]) for size in SIZES)
        lines.append(f"| {name} | {cells} | {min(medians) / max(medians):.0%} |")
    return "\n".join(lines)


def layers(turns: int) -> str:
    import jax
    import jax.numpy as jnp

    from cnnjax.layers.conv import conv2d

    rng, batch, same, n = np.random.default_rng(0), 128, ((1, 1), (1, 1)), 2048

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    @jax.jit
    def both_ways(image, kernel, bias, g):
        y, vjp = jax.vjp(lambda *a: conv2d(*a, same, True), image, kernel, bias)
        grads = vjp(g)
        return y, grads if image.shape[3] > 3 else grads[1:]  # Nothing needs the gradient of the images themselves.

    @jax.jit
    def forward(image, kernel, bias, g):
        return conv2d(image, kernel, bias, same, True)

    @jax.jit
    def image_gradient(image, kernel, bias, g):
        return jax.vjp(lambda image: conv2d(image, kernel, bias, same, False), image)[1](g)

    @jax.jit
    def kernel_gradient(image, kernel, bias, g):
        return jax.vjp(lambda kernel: conv2d(image, kernel, bias, same, False), kernel)[1](g)

    alone = {"forward": forward, "the image's gradient": image_gradient, "the kernel's gradient": kernel_gradient}
    work = {("matrix product", "float32"): (jax.jit(jnp.dot), (normal(n, n), normal(n, n)), 2 * n**3)}
    for dtype in ("float32", "bfloat16"):
        for c, k, h in LAYERS:
            image, g = normal(batch, h, h, c).astype(dtype), normal(batch, h, h, k).astype(dtype)
            arguments = (image, normal(3, 3, c, k), normal(k), g)
            flops = 2 * batch * h * h * 9 * c * k
            work[f"{c} → {k} at {h}×{h}", dtype] = (both_ways, arguments, flops * (3 if c > 3 else 2))
            for name, function in alone.items():
                if c > 3:
                    work[f"{name} at {h}×{h} of {c} → {k}", dtype] = (function, arguments, flops)
    seconds = {name: [] for name in work}
    for turn in range(-1, turns):
        for name, (function, arguments, flops) in work.items():
            repeats = max(2, int(2e10 / flops))
            start = time.perf_counter()
            for _ in range(repeats):
                jax.block_until_ready(function(*arguments))
            if turn >= 0:
                seconds[name].append((time.perf_counter() - start) / repeats)

    def rate(names: list[tuple[str, str]]) -> list[float]:
        flops = sum(work[name][2] for name in names)
        return [flops / sum(turn) / 1e9 for turn in zip(*(seconds[name] for name in names), strict=True)]

    product = rate([("matrix product", "float32")])
    lines = [
        "| forward and backward, batch 128 | float32, GFLOP/s | of the matrix product | bfloat16, GFLOP/s |",
        "| --- | --- | --- | --- |",
    ]
    rows = {f"{c} → {k} at {h}×{h}": [f"{c} → {k} at {h}×{h}"] for c, k, h in LAYERS}
    rows["all four together"] = list(rows)
    for name in alone:
        rows[f"of the last three, {name} alone"] = [f"{name} at {h}×{h} of {c} → {k}" for c, k, h in LAYERS[1:]]
    for label, row in rows.items():
        single, half = (rate([(name, dtype) for name in row]) for dtype in ("float32", "bfloat16"))
        share = statistics.median(a / b for a, b in zip(single, product, strict=True))
        lines.append(f"| {label} | {spread(single)} | {share:.0%} | {spread(half)} |")
    return "\n".join([*lines, f"| float32 matrix product, {n}×{n}×{n} | {spread(product)} | 100% | |"])


def accuracy(seeds: int) -> str:
    lines = [
        "| `cifar10_fast` | test accuracy | training, s | process start to result, s | peak memory |",
        "| --- | --- | --- | --- | --- |",
    ]
    for options in (["--num-epochs", "1"], ["--num-epochs", "2"], []):
        results = []
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                run = f"{folder}/run"
                command = [
                    sys.executable,
                    str(HERE / "cifar10_fast.py"),
                    "--seed",
                    str(seed),
                    "--run-dir",
                    run,
                    *options,
                ]
                start = time.perf_counter()
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
                if process.returncode:
                    sys.exit(f"`{' '.join(command)}` ended with {process.returncode}.")
                result = json.loads(Path(run, "result.json").read_text())
                wall, memory = time.perf_counter() - start, usage.ru_maxrss / 2**20  # ru_maxrss is in KiB.
                results.append((100 * result["test_accuracy"], result["training_seconds"], wall, memory))
                print(f"seed {seed}: {result['test_accuracy']:.2%}, {wall:.0f} s", file=sys.stderr)
        accuracies, training, walls, memories = zip(*results, strict=True)
        deviation = f" ± {statistics.stdev(accuracies):.2f}" if seeds > 1 else ""
        scores = f"{statistics.mean(accuracies):.2f}%{deviation} ({', '.join(f'{a:.2f}' for a in accuracies)})"
        times = (
            f"{statistics.mean(values):.0f} ({min(values):.0f} to {max(values):.0f})" for values in (training, walls)
        )
        label = " ".join(options) or "as it is"
        lines.append(f"| {label} | {scores} | {' | '.join(times)} | {max(memories):.2f} GiB |")
    return "\n".join(lines)


def tutorial(seeds: int) -> str:
    from cnnjax import load_dataset

    splits = {split: load_dataset("cifar10").load(split) for split in ("train", "test")}
    arrays = {f"{split}_{name}": getattr(splits[split], name) for split in splits for name in ("image", "label")}
    lines = [
        "| the tutorial's Keras code to 78.5% or epoch 200, seed | epochs | test accuracy | training, s | s an epoch |",
        "| --- | --- | --- | --- | --- |",
    ]
    totals = []
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/cifar10.npz", **arrays)
        for seed in range(seeds):
            command = [PEERS, RUNNER, "keras", str(seed), f"{folder}/cifar10.npz"]
            text = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=ENVIRONMENT).stdout
            result = json.loads(next(line[7:] for line in text.splitlines() if line.startswith("result ")))
            totals.append(sum(result["seconds"]))
            cells = f"{len(result['seconds'])} | {result['accuracies'][-1]:.2%} | {totals[-1]:.0f}"
            lines.append(f"| {seed} | {cells} | {spread(result['seconds'], '.1f')} |")
    return "\n".join([*lines, f"| mean | | | {statistics.mean(totals):.0f} | |"])


PARTS = {"step": step, "sizes": sizes, "layers": layers, "accuracy": accuracy, "tutorial": tutorial}

# --- The report -------------------------------------------------------------------------------------------------------


REPORT = HERE / "BENCHMARKS.md"


def section(name: str) -> re.Pattern[str]:
    """Returns what finds a part in BENCHMARKS.md: (the line that begins it)(its table)(the line that ends it)."""
    return re.compile(f"(<!-- {name} -->\n)(.*?)(<!-- end of {name} -->\n)", re.DOTALL)


def check_sections(names: list[str]) -> None:
    """Ends the process where BENCHMARKS.md has no place for a part: before hours of measuring."""
    for name in names:
        if (count := len(section(name).findall(REPORT.read_text()))) != 1:
            sys.exit(f"{REPORT} must have a line <!-- {name} --> and a line <!-- end of {name} --> once, got {count}.")


def write_section(name: str, table: str, about: str) -> None:
    """Replaces the table of a part in BENCHMARKS.md, and says of what it was measured."""
    text = section(name).sub(lambda found: f"{found[1]}{table}\n\n{about}\n{found[3]}", REPORT.read_text())
    REPORT.write_text(text)


def describe(peers: Path) -> str:
    """Returns date, hardware, versions (those of the peers' environment, too) and commit, as a sentence."""
    from importlib.metadata import version

    import jax

    from cnnjax.experiment import device
    from cnnjax.runs.manifest import source_code

    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    units = [
        name for name in ("avx512f", "avx512_bf16", "amx_bf16") if cpuinfo.exists() and name in cpuinfo.read_text()
    ]
    names = ("jax", "jaxlib", "flax", "optax", "numpy")
    versions = [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)]
    if peers.exists():
        text = subprocess.check_output([peers, "-m", "pip", "list", "--format", "freeze"], text=True)
        versions += [
            line.replace("==", " ") for line in text.split() if re.match(r"(torch|keras|tensorflow[_a-z-]*)==", line)
        ]
    code, _ = source_code()
    commit = (code["commit"] or "unknown")[:7] + (" with changes" if code["dirty"] else "")
    date = time.strftime("%Y-%m-%d")
    return (
        f"{date}, {device(jax.devices()[0])}: {models[0] if models else platform.processor()} ({', '.join(units)}); "
        f"{', '.join(versions)}; jax on {jax.default_backend()}; commit {commit}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all but the last when none is named"
    )
    parser.add_argument("--turns", type=int, default=7, help="of step, sizes and layers")
    parser.add_argument("--num-seeds", type=int, default=3, help="of accuracy and tutorial")
    args = parser.parse_args()
    parts = args.parts or list(PARTS)[:-1]
    if unknown := set(parts) - set(PARTS):
        parser.error(f"`PART` must be of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}.")
    if not PEERS.exists() and {"step", "tutorial"} & set(parts):
        parser.error(f"The peers must be installed in {PEERS.parent.parent}. Use: make bench ARGS='{' '.join(parts)}'")
    check_sections(parts)
    about = describe(PEERS)  # Before the first table changes a file of the commit.
    for part in parts:
        table = PARTS[part](args.num_seeds if part in ("accuracy", "tutorial") else args.turns)
        print(f"\n{table}\n", flush=True)
        write_section(part, table, about)
    return print(about)


if __name__ == "__main__":
    main()
