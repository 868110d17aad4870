"""CIFAR-10: a variant of airbench94 (Keller Jordan, 2024), for one GPU. Its goal is 94% in 10 epochs.

    make train EXPERIMENT=cifar10_airbench94 SEED=0

Not measured on a GPU yet; `make bench-gpu` does it, beside airbench itself. What differs there: 9.9 epochs, which leave
out the examples of an incomplete batch, and a lookahead that averages the running statistics, too.
"""

from cnnjax import AugmentConfig, Config, ModelConfig, OptimConfig, run_experiment

CONFIG = Config(
    experiment="cifar10_airbench94",
    dataset="cifar10",
    num_epochs=10,
    batch_size=1024,
    validation_fraction=0.0,
    label_smoothing=0.2,
    views="shifted",
    model=ModelConfig(name="speednet", widths=(64, 256, 256), dtype="bfloat16"),
    # airbench's rates are of a summed loss: 11.5 * 1024 / 7851 of a mean, 0.0153 / 11.5.
    optim=OptimConfig(
        name="sgd",
        learning_rate=1.5,
        weight_decay=0.00133,
        momentum=0.85,
        bias_scale=64.0,
        schedule="one_cycle",
        warmup=0.23,
        start=0.2,
        end=0.07,
        whiten_epochs=3,
        lookahead=5,
    ),
    augment=AugmentConfig(flip="alternating", translate=2),
)

if __name__ == "__main__":
    run_experiment(CONFIG)
