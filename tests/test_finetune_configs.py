"""The YAML files of fine-tuning: well formed, every published value with its source, accepted as written."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
from test_configs import BUDGET, lines_without_source, numbers_written_as_text, read, scalars

from hf_robust.finetune_cli import finetune_modes, parse_finetune
from hf_robust.objectives import load_objective
from hf_robust.presets import load_preset

CONFIGS = Path(__file__).parent.parent / "examples" / "configs"
FILES = sorted((CONFIGS / "finetune").glob("*.yaml"))
PUBLISHED = [f"{mode}_cifar10" for mode in finetune_modes()]
SMALL = ["cifar10_cpu", "digits_cpu"]
VANILLA = ("slf", "alf", "aff")


def config(name: str) -> Path:
    return CONFIGS / "finetune" / f"{name}.yaml"


def test_one_file_per_mode_and_the_small_ones():
    assert [path.stem for path in FILES] == sorted([*PUBLISHED, *SMALL])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_well_formed(path):
    text = path.read_text(encoding="utf-8")
    values = read(text)
    assert numbers_written_as_text(values) == []
    assert all(value is not None for value in scalars(values))
    assert f"examples/finetune.py --config examples/configs/finetune/{path.name}\n" in text
    for budget in ("eps", "step_size"):
        assert BUDGET.fullmatch(values.get(budget, "8/255")), f"write {budget} as a fraction of 255"


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_value_of_a_published_run_names_its_source(name):
    text = config(name).read_text(encoding="utf-8")
    assert lines_without_source(text) == []
    mode = read(text)["mode"]
    assert name == f"{mode}_cifar10" and read(text)["output_dir"] == f"outputs/{name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_command_line_reads_every_value_as_written(path):
    run = parse_finetune(["--config", str(path)])
    values = read(path.read_text(encoding="utf-8"))
    assert (run.mode, run.encoder) == (values.pop("mode"), values.pop("encoder"))
    places = [run.data, run.classifier, run.objective, run.attack, run.training, *([run.post] if run.post else [])]
    for key, value in values.items():
        found = [getattr(place, key) for place in places if hasattr(place, key)]
        expected = float(Fraction(value)) if key in ("eps", "step_size") else value
        assert expected in found, f"{key}: wrote {value}, parsed {found}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_encoder_is_what_a_pretraining_file_leaves(path):
    """Of the same name, so that the two commands can be run one after the other."""
    folder, last = read(path.read_text(encoding="utf-8"))["encoder"].rsplit("/", 1)
    outputs = [read(other.read_text(encoding="utf-8"))["output_dir"] for other in CONFIGS.glob("*.yaml")]
    assert folder in outputs and last == "encoder"


@pytest.mark.parametrize("mode", VANILLA)
def test_vanilla_files_are_the_preset_spelt_out(mode):
    path = str(config(f"{mode}_cifar10"))
    written, alone = parse_finetune(["--config", path]), load_preset("rssl-vanilla/DynACL/cifar10", mode)
    values = read(config(f"{mode}_cifar10").read_text(encoding="utf-8"))
    assert alone.name in config(f"{mode}_cifar10").read_text(encoding="utf-8")
    for key, value in alone.flags.items():
        if key != "warmup_epochs":  # 0, which is no setting of these runs
            assert values[key] == value, key
    bare = parse_finetune(
        ["--encoder", written.encoder, "--mode", mode, "--preset", alone.name, "--dataset_name", "uoft-cs/cifar10"]
    )
    assert (written.objective, written.attack) == (bare.objective, bare.attack)
    for key in alone.flags.keys() - {"image_size", "clean_branch", "reference_branch"}:
        assert getattr(written.training, key) == getattr(bare.training, key), key


@pytest.mark.parametrize("mode", ["autolora", "lora", "lp_aff"])
def test_the_other_files_are_the_recipe_spelt_out(mode):
    run = parse_finetune(["--config", str(config(f"{mode}_cifar10"))])
    bare = parse_finetune(["--encoder", "x", "--mode", mode])
    assert run.attack == bare.attack
    keys = ["learning_rate", "per_device_train_batch_size", "num_train_epochs", "lr_rule", "lr_milestones"]
    keys += ["auto_lr_epochs", "weight_decay", "optimizer", "momentum", "keep", "validation_fraction"]
    keys += ["validation_steps", "dataloader_drop_last", "warmup_epochs"]
    assert {k: getattr(run.training, k) for k in keys} == {k: getattr(bare.training, k) for k in keys}
    if mode == "autolora":
        assert run.objective == bare.objective == load_objective("autolora")()


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("mode", finetune_modes())
def test_the_small_runs_serve_all_modes(name, mode):
    run = parse_finetune(["--config", str(config(name)), "--mode", mode])
    recipe = parse_finetune(["--encoder", "x", "--mode", mode]).training
    assert run.training.num_train_epochs == 12 and run.mode == mode
    assert run.training.learning_rate == recipe.learning_rate
    assert run.training.per_device_train_batch_size == recipe.per_device_train_batch_size
    if mode == "autolora":
        last = run.training.halving_epochs[-1]
        assert run.training.lr_rule == "auto" and last < run.training.num_train_epochs
