"""The flags of publishing, and what the command says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer, connect
from released import STOCK, trained_model

from hf_robust.evaluation.report import EncoderReport
from hf_robust.hub import save_encoder
from hf_robust.model_card import write_model_card
from hf_robust.push_cli import PushRun, parse_push
from hf_robust.runs import console, push


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    folder = save_encoder(trained_model(**STOCK["vit"]), tmp_path_factory.mktemp("run") / "encoder")
    config = json.loads((folder / "config.json").read_text())
    report = EncoderReport("x", config["architecture"], config["model_type"])
    report.save(folder)
    write_model_card(report, folder)
    (folder / "notes.txt").write_text("mine")
    return folder


def test_flags_in_both_spellings():
    assert parse_push(["runs/a", "user/a"]) == PushRun("runs/a", "user/a")
    words = "runs/a user/a --private --revision v2 --create-revision --commit_message x-y --base-model u/e --dry-run"
    full = PushRun("runs/a", "user/a", True, "v2", True, "x-y", "u/e", True)
    assert parse_push(words.split()) == full
    assert parse_push("--private runs/a user/a".split()) == PushRun("runs/a", "user/a", private=True)
    assert parse_push("--private false --dry_run true runs/a user/a".split()) == PushRun(
        "runs/a", "user/a", private=False, dry_run=True
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("runs/a", "the following arguments are required: REPO"),
        ("runs/a user/a/b", "'user/a/b' cannot name a repository of the Hub"),
        ("runs/a user/a --private=maybe", "write true or false, got 'maybe'"),
        ("runs/a user/a --public", "unrecognized arguments: --public"),
        (f"runs/a {TOKEN}", "looks like an access token"),
    ],
)
def test_mistakes_end_in_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_push(words.split(), prog="hf-robust push")
    text = capsys.readouterr().err
    assert stop.value.code == 2 and text.startswith("hf-robust push: error: ") and message in text
    assert TOKEN not in text and text.count("\n") == 2


def test_help_names_the_login(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_push(["--help"], prog="hf-robust push", description="Publish.")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and text.startswith("usage: hf-robust push ") and "DIR REPO" in text
    assert "`hf auth login`, or the token in HF_TOKEN" in text


def test_a_rehearsal_sends_nothing(encoder, capsys, monkeypatch, tmp_path):
    with HubServer() as hub:
        connect(monkeypatch, hub, tmp_path)
        push.main([str(encoder.parent), "user/a", "--dry_run"])
        assert hub.log == []
    text = capsys.readouterr().out
    assert f"encoder in {encoder}: 5 files" in text and "  model.safetensors\n" in text
    assert "stays here: notes.txt" in text and "Dry run: nothing was sent to user/a." in text


@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # of the client, to its own library
def test_a_push_says_where_it_is(encoder, capsys, monkeypatch, tmp_path):
    with HubServer() as hub:
        connect(monkeypatch, hub, tmp_path)
        for _ in range(2):
            push.main([str(encoder), "a", "--commit_message", "hello"])
        assert hub.repository("robust/a").commits[-1].title == "hello"
        url = f"{hub.endpoint}/robust/a"
    text = capsys.readouterr().out
    assert f"Published: {url} (5 files; commit " in text and f"Everything was there already: {url} (" in text


def test_an_error_is_one_message(encoder, monkeypatch, tmp_path):
    with HubServer() as hub:
        connect(monkeypatch, hub, tmp_path, token=None)
        with pytest.raises(SystemExit) as stop:
            console.run_or_exit(push.main, [str(encoder), "user/a"])
    assert str(stop.value.code).startswith("error: not logged in: publishing needs a token")
    with pytest.raises(SystemExit) as stop:
        console.run_or_exit(push.main, [str(tmp_path / "nowhere"), "user/a"])
    assert "error: no folder" in str(stop.value.code)
