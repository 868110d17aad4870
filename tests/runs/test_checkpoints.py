import shutil
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax import CNN, MLP, UserError, init_state
from cnnjax.runs.checkpoints import Checkpoints, all_finite, recover

TX = optax.adam(1e-3)


def make_state(model, step=0, seed=0):
    state = init_state(jax.random.key(seed), jnp.zeros((1, 8, 8, 1)), model=model, tx=TX)
    return state._replace(step=jnp.int32(step))


def save(checkpoints, step, accuracy=None, seed=0):
    scores = None if accuracy is None else {"accuracy": accuracy}
    checkpoints.save(make_state(MLP(3), step, seed), {"seconds": 1.5, "totals": [0.1, 2, 3]}, scores)


def steps(folder):
    return sorted(int(path.name) for path in folder.iterdir())


def test_restores_every_leaf_with_its_dtype(tmp_path):
    with closing(Checkpoints(tmp_path)) as checkpoints:
        save(checkpoints, 5, 0.5, seed=3)
    with closing(Checkpoints(tmp_path)) as checkpoints:
        assert checkpoints.latest() == 5
        state, progress = checkpoints.restore(5, make_state(MLP(3)))
    expected = make_state(MLP(3), 5, seed=3)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for got, leaf in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert got.dtype == leaf.dtype
        np.testing.assert_array_equal(got, leaf)
    assert progress == {"seconds": 1.5, "totals": [0.1, 2, 3]}


def test_keeps_the_last_and_the_best(tmp_path):
    with closing(Checkpoints(tmp_path)) as checkpoints:
        for step, accuracy in ((1, 0.2), (2, 0.9), (3, 0.5), (4, 0.4)):
            save(checkpoints, step, accuracy)
        checkpoints.wait()
        assert steps(tmp_path) == [2, 3, 4]
        assert (checkpoints.best(), checkpoints.latest()) == (2, 4)
        save(checkpoints, 5)  # Within an epoch: no score.
        checkpoints.wait()
        assert steps(tmp_path) == [2, 3, 4, 5]
        save(checkpoints, 6, 0.9)  # As good as the best: the later one counts.
        checkpoints.wait()
        assert steps(tmp_path) == [2, 5, 6]
        assert checkpoints.best() == 6


def test_nothing_is_there_at_first(tmp_path):
    with closing(Checkpoints(tmp_path)) as checkpoints:
        assert checkpoints.latest() is None
        assert checkpoints.best() is None


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    bump = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = make_state(MLP(3), 1)
    expected = jax.tree.map(np.array, state)
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(state, {})
        for _ in range(20):
            state = bump(state)
        jax.block_until_ready(state)
        checkpoints.wait()
        restored, _ = checkpoints.restore(1, state)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)


def test_a_checkpoint_of_another_model(tmp_path):
    with closing(Checkpoints(tmp_path)) as checkpoints:
        save(checkpoints, 1)
        checkpoints.wait()
        with pytest.raises(UserError, match=r"Dense_2/bias` has shape \(3,\) \(float32\) there and shape \(4,\)"):
            checkpoints.restore(1, make_state(MLP(4)))
        with pytest.raises(UserError, match=r"must be of the same model and optimizer.*no values there and shape"):
            checkpoints.restore(1, make_state(CNN(3)))


