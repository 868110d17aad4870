"""CIFAR-10 with the tutorial's network and a better recipe: one-cycle learning rate, flips, label smoothing.

    make train EXPERIMENT=cifar10_cnn SEED=0

Test accuracy 80.90% ± 0.45 (sample deviation, 3 seeds),
in 10 minutes (7 epochs) on 2 cores of an AMD EPYC. See RESULTS.md.
"""

from cnnjax import CNN, Adam, Augment, Config, CrossEntropy, run_experiment

CONFIG = Config(
    dataset="cifar10",
    num_epochs=7,
    batch_size=64,
    loss=CrossEntropy(label_smoothing=0.1),
    model=CNN(kernel_init="he_normal", conv_dropout=0.1, dense_dropout=0.3),
    optim=Adam(learning_rate=2e-3, schedule="one_cycle"),
    augment=Augment(flip="random"),
)

if __name__ == "__main__":
    run_experiment(CONFIG)
