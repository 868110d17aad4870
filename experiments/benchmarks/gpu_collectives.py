"""Compiles the training step for eight H100s without having one, and reads memory and communication from the programs.

    .venv/bin/python experiments/benchmarks/gpu_collectives.py --python PYTHON

PYTHON: an interpreter with this project's dependencies and jax[cuda]. ResNet-50 takes some minutes per mesh. The table
goes into CAPACITY.md. What a program would take is computed, not measured: an operation in which devices communicate by
the bytes that it sends on NVLink, a kernel by the bytes that it reads and writes, at the memory's full bandwidth.
"""

import argparse
import itertools
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import capacity
import harness
import hlo
from harness import HERE, table

REPORT = HERE / "CAPACITY.md"
IMAGES_PER_DEVICE = 128
NUM_STEPS = 112_680  # Of a run, a constant of the schedule: 90 epochs of ImageNet in batches of 1,024.
NVLINK, MEMORY = 450e9, 3350e9  # Bytes per second of an H100 SXM, see `capacity.clusters`.
LATENCY = capacity.latency_seconds(8, 8)
ENVIRONMENT: dict[str, Any] = {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # There is no driver.
    # XLA would select Triton's kernels by timing them.
    "XLA_FLAGS": harness.xla_flags("--xla_gpu_enable_triton_gemm=false"),
}
NETWORKS = ("four layers of 8,192", "ResNet-50")
SMALL = 2**16  # Bytes; up to here latency limits a collective operation, not bandwidth.
MESHES = {"data=1": 1, "data=8": 8, "data=4,model=2": 8, "model=8": 8}  # The number of devices.


def make_program(network: str, small: bool) -> tuple[Any, tuple[int, ...]]:
    """Returns a network with its optimizer, and the shape of the stored images."""
    import flax.linen as nn
    import jax.numpy as jnp

    from cnnjax import Adam, Augment, Config, ResNet18
    from cnnjax.cli.experiment import load_experiment
    from cnnjax.program import Program

    class Wide(nn.Module):
        """Layers so wide that their parameters need more memory than the activations."""

        width: int

        @nn.compact
        def __call__(self, image: Any) -> Any:
            x = image.reshape(len(image), -1)  # [B H W C] -> [B width]
            for _ in range(4):
                x = nn.relu(nn.Dense(self.width, dtype=jnp.bfloat16)(x))
            return nn.Dense(1000)(x)

    if network == "ResNet-50":
        config = load_experiment(str(harness.EXPERIMENTS / "imagenet_resnet50.py")).config.with_num_classes(1000)
        side = 64 if small else 224
        if small:
            config = replace(config, model=ResNet18(1000, dtype="bfloat16"))
        config = replace(config, augment=replace(config.augment, train_sizes=(side,)))
        shape = (side + 32, side + 32, 3)
    else:
        side = 32 if small else 64
        config = Config(model=Wide(2 * side**2), optim=Adam(), augment=Augment(), num_epochs=90)
        shape = (side, side, 2)
    optim = config.optim.for_network(config.model)
    return Program(config.model, optim, config.augment, config.loss, NUM_STEPS, config.num_epochs), shape


