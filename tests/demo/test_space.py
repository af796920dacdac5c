"""The demo as a folder for a Space: what is in it, what is not, and that it runs with nothing but itself."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from exhibits import digits_run
from huggingface_hub import SpaceCard

from hf_robust.demo.space import REQUIREMENTS
from hf_robust.runs import demo

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    digits_run(folder / "outputs" / "digits")
    return folder


@pytest.fixture(scope="module")
def space(outputs):
    before = os.getcwd()
    os.chdir(outputs)
    try:
        demo.main(["--space_dir", "space", "--probe_images", "100"])
    finally:
        os.chdir(before)
    return outputs / "space"


def test_it_holds_program_models_and_card_and_nothing_of_this_machine(space, outputs):
    names = {str(p.relative_to(space)) for p in space.rglob("*") if p.is_file()}
    assert {"app.py", "requirements.txt", "README.md", "models/robust/model.safetensors"} <= names
    assert {"models/plain/config.json", "models/plain/model.safetensors", "hf_robust/runs/demo.py"} <= names
    assert not [name for name in names if name.endswith((".pt", ".bin", ".pyc")) or "optimizer" in name]
    for file in (space / "app.py", space / "README.md", *space.glob("models/*/*.json")):
        assert str(outputs) not in file.read_text()
    card = SpaceCard.load(space / "README.md")
    assert (card.data.sdk, card.data.app_file, len(card.data.short_description) <= 60) == ("gradio", "app.py", True)
    assert "- robust model: ACL resnet10_cifar digits\n- plain model: SimCLR\n" in card.text
    if find_spec("gradio"):
        assert card.data.sdk_version == importlib.metadata.version("gradio")


def test_requirements_are_those_of_the_package(space):
    assert set(REQUIREMENTS) <= set(PROJECT["dependencies"])
    assert (space / "requirements.txt").read_text().split() == list(REQUIREMENTS)


def test_it_runs_with_nothing_but_itself(space, tmp_path):
    """Up to the page; the page itself is seen in the browser's test."""
    allowed = {line.partition(">")[0].replace("-", "_").lower() for line in REQUIREMENTS}
    code = (
        "import sys, app, hf_robust\n"
        f"assert hf_robust.__file__.startswith({str(space)!r}), hf_robust.__file__\n"
        "from hf_robust.runs import demo\n"
        "run = demo.parse_demo(app.ARGUMENTS)\n"
        "exhibit = demo.make_exhibit(run, demo.chosen_models(run))\n"
        "assert exhibit.titles['plain'] == 'SimCLR, linear probe on digits', exhibit.titles\n"
        "from hf_robust.demo.page import answer\n"
        "from hf_robust.demo.rendering import to_picture\n"
        "said = answer(exhibit, to_picture(exhibit.examples[0].image / 255, 1), 'pgd', 'linf', 8, 2)\n"
        "assert all(said), said\n"
        "print('OK', *[m for m in ('matplotlib', 'tensorboard', 'pyautoattack') if m in sys.modules])\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=space, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("OK\n"), done.stdout + done.stderr
    assert {"torch", "transformers", "timm", "pillow"} <= allowed


def test_a_second_writing_replaces_the_first_but_no_other_folder(space, outputs, tmp_path, monkeypatch):
    monkeypatch.chdir(outputs)
    (space / "models" / "old").mkdir()
    demo.main(["--space_dir", "space"])
    assert not (space / "models" / "old").exists() and "5000" in (space / "app.py").read_text()
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files and no Space"):
        demo.main(["--space_dir", str(tmp_path)])
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_what_a_space_could_not_have_is_refused(outputs, tmp_path, monkeypatch):
    monkeypatch.chdir(outputs)
    with pytest.raises(ValueError, match="is a folder of this machine, which a Space does not have"):
        demo.main(["--space_dir", str(tmp_path / "a"), "--dataset_name", str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="--images 'none.png' is not there"):
        demo.main(["--space_dir", str(tmp_path / "a"), "--images", "none.png"])
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is an adapter, whose base a Space would not find"):
        demo.main(["--space_dir", str(tmp_path / "a"), "--model", str(adapter)])
    assert not (tmp_path / "a").exists()
