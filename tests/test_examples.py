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
from safetensors.torch import load_file

from hf_robust.attacks import frozen
from hf_robust.coresets import Coreset
from hf_robust.hub import encoder_features, load_encoder
from hf_robust.runs import pretrain

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
    command += ["--cpu_threads", "1"]  # the configuration says two, for which tests beside each other would fight
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


CORESET = ["--coreset_fraction", "0.6", "--coreset_interval", "1", "--coreset_validation_fraction", "0.1"]


def test_a_run_on_coresets_leaves_them_and_its_measures(example, tmp_path, capsys, monkeypatch):
    folder, drawn = tmp_path / "out", []
    original = pretrain.plot_coresets
    monkeypatch.setattr(pretrain, "plot_coresets", lambda found, *rest: (drawn.append(found), original(found, *rest)))
    folder.mkdir()
    stale = Coreset([0, 1], "of an earlier run", "digits", 64, 64, 0.03, 0.03, 7.0, 9, 0.1)
    stale.save(folder / "coreset-0007.json")
    command = [*QUICK, "--dataset_name", "digits", "--output_dir", str(folder), "--contrast", "simclr"]
    command += ["--per_device_train_batch_size", "16", "--max_steps", "-1", "--num_train_epochs", "3"]
    command += ["--warmup_epochs", "0.5", "--steps", "2", "--coreset", "rcs", *CORESET, "--coreset_warmup_epochs", "1"]
    command += ["--coreset_fraction", "0.4"]
    example.main(command)
    text = capsys.readouterr().out
    assert "; coreset: RCS 40 % of 57 images, after 1 epoch on all, every 1 epoch\n" in text
    assert "\nSimCLR (full data) " in text and "coreset.png" in text
    chosen = [Coreset.load(folder / f"coreset-000{epoch}.json") for epoch in (1, 2)]
    assert drawn == [chosen] and (folder / "encoder" / "coreset.png").stat().st_size > 0
    assert Coreset.load(folder / "encoder" / "coreset.json") == chosen[-1]
    report = json.loads((folder / "report.json").read_text())
    assert {row["model"] for row in report["results"]} == {report["name"], "SimCLR (full data)"}
    assert report["training"]["epochs"] == 3 and report["training"]["steps"] == 10  # the warm-up is 3 rounds of 2
    coreset = report["coreset"]
    assert (coreset["name"], coreset["images"], coreset["pool_images"], coreset["selections"]) == ("RCS", 23, 57, 2)
    assert coreset["fraction"] == coreset["parameters"]["fraction"] == 0.4
    assert coreset["effective_fraction"] == pytest.approx(23 / 57) and coreset["validation_images"] == 7
    assert coreset["selection_seconds"] == pytest.approx(sum(c.seconds for c in chosen)) and (
        coreset["selection_seconds"] + coreset["training_seconds"] == pytest.approx(report["training"]["seconds"])
    )
    state = json.loads((folder / "contrast_simclr" / "checkpoint-12" / "trainer_state.json").read_text())
    assert state["max_steps"] == 12 and state["epoch"] == 3  # all 64 images, not the steps of the coreset
    card = (folder / "encoder" / "README.md").read_text()
    assert "## Coreset" in card and "](coreset.png)" in card and "--coreset file:coreset.json" in card
    command += ["--contrast", "none", "--eval_split", "", "--resume_from_checkpoint", "true"]
    example.main(command)  # nothing left to train
    assert drawn[1] == chosen and json.loads((folder / "report.json").read_text())["coreset"]["selections"] == 2
    assert Coreset.load(folder / "encoder" / "coreset.json") == chosen[-1]
    capsys.readouterr()

    again = [*QUICK, "--per_device_train_batch_size", "16", "--dataset_name", "digits", "--eval_split", ""]
    again += ["--output_dir", str(tmp_path / "again"), "--save_strategy", "no"]
    example.main([*again, "--coreset", f"file:{folder / 'encoder' / 'coreset.json'}"])
    assert "; coreset: Stored 35.9 % of 64 images, chosen once\n" in capsys.readouterr().out
    assert Coreset.load(tmp_path / "again" / "encoder" / "coreset.json").indices == chosen[-1].indices
    example.main(again)  # the same folder without a coreset: nothing of the earlier run stays
    assert not re.search(r"coreset:|coreset\.png", capsys.readouterr().out)
    left = [path.name for path in (tmp_path / "again").rglob("*coreset*")]
    card = (tmp_path / "again" / "encoder" / "README.md").read_text()
    assert left == [] and "## Coreset" not in card and "coreset.json" not in card


