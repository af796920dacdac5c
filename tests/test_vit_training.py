"""Vision transformers: no running statistics, so no branches in the backbone; they train, attack and leave as others.

A transformer of two blocks; the whole way from training to the Auto classes.
"""

from __future__ import annotations

import json

import pytest
import torch
from training import tiny_images, tiny_model, tiny_trainer, tiny_vit
from transformers import AutoModel

from hf_robust.attacks import PGD, frozen
from hf_robust.hub import encoder_features, save_encoder
from hf_robust.models.norm import NormBranches
from hf_robust.objectives.acl import ACL
from hf_robust.objectives.base import StepContext
from hf_robust.objectives.deacl import DeACL
from hf_robust.objectives.fare import FARE
from hf_robust.objectives.simclr import SimCLR
from hf_robust.teachers import FrozenTeacher, student_of

METHODS = {"acl": ACL(), "deacl": DeACL(), "fare": FARE(), "fare_adapter": FARE(adapter_rank=4)}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """An exported transformer."""
    model = tiny_model(SimCLR(), seed=3, **tiny_vit())
    return save_encoder(model, tmp_path_factory.mktemp("vit") / "encoder", branch="clean")


def model_of(method, teacher):
    return student_of(teacher, method) if method.starts_from_teacher else tiny_model(method, **tiny_vit())


@pytest.mark.parametrize("name", METHODS)
def test_a_transformer_trains_and_leaves_as_an_ordinary_model(tmp_path, teacher, name):
    method = METHODS[name]
    trainer = tiny_trainer(
        tmp_path,
        method,
        model=model_of(method, teacher),
        teacher=teacher if method.teacher_kind else None,
        data=tiny_images(8),
        optimizer="adamw",
        learning_rate=0.01,
        warmup_epochs=0,
        num_train_epochs=2,
    )
    start = {name: t.clone() for name, t in trainer.model.state_dict().items()}
    trainer.train()
    logs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 4 and all(torch.isfinite(torch.tensor(logs)))
    wanted = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert {"lora_" in n for n in wanted} == {method.trains == "adapter"}
    assert {n for n in wanted if torch.equal(start[n], trainer.model.state_dict()[n])} == set()
    folder = trainer.save_encoder(tmp_path / "encoder")
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architecture"]) == ("timm_wrapper", "vit_tiny_patch16_224")
    encoder = AutoModel.from_pretrained(folder).eval()
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = trainer.model.eval().features(x, "adv")
        torch.testing.assert_close(encoder_features(encoder)(x), expected, rtol=1e-4, atol=1e-5)


def test_branches_share_the_backbone_and_part_in_the_projector():
    model = tiny_model(ACL(), **tiny_vit()).train()
    assert not any(isinstance(m, NormBranches) for m in model.backbone.modules())
    assert sum(isinstance(m, NormBranches) for m in model.projector.modules()) == 3
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model([("adv", x), ("clean", x.flip(-1).square())])
        model.eval()
        assert torch.equal(model.features(x, "clean"), model.features(x, "adv"))
        assert not torch.allclose(model.embed(x, "clean"), model.embed(x, "adv"), atol=1e-3)


def test_vit_tiny_at_32_pixels_is_attacked_and_gets_a_gradient_everywhere():
    """The architecture of the presets, at its own size; one step."""
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    for method in (ACL(), FARE()):
        config = {"architecture": "vit_tiny_patch4_32", "model_args": {}, "image_size": 32}
        model = tiny_model(method, **config).train()

        def attack(loss_fn, images, model=model):
            with frozen(model):
                return PGD(steps=1)(loss_fn, images, generator=torch.Generator().manual_seed(0))

        original = FrozenTeacher(tiny_model(method, seed=4, **config), "vit") if method.teacher_kind else None
        batch = dict.fromkeys(method.views, x)
        sum(method(model, batch, StepContext(attack, teacher=original)).values()).backward()
        assert [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []
