"""What a conversion leaves in the folder, and what it may be told."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from authors_networks import AclProjector, Net, prefixed, trained
from torch import nn

from hf_robust import build_classifier, load_encoder
from hf_robust.converters import convert
from hf_robust.evaluation.report import EncoderReport


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("authors") / "ACL_CIFAR10.pt"
    torch.save({"state_dict": trained(Net(head={"fc": AclProjector(32, 2)})).state_dict(), "epoch": 1}, path)
    return path


@pytest.fixture(scope="module")
def done(checkpoint):
    return convert(checkpoint, checkpoint.parent / "out", "acl", command="hf-robust convert x")


def test_the_configuration_says_where_the_weights_come_from(done, checkpoint):
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    for folder in (done.folder, done.folder / "native"):
        start = json.loads((folder / "config.json").read_text())["converted_from"]
        assert start == {
            "format": "acl",
            "file": "ACL_CIFAR10.pt",
            "sha256": digest,
            "branch": "adv",
            "source": start["source"],
        }
        assert "VITA-Group/Adversarial-Contrastive-Learning" in start["source"]


def test_the_card_claims_nothing(done):
    card = (done.folder / "README.md").read_text()
    assert card.startswith("---\n") and "# ACL_CIFAR10" in card and "`ACL_CIFAR10.pt`" in card
    assert "under which licence they may be used" in " ".join(card.split()) and "\nlicense:" not in card
    assert "Not robust" not in card and "without an attack" not in card and "%" not in card.replace("%(", "")
    assert "does not say against what it was trained, and nothing was measured here" in card
    assert "left out: the projector" in card and done.report.converted_from["sha256"] in card
    assert "contrastive-learning" not in card.split("---")[1] and "Training recipe" not in card
    assert str(done.folder.parent) not in card


def test_the_report_reads_back_and_takes_figures(done):
    report = EncoderReport.load(done.folder)
    assert report == done.report and report.results == [] and report.threat_model is None
    assert (report.norm_branch, report.native, report.library_version is not None) == ("adv", True, True)


def test_the_folder_is_an_encoder_like_any_other(done):
    encoder = load_encoder(done.folder)
    model = build_classifier(done.folder, 3)
    for key, value in model.backbone.state_dict().items():
        torch.testing.assert_close(value, encoder.state_dict()[f"timm_model.{key}"], rtol=0, atol=0)


def test_conversion_leaves_the_generator_alone(checkpoint, tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    convert(checkpoint, tmp_path)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "acll"}, "unknown format 'acll': did you mean 'acl'"),
        ({"branch": "pgdd"}, "unknown norm branch 'pgdd': this file has clean, adv"),
        ({"classifier": True}, "holds no linear classifier"),
        ({"label_names": ["a"]}, "label_names name the classes of a classifier"),
        ({"image_size": 0}, "image_size must be 1 or more"),
        ({"mean": (0.5,) * 3}, "mean and std go together"),
        ({"mean": (0.5,) * 3, "std": (0,) * 3}, "three numbers each, std positive"),
        ({"mean": (0.5,) * 3, "std": (0.5,) * 3}, "the file holds its own input normalisation"),
        ({"format": "deacl"}, "ACL_CIFAR10.pt cannot be converted as deacl: no key begins with 'backbone.'"),
    ],
)
def test_mistakes_write_nothing(settings, message, checkpoint, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert(checkpoint, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_normalisation_may_be_repeated_and_size_changed(checkpoint, tmp_path):
    again = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    done = convert(checkpoint, tmp_path, image_size=64, name="authors/acl", native=False, **again)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["image_size"] == 64 and config["pretrained_cfg"]["mean"] == list(again["mean"])
    assert done.report.name == "authors/acl" and not (tmp_path / "native").exists()


def test_classes_are_counted(tmp_path):
    net = trained(Net(count=0, normalize=None, shortcut="shortcut", head={"linear": nn.Linear(32, 4)}))
    torch.save(prefixed(net.state_dict(), "module."), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="must name each of the 4 classes .* got 2"):
        convert(tmp_path / "x.pth", tmp_path / "out", classifier=True, label_names=["a", "b"])
    done = convert(tmp_path / "x.pth", tmp_path / "out", classifier=True)
    assert done.report.label_names == ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"]
    assert "Image classifier `resnet18_cifar` of 4 classes" in (done.folder / "README.md").read_text()


def test_a_classifier_used_at_another_size_is_refused(tmp_path):
    net = trained(Net(count=0, normalize=None, shortcut="shortcut", head={"linear": nn.Linear(128, 4)}))
    torch.save(net.state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"has weight \(4, 128\) .* one on 32 pooled features was expected"):
        convert(tmp_path / "x.pth", tmp_path / "out")
