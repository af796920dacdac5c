"""Folders go to a Hub on this machine through the real client: whole or not at all, and nothing here changes."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import traceback
from pathlib import Path

import pytest
import torch
from hub_server import READ_TOKEN, TOKEN, HubServer, connect
from released import OURS, STOCK, trained_model

from hf_robust.adapters import save_adapter, with_adapter
from hf_robust.classifiers import build_classifier
from hf_robust.coresets.base import Coreset
from hf_robust.evaluation.report import EncoderReport
from hf_robust.hub import save_encoder
from hf_robust.hub_failures import PushError
from hf_robust.model_card import write_model_card
from hf_robust.publishing import Pushed, push_folder

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # of the client, to its own library


def describe(folder: Path, name: str, **more) -> None:
    """Report and card beside the weights."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) if file.is_file() else {"architecture": "a", "model_type": "peft"}
    report = EncoderReport(name, config["architecture"], config["model_type"], norm_branch="adv", **more)
    report.save(folder)
    write_model_card(report, folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    for name, config in {"thin": OURS["thin"], "stl": STOCK["stl"]}.items():
        save_encoder(trained_model(**config), root / name)
        if name == "thin":
            (root / name / "curves.png").write_bytes(b"\x89PNG not really")
        describe(root / name, name)
    return root


@pytest.fixture
def thin(folders, tmp_path) -> Path:
    return Path(shutil.copytree(folders / "thin", tmp_path / "thin"))


@pytest.fixture
def stl(folders, tmp_path) -> Path:
    return Path(shutil.copytree(folders / "stl", tmp_path / "stl"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # pauses before further tries
    with HubServer() as server:
        yield connect(monkeypatch, server, tmp_path)


def fingerprint(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        str(p.relative_to(folder)): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns)
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def expect(message: str, *arguments, **settings) -> PushError:
    with pytest.raises(PushError, match=message) as caught:
        push_folder(*arguments, **settings)
    shown = "".join(traceback.format_exception(caught.value))
    assert TOKEN not in shown and READ_TOKEN not in shown
    return caught.value


# ---------------------------------------------------------------------- what arrives
def test_a_folder_arrives_whole_and_stays_as_it_was(hub, thin):
    before = fingerprint(thin)
    (thin / "notes.txt").write_text("of mine")
    pushed = push_folder(thin, "robust/encoder", commit_message="first")
    contents = hub.repository("robust/encoder").contents()
    assert set(contents) == set(before) == set(pushed.files)
    assert pushed.changed and pushed.removed == () and pushed.kind == "encoder"
    assert pushed.url == f"{hub.endpoint}/robust/encoder"
    assert hub.repository("robust/encoder").commits[-1].title == "first"
    assert hub.repository("robust/encoder").commits[-1].oid == pushed.commit
    same = set(before) - {"README.md", "report.json"}
    assert {name: contents[name] for name in same} == {name: (thin / name).read_bytes() for name in same}
    (thin / "notes.txt").unlink()
    assert fingerprint(thin) == before


def test_the_card_names_the_repository_unless_somebody_wrote_into_it(hub, thin):
    push_folder(thin, "robust/encoder")
    contents = hub.repository("robust/encoder").contents()
    assert b'from_pretrained("robust/encoder"' in contents["README.md"]
    assert b"PATH_OR_REPO" in (thin / "README.md").read_bytes()
    assert json.loads(contents["report.json"])["hub_id"] == "robust/encoder"
    with open(thin / "README.md", "a") as file:
        file.write("\nMy own words.\n")
    push_folder(thin, "robust/encoder")
    assert hub.repository("robust/encoder").contents()["README.md"] == (thin / "README.md").read_bytes()


def test_what_is_there_is_not_sent_again(hub, thin):
    first = push_folder(thin, "encoder")
    uploads = len(hub.seen("PUT /lfs/"))
    second = push_folder(thin, "robust/encoder")
    assert first.repo_id == second.repo_id == "robust/encoder"
    assert second == Pushed(**{**vars(first), "changed": False})
    assert uploads == 3 == len(hub.seen("PUT /lfs/"))  # two weights and a picture
    assert len(hub.seen("POST .*/commit/")) == 1


def test_files_of_an_older_push_go_and_those_of_other_people_stay(hub, thin, stl):
    push_folder(thin, "robust/encoder")
    repository = hub.repository("robust/encoder")
    repository.commit("by hand", {**repository.at("main").files, "demo.ipynb": (b"{}", None)})
    pushed = push_folder(stl, "robust/encoder")
    gone = {"backbones.py", "encoder.py", "curves.png", *(n for n in repository.commits[1].files if "native/" in n)}
    assert set(pushed.removed) == gone
    assert set(repository.contents()) == {p.name for p in stl.iterdir()} | {"demo.ipynb"}


def test_private_and_branches(hub, thin, stl):
    push_folder(thin, "robust/encoder", private=True)
    assert hub.repository("robust/encoder").private
    push_folder(thin, "robust/encoder")  # does not say which
    expect("is private and public was asked for: change it in its settings", thin, "robust/encoder", private=False)
    expect("no branch 'v2': leave the revision out.*--create_revision", stl, "robust/encoder", revision="v2")
    expect("no repository 'robust/new' yet, and a new one has no branch", stl, "robust/new", revision="v2")
    assert ("model", "robust/new") not in hub.repositories
    for _ in range(2):
        push_folder(stl, "robust/encoder", revision="v2", create_revision=True)
    repository = hub.repository("robust/encoder")
    assert "native/config.json" in repository.contents() and "native/config.json" not in repository.contents("v2")
    push_folder(stl, "robust/other", revision="v2", create_revision=True)
    assert "config.json" not in hub.repository("robust/other").contents()


def test_an_adapter_needs_an_encoder_that_others_have(hub, stl, tmp_path):
    pytest.importorskip("peft")
    model = with_adapter(build_classifier(stl, 3, ("adv",)), rank=2, alpha=2)
    adapter = save_adapter(model, tmp_path / "run" / "adapter", str(stl))
    describe(adapter, "a", task="classifier", encoder={"name": "stl"})
    before = fingerprint(adapter)
    with pytest.raises(
        ValueError, match="a folder that nobody else has: push the encoder first, then the adapter with"
    ):
        push_folder(adapter, "robust/adapter")
    with pytest.raises(ValueError, match="base_model='robust/stl' is for an adapter, this is a encoder: leave it out"):
        push_folder(stl, "robust/adapter", base_model="robust/stl")
    assert hub.log == []
    pushed = push_folder(tmp_path / "run", "robust/adapter", base_model="robust/stl")
    contents = hub.repository("robust/adapter").contents()
    assert pushed.kind == "adapter" and fingerprint(adapter) == before
    assert json.loads(contents["adapter_config.json"])["base_model_name_or_path"] == "robust/stl"
    push_folder(stl, "robust/stl")
    before = hub.repository("robust/stl").contents()
    for base in ("robust/stl", "robust/other"):
        expect("holds a network .* which this adapter would replace", adapter, "robust/stl", base_model=base)
    expect("holds an adapter .* which this encoder would replace", stl, "robust/adapter")
    assert hub.repository("robust/stl").contents() == before
    assert hub.repository("robust/adapter").contents() == contents
    assert b"base_model: robust/stl" in contents["README.md"] and str(stl).encode() not in b"".join(contents.values())


def test_coresets_alone_are_a_data_set(hub, tmp_path):
    for epoch in (2, 4):
        chosen = Coreset([0, 2, 5], "RCS(fraction=0.3)", "digits", 10, 10, 0.3, 0.3, epoch, 1, 0.5)
        chosen.save(tmp_path / f"coreset-{epoch:04d}.json")
    pushed = push_folder(tmp_path, "robust/chosen")
    contents = hub.repository("robust/chosen", "dataset").contents()
    assert pushed.kind == "coreset" and pushed.url.endswith("/datasets/robust/chosen")
    assert set(contents) == {"README.md", "coreset-0002.json", "coreset-0004.json"}
    assert b"| coreset-0004.json | digits | 3 of 10 | `RCS(fraction=0.3)` | 4 |" in contents["README.md"]
    assert set(push_folder(tmp_path / "coreset-0002.json", "robust/one").files) == {"README.md", "coreset-0002.json"}
    assert not (tmp_path / "README.md").exists()


# ---------------------------------------------------------------------- who may not
@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        (None, "robust/e", "not logged in: publishing needs a token .* `hf auth login`"),
        ("hf_" + "Unknown" * 5, "robust/e", r"does not accept this login for 'robust/e' \(401\): log in again"),
        (READ_TOKEN, "robust/e", r"this login may not write to 'robust/e' \(403\): use a token with write"),
        (TOKEN, "stranger/e", r"this login may not write to 'stranger/e' \(403\)"),
    ],
)
def test_logins_that_may_not_write(hub, stl, monkeypatch, token, name, message):
    connect(monkeypatch, hub, stl, token)
    assert not expect(message, stl, name).passing
    assert hub.repositories == {}


def test_a_token_given_by_hand_counts(hub, stl, monkeypatch):
    connect(monkeypatch, hub, stl, READ_TOKEN)
    assert push_folder(stl, "lab/e", token=TOKEN).repo_id == "lab/e"


def test_offline_mode_and_a_server_that_is_not_there(hub, stl, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not expect("offline mode: unset HF_HUB_OFFLINE", stl, "robust/e").passing
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert expect(
        r"no answer from the Hub at http://127.0.0.1:9 \(ConnectError.*push again later", stl, "robust/e"
    ).passing


# ---------------------------------------------------------------------- failures on the way
FOR_EVER = 10_000
FAULTS = {
    "500 on the commit": lambda hub: hub.fail("POST /api/models/.*/commit/", FOR_EVER),
    "500 as a page": lambda hub: hub.fail("POST /api/validate-yaml", FOR_EVER, body=b"<html>Internal Error</html>"),
    "503 on the upload": lambda hub: hub.fail("PUT /lfs/", FOR_EVER, status=503),
    "500 on creating": lambda hub: hub.fail("POST /api/repos/create", FOR_EVER),
    "cut in the upload": lambda hub: hub.cut("PUT /lfs/", FOR_EVER, after=1000),
    "cut in the commit": lambda hub: hub.cut("POST /api/models/.*/commit/", FOR_EVER, after=1000),
    "cut in an answer": lambda hub: hub.cut("GET /api/models/.*/revision/", FOR_EVER, after=10),
    "silent on the commit": lambda hub: hub.hang("POST /api/models/.*/commit/", FOR_EVER, seconds=60),
    "silent on the upload": lambda hub: hub.hang("PUT /lfs/", FOR_EVER, seconds=60),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failing_server_leaves_the_folder_and_the_second_try_completes(hub, thin, fault):
    before = fingerprint(thin)
    FAULTS[fault](hub)
    error = expect(
        "nothing was changed there and the folder here is as it was; push again later",
        *(thin, "robust/encoder"),
        **{"attempts": 2, "timeout": 0.1},
    )
    assert error.passing and fingerprint(thin) == before
    if (there := hub.repositories.get(("model", "robust/encoder"))) is not None:
        assert there.contents() == {}  # whole or not at all
    sent = [entry.path for entry in hub.seen("PUT /lfs/") if entry.status == 200]
    hub.heal()
    pushed = push_folder(thin, "robust/encoder")
    assert pushed.changed and set(hub.repository("robust/encoder").contents()) == set(before)
    assert fingerprint(thin) == before
    sent_again = [entry.path for entry in hub.seen("PUT /lfs/") if entry.status == 200][len(sent) :]
    assert set(sent).isdisjoint(sent_again) and len(set(sent + sent_again)) == 3


def test_a_failure_that_passes_is_not_noticed(hub, thin, caplog):
    hub.fail("GET /api/models/robust/encoder", 2)
    hub.fail("POST /api/repos/create", 2, status=502)
    hub.cut("POST /api/validate-yaml", 2, after=50)
    with caplog.at_level(logging.INFO, "hf_robust"):
        assert push_folder(thin, "robust/encoder").changed
    assert len([r for r in caplog.records if "push again later" in r.message and "try 2 of 3" in r.message]) == 3
    assert TOKEN not in caplog.text


def test_a_server_that_repeats_the_token_is_not_quoted(hub, stl):
    hub.fail("POST /api/repos/create", 9, status=418, body=json.dumps({"error": f"no tea for {TOKEN}"}).encode())
    error = expect(r"the Hub refused 'robust/e' \(418: .*no tea for", stl, "robust/e")
    assert "REDACTED" in str(error)
    odd = "my-own-token"  # of another Hub, not known by its looks
    hub.tokens[odd] = "write"
    hub.fail("POST /api/repos/create", 9, status=418, body=json.dumps({"error": f"no tea for {odd}"}).encode())
    hub.faults.pop(0)
    shown = "".join(traceback.format_exception(expect("no tea for REDACTED", stl, "robust/e", token=odd)))
    assert odd not in shown and odd not in repr(vars(error))


@pytest.mark.parametrize("body", [b"{}", b"[]", b"null", b"<html>"])
@pytest.mark.parametrize(("name", "line"), [("encoder", "GET /api/whoami-v2"), ("robust/encoder", "GET /api/models/")])
def test_an_answer_that_is_none_is_a_failure_that_passes(hub, stl, body, name, line):
    hub.fail(line, 3, status=200, body=body)
    assert expect("gave no readable answer: nothing was changed there", stl, name).passing
    assert push_folder(stl, name).changed


def test_files_that_the_hub_leaves_out_are_missed(hub, stl, monkeypatch):
    monkeypatch.setattr(hub, "lfs", ())
    push_folder(stl, "robust/e")
    add = "hf_robust.publishing.CommitOperationAdd"
    monkeypatch.setattr(add, lambda name, path: __import__("huggingface_hub").CommitOperationAdd(f"x{name}", path))
    expect("README.md, .* did not arrive in 'robust/new'", stl, "robust/new")


def test_the_module_state_of_the_client_is_put_back(hub, stl):
    import huggingface_hub

    before = huggingface_hub.get_session().timeout
    push_folder(stl, "robust/e", timeout=7)
    assert huggingface_hub.get_session().timeout == before
    assert torch.is_grad_enabled()
