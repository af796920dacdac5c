"""The command line of fine-tuning: layers of defaults, modes and what belongs to them, presets, clear messages."""

from __future__ import annotations

import dataclasses
import re

import pytest

from hf_robust.attack_flags import AttackArguments, plain_attack_flags
from hf_robust.attacks import PGD
from hf_robust.finetune_cli import (
    POST,
    ClassifierArguments,
    FinetuneDataArguments,
    FinetuneRun,
    finetune_modes,
    parse_finetune,
)
from hf_robust.finetuning_args import RobustFinetuningArguments
from hf_robust.flags import method_names
from hf_robust.objectives import load_objective
from hf_robust.objectives.aff import AFF
from hf_robust.objectives.autolora import AutoLoRa
from hf_robust.objectives.lora import LoRA
from hf_robust.objectives.slf import SLF
from hf_robust.postprocessing import PostProcessing
from hf_robust.presets import load_preset
from hf_robust.training_args import WITHOUT_EFFECT

METHODS = method_names(finetuning=True)
MODES = [*METHODS, POST]


@pytest.fixture
def config(tmp_path):
    """Writes the lines of a YAML file, returns its path."""

    def write(*lines: str, name: str = "run.yaml") -> str:
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def refused(capsys):
    """Parses, expects exit status 2 and nothing on stdout, returns the message."""

    def parse(*argv: str, **options) -> str:
        with pytest.raises(SystemExit) as exit:
            parse_finetune(argv, **options)
        assert exit.value.code == 2
        out, err = capsys.readouterr()
        message, advice = err.splitlines()  # two lines, no usage, no traceback
        assert out == "" and ": error: " in message and advice.endswith("--help lists all flags")
        return message.split(": error: ", 1)[1]

    return parse


def parsed(text: str, **options) -> FinetuneRun:
    return parse_finetune(["--encoder", "some/encoder", *text.split()], **options)


# ---------------------------------------------------------------------- defaults
def test_the_mode_without_one_is_autolora():
    run = parsed("")
    assert (run.mode, run.objective, run.encoder) == ("autolora", AutoLoRa(), "some/encoder")
    assert (run.data, run.classifier) == (FinetuneDataArguments(), ClassifierArguments())
    assert run.preset is None and run.post is None


def test_the_modes_are_the_methods_on_disk_and_post_processing():
    assert finetune_modes() == sorted(MODES)
    assert {"slf", "alf", "aff", "autolora", "lora", "lp_aff"} <= set(finetune_modes())


@pytest.mark.parametrize("mode", METHODS)
def test_recipe_and_attack_of_the_method_are_the_defaults(mode):
    run, method = parsed(f"--mode {mode.upper()}"), load_objective(mode)
    assert (run.mode, run.objective, run.attack) == (mode, method(), method.training_attack)
    expected = RobustFinetuningArguments.of(method())
    for field in dataclasses.fields(RobustFinetuningArguments):
        assert getattr(run.training, field.name) == getattr(expected, field.name), field.name
    assert (run.training.keep, run.training.validation_fraction) == ("best", 0.05)


def test_published_values_of_the_modes():
    found = {
        mode: (t.per_device_train_batch_size, t.learning_rate, t.num_train_epochs, t.lr_milestones, t.weight_decay)
        for mode in ("slf", "alf", "aff", "autolora", "lp_aff")
        for t in [parsed(f"--mode {mode}").training]
    }
    assert found == {
        "slf": (512, 0.01, 25, [10, 20], 2e-4),
        "alf": (512, 0.01, 25, [10, 20], 2e-4),
        "aff": (128, 0.1, 25, [15, 20], 2e-4),
        "autolora": (128, 0.1, 50, None, 2e-4),
        "lp_aff": (512, 0.1, 25, [10, 20], 1e-4),
    }


def test_nothing_of_one_run_reaches_the_next():
    run = parsed("--mode autolora")
    run.training.auto_lr_epochs.append(99)
    assert 99 not in AutoLoRa.recipe["auto_lr_epochs"] and 99 not in parsed("--mode autolora").training.auto_lr_epochs
    parsed("--mode aff --preset rssl-vanilla/ACL/cifar10 --dataset_name some/set")
    assert parsed("--mode aff").training.num_train_epochs == 25
    assert parsed("--mode slf").training.learning_rate == 0.01


