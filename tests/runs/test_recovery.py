import errno
import json
import os
import re
import shutil
from contextlib import closing
from pathlib import Path

import pytest
from saved import (
    MODEL,
    flip_bit,
    kept_steps,
    largest_file,
    make_abstract_state,
    save_epochs,
    truncate,
)

from cnnjax import UserError
from cnnjax.files import check_sums, write_json, write_sums
from cnnjax.runs.checkpoints import Checkpoints
from cnnjax.runs.recovery import recover


def run_recover(folder):
    """Returns the steps that `recover` leaves, and what it says."""
    lines = []
    recover(folder, lines.append)
    return kept_steps(folder), " ".join(lines)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


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
