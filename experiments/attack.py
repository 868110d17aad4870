"""Attacks a trained network: its accuracy on test images that are moved to a higher loss, pixel by pixel.

    .venv/bin/python experiments/attack.py runs/mnist_mlp-seed0 --radius 25.5

Projected gradient descent (Madry et al. 2018): steps along the sign of the gradient, from the image itself, within the
radius and between 0 and 255. The network must be one of cnnjax's own.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from cnnjax import Batch, UserError, eval_step, load_run

BATCH_SIZE = 1000


def main() -> None:
    """Prints the accuracy of each run, before and after the attack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
    parser.add_argument("--radius", type=float, default=25.5, help="largest change of a pixel, of 255 levels (25.5)")
    parser.add_argument("--num-steps", type=int, default=20, help="number of steps (20)")
    args = parser.parse_args()
    if not 0 <= args.radius <= 255 or args.num_steps < 1:
        parser.error("--radius must be from 0 to 255, and --num-steps at least 1")
    for run_dir in args.runs:
        try:
            before, after = attack(load_run(run_dir), args.radius, args.num_steps)
        except UserError as error:
            parser.error(str(error))
        print(f"{run_dir}: {before:.2%} of the test images are correct, {after:.2%} within {args.radius:g} levels")


def attack(run, radius: float, num_steps: int) -> tuple[float, float]:
    """Returns the accuracy on the test images, and on the moved ones."""
    state, model, test = run.state, run.config.model, run.load_data("test")
    mean, std = (np.array(value, np.float32).reshape(1, 1, 1, -1) for value in (run.facts.mean, run.facts.std))

    def metrics_of(image, label):
        mask = jnp.ones(len(label), bool)
        return eval_step(state, Batch((image - mean) / std, label, mask), model=model)

    gradient = jax.jit(jax.grad(lambda image, label: metrics_of(image, label).loss))
    correct = np.zeros(2, int)
    for start in tqdm(range(0, len(test.label), BATCH_SIZE), leave=False):
        label = jnp.asarray(test.label[start : start + BATCH_SIZE])
        image = jnp.asarray(test.image[start : start + BATCH_SIZE], jnp.float32)
        moved, low, high = image, jnp.maximum(image - radius, 0), jnp.minimum(image + radius, 255)
        for _ in range(num_steps):
            moved = jnp.clip(moved + 2.5 * radius / num_steps * jnp.sign(gradient(moved, label)), low, high)
        correct += [int(metrics_of(x, label).correct) for x in (image, moved)]
    before, after = (correct / len(test.label)).tolist()
    return before, after


if __name__ == "__main__":
    main()
