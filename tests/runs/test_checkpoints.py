import shutil
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax import CNN, MLP, UserError, init_state
from cnnjax.errors import StorageError
from cnnjax.runs.checkpoints import Checkpoints, all_finite, recover
from cnnjax.step import copy_state

MODEL, TX = MLP(3), optax.adam(1e-3)


def make_state(model=MODEL, step=0, seed=0):
    state = init_state(jax.random.key(seed), jnp.zeros((1, 8, 8, 1)), model=model, tx=TX)
    return state._replace(step=jnp.int32(step))


def make_abstract_state(model):
    return jax.eval_shape(lambda: make_state(model))


def save_epochs(folder, *accuracies):
    """Saves a checkpoint for each of epochs 1, 2, ... with these validation accuracies."""
    with closing(Checkpoints(folder)) as checkpoints:
        for epoch, accuracy in enumerate(accuracies, 1):
            best = max(range(epoch), key=lambda i: (accuracies[i], i)) + 1
            checkpoints.save(make_state(step=epoch), {"best_step": best}, {"accuracy": accuracy})


def kept_steps(folder):
    return sorted(int(path.name) for path in folder.iterdir())


def run_recover(folder):
    """Returns the steps that `recover` leaves, and what it says."""
    lines = []
    recover(folder, lines.append)
    return kept_steps(folder), " ".join(lines)


def largest_file(checkpoint):
    return max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_bit(checkpoint):
    """Flips one bit in the largest file. Orbax would load it silently."""
    path = largest_file(checkpoint)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


def test_restore_returns_every_leaf_with_its_dtype_and_the_progress(folder):
    expected, saved = make_state(step=5, seed=3), {"seconds": 1.5, "totals": [0.1, 2, 3]}
    with closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(expected, saved, {"accuracy": 0.5})
    with closing(Checkpoints(folder)) as checkpoints:
        assert checkpoints.latest() == 5
        state, progress = checkpoints.restore(5, make_abstract_state(MODEL))
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for got, leaf in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert got.dtype == leaf.dtype
        np.testing.assert_array_equal(got, leaf)
    assert progress == saved


def test_keeps_the_latest_two_and_the_best_two(folder):
    save_epochs(folder, 0.1, 0.8, 0.9, 0.5, 0.4, 0.3)
    assert kept_steps(folder) == [2, 3, 5, 6]
    with closing(Checkpoints(folder)) as checkpoints:
        assert (checkpoints.best(), checkpoints.latest()) == (3, 6)
        checkpoints.save(make_state(step=7), {})  # Within an epoch, so without a score.
        checkpoints.wait()
        assert kept_steps(folder) == [2, 3, 6, 7]
        assert (checkpoints.best(), checkpoints.latest()) == (3, 7)
        checkpoints.save(make_state(step=8), {}, {"accuracy": 0.9})  # Equals the best: the later one counts.
        checkpoints.wait()
        assert kept_steps(folder) == [3, 7, 8]
        assert checkpoints.best() == 8
        checkpoints.save(make_state(step=9), {}, {"accuracy": 0.2})
        checkpoints.wait()
        assert kept_steps(folder) == [3, 8, 9]


def test_without_validation_the_latest_epoch_is_the_best(folder):
    with closing(Checkpoints(folder)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(make_state(step=step), {}, {"num_examples": 0})
        checkpoints.save(make_state(step=4), {})
        checkpoints.wait()
        assert (checkpoints.best(), checkpoints.latest()) == (3, 4)
        assert kept_steps(folder) == [2, 3, 4]


def test_empty_directory_has_no_checkpoints(folder):
    with closing(Checkpoints(folder)) as checkpoints:
        assert checkpoints.latest() is None
        assert checkpoints.best() is None


def test_state_may_be_donated_while_it_is_saved(folder):
    increment = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = increment(make_state())  # Compiles, so that the buffers below are reused at once.
    expected = jax.tree.map(np.array, state)
    with closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(copy_state(state), {})
        for _ in range(20):
            state = increment(state)
        jax.block_until_ready(state)
        checkpoints.wait()
        restored, _ = checkpoints.restore(1, state)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (MLP(4), r"Dense_2/bias` has shape \(3,\) \(float32\) there and shape \(4,\) \(float32\) here"),
        (CNN(3), r"1 must match the model and the optimizer, but .* has no value there and shape"),
    ],
)
def test_checkpoint_of_another_model_is_rejected(folder, model, message):
    save_epochs(folder, 0.1)
    with closing(Checkpoints(folder)) as checkpoints:
        with pytest.raises(UserError, match=message):
            checkpoints.restore(1, make_abstract_state(model))


def truncate(checkpoint):
    path = largest_file(checkpoint)
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize("damage", [flip_bit, truncate])
def test_damaged_checkpoint_is_not_restored(folder, damage):
    save_epochs(folder, 0.1)
    damage(folder / "1")
    with closing(Checkpoints(folder)) as checkpoints:
        with pytest.raises(UserError, match=r"1 must match its checksums, but state/.* is damaged\. If .* --resume"):
            checkpoints.restore(1, make_abstract_state(MODEL))


