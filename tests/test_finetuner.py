"""The fine-tuner: what trains, who decides, exact resume, and what is refused."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from finetuning import tiny_arguments, tiny_finetuner
from training import tiny_images, tiny_model

from hf_robust import checkpoints
from hf_robust.attacks import PGD
from hf_robust.data import ImageDataset
from hf_robust.evaluation.accuracy import Accuracy
from hf_robust.finetuner import RobustFinetuner
from hf_robust.held_out import split_validation
from hf_robust.objectives.acl import ACL
from hf_robust.objectives.aff import AFF
from hf_robust.objectives.alf import ALF
from hf_robust.objectives.autolora import AutoLoRa
from hf_robust.objectives.lora import LoRA
from hf_robust.objectives.slf import SLF

SCRIPT = Path(__file__).parent / "finetuning.py"
ATTACKED = "pgd2_linf_8_255_accuracy"
METHODS = {"slf": SLF, "alf": ALF, "aff": AFF, "lora": lambda: LoRA(rank=2), "autolora": lambda: AutoLoRa(rank=2)}


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def entries(trainer, key):
    return [e[key] for e in trainer.state.log_history if key in e]


def scripted(trainer, accuracies):
    """Let the validation images give these PGD accuracies, epoch by epoch; standard accuracy stays 0.5."""
    found = iter(accuracies)

    def measure(dataset, attack=None, **_):
        return Accuracy(0.5, next(found) if attack is not None else None, len(dataset), attack)

    trainer.measure = measure


# ---------------------------------------------------------------------- what trains
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_logs_what_decided(tmp_path, method):
    trainer = tiny_finetuner(tmp_path, METHODS[method]())
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    assert not torch.equal(before["classifier.weight"], after["classifier.weight"])
    assert (
        len(entries(trainer, f"validation_{ATTACKED}")) == len(entries(trainer, "validation_standard_accuracy")) == 3
    )
    assert all(0 <= a <= 1 for a in entries(trainer, f"validation_{ATTACKED}"))
    assert trainer.kept_epoch in (1, 2, 3)


@pytest.mark.parametrize("method", ["slf", "alf", "lora"])
def test_a_frozen_encoder_stays_bit_identical_with_its_buffers(tmp_path, method):
    trainer = tiny_finetuner(tmp_path, METHODS[method](), keep="last")
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"classifier.weight", "classifier.bias"} <= changed
    assert all(name.startswith("classifier.") or "lora_" in name for name in changed)
    assert any("running_mean" in name for name in before)
    assert any("lora_B" in name for name in changed) == (method == "lora")


@pytest.mark.parametrize("method", ["aff", "autolora"])
def test_full_fine_tuning_moves_weights_and_statistics(tmp_path, method):
    trainer = tiny_finetuner(tmp_path, METHODS[method](), keep="last")
    before = weights(trainer)
    trainer.train()
    same = {n for n, v in trainer.model.state_dict().items() if torch.equal(v, before[n])}
    assert not [n for n in same if n.endswith(("running_mean", "weight")) and "normalize" not in n]


def test_the_clean_branch_of_the_air_variant_stands_still(tmp_path):
    trainer = tiny_finetuner(tmp_path, AFF(clean_branch="adv", reference_branch="clean"), keep="last")
    before = weights(trainer)
    trainer.train()
    changed = {n for n, v in trainer.model.state_dict().items() if not torch.equal(v, before[n])}
    assert not [n for n in changed if ".clean." in n] and [n for n in changed if ".adv." in n]


# ---------------------------------------------------------------------- who decides
def test_the_weights_of_the_best_epoch_stay(tmp_path):
    kept = {}
    for keep in ("best", "last"):
        trainer = tiny_finetuner(tmp_path / keep, AFF(), keep=keep)
        scripted(trainer, [0.1, 0.4, 0.4])  # a tie does not replace the first
        ends = []
        end_epoch = trainer.end_epoch

        def note(before, epoch, trainer=trainer, ends=ends, end_epoch=end_epoch):
            end_epoch(before, epoch)
            ends.append(weights(trainer))

        trainer.end_epoch = note
        trainer.train()
        kept[keep] = (weights(trainer), ends, trainer.kept_epoch)
    assert kept["best"][2] == 2 and kept["last"][2] is None
    assert_same(kept["best"][0], kept["best"][1][1])
    assert_same(kept["last"][0], kept["last"][1][2])
    assert any(not torch.equal(v, kept["last"][0][n]) for n, v in kept["best"][0].items())


def test_of_equal_robustness_the_better_on_clean_images_stays(tmp_path):
    trainer = tiny_finetuner(tmp_path, SLF())
    found = iter([(0.5, 0.4), (0.7, 0.4), (0.6, 0.4)])

    def measure(dataset, attack=None, **_):
        standard, attacked = next(found)
        return Accuracy(standard, attacked, len(dataset), attack)

    trainer.measure = measure
    trainer.train()
    assert trainer.kept_epoch == 2


@pytest.mark.parametrize(("accuracies", "told"), [([0.1, 0.3, 0.2], True), ([0.1, 0.5, 0.2], False)])
def test_a_choice_that_is_no_better_than_chance_is_told(tmp_path, caplog, accuracies, told):
    trainer = tiny_finetuner(tmp_path, SLF())
    scripted(trainer, accuracies)
    trainer.train()
    assert ("is not above chance (33.3 %)" in caplog.text) is told


def test_the_rate_is_halved_and_the_best_weights_come_back(tmp_path):
    """Checks after epochs 3 and 5 of 6; PGD accuracy falls from the second epoch on."""
    trainer = tiny_finetuner(
        tmp_path, AFF(), num_train_epochs=6, lr_rule="auto", auto_lr_epochs=[2, 4], learning_rate=0.08
    )
    scripted(trainer, [0.2, 0.3, 0.25, 0.2, 0.15, 0.1])
    ends = []
    end_epoch = trainer.end_epoch

    def note(before, epoch):
        reached = weights(trainer)
        end_epoch(before, epoch)
        ends.append((reached, weights(trainer)))

    trainer.end_epoch = note
    trainer.train()
    rates = entries(trainer, "learning_rate")
    assert rates[:12] == [0.08] * 12 and rates[12:20] == [0.04] * 8 and rates[20:] == [0.02] * 4
    assert entries(trainer, "learning_rate_halved") == [0.04, 0.02]
    for epoch in (2, 4):  # after the third and the fifth the weights of the second are back
        assert_same(ends[epoch][1], ends[1][0])
        assert any(not torch.equal(v, ends[1][0][n]) for n, v in ends[epoch][0].items())
    assert trainer.kept_epoch == 2


def test_milestones_and_a_constant_rate(tmp_path):
    falling = tiny_finetuner(tmp_path / "falling", SLF(), lr_milestones=[1, 2], learning_rate=0.1)
    falling.train()
    rates = entries(falling, "learning_rate")
    assert rates == pytest.approx([0.1] * 4 + [0.01] * 4 + [0.001] * 4)
    constant = tiny_finetuner(tmp_path / "constant", SLF(), learning_rate=0.1)
    constant.train()
    assert entries(constant, "learning_rate") == [0.1] * 12


def test_autolora_weighs_its_terms_by_the_accuracy_it_asked_for(tmp_path):
    trainer = tiny_finetuner(tmp_path, AutoLoRa(rank=2))
    seen = []
    step_context = trainer.step_context

    def note(generator, index=None):
        context = step_context(generator, index)
        seen.append(context.standard_accuracy)
        return context

    trainer.step_context = note
    trainer.train()
    measured = entries(trainer, "path_standard_accuracy")
    assert len(measured) == 3 and [seen[k] for k in (0, 4, 8)] == measured and seen[1:4] == [measured[0]] * 3
    assert entries(trainer, "lambda_1") == pytest.approx([1 - a for a in measured])
    assert entries(trainer, "lambda_2") == pytest.approx([6 * a for a in measured])


def test_the_released_formulation_measures_more_often_on_training_images(tmp_path):
    trainer = tiny_finetuner(tmp_path, AutoLoRa(rank=2, formulation="released"), num_train_epochs=1)
    asked = []
    measure = trainer.measure

    def note(dataset, attack=None, **kwargs):
        asked.append((dataset is trainer.train_dataset, kwargs.get("path"), kwargs.get("view"), attack is None))
        return measure(dataset, attack, **kwargs)

    trainer.measure = note
    trainer.train()
    assert asked[:4] == [(True, "adv", "padded_crop", True)] * 4 and asked[4][0] is False


def test_the_same_accuracy_whatever_the_batches_and_the_mode(tmp_path):
    trainer = tiny_finetuner(tmp_path, SLF())
    trainer.train()
    trainer.model.train()
    found = trainer.measure(tiny_images(9, seed=1), PGD(steps=2))
    with torch.no_grad():
        x = tiny_images(9, seed=1).images.float() / 255
        trainer.model.eval()
        right = (trainer.model.embed(x, "adv").argmax(1) == tiny_images(9, seed=1).labels).float().mean()
    assert found.standard == pytest.approx(float(right)) and found.n == 9
    assert set(found.to_dict()) == {"standard_accuracy", ATTACKED}


# ---------------------------------------------------------------------- held-out images
def test_held_out_images_are_stratified_and_disjoint():
    data = tiny_images(60)
    data.images[:, 0, 0, 0] = torch.arange(60).to(torch.uint8)  # a name for each image
    train, validation = split_validation(data, 0.1, seed=4)
    assert validation.labels.bincount().tolist() == [2, 2, 2] and len(train) == 54
    names = torch.cat([train.images[:, 0, 0, 0], validation.images[:, 0, 0, 0]])
    assert sorted(names.tolist()) == list(range(60))
    assert split_validation(data, 0, seed=4) == (data, None)
    other = split_validation(data, 0.1, seed=5)[1]
    assert other.images[:, 0, 0, 0].tolist() != validation.images[:, 0, 0, 0].tolist()


def test_a_class_that_would_have_no_training_image_is_named():
    labels = torch.tensor([0] * 10 + [1])
    data = ImageDataset.from_tensors(torch.zeros(11, 3, 8, 8, dtype=torch.uint8), labels, name="rare")
    with pytest.raises(ValueError, match=r"leaves no image of the classes \[1\].*--validation_fraction"):
        split_validation(data, 0.2, 0)


# ---------------------------------------------------------------------- resume
def test_sigkill_in_mid_epoch_and_resume_end_bit_identical(tmp_path):
    """12 steps, 4 per epoch, checkpoints after 5 and 10, in the second and the third epoch."""
    straight = subprocess.Popen([sys.executable, SCRIPT, tmp_path / "straight"])
    killed = subprocess.Popen([sys.executable, SCRIPT, tmp_path / "killed", "--seconds_per_step", "0.5"])
    deadline = time.time() + 240
    while checkpoints.latest_complete(tmp_path / "killed") != str(tmp_path / "killed" / "checkpoint-5"):
        assert killed.poll() is None and time.time() < deadline
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    subprocess.run([sys.executable, SCRIPT, tmp_path / "killed", "--resume"], check=True)
    assert straight.wait(timeout=240) == 0
    one, other = (torch.load(tmp_path / f / "final.pt", weights_only=True) for f in ("straight", "killed"))
    assert_same(one["model"], other["model"])
    assert_same(one["best"], other["best"])
    assert one["rate"] == other["rate"]
    keep = ("loss", "learning_rate", "lambda_1", f"validation_{ATTACKED}", "learning_rate_halved")
    logs = [[{k: e[k] for k in keep if k in e} for e in run["log"]] for run in (one, other)]
    assert [e for e in logs[0] if e] == [e for e in logs[1] if e]


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_finished_run_is_resumed_to_its_best_weights(tmp_path, channels_last):
    settings = {"save_strategy": "epoch", "save_total_limit": 5, "channels_last": channels_last}
    trainer = tiny_finetuner(tmp_path, AFF(), **settings)
    scripted(trainer, [0.3, 0.2, 0.1])
    trainer.train()
    again = tiny_finetuner(tmp_path, AFF(), **settings)
    again.train(resume_from_checkpoint=True)
    assert again.kept_epoch == 1
    assert_same(weights(trainer), weights(again))


def test_a_checkpoint_of_other_rules_is_refused(tmp_path):
    tiny_finetuner(tmp_path, SLF(), save_strategy="epoch").train()
    with pytest.raises(ValueError, match="kept"):
        tiny_finetuner(tmp_path, SLF(), save_strategy="epoch", keep="last").train(resume_from_checkpoint=True)


# ---------------------------------------------------------------------- refusals
def test_a_checkpoint_that_began_from_other_weights_is_refused(tmp_path):
    tiny_finetuner(tmp_path, SLF(), save_strategy="epoch").train()
    other = tiny_finetuner(tmp_path, SLF(), model=tiny_model(SLF(), seed=1), save_strategy="epoch")
    with pytest.raises(ValueError, match="weights at the start"):
        other.train(resume_from_checkpoint=True)


def test_weights_that_diverged_are_told_with_the_last_good_checkpoint(tmp_path):
    trainer = tiny_finetuner(tmp_path, AFF(), save_strategy="epoch", learning_rate=1e4)
    with pytest.raises(FloatingPointError, match="Lower --learning_rate"):
        trainer.train()


@pytest.mark.parametrize("change", [{"rank": 3}, {"init": "peft"}, {"norm_update": "plain_only"}])
def test_adapters_of_other_settings_than_the_method_says_are_refused(tmp_path, change):
    model = tiny_model(AutoLoRa(rank=2))
    with pytest.raises(ValueError, match=f"AutoLoRa says {next(iter(change))}="):
        tiny_finetuner(tmp_path, AutoLoRa(**{"rank": 2, **change}), model=model)


def test_what_needs_held_out_images_says_so(tmp_path):
    for changes, word in (({"keep": "best"}, "keep='best'"), ({"keep": "last", "lr_rule": "auto"}, "lr_rule='auto'")):
        args = tiny_arguments(tmp_path, **changes)
        with pytest.raises(ValueError, match=word + r".*split_validation"):
            RobustFinetuner(tiny_model(AFF()), args, AFF(), train_dataset=tiny_images())
    with pytest.raises(ValueError, match="AutoLoRa weighs its terms.*formulation='released'"):
        RobustFinetuner(
            tiny_model(AutoLoRa(rank=2)), tiny_arguments(tmp_path, keep="last"), AutoLoRa(rank=2), None, tiny_images()
        )


def test_autolora_needs_a_lora_path(tmp_path):
    with pytest.raises(ValueError, match="with_lora_path"):
        tiny_finetuner(tmp_path, AutoLoRa(rank=2), model=tiny_model(ALF()))


def test_a_projector_one_class_and_missing_labels_are_refused(tmp_path):
    with pytest.raises(ValueError, match="trains a classifier"):
        tiny_finetuner(tmp_path, SLF(), model=tiny_model(ACL(mode="a2a")))
    with pytest.raises(ValueError, match="one class"):
        tiny_finetuner(tmp_path, SLF(), data=tiny_images(12, classes=1))
    with pytest.raises(ValueError, match="no labels"):
        tiny_finetuner(tmp_path, SLF(), data=ImageDataset.from_tensors(tiny_images().images))
