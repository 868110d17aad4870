"""Fashion-MNIST with the tutorial's convolutional network: one-cycle learning rate, flips.

    make train EXPERIMENT=fashion_mnist_cnn SEED=0

Test accuracy 92.90% ± 0.27 (sample deviation, 3 seeds),
in 11 minutes (5 epochs) on one of 2 cores of an AMD EPYC. See RESULTS.md.
"""

from cnnjax import CNN, Adam, Augment, Config, run_experiment

CONFIG = Config(
    dataset="fashion_mnist",
    num_epochs=5,
    batch_size=64,
    model=CNN(kernel_init="he_normal", conv_dropout=0.1, dense_dropout=0.3),
    optim=Adam(learning_rate=2e-3, schedule="one_cycle"),
    augment=Augment(flip="random"),
)

if __name__ == "__main__":
    run_experiment(CONFIG)