# ---------------------------------------------------------------------- layers
def test_flags_reach_every_part():
    run = parsed(
        "--mode aff --dataset_name some/set --split train[:10%] --eval_split valid --max_examples 100 --image_size 64"
        " --label_column y --beta 3 --clean_branch adv --eps 4/255 --steps 3 --head_init alf --learning-rate 0.05"
        " --keep last --lr_milestones 5 7.5 --seed 7"
    )
    assert run.data == FinetuneDataArguments(
        "some/set", "train[:10%]", label_column="y", max_examples=100, eval_split="valid", image_size=64
    )
    assert run.objective == AFF(beta=3.0, clean_branch="adv")
    assert run.attack == dataclasses.replace(AFF.training_attack, eps=4 / 255, steps=3)
    assert run.classifier == ClassifierArguments("alf")
    training = run.training
    assert (training.learning_rate, training.keep, training.lr_milestones, training.seed) == (
        0.05,
        "last",
        [5.0, 7.5],
        7,
    )


def test_recipe_under_preset_under_yaml_under_flags(config):
    path = config("learning_rate: 0.3", "mode: aff", "encoder: from/file", "num_train_epochs: 7", "steps: 4")
    preset = "--preset rssl-vanilla/ACL/cifar10 --dataset_name some/set".split()
    run = parse_finetune(["--config", path, *preset, "--num_train_epochs", "3"])
    training = run.training
    assert run.preset == load_preset("rssl-vanilla/ACL/cifar10", "aff") and run.encoder == "from/file"
    assert training.weight_decay == 2e-4 and training.momentum == 0.9  # recipe
    # preset: 40 and 60 of 100 epochs, at the same shares of 3
    assert (training.lr_milestones, training.keep, run.data.image_size) == (pytest.approx([1.2, 1.8]), "last", 32)
    assert (training.learning_rate, run.attack.steps) == (0.3, 4)  # file
    assert training.num_train_epochs == 3  # flag
    assert parse_finetune(["--config", path, "--encoder", "other"]).encoder == "other"


@pytest.mark.parametrize("mode", ["slf", "alf", "aff"])
@pytest.mark.parametrize("name", ["DynACL/stl10", "ACL/cifar100", "DeACL/cifar10", "DynACL/stl10-32/cifar100"])
def test_a_preset_sets_all_that_it_says(config, mode, name):
    preset = load_preset(f"rssl-vanilla/{name}", mode)
    for run in (
        parsed(f"--preset {preset.name} --mode {mode} --dataset_name some/set"),
        parsed(f"--mode {mode} --config " + config(f"preset: {preset.name}", "dataset_name: some/set")),
    ):
        assert run.preset == preset
        for key, value in preset.flags.items():
            places = (run.training, run.data, run.objective)
            assert [getattr(place, key) for place in places if hasattr(place, key)] == [value], key
        assert tuple(run.objective.norm_branches) == preset.norm_branches


# ---------------------------------------------------------------------- rules of the learning rate
def test_epochs_of_a_rule_that_is_not_asked_for_fall_away():
    training = parsed("--mode slf --lr_rule auto").training
    assert (training.lr_milestones, training.auto_lr_epochs) == (None, None)
    assert training.halving_epochs == (4, 8, 12, 16, 20, 24)
    training = parsed("--mode autolora --lr_rule milestones --lr_milestones 3").training
    assert (training.lr_milestones, training.auto_lr_epochs) == ([3.0], None)
    run = parsed("--mode aff --preset rssl-vanilla/ACL/cifar10 --dataset_name some/set --lr_rule cosine")
    assert run.training.lr_milestones is None


def test_halving_epochs_are_for_the_published_length():
    assert parsed("--mode autolora").training.halving_epochs == (16, 24, 28, 36, 40, 42, 44, 46, 48)
    assert parsed("--mode autolora --num_train_epochs 12").training.halving_epochs == (4, 6, 7, 9, 10, 11)
    training = parsed("--mode autolora --num_train_epochs 12 --auto_lr_epochs 5 6").training
    assert training.halving_epochs == (5, 6)


def test_what_somebody_wrote_does_not_fall_away(refused, config):
    message = refused("--encoder", "x", "--mode", "aff", "--lr_rule", "auto", "--lr_milestones", "5")
    assert "lr_milestones=[5.0] need --lr_rule milestones" in message
    path = config("mode: autolora", "auto_lr_epochs: [5]", "lr_rule: cosine", "encoder: x")
    assert "auto_lr_epochs=[5] need --lr_rule auto" in refused("--config", path)
    assert "start_std=0.01" in refused("--encoder", "x", "--no_random_start", "--start_std", "0.01")


