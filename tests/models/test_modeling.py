from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForPreTraining

from hf_robust.attacks import frozen
from hf_robust.models.modeling import RobustModelForPreTraining, RobustPretrainingConfig
from hf_robust.models.norm import NormBranches

THIN = {"architecture": "resnet10_cifar", "model_args": {"channels": [4, 4, 8, 8]}}
VIT = {"architecture": "vit_tiny_patch4_32", "model_args": {"depth": 1, "embed_dim": 24}}


def build(**kwargs) -> RobustModelForPreTraining:
    torch.manual_seed(0)
    return RobustModelForPreTraining(RobustPretrainingConfig(**{**THIN, **kwargs}))


def images(n: int = 4, size: int = 32) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def state(model: nn.Module, branch: str) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if f".{branch}." in k}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_released_size_of_the_dual_resnet18_with_projector():
    with torch.device("meta"):
        model = RobustModelForPreTraining(RobustPretrainingConfig())
    assert sum(p.numel() for p in model.parameters()) == 11_971_520
    assert sum(p.numel() for p in model.projector.parameters()) == 793_088
    assert model.num_features == 512


@pytest.mark.parametrize("layers", [2, 3])
def test_projector_is_the_documented_chain(layers):
    model = build(projector_layers=layers, projector_dim=6, norm_branches=("clean",)).eval()
    head, h = model.projector, torch.rand(5, 8)
    for module in head:
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
    y = h
    for i in range(1, layers + 1):
        y = F.linear(y, head.get_parameter(f"fc{i}.weight"), head.fc1.bias if i == 1 else None)
        bn = head.get_submodule(f"bn{i}")
        y = F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias)
        y = F.relu(y) if i < layers else y
    assert torch.allclose(head(h), y, atol=1e-6)
    assert (y < 0).any()
    assert [m.bias is not None for m in head if isinstance(m, nn.Linear)] == [True] + [False] * (layers - 1)
    assert y.shape == (5, 6)


def test_forward_runs_each_pass_through_its_branch():
    model, x = build(), images()
    clean, adv = state(model, "clean"), state(model, "adv")
    assert clean and adv
    with torch.no_grad():
        model([("adv", x)])
    assert equal(state(model, "clean"), clean)
    assert not equal(state(model, "adv"), adv)
    with torch.no_grad():
        model([("clean", x.flip(0) * 0.5), ("adv", x)])
    model.eval()
    with torch.no_grad():
        z_adv, z_clean = model([("adv", x), ("clean", x[:2])])
        assert torch.equal(z_adv, model.embed(x, "adv"))
        assert torch.equal(z_clean, model.embed(x[:2], "clean"))
    assert z_clean.shape == (2, 8)
    assert not torch.allclose(z_adv[:2], z_clean)
    assert model.features(x, "adv").shape == (4, model.num_features)


def test_every_norm_layer_has_both_branches():
    model = build()
    assert sum(isinstance(m, NormBranches) for m in model.modules()) == 12 + 3
    assert all(m.switch is model.switch for m in model.modules() if isinstance(m, NormBranches))
    assert model.default_branch == "adv"


def test_normalisation_is_the_first_layer_of_features():
    model, x = build().eval(), images()
    raw = build(mean=None, std=None).eval()
    raw.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("normalize.")})
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        assert torch.equal(model.features(x, "adv"), raw.features((x - mean) / std, "adv"))
        assert torch.equal(model.embed(x, "clean"), raw.embed((x - mean) / std, "clean"))


def test_single_branch_is_a_plain_network():
    model = build(norm_branches=("clean",))
    assert not any(isinstance(m, NormBranches) for m in model.modules())
    assert model.default_branch == "clean"
    for method in (model.embed, model.features):
        with pytest.raises(ValueError, match="unknown norm branch 'adv'.*'clean'"):
            method(images(), "adv")


def test_network_without_statistics_accepts_both_branches():
    model, x = build(**VIT).eval(), images()
    with torch.no_grad():
        assert torch.equal(model.features(x, "adv"), model.features(x, "clean"))
    with pytest.raises(ValueError, match="'clean', 'adv'"):
        model.features(x, "pgd")


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"norm_branches": ("clean", "adv", "adv_ce"), "projector_layers": 2, "projector_dim": 5},
        {"norm_branches": ("clean",), "mean": None, "std": None},
        VIT,
        # keeps index tables out of its state dict; a load without memory would leave them empty
        {"architecture": "swin_tiny_patch4_window7_224",
         "model_args": {"depths": [1, 1], "num_heads": [1, 1], "embed_dim": 8, "window_size": 4, "patch_size": 2}},
    ],
    ids=["dual", "three", "single", "vit", "swin"],
)  # fmt: skip
def test_save_and_load_are_bit_exact_in_every_branch(tmp_path, kwargs):
    model, x = build(**kwargs), images()
    with torch.no_grad():
        for i, branch in enumerate(model.switch.branches):
            model([(branch, x * (0.3 + 0.2 * i))])
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = RobustModelForPreTraining.from_pretrained(tmp_path)
    assert not loaded.training
    assert equal(loaded.state_dict(), model.state_dict())
    assert equal(dict(loaded.named_buffers()), dict(model.named_buffers()))
    saved, again = model.config.to_dict(), loaded.config.to_dict()
    assert {k: saved[k] for k in ("architecture", "model_args", "norm_branches", "mean", "std", "projector_dim")} == {
        k: again[k] for k in ("architecture", "model_args", "norm_branches", "mean", "std", "projector_dim")
    }
    with torch.no_grad():
        for branch in model.switch.branches:
            assert torch.allclose(loaded.embed(x, branch), model.embed(x, branch), atol=1e-6)


