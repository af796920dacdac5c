"""The trainer: exact resume after a kill, schedule, accumulation, log, NaN stop, full disk, probe, export."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from training import tiny_images, tiny_model, tiny_trainer

from hf_robust import checkpoints
from hf_robust.data import load_image_dataset
from hf_robust.objectives.acl import ACL
from hf_robust.objectives.air import AIR
from hf_robust.objectives.dynacl import DynACL
from hf_robust.objectives.simclr import SimCLR
from hf_robust.optim import warmup_cosine

SCRIPT = Path(__file__).parent / "training.py"


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize(("flags", "last"), [([], 8), (["--coreset"], 16)])
def test_sigkill_in_mid_epoch_and_resume_end_bit_identical(tmp_path, flags, last):
    """12 steps, 6 per epoch, checkpoints after 4 and 8: the kill comes after step 8 and before the end.

    With a coreset 18 steps, 3 per round: the kill comes in the third coreset, which step 16 has begun to train on.
    """
    straight = subprocess.Popen([sys.executable, SCRIPT, tmp_path / "straight", *flags])
    killed = subprocess.Popen([sys.executable, SCRIPT, tmp_path / "killed", "--seconds_per_step", "0.5", *flags])
    deadline = time.time() + 240
    while checkpoints.latest_complete(tmp_path / "killed") != str(tmp_path / "killed" / f"checkpoint-{last}"):
        assert killed.poll() is None and time.time() < deadline
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "final.pt").exists()
    subprocess.run([sys.executable, SCRIPT, tmp_path / "killed", "--resume", *flags], check=True)
    assert straight.wait(timeout=240) == 0
    one, other = (torch.load(tmp_path / f / "final.pt", weights_only=True) for f in ("straight", "killed"))
    assert_same(one["model"], other["model"])
    assert_same(one["teacher"], other["teacher"])
    keep = ("loss", "loss_clean", "loss_adversarial", "strength", "learning_rate", "probe_standard_accuracy")
    keep += ("coreset_images", "coreset_overlap", "paper_epoch")
    logs = [[{k: e[k] for k in keep if k in e} for e in run["log"]] for run in (one, other)]
    assert [e for e in logs[0] if e] == [e for e in logs[1] if e]


@pytest.mark.parametrize("save_steps", [1, 3])
def test_resume_with_accumulation_repeats_the_run(tmp_path, save_steps):
    settings = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": save_steps}
    straight = tiny_trainer(tmp_path, ACL(), save_total_limit=10, **settings)
    straight.train()
    resumed = tiny_trainer(tmp_path, ACL(), save_total_limit=10, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{save_steps}"))
    assert_same(weights(straight), weights(resumed))


def test_resume_true_skips_an_incomplete_checkpoint(tmp_path):
    tiny_trainer(tmp_path, SimCLR(), save_strategy="steps", save_steps=4, save_total_limit=10).train()
    (tmp_path / "checkpoint-12" / "manifest.json").unlink()
    assert checkpoints.latest_complete(tmp_path) == str(tmp_path / "checkpoint-8")
    trainer = tiny_trainer(tmp_path, SimCLR())
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 12


def test_resume_refuses_a_truncated_checkpoint_and_an_empty_folder(tmp_path):
    tiny_trainer(tmp_path, SimCLR(), save_strategy="steps", save_steps=6).train()
    broken = tmp_path / "checkpoint-12" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors has \d+ bytes where \d+ were written; resume from .*-6"):
        tiny_trainer(tmp_path, SimCLR()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    with pytest.raises(ValueError, match="holds no complete checkpoint; start without"):
        tiny_trainer(tmp_path / "new", SimCLR()).train(resume_from_checkpoint=True)


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4}  # ends in mid-epoch
    first = tiny_trainer(tmp_path, DynACL(ema_decay=0.9), **settings)
    first.train()
    again = tiny_trainer(tmp_path, DynACL(ema_decay=0.9), **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4 and not (tmp_path / "checkpoint-5").exists()
    assert_same(weights(first), weights(again))
    assert_same(first.teacher.state_dict(), again.teacher.state_dict())
    assert again.training_seconds == pytest.approx(first.training_seconds, abs=5)


def test_checkpoints_of_another_run_are_not_mixed_in(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 6}
    tiny_trainer(tmp_path, ACL(), **settings).train()
    with pytest.raises(
        ValueError, match="holds checkpoint-12 of an earlier run.*--resume_from_checkpoint true, .*or give"
    ):
        tiny_trainer(tmp_path, ACL(), **settings).train()
    other = tiny_trainer(tmp_path, ACL(temperature=0.1), optimizer="sgd", **settings)
    with pytest.raises(
        ValueError, match=r"another run \(objective: ACL\(temperature=0.5.*optimizer, .*'lars', .* there, .'sgd'"
    ):
        other.train(resume_from_checkpoint=True)


def test_an_overwritten_checkpoint_does_not_count_until_it_is_whole(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, SimCLR(), save_strategy="steps", save_steps=4, max_steps=4)
    trainer.train()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer._save_checkpoint(trainer.model, None)
    assert checkpoints.latest_complete(tmp_path) is None


def test_a_run_depends_on_its_seed_and_on_nothing_around_it(tmp_path):
    ends = []
    for seed, noise in ((0, 0), (0, 1), (1, 0)):
        trainer = tiny_trainer(tmp_path, ACL(), seed=seed, max_steps=2)
        torch.manual_seed(noise)
        trainer.train()
        ends.append(weights(trainer)["backbone.conv1.weight"])
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_full_disk_while_saving_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, DynACL(ema_decay=0.9), save_strategy="steps", save_steps=4, save_total_limit=1)
    write = checkpoints.write_manifest

    def full(folder):
        if str(folder).endswith("-8"):
            raise OSError(28, "No space left on device")
        write(folder)

    monkeypatch.setattr(checkpoints, "write_manifest", full)
    with pytest.raises(OSError, match=r"could not write .*checkpoint-8.*checkpoint-4 is intact: free disk space"):
        trainer.train()
    assert not (tmp_path / "checkpoint-8").exists()
    checkpoints.verify(tmp_path / "checkpoint-4")
    assert trainer.args.save_total_limit == 1


def test_old_checkpoints_go_when_the_new_one_is_complete(tmp_path):
    tiny_trainer(tmp_path, SimCLR(), save_strategy="steps", save_steps=3, save_total_limit=2).train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-9"]


@pytest.mark.parametrize("granularity", ["step", "epoch"])
def test_learning_rates_follow_fractional_epochs(tmp_path, granularity):
    trainer = tiny_trainer(
        tmp_path, SimCLR(), num_train_epochs=4, warmup_epochs=2, lr_granularity=granularity, learning_rate=0.2
    )
    used = []
    step = trainer.before_step
    trainer.before_step = lambda: (used.append(trainer.optimizer.param_groups[0]["lr"]), step())
    trainer.train()

    def expected(t: int) -> float:
        epoch = (t + 1) / 6
        if granularity == "epoch":
            epoch = t // 6 + 1 if t // 6 < 2 else t // 6
        return warmup_cosine(epoch, base_lr=0.2, warmup_epochs=2, epochs=4)

    assert used == pytest.approx([expected(t) for t in range(24)])


@pytest.mark.parametrize(("optimizer", "kind"), [("lars", "LARS"), ("sgd", "SGD"), ("adamw", "AdamW")])
def test_optimisers(tmp_path, optimizer, kind):
    trainer = tiny_trainer(tmp_path, SimCLR(), optimizer=optimizer, learning_rate=0.01, weight_decay=0.1, max_steps=1)
    trainer.train()
    inner = trainer.optimizer.optimizer
    assert type(inner).__name__ == kind
    decays = {p.ndim > 1: group["weight_decay"] for group in inner.param_groups for p in group["params"]}
    assert decays == ({True: 0.1, False: 0.0} if optimizer == "adamw" else {True: 0.1, False: 0.1})


def test_accumulation_averages_micro_batches(tmp_path):
    """Frozen norm statistics and no attack: two micro-batches of 4 give the mean of their gradients."""
    gradients = []
    for steps in (1, 2):
        trainer = tiny_trainer(tmp_path, SimCLR(), gradient_accumulation_steps=steps, max_steps=1, warmup_epochs=0)
        seen = []
        compute = trainer.compute_loss
        trainer.compute_loss = lambda *a, c=compute, s=seen, **k: s.append(c(*a, **k)) or s[-1]
        trainer.before_step = lambda t=trainer: gradients.append(t.model.backbone.conv1.weight.grad.clone())
        trainer.train()
        assert len(seen) == steps
        logged = next(e["loss"] for e in trainer.state.log_history if "loss" in e)
        assert logged == pytest.approx(float(torch.stack([s.detach() for s in seen]).mean()), rel=1e-6)
    assert 0.3 < float(gradients[1].norm() / gradients[0].norm()) < 1.5  # a sum instead of a mean would be near 2


def test_every_loss_term_and_the_strength_are_logged(tmp_path):
    trainer = tiny_trainer(tmp_path, AIR(base=DynACL(period=0.5)))
    trainer.train()
    entries = [e for e in trainer.state.log_history if "loss" in e]
    assert len(entries) == 12
    names = ("clean", "adversarial", "standard_invariance", "robust_invariance")
    for entry in entries:
        assert entry["loss"] == pytest.approx(sum(entry[f"loss_{n}"] for n in names), abs=1e-5)
    assert [e["strength"] for e in entries][:5] == [1.0] * 5 and entries[-1]["strength"] == 0.5


def test_tensorboard_receives_every_term(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tiny_trainer(tmp_path, ACL(), report_to="tensorboard", max_steps=2).train()
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    reader = event_accumulator.EventAccumulator(str(events)).Reload()
    assert {"train/loss_clean", "train/loss_adversarial", "train/strength"} <= set(reader.Tags()["scalars"])


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    trainer = tiny_trainer(tmp_path, ACL(), save_strategy="steps", save_steps=1, logging_steps=100)

    class Poisoned(ACL):
        def __call__(self, model, batch, context):
            terms = super().__call__(model, batch, context)
            return {k: v * (float("nan") if trainer.state.global_step == 5 else 1.0) for k, v in terms.items()}

    trainer.objective = Poisoned()
    with pytest.raises(FloatingPointError, match=r"NaN or infinite by step 6; .* checkpoint is .*-5\. Lower"):
        trainer.train()
    checkpoints.verify(tmp_path / "checkpoint-5")
    assert not (tmp_path / "checkpoint-6").exists()


def test_wrong_branches_and_too_large_batches_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"ACL runs images through .*\['clean', 'adv'\], the model has \['clean'\]"):
        tiny_trainer(tmp_path, ACL(), model=tiny_model(SimCLR()))
    with pytest.raises(ValueError, match=r"batch of 32 images .* larger than the data set, which has 24: set .* 24"):
        tiny_trainer(tmp_path, ACL(), per_device_train_batch_size=32)


def test_channels_last_gives_the_same_step(tmp_path):
    losses = []
    for channels_last in (False, True):
        trainer = tiny_trainer(tmp_path, ACL(), channels_last=channels_last, max_steps=1)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # sign steps flip single pixels


def test_bf16_reaches_the_same_attack_and_nearly_the_same_loss(tmp_path):
    logs = []
    for bf16 in (False, True):
        # 24 images of 16 x 16 and many channels: norms over a handful of values would magnify any rounding
        model = tiny_model(ACL(), image_size=16, model_args={"channels": [16, 32, 64, 128]})
        trainer = tiny_trainer(tmp_path, ACL(), model=model, bf16=bf16, max_steps=1, per_device_train_batch_size=24)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    assert trainer.model.backbone.conv1.weight.dtype == torch.float32
    for name in ("loss_clean", "loss_adversarial"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=0.02)


def test_momentum_encoder_moves_before_the_step_and_is_the_encoder_that_leaves(tmp_path):
    trainer = tiny_trainer(tmp_path, DynACL(ema_decay=0.75), max_steps=2, warmup_epochs=0)
    teacher = trainer.teacher.backbone.conv1.weight.clone()
    students = []
    hook = trainer.before_step
    trainer.before_step = lambda: (students.append(trainer.model.backbone.conv1.weight.detach().clone()), hook())
    trainer.model.backbone.conv1.weight.data.add_(1.0)
    trainer.train()
    assert not torch.equal(students[0], students[1])
    for student in students:  # the weights that made the loss, not those after the step
        teacher = 0.75 * teacher + 0.25 * student
    torch.testing.assert_close(trainer.teacher.backbone.conv1.weight, teacher)
    assert trainer.encoder_model is trainer.teacher
    assert not any(p.requires_grad or p.grad is not None for p in trainer.teacher.parameters())


def test_probe_runs_every_n_epochs_and_leaves_the_training_alone(tmp_path):
    plain, probed = (tiny_trainer(tmp_path, ACL(), num_train_epochs=3, probe_every=every) for every in (0, 2))
    plain.train()
    probed.train()
    assert_same(weights(plain), weights(probed))
    entries = [e for e in probed.state.log_history if "probe_standard_accuracy" in e]
    assert [e["epoch"] for e in entries] == [2.0]
    assert 0 <= entries[0]["probe_pgd20_linf_8_255_accuracy"] <= entries[0]["probe_standard_accuracy"] <= 1


def test_probe_subsets_hold_every_class_and_unfit_sets_are_refused_at_once(tmp_path):
    trainer = tiny_trainer(tmp_path, ACL(), probe_every=1, probe_examples=1, probe_eval_examples=1, max_steps=6)
    trainer.train()
    assert any("probe_standard_accuracy" in e for e in trainer.state.log_history)
    with pytest.raises(ValueError, match=r"evaluation images have the classes \[2\] that no training image has"):
        tiny_trainer(tmp_path, ACL(), data=tiny_images(classes=2))


def test_a_single_left_over_image_is_left_out(tmp_path):
    trainer = tiny_trainer(tmp_path, AIR(), data=tiny_images(25), num_train_epochs=1)
    trainer.train()
    assert trainer.state.global_step == 6
    assert tiny_trainer(tmp_path, AIR(), data=tiny_images(26)).args.steps_per_epoch(26) == 7


def test_warm_up_longer_than_the_run_is_said(tmp_path, caplog):
    tiny_trainer(tmp_path, SimCLR(), warmup_epochs=10, max_steps=1).train()
    assert "ends inside the warm-up of 10" in caplog.text


def test_evaluate_points_to_the_probe(tmp_path):
    with pytest.raises(NotImplementedError, match=r"trainer.probe\(\)"):
        tiny_trainer(tmp_path, SimCLR()).evaluate()


def test_unlabelled_images_train_without_a_probe(tmp_path):
    data = tiny_images()
    data.labels = None
    trainer = tiny_trainer(tmp_path, ACL(), data=data, probe_every=1, max_steps=2)
    trainer.train()
    assert not any("probe_standard_accuracy" in e for e in trainer.state.log_history)


def test_streamed_images_train_to_the_same_weights(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for k, image in enumerate(tiny_images().images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{k:02}.png")
    ends = []
    for budget in (2**20, 0):
        data = load_image_dataset(folder, memory_budget=budget)
        assert (data.images is None) == (budget == 0)
        trainer = tiny_trainer(tmp_path, ACL(), data=data, max_steps=2)
        trainer.train()
        ends.append(weights(trainer))
    assert_same(*ends)


def test_save_encoder_writes_the_adversarial_branch(tmp_path):
    trainer = tiny_trainer(tmp_path, ACL(), max_steps=2)
    trainer.train()
    folder = trainer.save_encoder(tmp_path / "encoder")
    assert json.loads((folder / "config.json").read_text())["norm_branch"] == "adv"
    clean = tiny_trainer(tmp_path, SimCLR(), max_steps=1)
    folder = clean.save_encoder(tmp_path / "clean")
    assert json.loads((folder / "config.json").read_text())["norm_branch"] == "clean"
