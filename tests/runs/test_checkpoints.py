from contextlib import closing

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from saved import MODEL, flip_bit, kept_steps, make_abstract_state, make_progress, make_state, save_epochs, truncate

from cnnjax import CNN, MLP, UserError
from cnnjax.errors import StorageError
from cnnjax.files import check_sums
from cnnjax.runs.checkpoints import Checkpoints, all_finite, check_characters
from cnnjax.state import copy_state


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


def test_restore_returns_every_leaf_with_its_dtype_and_the_progress(folder):
    expected, saved = make_state(step=5, seed=3), make_progress(seconds=1.5)
    with closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(expected, saved, {"score": 0.5})
    with closing(Checkpoints(folder)) as checkpoints:
        assert checkpoints.latest() == 5
        state, progress = checkpoints.restore(5, make_abstract_state(MODEL))
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for got, leaf in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert got.dtype == leaf.dtype
        np.testing.assert_array_equal(got, leaf)
    files = sorted(name for name in check_sums(folder / "5") if name != "progress.json")
    assert progress == {**saved, "validation": {"score": 0.5}, "files": files}


def test_keeps_the_latest_two_and_the_best_two(folder):
    save_epochs(folder, 0.1, 0.8, 0.9, 0.5, 0.4, 0.3)
    assert kept_steps(folder) == [2, 3, 5, 6]
    with closing(Checkpoints(folder)) as checkpoints:
        assert (checkpoints.best(), checkpoints.latest()) == (3, 6)
        checkpoints.save(make_state(step=7), make_progress())  # Within an epoch, so without a score.
        checkpoints.wait()
        assert kept_steps(folder) == [2, 3, 6, 7]
        assert (checkpoints.best(), checkpoints.latest()) == (3, 7)
        checkpoints.save(make_state(step=8), make_progress(), {"score": 0.9})  # Equals the best: the later one counts.
        checkpoints.wait()
        assert kept_steps(folder) == [3, 7, 8]
        assert checkpoints.best() == 8
        checkpoints.save(make_state(step=9), make_progress(), {"score": 0.2})
        checkpoints.wait()
        assert kept_steps(folder) == [3, 8, 9]


def test_without_validation_the_latest_epoch_is_the_best(folder):
    with closing(Checkpoints(folder)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(make_state(step=step), make_progress(), {"num_examples": 0})
        checkpoints.save(make_state(step=4), make_progress())
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
        checkpoints.save(copy_state(state), make_progress())
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


def test_a_checkpoint_with_another_setting_of_x64(folder):
    """Of a network whose parameters follow that setting."""
    save_epochs(folder, 0.1)
    state = make_abstract_state(MODEL)
    state = state._replace(params=jax.tree.map(lambda x: x.update(dtype=np.float64), state.params))
    with jax.enable_x64(True), closing(Checkpoints(folder)) as checkpoints:
        with pytest.raises(UserError, match=r"\(float64\) here\. JAX_ENABLE_X64 must be as it was .* and is on now"):
            checkpoints.restore(1, state)


@pytest.mark.parametrize("damage", [flip_bit, truncate])
def test_damaged_checkpoint_is_not_restored(folder, damage):
    save_epochs(folder, 0.1)
    damage(folder / "1")
    with closing(Checkpoints(folder)) as checkpoints:
        with pytest.raises(UserError, match=r"1 must match its checksums, but state/.* is damaged\. If .* resume=True"):
            checkpoints.restore(1, make_abstract_state(MODEL))


def save_again(checkpoints):
    checkpoints.save(make_state(step=2), make_progress())


@pytest.mark.parametrize("call", [save_again, Checkpoints.wait, Checkpoints.close])
def test_failed_save_is_reported_once_by_the_next_call(folder, small_disk, call):
    with closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(make_state(step=1), make_progress())
        with pytest.raises(
            StorageError, match=r"could not be written in .*\(File too large\).* resume it: resume=True"
        ):
            call(checkpoints)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_all_finite_finds_a_single_value(value):
    state = make_state()
    assert all_finite(state.params)
    bias = state.params["Dense_1"]["bias"].at[3].set(value)
    assert not all_finite({**state.params, "Dense_1": {**state.params["Dense_1"], "bias": bias}})


def test_the_first_checkpoint_is_read_back(folder, monkeypatch):
    load = ocp.load_checkpointables

    def load_others(path, target):
        return jax.tree.map(lambda leaf: leaf + 1, load(path, target))

    with closing(Checkpoints(folder)) as checkpoints:
        monkeypatch.setattr(ocp, "load_checkpointables", load_others)
        checkpoints.save(make_state(step=1), make_progress())
        with pytest.raises(
            StorageError, match=r"could not be written in .* \(OSError: it was read back with other values"
        ):
            checkpoints.wait()
        assert checkpoints.latest() is None
        monkeypatch.undo()
        checkpoints.save(make_state(step=1), make_progress())
        checkpoints.wait()
        monkeypatch.setattr(ocp, "load_checkpointables", load_others)
        checkpoints.save(make_state(step=2), make_progress())  # Once is enough.
        checkpoints.wait()


@pytest.mark.parametrize("name", ["a[b]c", "a\\b", "a\udcffb"])
def test_a_path_that_orbax_cannot_read_back(tmp_path, name):
    with pytest.raises(UserError, match=r"`run` must be a path in UTF-8 without .* and "):
        check_characters("run", tmp_path / name)


@pytest.mark.parametrize(
    "name", ["a[b", "a]b", "a*b", "a?b", "a{b,c}", "a%20b", "a#b", "a:b", "a'b", "a b", "~", "漢字", "a\nb", "$a"]
)
def test_a_path_with_other_characters_is_read_back(tmp_path, name):
    check_characters("run", tmp_path / name)
    save_epochs(tmp_path / name / "checkpoints", 0.1)
