"""The encoder leaves the house and is read by people who have never heard of it."""

from __future__ import annotations

import errno
import json
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
from released import NATIVE, OURS, STOCK, pictures, pixels, trained_model
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

import hf_robust
from hf_robust import hub, hub_files
from hf_robust.hub import encoder_features, load_encoder, save_encoder
from hf_robust.models.encoder import RobustTimmModel
from hf_robust.models.modeling import RobustModelForPreTraining, RobustPretrainingConfig

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def models() -> dict[str, RobustModelForPreTraining]:
    return {name: trained_model(**config) for name, config in {**STOCK, **OURS}.items()}


@pytest.fixture(scope="module")
def exports(models, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("exports")
    for name, model in models.items():
        save_encoder(model, root / name)
    return root


def expected(models: dict[str, RobustModelForPreTraining], name: str, branch: str = "adv") -> torch.Tensor:
    with torch.no_grad():
        out = models[name].features(pixels(models[name].config.image_size), branch)
    assert out.abs().max() > 0.1
    return out


# What a reader without this package can do, in one process (importing transformers takes seconds).
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
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

root, stock, ours, native = Path(sys.argv[1]), *map(json.loads, sys.argv[2:5])
out, refusals = {}, {}

@torch.no_grad()
def try_all(name, folder, timm_loads=True, trust=None, subfolder=""):
    images = [Image.fromarray(a) for a in np.load(root / f"{name.split('/')[0]}.npy")]
    where = dict(subfolder=subfolder) if subfolder else {}
    trusted = dict(where, trust_remote_code=True) if trust else where
    pixel_values = AutoImageProcessor.from_pretrained(folder, **where)(images, return_tensors="pt")["pixel_values"]
    out[f"{name}/pixel_values"] = pixel_values
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True, **trusted)
    refusals[f"{name}/keys"] = [sorted(info["missing_keys"]), sorted(info["unexpected_keys"])]
    out[f"{name}/auto_model"] = model.eval()(pixel_values).pooler_output
    classifier = AutoModelForImageClassification.from_pretrained(folder, num_labels=10, **trusted).eval()
    net = classifier.timm_model
    out[f"{name}/classifier"] = net.forward_head(net.forward_features(pixel_values), pre_logits=True)
    out[f"{name}/logits"] = classifier(pixel_values).logits
    if not subfolder:
        extractor = pipeline("image-feature-extraction", model=str(folder), trust_remote_code=trust)
        out[f"{name}/pipeline"] = torch.tensor(extractor(images, pool=True)).flatten(1, -2).squeeze(1)
    if timm_loads:
        path = Path(folder) / subfolder
        out[f"{name}/timm"] = timm.create_model(f"local-dir:{path}", pretrained=True).eval()(pixel_values)
        head = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=10).eval()
        out[f"{name}/timm_logits"] = head(pixel_values)

for name in stock:
    try_all(name, root / name)
for name in native:
    try_all(f"{name}/native", root / name, subfolder="native")
for name in ours:
    try:
        AutoModel.from_pretrained(root / name)
    except Exception as error:
        refusals[name] = str(error)
    try_all(name, root / name, timm_loads=False, trust=True)
