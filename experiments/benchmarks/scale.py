"""Measures the inputs of the capacity plan, and computes it: ResNet-50 on ImageNet, on 8 to 512 devices.

    make bench-scale                                                    # every part, 5 minutes
    .venv/bin/python experiments/benchmarks/scale.py decode plan        # some of them

`decode`: reading JPEG files of ImageNet's usual size from the system's memory, with the process on one core and on all.
`collectives`: the communication of the compiled training step on 8 simulated devices. `checkpoint`: the state of
ResNet-50 with momentum and averaged parameters, until it is complete on disk, and until it is loaded. `startup`:
processes of one machine, from their start to the first sum over all. `plan`: the tables by the formulas of capacity.py.
The measured values go into capacity.json, the tables into CAPACITY.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import capacity
import harness
import hlo
import numpy as np
from capacity import Measured
from harness import seconds, spread, table, take_turns

REPORT, VALUES = harness.HERE / "CAPACITY.md", harness.HERE / "capacity.json"
PHOTO_SIZE, NOISE = (500, 375), 22.0  # ImageNet's most frequent size; files of its mean size, 115 kB.
NUM_SIMULATED = 8
found: dict[str, float] = {}  # What this process has measured, by the names of `Measured`.

# --- Measurements ---------------------------------------------------------------------------------------------------


def decode(args: argparse.Namespace) -> str:
    from images import save_photos

    from cnnjax.data.image_files import on_all_cores, read_image

    cores, count, rows = os.sched_getaffinity(0), 8 if args.small else 400, []
    with tempfile.TemporaryDirectory() as folder:
        paths = save_photos(Path(folder), PHOTO_SIZE, count, noise=NOISE)
        size = statistics.mean(path.stat().st_size for path in paths) / 1e3

        def read(chosen: set[int], read_file: Callable[[Path], Any]) -> float:
            os.sched_setaffinity(0, chosen)  # As many threads.
            start = time.process_time()
            try:
                wall.append(seconds(lambda: [None for _ in on_all_cores(read_file, paths)]) * len(chosen))
                return time.process_time() - start
            finally:
                os.sched_setaffinity(0, cores)

        wall: list[float] = []
        kinds = [(224, "lanczos"), (224, "bilinear"), (256, "lanczos")]
        readers = [partial(read_image, image_shape=(side, side, 3), interpolation=how) for side, how in kinds]
        places = {1: {min(cores)}, len(cores): cores}
        work = {(*kind, n): partial(read, places[n], f) for kind, f in zip(kinds, readers, strict=True) for n in places}
        times = take_turns(work, args.turns)
    for i, ((side, interpolation, n), values) in enumerate(times.items()):
        speeds = [count / x for x in values]
        if (side, interpolation, n) == (*kinds[0], len(cores)):
            found["images_per_core"] = statistics.median(speeds)
        by_clock = [count / x for x in wall[len(work) + i :: len(work)]]  # Without the turn that warms up.
        megabytes = [x * size / 1e3 for x in speeds]
        rows.append([f"{side}×{side}, {interpolation}", n, spread(speeds), spread(megabytes, ",.1f"), spread(by_clock)])
    head = [f"JPEG of {PHOTO_SIZE[0]}×{PHOTO_SIZE[1]} ({size:.0f} kB) to", "threads", "images per second of a core"]
    return table([*head, "MB per second of a core", "by the clock, images/s per core"], rows)


def make_network(small: bool) -> tuple[Any, Any, tuple[int, ...]]:
    """Returns ResNet-50 and an optimizer with momentum and averaged parameters, or a small network; and the shape."""
    from cnnjax import SGD
    from cnnjax.models.resnet import ResNet18, ResNet50

    model = ResNet18(10, dtype="bfloat16") if small else ResNet50(1000, dtype="bfloat16")
    return model, SGD(momentum=0.9, ema=0.999).make_tx(100), (32, 32, 3) if small else (224, 224, 3)


def compile_step(small: bool) -> dict[str, Any]:
    """Compiles the training step for simulated devices that share a batch; returns what it communicates."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from cnnjax import Batch, compiler_options, train_step
    from cnnjax.state import abstract_state
    from cnnjax.summary import forward_flops

    model, tx, shape = make_network(small)
    mesh = Mesh(jax.devices(), ("data",), axis_types=(AxisType.Auto,))
    whole, shared = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    state = abstract_state(shape, model=model, tx=tx)
    n = 2 * len(mesh.devices)
    kinds: list[Any] = [((n, *shape), jnp.float32), ((n,), jnp.int32), ((n,), jnp.bool_)]
    arrays: list[Any] = [jax.ShapeDtypeStruct(*kind) for kind in kinds]
    step = jax.jit(
        partial(train_step, model=model, tx=tx),
        in_shardings=(whole, shared, whole),
        out_shardings=whole,
        donate_argnums=0,
        compiler_options=compiler_options(),
    )
    start = time.perf_counter()
    text = str(step.lower(state, Batch(*arrays), jax.eval_shape(lambda: jax.random.key(0))).compile().as_text())
    duration = time.perf_counter() - start
    operations = [(c.kind, c.num_bytes, any(len(x.shape) > 1 for x in c.results)) for c in hlo.collectives(text)]
    return {
        "collectives": operations,
        "seconds": duration,
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "norm_channels": sum(leaf.size for leaf in jax.tree.leaves(state.model_state["batch_stats"])) // 2,
        "forward_flops": forward_flops(model, shape),
    }


