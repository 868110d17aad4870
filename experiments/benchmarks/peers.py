"""The contenders of cpu.py, two networks in cnnjax and in its peers, and airbench. A process of the harness.

    echo '["training_pass", "Keras 3 float32", 128, 4096]' | PYTHON experiments/benchmarks/peers.py
    yes next | PYTHON experiments/benchmarks/peers.py airbench94_muon.py FOLDER    # of its data

PYTHON is the interpreter of the environment in which the contender is installed; peers do not need cnnjax.
"""

import os
import re
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from harness import EXPERIMENTS, answer, serve

RESIDUAL = ((32, 1), (64, 2), (128, 2))  # Channels and stride of each block of a user's network.

# --- Each yields after a pass over the images, when its device has finished -----------------------------------------


def cnnjax_passes(image: np.ndarray, label: np.ndarray, batch_size: int, dtype: str) -> Iterator[None]:
    import optax

    from cnnjax import CNN, CrossEntropy, keep_memory

    keep_memory()
    model, tx = CNN(10, dtype=dtype), optax.adam(1e-3)
    return step_passes(image, label, batch_size, model=model, tx=tx, loss_fn=CrossEntropy())


def muon_passes(image: np.ndarray, label: np.ndarray, batch_size: int, *widths: int) -> Iterator[None]:
    from cnnjax import keep_memory
    from cnnjax.cli.experiment import load_experiment

    keep_memory()
    config = load_experiment(str(EXPERIMENTS / "cifar10_fast.py")).config
    model = config.model.clone(widths=widths)
    tx = config.optim.make_tx(50_000 // batch_size * config.num_epochs, config.num_epochs)
    return step_passes(image, label, batch_size, model=model, tx=tx, loss_fn=config.loss)


def residual_passes(image: np.ndarray, label: np.ndarray, batch_size: int, dtype: str, fast: bool) -> Iterator[None]:
    """A user's network of Flax's layers, with jax's convolution or cnnjax's."""
    import flax.linen as nn
    import optax

    from cnnjax import conv_general_dilated, keep_memory, softmax_cross_entropy

    def conv_norm(x, features, size, stride, train):
        options = {"conv_general_dilated": conv_general_dilated} if fast else {}
        x = nn.Conv(features, (size, size), strides=stride, use_bias=False, dtype=dtype, **options)(x)
        return nn.BatchNorm(not train, momentum=0.9, dtype=dtype)(x)

    class Residual(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            x = nn.relu(conv_norm(x, RESIDUAL[0][0], 3, 1, train))
            for features, stride in RESIDUAL:
                y = nn.relu(conv_norm(x, features, 3, stride, train))
                y = conv_norm(y, features, 3, 1, train)
                x = nn.relu(y + (x if stride == 1 else conv_norm(x, features, 1, stride, train)))
            return nn.Dense(10)(x.mean((1, 2)).astype("float32"))

    keep_memory()
    tx = optax.sgd(0.01, 0.9)
    return step_passes(image, label, batch_size, model=Residual(), tx=tx, loss_fn=softmax_cross_entropy)


def step_passes(
    image: np.ndarray, label: np.ndarray, batch_size: int, *, model: Any, tx: Any, loss_fn: Any
) -> Iterator[None]:
    import jax

    from cnnjax import Batch, init_from_data, init_state, train_step

    key = jax.random.key(0)
    state = init_state(key, image[:1], model=model, tx=tx)
    if hasattr(model, "init_from_data"):
        state = init_from_data(state, image, model=model, tx=tx)
    parts = [slice(i, i + batch_size) for i in range(0, len(label), batch_size)]
    batches = jax.device_put([Batch(image[i], label[i], np.ones(batch_size, bool)) for i in parts])
    while True:
        for batch in batches:
            state, _ = train_step(state, batch, key, model=model, tx=tx, loss_fn=loss_fn)
        jax.block_until_ready(state)
        yield


def flax_passes(image: np.ndarray, label: np.ndarray, batch_size: int) -> Iterator[None]:
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


def torch_cnn() -> tuple[Any, Any, Any]:
    """Returns the tutorial's network, its optimizer and its loss."""
    import torch
    from torch import nn

    def group(c, features):
        conv = (nn.Conv2d(c, features, 3, padding=1), nn.ReLU(), nn.Conv2d(features, features, 3, padding=1), nn.ReLU())
        return (*conv, nn.MaxPool2d(2), nn.Dropout(0.25))

    head = (nn.Flatten(), nn.Linear(4096, 512), nn.ReLU(), nn.Dropout(0.5), nn.Linear(512, 10))
    model = nn.Sequential(*group(3, 32), *group(32, 64), *head)
    return model, torch.optim.Adam(model.parameters(), 1e-3), nn.CrossEntropyLoss()


def torch_speednet(*widths: int) -> tuple[Any, Any, Any]:
    """Returns the network of `cifar10_fast`, SGD instead of its Muon, and its loss; filters are not whitened."""
    import torch
    from torch import nn

    def norm(features):
        norm = nn.BatchNorm2d(features, eps=1e-12, momentum=0.4)
        norm.weight.requires_grad_(False)
        return norm, nn.GELU("tanh")

    def group(c, features):
        first, second = (nn.Conv2d(i, features, 3, padding=1, bias=False) for i in (c, features))
        return (first, nn.MaxPool2d(2), *norm(features), second, *norm(features))

    class SpeedNet(nn.Module):
        def __init__(self):
            super().__init__()
            whiten = nn.Conv2d(3, 24, 2)
            whiten.weight.requires_grad_(False)
            groups = (layer for pair in pairwise((24, *widths)) for layer in group(*pair))
            head = (nn.MaxPool2d(3), nn.Flatten(), nn.Linear(widths[-1], 10, bias=False))
            self.layers = nn.Sequential(whiten, nn.GELU("tanh"), *groups, *head)

        def forward(self, x):
            return self.layers(x) / 9

    model = SpeedNet()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sgd = torch.optim.SGD(trained, 0.01, momentum=0.85, weight_decay=0.0042, nesterov=True)
    return model, sgd, nn.CrossEntropyLoss(label_smoothing=0.2)


def torch_residual() -> tuple[Any, Any, Any]:
    """Returns the network of `residual_passes`, its optimizer and its loss."""
    import torch
    from torch import nn

    def conv_norm(c, features, size, stride):
        conv = nn.Conv2d(c, features, size, stride, padding=size // 2, bias=False)
        return conv, nn.BatchNorm2d(features)

    class Block(nn.Module):
        def __init__(self, c, features, stride):
            super().__init__()
            second = conv_norm(features, features, 3, 1)
            self.main = nn.Sequential(*conv_norm(c, features, 3, stride), nn.ReLU(), *second)
            self.side = nn.Sequential(*(conv_norm(c, features, 1, stride) if stride > 1 else ()))

        def forward(self, x):
            return torch.relu(self.main(x) + self.side(x))

    first = RESIDUAL[0][0]
    widths = [first, *(features for features, _ in RESIDUAL)]
    blocks = [Block(c, features, stride) for c, (features, stride) in zip(widths, RESIDUAL, strict=False)]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))
    model = nn.Sequential(*conv_norm(3, first, 3, 1), nn.ReLU(), *blocks, *head)
    return model, torch.optim.SGD(model.parameters(), 0.01, momentum=0.9), nn.CrossEntropyLoss()


def torch_passes(
    image: np.ndarray,
    label: np.ndarray,
    batch_size: int,
    *widths: int,
    make: Callable[..., tuple[Any, Any, Any]] = torch_cnn,
    last: bool = False,
    half: bool = False,
    compiled: bool = False,
) -> Iterator[None]:
    import torch

    model, optimizer, loss_fn = make(*widths)
    layout = torch.channels_last if last else torch.contiguous_format
    model = model.to(memory_format=layout)
    if compiled:
        model = torch.compile(model)
    x = torch.tensor(image).permute(0, 3, 1, 2).contiguous(memory_format=layout)
    y = torch.tensor(label, dtype=torch.long)
    while True:
        for i in range(0, len(label), batch_size):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                logits = model(x[i : i + batch_size])
            loss_fn(logits.float(), y[i : i + batch_size]).backward()
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


def keras_passes(image: np.ndarray, label: np.ndarray, batch_size: int) -> Iterator[None]:
    model = keras_model()
    while True:
        model.fit(image, label, batch_size=batch_size, verbose=0)
        yield


class Contender(NamedTuple):
    """An implementation of a network: which part measures it, and whether the peers' environment contains it."""

    passes: Callable[..., Iterator[None]]
    details: str = ""
    peer: bool = True
    part: str = "step"


residual_half = partial(torch_passes, make=torch_residual, last=True, half=True)
half_passes = partial(torch_passes, last=True, half=True)
sgd_passes = partial(half_passes, make=torch_speednet)
CONTENDERS = {
    "cnnjax float32": Contender(partial(cnnjax_passes, dtype="float32"), peer=False),
    "cnnjax bfloat16": Contender(partial(cnnjax_passes, dtype="bfloat16"), ": `--model.dtype bfloat16`", peer=False),
    "Flax float32": Contender(flax_passes, ": `nn.Conv`, `nn.max_pool`, `nn.Dropout`, jax's default flags", peer=False),
    "Keras 3 float32": Contender(keras_passes, ": on TensorFlow, `fit`"),
    "PyTorch float32": Contender(torch_passes, ": eager, channels first"),
    "PyTorch float32, channels last": Contender(partial(torch_passes, last=True), ": eager"),
    "PyTorch bfloat16, channels last": Contender(half_passes, ": eager, autocast"),
    "PyTorch bfloat16, channels last, compiled": Contender(partial(half_passes, compiled=True), ": autocast"),
    "cnnjax bfloat16, Muon": Contender(muon_passes, peer=False, part="speednet"),
    "PyTorch bfloat16, SGD": Contender(sgd_passes, ": channels last, eager, autocast", part="speednet"),
    "PyTorch bfloat16, SGD, compiled": Contender(
        partial(sgd_passes, compiled=True), ": channels last, autocast", part="speednet"
    ),
    "cnnjax's convolution, float32": Contender(
        partial(residual_passes, dtype="float32", fast=True), peer=False, part="residual"
    ),
    "cnnjax's convolution, bfloat16": Contender(
        partial(residual_passes, dtype="bfloat16", fast=True), peer=False, part="residual"
    ),
    "jax's convolution, float32": Contender(
        partial(residual_passes, dtype="float32", fast=False), peer=False, part="residual"
    ),
    "jax's convolution, bfloat16": Contender(
        partial(residual_passes, dtype="bfloat16", fast=False), peer=False, part="residual"
    ),
    "PyTorch, float32": Contender(
        partial(torch_passes, make=torch_residual, last=True), ": channels last, eager", part="residual"
    ),
    "PyTorch, bfloat16": Contender(residual_half, ": channels last, eager, autocast", part="residual"),
    "PyTorch, bfloat16, compiled": Contender(
        partial(residual_half, compiled=True), ": channels last, autocast", part="residual"
    ),
}

# --- Questions ------------------------------------------------------------------------------------------------------


def prepare(name: str, batch_size: int, num_images: int, *widths: int) -> str:
    """Prepares a contender for `training_pass`; returns "", or why a peer cannot run here."""
    try:
        start_passes(name, batch_size, num_images, *widths)
    except Exception as error:
        if not CONTENDERS[name].peer:
            raise
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def training_pass(name: str, batch_size: int, num_images: int, *widths: int) -> float:
    """Returns the seconds of a warm pass."""
    passes = start_passes(name, batch_size, num_images, *widths)
    start = time.perf_counter()
    next(passes)
    return time.perf_counter() - start


@cache
def start_passes(name: str, batch_size: int, num_images: int, *widths: int) -> Iterator[None]:
    rng = np.random.default_rng(0)
    image = rng.normal(size=(num_images, 32, 32, 3)).astype(np.float32)
    label = rng.integers(0, 10, num_images).astype(np.int32)
    passes = CONTENDERS[name].passes(image, label, batch_size, *widths)
    next(passes)  # Compiles.
    return passes


def keras_to_accuracy(seed: int, path: str, max_epochs: int) -> list[tuple[float, float]]:
    """Trains the tutorial's code to 78.5%; returns the test accuracy and the training seconds of each epoch."""
    import keras

    keras.utils.set_random_seed(seed)
    arrays = np.load(path)
    x, x_test = (arrays[name].astype("float32") / 255 for name in ("train_image", "test_image"))
    model, epochs = keras_model(), []
    while not epochs or (epochs[-1][0] < 0.785 and len(epochs) < max_epochs):
        start = time.perf_counter()
        model.fit(x, arrays["train_label"], batch_size=32, validation_split=0.1, verbose=0)
        seconds = time.perf_counter() - start
        accuracy = float(model.evaluate(x_test, arrays["test_label"], batch_size=500, verbose=0)[1])
        epochs.append((accuracy, seconds))
        print(f"epoch {len(epochs)}: {accuracy:.2%} after {seconds:.0f} s", file=sys.stderr, flush=True)
    return epochs


def write_airbench_data(path: str, folder: str) -> str:
    """Writes CIFAR-10 as airbench's loader does, which would download it."""
    import torch

    arrays = np.load(path)
    for split in ("train", "test"):
        image, label = (torch.tensor(arrays[f"{split}_{name}"]) for name in ("image", "label"))
        content = {"images": image, "labels": label.long(), "classes": list("0123456789")}
        torch.save(content, f"{folder}/{split}.pt")
    return folder


def run_script(path: str, folder: str) -> None:
    """Runs a script of airbench unchanged, except that each of its runs begins with a question, which it answers.

    The first answer is the number of seconds until the first run, which compiles, has ended; the others are accuracy
    and seconds of a run.
    """
    start, warm = time.perf_counter(), False

    def show(*values: object) -> None:
        nonlocal warm
        line = " ".join(map(str, values))
        print(line, file=sys.stderr)
        if result := airbench_result(line):
            answer({"accuracy": result[0], "seconds": [result[1]]} if warm else time.perf_counter() - start)
            warm = True
            wait()

    def wait() -> None:
        if not sys.stdin.readline():
            sys.exit()

    wait()
    os.chdir(folder)
    sys.argv = [path]  # It reads its own source.
    runpy.run_path(path, {"print": show}, "__main__")


def airbench_result(line: str) -> tuple[float, float] | None:
    """Returns accuracy and seconds of a run, the last two columns of a complete row of airbench's table."""
    found = re.match(r"\|.*\|\s+(0\.\d+)\s+\|\s+(\d+\.\d+)\s+\|\s*$", line)
    return (float(found[1]), float(found[2])) if found else None


if __name__ == "__main__":
    if sys.argv[1:]:
        run_script(*sys.argv[1:])
    serve(prepare, training_pass, keras_to_accuracy, write_airbench_data)
