"""What every pre-training method promises of a training; a file in `hf_robust/objectives/` is tested by existing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from training import tiny_images, tiny_model, tiny_teacher, tiny_trainer

from hf_robust.flags import method_names
from hf_robust.hub import encoder_features, load_encoder
from hf_robust.memory_model import step_memory
from hf_robust.objectives import Objective, load_objective
from hf_robust.pretrainer import RobustPretrainer

SETTINGS: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "warmup_epochs": 0}


@pytest.fixture(params=method_names(finetuning=False))
def objective(request) -> Objective:
    found = load_objective(request.param)()
    if found.pseudo_classes:  # as many clusters as a few images can have
        return dataclasses.replace(found, clusters=[2, 3])
    return found


def test_a_resumed_run_is_the_uninterrupted_one_and_its_encoder_leaves(tmp_path, objective):
    straight = tiny_trainer(tmp_path, objective, **SETTINGS)
    straight.train()
    resumed = tiny_trainer(tmp_path, objective, **SETTINGS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = straight.model.state_dict()
    assert [n for n, t in resumed.model.state_dict().items() if not torch.equal(t, expected[n])] == []
    encoder = load_encoder(straight.save_encoder(tmp_path / "encoder"))
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        trained = straight.encoder_model.eval().features(x, straight.encoder_branch)
        torch.testing.assert_close(encoder_features(encoder)(x), trained, rtol=1e-4, atol=1e-5)


def test_without_an_attack_the_published_one_is_taken(tmp_path, objective):
    trainer = RobustPretrainer(
        tiny_model(objective),
        tiny_trainer(tmp_path, objective).args,
        objective,
        train_dataset=tiny_images(),
        teacher=tiny_teacher(objective),
    )
    assert trainer.attack == objective.training_attack


def test_the_memory_of_a_step_can_be_foreseen(objective):
    assert step_memory(tiny_model(objective), objective, 8).activations > 8 * 3 * 8 * 8 * 4
