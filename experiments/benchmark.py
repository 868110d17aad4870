"""How fast a training step of the tutorial's network is, beside plain Flax and PyTorch.

Each contender trains on the same 2,048 random images of CIFAR-10's shape in a process of its own. They take turns, so
that a change of the machine's speed meets all of them; a turn is one warm pass over the images, synchronised at both
ends. Printed is the median of the turns, with the smallest and largest, and the ratio to cnnjax in the same turn.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

import numpy as np


def cnnjax_pass(image, label, batch_size):
    import jax
    import jax.numpy as jnp
    import optax

    from cnnjax import CNN, Batch, init_state, train_step

    model, tx, key = CNN(10), optax.adam(1e-3), jax.random.key(0)
    state = init_state(key, jnp.zeros((1, 32, 32, 3)), model=model, tx=tx)
    mask = np.ones(batch_size, bool)
    while True:
        for i in range(0, len(label), batch_size):
            part = slice(i, i + batch_size)
            state, _ = train_step(state, Batch(image[part], label[part], mask), key, model=model, tx=tx)
        jax.block_until_ready(state)
        yield


def flax_pass(image, label, batch_size):
    from functools import partial

    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import optax

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            for features in (32, 64):
                x = nn.relu(nn.Conv(features, (3, 3))(x))
                x = nn.relu(nn.Conv(features, (3, 3))(x))
                x = nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))
                x = nn.Dropout(0.25, deterministic=False)(x)
            x = nn.relu(nn.Dense(512)(x.reshape(x.shape[0], -1)))
            return nn.Dense(10)(nn.Dropout(0.5, deterministic=False)(x))

    model, tx, key = Plain(), optax.adam(1e-3), jax.random.key(0)
    params = model.init({"params": key, "dropout": key}, jnp.zeros((1, 32, 32, 3)))["params"]

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, image, label, key):
        def loss(params):
            logits = model.apply({"params": params}, image, rngs={"dropout": key})
            return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    while True:
        for i in range(0, len(label), batch_size):
            part = slice(i, i + batch_size)
            params, opt_state = step(params, opt_state, image[part], label[part], jax.random.fold_in(key, i))
        jax.block_until_ready(params)
        yield


def torch_pass(image, label, batch_size):
    import torch
    from torch import nn

    def group(c, features):
        conv = (nn.Conv2d(c, features, 3, padding=1), nn.ReLU(), nn.Conv2d(features, features, 3, padding=1), nn.ReLU())
        return (*conv, nn.MaxPool2d(2), nn.Dropout(0.25))

    model = nn.Sequential(
        *group(3, 32),
        *group(32, 64),
        nn.Flatten(),
        nn.Linear(4096, 512),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(512, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    x, y = torch.tensor(image).permute(0, 3, 1, 2).contiguous(), torch.tensor(label, dtype=torch.long)
    while True:
        for i in range(0, len(label), batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[i : i + batch_size]), y[i : i + batch_size]).backward()
            optimizer.step()
        yield


CONTENDERS = {
    "cnnjax": (cnnjax_pass, "the step of this package"),
    "flax": (flax_pass, "the same step, nn.max_pool and nn.Dropout, jax's default flags"),
    "torch": (torch_pass, "PyTorch, eager, channels first (where it is installed)"),
}


def contend(name, batch_size):
    """Makes a pass for each line on standard input, and prints its seconds."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2048, 32, 32, 3)).astype(np.float32)
    label = rng.integers(0, 10, 2048).astype(np.int32)
    passes = CONTENDERS[name][0](image, label, batch_size)
    for _ in range(2):
        next(passes)  # Compiles and warms up.
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        next(passes)
        print(time.perf_counter() - start, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--contend", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contend:
        return contend(args.contend, args.batch_size)
    processes = {}
    for name in CONTENDERS:
        command = [sys.executable, __file__, "--contend", name, "--batch-size", str(args.batch_size)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ)
        if process.stdout.readline() == "ready\n":  # Its warm-up is over before the next one starts.
            processes[name] = process
    speed = {name: [] for name in processes}
    for _ in range(args.turns):
        for name, process in processes.items():
            process.stdin.write("\n")
            process.stdin.flush()
            speed[name].append(2048 / float(process.stdout.readline()))
    for name, process in processes.items():
        process.stdin.close()
        process.wait()
        ratio = statistics.median(a / b for a, b in zip(speed[name], speed["cnnjax"], strict=True))
        print(
            f"{name:7} {statistics.median(speed[name]):6.0f} images/s ({min(speed[name]):.0f} to "
            f"{max(speed[name]):.0f}), {ratio:.2f} × cnnjax   {CONTENDERS[name][1]}"
        )
    return None


if __name__ == "__main__":
    main()
