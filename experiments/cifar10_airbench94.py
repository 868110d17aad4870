"""CIFAR-10: a variant of airbench94 (Keller Jordan, 2024), for one GPU: 94% in 10 epochs.

    make train EXPERIMENT=cifar10_airbench94 SEED=0

Not measured on a GPU yet; `make bench-gpu` compares it with airbench. Differences: airbench trains for 9.9 epochs,
drops the last incomplete batch, and averages the running statistics in its lookahead.
"""

from cnnjax import SGD, Augment, Config, CrossEntropy, ParamGroup, SpeedNet, run_experiment

CONFIG = Config(
    dataset="cifar10",
    num_epochs=10,
    batch_size=1024,
    validation_fraction=0.0,
    loss=CrossEntropy(label_smoothing=0.2),
    tta="flip_translate",
    model=SpeedNet(widths=(64, 256, 256), dtype="bfloat16"),
    # airbench's rates apply to a summed loss: 11.5 * 1024 / 7851 for a mean, 0.0153 / 11.5.
    optim=SGD(
        learning_rate=1.5,
        schedule="one_cycle",
        warmup=0.23,
        init_factor=0.2,
        end_factor=0.07,
        weight_decay=0.00133,
        lookahead=5,
        groups=(ParamGroup("^whiten/", num_epochs=3), ParamGroup(r"^NormGelu_\d+/bias$", multiplier=64.0)),
    ),
    augment=Augment(flip="alternating", translate=2),
)

if __name__ == "__main__":
    run_experiment(CONFIG)
