"""Differentiates plain networks on four simulated devices, and prints the errors relative to one device as JSON."""

import json
import os
from functools import partial

# Before jax starts.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # Compiles in half the time.

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cnnjax import CNN, SpeedNet

NETWORKS = {"cnn": (CNN(3, plain=True), (5, 4, 1)), "speednet": (SpeedNet(3, (3, 3, 3), plain=True), (9, 9, 1))}
KEY = jax.random.key(0)


def loss_fn(params, rest, image, label, *, model, train):
    logits, after = model.apply(
        {"params": params, **rest}, image, train=train, rngs={"dropout": KEY}, mutable=["batch_stats"]
    )
    return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean(), after


def relative_error(got, wanted):
    got, wanted = (jax.tree.leaves(jax.device_get(tree)) for tree in (got, wanted))
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, wanted, strict=True))


def main():
    errors = {}
    for name, (model, shape) in NETWORKS.items():
        rng = np.random.default_rng(0)
        image, label = jnp.asarray(rng.normal(size=(8, *shape)), jnp.float32), jnp.arange(8) % 3
        variables = model.init(KEY, image, train=False)
        if name == "speednet":
            variables = model.init_from_data(variables, image)
        params = variables.pop("params")

        grad = jax.grad(partial(loss_fn, model=model, train=True), has_aux=True)
        wanted = jax.jit(grad)(params, variables, image, label)
        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
        with jax.set_mesh(mesh):
            examples = jax.device_put((image, label), NamedSharding(mesh, P("data")))
            state = jax.device_put((params, variables), NamedSharding(mesh, P()))
            errors[f"{name} explicit"] = relative_error(jax.jit(grad)(*state, *examples), wanted)

        def mean_loss(params, *args, model=model):
            return jax.lax.pmean(loss_fn(params, *args, model=model, train=False)[0], "data")

        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
        specs = (P(), P(), P("data"), P("data"))
        mapped = jax.shard_map(jax.grad(mean_loss), mesh=mesh, in_specs=specs, out_specs=P())
        wanted, _ = jax.jit(jax.grad(partial(loss_fn, model=model, train=False), has_aux=True))(
            params, variables, image, label
        )
        errors[f"{name} shard_map"] = relative_error(jax.jit(mapped)(params, variables, image, label), wanted)
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
