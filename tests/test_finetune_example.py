"""`examples/finetune.py` as a stranger runs it: whole tiny runs in every mode, and mistakes end in one message."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import datasets
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from PIL import Image
from safetensors.torch import load_file
from training import tiny_model
from transformers import AutoModelForImageClassification

from hf_robust.hub import load_encoder, save_encoder
from hf_robust.objectives.acl import ACL
from hf_robust.runs import finetune

EXAMPLE = Path(__file__).parents[1] / "examples" / "finetune.py"
COLOURS = ("red", "green", "blue")
QUICK = [
    *("--num_train_epochs", "2", "--per_device_train_batch_size", "8", "--steps", "1", "--validation_steps", "1"),
    *("--validation_fraction", "0.2", "--save_strategy", "epoch", "--report_to", "none", "--disable_tqdm", "true"),
]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("finetune_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """An exported encoder, and the training checkpoint it came from."""
    root, model = tmp_path_factory.mktemp("encoders"), tiny_model(ACL())
    save_encoder(model, root / "exported")
    model.save_pretrained(root / "checkpoint")
    return root


def write_images(root: Path, *, test: tuple[str, ...] = COLOURS) -> Path:
    """Folders of coloured images, 10 per class to train on; `test` says what the classes of the test split show."""
    for split, shown, count in (("train", COLOURS, 10), ("test", test, 4)):
        for name, colour in zip(COLOURS, shown, strict=True):
            folder = root / split / name
            folder.mkdir(parents=True)
            for k in range(count):
                Image.new("RGB", (12, 12), colour).point(lambda v, k=k: max(0, v - 9 * k)).save(folder / f"{k}.png")
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def test_autolora_leaves_everything_it_promises(example, encoders, images, tmp_path, capsys):
    folder = tmp_path / "out"
    command = ["--encoder", str(encoders / "exported"), "--dataset_name", str(images), "--mode", "autolora"]
    command += [*QUICK, "--rank", "2", "--output_dir", str(folder)]
    example.main(command)
    text = capsys.readouterr().out
    assert "AutoLoRa: encoder" in text and "24 images" in text and "6 more decide" in text
    assert "Test images of" in text and "n = 12" in text and "Kept: epoch" in text
    for name in ("README.md", "report.json", "curves.png", "examples.png", "classifier/README.md"):
        assert (folder / name).stat().st_size > 0, name
    report = json.loads((folder / "report.json").read_text())
    (row,) = report["results"]
    assert set(row["metrics"]) == {"standard_accuracy", "pgd20_linf_8_255_accuracy"} and row["n_eval"] == 12
    assert report["objective"]["parameters"]["rank"] == 2 and report["norm_branch"] == "adv"
    classifier = AutoModelForImageClassification.from_pretrained(folder / "classifier")
    assert classifier.config.id2label == dict(enumerate(sorted(COLOURS)))
    assert not [key for key in load_file(folder / "classifier" / "model.safetensors") if "lora" in key]
    before = (folder / "classifier" / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="of an earlier run"):
        example.run_or_exit(command)
    example.main([*command, "--resume_from_checkpoint", "true"])  # nothing left to train
    assert (folder / "classifier" / "model.safetensors").read_bytes() == before
    assert json.loads((folder / "report.json").read_text())["results"][0]["metrics"] == row["metrics"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--mode", "slf"],
        ["--mode", "alf", "--head_init", "default"],
        ["--mode", "aff", "--head_init", "alf"],
        ["--mode", "aff", "--clean_branch", "adv", "--reference_branch", "adv", "--keep", "last", "--bf16", "true"],
    ],
)
def test_modes_run_from_the_command_line(example, encoders, images, tmp_path, arguments):
    given = ["--encoder", str(encoders / "checkpoint"), "--dataset_name", str(images), *QUICK]
    example.main([*given, "--output_dir", str(tmp_path / "out"), *arguments])
    assert (tmp_path / "out" / "classifier" / "config.json").is_file()
    assert (tmp_path / "out" / "alf").is_dir() == ("--head_init alf" in " ".join(arguments))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own
def test_an_adapter_comes_out_of_mode_lora(example, encoders, images, tmp_path):
    from peft import PeftModel

    base = str(encoders / "exported")
    given = ["--encoder", base, "--dataset_name", str(images), "--mode", "lora", "--rank", "2", *QUICK]
    example.main([*given, "--output_dir", str(tmp_path / "out")])
    adapter = tmp_path / "out" / "adapter"
    assert (adapter / "README.md").is_file() and not (tmp_path / "out" / "classifier").exists()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageClassification.from_pretrained(base, num_labels=3)
        loaded = PeftModel.from_pretrained(model, adapter).eval()
    assert loaded(pixel_values=torch.zeros(2, 3, 8, 8)).logits.shape == (2, 3)
    checkpoint = [*given, "--output_dir", str(tmp_path / "other"), "--encoder", str(encoders / "checkpoint")]
    with pytest.raises(SystemExit) as stop:  # an adapter needs an encoder that others can load: said before training
        example.run_or_exit(checkpoint)
    assert "checkpoint" in str(stop.value.code) and not list((tmp_path / "other").glob("checkpoint-*"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_at_another_resolution_than_its_encoder_is_refused(example, encoders, images, tmp_path):
    given = ["--encoder", str(encoders / "exported"), "--dataset_name", str(images), "--mode", "lora", *QUICK]
    with pytest.raises(SystemExit, match=r"the image size \(8 pixels there, 16 here\)"):
        example.run_or_exit([*given, "--rank", "2", "--image_size", "16", "--output_dir", str(tmp_path / "out")])


def test_a_broken_test_image_costs_the_measurement_not_the_classifier(example, encoders, tmp_path):
    root = write_images(tmp_path / "images")
    next((root / "test").rglob("*.png")).write_bytes(b"not an image")
    given = ["--encoder", str(encoders / "exported"), "--dataset_name", str(root), "--mode", "slf", *QUICK]
    with pytest.raises(SystemExit):
        example.run_or_exit([*given, "--save_strategy", "no", "--output_dir", str(tmp_path / "out")])
    assert (tmp_path / "out" / "classifier" / "model.safetensors").is_file()


def test_a_run_that_died_in_its_first_stage_goes_on(example, encoders, images, tmp_path, monkeypatch):
    given = ["--encoder", str(encoders / "exported"), "--dataset_name", str(images), "--mode", "aff", *QUICK]
    given += ["--head_init", "alf", "--output_dir", str(tmp_path / "out")]
    train = finetune.RobustFinetuner.train

    def stop(self, *args, **kwargs):
        if Path(self.args.output_dir).name != "alf":
            raise KeyboardInterrupt
        return train(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(finetune.RobustFinetuner, "train", stop)
        with pytest.raises(KeyboardInterrupt):
            example.main(given)
    example.main([*given, "--resume_from_checkpoint", "true"])
    assert (tmp_path / "out" / "classifier" / "model.safetensors").is_file()


def test_post_processing_gives_an_encoder_and_compares_it(example, encoders, images, tmp_path, capsys):
    given = ["--encoder", str(encoders / "checkpoint"), "--dataset_name", str(images), "--mode", "lp_aff"]
    given += ["--num_train_epochs", "1", "--probe_stage_epochs", "1", "--per_device_train_batch_size", "8"]
    given += ["--steps", "1", "--report_to", "none", "--disable_tqdm", "true", "--output_dir", str(tmp_path / "out")]
    example.main([*given, "--lp_variant", "air"])
    text = capsys.readouterr().out
    assert "3 pseudo-classes" in text and "before" in text and "after" in text
    assert load_encoder(tmp_path / "out" / "encoder").config.norm_branch == "adv"
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {row["model"] for row in report["results"]} == {report["name"], "before"}


def test_the_test_split_decides_nothing(example, encoders, images, tmp_path):
    """With another test split - classes shifted by one - every weight and every choice is the same."""
    poisoned = write_images(tmp_path / "poisoned", test=(*COLOURS[1:], COLOURS[0]))
    ends = []
    for name, root in (("true", images), ("poisoned", poisoned)):
        folder = tmp_path / name
        given = ["--encoder", str(encoders / "exported"), "--dataset_name", str(root), "--mode", "autolora"]
        given += [*QUICK, "--num_train_epochs", "4", "--auto_lr_epochs", "1", "2", "--rank", "2"]
        example.main([*given, "--output_dir", str(folder)])
        logs = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        keys = ("loss", "learning_rate", "lambda_1", "validation_standard_accuracy", "learning_rate_halved")
        logged = [{k: e[k] for k in keys if k in e} for e in logs]
        ends.append((load_file(folder / "classifier" / "model.safetensors"), [e for e in logged if e]))
    (weights, log), (other_weights, other_log) = ends
    assert log == other_log and any("learning_rate_halved" in e for e in log)
    assert all(torch.equal(value, other_weights[key]) for key, value in weights.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--encoder", "no/such/encoder"], "no/such/encoder"),
        (["--eps", "8"], r"eps must be in \(0, 1\], got 8.0: .*8/255"),
        (["--mode", "autolra"], "unknown mode 'autolra': did you mean 'autolora'"),
        (["--mode", "acl"], "acl pre-trains an encoder"),
        (["--mode", "autolora", "--rank", "64"], "rank"),
        (["--mode", "slf", "--rank", "4"], "autolora"),
        (["--validation_fraction", "0"], "validation_fraction is 0"),
        (["--resume_from_checkpoint", "nowhere/checkpoint-3"], "cannot resume from 'nowhere/checkpoint-3'"),
    ],
)
def test_mistakes_end_in_one_message(example, encoders, images, tmp_path, arguments, message, capsys):
    given = ["--encoder", str(encoders / "exported"), "--dataset_name", str(images), *QUICK]
    with pytest.raises(SystemExit) as stop:
        example.run_or_exit([*given, "--output_dir", str(tmp_path / "out"), *arguments])
    text = f"{stop.value.code} {capsys.readouterr().err}"
    assert stop.value.code not in (0, None)
    assert re.search(message, text, re.DOTALL), text
    assert "Traceback" not in text


@pytest.mark.parametrize("labelled", [False, True])
def test_one_class_is_refused_before_anything_is_trained(example, encoders, tmp_path, labelled):
    if labelled:
        features = Features({"image": datasets.Image(), "label": ClassLabel(names=["red", "green"])})
        rows = {"image": [Image.new("RGB", (8, 8), "red")] * 12, "label": [0] * 12}
        (tmp_path / "images").mkdir()
        Dataset.from_dict(rows, features).to_parquet(tmp_path / "images" / "train.parquet")
    else:
        folder = tmp_path / "images" / "train" / "red"
        folder.mkdir(parents=True)
        for k in range(12):
            Image.new("RGB", (8, 8), "red").save(folder / f"{k}.png")
    given = ["--encoder", str(encoders / "exported"), "--dataset_name", str(tmp_path / "images"), *QUICK]
    with pytest.raises(SystemExit, match="images of one class only" if labelled else "one subfolder per class"):
        example.run_or_exit([*given, "--output_dir", str(tmp_path / "out")])
    assert not list((tmp_path / "out").glob("checkpoint-*"))
