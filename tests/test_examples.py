"""`examples/pretrain.py` as a stranger runs it: a whole tiny run, and every mistake ends in one clear message."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from hf_robust.attacks import frozen
from hf_robust.hub import encoder_features, load_encoder

EXAMPLE = Path(__file__).parents[1] / "examples" / "pretrain.py"
TINY = ["--backbone", "resnet10_cifar", "--model_args", '{"channels": [8, 8, 8, 8], "stem_stride": 2}']
QUICK = [
    *TINY,
    "--max_examples",
    "64",
    "--per_device_train_batch_size",
    "32",
    "--max_steps",
    "2",
    "--report_to",
    "none",
]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("pretrain_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_run_leaves_everything_it_promises(example, tmp_path, capsys):
    folder = tmp_path / "out"
    command = [*QUICK, "--config", str(example.DIGITS), "--output_dir", str(folder)]
    command += ["--save_strategy", "steps", "--save_steps", "1"]
    example.main(command)
    text = capsys.readouterr().out
    assert "ACL: resnet10_cifar" in text and "PGD-20, L-inf 8/255" in text
    for name in ("README.md", "report.json", "curves.png", "examples.png", "encoder/model.safetensors"):
        assert (folder / name).stat().st_size > 0, name
    report = json.loads((folder / "report.json").read_text())
    rows = {row["model"]: row for row in report["results"]}
    assert set(rows) == {report["name"], "SimCLR"} and rows["SimCLR"]["n_eval"] == 360
    assert set(rows["SimCLR"]["metrics"]) == {"standard_accuracy", "pgd20_linf_8_255_accuracy"}
    assert report["training"]["steps"] == 2 and report["norm_branch"] == "adv"
    card = (folder / "encoder" / "README.md").read_text()
    assert "PGD-20" in card and "adv" in card
    compare = Path(EXAMPLE).with_name("compare.py")
    done = subprocess.run(
        [sys.executable, compare, folder, "--output", tmp_path / "compared.png"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "| ACL | `pgd20_linf_8_255_accuracy` |" in done.stdout and (tmp_path / "compared.png").stat().st_size > 0
    before = (folder / "encoder" / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="of an earlier run"):
        example.run_or_exit(command)
    shutil.rmtree(folder / "contrast_simclr")
    example.main([*command, "--resume_from_checkpoint", "true"])  # nothing left to train but the contrast
    assert (folder / "encoder" / "model.safetensors").read_bytes() == before
    assert json.loads((folder / "report.json").read_text())["training"]["steps"] == 2
    encoder = load_encoder(folder / "encoder")
    with frozen(encoder):
        assert encoder_features(encoder)(torch.rand(2, 3, 32, 32)).shape == (2, 8)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--objective", "simclr"],
        ["--objective", "air", "--base", "dynacl", "--bf16", "true"],
        ["--objective", "dynacl", "--ema_decay", "0.99", "--channels_last", "true", "--interpolation", "bilinear"],
        ["--objective", "acl", "--mode", "a2a", "--norm", "l2", "--eps", "0.5", "--step_size", "0.2"],
    ],
)
def test_methods_run_from_the_command_line(example, tmp_path, arguments):
    example.main([*QUICK, "--dataset_name", "digits", "--eval_split", "", "--output_dir", str(tmp_path), *arguments])
    assert (tmp_path / "encoder" / "config.json").is_file()
    assert json.loads((tmp_path / "report.json").read_text())["results"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eps", "8"], r"eps must be in \(0, 1\], got 8.0: .*8/255"),
        (["--backbone", "resnet18_cifr"], "unknown backbone 'resnet18_cifr'.*did you mean resnet18_cifar"),
        (["--per_device_train_batch_size", "2000"], "batch of 2000 images.*larger than the data set, which has 1437"),
        (["--dataset_name", "no/such/folder"], "not a folder on this machine"),
        (["--resume_from_checkpoint", "nowhere/checkpoint-3"], "cannot resume from 'nowhere/checkpoint-3'.*no such"),
        (["--objective", "acll"], "unknown objective 'acll': did you mean 'acl'"),
        (["--no_such_flag", "1"], "unrecognized arguments: --no_such_flag"),
    ],
)
def test_mistakes_end_in_one_message(example, tmp_path, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        example.run_or_exit([*TINY, "--report_to", "none", "--output_dir", str(tmp_path / "out"), *arguments])
    text = f"{stop.value.code} {capsys.readouterr().err}"
    assert stop.value.code not in (0, None)
    assert re.search(message, text, re.DOTALL), text
    assert "Traceback" not in text


def test_broken_images_and_sets_without_images_are_named(example, tmp_path, capsys):
    folder = tmp_path / "images"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for k in range(20):
            Image.new("RGB", (8, 8), (k * 10, 0, 0)).save(folder / name / f"{k}.png")
    broken = folder / "b" / "7.png"
    broken.write_bytes(broken.read_bytes()[:40])
    base = [*TINY, "--report_to", "none", "--output_dir", str(tmp_path / "out"), "--image_size", "8"]
    with pytest.raises(SystemExit, match=r"row 37 of .*cannot be read as an image"):
        example.run_or_exit([*base, "--dataset_name", str(folder)])
    quick = ["--per_device_train_batch_size", "13", "--max_steps", "1"]
    example.run_or_exit([*base, *quick, "--dataset_name", str(folder), "--on_error", "skip"])
    assert "39 images of" in capsys.readouterr().out
    import datasets

    datasets.Dataset.from_dict({"text": ["a", "b"]}).to_parquet(tmp_path / "words" / "train.parquet")
    with pytest.raises(SystemExit, match="no image column|without an image|image column"):
        example.run_or_exit([*base, "--dataset_name", str(tmp_path / "words")])


def test_the_script_itself_under_accelerate_with_two_processes(tmp_path):
    """Through the launcher, as the README says; two gloo processes, one folder."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["--num_cpu_threads_per_process", "1", str(EXAMPLE), *QUICK, "--use_cpu", "true"]
    command += ["--dataset_name", "digits", "--eval_split", "", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("The encoder is in") == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["training"]["processes"] == 2 and report["training"]["batch_size"] == 64
