"""A Flax NNX module as the network of an experiment.

cnnjax train tests/programs/nnx_network.py --model.width 32
"""

from dataclasses import dataclass

from flax import nnx

from cnnjax import Config, run_experiment


class Net(nnx.Module):
    def __init__(self, size, width, num_classes, rngs):
        self.hidden = nnx.Linear(size, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.2)  # Without `rngs`, which would be a part of its state.
        self.head = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, image, rngs=None):
        x = nnx.relu(self.norm(self.hidden(image.reshape(len(image), -1))))
        return self.head(self.dropout(x, rngs=rngs))


@dataclass(frozen=True)
class NnxNetwork:
    width: int = 16
    num_classes: int = 10  # Set from the data.

    def make(self, key, image):
        return Net(image[0].size, self.width, self.num_classes, nnx.Rngs(key))

    def init(self, key, image):
        _, params, state = nnx.split(self.make(key, image), nnx.Param, ...)
        return {"params": nnx.to_pure_dict(params), "state": nnx.to_pure_dict(state)}

    def apply(self, variables, image, key, train):
        graph = nnx.graphdef(nnx.eval_shape(lambda: self.make(0, image)))  # Computes no values.
        net = nnx.merge(graph, variables["params"], variables["state"])
        net.train() if train else net.eval()
        logits = net(image, nnx.Rngs(dropout=key) if train else None)
        return logits, {"state": nnx.to_pure_dict(nnx.state(net, nnx.Not(nnx.Param)))}


CONFIG = Config(model=NnxNetwork())

if __name__ == "__main__":
    run_experiment(CONFIG)
