"""Measures how fast this package trains on this machine's CPU, beside its peers. `make bench` runs it: half an hour.

    .venv/bin/python experiments/benchmarks/cpu.py                # all parts except the last
    .venv/bin/python experiments/benchmarks/cpu.py step sizes     # these parts
    .venv/bin/python experiments/benchmarks/cpu.py --small        # try them at a small size

step       a training step of the tutorial's network at batch size 128: cnnjax, plain Flax, PyTorch and Keras 3
speednet   a training step of `cifar10_fast`, and of its network in PyTorch with SGD
residual   a training step of a user's network of Flax's layers, with jax's convolution and with cnnjax's; in PyTorch
sizes      a step of the tutorial's network in cnnjax at batch sizes from 32 to 512
layers     each convolution of the tutorial's network, forward and backward, beside a matrix product
accuracy   `cifar10_fast` from its first step to 78.5% and to 90% of CIFAR-10's test images, 3 seeds
tutorial   the tutorial's Keras code from `fit` to 78.5%, 3 seeds: several hours

Each contender is a process. Contenders take turns on the same images; a turn is a warm pass, synchronized at both ends.
`step`, `speednet` and `residual` measure twice: with default settings, and with variables of glibc for all that keep
freed memory, as `cnnjax.keep_memory` does. Peers are installed in .venv-peers, which `make bench` creates; a peer that
cannot run is left out. Each part writes its tables into BENCHMARKS.md.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import harness
from harness import ratio, spread, table, worker
from peers import CONTENDERS

PEERS = harness.ROOT / ".venv-peers" / "bin" / "python"
RUNNER = str(harness.HERE / "peers.py")
SIZES = (32, 64, 128, 256, 512)
# The settings of `cnnjax.keep_memory` as variables.
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "2147483647",
    "MALLOC_TOP_PAD_": "67108864",
    "MALLOC_ARENA_MAX": "1",
}
LAYERS = ((3, 32, 32), (32, 32, 32), (32, 64, 16), (64, 64, 16))  # Input and output channels, height and width.

# --- Parts: each returns its tables ---------------------------------------------------------------------------------


def contenders(part: str) -> list[str]:
    """Returns the contenders of a part, except those in bfloat16 on a processor that emulates it, which are slow."""
    from cnnjax.onednn.library import processor_flags

    emulated = "avx512_bf16" not in processor_flags().split()
    names = [name for name in CONTENDERS if CONTENDERS[name].part == part and Path(python(name)).exists()]
    return [name for name in names if not (emulated and "bfloat16" in name)]


def python(name: str) -> str:
    return str(PEERS) if CONTENDERS[name].peer else sys.executable


def images_per_second(
    names: list[str],
    sizes: tuple[int, ...],
    args: argparse.Namespace,
    *widths: int,
    num_images: int = 4096,
    **environment: str,
) -> Any:
    """Returns the speed of each contender that can run at each batch size, by turn."""
    num_images = max(sizes) * (2 if args.small else num_images // max(sizes))
    with ExitStack() as stack:
        work = {}
        for name in names:
            peer = CONTENDERS[name].peer
            log = Path(os.devnull) if peer else None
            ask = stack.enter_context(worker(python(name), RUNNER, log=log, **environment))
            for size in sizes:
                question = (name, size, num_images, *widths)
                reason = ask("prepare", *question, until=time.monotonic() + 600 if peer else None)
                if reason == "":
                    work[name, size] = lambda ask=ask, question=question: num_images / ask("training_pass", *question)
                else:
                    print(f"{name} is left out: {reason or 'its process ended'}", file=sys.stderr)
        return harness.take_turns(work, args.turns)


def compare(part: str, size: int, args: argparse.Namespace, *widths: int, num_images: int = 4096) -> str:
    """Returns two tables of the contenders of a part: with default settings, and with memory kept by all."""
    if not contenders(part):
        return "Not measured: this processor emulates bfloat16."
    tables = []
    for title, environment in ((f"batch {size}", {}), (f"batch {size}, all keep memory", KEEP_MEMORY)):
        speed = images_per_second(contenders(part), (size,), args, *widths, num_images=num_images, **environment)
        ours = [name for name, _ in speed if name.startswith("cnnjax")]
        rows = []
        for name, _ in speed:
            ratios = [f"{ratio(speed[our, size], speed[name, size]):.2f} ×" for our in ours]
            rows.append([name + CONTENDERS[name].details, spread(speed[name, size]), *ratios])
        tables.append(table([title, "images/s", *(f"{our} is" for our in ours)], rows))
    return "\n\n".join(tables)


def step(args: argparse.Namespace) -> str:
    return compare("step", 4 if args.small else 128, args)


def speednet(args: argparse.Namespace) -> str:
    from cnnjax.cli.experiment import load_experiment

    config: Any = load_experiment(str(harness.EXPERIMENTS / "cifar10_fast.py")).config
    size, widths = (4, (4, 4, 4)) if args.small else (config.batch_size, config.model.widths)
    return compare("speednet", size, args, *widths)


def residual(args: argparse.Namespace) -> str:
    return compare("residual", 4 if args.small else 128, args, num_images=1024)


def sizes(args: argparse.Namespace) -> str:
    sizes, names = (2, 4) if args.small else SIZES, [name for name in contenders("step") if name.startswith("cnnjax")]
    speed, rows = images_per_second(names, sizes, args), []
    for name in names:
        medians = [statistics.median(speed[name, size]) for size in sizes]
        rows.append([name, *(spread(speed[name, size]) for size in sizes), f"{min(medians) / max(medians):.0%}"])
    return table(["images/s at batch", *map(str, sizes), "the slowest, of the fastest"], rows)


def layers(args: argparse.Namespace) -> str:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from cnnjax import keep_memory
    from cnnjax.compiler import jit
    from cnnjax.layers.conv import conv2d

    keep_memory()
    rng, (batch, n) = np.random.default_rng(0), (1, 64) if args.small else (128, 2048)

    def normal(*shape: int, dtype: str = "float32") -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32).astype(dtype)

    def conv(image, kernel, bias, relu=False):
        return conv2d(image, kernel, bias, ((1, 1), (1, 1)), relu)

    def both_ways(image, kernel, bias, g):
        y, vjp = jax.vjp(partial(conv, relu=True), image, kernel, bias)
        return y, vjp(g)[0 if image.shape[3] > 3 else 1 :]  # The gradient of the network's input is not needed.

    alone = {
        "forward": lambda image, kernel, bias, g: conv(image, kernel, bias, True),
        "the image's gradient": lambda image, kernel, bias, g: jax.vjp(lambda x: conv(x, kernel, bias), image)[1](g),
        "the kernel's gradient": lambda image, kernel, bias, g: jax.vjp(lambda x: conv(image, x, bias), kernel)[1](g),
    }
    product = ("", "matrix product", "float32")
    work: dict[Any, Any] = {product: (jit(jnp.dot), (normal(n, n), normal(n, n)), 2 * n**3)}
    for dtype in ("float32", "bfloat16"):
        for c, k, h in LAYERS:
            image, g = (normal(batch, h, h, channels, dtype=dtype) for channels in (c, k))
            arguments, flops = (image, normal(3, 3, c, k), normal(k), g), 2 * batch * h * h * 9 * c * k
            layer = f"{c} → {k} at {h}×{h}"
            work[layer, "both ways", dtype] = (jit(both_ways), arguments, flops * (3 if c > 3 else 2))
            work |= {(layer, name, dtype): (jit(f), arguments, flops) for name, f in alone.items() if c > 3}

    def time_of(function, arguments, flops):
        repeats = 1 if args.small else max(2, int(2e10 / flops))
        return harness.seconds(lambda: [jax.block_until_ready(function(*arguments)) for _ in range(repeats)]) / repeats

    times = harness.take_turns({name: partial(time_of, *work[name]) for name in work}, args.turns)

    def rate(*names: tuple[str, str, str]) -> list[float]:
        flops = sum(work[name][2] for name in names)
        return [flops / sum(turn) / 1e9 for turn in zip(*(times[name] for name in names), strict=True)]

    def row(label: str, layers: list[str], part: str = "both ways") -> list[str]:
        single, half = (rate(*((layer, part, dtype) for layer in layers)) for dtype in ("float32", "bfloat16"))
        return [label, spread(single), f"{ratio(single, rate(product)):.0%}", spread(half)]

    names = [f"{c} → {k} at {h}×{h}" for c, k, h in LAYERS]
    rows = [*(row(name, [name]) for name in names), row("all four together", names)]
    rows += [row(f"of the last three, {part} alone", names[1:], part) for part in alone]
    rows.append([f"float32 matrix product, {n}×{n}×{n}", spread(rate(product)), "100%"])
    head = [f"forward and backward, batch {batch}", "float32, GFLOP/s", "of the matrix product", "bfloat16, GFLOP/s"]
    return table(head, rows)


def accuracy(args: argparse.Namespace) -> str:
    small, rows = ["--num-epochs", "1", "--model.widths", "4", "4", "4"], []
    for options in [small] if args.small else (["--num-epochs", "1"], ["--num-epochs", "2"], []):
        found = []
        for seed in range(args.num_seeds):
            with tempfile.TemporaryDirectory() as folder:
                run_options = ("--seed", str(seed), *options)
                # An empty cache of compiled programs, as for a new user.
                run = harness.run_experiment(
                    "cifar10_fast",
                    Path(folder, "run"),
                    *run_options,
                    XDG_CACHE_HOME=folder,
                    JAX_COMPILATION_CACHE_DIR=f"{folder}/cache",
                )
            if run.result is None:
                sys.exit(f"cifar10_fast with seed {seed} and {options} ended without a result.")
            found.append((100 * run.result["test_accuracy"], run.result["training_seconds"], run.seconds, run.memory))
            print(f"seed {seed}: {found[-1][0]:.2f}%, {run.seconds:.0f} s", file=sys.stderr)
        accuracies, training, walls, memories = zip(*found, strict=True)
        deviation = f" ± {statistics.stdev(accuracies):.2f}" if len(found) > 1 else ""
        scores = f"{statistics.mean(accuracies):.2f}%{deviation} ({', '.join(f'{a:.2f}' for a in accuracies)})"
        times = [f"{statistics.mean(x):.0f} ({min(x):.0f} to {max(x):.0f})" for x in (training, walls)]
        rows.append([" ".join(options) or "as it is", scores, *times, f"{max(memories):.2f} GiB"])
    head = ["`cifar10_fast`", "test accuracy", "training, s", "start to result, s", "peak memory"]
    return table(head, rows)


def tutorial(args: argparse.Namespace) -> str:
    rows, totals = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = harness.save_cifar10(Path(folder, "cifar10.npz"))
        for seed in range(args.num_seeds):
            with worker(str(PEERS), RUNNER) as ask:
                epochs = ask("keras_to_accuracy", seed, path, 1 if args.small else 200)
            accuracies, times = zip(*epochs, strict=True)
            totals.append(sum(times))
            rows.append([seed, len(epochs), f"{accuracies[-1]:.2%}", f"{totals[-1]:.0f}", spread(times, ".1f")])
    rows.append(["mean", "", "", f"{statistics.mean(totals):.0f}"])
    head = ["the tutorial's Keras code to 78.5% or epoch 200, seed", "epochs", "test accuracy", "training, s"]
    return table([*head, "s per epoch"], rows)


PARTS = {f.__name__: f for f in (step, speednet, residual, sizes, layers, accuracy, tutorial)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5, help="of step, speednet, residual, sizes and layers")
    parser.add_argument("--num-seeds", type=int, default=3, help="of accuracy and tutorial")
    args = harness.parse(parser, list(PARTS), list(PARTS)[:-1])
    if not PEERS.exists() and (
        "tutorial" in args.parts or ({"step", "speednet", "residual"} & {*args.parts} and not args.small)
    ):
        parser.error(f"The peers must be in {PEERS.parents[1]}. Use: make bench ARGS='{' '.join(args.parts)}'")
    if variables := sorted(name for name in os.environ if name.startswith("MALLOC_")):
        parser.error(f"Variables that begin with MALLOC_ must not be set, got {', '.join(variables)}. Unset them.")
    if args.small:
        args.turns = args.num_seeds = 1
    harness.write_tables(args, PARTS, "" if args.small else harness.describe(str(PEERS)))


if __name__ == "__main__":
    main()
