"""Whole runs that publish: `--push_to_hub` of pre-training and of fine-tuning, with the card of the finished run."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer, connect

from hf_robust.evaluate_cli import parse_evaluate
from hf_robust.runs import finetune, pretrain

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # of the client, to its own library
TINY = "--dataset_name digits --max_examples 40 --per_device_train_batch_size 8 --save_strategy no --use_cpu true "
TINY += "--report_to none --disable_tqdm true --eval_split"
ROOT = str(Path(__file__).parent.parent)
NETWORK = ["--backbone", "resnet10_cifar", "--model_args", '{"channels": [4, 8, 8, 8]}']
# two processes of one gloo world, forked, since most of a short run is imports
TWO = """
import os, sys
from hf_robust.runs import console, pretrain
import hf_robust.pretrainer, hf_robust.publishing, accelerate
ranks = []
for rank in "01":
    ranks.append(os.fork())
    if ranks[-1] == 0:
        os.environ.update(RANK=rank, LOCAL_RANK=rank)
        for stream in (1, 2):
            os.dup2(os.open(rank, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        console.run_or_exit(pretrain.main, sys.argv[1:])
        sys.exit(0)
sys.exit(max(os.waitpid(child, 0)[1] for child in ranks) != 0)
"""


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """Pre-trained with a contrast and a coreset, pushed to robust/encoder."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as monkeypatch, HubServer() as hub:
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        connect(monkeypatch, hub, folder)
        words = f"{TINY} --output_dir {folder} --max_steps 2 --contrast simclr --coreset random --coreset_fraction 0.5"
        words += " --coreset_warmup_epochs 0 --steps 1"
        words = words.replace("--eval_split", "--eval_split=") + " --push_to_hub true --hub_model_id robust/encoder"
        pretrain.main([*words.split(), *NETWORK])
        (folder / "hub.json").write_text(
            json.dumps(
                {
                    "repositories": [name for _, name in hub.repositories],
                    "titles": [commit.title for commit in hub.repository("robust/encoder").commits[1:]],
                    "files": sorted(hub.repository("robust/encoder").contents()),
                    "card": hub.repository("robust/encoder").contents()["README.md"].decode(),
                }
            )
        )
    return folder


def test_pre_training_publishes_its_encoder_with_the_card_of_the_run(encoder):
    told = json.loads((encoder / "hub.json").read_text())
    assert told["repositories"] == ["robust/encoder"]  # not the contrast
    assert told["titles"] == ["End of training, step 2", "Training finished: report, card and pictures"]
    assert set(told["files"]) == {p.relative_to(encoder / "encoder").as_posix() for p in files(encoder / "encoder")}
    assert {"curves.png", "coreset.json", "coreset.png", "report.json"} <= set(told["files"])
    assert 'from_pretrained("robust/encoder"' in told["card"] and "](curves.png)" in told["card"]
    assert [p for p in files(encoder) if TOKEN.encode() in p.read_bytes()] == []


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_of_two_processes_the_first_one_publishes(tmp_path):
    words = f"{TINY}= --output_dir run --max_steps 2 --save_strategy steps --save_steps 1 --hub_always_push true"
    words += " --steps 1 --push_to_hub true --hub_model_id robust/two"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    cluster = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": ROOT}
    command = [sys.executable, "-W", "ignore", "-c", TWO, *words.split(), *NETWORK]
    with HubServer() as hub:
        environment = hub.environment(tmp_path, **cluster)
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
        told = done.stdout + done.stderr + "".join((tmp_path / rank).read_text() for rank in "01")
        assert done.returncode == 0, told
        on_the_way, end, finished = hub.repository("robust/two").commits[1:]
        report = json.loads(finished.files["report.json"][0])
        assert "step 1" in on_the_way.title and "End of training" in end.title and "finished" in finished.title
        assert report["training"]["processes"] == 2
        assert len(hub.seen("POST .*/repos/create")) == 1 and len(hub.seen("POST .*/commit/")) == 3
    assert "Published: " in (tmp_path / "0").read_text() and "Published: " not in (tmp_path / "1").read_text()
    assert TOKEN not in told


@pytest.mark.parametrize("fails", [False, True])
def test_fine_tuning_publishes_its_classifier_or_says_how(encoder, tmp_path, monkeypatch, capsys, fails):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    words = f"--encoder {encoder / 'encoder'} --mode slf {TINY}= --output_dir {tmp_path / 'run'} --num_train_epochs 1"
    words += " --validation_steps 1 --push_to_hub true --hub_model_id robust/classifier --hub_private_repo true"
    with HubServer() as hub:
        connect(monkeypatch, hub, tmp_path)
        if fails:
            hub.fail("POST /api/models/.*/commit/", 10_000)
        finetune.main(words.split())
        assert hub.repository("robust/classifier").private
        published = set(hub.repository("robust/classifier").contents())
    text = capsys.readouterr().out
    target = tmp_path / "run" / "classifier"
    assert published == (set() if fails else {p.relative_to(target).as_posix() for p in files(target)})
    assert (f"hf-robust push {target} robust/classifier" in text) is fails


def test_an_adapter_of_a_local_encoder_is_refused_before_anything_is_read(tmp_path):
    words = f"--encoder {tmp_path} --mode lora --dataset_name digits --output_dir {tmp_path / 'run'} --report_to none"
    with pytest.raises(ValueError, match="an adapter is published beside its encoder.*push the encoder first"):
        finetune.main([*words.split(), "--push_to_hub", "true", "--hub_model_id", "robust/adapter"])


def test_protocols_publish_nothing_and_store_no_token(capsys):
    with pytest.raises(SystemExit):
        parse_evaluate(["--model", "x", "--protocol", "slf", "--finetune_args", f"--hub_token {TOKEN}"])
    text = capsys.readouterr().err
    assert "--finetune_args publishes nothing" in text and TOKEN not in text
