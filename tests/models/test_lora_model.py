from __future__ import annotations

import copy
import logging
import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from hf_robust.attacks import frozen
from hf_robust.models.backbones import create_backbone
from hf_robust.models.lora import AdaptedConfig, AdapterModel, LoraPathModel, is_lora, lora_targets
from hf_robust.models.modeling import RobustModelForPreTraining
from hf_robust.models.norm import NormBranches, add_norm_branches

RESNET = {"architecture": "resnet10_cifar", "model_args": {"channels": [4, 4, 8, 8]}, "image_size": 8}
VIT = {"architecture": "vit_tiny_patch4_32", "model_args": {"depth": 1, "embed_dim": 24}, "image_size": 8}
NETWORKS = {
    "resnet": {**RESNET, "norm_branches": ("adv",)},
    "two_branches": {**RESNET, "norm_branches": ("clean", "adv")},
    "vit": {**VIT, "norm_branches": ("adv",)},
}
CLASSIFIER = {"head": "classifier", "num_classes": 3}


def build(kind=LoraPathModel, **kwargs):
    """A model whose adapters already do something."""
    torch.manual_seed(0)
    model = kind(AdaptedConfig(**{**NETWORKS["resnet"], **CLASSIFIER, "lora_rank": 2, **kwargs}))
    for layer in model.lora_layers.values():
        nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    return model


@pytest.fixture(params=NETWORKS)
def network(request) -> dict:
    return NETWORKS[request.param]


def images(n: int = 6, seed: int = 1, size: int = 8) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


LABELS = torch.arange(6) % 3


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def moved(model: nn.Module) -> set[str]:
    """Which of encoder, adapters and head have a gradient that is not exactly zero."""

    def part(name: str) -> str:
        return "head" if name.startswith("classifier") else "lora" if is_lora(name) else "encoder"

    return {part(name) for name, grad in gradients(model).items() if grad is not None and bool((grad != 0).any())}


# ---------------------------------------------------------------------- which layers
@pytest.mark.parametrize("name", ["resnet18", "resnet18_cifar", "resnet18_stl"])
def test_a_resnet18_has_19_targets(name):
    with torch.device("meta"):
        backbone = timm.create_model(name, num_classes=10)
        headless = create_backbone(name)
    targets = lora_targets(backbone, 8)
    assert len(targets) == 19 and targets == lora_targets(headless, 8)
    assert [t for t in targets if "downsample" in t] == [f"layer{i}.0.downsample.0" for i in (2, 3, 4)]
    assert "conv1" not in targets and "fc" not in targets and "layer1.0.conv1" in targets
    add_norm_branches(backbone)
    assert lora_targets(backbone, 8) == targets


@pytest.mark.parametrize(
    ("name", "args", "size", "expected"),
    [
        ("resnet10_cifar", {"channels": [8, 8, 8, 8]}, 32, 11),
        ("wide_resnet28_10", {"depth": 10, "width": 1}, 32, 8),
        ("resnet50d", {}, 32, 52),  # a stem of three convolutions
        ("convnext_atto", {}, 32, 27),  # depth-wise convolutions are left out
    ],
)
def test_targets_are_all_dense_layers_behind_the_stem(name, args, size, expected):
    with torch.device("meta"):
        backbone = create_backbone(name, image_size=size, model_args=args)
    targets = lora_targets(backbone, 8)
    assert len(targets) == expected
    assert not any(t == "conv1" or t.startswith(("conv1.", "stem")) or t.endswith("conv_dw") for t in targets)


def test_targets_of_a_vision_transformer():
    targets = lora_targets(create_backbone("vit_tiny_patch4_32", model_args={"depth": 2, "embed_dim": 24}), 8)
    one = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    assert targets == [f"blocks.{i}.{layer}" for i in (0, 1) for layer in one]


@pytest.mark.parametrize(
    ("name", "args", "rank", "reason"),
    [
        ("resnext50_32x4d", {}, 8, "layer1.0.conv2 (32 groups)"),
        ("resnet18", {"output_stride": 8}, 8, "(dilated)"),
        ("seresnet18", {}, 8, None),
        ("seresnet18", {}, 32, "layer1.0.se.fc1 (smaller than the rank)"),
        ("beit_base_patch16_224", {"depth": 1, "embed_dim": 48, "num_heads": 2}, 8, "attention reads its weight"),
    ],
)
def test_what_peft_cannot_adapt_is_left_out_with_one_logged_line(name, args, rank, reason, caplog):
    with torch.device("meta"):
        backbone = create_backbone(name, model_args=args)
    with caplog.at_level(logging.INFO, logger="hf_robust.models.lora"):
        targets = lora_targets(backbone, rank)
    assert targets and len(caplog.records) == (reason is not None)
    assert reason is None or reason in caplog.messages[0]
    assert reason is None or caplog.messages[0].removeprefix("no adapter for ").split(" (")[0] not in targets
    for module in (backbone.get_submodule(t) for t in targets):
        assert getattr(module, "dilation", (1, 1)) == (1, 1) and rank % getattr(module, "groups", 1) == 0
        assert min(module.weight.shape[0], module.weight[0].numel()) >= rank