def test_without_a_random_start_there_is_no_gaussian_one(config):
    assert AFF.training_attack.start_std == 0.001
    for run in (
        parsed("--mode aff --no_random_start"),
        parsed("--mode aff --config " + config("random_start: false")),
    ):
        assert run.attack == PGD(steps=10, random_start=False)
    assert parsed("--mode aff --start_std none").attack == PGD(steps=10)


# ---------------------------------------------------------------------- a file of another mode
def test_what_belongs_to_the_mode_of_the_file_falls_away_with_it(config):
    path = config("mode: autolora", "rank: 4", "formulation: released", "auto_lr_epochs: [4, 6]", "seed: 3")
    run = parsed(f"--config {path}")
    assert (run.objective, run.training.auto_lr_epochs) == (AutoLoRa(rank=4, formulation="released"), [4, 6])
    run = parsed(f"--config {path} --mode lora")
    assert (run.objective, run.training.auto_lr_epochs, run.training.seed) == (LoRA(rank=4), None, 3)
    run = parsed(f"--config {path} --mode slf")
    assert (run.objective, run.training.seed, run.training.lr_milestones) == (SLF(), 3, [10, 20])
    path = config("mode: aff", "clean_branch: adv", "head_init: default")
    assert parsed(f"--config {path} --mode lp_aff").objective == AFF(clean_branch="adv", reference_branch="adv")


# ---------------------------------------------------------------------- post-processing
def test_post_processing_has_its_own_flags_and_the_loss_of_aff():
    run = parsed("--mode lp_aff")
    assert (run.post, run.attack) == (PostProcessing(), AFF.training_attack)
    assert run.objective == AFF(beta=6.0, clean_branch="adv", reference_branch="adv")
    training = run.training
    assert (training.keep, training.validation_fraction, training.dataloader_drop_last) == ("last", 0.0, True)
    assert (run.post.probe_stage_epochs, run.post.probe_stage_learning_rate) == (10.0, 0.01)
    run = parsed("--mode lp_aff --clusters 20 --probe_stage_epochs 2.5 --lp_variant air --beta 4")
    assert run.post == PostProcessing(20, 2.5, lp_variant="air")
    assert run.objective == AFF(beta=4.0, clean_branch="adv", reference_branch="clean")


# ---------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--mode slf", "--encoder is missing: name a folder that examples/pretrain.py wrote, or a Hub repository"),
        ("--encoder x --mode autolra", "unknown mode 'autolra': did you mean 'autolora'? known modes are aff, alf"),
        ("--encoder x --mode zzz", "unknown mode 'zzz': known modes are aff, alf, autolora, lora, lp_aff, slf"),
        ("--encoder x --mode acl", "acl pre-trains an encoder: run examples/pretrain.py --objective acl"),
        ("--encoder x --mode", "argument --mode: expected one argument"),
        ("--encoder x --objective aff", "--objective aff (fine-tuning says --mode)"),
        ("--encoder x --mode slf --rank 8", "--rank 8 (belongs to --mode autolora or lora)"),
        ("--encoder x --beta=3", "--beta=3 (belongs to --mode aff or lora or lp_aff)"),
        ("--encoder x --clusters 5", "--clusters 5 (belongs to --mode lp_aff)"),
        ("--encoder x --mode lp_aff --clean_branch adv", "--clean_branch adv (belongs to --mode aff)"),
        ("--encoder x --mode lp_aff --head_init zero", "--head_init zero (belongs to --mode aff or alf or autolora"),
        ("--encoder x --lerning_rate 1", "--lerning_rate 1 (did you mean 'learning_rate'?)"),
        ("--encoder x --encodr y", "--encodr y (did you mean 'encoder'?)"),
        ("--encoder x --mode slf --head_init alf", "--head_init alf trains the classifier before the encoder"),
        ("--encoder x --head_init one", "--head-init: invalid choice: 'one'"),
        ("--encoder x --eps 8", "eps must be in (0, 1], got 8.0"),
        ("--encoder x --rank 0", "rank"),
        ("--encoder x --validation_fraction 0", "validation_fraction is 0"),
        ("--encoder x --mode lp_aff --clusters 1", "clusters must be 2 or more, got 1"),
        ("--encoder x --optim sgd", "has no effect here: choose with --optimizer"),
        ("--encoder x --mode aff --preset rssl-vanilla/ACL/cifar10", "add --dataset_name"),
        ("--encoder x --dataset_name y --preset rssl-vanilla/ACL/cifar10", "got 'autolora': leave --preset out"),
        (
            "--encoder x --dataset_name y --mode slf --preset rssl-vanilla/DynACL_AIR/cifar10",
            "unknown method 'DynACL_AIR': did you mean 'DynACL-AIR'?",
        ),
        (
            "--encoder x --dataset_name y --mode slf --preset rssl-vanilla/DynACL-AIR++/stl10-32",
            "leaves them unset",
        ),
    ],
)
def test_wrong_flags_are_errors(refused, argv, message):
    assert message in refused(*argv.split())


