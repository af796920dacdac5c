"""Runs that begin at a teacher: its network becomes the run's, from the command line to the exported encoder."""

from __future__ import annotations

import json
import re

import pytest
import torch
from training import tiny_model, tiny_vit

from hf_robust.cli import parse_pretrain
from hf_robust.hub import save_encoder
from hf_robust.objectives.simclr import SimCLR
from hf_robust.runs import pretrain
from hf_robust.runs.students import begin_at_teacher
from hf_robust.teachers import load_teacher

NETWORK = {"channels": [8, 8, 8, 8], "stem_stride": 2}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    model = tiny_model(SimCLR(), seed=3, mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5), image_size=8)
    return str(save_encoder(model, tmp_path_factory.mktemp("students") / "encoder", branch="clean"))


def parsed(*flags):
    return parse_pretrain([*flags, "--report_to", "none"])


@pytest.mark.parametrize("method", ["deacl", "fare"])
def test_the_network_of_the_run_is_that_of_the_teacher(teacher, method):
    run, student = begin_at_teacher(parsed("--objective", method, "--teacher", teacher))
    assert (run.model.backbone, run.model_args) == ("resnet10_cifar", NETWORK)
    assert student.config.image_size == 8 and student.config.mean == (0.1, 0.2, 0.3)
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(student.embed(x, "adv"), load_teacher(teacher)(x))


def test_methods_that_start_from_scratch_keep_theirs(teacher):
    for flags in (["--objective", "acl"], ["--objective", "deacl", "--teacher", teacher, "--student_scratch", "true"]):
        run = parsed(*flags)
        assert begin_at_teacher(run) == (run, None)


def test_another_backbone_than_the_teachers_is_refused(teacher):
    flags = ["--teacher", teacher, "--backbone", "resnet34_cifar"]
    with pytest.raises(ValueError, match=r"--backbone resnet34_cifar, and DeACL .* a resnet10_cifar: .*scratch true"):
        begin_at_teacher(parsed("--objective", "deacl", *flags))
    with pytest.raises(ValueError, match=r"FARE starts from its teacher, .*: leave --backbone out$"):
        begin_at_teacher(parsed("--objective", "fare", *flags))
    begin_at_teacher(parsed("--objective", "fare", "--teacher", teacher, "--backbone", "resnet10_cifar"))


@pytest.mark.parametrize(
    ("flag", "value"), [("normalize", "false"), ("projector_layers", "2"), ("projector_dim", "4")]
)
def test_what_the_teacher_decides_is_not_silently_ignored(teacher, flag, value):
    with pytest.raises(ValueError, match=rf"--{flag} .*, and DeACL takes the network .*leave --{flag} out, or give"):
        begin_at_teacher(parsed("--objective", "deacl", "--teacher", teacher, f"--{flag}", value))


def test_a_transformer_may_be_called_by_the_name_it_was_trained_under(tmp_path):
    teacher = str(save_encoder(tiny_model(SimCLR(), **tiny_vit()), tmp_path / "encoder", branch="clean"))
    flags = ["--objective", "fare", "--teacher", teacher, "--backbone"]
    run, _ = begin_at_teacher(parsed(*flags, "vit_tiny_patch4_32"))
    assert run.model.backbone == "vit_tiny_patch16_224" and run.model_args["depth"] == 2
    with pytest.raises(ValueError, match="is a vit_tiny_patch16_224: leave --backbone out"):
        begin_at_teacher(parsed(*flags, "vit_small_patch16_224"))


def test_a_run_from_flags_to_card(tmp_path, teacher, capsys):
    flags = ["--dataset_name", "digits", "--max_examples", "40", "--eval_split", "", "--disable_tqdm", "true"]
    flags += ["--per_device_train_batch_size", "16", "--max_steps", "2", "--steps", "1", "--adapter_rank", "2"]
    flags += ["--save_strategy", "no", "--report_to", "none", "--output_dir", str(tmp_path)]
    pretrain.main(["--objective", "fare", "--teacher", teacher, *flags])
    assert f"teacher: {teacher}" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["objective"]["parameters"]["adapter_rank"] == 2
    assert re.fullmatch(r"[^/]+/encoder", report["objective"]["parameters"]["teacher"])  # no path of this machine
    exported = load_teacher(tmp_path / "encoder")
    assert exported(torch.rand(2, 3, 8, 8)).shape == (2, 8)
    assert "schlarmann2024robust" in (tmp_path / "README.md").read_text()
