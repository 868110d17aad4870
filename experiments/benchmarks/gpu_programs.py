"""What a step of the ladder's variants makes an H100 do, by their compiled programs. Needs jax[cuda], but no GPU.

    .venv/bin/python experiments/benchmarks/gpu_programs.py                          # all variants, 20 s each
    .venv/bin/python experiments/benchmarks/gpu_programs.py "as it is" --kernels 30  # with its 30 largest kernels

XLA compiles for a described device without having one. Nothing runs and nothing is timed: the bytes that each kernel
reads and writes, over the memory bandwidth of the data sheet, are the least time that the card needs. Sums leave out
convolutions and matrix products: arithmetic may limit them, and XLA can only choose their kernels with a device.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import hlo
import jax
import numpy as np
from harness import ENVIRONMENT, EXPERIMENTS, find_python, table, xla_flags
from jax.experimental import topologies
from variants import VARIANTS

from cnnjax.cli.experiment import load_experiment
from cnnjax.data.batches import Pixels, Standardization
from cnnjax.data.order import epoch_plan
from cnnjax.program import Program, train_steps
from cnnjax.state import abstract_state

BANDWIDTH = 3.35e12  # Bytes per second. Source: NVIDIA's data sheet of the H100 SXM.


class Kernel(NamedTuple):
    """A kernel of a program: what it computes, its operation in the network, the bytes that it reads and writes."""

    kind: str
    op_name: str
    num_bytes: int


def kernels_of_step(text: str) -> list[Kernel]:
    """Returns the kernels of one step: those of the computation that has most convolutions, the body of the loop."""
    bodies = re.findall(r"(?ms)^(?:ENTRY )?%\S+ \([^\n]*\{\n(.*?)^\}", text)
    return list(_kernels(max(bodies, key=lambda body: body.count("__cudnn$conv"))))


def _kernels(body: str) -> Iterator[Kernel]:
    for it in hlo.instructions(body):
        if it.operation in (*hlo.FREE, "after-all", "copy-done", "fusion-done"):
            continue
        target = re.search(r'custom_call_target="(?:__cu\w+\$)?([^"]*)"', it.line)
        op_name = re.search(r'op_name="([^"]*)"', it.line)
        # A gather reads only the images of a batch.
        read = [min(size, it.written) for size in it.read] if "gather" in it.name else it.read
        kind = target[1] if target else re.sub(r"[.\d]*$", "", it.name)
        yield Kernel(kind, op_name[1] if op_name else "", sum(read) + it.written)


def compile_variant(name: str) -> dict[str, Any]:
    """Compiles the program of an epoch after the first ones, in which nothing but the whitening is frozen.

    Returns:
      `text`, the compiled program, and `temporary`, the bytes of memory that it needs besides its arguments.
    """
    jax.default_backend = lambda: "gpu"  # What is chosen before the platform of a program is known.
    device = topologies.get_topology_desc(platform="cuda", target_config=hlo.H100, topology="1x1x1").devices[0]
    variant = VARIANTS[name]
    config = variant.change(load_experiment(str(EXPERIMENTS / f"{variant.recipe}.py")).config)
    model = config.model
    batch_size: Any = config.batch_size
    steps = -(-50_000 // batch_size)
    optim = config.optim.for_network(model)
    num_epochs = config.num_epochs
    program = Program(model, optim, config.augment, config.loss, steps * num_epochs, num_epochs)
    state = abstract_state((32, 32, 3), model=model, tx=program.make_tx())
    plan = epoch_plan(0, 0, 50_000, batch_size=batch_size, augment=config.augment, image_size=(32, 32))
    float32 = np.empty(3, np.float32)
    images, labels = np.empty((50_000, 32, 32, 3), np.uint8), np.empty(50_000, np.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    arguments = (state, Pixels(images, labels, Standardization(float32, float32)), plan, key, key)
    sharding = jax.sharding.SingleDeviceSharding(device)
    placed: Any = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    if not variant.one_program:
        program = program._replace(frozen=program.frozen_names(state.params, steps * num_epochs // 2))
    compiled: Any = train_steps.lower(*placed, program=program).compile()
    return {"text": compiled.as_text(), "temporary": compiled.memory_analysis().temp_size_in_bytes}


def compiled_elsewhere(args: argparse.Namespace, name: str) -> dict[str, Any] | None:
    """Returns `compile_variant` of a process of its own, with the variant's flags; None if it failed."""
    ours = "--xla_gpu_enable_triton_gemm=false"  # XLA must time kernels of Triton.
    flags = xla_flags(VARIANTS[name].flags, ours)
    env = ENVIRONMENT | {"XLA_FLAGS": flags, "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    command = [args.python, __file__, "--compile", name]
    process = subprocess.run(command, capture_output=True, check=False, text=True, env=env)
    if process.returncode:
        print(f"{name}: {(process.stderr.strip().splitlines() or ['killed'])[-1][:300]}", file=sys.stderr)
        return None
    return json.loads(process.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help="of variants.py (all)")
    parser.add_argument("--kernels", type=int, default=0, help="list so many of the largest kernels")
    parser.add_argument("--python", default=sys.executable, help="an interpreter with jax[cuda] and cnnjax's packages")
    parser.add_argument("--compile", metavar="VARIANT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile:
        print(json.dumps(compile_variant(args.compile)))
        return
    if unknown := set(args.variants) - {*VARIANTS}:
        parser.error(f"`VARIANT` must be one of {', '.join(VARIANTS)}, got {', '.join(sorted(unknown))}.")
    if args.kernels < 0:
        parser.error(f"`--kernels` must be at least 0, got {args.kernels}.")
    args.python = find_python(parser, "python", args.python)
    rows, base = [], 0.0
    for name in args.variants or VARIANTS:
        if (found := compiled_elsewhere(args, name)) is None:
            rows.append([name, "failed"])
            continue
        kernels = kernels_of_step(found["text"])
        large = [kernel for kernel in kernels if not re.match(r"conv|lt\$matmul|gemm", kernel.kind)]
        total = sum(kernel.num_bytes for kernel in large)
        base = base or total
        cells = [len(kernels), f"{total / 1e9:.2f}", f"{total / base:.2f} ×", f"{1e6 * total / BANDWIDTH:,.0f}"]
        rows.append([name, *cells, f"{found['temporary'] / 1e9:.2f}"])
        print(*rows[-1], sep=", ", file=sys.stderr, flush=True)
        for kernel in sorted(kernels, key=lambda kernel: -kernel.num_bytes)[: args.kernels]:
            print(f"{kernel.num_bytes / 1e6:9.1f} MB  {kernel.kind[:40]:40} {kernel.op_name[-90:]}")
    if not base:
        sys.exit("Nothing was compiled: `--python` must be an interpreter with jax[cuda] and cnnjax's packages.")
    head = ["variant", "kernels per step", "GB moved", "of the first", "µs at 3.35 TB/s", "GB for results of layers"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
