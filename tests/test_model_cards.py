"""What `model_cards/` publishes: cards that come from their reports byte for byte, weights that load as they say."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from card_reports import validate_card
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

import hf_robust  # noqa: F401 - registers the architectures
from hf_robust.evaluation.report import EncoderReport
from hf_robust.runs.card import read_report, stale_files

CARDS = Path(__file__).parent.parent / "model_cards"
FOLDERS = sorted(path for path in CARDS.iterdir() if path.is_dir())
LARGEST = 6 * 2**20  # bytes of one folder: weights of larger encoders live on the Hub alone
ABSOLUTE = re.compile(r"(?<![\w.~:/<])/(?:[\w.-]+/)+[\w.-]*")

every_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the picture that the loading examples open."""
    folder = tmp_path_factory.mktemp("photo")
    pixels = torch.arange(48 * 64 * 3, dtype=torch.uint8).reshape(48, 64, 3)
    Image.fromarray(pixels.numpy()).save(folder / "photo.png")
    return folder


def loading_examples(folder: Path) -> list[str]:
    """The Python of the card, with the folder in the place of the repository."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    name = read_report(folder).hub_id or "PATH_OR_REPO"
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks and all(f'"{name}"' in block for block in blocks)
    return [block.replace(f'"{name}"', repr(str(folder))) for block in blocks]


def test_something_is_published_and_the_index_names_it():
    assert FOLDERS
    index = (CARDS / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\(([\w.-]+)/\)", index)) == {folder.name for folder in FOLDERS}


@every_folder
def test_the_card_is_what_its_report_gives(folder, tmp_path):
    report = read_report(folder)
    assert stale_files(report, folder) == []
    assert report.save(tmp_path).read_bytes() == (folder / "report.json").read_bytes()


@every_folder
def test_a_number_that_changes_in_the_report_makes_the_card_stale(folder):
    report = EncoderReport.load(folder)
    own = next(result for result in report.results if result["model"] == report.name)
    own["metrics"]["standard_accuracy"] = 0.123456
    assert "README.md" in stale_files(report, folder)


@every_folder
def test_the_card_passes_the_validation_of_the_hub(folder, monkeypatch):
    data = validate_card((folder / "README.md").read_text(encoding="utf-8"), monkeypatch).data
    assert data.license and data.eval_results


@every_folder
def test_the_weights_load_and_give_finite_features(folder, photo):
    encoder, information = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not information["missing_keys"] and not information["unexpected_keys"]
    processor = AutoImageProcessor.from_pretrained(folder)
    images = [Image.open(photo / "photo.png"), Image.new("RGB", (32, 32), "white")]
    with torch.no_grad():
        features = encoder.eval()(**processor(images, return_tensors="pt")).pooler_output.flatten(1)
    assert features.shape == (2, encoder.config.num_features) and torch.isfinite(features).all()
    assert not torch.allclose(features[0], features[1])


@pytest.fixture(scope="module")
def found_by_strangers(photo, tmp_path_factory) -> list[dict[str, Any]]:
    """Folder and features of every loading example that does without us, run by a reader who has never heard of us."""
    lines = ["import json, sys", "sys.modules['hf_robust'] = None"]
    for folder in FOLDERS:
        for block in loading_examples(folder):
            told = f"print(json.dumps({{'folder': {folder.name!r}, 'features': features.flatten().tolist()}}))"
            lines += [] if "import hf_robust" in block else [block, told]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules"))}
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, env=environment, cwd=photo, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@every_folder
def test_the_loading_examples_run_as_they_stand(folder, photo, found_by_strangers, monkeypatch):
    monkeypatch.chdir(photo)
    found = [torch.tensor(found["features"]) for found in found_by_strangers if found["folder"] == folder.name]
    for block in loading_examples(folder):
        if "import hf_robust" in block:
            names: dict[str, Any] = {}
            exec(block, names)
            found.append(names["features"].flatten())
    assert len(found) == len(loading_examples(folder))
    for other in found:
        assert torch.isfinite(other).all()
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-5)


@every_folder
def test_nothing_of_the_machine_is_in_it(folder):
    for name in ("README.md", "report.json", "config.json", "preprocessor_config.json"):
        text = (folder / name).read_text(encoding="utf-8")
        assert ABSOLUTE.findall(text) == [] and socket.gethostname() not in text


@every_folder
def test_every_picture_is_there_and_shown(folder):
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (folder / "README.md").read_text(encoding="utf-8"))
    assert set(shown) == {path.name for path in folder.glob("*.png")} and len(shown) == len(set(shown))
    for name in shown:
        with Image.open(folder / name) as picture:
            picture.verify()
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < LARGEST
