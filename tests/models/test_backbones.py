from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import warnings

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from hf_robust.models import backbones
from hf_robust.models.backbones import ARCHITECTURES, create_backbone, native_architecture
from hf_robust.models.norm import add_norm_branches

THIN = {
    "resnet10_cifar": {"channels": [8, 8, 8, 16]},
    "resnet18_cifar": {"channels": (8, 8, 8, 16)},
    "resnet34_cifar": {"channels": (4, 4, 4, 4)},
    "resnet50_cifar": {"channels": (4, 4, 4, 4)},
    "resnet18_stl": {"channels": (8, 8, 8, 16)},
    "wide_resnet28_10": {"depth": 10, "width": 1},
    "vit_tiny_patch4_32": {"depth": 4, "embed_dim": 24},
}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def meta(name: str, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18_cifar", 11_173_962),
        ("resnet34_cifar", 21_282_122),
        ("resnet50_cifar", 23_520_842),
        ("resnet18_stl", 11_181_642),
    ],
)
def test_parameter_counts_with_ten_classes(name, count):
    assert parameters(meta(name, num_classes=10)) == count


def test_wide_resnet_counts_of_the_released_networks():
    # spec: 36.49 M with two norm branches and no classifier, 37.11 M plain with 1000 classes
    dual = meta("wide_resnet28_10", num_classes=0)
    add_norm_branches(dual)
    assert round(parameters(dual) / 1e6, 2) == 36.49
    assert round(parameters(meta("wide_resnet28_10", num_classes=1000)) / 1e6, 2) == 37.11
    assert dual.num_features == 640


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_has_timms_interface(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **THIN[name]).eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        maps = model.forward_features(x)
        assert torch.equal(model.forward_head(maps), model(x))
        assert model.forward_head(maps, pre_logits=True).shape == (2, model.num_features)
        final, intermediates = model.forward_intermediates(x)
        assert torch.allclose(final, maps)
        assert len(intermediates) >= 4
        assert len(model.forward_intermediates(x, indices=[0, 1], intermediates_only=True, stop_early=True)) == 2
    assert model(x).shape == (2, 10)
    assert model.get_classifier().out_features == 10
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert model.group_matcher()
    cfg = model.pretrained_cfg
    assert cfg["mean"] == (0.0, 0.0, 0.0) and cfg["std"] == (1.0, 1.0, 1.0)
    assert cfg["crop_pct"] == 1.0 and cfg["crop_mode"] == "squash" and cfg["url"] == ""
    assert cfg["fixed_input_size"] == (name == "vit_tiny_patch4_32")
    named = dict(model.named_modules())
    assert cfg["first_conv"] in named and cfg["classifier"] in named


@pytest.mark.parametrize("name", ["resnet10_cifar", "wide_resnet28_10", "vit_tiny_patch4_32"])
def test_gradient_checkpointing_changes_nothing(name):
    torch.manual_seed(0)
    model = create_backbone(name, model_args=THIN[name]).eval()
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    model(x).square().sum().backward()
    expected, x.grad = x.grad, None
    model.set_grad_checkpointing(True)
    model.train(name != "vit_tiny_patch4_32")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    model(x).square().sum().backward()
    assert torch.allclose(x.grad, expected, atol=1e-6)


def test_feature_maps_of_the_cifar_stem_keep_full_resolution():
    net = timm.create_model("resnet10_cifar", features_only=True, channels=(8, 12, 16, 32))
    assert net.feature_info.reduction() == [1, 1, 2, 4, 8]
    assert [tuple(m.shape[1:]) for m in net(torch.rand(1, 3, 32, 32))] == [
        (8, 32, 32), (8, 32, 32), (12, 16, 16), (16, 8, 8), (32, 4, 4)]  # fmt: skip


def test_strided_stem_quarters_the_maps_and_keeps_the_weights():
    net = timm.create_model("resnet10_cifar", features_only=True, channels=(8, 12, 16, 32), stem_stride=2)
    assert net.feature_info.reduction() == [2, 2, 4, 8, 16]
    assert [m.shape[-1] for m in net(torch.rand(1, 3, 32, 32))] == [16, 16, 8, 4, 2]
    assert net.conv1.weight.shape == (8, 3, 3, 3)


def test_feature_maps_of_the_wide_resnet():
    net = timm.create_model("wide_resnet28_10", features_only=True, depth=10, width=2)
    assert net.feature_info.reduction() == [1, 1, 2, 4]
    assert [m.shape[1] for m in net(torch.rand(1, 3, 32, 32))] == [16, 32, 64, 128]


def test_cifar_resnet_equals_its_definition_on_timms_keys():
    torch.manual_seed(0)
    model = create_backbone("resnet18_cifar", model_args={"channels": (4, 6, 8, 10)}).eval()
    assert list(model.state_dict()) == list(meta("resnet18", num_classes=0).state_dict())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    sd = model.state_dict()
    x = torch.rand(2, 3, 32, 32)

    def norm(y, key):
        return F.batch_norm(
            y, sd[f"{key}.running_mean"], sd[f"{key}.running_var"], sd[f"{key}.weight"], sd[f"{key}.bias"]
        )

    y = F.relu(norm(F.conv2d(x, sd["conv1.weight"], padding=1), "bn1"))
    for stage in range(1, 5):
        for block in range(2):
            key = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            out = F.relu(norm(F.conv2d(y, sd[f"{key}.conv1.weight"], stride=stride, padding=1), f"{key}.bn1"))
            out = norm(F.conv2d(out, sd[f"{key}.conv2.weight"], padding=1), f"{key}.bn2")
            if f"{key}.downsample.0.weight" in sd:
                y = norm(F.conv2d(y, sd[f"{key}.downsample.0.weight"], stride=stride), f"{key}.downsample.1")
            y = F.relu(out + y)
    with torch.no_grad():
        assert torch.allclose(model(x), y.mean((2, 3)), atol=1e-5)


