"""Where numbers come from: nothing secret in the command line, an honest commit, and never an exception."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import hf_robust
from hf_robust.evaluation import environment
from hf_robust.evaluation.environment import collect_environment, command_line, redact

TOKEN = "hf_" + "aB3" * 11 + "Z"


@pytest.mark.parametrize(
    "argv",
    [
        ["--hub_token", "plainsecret"],
        ["--hub-token=plainsecret"],
        ["hub_token=plainsecret"],
        ["--api_key", "plainsecret"],
        ["--wandb.password", "plainsecret"],
        ["--note", TOKEN],
        [f"--encoder=/data/{TOKEN}/x"],
        ["--data", "https://ann:plainsecret@example.org/x"],
        [f'{{"token": "{TOKEN}"}}'],
    ],
)
def test_no_secret_survives(argv: list[str]) -> None:
    text = command_line(["pretrain.py", "--eps", "8/255", *argv, "--max_steps", "2"])
    assert "plainsecret" not in text and TOKEN not in text and "REDACTED" in text
    assert "--eps 8/255" in text and text.endswith("--max_steps 2")


def test_what_is_no_secret_stays_as_typed() -> None:
    argv = ["--tokenizer", "name", "--push_to_hub", "--hub_token", "--output_dir", "my run", "--key", "value"]
    text = command_line(["examples/pretrain.py", *argv])
    assert shlex.split(text) == ["python", "examples/pretrain.py", *argv]
    assert redact("hf_robust hf_robust_timm hf_robustness") == "hf_robust hf_robust_timm hf_robustness"


@pytest.mark.parametrize(
    ("program", "start"),
    [
        ("/opt/venv/bin/hf-robust", "hf-robust"),
        ("/opt/venv/site-packages/hf_robust/__main__.py", "python -m hf_robust"),
        (str(Path(hf_robust.__file__).parent / "runs" / "card.py"), "python -m hf_robust.runs.card"),
        (str(Path.cwd() / "examples" / "pretrain.py"), "python examples/pretrain.py"),
        ("/elsewhere/secret-project/train.py", "python train.py"),
    ],
)
def test_the_program_is_named_without_its_folders(program: str, start: str) -> None:
    assert command_line([program, "--seed", "1"]) == f"{start} --seed 1"


def test_home_folders_become_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/srv/people/ann")
    text = redact("/srv/people/ann/data /srv/people/anna/data /home/bob/x --a=/Users/eve/y")
    assert text == "~/data /srv/people/anna/data ~/x --a=~/y"


def test_this_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "--hub_token", "plainsecret"])
    assert command_line() == "python train.py --hub_token REDACTED"


def test_the_environment_is_plain_and_complete() -> None:
    found = collect_environment()
    assert {"python", "torch", "transformers", "timm", "numpy"} <= set(found["versions"])
    assert found["hardware"]["cores"] == os.cpu_count() and found["hardware"]["cpu"]
    assert found["library_version"] == hf_robust.__version__
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", found["commit"])


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_the_commit_is_that_of_the_source_tree(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert environment._commit(package) is None  # no checkout
    git(tmp_path, "init")
    assert environment._commit(package) is None  # somebody else's checkout: the package is not tracked
    git(tmp_path, "add", ".")
    assert environment._commit(package) is None  # no commit yet
    git(tmp_path, "commit", "-m", "one")
    commit = environment._commit(package)
    assert commit is not None and re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "report.json").write_text("{}")
    assert environment._commit(package) == commit  # results beside the source change nothing
    (package / "new.py").write_text("")
    assert environment._commit(package) == f"{commit}-dirty"
    (package / "new.py").unlink()
    (package / "__init__.py").write_text("x = 1")
    assert environment._commit(package) == f"{commit}-dirty"


def test_a_machine_without_git_or_driver_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("not here")

    monkeypatch.setattr("subprocess.run", fail)
    monkeypatch.setattr("torch.cuda.is_available", fail)
    monkeypatch.setattr(Path, "read_text", fail)
    found = collect_environment()
    assert found["commit"] is None and "driver" in found["hardware"]["gpu"]
