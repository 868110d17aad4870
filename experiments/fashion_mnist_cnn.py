"""fashion_mnist with the tutorial's cnn."""

from cnnjax import Config, ModelConfig, OptimConfig, run_experiment

CONFIG = Config(
    experiment="fashion_mnist_cnn",
    dataset="fashion_mnist",
    num_epochs=6,
    batch_size=64,
    model=ModelConfig(name="cnn"),
    optim=OptimConfig(learning_rate=1e-3, schedule="one_cycle"),
)

if __name__ == "__main__":
    run_experiment(CONFIG)
