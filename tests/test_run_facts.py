"""What reports call the things a run was given."""

from __future__ import annotations

from hf_robust.run_facts import dataset_title, encoder_title


def test_paths_of_this_machine_are_shortened(tmp_path):
    folder = tmp_path / "simclr_digits" / "encoder"
    folder.mkdir(parents=True)
    assert encoder_title(str(folder)) == "simclr_digits/encoder" and dataset_title(str(folder)) == "encoder"


def test_the_home_folder_names_nobody(tmp_path, monkeypatch):
    home = tmp_path / "alice"
    (home / "encoder").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    assert encoder_title(str(home / "encoder")) == encoder_title("~/encoder") == "~/encoder"


def test_ids_of_the_hub_stay_as_they_are():
    assert encoder_title("someone/robust-encoder") == "someone/robust-encoder"
    assert encoder_title("vit_base_patch16_clip_224.openai") == "vit_base_patch16_clip_224.openai"
