"""The networks for photos: their parameters, logits and statistics, and how they take PyTorch's weights."""

import os
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from cnnjax import Batch, EfficientNetLite0, ResNet18, ResNet50, UserError, compiler_options, init_state, train_step
from cnnjax.data.weights import load_weights
from cnnjax.layers.blocks import ConvNorm, Head
from cnnjax.models import efficientnet, resnet
from cnnjax.models.resnet import BasicBlock, Bottleneck

sys.path.insert(0, str(Path(__file__).parents[1] / "programs"))
from formula import noise, weights

NETWORKS = (ResNet18, ResNet50, EfficientNetLite0)
PEERS = Path(__file__).parents[2] / ".venv-peers" / "bin" / "python"
RESNET18 = resnet._torch_names((2, 2, 2, 2), 2)


@cache
def shapes_of(model, size=(32, 32, 3)):
    return jax.eval_shape(partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, *size)))


def tensors_by_formula(model, names):
    """Returns PyTorch's tensors of a network. Name and place in the tensor determine each value."""
    shapes, tensors = shapes_of(model), {}
    for name, (path, axes) in names.items():
        own = shapes
        for part in path:
            own = own[part]
        tensors[name] = weights(name, tuple(own.shape[axes.index(axis)] for axis in range(len(axes))))
    return tensors


@pytest.mark.parametrize(
    ("network", "params", "statistics"),
    [(ResNet18, 11_689_512, 9_600), (ResNet50, 25_557_032, 53_120), (EfficientNetLite0, 4_652_008, 42_016)],
)
def test_parameter_counts_are_those_of_the_references(network, params, statistics):
    """As PyTorch counts them at 1000 classes; statistics without `num_batches_tracked`."""
    shapes = shapes_of(network(1000))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == params
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["batch_stats"])) == statistics
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype("float32")}
    # A class less is one column of the last kernel and one bias; a channel less is one slice of the first kernel.
    smaller = sum(leaf.size for leaf in jax.tree.leaves(shapes_of(network(999), (50, 40, 2))["params"]))
    width, first = (1280, 9 * 32) if network is EfficientNetLite0 else (512 if network is ResNet18 else 2048, 49 * 64)
    assert params - smaller == width + 1 + first


# --- Agreement with PyTorch -------------------------------------------------------------------------------------------

LOGITS = {  # tests/programs/torch_networks.py prints them.
    "resnet18": [
        [-0.24143901467323303, 0.582423210144043, 0.8880571722984314, -0.267727792263031],
        [-0.3627139627933502, 0.5583325028419495, 1.0489057302474976, -0.29346147179603577],
    ],
    "resnet50": [
        [0.35779982805252075, 1.8671283721923828, 0.8728107213973999, -1.4289880990982056],
        [0.2709050476551056, 1.9102344512939453, 0.8567932844161987, -1.4273924827575684],
    ],
    "lite0": [
        [0.15124110877513885, -0.06454901397228241, 0.3136487901210785, 0.08738011866807938],
        [0.1513606309890747, -0.06450782716274261, 0.31369513273239136, 0.08743078261613846],
    ],
    "timm": [
        [0.03684421256184578, 0.2293633222579956, 0.19628086686134338, -0.28651416301727295],
        [0.0367886908352375, 0.22939878702163696, 0.19626115262508392, -0.28645169734954834],
    ],
}


