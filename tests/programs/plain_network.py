"""A network of plain functions, with batch statistics, dropout, and a vector that estimates a spectral norm.

cnnjax train tests/programs/plain_network.py --model.width 32
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from cnnjax import Config, run_experiment


@dataclass(frozen=True)
class PlainNetwork:
    width: int = 16
    num_classes: int = 10  # Set from the data.
    rate: float = 0.2

    def init(self, key, image):
        keys, size = jax.random.split(key, 3), image[0].size
        params = {
            "hidden": jax.random.normal(keys[0], (size, self.width)) / size**0.5,
            "head": jax.random.normal(keys[1], (self.width, self.num_classes)) / self.width**0.5,
            "bias": jnp.zeros(self.num_classes),
        }
        stats = {"mean": jnp.zeros(self.width), "var": jnp.ones(self.width)}
        return {"params": params, "batch_stats": stats, "spectral": jax.random.normal(keys[2], (self.width,))}

    def apply(self, variables, image, key, train):
        params, stats, u = variables["params"], variables["batch_stats"], variables["spectral"]
        x = image.reshape(len(image), -1) @ params["hidden"]
        if train:
            now = {"mean": x.mean(0), "var": x.var(0)}
            stats = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, stats, now)
            u = jax.lax.stop_gradient(params["head"] @ (params["head"].T @ u))  # One power iteration.
            u /= jnp.linalg.norm(u)
        now = now if train else stats
        x = jax.nn.relu((x - now["mean"][None]) / jnp.sqrt(now["var"][None] + 1e-5))
        if train:
            x = jnp.where(jax.random.bernoulli(key, self.rate, x.shape), 0, x / (1 - self.rate))
        head = params["head"] / jnp.linalg.norm(u @ params["head"])
        return x @ head + params["bias"][None], {"batch_stats": stats, "spectral": u}


CONFIG = Config(model=PlainNetwork())

if __name__ == "__main__":
    run_experiment(CONFIG)
