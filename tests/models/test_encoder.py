from __future__ import annotations

import importlib
import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from hf_robust.models import backbones, encoder
from hf_robust.models.encoder import RobustTimmConfig, RobustTimmForImageClassification, RobustTimmModel

CFG = {
    "input_size": [3, 32, 32],
    "fixed_input_size": False,
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "squash",
    "mean": [0.0, 0.0, 0.0],
    "std": [1.0, 1.0, 1.0],
    "first_conv": "conv1",
    "classifier": "fc",
}
NETS = {"resnet10_cifar": {"channels": [4, 4, 4, 8]}, "wide_resnet28_10": {"depth": 10, "width": 1}}


def write_repo(folder: Path, architecture: str, num_classes: int = 0) -> torch.nn.Module:
    """A repository as the Hub would hold it: raw timm weights, our model type."""
    torch.manual_seed(0)
    net = timm.create_model(architecture, num_classes=num_classes, **NETS[architecture]).eval()
    safetensors.torch.save_file(net.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "hf_robust_timm",
        "architectures": ["RobustTimmModel"],
        "architecture": architecture,
        "model_args": NETS[architecture],
        "num_classes": num_classes,
        "num_features": net.num_features,
        "label_names": [f"class {i}" for i in range(num_classes)],
        "pretrained_cfg": CFG,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return net


def images(n: int = 2) -> torch.Tensor:
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("architecture", NETS)
def test_auto_model_loads_raw_timm_weights_and_saves_them_back(tmp_path, architecture):
    net, x = write_repo(tmp_path, architecture), images()
    model, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is RobustTimmModel
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.allclose(model(x).pooler_output, net(x), atol=1e-6)
    model.save_pretrained(tmp_path / "again")
    saved = safetensors.torch.load_file(tmp_path / "again" / "model.safetensors")
    assert saved.keys() == net.state_dict().keys()
    assert all(torch.equal(saved[k], v) for k, v in net.state_dict().items())
    # timm reads both, also with a classifier of its own
    other = timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True, num_classes=4).eval()
    assert other(x).shape == (2, 4)
    assert torch.equal(other.conv1.weight, net.conv1.weight)


def test_a_model_built_from_its_configuration_is_saved_with_timms_keys_too(tmp_path):
    config = RobustTimmConfig(architecture="resnet10_cifar", model_args=NETS["resnet10_cifar"], num_labels=3)
    for model in (AutoModel.from_config(config), AutoModelForImageClassification.from_config(config)):
        model.save_pretrained(tmp_path)
        assert "conv1.weight" in safetensors.torch.load_file(tmp_path / "model.safetensors")
        again = type(model).from_pretrained(tmp_path)
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_classifier_keeps_its_head_and_its_labels(tmp_path):
    net, x = write_repo(tmp_path, "resnet10_cifar", num_classes=3), images()
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(model) is RobustTimmForImageClassification
    assert model.config.id2label == {0: "class 0", 1: "class 1", 2: "class 2"}
    with torch.no_grad():
        assert torch.allclose(model(x).logits, net(x), atol=1e-6)


def test_image_processor_hands_out_pixels_between_zero_and_one(tmp_path):
    pytest.importorskip("torchvision")
    write_repo(tmp_path, "resnet10_cifar")
    from PIL import Image

    image = (images(1)[0] * 255).to(torch.uint8)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    pixels = processor(Image.fromarray(image.permute(1, 2, 0).numpy()))["pixel_values"]
    assert torch.allclose(pixels[0], image / 255)


def test_remote_copy_serves_its_own_classes_and_leaves_the_installed_ones_in_charge(tmp_path, monkeypatch):
    write_repo(tmp_path, "resnet10_cifar")
    package = types.ModuleType("remote_package")
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "remote_package", package)
    for module in (backbones, encoder):
        shutil.copy(module.__file__, tmp_path)
    remote = importlib.import_module("remote_package.encoder")
    try:
        assert remote.RobustTimmModel is not RobustTimmModel
        config = remote.RobustTimmConfig(architecture="resnet10_cifar", model_args=NETS["resnet10_cifar"])
        assert type(AutoModel.from_config(config)) is remote.RobustTimmModel
        assert type(AutoConfig.from_pretrained(tmp_path)) is RobustTimmConfig
        assert type(AutoModel.from_pretrained(tmp_path)) is RobustTimmModel
        encoder.register_auto_classes()  # a second time: nothing to complain about
    finally:
        for name in ("remote_package.encoder", "remote_package.backbones"):
            sys.modules.pop(name, None)


def test_travelling_files_import_nothing_of_the_package():
    for module, allowed in ((encoder, {".backbones"}), (backbones, set())):
        source = Path(module.__file__).read_text()
        relative = {line.split()[1] for line in source.splitlines() if line.lstrip().startswith("from .")}
        assert relative == allowed
        assert "import hf_robust" not in source and "from hf_robust" not in source
