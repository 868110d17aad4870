"""The variants of gpu.py's ladder, and the process that trains one of them on the records' clock.

    echo '["train_seed", 0]' | .venv/bin/python experiments/benchmarks/variants.py --variant "as it is"

A variant is a recipe with one difference (the recipe for 96%: with several): XLA flags, or a change that is made before
anything is compiled. The change is one of the configuration, or replaces a function of the package by one that computes
the same in another way (or nearly the same, if its name says so).
"""

import argparse
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise, takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from harness import EXPERIMENTS, seconds, serve, take_turns
from images import decode_all, predict_all, save_tiles
from jax import lax

from cnnjax import (
    Batch,
    Config,
    Muon,
    ParamGroup,
    Report,
    Run,
    SpeedNet,
    compiler_options,
    init_from_data,
    keep_memory,
    load_run,
)
from cnnjax import program as steps
from cnnjax.cli.experiment import load_experiment
from cnnjax.data import batches
from cnnjax.data.batches import Pixels, standardize
from cnnjax.dispatch import Dispatch, open_dispatches
from cnnjax.evaluation import evaluate_pixels
from cnnjax.files import tree_sha256
from cnnjax.inputs import load_inputs
from cnnjax.layers import conv, norm, ops
from cnnjax.models import speednet
from cnnjax.models.speednet import SpeedConv
from cnnjax.optim import transforms
from cnnjax.prepare import INIT_IMAGES, set_up
from cnnjax.program import Program, init_train_state
from cnnjax.setup import Setup
from cnnjax.state import TrainState
from cnnjax.train import train_run

MUON, NINETY_SIX, TUTORIAL = "cifar10_airbench94_muon", "cifar10_airbench96", "cifar10_tutorial"
ANY_KERNELS = "--xla_gpu_deterministic_ops=false"
GRAPHS = "--xla_gpu_enable_command_buffer=+CONVOLUTION"

# --- Variants -------------------------------------------------------------------------------------------------------

Change = Callable[[Config], Config]


class Variant(NamedTuple):
    """The differences from a recipe."""

    flags: str = ""
    change: Change = lambda config: config
    recipe: str = MUON
    one_program: bool = False  # The whole run instead of each epoch.


def fields(**values: Any) -> Change:
    """Changes fields of the configuration."""
    return lambda config: replace(config, **values)


def instead(module: Any, **functions: Any) -> Change:
    """Replaces functions of a module of the package."""
    assert functions.keys() <= vars(module).keys(), functions
    return lambda config: vars(module).update(functions) or config


def norm_gelu_in_sums_of_16_bits(x, bias, residual=None):
    """Computes the statistics without float32."""
    mean = x.mean((0, 1, 2), dtype=x.dtype)
    var = jnp.maximum((x * x).mean((0, 1, 2), dtype=x.dtype) - mean**2, 0)
    scale = lax.rsqrt(var.astype(jnp.float32) + norm.EPSILON)
    y = norm._norm_gelu(x, mean.astype(jnp.float32), scale, bias, residual)
    return y, lax.stop_gradient(mean.astype(jnp.float32)), lax.stop_gradient(var.astype(jnp.float32))