def test_groups_that_divide_the_rank_are_adapted():
    with torch.device("meta"):
        backbone = create_backbone("resnext50_32x4d")
    assert len(lora_targets(backbone, 32)) == 52


def test_a_rank_larger_than_a_layer_is_refused_with_the_layer_and_the_largest_rank():
    with pytest.raises(
        ValueError, match=r"rank 5 is larger than the layer 'layer1.0.conv1', whose 4 x 36 .* write rank=4 or less"
    ):
        build(lora_rank=5)
    assert len(build(lora_rank=4).lora_layers) == 11


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lora_rank": 0}, "rank must be a whole number, 1 or more, got 0: the published value is 8"),
        ({"lora_rank": 2.5}, "rank must be a whole number"),
        ({"lora_alpha": 0.0}, "alpha must be positive, got 0.0"),
        ({"lora_init": "kaiming"}, "init must be 'matched' or 'peft', got 'kaiming'"),
        ({"norm_update": "none"}, "norm_update must be 'both' or 'plain_only', got 'none'"),
        ({"norm_branches": ("lora", "adv")}, "norm branches .* hold 'lora', the name of the path"),
    ],
)
def test_impossible_settings_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(**kwargs)


def test_a_network_without_plain_layers_is_refused():
    with torch.device("meta"), pytest.raises(ValueError, match=r"offers none .*ScaledStdConv2d.*another backbone"):
        lora_targets(create_backbone("nf_resnet26"), 8)


def test_without_peft_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        build()


# ---------------------------------------------------------------------- the factors
def test_matched_start_moves_the_weights_as_far_as_the_released_adapter():
    model = build(lora_init="matched", lora_rank=4, model_args={"channels": [16, 16, 16, 16]})
    drawn = torch.cat([layer.lora_A["default"].weight.detach().flatten() for layer in model.lora_layers.values()])
    assert drawn.mean().abs() < 0.05 and drawn.std() == pytest.approx(1, abs=0.03)
    for name, layer in model.lora_layers.items():
        side = 1 if "downsample" in name else 3
        assert layer.get_base_layer().kernel_size == (side, side)
        assert layer.scaling["default"] == pytest.approx(math.sqrt(side) / 4)
        # A first SGD step on B moves the weights by s^2 A^T A of a full step: k / r of it in the mean over directions.
        a = layer.lora_A["default"].weight.flatten(1)
        gain = layer.scaling["default"] ** 2 * a.square().sum().item() / a.shape[1]
        assert gain == pytest.approx(side / 4, rel=0.25)


def test_peft_start_has_scale_one_unless_alpha_is_given():
    assert {layer.scaling["default"] for layer in build(lora_rank=4).lora_layers.values()} == {1.0}
    assert {layer.scaling["default"] for layer in build(lora_rank=4, lora_alpha=8).lora_layers.values()} == {2.0}
    assert build(lora_rank=4).lora_layers["layer1.0.conv1"].lora_A["default"].weight.std() < 0.3


def test_the_lora_path_is_the_network_with_the_sum_of_weights(network):
    model = build(**network).eval()
    x = images()
    summed = copy.deepcopy(model)
    for layer in summed.lora_layers.values():
        base = layer.get_base_layer()
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        delta = b.flatten(1) @ a.flatten(1) * layer.scaling["default"]
        base.weight.data += delta.view_as(base.weight)
    with torch.no_grad():
        lora, adv = model.embed(x, "lora"), model.embed(x, "adv")
        assert torch.allclose(lora, summed.embed(x, "adv"), atol=1e-5)
        assert (lora - adv).abs().max() > 1e-2


