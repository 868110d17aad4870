"""MNIST with the tutorial's convolutional network and a one-cycle learning rate.

    make train EXPERIMENT=mnist_cnn SEED=0

Test accuracy 99.41% ± 0.07 (sample deviation, 3 seeds),
in 8 minutes (4 epochs) on one of 2 cores of an AMD EPYC. See RESULTS.md.
"""

from cnnjax import CNN, Adam, Config, run_experiment

CONFIG = Config(
    dataset="mnist",
    num_epochs=4,
    batch_size=64,
    model=CNN(kernel_init="he_normal", conv_dropout=0.25, dense_dropout=0.5),
    optim=Adam(learning_rate=2e-3, schedule="one_cycle"),
)

if __name__ == "__main__":
    run_experiment(CONFIG)