def save_again(checkpoints):
    checkpoints.save(make_state(step=2), {})


@pytest.mark.parametrize("call", [save_again, Checkpoints.wait, Checkpoints.close])
def test_failed_save_is_reported_once_by_the_next_call(folder, small_disk, call):
    with closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(make_state(step=1), {})
        with pytest.raises(
            StorageError, match=r"could not be written in .*\(File too large\).* resume it with --resume"
        ):
            call(checkpoints)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_all_finite_finds_a_single_value(value):
    state = make_state()
    assert all_finite(state.params)
    bias = state.params["Dense_1"]["bias"].at[3].set(value)
    assert not all_finite({**state.params, "Dense_1": {**state.params["Dense_1"], "bias": bias}})


def test_recover_leaves_intact_checkpoints_in_place(folder):
    save_epochs(folder, 0.1, 0.2, 0.3)
    assert run_recover(folder) == ([2, 3], "")


def test_recover_moves_a_damaged_latest_checkpoint(folder):
    save_epochs(folder, 0.1, 0.2, 0.3)
    flip_bit(folder / "3")
    steps, said = run_recover(folder)
    assert steps == [2]
    assert said.startswith("The checkpoint of step 3 cannot be used: state/")
    moved = folder.parent / "damaged" / "3"
    assert said.endswith(f"is damaged. It has been moved to {moved}. Training resumes from step 2.")
    assert moved.is_dir()


def test_recover_moves_a_damaged_older_checkpoint(folder):
    save_epochs(folder, 0.1, 0.2, 0.3)
    flip_bit(folder / "2")
    (folder / "2" / "_CHECKPOINT_METADATA").unlink()
    steps, said = run_recover(folder)
    assert steps == [3]
    assert said.startswith("The checkpoint of step 2 cannot be used: _CHECKPOINT_METADATA is missing.")
    assert said.endswith("Training resumes from step 3.")
    assert kept_steps(folder.parent / "damaged") == [2]


def test_recover_keeps_an_earlier_damaged_checkpoint_of_the_same_step(folder):
    for _ in range(2):
        save_epochs(folder, 0.1)
        flip_bit(folder / "1")
        run_recover(folder)
    assert sorted(path.name for path in (folder.parent / "damaged").iterdir()) == ["1", "1.1"]


def test_recover_falls_back_on_the_second_best(folder):
    save_epochs(folder, 0.8, 0.5, 0.4, 0.9)
    assert kept_steps(folder) == [1, 3, 4]
    flip_bit(folder / "4")  # The latest and the best. The best checkpoint of step 3 is step 1.
    steps, said = run_recover(folder)
    assert steps == [1, 3]
    assert said.endswith("Training resumes from step 3.")


def test_recover_discards_checkpoints_without_their_best(folder):
    save_epochs(folder, 0.1, 0.9, 0.3, 0.4)
    assert kept_steps(folder) == [2, 3, 4]
    flip_bit(folder / "2")
    steps, said = run_recover(folder)
    assert steps == []  # The best checkpoint of steps 3 and 4 is step 2.
    assert "step 4 cannot be used: its best checkpoint, of step 2, is missing or damaged." in said
    assert said.count("Training starts again from step 0.") == 3


def test_recover_deletes_an_interrupted_save(folder):
    save_epochs(folder, 0.1, 0.2)
    (folder / "2" / "SHA256SUMS").unlink()  # It is written last.
    assert run_recover(folder) == (
        [1],
        "The checkpoint of step 2 was incomplete and has been deleted. Training resumes from step 1.",
    )


def test_recover_deletes_what_an_interrupted_deletion_left(folder):
    save_epochs(folder, 0.1, 0.2, 0.3)
    shutil.copytree(folder / "2", folder / "1")
    (folder / "1" / "_CHECKPOINT_METADATA").unlink()
    assert run_recover(folder) == (
        [2, 3],
        "The checkpoint of step 1 was incomplete and has been deleted. Training resumes from step 3.",
    )


def test_recover_leaves_an_intact_checkpoint_of_another_version_in_place(folder):
    with closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(make_state(step=1), {"rows": []}, {"accuracy": 0.5})  # This version writes "best_step".
    with pytest.raises(UserError, match=r"1 is intact but must be from this version of cnnjax and Orbax, got KeyError"):
        recover(folder, print)
    assert kept_steps(folder) == [1]


def test_recover_does_not_follow_links_out_of_the_directory(folder, tmp_path):
    save_epochs(folder, 0.1)
    elsewhere = tmp_path / "elsewhere"
    save_epochs(elsewhere, 0.1, 0.2)
    (folder / "2").symlink_to(elsewhere / "2")
    (folder / "1" / "state" / "more").symlink_to(elsewhere)
    steps, said = run_recover(folder)
    assert steps == []
    assert "step 2 cannot be used: 2 is outside the folder" in said
    assert "step 1 cannot be used: state/more is outside the folder" in said
    assert kept_steps(elsewhere) == [1, 2]
