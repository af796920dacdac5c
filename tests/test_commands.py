"""The command `hf-robust` opens the doors that the examples open."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path

import pytest
import torch

import hf_robust
from hf_robust import commands
from hf_robust.runs import console, evaluate, finetune, pretrain

ROOT = Path(hf_robust.__file__).parents[1]


@pytest.mark.parametrize(("name", "module"), [("pretrain", pretrain), ("finetune", finetune), ("evaluate", evaluate)])
def test_a_command_is_the_run_of_its_example(name, module, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "main", lambda argv, **parsing: seen.append((argv, parsing["prog"])))
    commands.main([name, "--dataset_name", "digits", "--seed", "3"])
    assert seen == [(["--dataset_name", "digits", "--seed", "3"], f"hf-robust {name}")]


@pytest.mark.parametrize("name", list(commands.COMMANDS))
def test_a_command_has_its_own_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        commands.main([name, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.startswith(f"usage: hf-robust {name} ")
    assert commands.COMMANDS[name][1].split(";")[0] in " ".join(text.split())


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (
            ["pretrian"],
            2,
            "unknown command 'pretrian': did you mean 'pretrain'? known are pretrain, finetune, evaluate",
        ),
        (["pretrain"], 2, "nothing to train on: name images with --dataset_name"),
        (["pretrain", "--objective", "acl"], 2, "nothing to train on"),
        (["pretrain", "--dataset_name", "digits", "--objective", "acll"], 2, "hf-robust pretrain: error: unknown obj"),
        (["finetune", "--mode", "slf"], 2, "hf-robust finetune: error: --encoder is missing"),
        (["evaluate"], 2, "hf-robust evaluate: error: --model is missing"),
        ([], 2, "usage: hf-robust COMMAND"),
        (["--help"], 0, "evaluate  Measure a classifier"),
    ],
)
def test_mistakes_and_help_end_with_a_status(argv, status, message, capsys):
    with pytest.raises(SystemExit) as stop:
        commands.main(argv)
    captured = capsys.readouterr()
    assert stop.value.code == status and message in captured.out + captured.err


def test_an_error_of_the_run_is_one_message(monkeypatch):
    def broken(argv, **_):
        raise ImportError("AutoAttack needs the package pyautoattack")

    monkeypatch.setattr(evaluate, "main", broken)
    with pytest.raises(SystemExit) as stop:
        commands.main(["evaluate", "--model", "x"])
    assert stop.value.code == "error: AutoAttack needs the package pyautoattack"
    with pytest.raises(ZeroDivisionError):  # a mistake of ours keeps its traceback
        console.run_or_exit(lambda argv, **_: 1 / 0)


def test_ctrl_c_says_how_to_go_on(capsys):
    def stopped(argv, **_):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        console.run_or_exit(stopped)
    assert stop.value.code == 130 and "--resume_from_checkpoint true" in capsys.readouterr().err


def test_the_version_and_the_entry_point(capsys):
    commands.main(["--version"])
    assert capsys.readouterr().out == f"hf_robust {hf_robust.__version__}\n"
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"hf-robust": "hf_robust.commands:main"}


def test_it_starts_as_a_module_without_importing_torch():
    code = "import sys, hf_robust.commands; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    done = subprocess.run([sys.executable, "-m", "hf_robust.commands", "version"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0 and done.stdout.startswith(b"hf_robust ")


def test_a_finished_run_leaves_its_process_group(tmp_path):
    """Threads of a group that outlives the interpreter take a finished process down now and then."""
    store = f"file://{tmp_path / 'store'}"
    main = partial(torch.distributed.init_process_group, "gloo", init_method=store, rank=0, world_size=1)
    console.run_or_exit(lambda argv: main())
    assert not torch.distributed.is_initialized()
    console.run_or_exit(lambda argv: None)  # and one without a group ends as before
