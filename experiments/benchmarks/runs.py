"""Measures the cost of checkpoints and checksums, of everything except the steps, and ways to train many seeds.

    .venv/bin/python experiments/benchmarks/runs.py cost     # a checkpoint with its checksums, of cifar10_cnn
    .venv/bin/python experiments/benchmarks/runs.py rest     # everything except the steps, on an accelerator
    .venv/bin/python experiments/benchmarks/runs.py seeds    # sequential, vmap, one per device, one per process

`cost`: passes with and without a save take turns, each until everything is on disk; then the manifest. The share of a
run assumes a save per epoch and one per minute. `rest`: recipes for a GPU, in which an epoch only waits for the time
that its steps take there, without using a core (needs a C++ compiler).
Networks, optimizers, checkpoints, digests and files are real. How long this device is idle is measured from the end of
set-up to result.json; a first run compiles, and is not measured. `seeds`: each way is a process, or one per seed. They
take turns; a turn is a warm pass over the same images for every seed, synchronized at both ends. Each part writes its
table into BENCHMARKS.md. gpu.py compares such ways on a GPU, where an epoch is one program.
"""

import argparse
import ctypes
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import harness
import numpy as np
from harness import ratio, seconds, spread, table, take_turns

MODELS = {"CNN": ((32, 32, 3), 512), "MLP": ((28, 28, 1), 8192)}  # Shape of the images; their number per turn and seed.
# Epochs, and the seconds that an epoch and a scored batch take on an H200, see BENCHMARKS.md.
ON_H200 = {"cifar10_airbench94_muon": (8, 0.146, 0.0044), "cifar10_tutorial": (6, 0.6, 0.003)}
WAYS = ("sequential", "vmap", "devices", "processes")


def make_batches(shape: tuple[int, ...], count: int, batch_size: int) -> list[Any]:
    from cnnjax import Batch

    rng = np.random.default_rng(0)
    arrays = [
        (rng.normal(size=(batch_size, *shape)).astype(np.float32), rng.integers(0, 10, batch_size).astype(np.int32))
        for _ in range(count)
    ]
    return [Batch(image, label, np.ones(batch_size, bool)) for image, label in arrays]


