"""CIFAR-10 with the tutorial's network and a better recipe."""

from cnnjax import Config, ModelConfig, OptimConfig, run_experiment

CONFIG = Config(
    experiment="cifar10_cnn",
    dataset="cifar10",
    num_epochs=7,
    batch_size=64,
    flip=True,
    label_smoothing=0.1,
    model=ModelConfig(name="cnn", kernel_init="he_normal", conv_dropout=0.1, dense_dropout=0.3),
    optim=OptimConfig(learning_rate=2e-3, schedule="one_cycle"),
)

if __name__ == "__main__":
    run_experiment(CONFIG)