class PoolAfterTheNorm(SpeedNet):
    """`SpeedNet` of depth 2 that pools after the first norm of a group instead of before it."""

    @nn.compact
    def __call__(self, image, *, train):
        """Returns logits."""
        x = ops.gelu(speednet.Whiten(name="whiten")(jnp.asarray(image, self.dtype)))
        for width in self.widths:
            x = norm.NormGelu()(speednet.SpeedConv(width, even=True)(x), train=train)
            x = norm.NormGelu()(speednet.SpeedConv(width)(ops.max_pool_2x2(x)), train=train)
        head = self.param("head", nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"), (x.shape[-1], 10))
        return x.max(axis=(1, 2)).astype(jnp.float32) @ head / 9


def network(model: type[SpeedNet]) -> Change:
    """Trains another network of the same widths and dtype."""

    def change(config: Config) -> Config:
        given: Any = config.model
        return replace(config, model=model(widths=given.widths, dtype=given.dtype))

    return change


def norm_gradient_of_cee6fb2(x, g, mean, scale, *shift):
    """Keeps both arguments behind a barrier, and normalizes `x` again for the image's gradient."""
    x, g = lax.optimization_barrier((x, g))
    _, pullback = jax.vjp(nn.gelu, norm._norm(x, mean, scale, *shift))
    g = lax.optimization_barrier(pullback(g.astype(jnp.float32))[0].astype(x.dtype))
    wide, normal, count = g.astype(jnp.float32), norm._norm(x, mean, scale), x.size // x.shape[-1]
    bias_grad, along = wide.sum((0, 1, 2)), (wide * normal).sum((0, 1, 2))
    x_grad = norm._row(scale) * (wide - norm._row(bias_grad) / count - normal * (norm._row(along) / count))
    return x_grad.astype(x.dtype), bias_grad.astype(shift[0].dtype), g


@jax.custom_vjp
def pool_norm_gelu(x, bias):
    """Returns `batch_norm_gelu(max_pool_2x2(x), bias)`; the gradients of both are one kernel."""
    return pool_norm_gelu_fwd(x, bias)[0]


def pool_norm_gelu_fwd(x, bias):
    pooled, index = ops.max_pool_with_index(x)
    y, mean, var, scale = norm._forward(pooled, bias)
    return (y, mean, var), (pooled, index, mean, scale, bias)


def pool_norm_gelu_bwd(residuals, cotangents):
    x, index, mean, scale, bias = residuals
    x = lax.optimization_barrier(x)
    _, pullback = jax.vjp(nn.gelu, norm._norm(x, mean, scale, bias))
    g = lax.optimization_barrier(pullback(cotangents[0].astype(jnp.float32))[0].astype(x.dtype))
    wide, count, (b, h, w, c) = g.astype(jnp.float32), x.size // x.shape[-1], x.shape
    bias_grad, along = wide.sum((0, 1, 2)), (wide * norm._norm(x, mean, scale)).sum((0, 1, 2))
    slope = -(scale**2) * along / count

    def windows(x):  # Repeated before the arithmetic, so that XLA repeats this, too, instead of storing its result.
        return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))

    def row(x):
        return x[None, None, None, None, None]

    x_grad = row(scale) * windows(g).astype(jnp.float32) + row(slope) * windows(x).astype(jnp.float32)
    x_grad = (x_grad - row(scale * bias_grad / count + slope * mean)).astype(x.dtype)
    corner = jnp.arange(4, dtype=jnp.uint8).reshape(1, 1, 2, 1, 2, 1)
    return jnp.where(windows(index) == corner, x_grad, 0).reshape(b, 2 * h, 2 * w, c), bias_grad


pool_norm_gelu.defvjp(pool_norm_gelu_fwd, pool_norm_gelu_bwd)


