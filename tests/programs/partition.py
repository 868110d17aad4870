"""Calls oneDNN on eight simulated devices and under `vmap`.

Prints as JSON how the calls were divided, and their errors relative to the largest value.
"""

import json
import os
import re
from collections import Counter
from contextlib import contextmanager
from functools import partial
from typing import Any

# Before jax starts.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # Compiles in half the time.

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cnnjax import CNN, Batch, init_state, train_step
from cnnjax.layers.conv import plain_conv2d
from cnnjax.layers.norm import batch_norm_gelu, plain_batch_norm_gelu
from cnnjax.onednn import calls, library
from cnnjax.sharding import place

PADDING = ((1, 1), (1, 0))
DEVICES = np.array(jax.devices())
MESH, THREE = (Mesh(DEVICES[:n], ("data",), axis_types=(AxisType.Auto,)) for n in (8, 3))
SQUARE = Mesh(DEVICES.reshape(4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
WHOLE, BATCH, BATCH_BY_BOTH = P(), P("data"), P(("data", "model"))
DIVIDED = (BATCH, WHOLE, WHOLE, BATCH)  # Image, kernel, bias, gradient of the result.


def operations(image, kernel, bias, g):
    """Returns a result and the gradients of image, kernel and bias."""
    y = calls.convolution(image, kernel, bias, padding=PADDING, relu=True)
    image_grad = calls.image_grad(g, kernel, size=image.shape[1:3], padding=PADDING)
    return y, image_grad, *calls.kernel_grad(image, g, size=kernel.shape[:2], padding=PADDING, bias=True)


def by_xla(image, kernel, bias, g):
    """Returns `operations` of the same arguments, by plain XLA operations."""
    y, pullback = jax.vjp(lambda x, k, b: plain_conv2d(x, k, b, PADDING, False), image, kernel, bias)
    return jnp.maximum(y, 0), *pullback(g)


def normalized(f, x, bias, residual, g):
    """Returns the results of a batch normalization with GELU, and its gradients."""
    (y, mean, var), pullback = jax.vjp(f, x, bias, residual)
    return y, mean, var, *pullback((g, jnp.zeros_like(mean), jnp.zeros_like(var)))


def without_last(image, kernel, bias, g):
    return operations(image[:-1], kernel, bias, g[:-1])


def scanned(image, kernel, bias, g):
    def body(carry, _):
        return carry, jax.jit(operations)(image, kernel * carry, bias, g)

    return [x[1] for x in lax.scan(body, jnp.float32(1), length=2)[1]]


def sharded_by_hand(mesh, axis_names):
    def local(*arrays):
        y, image_grad, *sums = operations(*arrays)
        return y, image_grad, *lax.psum(sums, "data")

    options = {"axis_names": axis_names, "check_vma": not axis_names}
    return jax.shard_map(local, mesh=mesh, in_specs=DIVIDED, out_specs=(BATCH, BATCH, WHOLE, WHOLE), **options)


@contextmanager
def undivided():
    """Traces calls without `divided`."""
    divided, calls.divided = calls.divided, lambda call, dims, config: call
    try:
        yield
    finally:
        calls.divided = divided


def relative_error(got, wanted):
    got, wanted = (jax.tree.leaves(jax.device_get(tree)) for tree in (got, wanted))
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, wanted, strict=True))


def calls_and_collectives(text):
    """Returns what an optimized program calls and communicates.

    calls: the number of calls of oneDNN by their kind. batches: their numbers of examples, without repetitions.
    gathered: the shapes that are moved between devices. sums: the number of sums over devices.
    """
    found = re.findall(r'custom_call_target="cnnjax_(\w+)", operand_layout_constraints=\{\w+\[(\d+),', text)
    moves = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    collectives = re.findall(rf"= (.*?) ({moves})(?:-start)?\(", text)
    return {
        "calls": Counter(kind for kind, _ in found),
        "batches": sorted({int(batch) for _, batch in found}),
        "gathered": [shape for shape, name in collectives if name != "all-reduce"],
        "sums": sum(name == "all-reduce" for _, name in collectives),
    }


def put(arrays, mesh, specs):
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]


def compare(f, arrays, mesh, specs, wanted):
    """Calls a function of arrays that devices share."""
    arrays = put(arrays, mesh, specs)
    compiled = jax.jit(f).lower(*arrays).compile()
    return {"error": relative_error(compiled(*arrays), wanted), **calls_and_collectives(compiled.as_text())}


def text_on_one_device(arrays):
    placement = place(16, jax.devices()[:1])
    sharding = placement.batch_sharding, placement.replicated
    arrays = jax.device_put(arrays, [sharding[i] for i in (0, 1, 1, 0)])
    text = str(jax.jit(operations).lower(*arrays).compile().as_text())
    return re.sub(r",? (metadata|frontend_attributes)=\{.*?\}", "", text[text.index("ENTRY") :])


def lowered(relu, arrays):
    """Returns a program before it is compiled, without addresses."""
    f = partial(calls.convolution, padding=PADDING, relu=relu)
    text = jax.jit(f).lower(*put(arrays[:2], MESH, (BATCH, WHOLE))).as_text()
    assert "CustomSPMDPartitioning" in text
    return re.sub(r'backend_config = "\d+"', "", text)


