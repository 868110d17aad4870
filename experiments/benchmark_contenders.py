"""The contenders of benchmark.py: the tutorial's network by this package and its peers, each in a process of its own.

    PYTHON experiments/benchmark_contenders.py pass "Keras 3 float32"    # a batch size a line in, seconds of a pass out
    PYTHON experiments/benchmark_contenders.py keras SEED FILE           # the tutorial's code until it scores 78.5%

The interpreter is that of the environment in which the contender is installed; peers need nothing of this package.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np

NUM_IMAGES = 4096  # Of a pass.
MOST_EPOCHS = 200  # The lesson's.

# --- Each yields after a pass over the images, and waits for its device before --------------------------------------


def cnnjax_pass(image: np.ndarray, label: np.ndarray, batch_size: int, dtype: str) -> Iterator[None]:
    import jax
    import jax.numpy as jnp
    import optax

    from cnnjax import CNN, Batch, init_state, train_step

    model, tx, key = CNN(10, dtype=dtype), optax.adam(1e-3), jax.random.key(0)
    state = init_state(key, jnp.zeros((1, 32, 32, 3)), model=model, tx=tx)
    parts = [slice(i, i + batch_size) for i in range(0, len(label), batch_size)]
    batches = jax.device_put([Batch(image[i], label[i], np.ones(batch_size, bool)) for i in parts])
    while True:
        for batch in batches:
            state, _ = train_step(state, batch, key, model=model, tx=tx)
        jax.block_until_ready(state)
        yield


def flax_pass(image: np.ndarray, label: np.ndarray, batch_size: int) -> Iterator[None]:
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
    parts = [slice(i, i + batch_size) for i in range(0, len(label), batch_size)]
    batches = jax.device_put([(image[i], label[i]) for i in parts])
    while True:
        for i, batch in enumerate(batches):
            params, opt_state = step(params, opt_state, *batch, jax.random.fold_in(key, i))
        jax.block_until_ready(params)
        yield


def torch_pass(
    image: np.ndarray, label: np.ndarray, batch_size: int, channels_last: bool, dtype: str
) -> Iterator[None]:
    import torch
    from torch import nn

    def group(c, features):
        conv = (nn.Conv2d(c, features, 3, padding=1), nn.ReLU(), nn.Conv2d(features, features, 3, padding=1), nn.ReLU())
        return (*conv, nn.MaxPool2d(2), nn.Dropout(0.25))

    head = (nn.Flatten(), nn.Linear(4096, 512), nn.ReLU(), nn.Dropout(0.5), nn.Linear(512, 10))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = nn.Sequential(*group(3, 32), *group(32, 64), *head).to(memory_format=layout)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    x = torch.tensor(image).permute(0, 3, 1, 2).contiguous(memory_format=layout)
    y = torch.tensor(label, dtype=torch.long)
    while True:
        for i in range(0, len(label), batch_size):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                logits = model(x[i : i + batch_size])
            nn.functional.cross_entropy(logits.float(), y[i : i + batch_size]).backward()
            optimizer.step()
        yield


def keras_model():
    import keras
    from keras import layers

    def group(features):
        conv = (layers.Conv2D(features, 3, padding="same", activation="relu") for _ in range(2))
        return (*conv, layers.MaxPooling2D(), layers.Dropout(0.25))

    head = (layers.Flatten(), layers.Dense(512, activation="relu"), layers.Dropout(0.5))
    model = keras.Sequential(
        [keras.Input((32, 32, 3)), *group(32), *group(64), *head, layers.Dense(10, activation="softmax")]
    )
    model.compile(loss="sparse_categorical_crossentropy", optimizer="adam", metrics=["accuracy"])
    return model


def keras_pass(image: np.ndarray, label: np.ndarray, batch_size: int) -> Iterator[None]:
    model = keras_model()
    while True:
        model.fit(image, label, batch_size=batch_size, verbose=0)
        yield


CONTENDERS: dict[str, tuple[str, bool, Callable[..., Iterator[None]]]] = {
    "cnnjax float32": ("", False, lambda *a: cnnjax_pass(*a, "float32")),
    "cnnjax bfloat16": ("`--model.dtype bfloat16`", False, lambda *a: cnnjax_pass(*a, "bfloat16")),
    "Flax float32": ("`nn.Conv`, `nn.max_pool`, `nn.Dropout`, jax's default flags", False, flax_pass),
    "Keras 3 float32": ("on TensorFlow, `fit`", True, keras_pass),
    "PyTorch float32": ("eager, channels first", True, lambda *a: torch_pass(*a, False, "float32")),
    "PyTorch float32, channels last": ("eager", True, lambda *a: torch_pass(*a, True, "float32")),
    "PyTorch bfloat16, channels last": ("eager, autocast", True, lambda *a: torch_pass(*a, True, "bfloat16")),
}


def contend(name: str) -> None:
    """Prints the seconds of a warm pass, of the batch size that each line on standard input gives."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(NUM_IMAGES, 32, 32, 3)).astype(np.float32)
    label = rng.integers(0, 10, NUM_IMAGES).astype(np.int32)
    passes = {}
    for line in sys.stdin:
        if line not in passes:
            passes[line] = CONTENDERS[name][2](image, label, int(line))
            next(passes[line])
        start = time.perf_counter()
        next(passes[line])
        print("seconds", time.perf_counter() - start, flush=True)


def keras_to_accuracy(seed: int, data: str) -> None:
    """Trains the tutorial's code until it scores 78.5%, or to its last epoch.

    Prints the accuracy after each epoch and the seconds of its training, without those of scoring.
    """
    import keras

    keras.utils.set_random_seed(seed)
    arrays = np.load(data)
    x, x_test = (arrays[name].astype("float32") / 255 for name in ("train_image", "test_image"))
    model, seconds, accuracies = keras_model(), [], []
    while not accuracies or (accuracies[-1] < 0.785 and len(accuracies) < MOST_EPOCHS):
        start = time.perf_counter()
        model.fit(x, arrays["train_label"], batch_size=32, validation_split=0.1, verbose=0)
        seconds.append(time.perf_counter() - start)
        accuracies.append(float(model.evaluate(x_test, arrays["test_label"], batch_size=500, verbose=0)[1]))
        print(f"epoch {len(seconds)}: {accuracies[-1]:.2%} after {sum(seconds):.0f} s", file=sys.stderr, flush=True)
    print("result", json.dumps({"seconds": seconds, "accuracies": accuracies}), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "pass":
        contend(sys.argv[2])
    else:
        keras_to_accuracy(int(sys.argv[2]), sys.argv[3])
