"""Uneven classes: Fashion-MNIST with 5% of the training images of one class, the shirts.

    .venv/bin/python experiments/make_folders.py     # writes data/fashion_mnist_uneven, once
    .venv/bin/cnnjax train fashion_mnist_uneven --seeds 0:3
    .venv/bin/cnnjax train fashion_mnist_uneven --seeds 0:3 --class-weights balanced --name fashion_mnist_weighted
    .venv/bin/cnnjax train fashion_mnist_uneven --seeds 0:3 --sampling balanced --name fashion_mnist_sampled
    .venv/bin/cnnjax compare fashion_mnist_uneven fashion_mnist_weighted --metric recall:Shirt

MEASURED
"""

from cnnjax import MLP, Adam, Config, run_experiment

CONFIG = Config(
    dataset="data/fashion_mnist_uneven",
    image_size=28,
    channels=1,
    num_epochs=10,
    batch_size=128,
    best_by="balanced_accuracy",
    model=MLP(),
    optim=Adam(schedule="one_cycle"),
)

if __name__ == "__main__":
    run_experiment(CONFIG)
