from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from training import tiny_model
from transformers import AutoModelForImageClassification

from hf_robust import adapters
from hf_robust.adapters import (
    AdapterModel,
    LoraPathModel,
    merge_adapter,
    save_adapter,
    with_adapter,
    with_lora_path,
    without_lora,
)
from hf_robust.hub import save_encoder
from hf_robust.models.lora import is_lora
from hf_robust.models.modeling import RobustModelForPreTraining, RobustPretrainingConfig
from hf_robust.objectives.autolora import AutoLoRa
from hf_robust.objectives.lora import LoRA
from hf_robust.objectives.sat import SAT

# PEFT reads an attribute of the network that transformers has renamed; its affair, not ours.
peft_reads = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CLASSIFIER = {"head": "classifier", "num_classes": 3}
CIFAR = {"architecture": "resnet10_cifar", "model_args": {"channels": [4, 4, 8, 8]}, "image_size": 16}
NETWORKS = {
    "cifar": {**CIFAR, "norm_branches": ("adv",)},
    "two_branches": {**CIFAR, "norm_branches": ("clean", "adv")},
    "wide": {"architecture": "wide_resnet28_10", "model_args": {"depth": 10, "width": 1}, "norm_branches": ("adv",)},
    "vit": {
        "architecture": "vit_tiny_patch4_32", "model_args": {"depth": 2, "embed_dim": 24}, "norm_branches": ("adv",),
    },
    "resnet18": {"architecture": "resnet18", "norm_branches": ("adv",), "mean": None, "std": None},
    "distilled": {  # two classifiers, averaged
        "architecture": "deit_tiny_distilled_patch16_224", "image_size": 32, "norm_branches": ("adv",),
        "model_args": {"depth": 1, "embed_dim": 24, "patch_size": 8},
    },
}  # fmt: skip
STOCK = ("vit", "resnet18", "distilled")


def build(name: str = "cifar", **changes) -> RobustModelForPreTraining:
    """A classifier with running statistics that have seen images."""
    torch.manual_seed(0)
    model = RobustModelForPreTraining(RobustPretrainingConfig(**{**NETWORKS[name], **CLASSIFIER, **changes}))
    with torch.no_grad():
        model.train()([(branch, images(model)) for branch in model.switch.branches])
    return model.eval()


def images(model: RobustModelForPreTraining, seed: int = 1) -> torch.Tensor:
    size = model.config.image_size
    return torch.rand(6, 3, size, size, generator=torch.Generator().manual_seed(seed))