# ---------------------------------------------------------------------- frozen backbone
@pytest.mark.parametrize("kwargs", [{"norm_branches": ("adv",)}, {"norm_branches": ("clean", "adv")}, VIT])
def test_a_frozen_backbone_stands_still_while_the_head_trains(kwargs):
    model, x = build(head="classifier", num_classes=3, **kwargs), images()
    model.freeze_backbone()
    assert model.train() is model and model.training and model.classifier.training
    assert not any(m.training for m in model.backbone.modules())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    F.cross_entropy(model([("adv", x)])[0], torch.tensor([0, 1, 2, 0])).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {"classifier.weight", "classifier.bias"}
    optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith(("backbone.", "normalize.")), name


def test_freezing_outlives_mode_changes_copies_and_attacks_but_not_the_object():
    model = build(head="classifier", num_classes=3)
    assert model.train().backbone.training
    twin = copy.deepcopy(model)
    model.freeze_backbone()
    assert not model.eval().training and not model.train().backbone.training
    assert not copy.deepcopy(model).train().backbone.training
    with frozen(model):
        assert not model.training
    assert model.training and not any(m.training for m in model.backbone.modules())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["classifier.weight", "classifier.bias"]
    assert twin.train().backbone.training and all(p.requires_grad for p in twin.parameters())


# ---------------------------------------------------------------------- classifier
def test_a_classifier_stands_on_the_features_in_place_of_a_projector():
    model, x = build(head="classifier", num_classes=3, norm_branches=("adv",)).eval(), images()
    assert isinstance(model.classifier, nn.Linear) and model.head_module is model.classifier
    assert not hasattr(model, "projector") and not any(n.startswith("projector") for n in model.state_dict())
    assert model.classifier.weight.shape == (3, model.num_features)
    with torch.no_grad():
        logits = F.linear(model.features(x, "adv"), model.classifier.weight, model.classifier.bias)
        for found in (model.embed(x, "adv"), model([("adv", x)])[0], model.head(model.features(x, "adv"), "adv")):
            assert torch.equal(found, logits)
    with pytest.raises(ValueError, match="unknown norm branch 'clean'"):
        model.head(torch.zeros(1, model.num_features), "clean")


def test_released_size_of_the_wide_resnet_with_1000_classes():
    with torch.device("meta"):
        model = RobustModelForPreTraining(
            RobustPretrainingConfig(
                architecture="wide_resnet28_10", norm_branches=("adv",), head="classifier", num_classes=1000
            )
        )
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(37.11e6, abs=5e3)


def test_the_head_runs_in_the_branch_it_is_told():
    model, x = build(), images()
    with torch.no_grad():
        model([("adv", x), ("clean", x * 0.5)])
        model.eval()
        assert model.head_module is model.projector
        h = model.features(x, "clean")
        for branch in ("clean", "adv"):
            assert torch.equal(model.head(model.features(x, branch), branch), model.embed(x, branch))
        assert not torch.allclose(model.head(h, "clean"), model.head(h, "adv"))


def test_a_classifier_survives_save_and_load(tmp_path):
    model, x = build(head="classifier", num_classes=5).eval(), images()
    model.save_pretrained(tmp_path)
    loaded, info = RobustModelForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (loaded.config.head, loaded.config.num_classes) == ("classifier", 5)
    assert equal(loaded.state_dict(), model.state_dict())
    with torch.no_grad():
        assert torch.allclose(loaded.embed(x, "adv"), model.embed(x, "adv"), atol=1e-6)


def test_a_checkpoint_from_before_the_classifier_loads_as_a_projector(tmp_path):
    model = build().eval()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("head", "num_classes"):
        config.pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded, info = RobustModelForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.head == "projector" and loaded.config.num_classes is None
    assert equal(loaded.state_dict(), model.state_dict())


def test_auto_classes_know_the_training_model(tmp_path):
    build().save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), RobustPretrainingConfig)
    model, info = AutoModelForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, RobustModelForPreTraining)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_fresh_weights_are_timms_not_transformers():
    model = build()
    torch.manual_seed(0)
    again = RobustModelForPreTraining(RobustPretrainingConfig(**THIN))
    assert equal(model.state_dict(), again.state_dict())
    # Kaiming fan-out, far from transformers' normal(0.02)
    assert model.backbone.layer4[0].conv2.weight.std() > 0.1


def test_deepcopy_switches_on_its_own():
    model = build()
    twin = copy.deepcopy(model)
    assert twin.switch is not model.switch
    assert all(m.switch is twin.switch for m in twin.modules() if isinstance(m, NormBranches))


def test_features_wider_than_num_features_of_timm():
    # MobileNetV3 widens after pooling
    model = build(architecture="mobilenetv3_small_050", model_args=None).eval()
    assert model.features(images(2), "clean").shape == (2, model.num_features)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"projector_layers": 4}, "projector_layers must be 2 or 3, got 4"),
        ({"mean": None}, "mean and std go together"),
        ({"std": (0.2, 0.0, 0.2)}, "std must be positive"),
        ({"norm_branches": ("adv", "adv")}, "different identifiers"),
        ({"head": "linear"}, "head must be 'projector', 'classifier' or 'none', got 'linear'"),
        ({"head": "classifier"}, "needs at least 2 classes, got num_classes=None: pass the num_classes"),
        ({"head": "classifier", "num_classes": 1}, "needs at least 2 classes, got num_classes=1"),
        ({"num_classes": 10}, "a projector has no classes, got num_classes=10: write head='classifier'"),
    ],
)
def test_impossible_configurations_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        RobustPretrainingConfig(**kwargs)


def test_unknown_architecture_comes_with_suggestions():
    with pytest.raises(ValueError, match="resnet18_cifar"):
        build(architecture="resnet18_cifr")
