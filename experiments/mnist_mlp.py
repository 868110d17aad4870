"""MNIST with the tutorial's first network."""

from cnnjax import Config, ModelConfig, OptimConfig, run_experiment

CONFIG = Config(
    experiment="mnist_mlp",
    dataset="mnist",
    num_epochs=15,
    batch_size=128,
    model=ModelConfig(name="mlp", kernel_init="he_normal", dense_dropout=0.3),
    optim=OptimConfig(learning_rate=1e-3, schedule="one_cycle"),
)

if __name__ == "__main__":
    run_experiment(CONFIG)
