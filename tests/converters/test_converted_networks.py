"""A converted network computes what the authors' computes: every format, every branch, features and logits."""

from __future__ import annotations

import json

import pytest
import torch
from authors_networks import (
    CIFAR,
    IMAGENET,
    AclProjector,
    Attacked,
    Net,
    Normalize,
    WideNet,
    advcl_heads,
    prefixed,
    trained,
)
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification

from hf_robust.converters import convert, load_converter
from hf_robust.hub import encoder_features

WIDTH = 32  # features of the small ResNet


def images(size: int = 32) -> torch.Tensor:
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def check(done, net, index: int, size: int = 32) -> dict:
    """Features of the written folder against those of the authors' network; the configuration."""
    x = images(size)
    encoder = AutoModel.from_pretrained(done.folder).eval()
    ours, theirs = encoder_features(encoder)(x), net.features(x, index)
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    return json.loads((done.folder / "config.json").read_text())


@torch.no_grad()
def check_logits(done, net, linear: nn.Linear, size: int = 32) -> None:
    x, model = images(size), AutoModelForImageClassification.from_pretrained(done.folder).eval()
    cfg = model.config.pretrained_cfg
    mean, std = (torch.tensor(cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    logits = model(pixel_values=(x - mean) / std).logits
    torch.testing.assert_close(logits, linear(net.features(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("branch", "index"), [("clean", 0), ("adv", 1), (None, 1), ("normal", 0), ("pgd", 1)])
def test_acl(branch, index, tmp_path):
    net = trained(Net(head={"fc": AclProjector(WIDTH, 2)}))
    torch.save({"epoch": 1000, "state_dict": net.state_dict(), "optim": {}}, tmp_path / "model.pt")
    done = convert(tmp_path / "model.pt", tmp_path / "out", branch=branch)
    config = check(done, net, index)
    assert done.format == "acl" and "bn_list.0 and bn_list.1" in done.why
    assert config["norm_branch"] == ("clean", "adv")[index] and config["architecture"] == "resnet18_cifar"
    assert config["pretrained_cfg"]["mean"] == list(IMAGENET[0])
    assert (
        "fc.fc1.weight" in (note := next(n for n in done.conversion.notes if "projector" in n))
        and "34 tensors" in note
    )
    assert any("epoch, optim" in note for note in done.conversion.notes)


def test_acl_re_expressed_on_stock_timm_is_the_same_network(tmp_path):
    net = trained(Net(head={"fc": AclProjector(WIDTH, 2)}))
    torch.save(net.state_dict(), tmp_path / "model.pt")
    done = convert(tmp_path / "model.pt", tmp_path / "out", "air")
    encoder = AutoModel.from_pretrained(done.folder / "native").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            encoder_features(encoder)(images()), net.features(images(), 1), atol=1e-4, rtol=1e-4
        )
    assert json.loads((done.folder / "native" / "config.json").read_text())["converted_from"]["format"] == "air"


def test_acl_without_attack_has_one_branch_only(tmp_path):
    net = trained(Net(count=1, head={"fc": AclProjector(WIDTH, 1, layers=2)}))
    torch.save(net.state_dict(), tmp_path / "m.pt")
    assert check(convert(tmp_path / "m.pt", tmp_path / "out"), net, 0)["norm_branch"] == "clean"
    with pytest.raises(ValueError, match="unknown norm branch 'adv': this file has clean"):
        convert(tmp_path / "m.pt", tmp_path / "out", branch="adv")


@pytest.mark.parametrize("branch", ["clean", "adv"])
def test_dynacl_takes_the_momentum_encoder(branch, tmp_path):
    q, k = (trained(Net(head={"fc": AclProjector(WIDTH, 2)}), seed) for seed in (1, 2))
    tensors = {**prefixed(q.state_dict(), "encoder_q."), **prefixed(k.state_dict(), "encoder_k.")}
    torch.save({"state_dict": tensors}, tmp_path / "model.pt")
    done = convert(tmp_path / "model.pt", tmp_path / "out", branch=branch)
    check(done, k, ("clean", "adv").index(branch))
    assert any("left out: encoder_q" in note for note in done.conversion.notes)


def test_dynacl_stl_has_the_large_stem(tmp_path):
    net = trained(Net(widths=(64, 8, 8, 16), stem=7, head={"fc": AclProjector(16, 2)}))
    torch.save(net.state_dict(), tmp_path / "model.pt")
    config = check(convert(tmp_path / "model.pt", tmp_path / "out", "dynacl"), net, 1, 96)
    assert config["model_type"] == "timm_wrapper" and config["image_size"] == 96


def test_dynacl_plus_plus_and_fine_tuned_classifiers(tmp_path):
    net = trained(Net(count=0, head={"fc": nn.Linear(WIDTH, 7)}))
    torch.save({"state_dict": net.state_dict()}, tmp_path / "slf.pt")
    done = convert(tmp_path / "slf.pt", tmp_path / "encoder", "dynacl++")
    assert check(done, net, 0)["norm_branch"] == "single" and done.report.norm_branch is None
    assert "left out: the linear classifier of 7 classes" in done.conversion.notes
    done = convert(tmp_path / "slf.pt", tmp_path / "c", classifier=True, label_names=list("abcdefg"))
    check_logits(done, net, net.fc)
    assert json.loads((done.folder / "config.json").read_text())["label_names"] == list("abcdefg")
    with pytest.raises(ValueError, match="has one set of norm layers and so no branch 'adv'"):
        convert(tmp_path / "slf.pt", tmp_path / "c", branch="adv")


@pytest.mark.parametrize(("branch", "index"), [("adv", 0), ("clean", 1), (None, 0)])
def test_rcs_holds_its_branches_in_reversed_order(branch, index, tmp_path):
    net = trained(WideNet(count=2, head={"linear": AclProjector(128, 2, layers=2)}))
    torch.save({"state_dict": prefixed(net.state_dict(), "module.")}, tmp_path / "model.pt")
    done = convert(tmp_path / "model.pt", tmp_path / "out", branch=branch)
    config = check(done, net, index)
    assert done.format == "rcs" and config["norm_branch"] == ("adv", "clean")[index]
    assert config["model_args"] == {"depth": 10, "width": 2} and config["pretrained_cfg"]["std"] == [1, 1, 1]


def test_the_first_version_of_rcs_has_plain_norm_layers(tmp_path):
    head = nn.ModuleDict({"fc1": nn.Linear(128, 128), "bn1": nn.BatchNorm1d(128), "fc2": nn.Linear(128, 128)})
    net = trained(WideNet(head={"linear": head}))
    torch.save({"state_dict": prefixed(net.state_dict(), "module.")}, tmp_path / "model.pt")
    done = convert(tmp_path / "model.pt", tmp_path / "out")
    assert done.format == "rcs" and check(done, net, 0)["norm_branch"] == "single"


def test_rcs_on_small_images_is_acl(tmp_path):
    net = trained(Net(head={"fc": AclProjector(WIDTH, 2)}))
    torch.save(net.state_dict(), tmp_path / "model.pt")
    check(convert(tmp_path / "model.pt", tmp_path / "out", "rcs"), net, 1)


@pytest.mark.parametrize(("branch", "index"), [("clean", 0), ("adv", 1), ("adv_ce", 2), ("pgd_ce", 2), (None, 1)])
@pytest.mark.parametrize("normalize", [None, CIFAR])
def test_advcl(branch, index, normalize, tmp_path):
    net = trained(Net(count=3, normalize=normalize, head=advcl_heads(WIDTH)))
    content = {"model": prefixed(net.state_dict(), "module."), "epoch": 3, "rng_state": torch.get_rng_state()}
    torch.save(content, tmp_path / "epoch_3.ckpt")
    done = convert(tmp_path / "epoch_3.ckpt", tmp_path / "out", branch=branch, native=False)
    config = check(done, net, index)
    assert done.format == "advcl" and config["norm_branch"] == ("clean", "adv", "adv_ce")[index]
    assert config["pretrained_cfg"]["mean"] == list(normalize[0] if normalize else (0, 0, 0))
    assert any("heads for pseudo-labels" in note for note in done.conversion.notes)


def test_a_infonce_is_read_like_advcl(tmp_path):
    net = trained(Net(count=3, normalize=None, head=advcl_heads(WIDTH)))
    torch.save({"model": net.state_dict()}, tmp_path / "m.ckpt")
    done = convert(tmp_path / "m.ckpt", tmp_path / "out", "A_InfoNCE")
    assert check(done, net, 1)["converted_from"]["format"] == "A_InfoNCE"


def test_deacl(tmp_path):
    student, teacher = (trained(Net(count=0, padding=2, normalize=CIFAR), seed) for seed in (1, 2))
    tensors = {**prefixed(student.state_dict(), "backbone."), **prefixed(teacher.state_dict(), "momentum_backbone.")}
    for name in ("classifier", "classifier_adv", "momentum_classifier"):
        tensors |= prefixed(nn.Linear(WIDTH, 10).state_dict(), f"{name}.")
    content = {"state_dict": tensors, "epoch": 99, "hyper_parameters": {"lr": 0.5}, "optimizer_states": [{}]}
    torch.save(content, tmp_path / "deacl.ckpt")
    done = convert(tmp_path / "deacl.ckpt", tmp_path / "out")
    config = check(done, student, 0)
    assert done.format == "deacl" and config["model_args"]["stem_padding"] == 2
    assert config["pretrained_cfg"]["std"] == list(CIFAR[1])
    assert not (done.folder / "native").exists(), "stock timm cannot carry this stem"
    assert any("the teacher" in note for note in done.conversion.notes)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_robustness_on_cifar(bottleneck, tmp_path):
    width = 128 if bottleneck else WIDTH
    linear = nn.Linear(width, 10)
    inner = Net(count=0, normalize=None, shortcut="shortcut", head={"linear": linear}, bottleneck=bottleneck)
    net = trained(Attacked(inner, *CIFAR))
    content = {"model": prefixed(net.state_dict(), "module."), "optimizer": {}, "epoch": 150, "amp": "N/A"}
    torch.save(content, tmp_path / "cifar_linf_8.pt")
    done = convert(tmp_path / "cifar_linf_8.pt", tmp_path / "out", classifier=True)
    assert done.format == "robustness" and "normalizer.new_mean" in done.why
    assert check(done, net, 0)["pretrained_cfg"]["mean"] == list(CIFAR[0])
    check_logits(done, net, linear)
    assert any("the attacker's copy" in note for note in done.conversion.notes)


@pytest.mark.parametrize("inner", [1, 2])
def test_robustness_on_imagenet(inner, tmp_path):
    linear = nn.Linear(64, 5)
    network = Net(
        (64, 8, 8, 16), (1, 2, 1, 1), 0, 7, head={"fc": linear}, normalize=None, bottleneck=True, inner=inner
    )
    net = trained(Attacked(network, *IMAGENET))
    torch.save({"state_dict": prefixed(net.state_dict(), "module.")}, tmp_path / "imagenet.pt")
    done = convert(tmp_path / "imagenet.pt", tmp_path / "out", classifier=True, image_size=64)
    config = check(done, net, 0, 64)
    check_logits(done, net, linear, 64)
    assert config["architecture"] == "resnet50" and config["model_type"] == "timm_wrapper"
    assert config["model_args"].get("base_width", 64) == 64 * inner and config["model_args"]["layers"] == [1, 2, 1, 1]


@pytest.mark.parametrize("buffers", [None, ("mu", "sigma"), ("mean", "std")])
def test_robustbench_wide_resnet(buffers, tmp_path):
    linear = nn.Linear(128, 10)
    values = dict(zip(buffers, CIFAR, strict=True)) if buffers else None
    net = trained(WideNet(head={"fc": linear}, buffers=values, unused=True))
    torch.save({"state_dict": prefixed(net.state_dict(), "module.")}, tmp_path / "Carmon.pt")
    done = convert(tmp_path / "Carmon.pt", tmp_path / "out", classifier=True)
    check(done, net, 0)
    check_logits(done, net, linear)
    assert done.format == "robustbench" and any("sub_block1" in note for note in done.conversion.notes)
    assert any("no input normalisation is in the file" in note for note in done.conversion.notes) is (buffers is None)


def test_robustbench_resnet18_without_bias_and_with_given_normalisation(tmp_path):
    linear = nn.Linear(WIDTH, 10, bias=False)
    net = trained(Net(count=0, normalize=None, shortcut="shortcut", head={"linear": linear}))
    torch.save(prefixed(net.state_dict(), "model."), tmp_path / "Engstrom.pt")
    done = convert(tmp_path / "Engstrom.pt", tmp_path / "out", classifier=True, mean=CIFAR[0], std=CIFAR[1])
    net.normalize = Normalize(*CIFAR)
    check_logits(done, net, linear)
    assert any("as given, not from the file" in note for note in done.conversion.notes)
    assert any("its bias is zero" in note for note in done.conversion.notes)


def test_published_sizes_need_no_arguments():
    net = Net((64, 128, 256, 512), head={"fc": AclProjector(512, 2)})
    conversion = load_converter("acl").convert(net.state_dict())
    assert (conversion.architecture, conversion.model_args) == ("resnet18_cifar", {})
    with torch.device("meta"):
        wide = WideNet(28, 10, 0, {"fc": nn.Linear(640, 10)})
    tensors = {key: torch.zeros(()).expand(value.shape) for key, value in wide.state_dict().items()}
    conversion = load_converter("trades").convert(tensors)
    assert (conversion.architecture, conversion.model_args) == ("wide_resnet28_10", {})