def test_unknown_keys_of_a_file_say_where_they_belong(refused, config):
    message = refused("--encoder", "x", "--config", config("mode: slf", "rank: 4", "beta: 1", "sead: 3"))
    assert "'beta' (belongs to --mode aff or lora or lp_aff), 'rank' (belongs to --mode autolora or lora)" in message
    assert "'sead' (did you mean 'seed'?)" in message
    assert "unknown mode '5'" in refused("--config", config("mode: 5"))
    assert "'objective' (fine-tuning says --mode)" in refused("--config", config("objective: aff"))


# ---------------------------------------------------------------------- default configuration
def test_the_default_configuration_serves_only_a_bare_command_line(config):
    default = config("seed: 11", "encoder: from/default", "mode: slf", "dataset_name: digits", name="default.yaml")
    other = config("seed: 12", "encoder: from/other", name="other.yaml")
    run = parse_finetune([], default_config=default)
    assert (run.training.seed, run.encoder, run.mode) == (11, "from/default", "slf")
    run = parse_finetune(["--mode", "aff", "--encoder", "y"], default_config=default)
    assert (run.training.seed, run.encoder, run.mode) == (11, "y", "aff")
    run = parse_finetune(["--config", other], default_config=default)
    assert (run.training.seed, run.encoder, run.mode) == (12, "from/other", "autolora")
    run = parsed("--dataset_name some/set", default_config=default)
    assert (run.training.seed, run.mode) == (RobustFinetuningArguments.seed, "autolora")
    run = parsed("--preset rssl-vanilla/ACL/cifar10 --mode aff --dataset-name some/set", default_config=default)
    assert (run.training.seed, run.training.num_train_epochs) == (RobustFinetuningArguments.seed, 100)


def test_resume_true_is_not_the_name_of_a_folder():
    assert parsed("--resume_from_checkpoint true").training.resume_from_checkpoint is True


# ---------------------------------------------------------------------- help
@pytest.mark.parametrize("mode", MODES)
def test_help_explains_the_modes_and_the_fields_of_every_part(capsys, mode):
    with pytest.raises(SystemExit) as exit:
        parse_finetune(["--mode", mode, "--help"], description="First line.")
    assert exit.value.code == 0
    text = capsys.readouterr().out
    words = " ".join(text.split())
    assert "First line." in text and "--encoder DIR_OR_REPO" in text
    for name in MODES:  # every mode can be found, with a line on what it is
        assert re.search(rf"^  {name} +\w.*\.$", text, re.MULTILINE), name
    assert ", ".join(finetune_modes()) in words
    hidden = {"clean_branch", "reference_branch", "augmentation"} if mode == POST else set()
    method = [PostProcessing, AFF] if mode == POST else [load_objective(mode), ClassifierArguments]
    for kind in [FinetuneDataArguments, *method, plain_attack_flags(), AttackArguments]:
        for field in dataclasses.fields(kind):
            assert (f"--{field.name} " in text) is (field.name not in hidden), field.name
            assert field.name in hidden or " ".join(field.metadata["help"].split()) in words, field.name
    for field in (f for f in dataclasses.fields(RobustFinetuningArguments) if f.init):
        useless = field.name in WITHOUT_EFFECT or field.name.startswith("probe_")
        assert (f"--{field.name} " in text) is not useless, field.name
    assert text.index("--validation_fraction ") < text.index("--adam_beta1 ")  # ours before the stock trainer's


def test_help_shows_the_defaults_of_the_mode_and_the_preset(capsys):
    def shown(*argv: str) -> str:
        with pytest.raises(SystemExit):
            parse_finetune([*argv, "--help"])
        return " ".join(capsys.readouterr().out.split())

    assert "(default: autolora)" in shown()
    assert "First learning rate; published: 0.1, linear 0.01. (default: 0.01)" in shown("--mode", "slf")
    text = shown("--mode", "aff", "--preset", "rssl-vanilla/ACL/cifar10")
    assert "(default: 100.0)" in text or "(default: 100)" in text


def test_the_process_arguments_are_the_default(monkeypatch):
    monkeypatch.setattr("sys.argv", ["finetune.py", "--encoder", "z", "--seed", "5"])
    assert parse_finetune().training.seed == 5
