"""Measures how fast the records' accuracies are reached on one GPU, beside airbench itself. `make bench-gpu` runs it.

    make bench-gpu                                     # all parts, within an hour
    make bench-gpu ARGS="to_96 bits --minutes 9"       # these parts
    make bench-gpu ARGS=--small                        # try every part of cnnjax, on a CPU
    make bench-gpu ARGS="--python python3 --peers python3 --airbench airbench --into out"    # without a registry

ladder     the recipe for 94% with one difference at a time: XLA flags, network, optimizer, program; that for 96%
bits       the recipe for 94% in two processes, and killed and resumed: the same digests? With which kernels, how fast?
overhead   whole runs, with everything that they record, compared with the records' clock
profile    what the device does in one warm run of the recipe for 94%: kernels by their share, and idle time
predict    images per second of `Run.predict` and `Run.predict_files`
to_96      96%: the recipe with many seeds, and airbench96_faster by its author's script, on the records' clock
to_94      94%: the same with airbench94_muon
start      from the start of a process to its result, with and without compilation
agree      the first 25 steps of cifar10_cnn on the CPU and on the GPU
seeds      four seeds one after another, batched by vmap, and in a process each
tutorial   the tutorial's network, 200 epochs at batch size 32, with CUDA graphs; a run in --into is resumed

The records' clock runs from the whitening of the first layer, through all epochs, to the score of the test set with
test-time augmentation, synchronized at both ends; loading, the copy to the device and compilation come before. Each
program has run for at least an epoch then.

The jobs of all parts compile at the same time, up to 18 of them. What is timed takes turns: it has the device to
itself, except for processes that still compile, which measure kernels and run a few epochs, and shares the host with
them. Of the parts that are ready, the first one that was named goes first, and its rows in turns. `tutorial`, which
takes minutes, compiles first and goes last. After `--minutes` all processes are killed. Results are printed as they
come, and each updates the table of its part in BENCHMARKS.md, or in the directory of --into.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
from device import measure
from gpu_parts import PARTS
from variants import VARIANTS

PEERS = harness.ROOT / ".venv-peers-gpu" / "bin" / "python"
REPOSITORY = "https://github.com/KellerJordan/cifar10-airbench"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--python", metavar="PYTHON", default=sys.executable, help="run cnnjax with it: one that has jax for the GPU")
    add("--peers", metavar="PYTHON", default=str(PEERS), help="run airbench with it: one that has PyTorch")
    add("--airbench", metavar="DIR", type=Path, help="airbench's sources, if its repository is out of reach")
    add("--minutes", type=float, default=60.0, help="ends within them (60)")
    add("--variants", nargs="+", choices=VARIANTS, metavar="NAME", help="of the ladder, not all; after the parts")
    args = harness.parse(parser, list(PARTS), list(PARTS))
    begin, airbench = time.monotonic(), not args.small and {"to_94", "to_96"} & {*args.parts}
    if args.minutes <= 0:
        parser.error(f"`--minutes` must be positive, got {args.minutes:g}.")
    args.python = harness.find_python(parser, "python", args.python)
    if airbench:
        args.peers = harness.find_python(parser, "peers", args.peers)
    if args.airbench is not None and not args.airbench.is_dir():
        parser.error(f"`--airbench` must be a directory with airbench's sources, got {args.airbench}.")
    about = "" if args.small else harness.describe(args.peers, args.python)
    if not args.small and "; jax on gpu;" not in about:
        parser.error(f"jax must use a GPU. Install cnnjax[cuda], or try --small. Found: {about}")
    write = harness.table_writer(args, about, "gpu ")
    with tempfile.TemporaryDirectory() as temporary:
        if airbench:
            given, args.airbench = args.airbench, (args.airbench or Path(temporary, "airbench")).resolve()
            if given is None:
                subprocess.run(["git", "clone", "--quiet", "--depth", "1", REPOSITORY, args.airbench], check=True)
        measure(args, PARTS, write, begin + 60 * args.minutes, Path(args.into or temporary).resolve())


if __name__ == "__main__":
    main()