def compile_step(network: str, mesh: str, small: bool) -> dict[str, Any]:
    """Compiles a step that gets its images from the host; returns its memory and its communication."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies

    from cnnjax.data.batches import Standardization
    from cnnjax.data.feed import StreamedSet
    from cnnjax.data.order import plain_plan
    from cnnjax.program import train_steps
    from cnnjax.sharding import place
    from cnnjax.state import abstract_state

    jax.default_backend = lambda: "gpu"  # Compiles with the options of a GPU.
    num_devices = MESHES[mesh]
    # Slices, hosts of a slice, devices of a host.
    topology = topologies.get_topology_desc(platform="cuda", target_config=hlo.H100, topology=f"1x1x{num_devices}")
    batch_size = num_devices * IMAGES_PER_DEVICE
    placement = place(batch_size, topology.devices, mesh)
    program, shape = make_program(network, small)
    program = program._replace(placement=placement if placement.divides_state else None)

    def on(tree: Any, sharding: Any) -> Any:
        return jax.tree.map(lambda x: x.update(sharding=sharding), tree)

    state: Any = abstract_state(shape, model=program.model, tx=program.make_tx())
    state = jax.tree.map(on, state, placement.of_state(state))
    images: Any = jax.ShapeDtypeStruct((batch_size, *shape), np.uint8)
    statistics = Standardization(*np.ones((2, shape[-1]), np.float32))
    pixels = StreamedSet(images, np.zeros(batch_size, np.int32), statistics).spec(batch_size, placement)
    plan = on(
        jax.eval_shape(lambda: jax.tree.map(jnp.asarray, plain_plan(batch_size, batch_size))), placement.plan_sharding
    )
    key = on(jax.eval_shape(lambda: jax.random.key(0)), placement.replicated)
    start = time.perf_counter()
    compiled = train_steps.lower(state, pixels, plan, key, key, program=program).compile()
    memory: Any = compiled.memory_analysis()
    return {
        "seconds": time.perf_counter() - start,
        "state": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "communication": [
            (c.kind, c.num_bytes, c.group_size or num_devices, alongside)
            for c, alongside in hlo.schedule(str(compiled.as_text()))
        ],
    }


def sent_bytes(kind: str, num_bytes: int, n: int) -> float:
    """Returns the bytes that each of n devices sends on a ring, given the size of the result on one device."""
    return {
        "all-reduce": capacity.ring_bytes(num_bytes, n),
        "all-gather": (n - 1) / n * num_bytes,
        "reduce-scatter": (n - 1) * num_bytes,
    }[kind]


def gpus(args: argparse.Namespace) -> str:
    def row(case: tuple[str, str]) -> list[str]:
        with harness.worker(args.python, __file__, "worker", **ENVIRONMENT) as ask:
            answer = ask("compile_step", *case, args.small)
        print(f"{', '.join(case)}: compiled in {answer['seconds']:.0f} s", file=sys.stderr)
        sizes = answer["state"], answer["temporary"], answer["state"] + answer["temporary"]
        return [", ".join(case), *(f"{x / 1e6:,.0f}" for x in sizes), *communication_cells(answer["communication"])]

    with ThreadPoolExecutor(4) as threads:
        rows = list(threads.map(row, itertools.product(NETWORKS, MESHES)))
    head = ["on each device", "state, batch: MB", "temporary: MB", "in total: MB", "large operations", "MB sent", "ms"]
    return table([*head, "hidden, ms", "small operations", "in the open"], rows)


def communication_cells(communication: list[tuple[str, int, int, int]]) -> list[str]:
    """Returns the cells of the large operations and of the small ones: kind, bytes, group size, bytes alongside."""
    large = [x for x in communication if x[1] > SMALL]
    kinds = ", ".join(f"{sum(x[0] == kind for x in large)} {kind}" for kind in dict.fromkeys(x[0] for x in large))
    sent = [sent_bytes(kind, num_bytes, n) for kind, num_bytes, n, _ in large]
    hidden = [min(size / NVLINK, x[3] / MEMORY) for size, x in zip(sent, large, strict=True)]
    small = [x[3] for x in communication if x[1] <= SMALL]
    cells = [kinds, f"{sum(sent) / 1e6:,.0f}", f"{1e3 * sum(sent) / NVLINK:.2f}", f"{1e3 * sum(hidden):.2f}"]
    return [*cells, f"{len(small)}", f"{sum(alongside / MEMORY < LATENCY for alongside in small)}"]


PARTS = {"gpus": gpus}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True, help="an interpreter with jax[cuda]")
    args = harness.parse(parser, list(PARTS), list(PARTS))
    args.python = harness.find_python(parser, "python", args.python)
    with harness.worker(args.python, str(HERE / "harness.py"), **ENVIRONMENT) as ask:
        about = "" if args.small else ask("environment", "-")
    harness.write_tables(args, PARTS, about, report=REPORT)


if __name__ == "__main__":
    if sys.argv[1:] == ["worker"]:
        harness.serve(compile_step)
    else:
        main()
