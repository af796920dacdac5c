"""A training that publishes: at saves and at its end, on one process, never stopped by the Hub."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path

import pytest
import torch
from finetuning import tiny_finetuner
from hub_server import READ_TOKEN, TOKEN, HubServer, connect
from safetensors.torch import load_file
from training import tiny_trainer

from hf_robust import RandomCoreset, build_classifier, load_encoder, save_encoder, with_adapter
from hf_robust.hub_failures import PushError
from hf_robust.objectives.acl import ACL
from hf_robust.objectives.autolora import AutoLoRa
from hf_robust.objectives.dynacl import DynACL
from hf_robust.objectives.lora import LoRA
from hf_robust.objectives.slf import SLF
from hf_robust.runs.push import push_result

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # of the client, to its own library
PUSHING = {"push_to_hub": True, "hub_model_id": "robust/run", "save_strategy": "steps", "save_steps": 4}
SHORT = {"num_train_epochs": 1}  # 6 steps


@pytest.fixture
def method():
    """AutoLoRa where PEFT is installed: its published network differs from the one that trains."""
    return AutoLoRa(rank=2) if importlib.util.find_spec("peft") else SLF()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # pauses before further tries
    with HubServer() as server:
        yield connect(monkeypatch, server, tmp_path)


def titles(hub: HubServer, name: str = "robust/run") -> list[str]:
    return [commit.title for commit in hub.repository(name).commits[1:]]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def waiting(trainer):
    """Each push has ended before the next step, so that none is left out as long as another is under way."""
    callback = next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "HubCallback")
    on_save = callback.on_save

    def save_and_wait(*args, **kwargs):
        on_save(*args, **kwargs)
        trainer._background.wait()

    callback.on_save = save_and_wait
    return trainer


def test_an_encoder_is_pushed_at_saves_and_at_the_end_and_trains_the_same(hub, tmp_path, caplog):
    plain = tiny_trainer(tmp_path / "plain", DynACL(period=0.25, ema_decay=0.9), **SHORT)
    plain.train()
    method = DynACL(period=0.25, ema_decay=0.9)
    often = {**PUSHING, **SHORT, "save_steps": 2, "hub_private_repo": True}
    trainer = waiting(tiny_trainer(tmp_path / "run", method, **often))
    assert hub.repository("robust/run").private and titles(hub) == []  # made before training
    with caplog.at_level(logging.DEBUG):
        trainer.train()
    assert titles(hub) == [*(f"Training in progress, step {n}" for n in (2, 4)), "End of training, step 6"]
    assert_same(weights(plain.model), weights(trainer.model))
    contents = hub.repository("robust/run").contents()
    assert {"model.safetensors", "config.json", "README.md", "report.json"} <= set(contents)
    trainer.save_encoder(tmp_path / "encoder")
    assert contents["model.safetensors"] == (tmp_path / "encoder" / "model.safetensors").read_bytes()
    card, report = contents["README.md"].decode(), json.loads(contents["report.json"])
    assert 'from_pretrained("robust/run"' in card and "finished" not in report["training"]
    on_the_way = hub.repository("robust/run").commits[1].files
    assert "no, 2 of 6 steps" in on_the_way["README.md"][0].decode()
    assert on_the_way["model.safetensors"][0] != contents["model.safetensors"]
    names = {name for commit in hub.repository("robust/run").commits for name in commit.files}
    assert not any(name.endswith((".bin", ".pt")) or "checkpoint" in name for name in names)
    assert TOKEN not in caplog.text


def test_no_file_and_no_log_holds_the_token(hub, tmp_path, monkeypatch, caplog, capfd):
    connect(monkeypatch, hub, tmp_path, token=None)
    arguments = {**PUSHING, **SHORT, "hub_token": TOKEN, "report_to": "tensorboard"}
    with caplog.at_level(logging.DEBUG):
        trainer = tiny_trainer(tmp_path / "run", ACL(), **arguments)
        trainer.train()
        trainer.save_state()
    assert titles(hub)[-1] == "End of training, step 6"
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in files) and any("events.out" in p.name for p in files)
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []
    for commit in hub.repository("robust/run").commits:
        assert all(TOKEN.encode() not in data for data, _ in commit.files.values())
    seen = capfd.readouterr()
    assert TOKEN not in caplog.text + seen.out + seen.err + repr(trainer.args)


def test_a_hub_that_fails_stops_no_training_and_is_told_once(hub, tmp_path, caplog):
    trainer = waiting(tiny_trainer(tmp_path / "run", ACL(), **{**PUSHING, "save_steps": 2}, num_train_epochs=1))
    hub.fail("POST /api/models/.*/commit/", 10_000)
    trainer.train()
    told = [r for r in caplog.records if r.levelno >= logging.WARNING and "not pushed to the Hub" in r.message]
    assert trainer.state.global_step == 6 and titles(hub) == [] and len(told) == 1
    assert "push again later" in told[0].message
    hub.heal()
    pushed = trainer.push_to_hub()
    assert pushed.changed and titles(hub) == ["End of training"]


def test_no_failure_of_any_kind_stops_a_training(hub, tmp_path, monkeypatch, caplog):
    trainer = tiny_trainer(tmp_path / "run", ACL(), **PUSHING, max_steps=4)

    def fail(*_):
        raise KeyError("of a kind that nobody foresaw")

    monkeypatch.setattr(trainer, "write_release", fail)
    trainer.train()
    assert trainer.state.global_step == 4 and "not pushed to the Hub: 'of a kind that nobody foresaw'" in caplog.text


def test_what_failed_on_the_way_is_brought_at_the_end(hub, tmp_path):
    trainer = waiting(tiny_trainer(tmp_path / "run", ACL(), **{**PUSHING, "save_steps": 3}, num_train_epochs=1))
    hub.fail("POST /api/validate-yaml", 1)  # the only push on the way
    trainer.train()
    assert titles(hub) == ["End of training, step 6"]


def test_a_resumed_run_goes_on_pushing(hub, tmp_path):
    whole, often = tiny_trainer(tmp_path / "whole", ACL(), **SHORT), {**PUSHING, **SHORT, "save_steps": 2}
    whole.train()
    stopped = tiny_trainer(tmp_path / "run", ACL(), **often, hub_strategy="end")
    after_step = stopped.after_step

    def stop_at_four():
        after_step()
        if stopped.state.global_step == 3:
            raise KeyboardInterrupt

    stopped.after_step = stop_at_four
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert titles(hub) == []
    resumed = waiting(tiny_trainer(tmp_path / "run", ACL(), **often))
    resumed.train(resume_from_checkpoint=True)
    assert titles(hub) == ["Training in progress, step 4", "End of training, step 6"]
    assert_same(weights(whole.model), weights(resumed.model))


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [(None, "robust/run", "not logged in"), (READ_TOKEN, "robust/run", "403"), (TOKEN, "stranger/run", "403")],
)
def test_what_could_never_be_pushed_ends_the_run_before_training(hub, tmp_path, monkeypatch, token, name, message):
    connect(monkeypatch, hub, tmp_path, token)
    with pytest.raises(PushError, match=message):
        tiny_trainer(tmp_path / "run", ACL(), **{**PUSHING, "hub_model_id": name})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hub_model_id": None}, "needs the name of the repository: add --hub_model_id user/name"),
        ({"hub_model_id": "a/b/c"}, "'a/b/c' cannot name a repository"),
        ({"hub_strategy": "checkpoint"}, "hub_strategy must be every_save or end, got 'checkpoint'"),
        ({"hub_strategy": "all_checkpoints"}, "optimiser states and pickles, which are never published"),
    ],
)
def test_flags_are_checked_at_once(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path / "run", ACL(), **{**PUSHING, **changes})


def test_a_hub_that_sleeps_at_the_start_is_no_reason_not_to_train(hub, tmp_path, caplog):
    hub.fail("GET /api/models/", 1, status=503)
    trainer = tiny_trainer(tmp_path / "run", ACL(), **PUSHING, hub_strategy="end", num_train_epochs=1)
    assert "training starts although the Hub" in caplog.text
    trainer.train()
    assert titles(hub) == ["End of training, step 6"]


def test_only_the_first_process_pushes(hub, tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path / "run", ACL(), hub_model_id="robust/run")
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    assert trainer.push_to_hub() is None and trainer.init_hf_repo() is None and hub.log == []


def test_by_hand_beside_the_training_and_without_a_name(hub, tmp_path):
    trainer = tiny_trainer(tmp_path / "run", ACL(), coreset=RandomCoreset(fraction=0.5, warmup_epochs=0), **SHORT)
    with pytest.raises(ValueError, match=r"write push_to_hub\(repo_id='user/name'\)"):
        trainer.push_to_hub()
    trainer.train()
    assert trainer.push_to_hub("now", False, repo_id="robust/chosen", private=True) is None
    trainer._finish_current_push()
    assert titles(hub, "robust/chosen") == ["now"] and hub.repository("robust/chosen").private
    stored = json.loads(hub.repository("robust/chosen").contents()["coreset.json"])
    assert stored["indices"] == trainer.phases.current.indices


def test_a_classifier_is_pushed_with_the_best_weights_so_far(hub, tmp_path, method):
    trainer = waiting(tiny_finetuner(tmp_path / "run", method, **PUSHING))
    plain = tiny_finetuner(tmp_path / "plain", method)
    trainer.train()
    plain.train()
    assert_same(weights(plain.model), weights(trainer.model))
    contents = hub.repository("robust/run").contents()
    trainer.save_classifier(tmp_path / "classifier")
    assert contents["model.safetensors"] == (tmp_path / "classifier" / "model.safetensors").read_bytes()
    assert json.loads(contents["report.json"])["task"] == "classifier"
    assert b"pipeline_tag: image-classification" in contents["README.md"]
    before, trainer._best = weights(trainer.model), {n: torch.zeros_like(v) for n, v in weights(trainer.model).items()}
    trainer.save_release(tmp_path / "best")
    assert all(not value.any() for value in load_file(tmp_path / "best" / "model.safetensors").values())
    assert_same(before, weights(trainer.model))


def test_an_adapter_is_pushed_when_its_encoder_is_known_else_the_classifier(hub, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    encoder = tiny_trainer(tmp_path / "pre", ACL()).save_encoder(tmp_path / "encoder")
    model = with_adapter(build_classifier(encoder, 3, ("adv",)), 2, 2)
    trainer = tiny_finetuner(tmp_path / "run", LoRA(rank=2, alpha=2), model=model, keep="last")
    assert trainer.push_to_hub(repo_id="robust/merged").kind == "classifier"
    monkeypatch.chdir(tmp_path)
    trainer.adapter_base = "robust/encoder"  # as if it had been published: here it lies below the working folder
    save_encoder(build_classifier(encoder, 3, ("adv",)), Path("robust/encoder"))
    pushed = trainer.push_to_hub(repo_id="robust/adapter", base_model="robust/encoder")
    contents = hub.repository("robust/adapter").contents()
    assert pushed.kind == "adapter" and {"adapter_config.json", "adapter_model.safetensors"} <= set(contents)
    trainer.adapter_base, trainer.releases_encoder = None, True
    assert trainer.push_to_hub(repo_id="robust/whole").kind == "encoder"


def test_a_run_tells_where_its_result_is_when_the_hub_does_not_take_it(hub, tmp_path, capsys):
    trainer = tiny_trainer(tmp_path / "run", ACL(), **PUSHING)
    folder = trainer.write_release(tmp_path / "run" / "encoder", "robust/run")
    hub.fail("POST /api/models/.*/commit/", 10_000)
    push_result(trainer.args, folder)
    text = capsys.readouterr().out
    assert f"publish it with: hf-robust push {folder} robust/run" in text and TOKEN not in text
    hub.heal()
    push_result(trainer.args, folder)
    assert f"Published: {hub.endpoint}/robust/run" in capsys.readouterr().out
    assert load_encoder(folder).config.norm_branch == "adv"
    trainer.args.push_to_hub = False
    before = len(hub.log)
    push_result(trainer.args, folder)
    assert len(hub.log) == before
