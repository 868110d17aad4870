import errno
import json
import os
import re
import shutil
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

from cnnjax import CNN, MLP, UserError, init_state
from cnnjax.errors import StorageError
from cnnjax.runs.checkpoints import Checkpoints, all_finite, check_characters
from cnnjax.runs.files import check_sums, write_json, write_sums
from cnnjax.runs.recovery import recover
from cnnjax.step import copy_state

MODEL, TX = MLP(3), optax.adam(1e-3)


def make_state(model=MODEL, step=0, seed=0):
    state = init_state(jax.random.key(seed), jnp.zeros((1, 8, 8, 1)), model=model, tx=TX)
    return state._replace(step=jnp.int32(step))


def make_abstract_state(model):
    return jax.eval_shape(lambda: make_state(model))


def make_progress(best_step=None, seconds=0.0):
    return {"rows": [], "timing": [], "totals": [0.5, 2, 3], "seconds": seconds, "best_step": best_step}


def save_epochs(folder, *accuracies):
    """Saves a checkpoint for each of epochs 1, 2, ... with these validation accuracies."""
    with closing(Checkpoints(folder)) as checkpoints:
        for epoch, accuracy in enumerate(accuracies, 1):
            best = max(range(epoch), key=lambda i: (accuracies[i], i)) + 1
            checkpoints.save(make_state(step=epoch), make_progress(best), {"accuracy": accuracy})


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
    expected, saved = make_state(step=5, seed=3), make_progress(seconds=1.5)
    with closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(expected, saved, {"accuracy": 0.5})
    with closing(Checkpoints(folder)) as checkpoints:
        assert checkpoints.latest() == 5
        state, progress = checkpoints.restore(5, make_abstract_state(MODEL))
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for got, leaf in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert got.dtype == leaf.dtype
        np.testing.assert_array_equal(got, leaf)
    files = sorted(name for name in check_sums(folder / "5") if name != "progress.json")
    assert progress == {**saved, "totals": (0.5, 2, 3), "validation": {"accuracy": 0.5}, "files": files}


def test_keeps_the_latest_two_and_the_best_two(folder):
    save_epochs(folder, 0.1, 0.8, 0.9, 0.5, 0.4, 0.3)
    assert kept_steps(folder) == [2, 3, 5, 6]
    with closing(Checkpoints(folder)) as checkpoints:
        assert (checkpoints.best(), checkpoints.latest()) == (3, 6)
        checkpoints.save(make_state(step=7), make_progress())  # Within an epoch, so without a score.
        checkpoints.wait()
        assert kept_steps(folder) == [2, 3, 6, 7]
        assert (checkpoints.best(), checkpoints.latest()) == (3, 7)
        checkpoints.save(
            make_state(step=8), make_progress(), {"accuracy": 0.9}
        )  # Equals the best: the later one counts.
        checkpoints.wait()
        assert kept_steps(folder) == [3, 7, 8]
        assert checkpoints.best() == 8
        checkpoints.save(make_state(step=9), make_progress(), {"accuracy": 0.2})
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
    save_epochs(folder, 0.1)
    with jax.enable_x64(True), closing(Checkpoints(folder)) as checkpoints:
        with pytest.raises(UserError, match=r"\(float64\) here\. JAX_ENABLE_X64 must be as it was .* and is on now"):
            checkpoints.restore(1, make_abstract_state(MODEL))


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
    checkpoints.save(make_state(step=2), make_progress())


@pytest.mark.parametrize("call", [save_again, Checkpoints.wait, Checkpoints.close])
def test_failed_save_is_reported_once_by_the_next_call(folder, small_disk, call):
    with closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(make_state(step=1), make_progress())
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


def test_recover_deletes_what_a_killed_process_was_writing_or_deleting(folder):
    save_epochs(folder, 0.1, 0.2)
    for name in ("3.partial", "3.partial.orbax-checkpoint-tmp", "0.removed"):
        shutil.copytree(folder / "2", folder / name)
    assert run_recover(folder) == ([1, 2], "")