grey = Image.fromarray(np.zeros((30, 40), dtype=np.uint8))
out["grey"] = AutoImageProcessor.from_pretrained(root / "thin")(grey, return_tensors="pt")["pixel_values"]
assert not any(name.partition(".")[0] == "hf_robust" for name in sys.modules)
save_file({key: value.contiguous() for key, value in out.items()}, root / "stranger.safetensors")
(root / "stranger.json").write_text(json.dumps(refusals))
"""


@pytest.fixture(scope="module")
def stranger(models, exports, tmp_path_factory) -> dict[str, Any]:
    """Results of a process that cannot import hf_robust, cannot reach the Hub and has empty caches."""
    for name, model in models.items():
        np.save(exports / f"{name}.npy", pictures(model.config.image_size))
    cache = tmp_path_factory.mktemp("home")
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))},
        **{"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "HF_MODULES_CACHE": str(cache / "modules")},
        "OMP_NUM_THREADS": "1",
    }
    arguments = [str(exports), *(json.dumps(list(names)) for names in (STOCK, OURS, NATIVE))]
    script = exports / "stranger.py"
    script.write_text(STRANGER)
    run = subprocess.run(
        [sys.executable, "-I", str(script), *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    tensors = safetensors.torch.load_file(exports / "stranger.safetensors")
    return {**tensors, **json.loads((exports / "stranger.json").read_text())}


@pytest.mark.parametrize("name", [*STOCK, *OURS, *(f"{name}/native" for name in NATIVE)])
def test_a_stranger_gets_the_features_of_the_training_model(models, stranger, name):
    training = name.removesuffix("/native")
    features = expected(models, training)
    assert stranger[f"{name}/keys"] == [[], []]
    found = [
        f"{name}/{kind}" for kind in ("auto_model", "classifier", "pipeline", "timm") if f"{name}/{kind}" in stranger
    ]
    assert len(found) == (3 if training in OURS else 4)
    for key in found:
        torch.testing.assert_close(stranger[key], features, **CLOSE, msg=lambda text, key=key: f"{key}: {text}")
    assert stranger[f"{name}/logits"].shape == (2, 10)
    if training in STOCK:
        assert stranger[f"{name}/timm_logits"].shape == (2, 10)


@pytest.mark.parametrize("name", [*STOCK, *OURS])
def test_the_image_processor_of_a_stranger_does_what_the_first_layer_did(models, stranger, name):
    normalized = models[name].normalize(pixels(models[name].config.image_size))
    torch.testing.assert_close(stranger[f"{name}/pixel_values"], normalized, rtol=1e-6, atol=1e-6)


def test_the_native_processor_enlarges_four_times(models, stranger):
    normalized = models["thin"].normalize(pixels(16))
    enlarged = normalized.repeat_interleave(4, -1).repeat_interleave(4, -2)
    torch.testing.assert_close(stranger["thin/native/pixel_values"], enlarged, rtol=1e-6, atol=1e-6)


def test_grey_pictures_of_another_size_pass_the_processor(stranger):
    assert stranger["grey"].shape == (1, 3, 16, 16)


@pytest.mark.parametrize("name", OURS)
def test_a_stranger_who_does_not_trust_our_code_is_told_what_to_do(stranger, name):
    assert "trust_remote_code=True" in stranger[name]
    assert "version of timm" not in stranger[name]


@pytest.mark.parametrize("name", [*STOCK, *OURS])
def test_plain_doors_once_the_package_is_imported(models, exports, name):
    folder = exports / name
    pixel_values = AutoImageProcessor.from_pretrained(folder)(
        list(pictures(models[name].config.image_size)), return_tensors="pt"
    )["pixel_values"]
    model = AutoModel.from_pretrained(folder).eval()
    classifier = AutoModelForImageClassification.from_pretrained(folder, num_labels=10).eval()
    net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert isinstance(model, RobustTimmModel) == (name in OURS)
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values).pooler_output, expected(models, name), **CLOSE)
        torch.testing.assert_close(net(pixel_values), expected(models, name), **CLOSE)
        assert classifier(pixel_values).logits.shape == (2, 10)


@pytest.mark.parametrize("branch", ["clean", "adv"])
@pytest.mark.parametrize("name", ["thin", "vit"])
def test_each_branch_leaves_as_itself(models, tmp_path, name, branch):
    encoder = load_encoder(save_encoder(models[name], tmp_path / "encoder", branch))
    assert encoder.config.norm_branch == branch
    x = pixels(16)
    with torch.no_grad():
        torch.testing.assert_close(encoder_features(encoder)(x), models[name].features(x, branch), **CLOSE)
    if name == "thin":
        assert (expected(models, name, "clean") - expected(models, name, "adv")).abs().max() > 1e-2


def test_unknown_branch_lists_the_known_ones(models, tmp_path):
    with pytest.raises(ValueError, match=r"unknown norm branch 'main'.*'clean', 'adv'.*branch='clean'"):
        save_encoder(models["tiny"], tmp_path / "encoder", "main")
    single = RobustModelForPreTraining(RobustPretrainingConfig(**{**OURS["tiny"], "norm_branches": ("clean",)}))
    with pytest.raises(ValueError, match=r"'adv'.*this model has 'clean'"):
        save_encoder(single, tmp_path / "encoder")
    assert not list(tmp_path.iterdir())
    assert load_encoder(save_encoder(single, tmp_path / "encoder", "clean")).config.norm_branch == "clean"


def test_the_configuration_says_where_the_encoder_comes_from(models, exports):
    for name, model in models.items():
        config = json.loads((exports / name / "config.json").read_text())
        assert config["norm_branch"] == "adv"
        assert config["hf_robust_version"] == hf_robust.__version__
        assert config["image_size"] == model.config.image_size
        assert config["model_type"] == ("hf_robust_timm" if name in OURS else "timm_wrapper")
        assert config["num_features"] == model.num_features
        assert isinstance(config["model_args"], dict)
        assert (exports / name / "preprocessor_config.json").is_file()
        assert (exports / name / "native").is_dir() == (name in NATIVE)
        assert config.get("native_subfolder") == ("native" if name in NATIVE else None)
    native = json.loads((exports / "thin" / "native" / "config.json").read_text())
    assert native["model_type"] == "timm_wrapper" and native["norm_branch"] == "adv"


def test_weights_carry_the_names_of_timm_and_the_format(models, exports):
    for name, model in models.items():
        plain = RobustModelForPreTraining(
            RobustPretrainingConfig(**{**model.config.to_dict(), "norm_branches": ["adv"]})
        )
        with safetensors.safe_open(exports / name / "model.safetensors", framework="pt") as file:
            assert set(file.keys()) == set(plain.backbone.state_dict())
            assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("subfolder", ["", "native"])
@pytest.mark.parametrize("name", NATIVE)
def test_encoder_features_take_pixels_of_any_size_and_give_gradients(models, exports, name, subfolder):
    encoder = load_encoder(exports / name, subfolder=subfolder)
    assert not encoder.training
    features = encoder_features(encoder)
    x = torch.rand(2, 3, 20, 12, generator=torch.Generator().manual_seed(2)).requires_grad_()
    mine = features(x)
    training = models[name].features(x, "adv")
    torch.testing.assert_close(mine, training, **CLOSE)
    mine.sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0


def test_encoder_features_refuse_what_they_cannot_know(exports):
    encoder = load_encoder(exports / "tiny")
    with pytest.raises(ValueError, match=r"floats in \[0, 1\], got torch.uint8: write images.float\(\) / 255"):
        encoder_features(encoder)(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    del encoder.config.pretrained_cfg
    with pytest.raises(ValueError, match=r"pass mean=\(\.\.\.\) and std"):
        encoder_features(encoder)
    own = encoder_features(encoder, mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0))
    assert own(torch.rand(1, 3, 16, 16)).shape == (1, 8)


def test_saving_changes_neither_the_model_nor_the_random_numbers(models, tmp_path):
    model = models["thin"].train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    save_encoder(model, tmp_path / "encoder")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    model.eval()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("fails_at", range(8))
def test_a_full_disk_leaves_the_previous_export_intact(models, tmp_path, monkeypatch, fails_at):
    target = save_encoder(models["thin"], tmp_path / "encoder", "clean")
    before, calls, write = contents(tmp_path), [], hub_files._write_file

    def full_disk(path: Path, data: bytes) -> None:
        calls.append(path)
        if len(calls) > fails_at:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, data)

    monkeypatch.setattr(hub_files, "_write_file", full_disk)
    with pytest.raises(
        OSError, match=r"cannot write the encoder.*No space left.*intact: make \d\.\d MB of room"
    ) as caught:
        save_encoder(models["thin"], target)
    assert caught.value.errno == errno.ENOSPC
    assert len(calls) == fails_at + 1
    assert contents(tmp_path) == before  # nothing changed, nothing left over beside it
    assert load_encoder(target).config.norm_branch == "clean"


def test_a_failed_first_export_leaves_no_folder(models, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="an encoder is a folder"):
        save_encoder(models["tiny"], tmp_path / "file")
    with pytest.raises(OSError, match="cannot write the encoder"):
        save_encoder(models["tiny"], tmp_path / "file" / "encoder")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_export_over_another_one_leaves_nothing_stale(models, tmp_path):
    target = save_encoder(models["thin"], tmp_path / "encoder")
    (target / "README.md").write_text("mine")
    assert (target / "native").is_dir() and (target / "encoder.py").is_file()
    save_encoder(models["thin"], target, native=False)
    assert not (target / "native").exists() and (target / "encoder.py").is_file()
    save_encoder(models["vit"], target)
    names = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert sorted(contents(tmp_path / "encoder")) == names
    assert load_encoder(target).config.architecture == "vit_tiny_patch16_224"


def test_load_encoder_opens_no_pickle(models, exports, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load was called"))
    assert load_encoder(str(exports / "stl")).config.norm_branch == "adv"
    with pytest.raises(ValueError, match="safetensors only"):
        load_encoder(exports / "stl", use_safetensors=False)


def test_load_encoder_says_what_is_wrong(models, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no folder '.*nowhere': write the path of a folder written by save"):
        load_encoder(tmp_path / "nowhere")
    run = tmp_path / "run"
    encoder = save_encoder(models["tiny"], run / "encoder")
    with pytest.raises(ValueError, match=r"no config.json: its encoder is in '.*run/encoder'"):
        load_encoder(run)
    with pytest.raises(FileNotFoundError, match="no folder '.*native'"):
        load_encoder(encoder, subfolder="native")
    models["tiny"].save_pretrained(run / "checkpoint-1")
    with pytest.raises(ValueError, match=r"training checkpoint.*'encoder' folder of its run.*save_encoder\("):
        load_encoder(run / "checkpoint-1")
    monkeypatch.setattr(hub.AutoModel, "from_pretrained", _offline)
    with pytest.raises(FileNotFoundError, match=r"no encoder 'out/encoder': there is no such folder, and.*offline"):
        load_encoder("out/encoder")


def _offline(*args: Any, **kwargs: Any) -> None:
    raise OSError("offline mode is enabled\nmore lines")


def test_load_encoder_finds_damage(models, tmp_path):
    encoder = save_encoder(models["tiny"], tmp_path / "encoder")
    weights, config = encoder / "model.safetensors", encoder / "config.json"
    whole = weights.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"x" * 100):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model.safetensors' is damaged or incomplete .*download it again"):
            load_encoder(encoder)
    tensors = safetensors.torch.load(whole)
    del tensors["layer1.0.conv1.weight"]
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 tensors of resnet10_cifar.*layer1.0.conv1.weight.*stay random"):
        load_encoder(encoder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"no model.safetensors but no weights at all"):
        load_encoder(encoder)
    torch.save(tensors, encoder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only pytorch_model.bin, which could run code when opened"):
        load_encoder(encoder)
    config.write_text(config.read_text()[:50])
    with pytest.raises(ValueError, match=r"config.json' is not a configuration"):
        load_encoder(encoder)
