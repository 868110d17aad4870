"""Measures the cost of checkpoints and checksums, and ways to train many seeds.

    .venv/bin/python experiments/benchmarks/runs.py cost     # a checkpoint with its checksums, of cifar10_cnn
    .venv/bin/python experiments/benchmarks/runs.py seeds    # sequential, vmap, one per device, one per process

`cost`: passes with and without a save take turns, each until everything is on disk; then the manifest. The share of a
run assumes a save per epoch and one per minute. `seeds`: each way is a process, or one per seed. They take turns; a
turn is a warm pass over the same images for every seed, synchronized at both ends. Each part writes its table into
BENCHMARKS.md. gpu.py compares such ways on a GPU, where an epoch is one program.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import cache, partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
from harness import ratio, seconds, spread, table, take_turns

MODELS = {"CNN": ((32, 32, 3), 512), "MLP": ((28, 28, 1), 8192)}  # Shape of the images; their number per turn and seed.
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
    from cnnjax.runs import manifest
    from cnnjax.runs.checkpoints import Checkpoints
    from cnnjax.runs.files import tree_sha256
    from cnnjax.step import copy_state

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


PARTS = {f.__name__: f for f in (cost, seeds)}


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
        harness.serve(train_pass)
    else:
        main()
