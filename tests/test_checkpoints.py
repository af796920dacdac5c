"""Manifests: a checkpoint is complete or does not count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_robust.checkpoints import (
    check_run,
    discard,
    is_write_error,
    latest_complete,
    open_for_writing,
    verify,
    write_manifest,
    write_run,
)


def checkpoint(root: Path, step: int, complete: bool = True) -> Path:
    folder = root / f"checkpoint-{step}"
    (folder / "deep").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(100))
    (folder / "deep" / "rng.pth").write_bytes(bytes(7))
    if complete:
        write_manifest(folder)
    return folder


def test_the_manifest_holds_the_size_of_every_file_and_not_its_own(tmp_path):
    folder = checkpoint(tmp_path, 1)
    write_manifest(folder)  # again, over the first one
    assert json.loads((folder / "manifest.json").read_text()) == {"deep/rng.pth": 7, "model.safetensors": 100}
    assert sorted(p.name for p in folder.iterdir()) == ["deep", "manifest.json", "model.safetensors"]
    verify(folder)
    verify(str(folder))


def test_a_manifest_that_was_cut_off_does_not_spoil_the_next_attempt(tmp_path):
    """Killed between writing and renaming; the run repeats the step and writes the same folder again."""
    folder = checkpoint(tmp_path, 1, complete=False)
    (folder / "manifest.json.tmp").write_text("{")
    assert latest_complete(tmp_path) is None
    write_manifest(folder)
    verify(folder)


def truncate(folder):
    (folder / "model.safetensors").write_bytes(bytes(99))


def lengthen(folder):
    (folder / "deep" / "rng.pth").write_bytes(bytes(8))


def remove(folder):
    (folder / "deep" / "rng.pth").unlink()


def unlist(folder):
    (folder / "manifest.json").unlink()


def damage(folder):
    (folder / "manifest.json").write_text('{"model.safetensors": 1')


def binary(folder):
    (folder / "manifest.json").write_bytes(b"\xff\xfe\x00")


def another_format(folder):
    (folder / "manifest.json").write_text("[]")


DAMAGES = [
    (truncate, "the file model.safetensors has 99 bytes where 100 were written"),
    (lengthen, "the file deep/rng.pth has 8 bytes where 7 were written"),
    (remove, "the file deep/rng.pth is missing"),
    (unlist, "it has no manifest.json, so writing it was cut off"),
    (damage, "its manifest.json is damaged"),
    (binary, "its manifest.json is damaged"),
    (another_format, "its manifest.json is damaged"),
]


@pytest.mark.parametrize(("harm", "problem"), DAMAGES, ids=[f.__name__ for f, _ in DAMAGES])
def test_a_harmed_checkpoint_is_refused_with_the_way_out(tmp_path, harm, problem):
    good, bad = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    harm(bad)
    with pytest.raises(ValueError) as error:
        verify(bad)
    assert str(error.value).startswith(f"cannot resume from {str(bad)!r}: {problem}")
    assert str(error.value).endswith(f"; resume from {good} instead")
    assert latest_complete(tmp_path) == str(good)


def test_without_another_checkpoint_the_way_out_is_a_new_start(tmp_path):
    for folder in (tmp_path / "checkpoint-3", tmp_path / "nowhere" / "checkpoint-3"):
        with pytest.raises(ValueError, match="there is no such folder; start again without --resume_from_checkpoint"):
            verify(folder)


def test_the_newest_is_the_highest_step_not_the_last_in_the_alphabet(tmp_path):
    for step in (9, 100, 20):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 1000, complete=False)
    for name in ("checkpoint-best", "checkpoint-2000-old", "old-checkpoint-3000"):
        write_manifest(checkpoint(tmp_path / "x", 1).rename(tmp_path / name))
    (tmp_path / "checkpoint-4000").write_text("a file")
    assert latest_complete(tmp_path) == str(tmp_path / "checkpoint-100")
    assert latest_complete(str(tmp_path / "nowhere")) is None
    assert latest_complete(tmp_path / "x") is None


def test_discard_removes_the_incomplete_one_and_names_the_one_before(tmp_path):
    good, bad = checkpoint(tmp_path, 4), checkpoint(tmp_path, 8, complete=False)
    error = discard(bad, OSError(28, "No space left on device"))
    assert isinstance(error, OSError)
    assert str(error) == (
        f"could not write {str(bad)!r} ([Errno 28] No space left on device); the previous checkpoint {good} "
        "is intact: free disk space and resume with --resume_from_checkpoint true"
    )
    assert not bad.exists()
    verify(good)


def test_discard_without_a_previous_checkpoint_says_so(tmp_path):
    message = str(discard(tmp_path / "checkpoint-1", OSError("full")))
    assert str(tmp_path / "checkpoint-1") in message
    assert message.endswith("(full); there is no earlier checkpoint: free disk space and start again")


def test_a_folder_that_is_written_again_is_incomplete_until_the_end(tmp_path):
    """Otherwise a kill in between would leave old and new files under the old manifest."""
    folder = checkpoint(tmp_path, 4)
    open_for_writing(folder)
    assert latest_complete(tmp_path) is None
    write_manifest(folder)
    verify(folder)
    open_for_writing(tmp_path / "checkpoint-8")  # not there yet


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    folder = checkpoint(tmp_path, 4, complete=False)
    check_run(folder, {"objective": "ACL()"})  # written before runs were recorded
    write_run(folder, {"objective": "ACL()", "seed": "0", "images": "24"})
    write_manifest(folder)
    verify(folder)
    check_run(folder, {"objective": "ACL()", "seed": "0", "new": "1"})
    with pytest.raises(ValueError) as error:
        check_run(folder, {"objective": "AIR()", "seed": "1", "images": "24"})
    assert str(error.value) == (
        f"{str(folder)!r} belongs to another run (objective: ACL() there, AIR() here; seed: 0 there, 1 here): resume "
        "with the same settings, or start anew in another --output_dir"
    )


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device"), True),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), True),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("CUDA out of memory"), False),
        (KeyError("model"), False),
        (FloatingPointError("the loss became NaN"), False),
    ],
)
def test_write_errors_of_every_library_are_recognised(error, expected):
    assert is_write_error(error) is expected
