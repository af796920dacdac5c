"""Whatever classifies images becomes the same function of pixels in [0, 1], or says why it cannot."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from released import OURS, pixels, trained_model
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from hf_robust.adapters import merge_adapter, save_adapter, with_adapter
from hf_robust.classifiers import build_classifier, save_classifier
from hf_robust.evaluation.classifier import PixelClassifier, load_classifier
from hf_robust.hub import save_encoder

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
NAMES = ("cat", "dog", "newt")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A classifier of three classes as model, as export with native/, as checkpoint, and its encoder."""
    root = tmp_path_factory.mktemp("tuned")
    save_encoder(trained_model(**OURS["thin"]), root / "encoder")
    model = build_classifier(root / "encoder", 3)
    torch.manual_seed(5)
    nn.init.normal_(model.classifier.weight)
    save_classifier(model, root / "run" / "classifier", label_names=NAMES)
    model.save_pretrained(root / "checkpoint")
    return root, model


def expected(model, x):
    with torch.no_grad():
        return model.embed(x, "adv")


@pytest.mark.parametrize("place", ["run/classifier", "run", "checkpoint", "run/classifier/native"])
def test_every_export_of_one_model_gives_its_logits_of_pixels(tuned, place):
    root, model = tuned
    x = pixels(model.config.image_size)
    loaded = load_classifier(root / place)
    assert isinstance(loaded, PixelClassifier) and loaded.image_size == model.config.image_size
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), expected(model, x), **CLOSE)
    assert loaded.num_classes == 3 and loaded.label_names == (None if place == "checkpoint" else NAMES)
    assert not loaded.model.training


def test_a_training_model_is_taken_as_it_is(tuned):
    _, model = tuned
    loaded, x = load_classifier(model), pixels(model.config.image_size)
    with torch.no_grad():
        assert torch.equal(loaded(x), expected(model, x))
    assert loaded.facts()["norm_branch"] == "adv" and load_classifier(loaded) is loaded
    with pytest.raises(ValueError, match="no norm branch 'clean' to choose: the model has 'adv'"):
        load_classifier(model, branch="clean")
    with pytest.raises(ValueError, match="normalises in its first layer"):
        load_classifier(model, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own
def test_an_adapter_brings_its_encoder_and_its_head(tuned, tmp_path):
    root, model = tuned
    adapted = with_adapter(build_classifier(root / "encoder", 3), rank=2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "classifier" in name:
                parameter.normal_(std=0.1)
    save_adapter(adapted, tmp_path / "run" / "adapter", str(root / "encoder"), NAMES)
    x = pixels(model.config.image_size)
    for place in ("run/adapter", "run"):
        loaded = load_classifier(tmp_path / place)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), expected(merge_adapter(adapted), x), **CLOSE)
        assert loaded.label_names == NAMES and loaded.image_size == model.config.image_size
    file = tmp_path / "run" / "adapter" / "adapter_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(FileNotFoundError, match=r"belongs to .*gone.*base_model_name_or_path"):
        load_classifier(tmp_path / "run")


def test_a_plain_transformers_model_gets_what_its_image_processor_would_do(tmp_path):
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    config.num_labels = 4
    torch.manual_seed(0)
    model = ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no image processor.*save its image processor"):
        load_classifier(tmp_path)
    with pytest.raises(ValueError, match="takes normalised images.*pass mean and std"):
        load_classifier(model)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "ViTImageProcessor",
                "do_resize": True,
                "size": {"height": 16, "width": 16},
                "resample": 2,
                "do_rescale": True,
                "rescale_factor": 1 / 127.5,
                "do_normalize": True,
                "image_mean": [1.0, 1.1, 0.9],
                "image_std": [0.5, 1.0, 2.0],
            }
        )
    )
    loaded, picture = load_classifier(tmp_path), np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    prepared = AutoImageProcessor.from_pretrained(tmp_path)(Image.fromarray(picture), return_tensors="pt")
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(**prepared).logits, **CLOSE)
        by_hand = load_classifier(model, mean=[127.5 * m / 127.5 / 2 for m in (1.0, 1.1, 0.9)], std=[0.25, 0.5, 1.0])
        torch.testing.assert_close(by_hand(x), model(**prepared).logits, **CLOSE)
    assert loaded.image_size == 16 and loaded.interpolation == "bilinear" and loaded.label_names is None
    small = load_classifier(tmp_path, image_size=8)
    assert small.image_size == 8 and small(torch.rand(2, 3, 8, 8)).shape == (2, 4)  # enlarged inside


