"""`examples/evaluate.py` under `accelerate launch`: an encoder fine-tuned and evaluated by two processes at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image
from released import OURS, trained_model

from hf_robust.evaluation.classifier import load_classifier
from hf_robust.evaluation.evaluation_report import EvaluationReport
from hf_robust.evaluation.robustness import evaluate_robustness
from hf_robust.hub import save_encoder

EXAMPLE = Path(__file__).parents[1] / "examples" / "evaluate.py"
TUNE = "--num_train_epochs 1 --per_device_train_batch_size 4 --steps 1 --validation_fraction 0 --keep last "
TUNE += "--report_to none --disable_tqdm true --save_strategy no"


def test_two_processes_evaluate_an_encoder_by_a_protocol(tmp_path):
    for split, count in (("train", 8), ("test", 6)):
        for name in ("blue", "red"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for k in range(count):
                Image.new("RGB", (16, 16), name).point(lambda v, k=k: max(0, v - 20 * k)).save(folder / f"{k}.png")
    save_encoder(trained_model(**OURS["thin"]), tmp_path / "encoder")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["--num_cpu_threads_per_process", "1", str(EXAMPLE), "--use_cpu", "true", "--protocol", "slf"]
    command += ["--model", str(tmp_path / "encoder"), "--dataset_name", str(tmp_path / "images"), "--batch_size", "5"]
    command += ["--metrics", "pgd3", "--curve_examples", "0", "--output_dir", str(tmp_path / "out")]
    done = subprocess.run([*command, "--finetune_args", TUNE], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("n = 12, seed 0, float32") == 1 and done.stdout.count("SLF") >= 1
    shared = EvaluationReport.load(tmp_path / "out" / "slf" / "evaluation")
    from hf_robust.data import load_image_dataset

    classifier = load_classifier(tmp_path / "out" / "slf" / "classifier")
    images = load_image_dataset(str(tmp_path / "images"), "test", image_size=classifier.image_size)
    images.name = "images"
    one = evaluate_robustness(classifier, images, ["pgd3"], batch_size=5, curve_examples=0, progress=False)
    assert one.metrics == shared.metrics and torch.equal(one.flags["pgd3"], shared.flags["pgd3"])