def fine_tune(model: RobustModelForPreTraining, passes: tuple[str, ...] = ("adv",)) -> None:
    """Two large steps, so that everything that may move has moved."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, momentum=0.9)
    for seed in (5, 6):
        optimizer.zero_grad()
        logits = model([(path, images(model, seed)) for path in passes])
        sum(F.cross_entropy(z, torch.arange(6) % 3) for z in logits).backward()
        optimizer.step()
    model.eval()


def random_factors(model) -> None:
    for layer in model.lora_layers.values():
        nn.init.normal_(layer.lora_B["default"].weight, std=0.3)


def normalised(model: RobustModelForPreTraining, x: torch.Tensor) -> torch.Tensor:
    return model.normalize(x)


# ---------------------------------------------------------------------- making the models
@pytest.mark.parametrize("name", ["cifar", "two_branches", "wide", "vit"])
@pytest.mark.parametrize("make", [with_lora_path, with_adapter])
def test_fresh_adapters_change_nothing_and_the_model_stays_as_it_was(name, make):
    model = build(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapted, x = make(model, rank=2), images(model)
    with torch.no_grad():
        for path in getattr(adapted, "paths", adapted.switch.branches):
            branch = "adv" if path == "lora" else path
            assert torch.equal(adapted.embed(x, path), model.embed(x, branch))
    fine_tune(adapted)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert adapted.config.norm_branches == model.config.norm_branches
    assert isinstance(model, RobustModelForPreTraining) and not any(map(is_lora, before))


def test_mode_and_precision_follow_the_model():
    model = build().double()
    path, adapter = with_lora_path(model.train(), 2), with_adapter(model, 2)
    for adapted in (path, adapter):
        assert adapted.training and {p.dtype for p in adapted.parameters()} == {torch.float64}
    assert path.backbone.training and not adapter.backbone.training
    assert all(p.requires_grad for p in path.parameters())
    assert not with_lora_path(model.eval(), 2).training


def test_settings_reach_the_model():
    model = build()
    assert isinstance(with_lora_path(model, 3), LoraPathModel) and isinstance(with_adapter(model, 3), AdapterModel)
    config = with_lora_path(model, 3, init="peft", norm_update="plain_only").config
    assert (config.lora_rank, config.lora_init, config.norm_update) == (3, "peft", "plain_only")
    assert with_lora_path(model, 3).config.lora_init == "matched"
    layer = with_adapter(model, 2, alpha=6).lora_layers["layer1.0.conv1"]
    assert layer.scaling["default"] == 3.0
    with pytest.raises(ValueError, match=r"rank 9 is larger than the layer 'layer1.0.conv1'.*write rank=4 or less"):
        with_lora_path(model, 9)
    with pytest.raises(ValueError, match="alpha must be positive"):
        with_adapter(model, 2, alpha=-1)
    with pytest.raises(ValueError, match="has adapters already: take them out first with without_lora"):
        with_adapter(with_lora_path(model, 2), 2)


def test_class_names_of_the_model_are_kept():
    model = build()
    model.config.id2label = {0: "cat", 1: "dog", 2: "owl"}
    adapted = with_lora_path(model, 2)
    assert adapted.config.id2label == without_lora(adapted).config.id2label == model.config.id2label


# ---------------------------------------------------------------------- taking adapters out
@pytest.mark.parametrize("name", ["cifar", "two_branches", "wide", "vit"])
def test_without_lora_is_the_plain_path_bit_by_bit(name):
    start = build(name)
    model = with_lora_path(start, 2)
    fine_tune(model, ("lora", "adv"))
    x = images(model)
    plain = without_lora(model)
    assert type(plain) is RobustModelForPreTraining and not plain.training
    assert plain.state_dict().keys() == start.state_dict().keys()
    assert plain.config.to_dict() == start.config.to_dict()
    with torch.no_grad():
        for branch in model.switch.branches:
            assert torch.equal(plain.embed(x, branch), model.embed(x, branch))
        assert not torch.allclose(plain.embed(x, "adv"), model.embed(x, "lora"))
        assert not torch.allclose(plain.embed(x, "adv"), start.embed(x, "adv"))


@peft_reads
def test_without_lora_is_what_peft_unloads():
    from peft import LoraConfig, get_peft_model

    start = build(norm_branches=("adv",))
    model = with_lora_path(start, 2)
    targets = [f"backbone.{name}" for name in model.lora_layers]
    peft_model = get_peft_model(start, LoraConfig(r=2, target_modules=targets))
    missing, unexpected = peft_model.base_model.model.load_state_dict(model.state_dict())
    assert not missing and not unexpected
    unloaded = peft_model.unload().state_dict()
    plain = without_lora(model).state_dict()
    assert plain.keys() == unloaded.keys() and all(torch.equal(plain[k], unloaded[k]) for k in plain)


@pytest.mark.parametrize("name", ["cifar", "two_branches", "vit"])
def test_merging_keeps_the_outputs(name):
    model = with_adapter(build(name), 2)
    random_factors(model)
    merged, x = merge_adapter(model), images(model)
    assert type(merged) is RobustModelForPreTraining and all(p.requires_grad for p in merged.parameters())
    with torch.no_grad():
        assert torch.allclose(merged.embed(x, "adv"), model.embed(x, "adv"), atol=1e-5)
        assert not torch.allclose(merged.embed(x, "adv"), without_lora(model).embed(x, "adv"), atol=1e-3)


def test_merging_a_grouped_convolution_is_refused():
    args = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "cardinality": 2, "base_width": 32}
    model = with_adapter(build("resnet18", architecture="resnet50", image_size=32, model_args=args), 2)
    assert any(getattr(layer.get_base_layer(), "groups", 1) == 2 for layer in model.lora_layers.values())
    with pytest.raises(ValueError, match=r"grouped convolution 'layer1.0.conv2' cannot be merged: save it as it is"):
        merge_adapter(model)


# ---------------------------------------------------------------------- as a folder of PEFT
def load_adapter(base, folder, num_labels: int = 3):
    from peft import PeftModel

    return PeftModel.from_pretrained(
        AutoModelForImageClassification.from_pretrained(base, num_labels=num_labels), folder
    ).eval()


@peft_reads
@pytest.mark.parametrize("name", NETWORKS)
def test_a_saved_adapter_loads_with_peft_on_the_encoder(tmp_path, name):
    start = build(name)
    base = save_encoder(start, tmp_path / "encoder")
    model_type = json.loads((base / "config.json").read_text())["model_type"]
    assert model_type == ("timm_wrapper" if name in STOCK else "hf_robust_timm")
    model = with_adapter(start, 4, alpha=6)
    fine_tune(model)
    random_factors(model)
    folder = save_adapter(model, tmp_path / "adapter", str(base))
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors", "labels.json"]
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    loaded, x = load_adapter(base, folder), images(model)
    with torch.no_grad():
        logits = model.embed(x, "adv")
        assert torch.allclose(loaded(pixel_values=normalised(model, x)).logits, logits, atol=1e-6)
        assert not torch.allclose(logits, start.embed(x, "adv"), atol=1e-2)
    stored = load_file(folder / "adapter_model.safetensors")
    assert sum(v.numel() for v in stored.values()) < 1.01 * sum(
        p.numel() * (2 if "classifier" in n and name == "distilled" else 1)
        for n, p in model.named_parameters()
        if p.requires_grad
    )


@peft_reads
def test_the_adapter_of_a_lora_path_turns_the_classifier_into_the_natural_path(tmp_path):
    start = build()
    model = with_lora_path(start, 2)
    fine_tune(model, ("lora", "adv"))
    random_factors(model)
    encoder = save_encoder(without_lora(model), tmp_path / "encoder")
    classifier = AutoModelForImageClassification.from_pretrained(encoder, num_labels=3)
    classifier.timm_model.fc.load_state_dict(model.classifier.state_dict())
    classifier.save_pretrained(tmp_path / "classifier")
    folder = save_adapter(model, tmp_path / "natural_lora", str(tmp_path / "classifier"))
    assert all(map(lambda key: "lora_" in key, load_file(folder / "adapter_model.safetensors")))
    loaded, x = load_adapter(tmp_path / "classifier", folder), images(model)
    with torch.no_grad():
        assert torch.allclose(loaded(pixel_values=normalised(model, x)).logits, model.embed(x, "lora"), atol=1e-6)
        with pytest.raises(ValueError, match="differ in fc.*save_classifier"):
            save_adapter(model, tmp_path / "other", str(encoder))
        with loaded.disable_adapter():
            assert torch.allclose(loaded(pixel_values=normalised(model, x)).logits, model.embed(x, "adv"), atol=1e-6)


def test_a_fresh_process_loads_the_adapter_after_importing_the_library(tmp_path):
    model = with_adapter(build(), 2)
    random_factors(model)
    base = save_encoder(build(), tmp_path / "encoder")
    save_adapter(model, tmp_path / "adapter", str(base), ["cat", "dog", "owl"])
    x = images(model)
    with torch.no_grad():
        torch.save({"pixels": normalised(model, x), "logits": model.embed(x, "adv")}, tmp_path / "expected.pt")
    code = (
        "import hf_robust, json, torch; torch.set_num_threads(1); from peft import PeftModel; "
        "from transformers import AutoModelForImageClassification as Auto; "
        "names = dict(enumerate(json.load(open('adapter/labels.json')))); e = torch.load('expected.pt'); "
        "m = PeftModel.from_pretrained(Auto.from_pretrained('encoder', num_labels=3, id2label=names), 'adapter'); "
        "m.eval(); "
        "assert m.config.id2label == {0: 'cat', 1: 'dog', 2: 'owl'}, m.config.id2label; "
        "assert (m(pixel_values=e['pixels']).logits - e['logits']).abs().max() < 1e-6"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(adapters.__file__)))
    env = {**os.environ, "PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True, timeout=120)


def test_saving_leaves_model_and_random_numbers_alone_and_replaces_an_older_adapter(tmp_path):
    model = with_adapter(build(), 2)
    base = save_encoder(build(), tmp_path / "encoder")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    folder = save_adapter(model, tmp_path / "adapter", str(base), ["a", "b", "c"])
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    (folder / "README.md").write_text("mine")
    first = {p.name: p.read_bytes() for p in folder.iterdir()}
    save_adapter(model, folder, str(base), ["a", "b", "c"])
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == first
    random_factors(model)
    save_adapter(model, folder, str(base))
    assert (folder / "adapter_model.safetensors").read_bytes() != first["adapter_model.safetensors"]
    assert json.loads((folder / "labels.json").read_text()) == ["LABEL_0", "LABEL_1", "LABEL_2"]


def test_another_network_than_that_of_the_model_is_refused(tmp_path):
    model = with_adapter(build(), 2)
    bases = {
        "weights": save_encoder(build().apply(_disturb), tmp_path / "weights"),
        "pixels": save_encoder(_other_pixels(build()), tmp_path / "pixels"),
        "shape": save_encoder(build("wide"), tmp_path / "shape"),
    }
    messages = {"weights": r"conv\d.weight", "pixels": "mean and std", "shape": "bn1.bias.* and 71 more"}
    for name, base in bases.items():
        with pytest.raises(ValueError, match=f"is not the network that this resnet10_cifar .*{messages[name]}"):
            save_adapter(model, tmp_path / "adapter", str(base))
    with pytest.raises(FileNotFoundError, match="'nowhere' cannot be read as one .*write the folder of save_encoder"):
        save_adapter(model, tmp_path / "adapter", "nowhere")
    assert not (tmp_path / "adapter").exists()


def _other_pixels(model: RobustModelForPreTraining) -> RobustModelForPreTraining:
    model.config.mean = (0.5, 0.5, 0.5)
    return model


def _disturb(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        module.weight.data *= 1.001


def test_wrong_label_names_and_heads_are_refused(tmp_path):
    with pytest.raises(ValueError, match="got 2 label names for 3 classes"):
        save_adapter(with_adapter(build(), 2), tmp_path, "base", ["a", "b"])
    projector = with_adapter(build(head="projector", num_classes=None), 2)
    with pytest.raises(ValueError, match="only a classifier's adapter can be saved, this model has a projector"):
        save_adapter(projector, tmp_path, "base")


def test_a_failed_save_keeps_the_earlier_adapter(tmp_path, monkeypatch):
    model = with_adapter(build(), 2)
    base = str(save_encoder(build(), tmp_path / "encoder"))
    folder = save_adapter(model, tmp_path / "adapter", base)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    random_factors(model)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peft.PeftModel.save_pretrained", full)
    with pytest.raises(OSError, match="cannot write the adapter to .*saved there earlier is intact"):
        save_adapter(model, folder, base)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "encoder"]


# ---------------------------------------------------------------------- tests/training.py
def test_the_tiny_model_of_the_tests_suits_the_method():
    path = tiny_model(AutoLoRa(rank=4, init="peft", norm_update="plain_only"))
    assert isinstance(path, LoraPathModel) and path.paths == ("adv", "lora")
    assert (path.config.lora_rank, path.config.lora_init, path.config.norm_update) == (4, "peft", "plain_only")
    adapter = tiny_model(LoRA(rank=2, alpha=3.0))
    assert isinstance(adapter, AdapterModel) and (adapter.config.lora_rank, adapter.config.lora_alpha) == (2, 3.0)
    assert type(tiny_model(SAT())) is RobustModelForPreTraining