def test_wide_resnet_equals_its_definition():
    torch.manual_seed(0)
    model = create_backbone("wide_resnet28_10", model_args={"depth": 16, "width": 2}).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    sd = model.state_dict()
    x = torch.rand(2, 3, 32, 32)

    def act(y, key):
        return F.relu(
            F.batch_norm(
                y, sd[f"{key}.running_mean"], sd[f"{key}.running_var"], sd[f"{key}.weight"], sd[f"{key}.bias"]
            )
        )

    y = F.conv2d(x, sd["conv1.weight"], padding=1)
    for stage in range(1, 4):
        for block in range(2):
            key = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            first = act(y, f"{key}.bn1")
            out = act(F.conv2d(first, sd[f"{key}.conv1.weight"], stride=stride, padding=1), f"{key}.bn2")
            out = F.conv2d(out, sd[f"{key}.conv2.weight"], padding=1)
            # the shortcut starts from the activated input where the shape changes
            y = out + (F.conv2d(first, sd[f"{key}.downsample.weight"], stride=stride) if block == 0 else y)
    y = F.avg_pool2d(act(y, "norm"), 8).flatten(1)
    with torch.no_grad():
        assert torch.allclose(model(x), y, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18_cifar", "wide_resnet28_10"])
def test_convolutions_start_from_kaiming_fan_out_and_norms_from_one_and_zero(name):
    torch.manual_seed(0)
    args = {"channels": (32, 64, 64, 64)} if name == "resnet18_cifar" else {"depth": 10, "width": 4}
    model = timm.create_model(name, num_classes=10, **args)
    for key, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] ** 2 * module.out_channels
            samples = module.weight.numel()
            assert abs(module.weight.std().item() * math.sqrt(fan_out / 2) - 1) < 5 / math.sqrt(2 * samples), key
        elif isinstance(module, nn.BatchNorm2d):
            assert torch.all(module.weight == 1) and torch.all(module.bias == 0), key  # no zero start
            assert module.eps == 1e-5 and module.momentum == 0.1
    if name == "wide_resnet28_10":
        assert torch.all(model.fc.bias == 0)


@pytest.mark.parametrize("name", ["resnet18_stl", "vit_tiny_patch4_32"])
def test_native_architecture_is_the_same_network(name):
    stock, args = native_architecture(name, THIN[name])
    assert stock not in ARCHITECTURES
    ours = create_backbone(name, model_args=THIN[name]).eval()
    other = timm.create_model(stock, num_classes=0, **args).eval()
    other.load_state_dict(ours.state_dict())
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours(x), other(x))


def test_native_architecture_of_other_names():
    assert native_architecture("resnet50", None) == ("resnet50", {})
    assert native_architecture("convnext_atto", {"patch_size": 2}) == ("convnext_atto", {"patch_size": 2})
    assert native_architecture("resnet18_cifar", {}) is None
    assert native_architecture("wide_resnet28_10", {}) is None
    args = {"img_size": 64}
    assert native_architecture("vit_tiny_patch4_32", args)[1] == {"img_size": 64, "patch_size": 4}
    assert args == {"img_size": 64}


def test_create_backbone_passes_the_image_size_only_where_it_is_wanted():
    assert create_backbone("test_vit", image_size=32).patch_embed.img_size == (32, 32)
    ours = create_backbone("vit_tiny_patch4_32", image_size=16, model_args=THIN["vit_tiny_patch4_32"])
    assert ours.patch_embed.img_size == (16, 16)
    assert create_backbone("test_vit", image_size=32, model_args={"img_size": 64}).patch_embed.img_size == (64, 64)
    assert create_backbone("resnet10_cifar", image_size=32, model_args=THIN["resnet10_cifar"]).num_features == 16


def test_unknown_names_come_with_suggestions():
    with pytest.raises(ValueError, match="unknown backbone 'resnet18_cifr'.*resnet18_cifar"):
        create_backbone("resnet18_cifr")
    with pytest.raises(ValueError, match="wide_resnet28_10"):
        native_architecture("wideresnet28_10", None)
    with pytest.raises(ValueError, match="for example resnet10_cifar"):
        create_backbone("????")


def test_impossible_arguments_are_refused():
    with pytest.raises(ValueError, match="model_args may not contain num_classes"):
        create_backbone("resnet18", model_args={"num_classes": 3})
    with pytest.raises(ValueError, match="four positive widths"):
        create_backbone("resnet10_cifar", model_args={"channels": (7, 8, 8, 8)})
    with pytest.raises(ValueError, match="stem_stride must be 1"):
        create_backbone("resnet10_cifar", model_args={"stem_stride": 3})
    with pytest.raises(ValueError, match="fixed stem, got stem_type"):
        create_backbone("resnet10_cifar", model_args={"stem_type": "deep"})
    with pytest.raises(ValueError, match="6 n \\+ 4"):
        create_backbone("wide_resnet28_10", model_args={"depth": 27})


def test_reload_and_a_second_copy_of_the_file_register_silently():
    before = timm.models.model_entrypoint("resnet10_cifar")
    spec = importlib.util.spec_from_file_location("remote_copy_backbones", backbones.__file__)
    copy = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = copy
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            spec.loader.exec_module(copy)
            backbones.register_backbones()
    finally:
        del sys.modules[spec.name]
    assert timm.models.model_entrypoint("resnet10_cifar") is before
    assert set(ARCHITECTURES) <= set(timm.list_models())
