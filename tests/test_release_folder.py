"""What may be published is found, and everything else refused, before any request."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from released import OURS, trained_model

from hf_robust.classifiers import save_classifier
from hf_robust.evaluation.report import EncoderReport
from hf_robust.hub import save_encoder
from hf_robust.hub_folders import check_repo_id
from hf_robust.model_card import write_model_card
from hf_robust.release_folder import find_release, is_replaced


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("run")
    save_encoder(trained_model(**OURS["thin"]), root / "encoder")
    save_classifier(trained_model(**OURS["tiny"], head="classifier", num_classes=3), root / "classifier")
    for part in ("encoder", "classifier"):
        values = json.loads((root / part / "config.json").read_text())
        report = EncoderReport("x", values["architecture"], values["model_type"], task=part)
        report.save(root / part)
        write_model_card(report, root / part)
    return root


@pytest.fixture
def run(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "run"))


def test_every_file_of_a_release_goes_along_and_no_other(run):
    encoder = run / "encoder"
    expected = {p.relative_to(encoder).as_posix() for p in encoder.rglob("*") if p.is_file()}
    for name in ("evaluation/digits/report.html", "evaluation/digits/classes.png", ".eval_results/a.yaml", "LICENSE"):
        (encoder / name).parent.mkdir(parents=True, exist_ok=True)
        (encoder / name).write_text("x")
        expected.add(name)
    for name in ("evaluation/digits/flags.npz", "notes.txt", ".git/config", ".cache/x.json", "runs/events.out"):
        (encoder / name).parent.mkdir(parents=True, exist_ok=True)
        (encoder / name).write_text("x")
    release = find_release(encoder)
    assert (release.kind, release.repo_type, set(release.files)) == ("encoder", "model", expected)
    assert release.left_out == ("evaluation/digits/flags.npz", "notes.txt", "runs/events.out")
    assert release.size == sum((encoder / name).stat().st_size for name in expected)


def test_of_a_run_the_part_that_leaves_is_taken(run):
    with pytest.raises(ValueError, match="holds several networks: push .*encoder' or .*classifier'"):
        find_release(run)
    shutil.rmtree(run / "encoder")
    for name in ("training_args.bin", "trainer_state.json"):  # of the run, beside what leaves
        (run / name).write_text("x")
    assert find_release(run) == find_release(str(run / "classifier"))
    assert find_release(run).kind == "classifier"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


SPOILT = {
    "no card": (lambda d: (d / "README.md").unlink(), r"has no model card README.md.*write_model_card"),
    "no metadata": (lambda d: (d / "README.md").write_text("# Hello"), "has no metadata between '---' lines"),
    "bad metadata": (lambda d: (d / "README.md").write_text("---\na: [b\n---\n"), "metadata of .* cannot be read"),
    "cut weights": (lambda d: cut(d / "model.safetensors"), "model.safetensors' is damaged or incomplete"),
    "cut native weights": (lambda d: cut(d / "native" / "model.safetensors"), "native.* is damaged or incomplete"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has no model.safetensors but no weights at all"),
    "other weights": (
        lambda d: (d / "model.safetensors").rename(d / "other.safetensors"),
        "lacks model.safetensors: export the encoder again",
    ),
    "no code": (lambda d: (d / "backbones.py").unlink(), "lacks its code files backbones.py"),
    "pickled weights": (lambda d: (d / "old.pt").write_text("x"), "holds old.pt, and only safetensors are published"),
    "a pickle below": (lambda d: (d / "native" / "x.pkl").write_text("x"), "holds native/x.pkl, and only"),
    "training_args": (lambda d: (d / "training_args.bin").write_text("x"), "checkpoint, it holds training_args.bin"),
    "optimizer": (lambda d: (d / "optimizer.pt").write_text("x"), "is a training checkpoint, it holds optimizer.pt"),
    "rng": (lambda d: (d / "rng_state_0.pth").write_text("x"), "is a training checkpoint, it holds rng_state_0.pth"),
    "a token": (
        lambda d: (d / "report.json").write_text('{"command": "x --t hf_' + "Abcdefgh" * 4 + '"}'),
        "report.json' seems to hold an access token",
    ),
    "a training model": (
        lambda d: (d / "config.json").write_text('{"model_type": "hf_robust_pretraining"}'),
        r"is a training checkpoint or somebody else's model \(model_type 'hf_robust_pretraining'\)",
    ),
    "somebody's model": (lambda d: (d / "config.json").write_text('{"model_type": "bert"}'), "somebody else's model"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_may_not_be_published_is_refused(run, case):
    spoil, message = SPOILT[case]
    find_release(run / "encoder")
    spoil(run / "encoder")
    with pytest.raises(ValueError, match=message):
        find_release(run / "encoder")


@pytest.mark.parametrize("name", ["LICENSE", "secret.png", "model.safetensors", "coreset.json"])
def test_nothing_outside_the_folder_is_taken_along_by_a_link(run, tmp_path, name):
    encoder, outside = run / "encoder", tmp_path / "outside"
    inside = encoder / name
    outside.write_bytes(inside.read_bytes() if inside.is_file() else b"a secret")
    inside.unlink(missing_ok=True)
    inside.symlink_to(outside)
    with pytest.raises(ValueError, match=r"is a link to '.*outside', outside the folder.*put a copy there"):
        find_release(encoder)
    inside.unlink()
    (encoder / "LICENSE.txt").write_text("of mine")
    (encoder / "LICENSE").symlink_to("LICENSE.txt")
    if name != "model.safetensors":
        (tmp_path / "way").symlink_to(run)  # the folder itself may be reached by a link
        assert {"LICENSE", "LICENSE.txt"} <= set(find_release(tmp_path / "way" / "encoder").files)


@pytest.mark.parametrize("name", ["LICENSE.png", "coreset-1.json", "x.PT"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_under_another_name_is_refused(run, name, zipped):
    torch.save({"a": torch.zeros(2)}, run / "encoder" / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="may run code when opened"):
        find_release(run / "encoder")


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder '.*nowhere'"):
        find_release(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"holds no encoder, classifier or adapter \(but notes.txt\)"):
        find_release(tmp_path)
    (tmp_path / "coreset.json").write_text("{}")
    with pytest.raises(ValueError, match="is no coreset file"):
        find_release(tmp_path)


def test_every_name_that_a_push_writes_is_replaced_by_the_next():
    for name in ("model-00001-of-00002.safetensors", "native/model.safetensors", "evaluation/cifar10/report.html"):
        assert is_replaced(name), name
    for name in ("README.md", "LICENSE", "demo.ipynb", "a/model.safetensors", "mine.png", ".gitattributes"):
        assert not is_replaced(name), name


@pytest.mark.parametrize("name", ["", None, "a/b/c", "./here", "outputs/", "a b", "-x", "x--y", "a" * 120, "/abs"])
def test_names_that_no_repository_has(name):
    with pytest.raises(ValueError, match="write 'user/name' with letters"):
        check_repo_id(name)


def test_a_token_instead_of_a_name_is_not_repeated():
    with pytest.raises(ValueError) as caught:
        check_repo_id("hf_" + "Abcdefgh" * 4)
    assert "looks like an access token" in str(caught.value) and "Abcdefgh" not in str(caught.value)
    check_repo_id("user/hf_robust-resnet18")
    check_repo_id("resnet18")
