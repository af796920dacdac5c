"""The README's commands name files that exist, and its Python runs (shortened)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


def test_files_and_pictures_exist():
    commands = "\n".join(blocks("bash"))
    assert "RESULTS_TABLE" not in TEXT
    links = re.findall(r"\]\(([\w./-]+)\)", TEXT)
    for path in [*re.findall(r"examples/[\w./]+\.(?:py|yaml)", commands), *links]:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("marker", ["install", "test"])
def test_commands_that_ci_reads_follow_their_markers(marker):
    assert re.search(rf"^<!-- ci:{marker} -->\n```bash\n.+\n```", TEXT, flags=re.MULTILINE)


@pytest.mark.filterwarnings("default")
def test_python_runs(tmp_path, monkeypatch):
    load, train = blocks("python")
    short = {
        "num_train_epochs=12": "max_steps=1, report_to='none', save_strategy='no'",
        "trainer.probe()": "trainer.probe(n_train=30, n_eval=20)",
    }
    for old, new in short.items():
        assert old in train
        train = train.replace(old, new)
    assert "outputs/digits/encoder" in load
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(train, names)
    exec(load.replace("outputs/digits", "outputs/mine"), names)
    assert names["encoder"].config.norm_branch == "adv"