def collectives(args: argparse.Namespace) -> str:
    flags = harness.xla_flags(f"--xla_force_host_platform_device_count={NUM_SIMULATED}")
    with harness.worker(sys.executable, __file__, "worker", JAX_PLATFORMS="cpu", XLA_FLAGS=flags) as ask:
        answer = ask("compile_step", args.small)
    rows, total = [], 0
    for kind, has_kernels in sorted({(kind, has_kernels) for kind, _, has_kernels in answer["collectives"]}):
        sizes = [size for k, size, has in answer["collectives"] if (k, has) == (kind, has_kernels)]
        what = "gradients" if has_kernels else "batch statistics, metrics"
        rows.append([f"{kind}: {what}", len(sizes), f"{sum(sizes):,}", f"{max(sizes):,}"])
        total += sum(sizes)
    expected = capacity.reduced_bytes(answer["num_params"], answer["norm_channels"])
    rows.append(["in total", len(answer["collectives"]), f"{total:,}", ""])
    rows.append(
        [f"by the formula: 4 × ({answer['num_params']:,} + 3 × {answer['norm_channels']:,})", "", f"{expected:,}", ""]
    )
    rows.append([f"compilation: {answer['seconds']:.0f} s", "", "", ""])
    found.update({name: answer[name] for name in ("num_params", "norm_channels", "forward_flops")})
    found["reduced_bytes"], found["compile_seconds"] = total, answer["seconds"]
    found["num_reductions"] = sum(not has_kernels for *_, has_kernels in answer["collectives"])
    return table([f"a step on {NUM_SIMULATED} devices", "number", "bytes on each device", "largest"], rows)


