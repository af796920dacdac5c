"""An encoder becomes a classifier without losing a tensor on the way, and the classifier leaves the house."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from released import OURS, STOCK, pictures, pixels, trained_model
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from hf_robust import classifiers, hub_folders
from hf_robust.classifiers import build_classifier, save_classifier
from hf_robust.hub import encoder_features, load_encoder, save_encoder
from hf_robust.model_card import write_model_card
from hf_robust.models.modeling import RobustModelForPreTraining, RobustPretrainingConfig

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
CONFIGS: dict[str, dict[str, Any]] = {name: {**STOCK, **OURS}[name] for name in ("stl", "vit", "thin", "wrn")}
PLAIN = ("stl", "vit")  # those that timm builds without us
NAMES = ("cat", "dog", "newt")


@pytest.fixture(scope="module")
def models() -> dict[str, RobustModelForPreTraining]:
    return {name: trained_model(**config) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def encoders(models, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("encoders")
    for name, model in models.items():
        save_encoder(model, root / name)
    models["thin"].save_pretrained(root / "checkpoint")
    return root


@pytest.fixture(scope="module")
def tuned(encoders, tmp_path_factory) -> tuple[Path, dict[str, RobustModelForPreTraining]]:
    """Classifiers of three classes and their exports."""
    root, out = tmp_path_factory.mktemp("classifiers"), {}
    for name in CONFIGS:
        out[name] = build_classifier(encoders / name, 3)
        torch.manual_seed(5)
        nn.init.normal_(out[name].classifier.weight)
        nn.init.normal_(out[name].classifier.bias)
        save_classifier(out[name], root / name, label_names=NAMES)
    return root, out


def copied(encoder: Path, target: Path, change: Any = None, **config: Any) -> Path:
    """An encoder folder with other tensors or another configuration."""
    target.mkdir()
    values = json.loads((encoder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**values, **config}))
    tensors = safetensors.torch.load_file(encoder / "model.safetensors")
    if change is not None:
        change(tensors)
    safetensors.torch.save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


# ---------------------------------------------------------------------------------------------- build_classifier
@pytest.mark.parametrize("name", CONFIGS)
def test_the_classifier_has_the_features_of_the_encoder_and_a_head_of_zeros(models, encoders, name):
    model = build_classifier(encoders / name, 7)
    x = pixels(model.config.image_size)
    with torch.no_grad():
        torch.testing.assert_close(model.features(x, "adv"), models[name].features(x, "adv"), rtol=0, atol=0)
        assert torch.equal(model.embed(x, "adv"), torch.zeros(2, 7))
    assert not model.training and all(p.requires_grad for p in model.parameters())
    assert tuple(model.config.norm_branches) == ("adv",)
    assert model.config.mean == models[name].config.mean and model.config.image_size == models[name].config.image_size


def test_a_model_without_normalisation_stays_without(tmp_path):
    source = trained_model(**{**OURS["tiny"], "mean": None, "std": None})
    model = build_classifier(save_encoder(source, tmp_path / "encoder"), 2)
    assert model.config.mean is None and isinstance(model.normalize, nn.Identity)
    assert torch.equal(model.features(pixels(16), "adv"), source.features(pixels(16), "adv"))


def test_a_checkpoint_gives_every_branch_by_its_name(models, encoders):
    for branches in (("clean", "adv"), ("adv", "clean"), ("clean",), ("adv",)):
        model = build_classifier(encoders / "checkpoint", 3, branches)
        assert tuple(model.config.norm_branches) == branches
        for branch in branches:
            x = pixels(16)
            assert torch.equal(model.features(x, branch), models["thin"].features(x, branch))
    difference = model.features(x, "adv") - models["thin"].features(x, "clean")
    assert difference.abs().max() > 1e-2


@pytest.mark.parametrize("source", ["thin", "checkpoint"])
def test_a_branch_that_the_source_lacks_starts_as_a_copy_of_adv(models, encoders, source):
    names = ("extra", "adv") if source == "checkpoint" else ("clean", "adv")
    model = build_classifier(encoders / source, 3, names)
    for branch in names:
        assert torch.equal(model.features(pixels(16), branch), models["thin"].features(pixels(16), "adv"))
    with torch.no_grad():  # copies, not the same layer
        model.backbone.bn1.adv.weight.zero_()
    assert not torch.equal(model.features(pixels(16), names[0]), model.features(pixels(16), "adv"))


def test_the_one_branch_of_a_clean_encoder_is_used_for_all(tmp_path):
    source = trained_model(**OURS["tiny"])
    clean = save_encoder(source, tmp_path / "encoder", "clean")
    model = build_classifier(clean, 2)
    assert torch.equal(model.features(pixels(16), "adv"), source.features(pixels(16), "clean"))


def test_older_heads_stay_behind(encoders, tuned, tmp_path):
    supervised = RobustModelForPreTraining(
        RobustPretrainingConfig(**OURS["tiny"], norm_branches=("adv",), head="classifier", num_classes=5)
    )
    supervised.save_pretrained(tmp_path / "sat")
    for source in (tmp_path / "sat", tuned[0] / "thin", tuned[0] / "vit"):
        model = build_classifier(source, 4)
        assert model.classifier.weight.shape[0] == 4 and not model.classifier.weight.any()
    x = pixels(16)
    assert torch.equal(build_classifier(tuned[0] / "vit", 4).features(x, "adv"), tuned[1]["vit"].features(x, "adv"))


def test_the_head_may_start_as_torch_starts_it(encoders):
    torch.manual_seed(0)
    model = build_classifier(encoders / "thin", 4, head_init="default")
    bound = 1 / model.num_features**0.5
    assert 0.5 * bound < model.classifier.weight.abs().max() <= bound
    with pytest.raises(
        ValueError, match=r"head_init must be 'zero' \(published\) or 'default' \(torch's\), got 'one'"
    ):
        build_classifier(encoders / "thin", 4, head_init="one")


def test_convolutional_networks_take_another_size_as_they_are(models, encoders):
    model = build_classifier(encoders / "thin", 3, image_size=24)
    assert model.config.image_size == 24
    x = torch.rand(2, 3, 24, 24)
    assert torch.equal(model.features(x, "adv"), models["thin"].features(x, "adv"))


def test_position_tables_of_a_transformer_are_resampled(encoders, tmp_path):
    model = build_classifier(encoders / "vit", 3, image_size=32)
    own = build_classifier(encoders / "vit", 3)
    reference: Any = timm.create_model(f"local-dir:{encoders / 'vit'}", pretrained=True)
    reference.set_input_size((32, 32))
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            model.features(x, "adv"), reference.eval()(model.normalize(x)), rtol=1e-6, atol=1e-6
        )
    assert model.backbone.pos_embed.shape[1] > own.backbone.pos_embed.shape[1] == 17
    assert model.config.model_args["img_size"] == 32
    model.save_pretrained(tmp_path / "checkpoint")
    again = RobustModelForPreTraining.from_pretrained(tmp_path / "checkpoint")
    assert torch.equal(again.features(x, "adv"), model.features(x, "adv"))
    save_classifier(model, tmp_path / "classifier")
    released = AutoModelForImageClassification.from_pretrained(tmp_path / "classifier")
    assert released(pixel_values=model.normalize(x)).logits.shape == (2, 3)


def test_a_network_of_one_size_says_so(tmp_path):
    config = {"architecture": "mixer_s32_224", "image_size": 64, "norm_branches": ("adv",)}
    source = RobustModelForPreTraining(RobustPretrainingConfig(**config))
    encoder = save_encoder(source, tmp_path / "encoder")
    with pytest.raises(
        ValueError, match=r"cannot change the image size of mixer.*got image_size=96: leave image_size"
    ):
        build_classifier(encoder, 2, image_size=96)
    assert build_classifier(encoder, 2).config.image_size == 64


# ------------------------------------------------------------------------------------------------- what may be wrong
@pytest.mark.parametrize(("own", "wrong"), [("resnet18_cifar", "resnet18"), ("resnet18", "resnet18_cifar")])
def test_a_wrong_stem_is_named(tmp_path, own, wrong):
    config = {"architecture": own, "model_args": {"channels": (64, 8, 8, 8)}, "image_size": 16}
    encoder = save_encoder(RobustModelForPreTraining(RobustPretrainingConfig(**config)), tmp_path / "encoder")
    sizes = {"resnet18_cifar": r"\(64, 3, 3, 3\)", "resnet18": r"\(64, 3, 7, 7\)"}
    complaint = (
        rf"do not fit {wrong}, 1 of another shape \(conv1.weight is {sizes[own]} instead of {sizes[wrong]}\): "
        "the first layer is that of another stem.*as architecture in config.json"
    )
    with pytest.raises(ValueError, match=complaint):
        build_classifier(copied(encoder, tmp_path / "wrong", architecture=wrong), 3)


def test_another_width_is_no_matter_of_the_stem(encoders, tmp_path):
    wide = copied(encoders / "thin", tmp_path / "wide", model_args={})
    complaint = r"'.*wide' do not fit resnet10_cifar.*\.\.\.\): name architecture and model_args"
    with pytest.raises(ValueError, match=complaint):
        build_classifier(wide, 3)


@pytest.mark.parametrize("ends", [("running_mean", "running_var"), ("weight",)])
def test_missing_norm_entries_are_named(encoders, tmp_path, ends):
    def forget(tensors: dict[str, torch.Tensor]) -> None:
        for end in ends:
            del tensors[f"layer2.0.bn1.{end}"]

    spoiled = copied(encoders / "thin", tmp_path / "spoiled", forget)
    with pytest.raises(
        ValueError, match=rf"{len(ends)} missing \(layer2.0.bn1.{ends[0]}.*norm layers would start over"
    ):
        build_classifier(spoiled, 3)


def test_norm_entries_of_a_branch_that_a_checkpoint_says_it_has(models, encoders, tmp_path):
    config = {"norm_branches": ["clean", "adv", "adv_ce"]}
    spoiled = copied(encoders / "checkpoint", tmp_path / "spoiled", **config)
    with pytest.raises(ValueError, match=r"missing \(bn1.adv_ce.weight.*norm layers would start over"):
        build_classifier(spoiled, 3)


def test_tensors_left_over_or_missing_are_named(encoders, tmp_path):
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layer1.0.konv.weight"] = tensors.pop("layer1.0.conv1.weight")

    spoiled = copied(encoders / "thin", tmp_path / "renamed", rename)
    with pytest.raises(
        ValueError,
        match=r"1 missing \(layer1.0.conv1.weight\), 1 left over \(layer1.0.konv.weight\)"
        r".*save_encoder",
    ):
        build_classifier(spoiled, 3)

    def adapt(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layer1.0.conv1.lora_A.default.weight"] = torch.zeros(1)

    with pytest.raises(ValueError, match=r"lora_A.*take it out with without_lora"):
        build_classifier(copied(encoders / "thin", tmp_path / "adapted", adapt), 3)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.weight"] = torch.zeros(1)

    with pytest.raises(ValueError, match=r"no part of a training checkpoint \(base_model.weight\)"):
        build_classifier(copied(encoders / "checkpoint", tmp_path / "strange", add), 3)


def test_other_folders_are_refused(encoders, tmp_path):
    with pytest.raises(ValueError, match=r"re-expresses resnet10_cifar.*eval mode only: fine-tune the folder above"):
        build_classifier(encoders / "thin" / "native", 3)
    with pytest.raises(FileNotFoundError, match=r"no folder '.*nowhere'"):
        build_classifier(tmp_path / "nowhere", 3)
    with pytest.raises(ValueError, match=r"no config.json"):
        build_classifier(tmp_path, 3)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is an adapter, not an encoder: pass the encoder"):
        build_classifier(tmp_path, 3)
    other = copied(encoders / "thin", tmp_path / "other", pretrained_cfg={}, model_type="resnet")
    with pytest.raises(ValueError, match=r"model_type 'resnet'\) does not say architecture, mean and std"):
        build_classifier(other, 3)
    adapted = copied(encoders / "checkpoint", tmp_path / "adapted", model_type="hf_robust_adapted")
    with pytest.raises(ValueError, match=r"checkpoint of a training with an adapter.*folder that its run exported"):
        build_classifier(adapted, 3)
    with pytest.raises(ValueError, match=r"at least 2 classes, got num_classes=1"):
        build_classifier(encoders / "thin", 1)
    damaged = copied(encoders / "thin", tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"damaged or incomplete"):
        build_classifier(damaged, 3)


def test_a_checkpoint_with_a_teacher_says_that_it_reads_the_student(encoders, tmp_path, caplog):
    folder = copied(encoders / "checkpoint", tmp_path / "checkpoint")
    (folder / "teacher.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with caplog.at_level(logging.WARNING, logger="hf_robust"):
        build_classifier(folder, 3)
    assert "'encoder' folder" in caplog.text


def test_weights_in_several_files_are_read_and_a_lost_one_is_named(models, tmp_path):
    models["thin"].save_pretrained(tmp_path / "checkpoint", max_shard_size="200KB")
    files = sorted((tmp_path / "checkpoint").glob("*.safetensors"))
    assert len(files) > 1
    model = build_classifier(tmp_path / "checkpoint", 3)
    assert torch.equal(model.features(pixels(16), "adv"), models["thin"].features(pixels(16), "adv"))
    files[1].unlink()
    with pytest.raises(ValueError, match=rf"lacks {files[1].name}"):
        build_classifier(tmp_path / "checkpoint", 3)


def test_a_repository_is_downloaded(models, encoders, monkeypatch):
    asked: dict[str, Any] = {}

    def download(repo: str, **kwargs: Any) -> str:
        asked.update(repo=repo, **kwargs)
        return str(encoders / "thin")

    monkeypatch.setattr(hub_folders.huggingface_hub, "snapshot_download", download)
    model = build_classifier("user/thin", 3)
    assert torch.equal(model.features(pixels(16), "adv"), models["thin"].features(pixels(16), "adv"))
    assert asked["repo"] == "user/thin" and "*.safetensors" in asked["allow_patterns"]
    assert not any(name.endswith((".py", ".bin", "*")) for name in asked["allow_patterns"])
    assert asked["ignore_patterns"] == ["*/*"]  # native/ has files of the same names

    def offline(*args: Any, **kwargs: Any) -> str:
        raise OSError("offline mode is enabled\nmore")

    monkeypatch.setattr(hub_folders.huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"no encoder 'user/gone'.*offline mode is enabled\).*'user/name'"):
        build_classifier("user/gone", 3)


# ----------------------------------------------------------------------------------------------- save_classifier
# What a reader without this package can do.
STRANGER = """
import json, sys
from pathlib import Path

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_robust":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, NotInstalled())
import numpy as np, timm, torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

