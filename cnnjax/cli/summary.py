"""The command `cnnjax summary`, of a run or of an experiment."""

import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from cnnjax.cli.experiment import find_experiment
from cnnjax.cli.inspection import config_of
from cnnjax.config import Config
from cnnjax.errors import UserError, check
from cnnjax.process.tables import table


@dataclass(frozen=True)
class Summary:
    """Print the layers of a network with output shapes, parameters and floating-point operations (FLOPs) per image.

    With an experiment in place of RUN, the options are those of `cnnjax train` that determine the configuration.
    """

    run: Positional[Annotated[Path, arg(metavar="RUN")]]
    """The run directory, or an experiment."""
    experiment: str | None = None
    """The experiment file, if the run has classes or data of its own."""
    details: bool = False
    """Print Flax's table, too, with the inputs and every array of each module."""

    def __call__(self) -> None:
        """Prints the table."""
        from cnnjax.runs.records import read_record

        facts = read_record(self.run).data
        config = config_of(self.run, self.experiment).with_num_classes(len(facts.class_names))
        _print_summary(config.model, facts.image_shape, self.details)


@dataclass(frozen=True)
class SummaryOfExperiment:
    """Print the layers of a network with output shapes, parameters and floating-point operations (FLOPs) per image.

    Loads the data, which determine the shapes. `cnnjax summary RUN` prints those of a run.
    """

    config: Annotated[Config, arg(name="")] = field(default_factory=Config)
    data_dir: Path | None = None
    """The tfds directory; $TFDS_DATA_DIR or ~/tensorflow_datasets by default."""
    details: bool = False
    """Print Flax's table, too, with the inputs and every array of each module."""

    def __call__(self) -> None:
        """Prints the table."""
        from cnnjax.inputs import load_inputs

        def say(line: str) -> None:
            print(line, file=sys.stderr)

        dataset, _ = load_inputs(self.config, self.data_dir, say)
        config = self.config.with_num_classes(dataset.num_classes)
        _print_summary(config.model, dataset.image_shape, self.details)


def is_of_experiment(arguments: Sequence[str]) -> bool:
    """Returns whether the arguments of the command begin with an experiment or an option of it, not with a run."""
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help") or Path(name).is_dir():
        return False
    with suppress(UserError):
        return name.startswith("-") or bool(find_experiment(name))
    return name.endswith(".py") or not ("/" in name or Path("runs", name).is_dir())  # For the message.


def _print_summary(model: Any, image_shape: tuple[int, ...], details: bool) -> None:
    import flax.linen as nn

    from cnnjax.summary import flax_table, layer_table

    valid = not details or isinstance(model, nn.Module)
    check("details", "left out for a network that is not a Linen module", valid, details)
    layers = layer_table(model, image_shape)
    rows = [[x.name, x.kind, "×".join(map(str, x.output_shape)), f"{x.num_params:,}", f"{x.flops:,}"] for x in layers]
    num_params, flops = sum(layer.num_params for layer in layers), sum(layer.flops for layer in layers)
    rows = [
        ["layer", "kind", "output", "parameters", "FLOPs"],
        ["image", "", "×".join(map(str, image_shape)), "", ""],
        *rows,
        ["total", "", "", f"{num_params:,}", f"{flops:,}"],
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for line in table([[*row[:3], *(row[i].rjust(widths[i]) for i in (3, 4))] for row in rows]):
        print(line)
    print("FLOPs: the multiplications and additions of convolutions and matrix products for one image.")
    if details:
        print(flax_table(model, image_shape, shutil.get_terminal_size((160, 24)).columns))