def test_a_supervised_run_on_a_random_subset(example, tmp_path, capsys):
    command = [*QUICK, "--objective", "sat", "--coreset", "random", "--coreset_fraction", "0.5", "--eval_split", ""]
    command += ["--coreset_refresh", "false", "--coreset_warmup_epochs", "0", "--dataset_name", "digits"]
    example.main([*command, "--output_dir", str(tmp_path), "--learning_rate", "0.1"])
    text = capsys.readouterr().out
    assert "SAT: resnet10_cifar" in text and "; coreset: Random 50 % of 64 images, chosen once\n" in text
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["objective"]["supervised"] is True and report["coreset"]["parameters"]["refresh"] is False
    assert "pre-trained with labels by SAT" in (tmp_path / "encoder" / "README.md").read_text()
    weights = load_file(tmp_path / "encoder" / "model.safetensors")
    assert not any("head" in name or "classifier" in name or "projector" in name for name in weights)


@pytest.fixture
def unlabelled(tmp_path):
    """A folder of 20 images of one colour each, without labels."""
    folder = tmp_path / "plain"
    folder.mkdir()
    for k in range(20):
        Image.new("RGB", (8, 8), (k * 10, 0, 0)).save(folder / f"{k}.png")
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--objective", "sat"], "SAT is supervised and 'plain' has no labels"),
        (["--objective", "simclr", "--coreset", "rcs", *CORESET], "SimCLR has no loss by which RCS could choose"),
        (["--coreset", "rcs", "--coreset_fraction", "0.3"], "has 6, fewer than the batch of 8"),
        (["--coreset", "rcs", "--coreset_validation_fraction", "0.99"], "leaves 0 to train on and 20 to validate on"),
        (["--coreset", "random", "--coreset_fraction", "0.5"], "warm-up of 100 epochs takes the whole training of 3"),
        (["--coreset", "file:STORED"], "was chosen from 64 images of 'digits', and the training set has 20"),
        (["--per_device_train_batch_size", "32"], "batch of 32 images.*larger than the data set, which has 20"),
    ],
)
def test_what_the_table_shows_is_refused_before_any_image_is_decoded(
    example, tmp_path, unlabelled, monkeypatch, arguments, message
):
    def decode(*_, **__):
        raise AssertionError("decoded")

    monkeypatch.setattr(pretrain, "load_image_dataset", decode)
    Coreset([0, 1], "m", "digits", 64, 64, 0.03, 0.03, 7.0, 9, 0.1).save(tmp_path / "stored.json")
    base = [*TINY, "--report_to", "none", "--output_dir", str(tmp_path / "out"), "--num_train_epochs", "3"]
    base += ["--per_device_train_batch_size", "8", "--dataset_name", str(unlabelled), "--image_size", "8"]
    with pytest.raises(SystemExit, match=message):
        example.run_or_exit([*base, *(a.replace("STORED", str(tmp_path / "stored.json")) for a in arguments)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--coreset", "rcs", *CORESET], "warm-up of 100 epochs takes the whole training of 2 steps: lower"),
        (["--coreset", "random", "--coreset_fraction", "0.1"], "has 6, fewer than the batch of 32"),
        (["--objective", "sat", "--max_examples", "1"], "SAT is supervised and 'digits' has images of one class"),
    ],
)
def test_what_the_images_show_is_refused_before_training(example, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        example.run_or_exit([*QUICK, "--dataset_name", "digits", "--output_dir", str(tmp_path / "out"), *arguments])


def test_compare_names_the_coreset(example, tmp_path):
    spec = importlib.util.spec_from_file_location("compare_example", EXAMPLE.with_name("compare.py"))
    compare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compare)
    values = {"name": "x", "architecture": "resnet18", "exported_format": "timm_wrapper", "objective": {"name": "ACL"}}
    assert compare.method(compare.EncoderReport(**values)) == "ACL"
    chosen = compare.EncoderReport(**values, coreset={"name": "RCS", "fraction": 0.05})
    assert compare.method(chosen) == "ACL, RCS 5 %"


def test_broken_images_and_sets_without_images_are_named(example, tmp_path, capsys):
    folder = tmp_path / "images"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for k in range(20):
            Image.new("RGB", (8, 8), (k * 10, 0, 0)).save(folder / name / f"{k}.png")
    broken = folder / "b" / "7.png"
    broken.write_bytes(broken.read_bytes()[:40])
    base = [*TINY, "--report_to", "none", "--output_dir", str(tmp_path / "out"), "--image_size", "8"]
    base += ["--per_device_train_batch_size", "13", "--max_steps", "1"]
    with pytest.raises(SystemExit, match=r"row 37 of .*cannot be read as an image"):
        example.run_or_exit([*base, "--dataset_name", str(folder)])
    example.run_or_exit([*base, "--dataset_name", str(folder), "--on_error", "skip"])
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
