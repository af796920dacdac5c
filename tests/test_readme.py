"""The README's commands name files that exist, and its Python runs (shortened)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from hf_robust import build_classifier, save_adapter, with_adapter

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


def test_files_and_pictures_exist():
    commands = "\n".join(blocks("bash"))
    assert "RESULTS_TABLE" not in TEXT and "NUMBERS" not in TEXT
    links = re.findall(r"\]\(([\w./-]+)\)", TEXT)
    for path in [*re.findall(r"examples/[\w./]+\.(?:py|yaml)", commands), *links]:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("marker", ["install", "test"])
def test_commands_that_ci_reads_follow_their_markers(marker):
    assert re.search(rf"^<!-- ci:{marker} -->\n```bash\n.+\n```", TEXT, flags=re.MULTILINE)


def shortened(code: str, changes: dict[str, str]) -> str:
    """The code with every change made; each must apply."""
    for old, new in changes.items():
        assert old in code, old
        code = code.replace(old, new)
    return code


@pytest.mark.filterwarnings("default")
def test_python_runs(tmp_path, monkeypatch):
    load, use, adapter, tune, judge, train = blocks("python")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    quick = "max_steps=1, report_to='none', save_strategy='no'"
    exec(shortened(train, {"num_train_epochs=12": quick, "probe()": "probe(n_train=30, n_eval=20)"}), names)
    exec(shortened(load, {"outputs/digits": "outputs/mine"}), names)
    assert names["encoder"].config.norm_branch == "adv"
    changes = {
        "num_train_epochs=12, auto_lr_epochs=[4, 8]": f"validation_steps=1, {quick}",
        "outputs/digits/encoder": "outputs/mine/encoder",
        'load_image_dataset("digits")': 'load_image_dataset("digits", max_examples=200)',
        '"digits", "test"': '"digits", "test", max_examples=20',
    }
    exec(shortened(tune, changes), names)
    exec(shortened(use, {"outputs/digits_finetune": "outputs/tuned"}), names)
    exec(shortened(judge, {"outputs/digits_finetune": "outputs/tuned", "n_examples=100": "n_examples=20"}), names)
    assert names["report"].n == 20 and set(names["report"].intervals) == set(names["report"].metrics)
    images = [Image.new("RGB", (32, 32), colour) for colour in ("black", "white")]
    assert [len(answer) for answer in names["classify"](images, top_k=3)] == [3, 3]
    small = with_adapter(build_classifier("outputs/mine/encoder", 10), rank=2)
    save_adapter(small, "outputs/adapter_run/adapter", "outputs/mine/encoder")
    exec(shortened(adapter, {"DIR_OR_REPO": "outputs/mine/encoder"}), names)
    assert names["classifier"].get_nb_trainable_parameters()[0] == 0
