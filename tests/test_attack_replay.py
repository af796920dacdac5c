"""Remembered perturbations: what comes back, in which order, and that a resumed run remembers the same."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from finetuning import tiny_finetuner
from training import tiny_model, tiny_trainer

from hf_robust.attack_replay import PerturbationMemory
from hf_robust.attacks import PGD
from hf_robust.objectives import load_objective
from hf_robust.objectives.acl import ACL
from hf_robust.objectives.aff import AFF
from hf_robust.objectives.base import StepContext
from hf_robust.training_attack import TrainingAttack

EPS = 8 / 255
REPLAYED = PGD(step_sizes=(5 / 255, 5 / 255), replay=True)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("norm", "error"), [("linf", EPS / 254), ("l2", 3e-4)])
def test_views_come_back_to_their_images_and_new_images_start_as_ever(norm, error):
    attack = PGD(norm=norm, eps=EPS if norm == "linf" else 1.0, replay=True)
    memory, x = PerturbationMemory(attack, 10), torch.rand(6, 3, 4, 4)  # 2 views of 3 images
    assert torch.equal(memory.start(x, torch.tensor([7, 2, 5]), generator()), attack.first(x, generator()))
    kept = attack.first(x, generator(1))
    memory.keep(kept, torch.tensor([7, 2, 5]))
    found = memory.start(x, torch.tensor([5, 1, 7]), generator(2))
    fresh = attack.first(x, generator(2))
    for view in (0, 3):
        torch.testing.assert_close(found[view], kept[view + 2], rtol=0, atol=error + 1e-7)
        torch.testing.assert_close(found[view + 2], kept[view], rtol=0, atol=error + 1e-7)
        assert torch.equal(found[view + 1], fresh[view + 1])
    assert norm == "l2" or found.abs().max() <= EPS
    assert memory._stored.element_size() == (1 if norm == "linf" else 2)


@pytest.mark.parametrize("name", ["acl", "air", "sat", "alf", "aff", "lora", "autolora", "dynacl"])
def test_with_every_method_the_second_attack_starts_where_the_first_one_ended(name):
    objective = load_objective(name)()
    model = tiny_model(objective).train()
    batch = {view: torch.rand(4, 3, 8, 8, generator=generator(5)) for view in objective.views}
    batch |= {"label": torch.arange(4) % 3} if objective.needs_labels else {}
    accelerator = SimpleNamespace(mixed_precision="no", autocast=nullcontext, num_processes=1)
    training, index = TrainingAttack(accelerator), torch.tensor([3, 1, 8, 0])
    training.restart(REPLAYED, 9)
    starts, ends = [], []

    def attack(loss_fn, x):
        shown = []

        def loss(images):
            shown.append(images.detach() - x)
            return loss_fn(images)

        x_adv = training.bind(REPLAYED, [model], generator(len(starts)), index)(loss, x)
        starts.append(shown[0])
        ends.append(x_adv - x)
        return x_adv

    for _ in range(2):
        objective(model, batch, StepContext(attack, 0.3, None, standard_accuracy=0.5, seen=training.seen))
    torch.testing.assert_close(starts[1], ends[0], rtol=0, atol=EPS / 254 + 1e-6)
    assert not torch.allclose(starts[1], starts[0], atol=EPS / 10)


def test_what_cannot_be_remembered_is_refused(tmp_path):
    memory, x = PerturbationMemory(REPLAYED, 10), torch.rand(6, 3, 4, 4)
    with pytest.raises(ValueError, match="6 images in a batch of 4 cannot be replayed.*equally many views"):
        memory.start(x, torch.arange(4))
    memory.keep(torch.zeros_like(x), torch.arange(3))
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4, 4\), this attack's \(1, 3, 4, 4\): .*one method"):
        memory.start(x, torch.arange(6))
    memory.save(tmp_path)
    other = PerturbationMemory(REPLAYED, 11)
    with pytest.raises(ValueError, match="perturbations of 10 images, the training set has 11"):
        other.load(tmp_path, torch.device("cpu"))
    two = TrainingAttack(SimpleNamespace(mixed_precision="no", num_processes=2))
    for attack, name in ((REPLAYED, "attack_replay"), (PGD(min_gain=0.1), "attack_min_gain")):
        with pytest.raises(ValueError, match=f"{name} works on one process, got 2: .*--attack_schedule decay3"):
            two.restart(attack, 10)
    two.restart(PGD(), 10)


def trained(folder: Path, resume: bool = False, stop: int | None = None, **options: object) -> dict[str, torch.Tensor]:
    """2 epochs of 6 steps, with a checkpoint every 8; `stop`: as if killed after that step."""
    trainer = tiny_trainer(folder, ACL(), save_strategy="steps", save_steps=8)
    trainer.attack = dataclasses.replace(REPLAYED, **options)
    if stop is not None:
        after = trainer.after_step

        def killed() -> None:
            after()
            if trainer.state.global_step == stop:
                raise KeyboardInterrupt

        trainer.after_step = killed  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    else:
        trainer.train(resume_from_checkpoint=resume or None)
    memory = trainer.training_attack._memory
    return {**trainer.model.state_dict(), **({"remembered": memory._stored} if memory else {})}


def test_a_resumed_run_repeats_an_uninterrupted_one_bit_by_bit(tmp_path):
    whole = trained(tmp_path / "whole")
    trained(tmp_path / "cut", stop=10)
    assert (tmp_path / "cut" / "checkpoint-8" / "perturbations.safetensors").is_file()
    resumed = trained(tmp_path / "cut", resume=True)
    assert whole.keys() == resumed.keys()
    plain = trained(tmp_path / "plain", replay=False)
    assert any(not torch.equal(whole[name], plain[name]) for name in plain)  # the second epoch starts elsewhere
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    other = tiny_trainer(tmp_path / "new", ACL())
    with pytest.raises(ValueError, match="belongs to another run .*replay=True"):
        other.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-8"))


def test_in_the_first_epoch_there_is_nothing_to_remember(tmp_path):
    trainers = {replay: tiny_trainer(tmp_path / str(replay), ACL(), num_train_epochs=1) for replay in (True, False)}
    for replay, trainer in trainers.items():
        trainer.attack = dataclasses.replace(REPLAYED, replay=replay)
        trainer.train()
    first, plain = (trainer.model.state_dict() for trainer in trainers.values())
    assert all(torch.equal(first[name], plain[name]) for name in plain)
    memory = trainers[True].training_attack._memory
    assert bool(memory._seen.all()) and memory._stored.shape == (24, 2, 3, 8, 8)
    assert trainers[False].training_attack._memory is None
    trainers[True].training_attack.restart(REPLAYED, 24)  # a training from the start
    assert trainers[True].training_attack._memory._stored is None


def test_a_fine_tuning_remembers_too(tmp_path):
    trainer = tiny_finetuner(tmp_path, AFF(), num_train_epochs=1, save_strategy="epoch")
    trainer.attack = dataclasses.replace(AFF.training_attack, steps=1, replay=True)
    trainer.train()
    assert bool(trainer.training_attack._memory._seen.any())
    assert list(tmp_path.glob("checkpoint-*/perturbations.safetensors"))
