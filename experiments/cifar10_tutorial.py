"""CIFAR-10, the tutorial's exact recipe: batch 32, Adam at 1e-3, 10% held out, 200 epochs, no augmentation.

    make train EXPERIMENT=cifar10_tutorial SEED=0 ARGS="--num-epochs 26"

Test accuracy 78.59% (1 seed),
in 66 minutes on one of 2 cores of an AMD EPYC. See RESULTS.md.

After 26 of the 200 epochs. All 200: 79.60% (1 seed), on one H200.
"""

from cnnjax import CNN, Adam, Config, run_experiment

CONFIG = Config(
    dataset="cifar10",
    num_epochs=200,
    batch_size=32,
    model=CNN(conv_dropout=0.25, dense_dropout=0.5),
    optim=Adam(learning_rate=1e-3),
)

if __name__ == "__main__":
    run_experiment(CONFIG)
