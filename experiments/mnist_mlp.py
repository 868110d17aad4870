"""mnist with the tutorial's mlp."""

from cnnjax import Config, ModelConfig, OptimConfig, run_experiment

CONFIG = Config(
    experiment="mnist_mlp",
    dataset="mnist",
    num_epochs=6,
    batch_size=64,
    model=ModelConfig(name="mlp"),
    optim=OptimConfig(learning_rate=1e-3, schedule="one_cycle"),
)

if __name__ == "__main__":
    run_experiment(CONFIG)
