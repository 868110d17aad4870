"""CIFAR-10 with the tutorial's network and a better recipe: one cycle, mirrored images, smoothed labels.

    make train EXPERIMENT=cifar10_cnn SEED=0

Test accuracy 80.90% ± 0.45 (sample deviation, 3 seeds),
in 10 minutes (7 epochs) on 2 cores of an AMD EPYC. See RESULTS.md.
"""

from cnnjax import AugmentConfig, Config, ModelConfig, OptimConfig, run_experiment

CONFIG = Config(
    experiment="cifar10_cnn",
    dataset="cifar10",
    num_epochs=7,
    batch_size=64,
    label_smoothing=0.1,
    model=ModelConfig(name="cnn", kernel_init="he_normal", conv_dropout=0.1, dense_dropout=0.3),
    optim=OptimConfig(learning_rate=2e-3, schedule="one_cycle"),
    augment=AugmentConfig(flip="random"),
)

if __name__ == "__main__":
    run_experiment(CONFIG)
