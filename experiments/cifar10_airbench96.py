"""CIFAR-10: a variant of airbench96 (Keller Jordan, 2024), for one GPU: 96% in 37 epochs.

    make train EXPERIMENT=cifar10_airbench96 SEED=0

Not measured on a GPU yet; `make bench-gpu` compares it with airbench. Differences: airbench drops the last incomplete
batch, has slower running statistics, and averages them in its lookahead.
"""

from cnnjax import SGD, Augment, Config, CrossEntropy, ParamGroup, SpeedNet, run_experiment

CONFIG = Config(
    dataset="cifar10",
    num_epochs=37,
    batch_size=1024,
    validation_fraction=0.0,
    loss=CrossEntropy(label_smoothing=0.2),
    tta="flip_translate",
    model=SpeedNet(widths=(128, 384, 512), depth=3, dtype="bfloat16"),
    optim=SGD(
        learning_rate=1.17,  # For a mean loss: 9.0 * 1024 / 7851.
        schedule="one_cycle",
        warmup=0.1,
        weight_decay=0.00133,
        lookahead=5,
        groups=(ParamGroup("^whiten/", num_epochs=3), ParamGroup(r"^NormGelu_\d+/bias$", multiplier=64.0)),
    ),
    augment=Augment(flip="alternating", translate=4, cutout=12),
)

if __name__ == "__main__":
    run_experiment(CONFIG)
