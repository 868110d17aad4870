"""Executes the Python code of a model card, unchanged and without cnnjax, and writes what it computes.

    cd FOLDER && python load_card.py OUT.npz

FOLDER holds an export, image.png, and images.npy with a batch of another size.
"""

import re
import sys
from pathlib import Path

import numpy as np

names, results = {}, {}
for block in re.findall(r"```python\n(.*?)```", Path("README.md").read_text(encoding="utf-8"), re.DOTALL):
    assert len(block.splitlines()) <= 8
    exec(block, names)
    if re.search(r"probabilities,?\)? = ", block):
        results["onnx" if "onnx" in block else "stablehlo"] = np.asarray(names["probabilities"])
images = np.load("images.npy")
if "predictor" in names:
    results["stablehlo_batch"] = np.asarray(names["predictor"].call(images))
if "session" in names:
    results["onnx_batch"] = names["session"].run(None, {"image": images})[0]
if "tensors" in names:
    results |= {f"tensors/{name}": tensor for name, tensor in names["tensors"].items()}
    results["metadata"] = np.array([*names["metadata"].items()])
if "probabilities" in names:
    results["labels"] = np.array(names["labels"])
assert "cnnjax" not in sys.modules
np.savez(sys.argv[1], **results)