@pytest.mark.parametrize(
    ("reference", "model", "names"),
    [
        ("resnet18", ResNet18(4), RESNET18),
        ("resnet50", ResNet50(4, plain=True), resnet._torch_names((3, 4, 6, 3), 3)),
        ("lite0", EfficientNetLite0(4), efficientnet._names()),
        ("timm", EfficientNetLite0(4, plain=True), efficientnet._timm_names()),
    ],
)
@pytest.mark.usefixtures("quick_compilation")
def test_logits_are_those_of_pytorch(reference, model, names):
    variables = model.variables_from_torch(tensors_by_formula(model, names))
    assert jax.tree.structure(variables) == jax.tree.structure(shapes_of(model))
    assert {*model.depths()} == {*variables["params"]}
    logits = jax.jit(partial(model.apply, train=False))(variables, noise("image", (2, 45, 70, 3)))
    np.testing.assert_allclose(logits, LOGITS[reference], atol=2e-5)


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """Returns a folder with networks of PyTorch, see tests/programs/torch_networks.py."""
    interpreter = os.environ.get("CNNJAX_PEERS", PEERS)  # Another environment of the peers.
    if not Path(interpreter).exists():
        pytest.skip("needs PyTorch in .venv-peers, which `make .venv-peers/installed` sets up")
    folder = tmp_path_factory.mktemp("torch")
    program = Path(__file__).parents[1] / "programs" / "torch_networks.py"
    command = [interpreter, program, folder, "resnet18", "resnet50", "lite0", "lite0_imagenet"]
    subprocess.run(command, check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reference", "network"),
    [
        ("resnet18", ResNet18),
        ("resnet50", ResNet50),
        ("lite0", EfficientNetLite0),
        ("lite0_imagenet", EfficientNetLite0),
    ],
)
def test_files_of_pytorch_give_its_logits(references, reference, network):
    arrays = np.load(references / f"{reference}.npz")
    loaded = {}
    for suffix in ("pth", "nested.pth", "legacy.pth", "safetensors"):
        model = network(1000, weights=str(references / f"{reference}.{suffix}"))
        loaded[suffix] = load_weights(model, say=lambda line: None).tensors
    for tensors in loaded.values():
        for name, tensor in loaded["safetensors"].items():
            np.testing.assert_array_equal(tensors[name], tensor)
    for plain in (False, True):
        model = network(1000, plain=plain)
        variables = model.variables_from_torch(loaded["pth"])
        apply = jax.jit(partial(model.apply, train=False), compiler_options=compiler_options())
        for size in (224, 97):
            logits = apply(variables, arrays[f"image_{size}"])
            np.testing.assert_allclose(logits, arrays[f"logits_{size}"], atol=1e-4)


@pytest.mark.slow
def test_photos_are_recognized():
    """Chelsea is an Egyptian cat, coffee an espresso, and rocket a missile (the indices of ImageNet's classes)."""
    from PIL import Image
    from skimage import data

    from cnnjax.data.image_files import fit_image

    model = EfficientNetLite0(1000, weights="imagenet")
    loaded = load_weights(model, say=print)
    size, (mean, std) = loaded.preprocessing.image_size, loaded.standardization
    photos = [Image.fromarray(photo) for photo in (data.chelsea(), data.coffee(), data.rocket())]
    images = np.stack(
        [fit_image(photo, (size, size, 3), interpolation=loaded.preprocessing.interpolation) for photo in photos]
    )
    logits = jax.jit(partial(model.apply, train=False))(
        model.variables_from_torch(loaded.tensors), ((images - mean) / std).astype(np.float32)
    )
    assert np.argmax(logits, axis=-1).tolist() == [285, 967, 657]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("layer2.0.downsample.1.bias"),
            r"must hold the tensors of ResNet18, got none named layer2\.0\.downsample\.1\.bias\. The file has conv1",
        ),
        (lambda tensors: tensors.update(extra=np.zeros(1)), r"must hold the tensors of ResNet18, got more: extra\."),
        (
            lambda tensors: tensors.update({"bn1.weight": np.zeros(63, np.float32)}),
            r"got bn1\.weight of shape \[63\] instead of \[64\]\.",
        ),
        (
            lambda tensors: tensors.update({"layer1.0.conv1.weight": np.zeros((64, 64, 9), np.float32)}),
            r"got layer1\.0\.conv1\.weight of float32\[64, 64, 9\] instead of 4 dimensions of floating-point numbers\.",
        ),
        (
            lambda tensors: tensors.update({"fc.bias": np.zeros(4, np.int64)}),
            r"got fc\.bias of int64\[4\] instead of 1 dimensions of floating-point numbers\.",
        ),
        (
            lambda tensors: tensors.update({"fc.bias": np.zeros(5, np.float32)}),
            r"got fc\.weight of shape \[4, 512\] instead of \[5, 512\]\.",
        ),
    ],
)
def test_tensors_of_another_network(change, message):
    tensors = tensors_by_formula(ResNet18(4), RESNET18)
    change(tensors)
    with pytest.raises(UserError, match=message):
        ResNet18(4).variables_from_torch(tensors)


def test_counters_of_batches_are_ignored():
    model, names = ResNet18(4), RESNET18
    tensors = tensors_by_formula(model, names)
    counted = {**tensors, "bn1.num_batches_tracked": np.zeros((), np.int64)}
    jax.tree.map(np.testing.assert_array_equal, *map(model.variables_from_torch, (tensors, counted)))