class PoolWithNorm(SpeedNet):
    """`SpeedNet` of depth 2 with `pool_norm_gelu`."""

    @nn.compact
    def __call__(self, image, *, train):
        """Returns logits."""
        x = ops.gelu(speednet.Whiten(name="whiten")(jnp.asarray(image, self.dtype)))
        for i, width in enumerate(self.widths):
            x = speednet.SpeedConv(width, even=True)(x)
            if train and not self.is_initializing():
                x = self._pool_and_norm(x, f"NormGelu_{2 * i}")
            else:
                x = norm.NormGelu(name=f"NormGelu_{2 * i}")(ops.max_pool_2x2(x), train=train)
            x = norm.NormGelu(name=f"NormGelu_{2 * i + 1}")(speednet.SpeedConv(width)(x), train=train)
        head = self.param("head", nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"), (x.shape[-1], 10))
        return x.max(axis=(1, 2)).astype(jnp.float32) @ head / 9

    def _pool_and_norm(self, x, name):
        y, mean, var = pool_norm_gelu(x, self.get_variable("params", name)["bias"])
        batch, running = lax.stop_gradient({"mean": mean, "var": var}), self.get_variable("batch_stats", name)
        averages = jax.tree.map(lambda a, b: norm.MOMENTUM * a + (1 - norm.MOMENTUM) * b, running, batch)
        self.put_variable("batch_stats", name, averages)
        return y


def pool_by_comparison(config: Config) -> Config:
    """Keeps the pool's input and result instead of an index."""
    pool: Any = ops.max_pool_2x2

    def fwd(x):
        y = pool.__wrapped__(x)
        return y, (x, y)

    pool.defvjp(fwd, ops._max_pool_bwd)
    return config


def batch_by_slices(pixels, plan, augment=None, key=None):
    """Cuts a slice out of each padded image instead of gathering its pixels."""
    if augment is None or (t := augment.translate) == 0:
        return batches.make_batch(pixels, plan, augment, key)
    padded = jnp.pad(pixels.image, ((0, 0), (t, t), (t, t), (0, 0)), "reflect")
    size = (1, *pixels.image.shape[1:])

    def cut(example, shift, mirrored):  # Mirrored afterwards, so it moves in the other direction here.
        return lax.dynamic_slice(padded, (example, t - shift[0], t + jnp.where(mirrored, 1, -1) * shift[1], 0), size)[0]

    image = jax.vmap(cut)(plan.example, plan.shift, plan.mirrored)
    image = jnp.where(plan.mirrored[:, None, None, None], image[:, :, ::-1], image)
    return Batch(standardize(image, pixels.standardization), pixels.label[plan.example], plan.mask)


UNROLLED = SimpleNamespace(scan=partial(lax.scan, unroll=5), stop_gradient=lax.stop_gradient)
# Takes the CPU's branch: one matrix at a time, in float32.
EACH_ALONE = SimpleNamespace(platform_dependent=lambda *operands, cpu, default: cpu(*operands))


def whitening_bias_trained_throughout(config: Config) -> Config:
    groups = tuple(replace(group, num_epochs=None) for group in config.optim.groups)
    return replace(config, optim=replace(config.optim, groups=groups))


def by_muon(num_epochs: int) -> Change:
    """Trains the recipe for 96% by Muon, with the recipe's learning rates for biases and last layer; not tuned yet."""
    rate = 0.15
    groups = (
        ParamGroup("^whiten/", multiplier=1.17 / rate, num_epochs=3),
        ParamGroup(r"^NormGelu_\d+/bias$", multiplier=75 / rate),
        ParamGroup("^head$", multiplier=1.17 / rate),
    )
    optim = Muon(learning_rate=rate, schedule="one_cycle", warmup=0.1, weight_decay=0.0167, groups=groups)
    return fields(num_epochs=num_epochs, optim=optim)


SHORT = fields(num_epochs=3)
VARIANTS = {
    "as it is": Variant(),
    "any kernels": Variant(ANY_KERNELS),
    "any kernels, channels as they are": Variant(
        ANY_KERNELS, instead(conv, _fill=lambda x, axis: x, convolution_on_accelerators=conv.convolution_by_xla)
    ),
    "the other flag for determinism": Variant(f"{ANY_KERNELS} --xla_gpu_exclude_nondeterministic_ops=true"),
    "no autotuning, any kernels": Variant(f"{ANY_KERNELS} --xla_gpu_autotune_level=0"),
    "graphs with convolutions": Variant(GRAPHS),
    "graphs with convolutions and loops": Variant(f"{GRAPHS},+WHILE"),
    "whole run as one program, with every gradient": Variant(one_program=True),
    "unroll 5": Variant(change=instead(steps, lax=UNROLLED)),
    "channels first": Variant("--xla_gpu_force_conv_nchw=true"),
    "float16": Variant(change=lambda config: replace(config, model=replace(config.model, dtype="float16"))),
    "statistics in 16 bits": Variant(change=instead(norm, batch_norm_gelu=norm_gelu_in_sums_of_16_bits)),
    "norm and GELU by JAX": Variant(change=instead(norm, batch_norm_gelu=norm.plain_batch_norm_gelu)),
    "norm's gradient of cee6fb2": Variant(change=instead(norm, _backward=norm_gradient_of_cee6fb2)),
    "pool and norm as one": Variant(change=network(PoolWithNorm)),
    "pool and norm as one, any kernels": Variant(ANY_KERNELS, network(PoolWithNorm)),
    "pool after the norm": Variant(change=network(PoolAfterTheNorm)),
    "pool by comparison": Variant(change=pool_by_comparison),
    "every output before a pool": Variant(
        change=instead(speednet, SpeedConv=lambda width, even=False, plain=False: SpeedConv(width))
    ),
    "Muon of each kernel alone": Variant(change=instead(transforms, lax=EACH_ALONE)),
    "whitening bias trained throughout": Variant(change=whitening_bias_trained_throughout),
    "augmentation by slices": Variant(change=instead(steps, make_batch=batch_by_slices)),
    "scored by six views of every image": Variant(change=fields(tta="flip_translate")),
    "96%, any kernels": Variant(ANY_KERNELS, recipe=NINETY_SIX),
    "96%, any kernels, Muon, 24 epochs": Variant(ANY_KERNELS, by_muon(24), NINETY_SIX),
    "96%, any kernels, Muon, 30 epochs": Variant(ANY_KERNELS, by_muon(30), NINETY_SIX),
    "tutorial, 3 epochs": Variant("", SHORT, TUTORIAL),
    "tutorial, 3 epochs, any kernels": Variant(ANY_KERNELS, SHORT, TUTORIAL),
    "tutorial, 3 epochs, graphs": Variant(f"{GRAPHS},+WHILE", SHORT, TUTORIAL),
}

# --- The process ----------------------------------------------------------------------------------------------------


def of_seed(setup: Setup, seed: int) -> tuple[Setup, TrainState]:
    """Returns the setup of another seed, and its initial state without what depends on data."""
    init_key, train_key, augment_key = jax.random.split(jax.random.key(seed), 3)
    config = replace(setup.config, seed=seed)
    setup = setup._replace(config=config, train_key=train_key, augment_key=augment_key)
    image = jnp.zeros((1, *setup.train.image.shape[1:]))
    return setup, jax.block_until_ready(init_train_state(init_key, image, program=setup.program))


def initialized_from_data(setup: Setup, state: TrainState) -> TrainState:
    """Returns a state that is initialized from the first training images, if the network is."""
    if not hasattr(setup.config.model, "init_from_data"):
        return state
    pixels = cast(Pixels, setup.train)  # They fit into memory.
    image = standardize(pixels.image[:INIT_IMAGES], pixels.standardization)
    return init_from_data(state, image, model=setup.config.model, tx=setup.program.make_tx())


def timed_run(setup: Setup, seed: int, test: Pixels, one_program: bool, num_steps: int) -> dict[str, Any]:
    """Trains a seed. The seconds are those in total, of the initialization from data, of training and of scoring."""
    setup, state = of_seed(setup, seed)
    config, times = setup.config, [time.perf_counter()]
    state = jax.block_until_ready(initialized_from_data(setup, state))
    times.append(time.perf_counter())
    state = jax.block_until_ready(train(setup, state, num_steps, one_program))
    times.append(time.perf_counter())
    accuracy = evaluate_pixels(state, test, model=config.model, tta=config.tta, placement=setup.placement).accuracy
    times.append(time.perf_counter())
    seconds = [times[-1] - times[0], *(b - a for a, b in pairwise(times))]
    return {"accuracy": accuracy, "seconds": seconds, "digest": tree_sha256(state.params)[:8]}


def train(setup: Setup, state: TrainState, num_steps: int, one_program: bool = False) -> TrainState:
    """Trains the first `num_steps` steps, as one program per dispatch or as a single one."""
    with open_dispatches(setup, 0) as of_run:
        dispatches = [merged(of_run, num_steps, setup.program)] if one_program else of_run
        for (step, after), pixels, plan, augment_key, program in dispatches:  # Drawn while the device computes.
            rows = plan if after <= num_steps else plan.row(slice(num_steps - step))
            state, _ = steps.train_steps(state, pixels, rows, setup.train_key, augment_key, program=program)
            if after >= num_steps:
                break
    return state


def merged(dispatches: Iterator[Dispatch], num_steps: int, program: Program) -> Dispatch:
    """Returns all steps as one dispatch, with the key of the first epoch: nothing in the ladder depends on it."""
    parts = [*takewhile(lambda dispatch: dispatch.steps[0] < num_steps, dispatches)]
    plan = jax.tree.map(lambda *rows: jnp.concatenate(rows), *(part.plan for part in parts))
    return parts[0]._replace(steps=(0, parts[-1].steps[1]), plan=plan, program=program)


def steps_to_warm_up(setup: Setup) -> int:
    """Returns the number of steps until each program has run for an epoch."""
    steps, num_epochs = setup.steps_per_epoch, setup.config.num_epochs
    programs = [setup.program_at(epoch) for epoch in range(num_epochs)]
    return steps * (1 + programs.index(programs[-1]))


def seconds_to_train(setup: Setup, seeds: Sequence[int], way: str) -> float:
    """Trains many seeds from their initial states to the last step, without scores; returns the seconds.

    Args:
      way: "sequential", or "vmap": one program for all of them.
    """
    setups, states = zip(*(of_seed(setup, seed) for seed in seeds), strict=True)
    states = jax.block_until_ready([*map(initialized_from_data, setups, states)])
    stack = partial(jax.tree.map, lambda *leaves: jnp.stack(leaves))
    stacked = jax.block_until_ready(stack(*states)) if way == "vmap" else None
    start = time.perf_counter()
    if way == "sequential":
        for one, state in zip(setups, states, strict=True):
            jax.block_until_ready(train(one, state, setup.program.num_steps))
        return time.perf_counter() - start
    keys = jnp.stack([one.train_key for one in setups])
    with ExitStack() as opened:
        all_dispatches = [opened.enter_context(open_dispatches(one, 0)) for one in setups]
        for dispatches in zip(*all_dispatches, strict=True):
            plans, augment_keys = stack(*(one.plan for one in dispatches)), [one.augment_key for one in dispatches]
            train_steps = vmapped_steps(dispatches[0].program)
            stacked, _ = train_steps(stacked, setup.train, plans, keys, jnp.stack(augment_keys))
    jax.block_until_ready(stacked)
    return time.perf_counter() - start


@cache
def vmapped_steps(program: Program) -> Any:
    """Returns `train_steps` for many states, plans and keys at the same time."""
    steps_of_one = partial(steps.train_steps, program=program)
    many = jax.vmap(steps_of_one, in_axes=(0, None, 0, 0, 0))
    return jax.jit(many, donate_argnums=0, compiler_options=compiler_options())


def kernels(folder: str) -> str:
    """Describes what the device did in a trace: its kernels by their share, and the time when it was idle."""
    planes = jax.profiler.ProfileData.from_file(str(next(Path(folder).rglob("*.xplane.pb")))).planes
    streams = [
        line for plane in planes if "GPU" in plane.name for line in plane.lines if line.name.startswith("Stream")
    ]
    events = sorted((event for line in streams for event in line.events), key=lambda event: event.start_ns)
    if not events:
        return "The trace has no kernels of a GPU."
    busy, end, totals = 0.0, events[0].start_ns, {}
    for event in events:
        stop = event.start_ns + event.duration_ns
        busy += max(0, stop - max(event.start_ns, end)) / 1e9
        end = max(end, stop)
        name = f"{dict(event.stats).get('hlo_op', '')} {event.name}"
        seconds, count = totals.get(name, (0.0, 0))
        totals[name] = seconds + event.duration_ns / 1e9, count + 1
    span = (end - events[0].start_ns) / 1e9
    lines = [f"{span:.3f} s from the first kernel to the last, {busy:.3f} s busy, {len(events)} kernels"]
    for name, (seconds, count) in sorted(totals.items(), key=lambda item: -item[1][0])[:30]:
        lines.append(f"{seconds / span:6.1%} {1e3 * seconds:9.2f} ms {count:6} × {name[:150]}")
    return "\n".join(lines)


class Said(Report):
    """Keeps the lines that a run says, and prints nothing."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        """Keeps a line."""
        self.lines.append(line)


def whole_run(config: Config, folder: str, kill: bool = False, **options: Any) -> dict[str, Any]:
    """Trains as `cnnjax train --resume` does, with a run directory.

    The seconds are those before the first step, of training, and from the end of the last epoch to the end of the run.

    Args:
      kill: end this process by SIGKILL after the first epoch (from the second on) that has a complete checkpoint.
    """
    start, ends, said = time.perf_counter(), [], Said()

    def on_epoch(row: Any, state: TrainState) -> None:
        ends.append(time.perf_counter())
        while kill and len(ends) > 1:
            if any(path.name.isdigit() for path in Path(folder, "checkpoints").glob("*")):  # Others are incomplete.
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.001)

    run = train_run(config, run_dir=folder, resume="auto", on_epoch=on_epoch, report=said, **options)
    end, result = time.perf_counter(), run.finished_result()
    training, last = result["training_seconds"], ends[-1] if ends else end  # A finished run is not trained again.
    return {
        "accuracy": result["test_accuracy"],
        "seconds": [last - start - training, training, end - last],
        "digests": result["sha256"],
        "utilization": [*run.history.get("flops_utilization", [])],  # On a CPU the peak is not known.
        "lines": said.lines,
    }


def images_per_second(run: Run, paths: Sequence[Path]) -> dict[str, list[float]]:
    """Measures decoding of files, prediction of as many images in memory, and both together."""
    images = np.random.default_rng(0).integers(0, 256, (len(paths), *run.facts.image_shape), np.uint8)
    work: dict[str, Any] = {"decoding alone": partial(decode_all, paths, image_shape=run.facts.image_shape)}
    for views in ("none", "flip_translate"):
        work[f"`predict`, views: {views}"] = partial(run.predict, images, tta=views)
        work[f"`predict_files`, views: {views}"] = partial(predict_all, run, paths, tta=views)
    times = take_turns({name: partial(seconds, function) for name, function in work.items()}, turns=3)
    return {name: [len(paths) / value for value in values] for name, values in times.items()}


def random_images() -> tuple[np.ndarray, ...]:
    """Returns a small set in CIFAR-10's shape."""
    rng = np.random.default_rng(0)
    image, label = rng.integers(0, 256, (600, 32, 32, 3), np.uint8), rng.integers(0, 10, 600)
    return image[:500], label[:500], image[500:], label[500:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=VARIANTS, default="as it is")
    parser.add_argument("--recipe", help="an experiment, instead of the variant's")
    parser.add_argument("--held-out", type=float, help="score this fraction of the training split, not the test split")
    parser.add_argument("--small", action="store_true", help="two epochs of a small network on few random images")
    args = parser.parse_args()
    keep_memory()
    start, variant = time.perf_counter(), VARIANTS[args.variant]
    config = load_experiment(str(EXPERIMENTS / f"{args.recipe or variant.recipe}.py")).config
    if args.held_out is not None:
        config = replace(config, validation_fraction=args.held_out)
    config = variant.change(config)
    if args.small:
        model = replace(config.model, widths=(8, 16, 16)) if isinstance(config.model, SpeedNet) else config.model
        config = replace(config, dataset=random_images, num_epochs=2, batch_size=125, model=model)
    inputs = load_inputs(config)
    setup, initial_state = set_up(config, inputs, None, title=args.variant, say=lambda line: None)
    test = cast(Pixels, setup.validation)
    if not config.validation_fraction:
        test = Pixels(*setup.dataset.load("test"), setup.train.standardization)
        test = jax.device_put(test, setup.placement.replicated)

    def warm_up() -> float:
        num_steps = setup.program.num_steps if variant.one_program else steps_to_warm_up(setup)
        timed_run(setup, 1_000_000, test, variant.one_program, num_steps)  # Not a seed that is timed.
        return time.perf_counter() - start

    def train_seed(seed: int) -> dict[str, Any]:
        return timed_run(setup, seed, test, variant.one_program, setup.program.num_steps)

    def profile(folder: str) -> str:
        with jax.profiler.trace(folder):
            train_seed(0)
        return kernels(folder)

    def run(seed: int, folder: str, kill: bool = False, profile: bool = False) -> dict[str, Any]:
        last = setup.program.num_steps
        steps = (last - 2 * setup.steps_per_epoch, last - setup.steps_per_epoch) if profile else None
        return whole_run(replace(config, seed=seed), folder, kill, inputs=inputs, profile=steps)

    def first_steps(count: int, path: str) -> str:
        state = train(setup, initial_state, count)
        np.save(path, np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.params)]))
        return path

    def train_many(way: str, first: int, count: int) -> float:
        return seconds_to_train(setup, range(first, first + count), way)

    def make_tiles(folder: str, count: int) -> int:
        return len(save_tiles(Path(folder), count))

    def predict(run_dir: str, tiles: str) -> dict[str, list[float]]:
        return images_per_second(load_run(run_dir, config), sorted(Path(tiles).glob("*.png")))

    serve(warm_up, train_seed, train_many, profile, run, make_tiles, predict, first_steps)


if __name__ == "__main__":
    main()
