"""What trust costs, and which way of training many seeds in one process is the fastest.

    .venv/bin/python experiments/benchmark_runs.py cost     # a checkpoint with its checksums, of cifar10_cnn
    .venv/bin/python experiments/benchmark_runs.py seeds    # one after another, by vmap, one a device, one a process

`cost`: turns of training with and without a save in it, alternating, each until all is on disk; then the manifest. The
share of a run counts a save an epoch and one a minute. `seeds`: each way is a process of its own, or one a seed; they
take turns, a turn is a warm pass over the same images for every seed, synchronised at both ends. On a GPU all of them
share its memory. Printed are medians and the spread.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np

SHAPES = {"cnn": ((32, 32, 3), 512), "mlp": ((28, 28, 1), 8192)}  # Images, and how many a turn and seed.
WAYS = ("sequential", "vmap", "devices", "processes")


def make_batches(shape, count, batch_size=128):
    from cnnjax import Batch

    rng = np.random.default_rng(0)
    for _ in range(count // batch_size):
        image = rng.normal(size=(batch_size, *shape)).astype(np.float32)
        yield Batch(image, rng.integers(0, 10, batch_size).astype(np.int32), np.ones(batch_size, bool))


def cost(turns):
    import jax
    import jax.numpy as jnp
    from cifar10_cnn import CONFIG

    from cnnjax import init_state, train_step
    from cnnjax.models.models import make_model
    from cnnjax.optim.optimizer import make_loss, make_tx
    from cnnjax.runs import manifest
    from cnnjax.runs.checkpoints import Checkpoints
    from cnnjax.runs.files import tree_sha256

    steps_per_epoch = -(-45_000 // CONFIG.batch_size)
    model, loss_fn, key = make_model(CONFIG.model, 10), make_loss(CONFIG.label_smoothing), jax.random.key(0)
    tx = make_tx(CONFIG.optim, steps_per_epoch * CONFIG.num_epochs)
    state = init_state(key, jnp.zeros((1, 32, 32, 3)), model=model, tx=tx)
    batches = list(make_batches((32, 32, 3), 64 * CONFIG.batch_size, CONFIG.batch_size))
    seconds = {"without": [], "with": []}
    with tempfile.TemporaryDirectory() as folder, closing(Checkpoints(Path(folder) / "checkpoints")) as checkpoints:
        for turn in range(2 * (turns + 1)):
            kind = ("without", "with")[turn % 2]
            start = time.perf_counter()
            for i, batch in enumerate(batches):
                state, _ = train_step(state, batch, key, model=model, tx=tx, loss_fn=loss_fn)
                if kind == "with" and i == 0:
                    checkpoints.save(state, {"best_step": None}, {"accuracy": 0.5})
            jax.block_until_ready(state)
            checkpoints.wait()
            if turn >= 2:  # The first two compile.
                seconds[kind].append(time.perf_counter() - start)
        start = time.perf_counter()
        tree_sha256(state.params)
        digest = time.perf_counter() - start
        start = time.perf_counter()
        with manifest.session(Path(folder), manifest.environment(jax.devices()[:1]), ()):
            pass
        session = time.perf_counter() - start
    epoch = statistics.median(seconds["without"]) / len(batches) * steps_per_epoch
    differences = [b - a for a, b in zip(seconds["without"], seconds["with"], strict=True)]
    save = statistics.median(differences)
    run = epoch * CONFIG.num_epochs
    saves = CONFIG.num_epochs + run / 60
    total = saves * save + CONFIG.num_epochs * digest + session
    for kind, values in seconds.items():
        spread = f"{min(values):.2f} to {max(values):.2f}"
        print(f"{len(batches)} steps {kind} a save: {statistics.median(values):.2f} s ({spread})")
    print(f"a save costs {save:.3f} s ({min(differences):.3f} to {max(differences):.3f} in a turn)")
    print(f"the digest of an epoch takes {digest:.3f} s, the manifest of a run {session:.3f} s")
    print(f"cifar10_cnn: {saves:.0f} saves in {run:.0f} s of training, {total:.1f} s in all: {total / run:.2%}")


def make_pass(way, model_name, num_seeds):
    """Returns a function that trains every seed on one pass over the images."""
    import jax
    import jax.numpy as jnp
    import optax

    from cnnjax import CNN, MLP, init_state, train_step

    shape, count = SHAPES[model_name]
    model, tx = (CNN if model_name == "cnn" else MLP)(10), optax.adam(1e-3)
    keys = [jax.random.key(seed) for seed in range(num_seeds)]
    states = [init_state(key, jnp.zeros((1, *shape)), model=model, tx=tx) for key in keys]
    batches = list(make_batches(shape, count))

    def train(state, key):
        for batch in batches:
            state, _ = train_step(state, batch, key, model=model, tx=tx)
        return state

    if way == "vmap":
        step = jax.jit(jax.vmap(lambda s, b, k: train_step(s, b, k, model=model, tx=tx)), donate_argnums=0)
        stacked = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)]
        many = [jax.tree.map(lambda leaf: np.stack([leaf] * num_seeds), batch) for batch in batches]

        def one_pass():
            for batch in many:
                stacked[0], _ = step(stacked[0], batch, jnp.stack(keys))
            jax.block_until_ready(stacked)

    elif way == "devices":
        places = [jax.devices()[seed % len(jax.devices())] for seed in range(num_seeds)]
        states = [jax.device_put(state, place) for state, place in zip(states, places, strict=True)]
        keys = [jax.device_put(key, place) for key, place in zip(keys, places, strict=True)]
        threads = ThreadPoolExecutor(len(jax.devices()))

        def one_pass():
            states[:] = threads.map(train, states, keys)
            jax.block_until_ready(states)

    else:

        def one_pass():
            for seed in range(num_seeds):
                states[seed] = jax.block_until_ready(train(states[seed], keys[seed]))

    return one_pass


def contend(way, model_name, num_seeds):
    """Makes a pass for each line on standard input, and prints a line when it is done."""
    one_pass = make_pass(way, model_name, num_seeds)
    for _ in range(2):
        one_pass()  # Compiles and warms up.
    print("ready", flush=True)
    for _ in sys.stdin:
        one_pass()
        print("done", flush=True)


def seeds(turns, num_seeds):
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # Of this process and the contenders: they share a GPU.
    import jax

    on_cpu = jax.default_backend() == "cpu"
    for model_name, (_, count) in SHAPES.items():
        processes, speed = {}, {way: [] for way in WAYS}
        for way in WAYS:
            # On a CPU, where there is one device, two share its cores.
            flags = "--xla_force_host_platform_device_count=2" if way == "devices" and on_cpu else ""
            apart = num_seeds if way == "processes" else 1
            command = [sys.executable, __file__, "seeds", "--contend", way, model_name]
            command += ["--num-seeds", str(num_seeds // apart)]
            environment = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            processes[way] = [subprocess.Popen(command, env=environment, **pipes) for _ in range(apart)]
            for process in processes[way]:
                assert process.stdout.readline() == "ready\n"
        for _ in range(turns):
            for way, group in processes.items():
                start = time.perf_counter()
                for process in group:
                    process.stdin.write("\n")
                    process.stdin.flush()
                for process in group:
                    process.stdout.readline()
                speed[way].append(num_seeds * count / (time.perf_counter() - start))
        for way, group in processes.items():
            for process in group:
                process.stdin.close()
                process.wait()
            ratio = statistics.median(a / b for a, b in zip(speed[way], speed["sequential"], strict=True))
            print(
                f"{model_name} {way:10} {statistics.median(speed[way]):7.0f} images/s over {num_seeds} seeds "
                f"({min(speed[way]):.0f} to {max(speed[way]):.0f}), {ratio:.2f} × sequential"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "seeds"))
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--num-seeds", type=int, default=4)
    parser.add_argument("--contend", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contend:
        contend(*args.contend, args.num_seeds)
    elif args.what == "cost":
        cost(args.turns)
    else:
        seeds(args.turns, args.num_seeds)


if __name__ == "__main__":
    main()