def checkpoint(args: argparse.Namespace) -> str:
    import jax
    import jax.numpy as jnp

    from cnnjax import init_state
    from cnnjax.runs.checkpoints import Checkpoints
    from cnnjax.state import abstract_state, copy_state

    model, tx, shape = make_network(args.small)
    state = init_state(jax.random.key(0), jnp.zeros((1, *shape)), model=model, tx=tx)
    noise = np.random.default_rng(0)  # Momentum and averages of a new state could be compressed.
    state = jax.tree.map(
        lambda x: x + noise.normal(0, 1e-3, x.shape).astype(np.float32) if x.dtype == np.float32 else x, state
    )
    abstract = abstract_state(shape, model=model, tx=tx)
    totals = {"loss": 0.0, "num_examples": 0, "values": {}}
    progress = {"rows": [], "timing": [], "totals": totals, "grad_norm": 0.0, "seconds": 0.0}
    progress |= {"stopped_within": None, "best_step": None}
    step, times = 0, {}
    with (
        tempfile.TemporaryDirectory(dir=args.disk) as folder,
        closing(Checkpoints(Path(folder) / "checkpoints")) as checkpoints,
    ):

        def save() -> None:
            nonlocal step
            step += 1
            start = time.perf_counter()
            checkpoints.save(copy_state(state._replace(step=jnp.int32(step))), progress, {"score": 0.5})
            stalls.append(time.perf_counter() - start)
            checkpoints.wait()

        def load() -> None:
            jax.block_until_ready(checkpoints.restore(step, abstract)[0])

        stalls: list[float] = []
        times["first save, with reading back"] = [seconds(save)]
        times["save"] = [seconds(save) for _ in range(args.turns)]
        times["of which training waits"] = stalls[1:]
        times["verify and load"] = [seconds(load) for _ in range(args.turns)]
        files = [path for path in (Path(folder) / "checkpoints" / str(step)).rglob("*") if path.is_file()]
        written = sum(path.stat().st_size for path in files)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    found.update(checkpoint_bytes=size, save_seconds=statistics.median(times["save"]))
    found["stall_seconds"] = statistics.median(times["of which training waits"])
    found["restore_seconds"] = statistics.median(times["verify and load"])
    rows = [[name, spread(x, ".2f"), spread([size / 1e6 / y for y in x])] for name, x in times.items()]
    return table([f"state of {size:,} bytes ({written:,} in {len(files)} files)", "seconds", "MB/s"], rows)


def first_sum(address: str, num_processes: str, process_id: str) -> None:
    """Joins the other processes, and sums the devices of all."""
    import jax

    jax.distributed.initialize(address, int(num_processes), int(process_id))
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(jax.devices(), ("data",))
    ones = jax.make_array_from_callback(
        (mesh.size,), NamedSharding(mesh, PartitionSpec("data")), lambda index: jax.numpy.ones(1)
    )
    total = jax.jit(jax.numpy.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(ones)
    if int(total) != int(num_processes) * jax.local_device_count():
        sys.exit(f"`first_sum` must count all devices of {num_processes} processes, got {total}.")


def startup(args: argparse.Namespace) -> str:
    import socket

    def start(n: int) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        command = [sys.executable, __file__, "process", address, str(n)]
        env = harness.ENVIRONMENT | {"JAX_PLATFORMS": "cpu"}
        processes = [subprocess.Popen([*command, str(i)], env=env, stdout=subprocess.DEVNULL) for i in range(n)]
        statuses = [process.wait() for process in processes]
        if any(statuses):
            sys.exit("A process of `startup` failed.")

    times = take_turns({n: partial(seconds, partial(start, n)) for n in (1, 2, 4)}, args.turns)
    found["start_seconds"] = statistics.median(times[4])
    return table(["processes", "seconds"], [[n, spread(values, ".1f")] for n, values in times.items()])


# --- The plan -------------------------------------------------------------------------------------------------------


def read_values() -> Measured:
    """Returns the measured values: of this process, otherwise of capacity.json."""
    stored = json.loads(VALUES.read_text()) if VALUES.exists() else {}
    if missing := sorted({*Measured._fields} - {*stored, *found}):
        sys.exit(f"`plan` needs measured values, got none for {', '.join(missing)}. Run all parts: make bench-scale.")
    values: dict[str, Any] = {**stored, **found}
    return Measured(**{name: values[name] for name in Measured._fields})


def plan(args: argparse.Namespace) -> str:
    return capacity.plan(read_values())


PARTS = {f.__name__: f for f in (decode, collectives, checkpoint, startup, plan)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument(
        "--disk", metavar="DIR", type=Path, help="where `checkpoint` writes; a temporary directory by default"
    )
    args = harness.parse(parser, list(PARTS), list(PARTS))
    if args.small:
        args.turns = 1
    harness.write_tables(args, PARTS, "" if args.small else harness.describe("-"), report=REPORT)
    if not (args.small or args.into) and found:
        values = json.loads(VALUES.read_text()) if VALUES.exists() else {}
        VALUES.write_text(json.dumps({**values, **found}, indent=2) + "\n")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["worker"]:
            harness.serve(compile_step)
        case ["process", *arguments]:
            first_sum(*arguments)
        case _:
            main()