def test_a_timm_model_that_wants_normalised_images_is_refused():
    model = timm.create_model("resnet18", num_classes=3).eval()
    with pytest.raises(ValueError, match=r"asks for normalised images \(mean \(0.485.*pass mean and std"):
        load_classifier(model)
    x = torch.rand(1, 3, 32, 32)
    loaded = load_classifier(model, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model((x - 0.5) / 0.25), **CLOSE)
    raw = load_classifier(model, mean=(0, 0, 0), std=(1, 1, 1))
    with torch.no_grad():
        torch.testing.assert_close(raw(x), model(x), **CLOSE)


def test_what_cannot_be_a_classifier_says_so(tuned, tmp_path):
    root, model = tuned
    with pytest.raises(ValueError, match="encoder without classifier: fine-tune it first, with --protocol slf"):
        load_classifier(root / "encoder")
    trained_model(**OURS["thin"]).save_pretrained(tmp_path / "pretraining")
    with pytest.raises(ValueError, match="checkpoint of pre-training with a projector"):
        load_classifier(tmp_path / "pretraining")
    with pytest.raises(ValueError, match="projector as head and gives no logits"):
        load_classifier(trained_model(**OURS["thin"]))
    with pytest.raises(FileNotFoundError, match="no folder 'no/such/folder': name the folder of a classifier"):
        load_classifier("no/such/folder")
    with pytest.raises(ValueError, match="they belong together, one of them would meet the other of the image proc"):
        load_classifier(root / "run", mean=(0.5, 0.5, 0.5))
    shutil.copytree(root / "run" / "classifier", tmp_path / "damaged")
    file = tmp_path / "damaged" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        load_classifier(tmp_path / "damaged")
    with pytest.raises(ValueError, match="a module, a function of images, a folder or a Hub repository, got int"):
        load_classifier(3)


def test_an_ordinary_classifier_without_its_head_is_refused(tuned, tmp_path):
    root, _ = tuned
    native = shutil.copytree(root / "run" / "classifier" / "native", tmp_path / "native")
    from safetensors.torch import load_file, save_file

    tensors = load_file(native / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.startswith("fc.")}, native / "model.safetensors")
    with pytest.raises(ValueError, match=r"lack 2 tensors .*would stay random"):
        load_classifier(native)


def test_where_it_comes_from_is_read_from_the_report_beside_it(tuned, tmp_path):
    root, _ = tuned
    folder = shutil.copytree(root / "run" / "classifier", tmp_path / "classifier")
    told = {"name": "SLF thin", "task": "classifier", "objective": {"name": "SLF"}, "dataset": {"name": "cifar10"}}
    told["encoder"] = {"objective": "DynACL", "dataset": "uoft-cs/cifar10", "coreset": "RCS"}
    (folder / "report.json").write_text(json.dumps(told))
    facts = load_classifier(folder).facts()
    assert (facts["method"], facts["mode"], facts["pretrained_on"]) == ("DynACL", "SLF", "uoft-cs/cifar10")
    assert facts["coreset"] == "RCS" and facts["title"] == "SLF thin"
    (folder / "report.json").write_text("{")
    assert "method" not in load_classifier(folder).facts()


def test_reading_leaves_the_random_state_alone(tuned):
    root, _ = tuned
    before = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_classifier(root / "run")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_repository_is_looked_up_like_a_folder(tuned, monkeypatch):
    import huggingface_hub

    root, model = tuned
    asked = []

    def download(name, allow_patterns, ignore_patterns=None):
        asked.append((name, allow_patterns))
        return str(root / "run" / "classifier")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    x = pixels(model.config.image_size)
    with torch.no_grad():
        torch.testing.assert_close(load_classifier("user/name")(x), expected(model, x), **CLOSE)
        native = load_classifier("user/name", subfolder="native")
        torch.testing.assert_close(native(x), expected(model, x), **CLOSE)
    assert asked == [
        ("user/name", ["*.json", "*.safetensors"]),
        ("user/name", ["native/*.json", "native/*.safetensors"]),
    ]
    assert native.facts()["source"] == "user/name"

    def missing(*_, **__):
        raise OSError("401 nobody there")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    with pytest.raises(FileNotFoundError, match="user/name"):
        load_classifier("user/name")


def test_the_same_answers_as_plain_transformers(tuned):
    root, _ = tuned
    folder = root / "run" / "classifier"
    model, processor = (cls.from_pretrained(folder) for cls in (AutoModelForImageClassification, AutoImageProcessor))
    side = model.config.image_size
    picture = np.random.default_rng(1).integers(0, 256, (side, side, 3), np.uint8)
    with torch.no_grad():
        theirs = model.eval()(**processor(Image.fromarray(picture), return_tensors="pt")).logits
        ours = load_classifier(Path(folder))(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255)
    torch.testing.assert_close(ours, theirs, **CLOSE)