def cost(args: argparse.Namespace) -> str:
    import jax
    import jax.numpy as jnp

    from cnnjax import init_state, keep_memory, train_step
    from cnnjax.cli.experiment import load_experiment
    from cnnjax.files import tree_sha256
    from cnnjax.runs import manifest
    from cnnjax.runs.checkpoints import Checkpoints
    from cnnjax.state import copy_state

    keep_memory()
    config = load_experiment(str(harness.EXPERIMENTS / "cifar10_cnn.py")).config
    batch_size = config.batch_size or 128
    steps_per_epoch, num_steps, key = -(-45_000 // batch_size), 2 if args.small else 64, jax.random.key(0)
    tx = config.optim.make_tx(steps_per_epoch * config.num_epochs, config.num_epochs)
    batches = make_batches((32, 32, 3), num_steps, batch_size)
    state = init_state(key, jnp.zeros((1, 32, 32, 3)), model=config.model, tx=tx)
    with tempfile.TemporaryDirectory() as folder, closing(Checkpoints(Path(folder) / "checkpoints")) as checkpoints:

        def train(save: bool) -> None:
            nonlocal state
            for i, batch in enumerate(batches):
                state, _ = train_step(state, batch, key, model=config.model, tx=tx, loss_fn=config.loss)
                if save and i == 0:
                    checkpoints.save(copy_state(state), {"best_step": None}, {"score": 0.5})
            jax.block_until_ready(state)
            checkpoints.wait()

        def session() -> None:
            with manifest.session(Path(folder), manifest.environment(jax.devices()[:1]), ()):
                pass

        work = {"without": partial(train, False), "with": partial(train, True)}
        times = take_turns({name: partial(seconds, function) for name, function in work.items()}, args.turns)
        digest, once = seconds(lambda: tree_sha256(state.params)), seconds(session)
    run = statistics.median(times["without"]) / num_steps * steps_per_epoch * config.num_epochs
    differences = [b - a for a, b in zip(times["without"], times["with"], strict=True)]
    saves = config.num_epochs + run / 60
    total = saves * statistics.median(differences) + config.num_epochs * digest + once
    rows = [[f"{num_steps} steps {name} a save", spread(values, ".2f")] for name, values in times.items()]
    rows += [
        ["a save: the differences within a turn", spread(differences, ".3f")],
        ["the digest of the parameters, once per epoch", f"{digest:.3f}"],
        ["manifest and checksums of the run directory, once per run", f"{once:.3f}"],
        [f"in total, with {saves:.0f} saves in {run:.0f} s of training: {total / run:.2%}", f"{total:.1f}"],
    ]
    return table(["`cifar10_cnn`", "seconds"], rows)


def rest(args: argparse.Namespace) -> str:
    if shutil.which("c++") is None:
        sys.exit("`rest` needs a C++ compiler with the name c++, got none. On Debian: apt install g++.")
    rows = []
    for name, (num_epochs, epoch_seconds, batch_seconds) in ON_H200.items():
        question = ("train_on_waiting_device", name, num_epochs, epoch_seconds, batch_seconds, args.small)
        with harness.worker(sys.executable, __file__, "worker") as ask:
            ask(*question)  # Compiles.
            runs = [ask(*question) for _ in range(args.turns)]
        columns = ([1e3 * x for x in column] for column in zip(*runs, strict=True))
        rows.append([f"`{name}`, {num_epochs} epochs of {epoch_seconds} s", *map(spread, columns)])
    head = ["the device is idle, ms", "from set-up to the first step", "per epoch", "from the last step to result.json"]
    return table(head, rows)


@cache
def waiting_device(epoch_seconds: float, batch_seconds: float) -> Callable[[], list[tuple[float, float]]]:
    """Replaces the training steps of an epoch and the score of a batch by the time that they take.

    Returns:
      A function that returns when the set-up ended, twice, and when each epoch and batch since then began and ended.
    """
    import jax
    import jax.numpy as jnp
    from jax import lax

    from cnnjax import evaluation, loop, train
    from cnnjax.metrics import Metrics

    with tempfile.TemporaryDirectory() as folder:
        command = ["c++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{jax.ffi.include_dir()}"]
        subprocess.run([*command, str(harness.HERE / "wait.cc"), "-o", f"{folder}/wait.so"], check=True)
        library: Any = ctypes.CDLL(f"{folder}/wait.so")
    spans = ((ctypes.c_double * 2) * 4096).in_dll(library, "spans")
    count, first = ctypes.c_int.in_dll(library, "count"), [0.0]
    jax.ffi.register_ffi_target("wait", jax.ffi.pycapsule(library.Wait), platform="cpu")
    set_up: Any = train.set_up

    def wait(x: Any, seconds: float) -> Any:  # A loop, because XLA runs what is cheap in the thread that calls it.
        call = jax.ffi.ffi_call("wait", jax.ShapeDtypeStruct((), jnp.int32), has_side_effect=True)
        steps = lax.while_loop(lambda c: c[0] < 1, lambda c: (c[0] + 1, call(c[1], seconds=seconds)), (0, x))
        return steps[1]

    @partial(jax.jit, static_argnames="program", donate_argnames="state")
    def train_steps(state: Any, pixels: Any, plan: Any, *keys: Any, program: Any) -> Any:
        state = state._replace(step=wait(state.step, epoch_seconds) + len(plan.example))
        n = plan.mask.sum(axis=1, dtype=jnp.int32)
        return state, Metrics(2.0 * n, n, {"accuracy": n // 2}, jnp.ones(len(n)))

    @partial(jax.jit, static_argnames=("model", "tta", "placement"))
    def score(state: Any, pixels: Any, plan: Any, **options: Any) -> Any:
        n = plan.mask.sum(dtype=jnp.int32)
        label = pixels.label[plan.example] + 0 * wait(state.step, batch_seconds)
        return Metrics(2.0 * n, n, {"accuracy": n}), label, jax.nn.one_hot(label, 10)

    def set_up_device(*arguments: Any, **options: Any) -> Any:
        setup, state = set_up(*arguments, **options)
        count.value, first[0] = 0, time.time()
        return setup._replace(steps_per_dispatch=setup.steps_per_epoch), state

    for module, name, value in (
        (loop, "train_steps", train_steps),
        (train, "set_up", set_up_device),
        (evaluation, "_score", score),
        (evaluation, "EVAL_BATCH_SIZE", evaluation.ACCELERATOR_EVAL_BATCH_SIZE),
    ):
        setattr(module, name, value)
    return lambda: [(first[0], first[0]), *((begin, end) for begin, end in spans[: count.value])]


def train_on_waiting_device(
    name: str, num_epochs: int, epoch_seconds: float, batch_seconds: float, small: bool
) -> list[float]:
    """Returns the seconds for which the device waits before the first epoch, per epoch, and after the last one."""
    from cnnjax import Report, keep_memory, train_and_evaluate
    from cnnjax.cli.experiment import load_experiment

    keep_memory()
    waits = waiting_device(epoch_seconds, batch_seconds)
    config = load_experiment(str(harness.EXPERIMENTS / f"{name}.py")).config
    config = replace(config, dataset=partial(random_images, 2500 if small else 50_000), num_epochs=num_epochs)
    config = replace(config, batch_size=min(config.batch_size or 128, 500)) if small else config
    with tempfile.TemporaryDirectory() as folder:
        train_and_evaluate(config, run_dir=f"{folder}/run", report=Report())
        end = (Path(folder) / "run" / "result.json").stat().st_mtime
    spans = waits()
    idle = [after[0] - before[1] for before, after in pairwise([*spans, (end, end)])]
    last = max(i for i, (begin, stop) in enumerate(spans) if stop - begin >= epoch_seconds)
    return [idle[0], sum(idle[1:last]) / (num_epochs - 1), sum(idle[last:])]


def random_images(count: int) -> tuple[np.ndarray, ...]:
    """Returns a set of CIFAR-10's shape."""
    rng = np.random.default_rng(0)
    image, label = rng.integers(0, 256, (count + 10_000, 32, 32, 3), np.uint8), np.arange(count + 10_000) % 10
    return image[:count], label[:count], image[count:], label[count:]


@cache
def make_pass(way: str, model_name: str, num_seeds: int, num_steps: int) -> Callable[[], object]:
    """Returns a function that trains every seed on one pass over the images."""
    import jax
    import jax.numpy as jnp
    import optax

    import cnnjax

    cnnjax.keep_memory()
    model, tx = getattr(cnnjax, model_name)(10), optax.adam(1e-3)
    batches = make_batches(MODELS[model_name][0], num_steps, 128)
    keys: Any = [jax.random.key(seed) for seed in range(num_seeds)]
    states: Any = [cnnjax.init_state(key, batches[0].image[:1], model=model, tx=tx) for key in keys]
    step, train_map = partial(cnnjax.train_step, model=model, tx=tx), map
    if way == "vmap":
        stack = partial(jax.tree.map, lambda *leaves: jnp.stack(leaves))
        states, keys = [stack(*states)], [jnp.stack(keys)]
        batches = [jax.tree.map(lambda leaf: np.stack([leaf] * num_seeds), batch) for batch in batches]
        step = jax.jit(jax.vmap(step), donate_argnums=0, compiler_options=cnnjax.compiler_options())
    elif way == "devices":
        places = [jax.devices()[seed % len(jax.devices())] for seed in range(num_seeds)]
        states, keys = jax.device_put(states, places), jax.device_put(keys, places)
        train_map = ThreadPoolExecutor(len(jax.devices())).map

    def train(state: Any, key: Any) -> Any:
        for batch in batches:
            state, _ = step(state, batch, key)
        return state if way == "devices" else jax.block_until_ready(state)

    def one_pass() -> None:
        states[:] = train_map(train, states, keys)
        jax.block_until_ready(states)

    return one_pass


def train_pass(*arguments: Any) -> float:
    return seconds(make_pass(*arguments))


def seeds(args: argparse.Namespace) -> str:
    def together(way: str, model_name: str, num_steps: int) -> None:
        group = asks[way]
        question = ("train_pass", way, model_name, args.num_seeds // len(group), num_steps)
        list(threads.map(lambda ask: ask(*question), group))

    with ExitStack() as stack, ThreadPoolExecutor(args.num_seeds) as threads:
        asks, columns = {}, []
        for way in WAYS:
            # A CPU is one device. Here it becomes two, which share its cores.
            flags = harness.xla_flags(*["--xla_force_host_platform_device_count=2"] * (way == "devices"))
            workers = [
                harness.worker(sys.executable, __file__, "worker", XLA_FLAGS=flags)
                for _ in range(args.num_seeds if way == "processes" else 1)
            ]
            asks[way] = [stack.enter_context(worker) for worker in workers]
        for model_name, (_, num_images) in MODELS.items():
            steps = 1 if args.small else num_images // 128
            work = {way: partial(seconds, partial(together, way, model_name, steps)) for way in WAYS}
            times = take_turns(work, args.turns, warm_up=2)
            columns.append([spread([args.num_seeds * steps * 128 / x for x in times[way]]) for way in WAYS])
            columns.append([f"{ratio(times['sequential'], times[way]):.2f}" for way in WAYS])
    head = [title for name in MODELS for title in (f"{name}, images/s", "× sequential")]
    return table([f"{args.num_seeds} seeds", *head], zip(WAYS, *columns, strict=True))


PARTS = {f.__name__: f for f in (cost, rest, seeds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--num-seeds", type=int, default=4)
    args = harness.parse(parser, list(PARTS), list(PARTS))
    if args.small:
        args.turns = 1
    harness.write_tables(args, PARTS, "" if args.small else harness.describe("-"))


if __name__ == "__main__":
    if sys.argv[1:] == ["worker"]:
        harness.serve(train_pass, train_on_waiting_device)
    else:
        main()