def test_a_truncated_checkpoint(tmp_path):
    with closing(Checkpoints(tmp_path)) as checkpoints:
        save(checkpoints, 1)
    data = max((path for path in tmp_path.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:1000])
    with closing(Checkpoints(tmp_path)) as checkpoints:
        with pytest.raises(
            UserError, match=r"checkpoint .*1 must agree with its checksums, got state/.* is damaged\. A run"
        ):
            checkpoints.restore(1, make_state(MLP(3)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_all_finite_sees_a_single_bad_value(value):
    state = make_state(MLP(3))
    assert all_finite(state)
    bias = state.params["Dense_1"]["bias"].at[3].set(value)
    assert not all_finite(state._replace(params={**state.params, "Dense_1": {**state.params["Dense_1"], "bias": bias}}))


def flip_a_bit(checkpoint):
    """Changes one bit of the largest file: Orbax loads it without a word."""
    path = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def save_epochs(folder, *accuracies):
    """Checkpoints of epochs 1, 2, ... with these validation accuracies."""
    with closing(Checkpoints(folder)) as checkpoints:
        best = 0
        for epoch, accuracy in enumerate(accuracies, 1):
            best = max(best, epoch, key=lambda e: (accuracies[e - 1], e) if e else (-1, 0))
            checkpoints.save(make_state(MLP(3), epoch), {"best_step": best}, {"accuracy": accuracy})


def recovered(folder):
    lines = []
    recover(folder, lines.append)
    return steps(folder), " ".join(lines)


def test_a_flipped_bit_is_found_and_the_previous_checkpoint_is_left(tmp_path):
    folder = tmp_path / "checkpoints"
    save_epochs(folder, 0.1, 0.2, 0.3)
    assert recovered(folder) == ([2, 3], "")
    flip_a_bit(folder / "3")
    with closing(Checkpoints(folder)) as checkpoints:
        with pytest.raises(UserError, match=r"checkpoint .*3 must agree with its checksums, got state/.* is damaged"):
            checkpoints.restore(3, make_state(MLP(3)))
    left, told = recovered(folder)
    assert left == [2]
    assert "The checkpoint of step 3 cannot be used: state/" in told
    assert told.endswith(f"is damaged. It is now {tmp_path / 'damaged' / '3'}; going on from the checkpoint of step 2.")
    assert steps(tmp_path / "damaged") == [3]


def test_a_checkpoint_without_its_checksums_was_not_finished(tmp_path):
    folder = tmp_path / "checkpoints"
    save_epochs(folder, 0.1, 0.2)
    (folder / "2" / "SHA256SUMS").unlink()
    left, told = recovered(folder)
    assert left == [1]
    assert told == (
        "The checkpoint of step 2 was left half written or half removed. It is removed; "
        "going on from the checkpoint of step 1."
    )


def test_a_damaged_best_checkpoint_is_made_again(tmp_path):
    folder = tmp_path / "checkpoints"
    save_epochs(folder, 0.1, 0.9, 0.3, 0.4)
    assert steps(folder) == [2, 3, 4]
    flip_a_bit(folder / "2")
    left, told = recovered(folder)
    assert left == []  # 3 and 4 both need 2.
    assert "step 4 cannot be used: the best checkpoint of its run, 2, is missing or damaged." in told
    assert told.count("going on from the start") == 3


def test_what_a_killed_removal_left_is_removed(tmp_path):
    folder = tmp_path / "checkpoints"
    save_epochs(folder, 0.1, 0.2, 0.3)
    shutil.copytree(folder / "2", folder / "1")
    (folder / "1" / "_CHECKPOINT_METADATA").unlink()
    left, told = recovered(folder)
    assert left == [2, 3]
    assert told.startswith("The checkpoint of step 1 was left half written or half removed")


def test_an_older_checkpoint_that_is_damaged_is_told_and_set_aside(tmp_path):
    folder = tmp_path / "checkpoints"
    save_epochs(folder, 0.1, 0.2, 0.3)
    flip_a_bit(folder / "2")
    left, told = recovered(folder)
    assert left == [3]
    assert "step 2 cannot be used: state/" in told and told.endswith("going on from the checkpoint of step 3.")
    assert steps(tmp_path / "damaged") == [2]


def test_an_intact_checkpoint_of_another_version_stays_where_it_is(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    with closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(make_state(MLP(3), 1), {"rows": []}, {"accuracy": 0.5})  # No "best_step": not ours.
    with pytest.raises(UserError, match=r"1 is intact and must be of this version of cnnjax and Orbax, got KeyError"):
        recover(folder, print)
    assert steps(folder) == [1]


def test_a_checkpoint_that_leads_out_of_the_run_is_not_read(tmp_path):
    folder = tmp_path / "checkpoints"
    save_epochs(folder, 0.1)
    save_epochs(tmp_path / "elsewhere", 0.1, 0.2)
    (folder / "2").symlink_to(tmp_path / "elsewhere" / "2")
    (folder / "1" / "state" / "more").symlink_to(tmp_path / "elsewhere")
    left, told = recovered(folder)
    assert left == []
    assert "step 2 cannot be used: 2 leads out of the folder" in told
    assert "step 1 cannot be used: state/more leads out of the folder" in told
    assert steps(tmp_path / "elsewhere") == [1, 2]
