"""Arguments of fine-tuning: published defaults, rules that need each other, recipes of the methods."""

from __future__ import annotations

import pytest

from hf_robust.finetuning_args import RobustFinetuningArguments
from hf_robust.objectives.aff import AFF
from hf_robust.objectives.autolora import AutoLoRa
from hf_robust.objectives.slf import SLF
from hf_robust.training_args import RobustTrainingArguments


def arguments(tmp_path, **changes):
    return RobustFinetuningArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **changes)


def test_defaults_are_those_of_the_published_vanilla_runs_with_held_out_images(tmp_path):
    args = arguments(tmp_path)
    assert (args.optimizer, args.momentum, args.nesterov, args.weight_decay) == ("sgd", 0.9, False, 2e-4)
    assert (args.num_train_epochs, args.validation_fraction, args.validation_steps, args.keep) == (
        25,
        0.05,
        20,
        "best",
    )
    assert RobustTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True).nesterov is True


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (SLF(), (512, 0.01, [10, 20], 25, "milestones", ())),
        (AFF(), (128, 0.1, [15, 20], 25, "milestones", ())),
        (AutoLoRa(), (128, 0.1, None, 50, "auto", (16, 24, 28, 36, 40, 42, 44, 46, 48))),
    ],
)
def test_a_method_brings_its_recipe(tmp_path, objective, expected):
    args = RobustFinetuningArguments.of(objective, output_dir=str(tmp_path), report_to="none", use_cpu=True)
    batch, epochs = args.per_device_train_batch_size, args.num_train_epochs
    assert (batch, args.learning_rate, args.lr_milestones, epochs, args.lr_rule, args.halving_epochs) == expected
    other = RobustFinetuningArguments.of(objective, output_dir=str(tmp_path), report_to="none", learning_rate=0.3)
    assert other.learning_rate == 0.3


@pytest.mark.parametrize(
    ("objective", "epochs", "milestones", "halving"),
    [
        (AFF(), 5, [3, 4], ()),
        (SLF(), 50, [20, 40], ()),
        (AutoLoRa(), 10, None, (3, 5, 6, 7, 8, 9)),
        (AFF(), 25, [15, 20], ()),
    ],
)
def test_in_a_run_of_another_length_the_rate_falls_at_the_same_shares(
    tmp_path, objective, epochs, milestones, halving
):
    args = RobustFinetuningArguments.of(
        objective, num_train_epochs=epochs, output_dir=str(tmp_path), report_to="none", use_cpu=True
    )
    assert args.lr_milestones == pytest.approx(milestones) and args.halving_epochs == halving
    automatic = RobustFinetuningArguments.of(
        objective, lr_rule="auto", num_train_epochs=9, output_dir=str(tmp_path), report_to="none", use_cpu=True
    )
    assert automatic.lr_milestones is None and automatic.halving_epochs


def test_the_automatic_rule_looks_back_every_fourth_epoch_unless_told_when(tmp_path):
    assert arguments(tmp_path, lr_rule="auto", num_train_epochs=14).halving_epochs == (4, 8, 12)
    assert arguments(tmp_path, lr_rule="auto", auto_lr_epochs=[3]).halving_epochs == (3,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_rule": "automatic"}, "lr_rule must be one of milestones, auto, cosine"),
        ({"keep": "all"}, "keep must be one of best, last"),
        ({"validation_fraction": 1.0}, r"validation_fraction must be in \[0, 1\), got 1.0"),
        ({"validation_fraction": 0.0}, "keep best chooses the epoch by validation images.*--keep last"),
        ({"validation_fraction": 0.0, "keep": "last", "lr_rule": "auto"}, "lr_rule auto halves the rate"),
        ({"lr_rule": "auto", "lr_milestones": [3.0]}, "need --lr_rule milestones"),
        ({"auto_lr_epochs": [3]}, "need --lr_rule auto"),
        ({"warmup_epochs": 2}, "need --lr_rule cosine"),
        ({"lr_milestones": [15.0, 20.0], "num_train_epochs": 18}, r"lr_milestones \[20.0\] lie beyond the 18 epochs"),
        ({"lr_rule": "auto", "auto_lr_epochs": [4, 25]}, r"auto_lr_epochs \[25\] lie beyond the 25 epochs"),
        ({"probe_every": 1}, "held-out images are measured after every epoch"),
        ({"load_best_model_at_end": True}, "--keep best"),
        ({"lr_scheduler_type": "cosine"}, "--lr_rule"),
        ({"validation_steps": 0}, "validation_steps must be 1 or more"),
    ],
)
def test_rules_that_do_not_go_together_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **changes)