def mapped_in_one_call(image, kernel):
    """Maps a convolution over two axes of images, which become one batch."""

    def over_images(f):
        return jax.jit(jax.vmap(jax.vmap(f, (0, None)), (0, None)))

    image = np.stack([image, -image])
    compiled = over_images(partial(calls.convolution, padding=PADDING)).lower(image, kernel).compile()
    wanted = over_images(lambda x, k: plain_conv2d(x, k, None, PADDING, False))(image, kernel)
    text = str(compiled.as_text())
    counts = {"calls": text.count("custom-call("), "loops": text.count("while(")}
    return {"error": relative_error(compiled(image, kernel), wanted), **counts}


def step_on_two_devices(rng):
    """Compares the parameters after a training step on two devices and on one."""
    batch = Batch(
        image=rng.normal(size=(16, 8, 8, 3)).astype(np.float32),
        label=np.arange(16, dtype=np.int32) % 10,
        mask=np.ones(16, bool),
    )
    model, tx, key = CNN(), optax.sgd(1.0), jax.random.key(0)
    step = partial(train_step, model=model, tx=tx, donate=False)
    results, found = [], {}
    for n in (1, 2):
        placement = place(16, jax.devices()[:n])
        state = jax.device_put(init_state(key, batch.image[:1], model=model, tx=tx), placement.replicated)
        args = state, jax.device_put(batch, placement.batch_sharding), key
        compiled = jax.jit(step).lower(*args).compile()
        results.append(compiled(*args)[0].params)
        found = calls_and_collectives(compiled.as_text())
    return {"error": relative_error(results[1], results[0]), **found}


def main():
    assert library.kernels().version  # Registers the calls.
    rng = np.random.default_rng(0)
    shapes = (16, 9, 8, 5), (3, 3, 5, 8), (8,), (16, 9, 7, 8)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    with undivided():
        wanted = jax.jit(operations)(*arrays)
        wanted_without_last = jax.jit(without_last)(*arrays)
        text = text_on_one_device(arrays)
    jax.clear_caches()

    by_data, by_model = (P(None, None, None, axis) for axis in ("data", "model"))
    g_by_both = P("data", None, None, "model")
    by_height = P(None, "data")
    cases: dict[str, tuple[Any, Mesh, tuple[P, ...]]] = {
        "batch": (operations, MESH, DIVIDED),
        "two axes": (operations, SQUARE, (BATCH_BY_BOTH, WHOLE, WHOLE, BATCH_BY_BOTH)),
        "scan": (scanned, MESH, DIVIDED),
        "shard_map": (sharded_by_hand(MESH, set()), MESH, DIVIDED),
        "shard_map of one axis": (sharded_by_hand(SQUARE, {"data"}), SQUARE, DIVIDED),
        "replicated": (operations, MESH, (WHOLE,) * 4),
        "replicated image": (operations, MESH, (WHOLE, WHOLE, WHOLE, BATCH)),
        "sharded weights": (operations, MESH, (BATCH, by_data, BATCH, BATCH)),
        "weights on another axis": (operations, SQUARE, (BATCH, by_model, P("model"), g_by_both)),
        "height": (operations, THREE, (by_height, WHOLE, WHOLE, by_height)),
    }
    found: dict[str, Any] = {name: compare(f, arrays, mesh, specs, wanted) for name, (f, mesh, specs) in cases.items()}
    found["uneven"] = compare(without_last, arrays, MESH, DIVIDED, wanted_without_last)
    found["against XLA"] = compare(operations, arrays, MESH, DIVIDED, jax.jit(by_xla)(*arrays))
    image = arrays[0]
    of_norm = image, image[0, 0, 0], image[::-1], image[:, ::-1]
    wanted_of_norm = jax.jit(partial(normalized, plain_batch_norm_gelu))(*of_norm)
    specs = BATCH, WHOLE, BATCH, BATCH
    found["norm"] = compare(partial(normalized, batch_norm_gelu), of_norm, MESH, specs, wanted_of_norm)
    explicit = Mesh(DEVICES, ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(explicit):
        found["explicit"] = compare(operations, arrays, explicit, DIVIDED, wanted)
    jax.config.update("jax_use_shardy_partitioner", False)
    found["without Shardy"] = compare(operations, arrays, MESH, DIVIDED, wanted)
    jax.config.update("jax_use_shardy_partitioner", True)

    divided = text_on_one_device(arrays)
    found["one device"] = {"same": divided == text, "calls": divided.count("custom-call(")}
    found["programs"] = [lowered(relu, arrays) for relu in (False, False, True)]

    stacks = [np.stack([x, x[::-1], 2 * x]) for x in arrays]
    found["vmap"] = {}
    for mapped in (0, 3), (0, 1, 2, 3), (1, 2), (0, 1):
        axes = [0 if i in mapped else None for i in range(4)]
        args = [stacks[i] if i in mapped else arrays[i] for i in range(4)]
        got, wanted = (jax.jit(jax.vmap(f, axes))(*args) for f in (operations, by_xla))
        found["vmap"][str(mapped)] = relative_error(got, wanted)
    found["vmap of images"] = mapped_in_one_call(stacks[0], arrays[1])
    found["step"] = step_on_two_devices(rng)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
