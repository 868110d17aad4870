"""A process of benchmark_gpu.py: trains a recipe on the records' clock, one seed per input line.

    echo 0 | .venv/bin/python experiments/benchmark_gpu_contender.py --variant "as it is"

It compiles and warms up, prints `ready` and the seconds that took, and then for each seed `result`, the accuracy, the
seconds in all, of whitening, of training and of scoring, and the beginning of the parameters' digest. A line `profile
FOLDER` instead of a seed traces a run and prints its kernels by their share.
"""

import argparse
import importlib
import json
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from benchmark_gpu_variants import VARIANTS

from cnnjax.cli.console import Report
from cnnjax.data.batches import Pixels, row, standardize
from cnnjax.evaluate import evaluate
from cnnjax.experiment import Run, set_up
from cnnjax.models.whitening import NUM_IMAGES, whiten
from cnnjax.runs.files import tree_sha256
from cnnjax.step import TrainState, init_state


def plans_of(run: Run, one_program: bool):
    """Yields the plans of a run and their first steps, each of an epoch, or one of all of it."""
    steps = range(0, run.steps_per_epoch * run.config.num_epochs, run.steps_per_dispatch)
    if one_program:
        yield 0, jax.tree.map(lambda *rows: jnp.concatenate(rows), *(run.plan(step) for step in steps))
    else:
        yield from ((step, run.plan(step)) for step in steps)


def train(run: Run, seed: int, test: Pixels, one_program: bool) -> tuple[float, tuple[float, ...], str]:
    """Returns the accuracy, the seconds in all and of each part, and the digest of the parameters."""
    init_key, train_key = jax.random.split(jax.random.key(seed))
    run = run._replace(config=replace(run.config, seed=seed), train_key=train_key)
    image = run.train.image
    state = init_state(init_key, jnp.zeros((1, *image.shape[1:])), model=run.model, tx=run.tx)
    jax.block_until_ready(state)
    instants = [time.perf_counter()]
    if run.config.model.name == "speednet":
        state = jax.block_until_ready(whiten(state, standardize(image[:NUM_IMAGES], run.train.standardization)))
    instants.append(time.perf_counter())
    for step, plan in plans_of(run, one_program):  # The host draws the next plan while the device works.
        state, _ = run.train_steps(state, plan, step)
    jax.block_until_ready(state)
    instants.append(time.perf_counter())
    accuracy = evaluate(state, test, model=run.model, views=run.config.views, placement=run.placement).accuracy
    instants.append(time.perf_counter())
    parts = (b - a for a, b in pairwise(instants))
    return accuracy, (instants[-1] - instants[0], *parts), tree_sha256(state.params)


def kernels(folder: Path) -> str:
    """Returns in words what the device did in a trace: its kernels by their share, and how long it was idle."""
    profile = jax.profiler.ProfileData.from_file(str(next(folder.rglob("*.xplane.pb"))))
    spans, totals = [], {}
    for plane in profile.planes:
        for line in plane.lines:
            if "GPU" not in plane.name or not line.name.startswith("Stream"):
                continue
            for event in line.events:
                spans.append((event.start_ns, event.start_ns + event.duration_ns))
                name = f"{dict(event.stats).get('hlo_op', '')} {event.name}"
                seconds, count = totals.get(name, (0.0, 0))
                totals[name] = seconds + event.duration_ns / 1e9, count + 1
    if not spans:
        return "The trace has no kernels of a GPU."
    spans.sort()
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0, stop - max(start, end)) / 1e9
        end = max(end, stop)
    span = (end - spans[0][0]) / 1e9
    lines = [f"{span:.3f} s from the first kernel to the last, {busy:.3f} s busy, {len(spans)} kernels"]
    for name, (seconds, count) in sorted(totals.items(), key=lambda item: -item[1][0])[:30]:
        lines.append(f"{seconds / span:6.1%} {1e3 * seconds:9.2f} ms {count:6} × {name[:150]}")
    return "\n".join(lines)


def first_steps(run: Run, state: TrainState, count: int) -> np.ndarray:
    """Returns all parameters after `count` steps, float32 [P]."""
    for step in range(0, count, min(count, run.steps_per_dispatch)):
        state, _ = run.train_steps(state, row(run.plan(step), slice(0, count)), step)
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.params)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=VARIANTS, default="as it is")
    parser.add_argument("--recipe", help="a file of this folder, without .py, instead of the variant's")
    parser.add_argument("--config", default="{}", help="fields of the configuration that differ, as JSON")
    parser.add_argument("--first-steps", nargs=2, metavar=("COUNT", "FILE"), help="save the parameters, and end")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    begin = time.perf_counter()
    variant = VARIANTS[args.variant]
    config = importlib.import_module(args.recipe or variant.recipe).CONFIG
    config = variant.change(replace(config, **json.loads(args.config)))
    if args.small:
        config = replace(config, num_epochs=1, model=replace(config.model, widths=(8, 16, 16)))
    run, state, _ = set_up(config, Path("unused"), None, None, Report(quiet=True))
    if args.first_steps:
        np.save(args.first_steps[1], first_steps(run, state, int(args.first_steps[0])))
        return
    test = run.validation
    if not config.validation_fraction:
        examples = run.dataset.load("test")
        test = jax.device_put(Pixels(*examples, run.train.standardization), run.placement.state)
    if args.small:
        test = Pixels(test.image[:500], test.label[:500], test.standardization)
    for seed in range(1 if args.small else 2):
        train(run, 1_000_000 + seed, test, variant.one_program)  # Of no seed that is timed: plans are kept.
    print("ready", time.perf_counter() - begin, flush=True)
    for line in sys.stdin:
        if line.startswith("profile "):
            folder = Path(line[8:].strip())
            with jax.profiler.trace(str(folder)):
                train(run, 0, test, variant.one_program)
            print(kernels(folder))
            print("profiled", flush=True)
        else:
            accuracy, seconds, digest = train(run, int(line), test, variant.one_program)
            print("result", accuracy, *seconds, digest[:8], flush=True)


if __name__ == "__main__":
    main()
