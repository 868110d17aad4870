from collections import Counter

from stress import stress

GENERATED = [
    "--dataset",
    "generated",
    "--model.name",
    "mlp",
    "--model.dense-dropout",
    "0.2",
    "--augment.flip",
    "random",
]


def test_runs_that_are_killed_at_random_moments_end_in_the_same_bits(prepared_dir, tmp_path):
    arguments = [*GENERATED, "--num-epochs", "30", "--batch-size", "16", "--data-dir", str(prepared_dir)]
    hits, runs = stress(4, arguments, tmp_path, seed=2)
    assert sum(Counter(hits).values()) == 4
    assert runs >= 1
