"""CIFAR-10: a variant of airbench96 (Keller Jordan, 2024), for one GPU. Its goal is 96% in 37 epochs.

    make train EXPERIMENT=cifar10_airbench96 SEED=0

Not measured on a GPU yet; `make bench-gpu` does it, beside airbench itself. What differs there: the examples of an
incomplete batch are left out, the running statistics are slower, and the lookahead averages them, too.
"""

from cnnjax import AugmentConfig, Config, ModelConfig, OptimConfig, run_experiment

CONFIG = Config(
    experiment="cifar10_airbench96",
    dataset="cifar10",
    num_epochs=37,
    batch_size=1024,
    validation_fraction=0.0,
    label_smoothing=0.2,
    views="shifted",
    model=ModelConfig(name="speednet", widths=(128, 384, 512), depth=3, dtype="bfloat16"),
    optim=OptimConfig(
        name="sgd",
        learning_rate=1.17,  # Of a mean loss: 9.0 * 1024 / 7851.
        weight_decay=0.00133,
        momentum=0.85,
        bias_scale=64.0,
        schedule="one_cycle",
        warmup=0.1,
        whiten_epochs=3,
        lookahead=5,
    ),
    augment=AugmentConfig(flip="alternating", translate=4, cutout=12),
)

if __name__ == "__main__":
    run_experiment(CONFIG)
