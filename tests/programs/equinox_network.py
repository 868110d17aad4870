"""An Equinox module as the network of an experiment.

cnnjax train tests/programs/equinox_network.py --model.width 32
"""

from dataclasses import dataclass

import equinox as eqx
import jax

from cnnjax import Config, run_experiment


class Net(eqx.Module):
    hidden: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    head: eqx.nn.Linear

    def __init__(self, size, width, num_classes, key):
        hidden_key, head_key = jax.random.split(key)
        self.hidden = eqx.nn.Linear(size, width, key=hidden_key)
        self.norm = eqx.nn.BatchNorm(width, axis_name="batch", mode="batch", momentum=0.9)
        self.dropout = eqx.nn.Dropout(0.2)
        self.head = eqx.nn.Linear(width, num_classes, key=head_key)

    def __call__(self, image, state, key):  # Of one image.
        x, state = self.norm(self.hidden(image.ravel()), state)
        return self.head(self.dropout(jax.nn.relu(x), key=key)), state


@dataclass(frozen=True)
class EquinoxNetwork:
    width: int = 16
    num_classes: int = 10  # Set from the data.

    def make(self, key, image):
        return eqx.nn.make_with_state(Net)(image[0].size, self.width, self.num_classes, key)

    def init(self, key, image):
        net, state = self.make(key, image)
        return {"params": eqx.filter(net, eqx.is_inexact_array), "state": state}

    def apply(self, variables, image, key, train):
        net, _ = self.make(jax.random.key(0), image)
        net = eqx.combine(variables["params"], net)  # The rest of `net`, such as rates and functions, is constant.
        net = eqx.nn.inference_mode(net, not train)
        keys = jax.random.split(key, len(image)) if train else None
        batched = jax.vmap(net, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))
        logits, state = batched(image, variables["state"], keys)
        return logits, {"state": state}


CONFIG = Config(model=EquinoxNetwork())

if __name__ == "__main__":
    run_experiment(CONFIG)