# --- Training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
def test_statistics_are_kept_if_update_stats_is_false(network):
    """Training then uses the running statistics, as evaluation does."""
    shapes = shapes_of(network(4))
    for update in (True, False):
        model, fixed = network(4, update_stats=update), set()

        def record(next_call, args, kwargs, context, fixed=fixed):
            if isinstance(context.module, nn.BatchNorm):
                fixed.add(context.module.use_running_average)
            return next_call(*args, **kwargs)

        with nn.intercept_methods(record):
            apply = partial(model.apply, train=True, rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"])
            jax.eval_shape(apply, shapes, jnp.zeros((2, 20, 20, 3)))
        assert fixed == {not update}


@pytest.mark.parametrize(("network", "block", "depth"), [(ResNet18, BasicBlock, 8), (ResNet50, Bottleneck, 16)])
@pytest.mark.usefixtures("quick_compilation")
def test_blocks_begin_as_the_identity_if_zero_init_is_set(network, block, depth):
    """In training, too, up to the ReLU; and every block of the network gets the option."""
    x, blocks = jax.random.normal(jax.random.key(0), (2, 5, 6, 8)), {True: 0, False: 0}
    module = block(2 if block is Bottleneck else 8, 1, update_stats=True, plain=False, zero_init=True)
    y, _ = module.init_with_output(jax.random.key(1), x, train=True)
    np.testing.assert_array_equal(y, np.maximum(x, 0))

    def record(next_call, args, kwargs, context):
        if isinstance(context.module, block):
            blocks[context.module.zero_init] += 1
        return next_call(*args, **kwargs)

    for zero_init in (True, False):
        with nn.intercept_methods(record):
            shapes_of.__wrapped__(network(4, zero_init=zero_init))  # Calls the network even if the shapes are known.
    assert blocks == {True: depth, False: depth}


@pytest.mark.usefixtures("quick_compilation")
def test_a_batch_is_learned():
    model, tx, key = ResNet18(2), optax.sgd(0.05), jax.random.key(0)
    batch = Batch(noise("image", (4, 16, 16, 3)), np.array([0, 1, 1, 0]), np.ones(4, bool))
    state, losses = init_state(key, batch.image, model=model, tx=tx), []
    for _ in range(6):
        state, metrics = train_step(state, batch, key, model=model, tx=tx)
        losses.append(float(metrics.loss) / 4)
    assert losses[-1] < losses[0] / 4


@pytest.mark.parametrize("network", NETWORKS)
def test_features_logits_and_dropout(network):
    """Any size and any number of channels work; activations have the dtype, and pooled features and logits float32."""
    dtypes, rates = {}, []

    def record(next_call, args, kwargs, context):
        y = next_call(*args, **kwargs)
        dtypes[context.module.name] = str(y.dtype)
        rates.append(getattr(context.module, "rate", None))
        return y

    model, key = network(5, dtype="bfloat16"), jax.random.key(0)
    with nn.intercept_methods(record):
        (logits, sown), variables = jax.eval_shape(
            lambda image: (
                model.apply(
                    variables := model.init(key, image, train=False),
                    image,
                    train=True,
                    rngs={"dropout": key},
                    mutable=["intermediates", "batch_stats"],
                ),
                variables,
            ),
            jnp.zeros((3, 7, 1, 2)),
        )
    (pooled,) = sown["intermediates"]["pooled"]
    assert logits.shape == (3, 5) and pooled.shape == (3, variables["params"]["head"]["kernel"].shape[0])
    assert logits.dtype == pooled.dtype == np.float32
    assert {dtypes[name] for name in model.depths()[:-1]} == {"bfloat16"}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}
    assert {*rates} - {None} == ({0.2} if network is EfficientNetLite0 else set())


def test_kernels_are_drawn_as_in_torchvision():
    """He et al. (2015), equation 14, of the output; the head is uniform."""
    image = jnp.zeros((1, 4, 4, 300))

    def drawn(module, x, **options):
        return jax.jit(partial(module.init, **options))(jax.random.key(0), x)["params"]

    full, depthwise = (drawn(ConvNorm(k), image, train=False)["kernel"] for k in (50, None))
    assert full.std() == pytest.approx(np.sqrt(2 / (9 * 50)), rel=0.02)
    assert depthwise.std() == pytest.approx(np.sqrt(2 / 9), rel=0.05)
    head = drawn(Head(100), image[:, 0, 0])
    assert np.abs(head["kernel"]).max() == pytest.approx(1 / np.sqrt(300), rel=0.01)
    assert not head["bias"].any()


@pytest.mark.parametrize(
    ("network", "fields", "message"),
    [
        (ResNet18, {"dtype": "float31"}, "`model.dtype` must be a known name, got 'float31'. Did you mean float32"),
        (ResNet50, {"dtype": "float31"}, "`model.dtype` must be a known name, got 'float31'. Did you mean float32"),
        (EfficientNetLite0, {"dtype": "int8"}, "`model.dtype` must be a known name, got 'int8'"),
        (EfficientNetLite0, {"dropout": 1.0}, r"`model.dropout` must be between 0 and 0\.99, got 1\.0\."),
    ],
)
def test_invalid_options(network, fields, message):
    with pytest.raises(UserError, match=message):
        network(**fields)