root, names, out, labels = Path(sys.argv[1]), sys.argv[2:], {}, {}
with torch.no_grad():
    for name in names:
        folder, trust = root / name, name in ("thin", "wrn")
        images = [Image.fromarray(a) for a in np.load(root / f"{name.split('/')[0]}.npy")]
        remote = dict(trust_remote_code=True) if trust else {}
        inputs = AutoImageProcessor.from_pretrained(folder, **remote)(images, return_tensors="pt")
        model, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True, **remote)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        out[f"{name}/auto"] = model.eval()(**inputs).logits
        labels[f"{name}/id2label"] = [model.config.id2label[i] for i in range(model.config.num_labels)]
        labels[f"{name}/label2id"] = model.config.label2id
        answers = pipeline("image-classification", model=str(folder), **remote)(images, top_k=3)
        labels[f"{name}/pipeline"] = [{a["label"]: a["score"] for a in answer} for answer in answers]
        if not trust:
            net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
            out[f"{name}/timm"] = net(inputs["pixel_values"])
assert not any(name.partition(".")[0] == "hf_robust" for name in sys.modules)
save_file({key: value.contiguous() for key, value in out.items()}, root / "stranger.safetensors")
(root / "stranger.json").write_text(json.dumps(labels))
"""


@pytest.fixture(scope="module")
def stranger(tuned, tmp_path_factory) -> dict[str, Any]:
    """Results of a process that cannot import hf_robust, cannot reach the Hub and has empty caches."""
    root, models = tuned
    for name, model in models.items():
        np.save(root / f"{name}.npy", pictures(model.config.image_size))
    cache = tmp_path_factory.mktemp("home")
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))},
        **{"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "HF_MODULES_CACHE": str(cache / "modules")},
        "OMP_NUM_THREADS": "1",
    }
    script = root / "stranger.py"
    script.write_text(STRANGER)
    run = subprocess.run(
        [sys.executable, "-I", str(script), str(root), *CONFIGS, "thin/native"],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    tensors = safetensors.torch.load_file(root / "stranger.safetensors")
    return {**tensors, **json.loads((root / "stranger.json").read_text())}


@pytest.mark.parametrize("name", [*CONFIGS, "thin/native"])
def test_a_stranger_gets_the_logits_of_the_training_model(tuned, stranger, name):
    model = tuned[1][name.partition("/")[0]]
    with torch.no_grad():
        logits = model.embed(pixels(model.config.image_size), "adv")
    assert logits.std() > 0.1
    kinds = [kind for kind in ("auto", "timm") if f"{name}/{kind}" in stranger]
    assert len(kinds) == (1 if name in ("thin", "wrn") else 2)
    for kind in kinds:
        torch.testing.assert_close(stranger[f"{name}/{kind}"], logits, **CLOSE)
    assert stranger[f"{name}/id2label"] == list(NAMES)
    assert stranger[f"{name}/label2id"] == {label: i for i, label in enumerate(NAMES)}
    for scores, row in zip(stranger[f"{name}/pipeline"], logits.softmax(dim=1), strict=True):
        assert [scores[label] for label in NAMES] == pytest.approx(row.tolist(), abs=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_plain_doors_once_the_package_is_imported(tuned, name):
    folder, model = tuned[0] / name, tuned[1][name]
    with torch.no_grad():
        logits = model.embed(pixels(model.config.image_size), "adv")
        released = AutoModelForImageClassification.from_pretrained(folder).eval()
        inputs = AutoImageProcessor.from_pretrained(folder)(
            list(pictures(model.config.image_size)), return_tensors="pt"
        )
        torch.testing.assert_close(released(**inputs).logits, logits, **CLOSE)
        encoder = load_encoder(folder)
        features = model.features(pixels(model.config.image_size), "adv")
        torch.testing.assert_close(encoder_features(encoder)(pixels(model.config.image_size)), features, **CLOSE)
    assert (json.loads((folder / "config.json").read_text())["model_type"] == "timm_wrapper") == (name in PLAIN)


def test_the_pipeline_works_once_the_package_is_imported(tuned):
    from PIL import Image

    answer = pipeline("image-classification", model=str(tuned[0] / "thin"))(Image.fromarray(pictures(16)[0]), top_k=3)
    assert {entry["label"] for entry in answer} == set(NAMES)


@pytest.mark.parametrize("name", ["stl", "thin"])
def test_the_code_of_the_card_runs(tuned, tmp_path, name, monkeypatch):
    from PIL import Image

    folder, model = tuned[0] / name, tuned[1][name]
    values = {"name": name, "architecture": model.config.architecture, "task": "classifier", "hub_id": str(folder)}
    exported = json.loads((folder / "config.json").read_text())["model_type"]
    card = write_model_card({**values, "exported_format": exported, "native": name == "thin"}, tmp_path).read_text()
    with torch.no_grad():
        logits = model.embed(pixels(model.config.image_size), "adv")
    blocks = [block.split("```")[0] for block in card.split("```python\n")[1:]]
    blocks = [block for block in blocks if "trust_remote_code" not in block]  # the process of the stranger does that
    assert len(blocks) == (2 if name == "thin" else 1)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(pictures(model.config.image_size)[0]).save("photo.png")
    for block in blocks:
        names: dict[str, Any] = {}
        exec(block.replace("classify(image)", "answer = classify(image)"), names)  # noqa: S102
        torch.testing.assert_close(names["logits"].detach(), logits[:1], **CLOSE)
        assert names["answer"][0]["label"] == NAMES[int(logits[0].argmax())]


def test_each_branch_leaves_as_itself_and_labels_have_a_default(encoders, tmp_path):
    model = build_classifier(encoders / "checkpoint", 12, ("clean", "adv"))
    nn.init.normal_(model.classifier.weight)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state, x = torch.get_rng_state(), pixels(16)
    for branch in ("clean", "adv"):
        folder = save_classifier(model, tmp_path / "out", branch)
        released = AutoModelForImageClassification.from_pretrained(folder).eval()
        with torch.no_grad():
            torch.testing.assert_close(
                released(pixel_values=model.normalize(x)).logits, model.embed(x, branch), **CLOSE
            )
        assert released.config.norm_branch == branch and released.config.id2label[11] == "LABEL_11"
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_a_thousand_classes_are_not_taken_for_imagenet(tmp_path):
    config = {**STOCK["stl"], "image_size": 32, "norm_branches": ("adv",), "head": "classifier", "num_classes": 1000}
    folder = save_classifier(RobustModelForPreTraining(RobustPretrainingConfig(**config)), tmp_path / "out")
    assert AutoModelForImageClassification.from_pretrained(folder).config.id2label[0] == "LABEL_0"


def test_equal_label_names_are_carried(tuned, tmp_path):
    folder = save_classifier(tuned[1]["thin"], tmp_path / "out", label_names=("crane", "crane", "newt"), native=False)
    released = AutoModelForImageClassification.from_pretrained(folder)
    assert released.config.id2label == {0: "crane", 1: "crane", 2: "newt"} and not (folder / "native").exists()


def test_what_cannot_leave_says_why(models, tuned, tmp_path):
    with pytest.raises(ValueError, match=r"head='classifier', this one has a projector.*save_encoder"):
        save_classifier(models["thin"], tmp_path / "out")
    with pytest.raises(ValueError, match=r"each of the 3 classes, got 2 \(cat, dog\)"):
        save_classifier(tuned[1]["thin"], tmp_path / "out", label_names=NAMES[:2])
    with pytest.raises(ValueError, match=r"unknown norm branch 'clean': this model has 'adv'"):
        save_classifier(tuned[1]["thin"], tmp_path / "out", "clean")
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="a classifier is a folder"):
        save_classifier(tuned[1]["thin"], tmp_path / "file")
    adapted = build_classifier(tuned[0] / "thin", 3)
    adapted.backbone.layer1[0].lora_A = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"adapter inside.*without_lora.*save_adapter"):
        save_classifier(adapted, tmp_path / "out")
    levit = RobustModelForPreTraining(
        RobustPretrainingConfig(
            architecture="levit_128s", image_size=224, norm_branches=("adv",), head="classifier", num_classes=3
        )
    )
    with pytest.raises(ValueError, match=r"timm's classifier of LevitDistilled is .*, not one linear layer"):
        save_classifier(levit, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("architecture", ["test_convnext", "test_efficientnet", "mobilenetv3_small_050"])
def test_classifiers_of_other_architectures(tmp_path, architecture):
    torch.manual_seed(0)
    config = {"architecture": architecture, "image_size": 64, "norm_branches": ("adv",), "num_classes": 3}
    model = RobustModelForPreTraining(RobustPretrainingConfig(**config, head="classifier")).eval()
    folder = save_classifier(model, tmp_path / "out", label_names=NAMES)
    released = AutoModelForImageClassification.from_pretrained(folder).eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(released(pixel_values=model.normalize(x)).logits, model.embed(x, "adv"), **CLOSE)
        again = build_classifier(folder, 3)
        torch.testing.assert_close(again.features(x, "adv"), model.features(x, "adv"), rtol=0, atol=0)


def test_a_model_that_transformers_saved_is_read(tuned, tmp_path):
    released = AutoModelForImageClassification.from_pretrained(tuned[0] / "stl")
    fresh = type(released)(released.config)
    fresh.load_state_dict(released.state_dict())
    fresh.save_pretrained(tmp_path / "saved")
    x = pixels(96)
    model = build_classifier(tmp_path / "saved", 5)
    assert torch.equal(model.features(x, "adv"), tuned[1]["stl"].features(x, "adv"))
    assert classifiers.__all__ == ["build_classifier", "has_timm_weights", "save_classifier", "start_from"]
