"""Published with the command, loaded by a stranger without the package: the same features, and no token anywhere."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hub_server import TOKEN, HubServer
from PIL import Image
from released import OURS, STOCK, pictures, trained_model
from safetensors.torch import load_file

from hf_robust.adapters import save_adapter, with_adapter
from hf_robust.classifiers import build_classifier, save_classifier
from hf_robust.evaluation.report import EncoderReport
from hf_robust.hub import save_encoder
from hf_robust.model_card import write_model_card

TESTS = Path(__file__).parent
PUSH = """
import sys
from hf_robust.runs import console, push
for words in sys.argv[1].split(";"):
    console.run_or_exit(push.main, words.split(), prog="hf-robust push")
import huggingface_hub
from huggingface_hub import HfApi
api = HfApi()
name = api.create_repo("robust/data", repo_type="dataset").repo_id
api.upload_folder(repo_id=name, repo_type="dataset", folder_path=sys.argv[2])
assert sorted(api.list_repo_files("robust/own", revision="main"))
"""


def describe(folder: Path, **more) -> None:
    file = folder / "config.json"
    values = json.loads(file.read_text()) if file.is_file() else {"architecture": "a", "model_type": "peft"}
    report = EncoderReport("x", values["architecture"], values["model_type"], norm_branch="adv", **more)
    report.save(folder)
    write_model_card(report, folder)


def run(arguments: list[str], hub: HubServer, home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = hub.environment(home, **more)
    command = [sys.executable, "-W", "ignore", *arguments]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done


def parquet(folder: Path) -> None:
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageColumn

    folder.mkdir()
    images = [Image.fromarray(np.full((4, 4, 3), k, dtype=np.uint8)) for k in range(4)]
    columns = Features({"image": ImageColumn(), "label": ClassLabel(names=["a", "b"])})
    table = Dataset.from_dict({"image": images, "label": [0, 1, 1, 0]}, features=columns)
    table.to_parquet(folder / "train-00000-of-00001.parquet")


def adapter(encoder: Path, folder: Path) -> Any:
    """An adapter that changes something, and its head."""
    adapted = with_adapter(build_classifier(encoder, 3, ("adv",)), rank=2, alpha=2)
    with torch.no_grad():
        for layer in adapted.lora_layers.values():
            layer.lora_B["default"].weight.normal_(std=0.1)
        adapted.classifier.weight.normal_()
    save_adapter(adapted, folder, str(encoder))
    return adapted


def test_everything_that_is_published_is_loaded_by_a_stranger(tmp_path):
    size, peft = 96, importlib.util.find_spec("peft") is not None  # without it all but the adapter
    stock, own = trained_model(**STOCK["stl"]), trained_model(**{**OURS["thin"], "image_size": size})
    classifier = trained_model(**{**STOCK["stl"], "head": "classifier", "num_classes": 3})
    parts = ("stock", "own", "classifier", *(["adapter"] if peft else []))
    folders = {name: tmp_path / name for name in parts}
    save_encoder(stock, folders["stock"])
    save_encoder(own, folders["own"])
    save_classifier(classifier, folders["classifier"], label_names=["x", "y", "z"])
    adapted = adapter(folders["stock"], folders["adapter"]) if peft else None
    for name, folder in folders.items():
        start = {"encoder": {"name": "stock"}} if name == "adapter" else {}
        describe(folder, task="classifier" if name in ("classifier", "adapter") else "encoder", **start)
    parquet(tmp_path / "data")
    home, cache = tmp_path / "home", tmp_path / "cache"
    home.mkdir()
    with HubServer() as hub:
        words = [f"{folders[name]} robust/{name} --private" for name in ("stock", "own", "classifier")]
        words += [f"{folders['adapter']} robust/adapter --base_model robust/stock"] if peft else []
        words += [f"{folders['own']} own"]  # the short name of one that is there
        package = str(TESTS.parent)
        done = run(["-c", PUSH, ";".join(words), str(tmp_path / "data")], hub, home, PYTHONPATH=package)
        assert (
            done.stdout.count("Published: ") == len(parts) and done.stdout.count("Everything was there already") == 1
        )
        assert hub.seen("PUT /lfs/") and hub.seen("POST .*/preupload/")
        first = hub.repository("robust/stock").commits[-1].oid
        pixels = torch.from_numpy(pictures(size)).permute(0, 3, 1, 2).float() / 255
        names = {name: f"robust/{name}" for name in (*parts, "data")}
        wish = {**names, "pixels": pixels.tolist(), "package": package, "first_commit": first}
        (home / "wish.json").write_text(json.dumps(wish))
        arguments = [str(TESTS / "hub_stranger.py"), "wish.json", str(tmp_path / "answers.safetensors")]
        run(arguments, hub, home, HF_HOME=str(cache), PYTHONPATH="")
    got = load_file(tmp_path / "answers.safetensors")
    with torch.no_grad():
        expected = {
            "stock": stock.features(pixels, "adv"),
            "own": own.features(pixels, "adv"),
            "classifier": classifier.embed(pixels, "adv"),
        }
        if adapted is not None:
            expected["adapter"] = adapted.embed(pixels, "adv")
    same = {"stock": ("stock", "stock_timm", "at_first"), "own": ("own_code", "own_native", "load_encoder")}
    same |= {"classifier": ("classifier", "load_classifier"), "adapter": ("adapter",)}
    for name, values in expected.items():
        for way in same[name]:
            torch.testing.assert_close(got[way], values, rtol=1e-3, atol=1e-4, msg=lambda m, w=way: f"{w}: {m}")
    assert got["data"].tolist() == [0, 1, 1, 0] and got["data_pixels"].tolist() == [0, 3, 6, 9]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []
