"""The command cnnjax export. Imports jax only if it runs."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from cnnjax.cli.inspection import RunDir, config_of


@dataclass(frozen=True)
class Export:
    """Write the network of a run as files that other programs load without cnnjax, and check each of them.

    The folder gets model.safetensors (parameters), predictor.stablehlo (bytes in, probabilities out, for JAX on a CPU,
    an NVIDIA GPU or a TPU), model.onnx (the same for ONNX Runtime), labels.json, a model card (README.md) and
    SHA256SUMS. Each file is read back and compared with the network on up to 1,000 test images. If one differs,
    nothing is written, and the exit code is 1.
    """

    run: Positional[RunDir]
    """The run directory."""
    folder: Positional[Annotated[Path, arg(metavar="DIR")]]
    """The folder to write, absent or empty."""
    formats: Annotated[
        tuple[Literal["safetensors", "stablehlo", "onnx"], ...] | None,
        arg(metavar="{safetensors,stablehlo,onnx} ...", help_behavior_hint="(default: all)"),
    ] = None
    """The formats; of all, ONNX is left out if it is not installed (pip install 'cnnjax[onnx]') or cannot express
    the network."""
    tta: Literal["none", "flip", "flip_translate"] | None = None
    """The test-time augmentation of the predictors; by default that of the run (for uncertain: flip_translate)."""
    data_dir: Path | None = None
    """The tfds directory; $TFDS_DATA_DIR or ~/tensorflow_datasets by default."""
    experiment: str | None = None
    """The experiment file, if the run has classes or data of its own."""

    def __call__(self) -> int:
        """Prints a line per file."""
        from cnnjax.export.bundle import ExportError, export_run
        from cnnjax.runs.run import load_run

        run, folder = load_run(self.run, config_of(self.run, self.experiment)), Path(os.path.expanduser(self.folder))
        try:
            export_run(run, folder, formats=self.formats, tta=self.tta, data_dir=self.data_dir)
        except ExportError as error:
            print(error, file=sys.stderr)
            return 1
        print(f"The files in {folder} predict what the network predicts. {folder / 'README.md'} says how to load them.")
        return 0
