"""CIFAR-10: a variant of airbench94_muon (Keller Jordan, 2024), for one GPU. Its goal is 94% in 8 epochs.

    make train EXPERIMENT=cifar10_airbench94_muon SEED=0

Test accuracy 94.03% ± 0.11 (sample deviation, 50 seeds) in 1.03 seconds (8 epochs, the records' clock) on one H100 with
XLA_FLAGS="--xla_gpu_deterministic_ops=false --xla_gpu_enable_command_buffer=+CONVOLUTION,+WHILE", 93.96% ± 0.15
(8 seeds) in 1.25 seconds with the second flag alone; 94.10% (1 seed) in 914 seconds on 2 cores of an Intel Xeon with
AMX, of an earlier version. See BENCHMARKS.md.

What differs from airbench94_muon: the learning rate of the whitening bias falls with the others and stops after 3
epochs, and six views score the least certain quarter alone.
"""

from cnnjax import AugmentConfig, Config, ModelConfig, OptimConfig, run_experiment

CONFIG = Config(
    experiment="cifar10_airbench94_muon",
    dataset="cifar10",
    num_epochs=8,
    batch_size=2000,
    validation_fraction=0.0,
    label_smoothing=0.2,
    views="uncertain",
    model=ModelConfig(name="speednet", widths=(64, 256, 256), dtype="bfloat16"),
    # airbench's rates beside Muon's are of a summed loss: biases 0.053 * 2000; the last layer, whose scale differs
    # there, 0.67 * 2000 * (9 / 256)²; and the decay of a step 2e-6 * 2000.
    optim=OptimConfig(
        name="muon",
        learning_rate=0.24,
        weight_decay=0.0167,
        momentum=0.85,
        muon_momentum=0.6,
        bias_scale=442.0,
        whiten_scale=442.0,
        head_scale=6.9,
        schedule="one_cycle",
        warmup=0.0,
        whiten_epochs=3,
    ),
    augment=AugmentConfig(flip="alternating", translate=2),
)

if __name__ == "__main__":
    run_experiment(CONFIG)
