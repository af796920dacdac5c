"""Flags of cheaper attacks: on the command line, in a file, beside those of the published attack."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest

from hf_robust.attack_flags import AttackArguments
from hf_robust.attack_schedules import PUBLISHED, SCHEDULES, with_schedule
from hf_robust.attacks import PGD
from hf_robust.cli import parse_pretrain
from hf_robust.finetune_cli import parse_finetune
from hf_robust.objectives.aff import AFF

DECAY3 = PGD(step_sizes=(8 / 255, 4 / 255, 2 / 255))


@pytest.fixture
def config(tmp_path):
    def write(*lines):
        path = tmp_path / "run.yaml"
        path.write_text("\n".join(lines) + "\n")
        return f"--config={path}"

    return write


def parsed(*argv):
    return parse_pretrain([*argv]).attack


def test_the_choices_are_the_schedules():
    choices = get_args(get_type_hints(AttackArguments)["attack_schedule"])
    assert set(choices) == {PUBLISHED, *SCHEDULES} and choices[0] == AttackArguments().attack_schedule == PUBLISHED


def test_flags_and_files_reach_the_attack(config):
    assert parsed() == parsed("--attack_schedule", "published") == PGD()
    assert parsed("--attack_schedule", "decay3") == DECAY3
    assert parsed("--attack_schedule", "decay3", "--eps", "4/255") == with_schedule(PGD(4 / 255), "decay3")
    assert parsed("--attack_step_sizes", "8/255", "4/255", "2/255") == DECAY3
    assert parsed("--attack_replay", "true", "--attack_min_gain", "0.03") == PGD(replay=True, min_gain=0.03)
    written = config("attack_schedule: decay3", "attack_replay: true", "attack_min_gain: 0.1")
    assert parsed(written) == PGD(step_sizes=DECAY3.sizes, replay=True, min_gain=0.1)
    assert parsed(written, "--attack_schedule", "published").steps == 5
    assert parsed(config("attack_step_sizes: [8/255, 4/255, 2/255]")) == DECAY3
    assert parsed(config("steps: 7", "step_size: 1/255"), "--attack_schedule", "decay3") == DECAY3  # flags override
    assert parsed("--attack_schedule", "decay3", "--steps", "3") == DECAY3


def test_a_mode_of_fine_tuning_keeps_its_start_and_gives_up_its_steps():
    argv = ["--encoder", "x", "--mode", "aff"]
    found = parse_finetune([*argv, "--attack_schedule", "decay5"]).attack
    assert found == with_schedule(AFF.training_attack, "decay5")
    assert (found.steps, found.start_std) == (5, 0.001)
    assert parse_finetune(argv).attack == AFF.training_attack


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--attack_schedule", "decay3", "--steps", "5"],
            "--steps 5 contradicts --attack_schedule decay3, which is P",
        ),
        (["--attack_step_sizes", "0.1", "--step_size", "0.2"], "--step_size 0.2 contradicts --attack_step_sizes"),
        (["--attack_schedule", "decay3", "--attack_step_sizes", "0.1"], "both say how long the steps are: leave one"),
        (["--attack_schedule", "decay4"], "invalid choice: 'decay4'"),
        (["--attack_step_sizes", "eight"], "cannot read 'eight' as a pixel budget"),
        (["--attack_min_gain", "2"], r"min_gain must be in \[0, 1\), got 2"),
    ],
)
def test_contradictions_are_errors(capsys, argv, message):
    with pytest.raises(SystemExit):
        parsed(*argv)
    assert pytest.importorskip("re").search(message, capsys.readouterr().err)


def test_a_file_that_contradicts_itself_is_an_error(capsys, config):
    with pytest.raises(SystemExit):
        parsed(config("attack_schedule: decay3", "steps: 10"))
    assert "--steps 10 contradicts --attack_schedule decay3" in capsys.readouterr().err
