"""MNIST with the tutorial's network."""

from cnnjax import Config, ModelConfig, OptimConfig, run_experiment

CONFIG = Config(
    experiment="mnist_cnn",
    dataset="mnist",
    num_epochs=5,
    batch_size=64,
    model=ModelConfig(name="cnn", kernel_init="he_normal", conv_dropout=0.25, dense_dropout=0.5),
    optim=OptimConfig(learning_rate=2e-3, schedule="one_cycle"),
)

if __name__ == "__main__":
    run_experiment(CONFIG)