# ---------------------------------------------------------------------- two paths
class Wrapped(nn.Module):
    """One forward for all passes, as a distributed wrapper sees it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, passes):
        return self.module(passes)


@pytest.mark.parametrize("order", [("lora", "adv"), ("adv", "lora")])
def test_every_loss_trains_its_own_part_in_one_wrapped_call(network, order):
    model = build(**network).train()
    passes = {"lora": images(seed=1), "adv": images(seed=2)}
    outputs = dict(zip(order, Wrapped(model)([(path, passes[path]) for path in order]), strict=True))
    expected = {"lora": {"lora", "head"}, "adv": {"encoder", "head"}}
    for path, z in outputs.items():
        model.zero_grad(set_to_none=True)
        F.cross_entropy(z, LABELS).backward(retain_graph=True)
        assert moved(model) == expected[path]
    # both together: each part gets exactly what its own loss gives
    alone = {}
    for path in ("lora", "adv"):
        model.zero_grad(set_to_none=True)
        F.cross_entropy(outputs[path], LABELS).backward(retain_graph=True)
        alone[path] = gradients(model)
    model.zero_grad(set_to_none=True)
    sum(F.cross_entropy(z, LABELS) for z in outputs.values()).backward()
    for name, grad in gradients(model).items():
        if not name.startswith("classifier") and ".clean." not in name:
            assert torch.equal(grad, alone["lora" if is_lora(name) else "adv"][name]), name


def test_a_divergence_between_the_paths_trains_both(network):
    model = build(**network).train()
    z_lora, z_adv = model([("lora", images()), ("adv", images(seed=2))])
    p = z_lora.log_softmax(1)
    (p.exp() * (p - z_adv.log_softmax(1))).sum().backward()
    assert moved(model) == {"lora", "encoder", "head"}


def test_the_plain_path_is_at_rest_between_calls_also_after_an_error():
    model = build().eval()
    with torch.no_grad():
        before = model.features(images(), "adv")
        with pytest.raises(RuntimeError):
            model.features(torch.rand(2, 5, 8, 8), "lora")
        assert torch.equal(model.backbone(model.normalize(images())), before)
    assert all(p.requires_grad for p in model.parameters())


def test_a_frozen_model_gives_image_gradients_on_both_paths():
    model = build().train()
    for path in ("lora", "adv"):
        x = images().requires_grad_()
        with frozen(model):
            (grad,) = torch.autograd.grad(model.embed(x, path).sum(), x)
        assert (grad != 0).any()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules())


def test_paths_and_unknown_ones():
    model = build(norm_branches=("clean", "adv"))
    assert model.paths == ("clean", "adv", "lora")
    for method in (model.features, model.embed):
        with pytest.raises(ValueError, match="unknown path 'pgd': this model has 'clean', 'adv', 'lora'"):
            method(images(), "pgd")


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: b.clone() for n, b in model.named_buffers() if "running" in n or "tracked" in n}


@pytest.mark.parametrize("branches", [("adv",), ("clean", "adv")])
def test_norm_update_says_which_path_moves_the_statistics(branches):
    x = images()
    found = {}
    for choice in ("both", "plain_only"):
        model = build(norm_branches=branches, norm_update=choice).train()
        before = statistics(model)
        found[choice] = model.features(x, "lora")
        after = statistics(model)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        adv = {name for name in before if ".clean." not in name}
        assert changed == (adv if choice == "both" else set())
        found[choice].sum().backward()
        assert moved(model) == {"lora"}
        model.features(x, "adv")
        assert {n for n, v in statistics(model).items() if not torch.equal(v, after[n])} == adv
    assert torch.equal(found["both"], found["plain_only"])


def test_a_copy_of_the_model_switches_its_own_adapters():
    model = build().eval()
    twin, x = copy.deepcopy(model), images()
    with torch.no_grad():
        for layer in twin.lora_layers.values():
            layer.lora_B["default"].weight.zero_()
        assert torch.equal(twin.embed(x, "lora"), twin.embed(x, "adv"))
        assert not torch.equal(model.embed(x, "lora"), model.embed(x, "adv"))


# ---------------------------------------------------------------------- adapter only
def test_only_adapter_and_head_train_and_the_encoder_stands_still(network):
    model = build(AdapterModel, **network).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, weight_decay=0.1)
    F.cross_entropy(model([("adv", images())])[0], LABELS).backward()
    assert moved(model) == {"lora", "head"}
    assert all(p.grad is None for n, p in model.named_parameters() if not is_lora(n) and "classifier" not in n)
    optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (not is_lora(name) and not name.startswith("classifier")), name
    assert model.training and not any(m.training for m in model.backbone.modules())


# ---------------------------------------------------------------------- save and load
@pytest.mark.parametrize("kind", [LoraPathModel, AdapterModel])
def test_save_and_load_keep_every_path_and_setting(tmp_path, network, kind):
    init = {"lora_init": "matched"} if kind is LoraPathModel else {"lora_alpha": 3.0}
    model = build(kind, norm_update="plain_only", **init, **network)
    with torch.no_grad():
        model.train()([("adv", images(seed=5))])
    model.eval().save_pretrained(tmp_path)
    loaded, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())
    assert loaded.config.norm_update == "plain_only"
    scales = [{name: layer.scaling for name, layer in m.lora_layers.items()} for m in (model, loaded)]
    assert scales[0] == scales[1]
    with torch.no_grad():
        for path in getattr(model, "paths", model.switch.branches):
            assert torch.allclose(loaded.embed(images(), path), model.embed(images(), path), atol=1e-6)
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]


def test_a_checkpoint_with_adapters_does_not_load_as_a_plain_model(tmp_path):
    build().save_pretrained(tmp_path)
    _, info = RobustModelForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] and info["unexpected_keys"]


def test_norm_branches_stay_around_the_adapters():
    model = build(norm_branches=("clean", "adv"))
    assert sum(isinstance(m, NormBranches) for m in model.modules()) == 12
    x = images()
    with torch.no_grad():
        model.train()([("clean", x * 0.2)])
        model.eval()
        assert not torch.allclose(model.embed(x, "clean"), model.embed(x, "adv"))
