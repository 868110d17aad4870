"""An experiment with its own network, optimizer, loss, augmentation, training step and data.

cnnjax train tests/programs/own_experiment.py --model.width 8 --optim.b1 0.95
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cnnjax import Augment, Batch, Config, Metrics, Optimizer, TrainState, mean_loss, run_experiment, train_step


class ConvNet(nn.Module):
    """A convolution with batch normalization, dropout, and the logits."""

    num_classes: int = 10
    """Number of classes; set from the data."""
    width: int = 4
    """Number of channels."""
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    """Function that is applied to the channels."""

    @nn.compact
    def __call__(self, image, *, train: bool):
        x = nn.Conv(self.width, (3, 3), strides=2)(image)
        x = self.activation(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Dropout(0.1, deterministic=not train)(x.reshape(len(x), -1))
        return nn.Dense(self.num_classes)(x)


@dataclass(frozen=True)
class Lion(Optimizer):
    """Updates by the sign of the momentum (Chen et al. 2023)."""

    b1: float = 0.9
    """Weight of the momentum in the sign."""

    def transform(self, learning_rate: optax.Schedule) -> optax.GradientTransformation:
        return optax.lion(learning_rate, b1=self.b1)


@dataclass(frozen=True)
class Noise(Augment):
    """Adds normal noise to each image."""

    scale: float = 0.1
    """Standard deviation of the noise."""

    def transform(self, key: jax.Array, batch: Batch) -> Batch:
        noise = jax.vmap(lambda key: jax.random.normal(key, batch.image.shape[1:]))(key)
        return batch._replace(image=batch.image + self.scale * noise)


@dataclass(frozen=True)
class Adversarial:
    """Trains on images that are moved along the sign of their gradient (Goodfellow et al. 2015)."""

    radius: float = 0.1
    """Distance in each pixel, in standard deviations."""

    def __call__(
        self, state: TrainState, batch: Batch, key: jax.Array, *, tx: optax.GradientTransformation, **options: Any
    ) -> tuple[TrainState, Metrics]:
        def loss_of(image: jax.Array) -> jax.Array:
            return mean_loss(state.params, state, batch._replace(image=image), key, **options)[0]

        image = batch.image + self.radius * jnp.sign(jax.grad(loss_of)(batch.image))
        return train_step(state, batch._replace(image=image), key, tx=tx, **options)


def focal_loss(logits: jax.Array, batch: Batch) -> jax.Array:
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.label[:, None], axis=1)[:, 0]
    return -((1 - jnp.exp(log_p)) ** 2) * log_p


def patterns() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns noisy copies of four random patterns."""
    rng = np.random.default_rng(0)
    label = np.arange(360) % 4
    image = rng.integers(0, 256, (4, 8, 8, 1))[label] + rng.normal(0, 60, (360, 8, 8, 1))
    image = image.clip(0, 255).astype(np.uint8)
    return image[:240], label[:240], image[240:], label[240:]


CONFIG = Config(
    dataset=patterns,
    num_epochs=12,
    batch_size=32,
    model=ConvNet(),
    optim=Lion(learning_rate=1e-2),
    augment=Noise(flip="random"),
    loss=focal_loss,
    train_step=Adversarial(),
)

if __name__ == "__main__":
    run_experiment(CONFIG)
