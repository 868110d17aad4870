"""An experiment whose network, optimizer, augmentation, loss, metrics and data are not cnnjax's.

Nothing in it is symmetric: height and width, the channels, and an image and its mirror image differ, and so do the
epochs with the best training accuracy (2), the best validation accuracy (1) and the last parameters (3).
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cnnjax import Augment, Config, Optimizer, ParamGroup, run_experiment


def make_arrays(shape=(6, 5, 3), num_train=110, num_test=37):
    """Returns noisy copies of one pattern per class: 4 classes of color images."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 256, (4, *shape)) * [0.8, 0.4, 0.2]

    def split(size):
        label = np.arange(size) % 4
        return np.clip(patterns[label] + rng.normal(0, 50, (size, *shape)), 0, 255).astype(np.uint8), label

    return *split(num_train), *split(num_test)


class Net(nn.Module):
    width: int = 16

    @nn.compact
    def __call__(self, image, *, train):
        x = nn.Dense(self.width)(image.reshape(image.shape[0], -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(4)(nn.Dropout(0.2, deterministic=not train)(x))

    def init_from_data(self, variables, image):
        """Returns variables whose running statistics are those of the images."""
        x = image.reshape(image.shape[0], -1) @ variables["params"]["Dense_0"]["kernel"]
        return {**variables, "batch_stats": {"BatchNorm_0": {"mean": x.mean(0), "var": x.var(0)}}}


@dataclass(frozen=True, kw_only=True)
class Derailed(Optimizer):
    """SGD that learns in the first third of the run, and climbs the loss in the last updates of the second third."""

    momentum: float = 0.5

    def make_schedule(self, num_updates):
        third = num_updates // 3

        def learning_rate(update):
            climbs = (update >= 2 * third - 2) & (update < 2 * third)
            return self.learning_rate * (jnp.where(update < third, 1.0, 0.0) - jnp.where(climbs, 20.0, 0.0))

        return learning_rate

    def transform(self, learning_rate):
        return optax.sgd(learning_rate, self.momentum)


@dataclass(frozen=True)
class Noise(Augment):
    scale: float = 0.3

    def transform(self, key, batch):
        noise = jax.vmap(lambda key: jax.random.normal(key, batch.image.shape[1:]))(key)
        return batch._replace(image=batch.image + self.scale * noise)


def focal_loss(logits, batch):
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.label[:, None], axis=1)[:, 0]
    return -((1 - jnp.exp(log_p)) ** 2) * log_p


def second_guess(logits, label):
    """Returns how often the true class is one of the two most probable ones, and the mean probability of it."""
    probability = np.exp(logits - logits.max(1, keepdims=True))
    probability /= probability.sum(1, keepdims=True)
    of_label = probability[np.arange(len(label)), label]
    return {"top2": np.mean((probability > of_label[:, None]).sum(1) < 2), "probability": of_label.mean()}


CONFIG = Config(
    name="research",
    dataset=make_arrays(),
    seed=3,
    num_epochs=3,
    batch_size=16,
    validation_fraction=0.2,
    tta="flip",
    model=Net(),
    optim=Derailed(learning_rate=0.1, groups=(ParamGroup("Dense_1/bias", multiplier=0.5, num_epochs=1),)),
    augment=Noise(flip="random"),
    loss=focal_loss,
    metrics=second_guess,
)

if __name__ == "__main__":
    run_experiment(CONFIG)