def remove_sums(checkpoint):
    (checkpoint / "SHA256SUMS").unlink()


def empty_sums(checkpoint):
    (checkpoint / "SHA256SUMS").write_text("")


def flip_sums(checkpoint):
    path = checkpoint / "SHA256SUMS"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x80
    path.write_bytes(content)


def shorten_sums(checkpoint):
    """Removes the line of the largest file, and damages that file."""
    path, name = checkpoint / "SHA256SUMS", largest_file(checkpoint).name
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if name not in line))
    flip_bit(checkpoint)


def remove_file_and_its_line(checkpoint):
    shorten_sums(checkpoint)
    largest_file(checkpoint).unlink()


def remove_everything(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()
    empty_sums(checkpoint)


def null_in_sums(checkpoint):
    path = checkpoint / "SHA256SUMS"
    path.write_text(path.read_text().replace("progress", "pro\0gress"))


def add_file(checkpoint):
    (checkpoint / "state" / "more").touch()


def link_to_itself(checkpoint):
    path = checkpoint / "progress.json"
    path.unlink()
    path.symlink_to("progress.json")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (remove_sums, "SHA256SUMS is missing"),
        (empty_sums, "_CHECKPOINT_METADATA has no checksum"),
        (flip_sums, "SHA256SUMS is damaged"),
        (shorten_sums, "state/.* has no checksum"),
        (null_in_sums, "progress.json has no checksum"),
        (add_file, "state/more has no checksum"),
        (remove_file_and_its_line, "state/.* is missing"),
        (remove_everything, "progress.json is missing"),
        (truncate, "state/.* is damaged"),
    ],
)
def test_a_checkpoint_with_any_damage_is_kept_aside_and_never_loaded(folder, damage, reason):
    save_epochs(folder, 0.1, 0.2)
    damage(folder / "2")
    with closing(Checkpoints(folder)) as checkpoints:
        with pytest.raises(UserError, match=f"2 must match its checksums, but {reason}"):
            checkpoints.restore(2, make_abstract_state(MODEL))
    damaged = {path.name: path.read_bytes() for path in (folder / "2").rglob("*") if path.is_file()}
    steps, said = run_recover(folder)
    assert steps == [1]
    assert re.match(f"The checkpoint of step 2 cannot be used: {reason}", said), said
    moved = folder.parent / "damaged" / "2"
    assert {path.name: path.read_bytes() for path in moved.rglob("*") if path.is_file()} == damaged


@pytest.mark.parametrize("name", ["SHA256SUMS", "progress.json"])
def test_recover_stops_at_a_file_that_cannot_be_read(folder, name, monkeypatch):
    save_epochs(folder, 0.1, 0.2)
    open_file = os.open

    def fail(path, *args):
        if Path(path) == folder / "2" / name:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return open_file(path, *args)

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(UserError, match=rf"2 must be readable, but {name} is unreadable \(Input/output error\)"):
        recover(folder, print)
    assert kept_steps(folder) == [1, 2]


def test_recover_does_not_wait_for_a_pipe_or_follow_a_loop(folder):
    save_epochs(folder, 0.1, 0.2)
    link_to_itself(folder / "2")
    with pytest.raises(UserError, match=r"progress\.json is unreadable \(Too many levels of symbolic links\)"):
        recover(folder, print)
    (folder / "2" / "progress.json").unlink()
    os.mkfifo(folder / "2" / "progress.json")
    with pytest.raises(UserError, match=r"progress\.json is unreadable \(Not a regular file\)"):
        recover(folder, print)


def test_recover_leaves_an_intact_checkpoint_of_another_version_in_place(folder):
    save_epochs(folder, 0.1)
    saved = json.loads((folder / "1" / "progress.json").read_text())
    del saved["best_step"]
    write_json(folder / "1" / "progress.json", saved)
    write_sums(folder / "1", [name for name in check_sums(folder / "1") if name != "SHA256SUMS"])
    with pytest.raises(UserError, match=r"`best_step` in .*1/progress\.json must be there, got nothing"):
        recover(folder, print)
    assert kept_steps(folder) == [1]


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
