from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optax
import pytest

from cnnjax import CNN, Config, ModelConfig, OptimConfig, TrainState, experiment
from cnnjax.data.batches import epoch_plan
from cnnjax.experiment import Run
from cnnjax.step import Metrics


@pytest.mark.parametrize(
    ("platform", "params", "expected"),
    [
        ("gpu", {"whiten": {}, "head": {}}, [(), (), ("whiten",), ("whiten",)]),
        ("gpu", {"Conv_0": {}}, [()] * 4),  # Another network.
        ("cpu", {"whiten": {}, "head": {}}, [()] * 4),  # Where another program takes longer to compile than it saves.
    ],
)
def test_a_run_freezes_what_its_optimizer_moves_no_more(platform, params, expected, monkeypatch):
    optim = OptimConfig(name="muon", whiten_epochs=1)
    config = Config(num_epochs=2, optim=optim, model=ModelConfig(name="speednet"))
    placement = SimpleNamespace(devices=[SimpleNamespace(platform=platform)])
    names = set(Run._fields) - {"config", "folder", "steps_per_epoch", "model", "tx", "placement"}
    fixed = {
        "folder": Path("run"),
        "steps_per_epoch": 2,
        "model": CNN(10),
        "tx": optax.sgd(0.1),
        "placement": placement,
    }
    run = Run(config=config, **fixed, **dict.fromkeys(names))
    state = TrainState(np.int32(0), params, {}, ())
    plan = epoch_plan(0, 0, 4, batch_size=2, augment=config.augment, image_size=(4, 4))
    found = []
    monkeypatch.setattr(
        experiment,
        "train_steps",
        lambda state, *args, frozen, **kwargs: found.append(frozen) or (state, Metrics(0.0, 0, 0)),
    )
    for step in range(4):
        run.train_steps(state, plan, step)
    assert found == expected
