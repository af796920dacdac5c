"""Post-processing: clusters as labels, a probe, adversarial fine-tuning; better encoder out, stages resumable."""

from __future__ import annotations

import json

import pytest
import torch
from finetuning import tiny_arguments
from training import tiny_images, tiny_model

from hf_robust import postprocessing
from hf_robust.attacks import PGD
from hf_robust.data import ImageDataset
from hf_robust.hub import encoder_features, load_encoder, save_encoder
from hf_robust.models.modeling import RobustModelForPreTraining
from hf_robust.objectives.acl import ACL
from hf_robust.postprocessing import PostProcessing, cluster_labels, post_process


@pytest.fixture
def encoder(tmp_path):
    """A training checkpoint with both branches, told apart."""
    model = tiny_model(ACL())
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if ".clean.running_mean" in name:
                buffer.add_(0.02)
    model.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def arguments(folder, **changes):
    values = {"num_train_epochs": 2, "keep": "last", "validation_fraction": 0.0, "learning_rate": 0.05}
    return tiny_arguments(folder, **{**values, "weight_decay": 1e-4, **changes})


SETTINGS = PostProcessing(probe_stage_epochs=1)


def test_clusters_are_found_from_the_clean_features_in_the_order_of_the_images():
    model, data = tiny_model(ACL()), tiny_images(30)
    labels = cluster_labels(model, data, 3, seed=0, progress=False)
    assert labels.dtype == torch.int64 and set(labels.tolist()) == {0, 1, 2}
    assert torch.equal(labels, cluster_labels(model, data, 3, seed=0, progress=False))
    turned = cluster_labels(model, data.subset(torch.arange(29, -1, -1)), 3, seed=0, progress=False).flip(0)
    pairs = set(zip(labels.tolist(), turned.tolist(), strict=True))
    assert len(pairs) == 3  # the same clusters, perhaps in another order
    branches = []
    features = model.features
    model.features = lambda x, branch: (branches.append(branch), features(x, branch))[1]
    cluster_labels(model, data, 2, seed=0, progress=False)
    assert set(branches) == {"clean"}


def test_a_collapsed_encoder_is_told(tmp_path):
    model = tiny_model(ACL())
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.zero_()
    with pytest.raises(ValueError, match="24 images fall into 1 clusters where 3 were asked for"):
        cluster_labels(model, tiny_images(), 3, seed=0, progress=False)


@pytest.mark.parametrize(("variant", "branches"), [("dynacl", ("adv",)), ("air", ("clean", "adv"))])
def test_the_encoder_moves_and_leaves_through_the_same_door(tmp_path, encoder, variant, branches):
    settings = PostProcessing(probe_stage_epochs=1, lp_variant=variant)
    trainer = post_process(encoder, tiny_images(), settings, arguments(tmp_path / "out"), attack=PGD(steps=1))
    assert trainer.model.switch.branches == branches
    assert (tmp_path / "out" / "probe" / "head.safetensors").is_file()
    better = load_encoder(trainer.save_encoder(tmp_path / "better"))
    start = load_encoder(save_encoder(RobustModelForPreTraining.from_pretrained(encoder), tmp_path / "start"))
    before = start.state_dict()
    assert not [k for k, v in better.state_dict().items() if k.endswith("weight") and torch.equal(v, before[k])]
    x = torch.rand(2, 3, 8, 8)
    expected = trainer.model.eval().features(x, "adv")
    torch.testing.assert_close(encoder_features(better)(x), expected, atol=1e-5, rtol=1e-4)


def test_real_labels_are_not_read(tmp_path, encoder):
    data = tiny_images()
    ends = []
    for name, labels in (("true", data.labels), ("other", data.labels.flip(0))):
        images = ImageDataset.from_tensors(data.images, labels, name="tiny")
        trainer = post_process(encoder, images, SETTINGS, arguments(tmp_path / name), attack=PGD(steps=1))
        ends.append(trainer.model.state_dict())
    assert all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())


def test_finished_stages_are_taken_up(tmp_path, encoder, monkeypatch):
    settings = {"save_strategy": "epoch", "save_total_limit": 5}
    straight = post_process(
        encoder, tiny_images(), SETTINGS, arguments(tmp_path / "a", **settings), attack=PGD(steps=1)
    )

    class Killed(Exception):
        pass

    train = postprocessing.RobustFinetuner.train

    def stop(self, *args, **kwargs):
        if "probe" not in self.args.output_dir:
            raise Killed
        return train(self, *args, **kwargs)

    monkeypatch.setattr(postprocessing.RobustFinetuner, "train", stop)
    with pytest.raises(Killed):
        post_process(encoder, tiny_images(), SETTINGS, arguments(tmp_path / "b", **settings), attack=PGD(steps=1))
    monkeypatch.setattr(postprocessing.RobustFinetuner, "train", train)

    def nothing(*args, **kwargs):
        raise AssertionError("clustered again")

    monkeypatch.setattr(postprocessing, "cluster_labels", nothing)
    again = arguments(tmp_path / "b", resume_from_checkpoint="true", **settings)
    resumed = post_process(encoder, tiny_images(), SETTINGS, again, attack=PGD(steps=1))
    other = resumed.model.state_dict()
    assert all(torch.equal(v, other[k]) for k, v in straight.model.state_dict().items())


@pytest.mark.parametrize(
    "changes",
    [{"keep": "best", "validation_fraction": 0.1}, {"validation_fraction": 0.1}, {"per_device_train_batch_size": 25}],
)
def test_what_the_last_stage_would_refuse_is_refused_first(tmp_path, encoder, changes):
    with pytest.raises(ValueError, match="reads no label|larger than the data set"):
        post_process(encoder, tiny_images(), SETTINGS, arguments(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.json"))


def test_a_fresh_start_over_an_earlier_run_destroys_nothing(tmp_path, encoder):
    settings = {"save_strategy": "epoch"}
    post_process(encoder, tiny_images(), SETTINGS, arguments(tmp_path / "out", **settings), attack=PGD(steps=1))
    labels = (tmp_path / "out" / "pseudo_labels.json").read_text()
    with pytest.raises(ValueError, match="of an earlier run"):
        post_process(encoder, tiny_images(), SETTINGS, arguments(tmp_path / "out", seed=7, **settings))
    assert (tmp_path / "out" / "pseudo_labels.json").read_text() == labels


@pytest.mark.parametrize("change", ["encoder", "probe"])
def test_a_resumed_run_with_another_encoder_or_probe_is_refused(tmp_path, encoder, change):
    post_process(encoder, tiny_images(), SETTINGS, arguments(tmp_path / "out"), attack=PGD(steps=1))
    if change == "encoder":
        tiny_model(ACL(), seed=3).save_pretrained(tmp_path / "other")
    settings = PostProcessing(probe_stage_epochs=2) if change == "probe" else SETTINGS
    source = tmp_path / "other" if change == "encoder" else encoder
    with pytest.raises(ValueError, match="encoder: " if change == "encoder" else "num_train_epochs: "):
        post_process(source, tiny_images(), settings, arguments(tmp_path / "out", resume_from_checkpoint="true"))


def test_labels_of_another_run_are_refused(tmp_path, encoder):
    (tmp_path / "out").mkdir()
    facts = {"dataset": "tiny", "images": 24, "clusters": 3, "seed": 7, "labels": [0] * 24}
    (tmp_path / "out" / "pseudo_labels.json").write_text(json.dumps(facts))
    args = arguments(tmp_path / "out", resume_from_checkpoint="true")
    with pytest.raises(ValueError, match="seed: 7 there, 42 here"):
        post_process(encoder, tiny_images(), SETTINGS, args)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lp_variant": "air++"}, "lp_variant must be dynacl or air"),
        ({"clusters": 1}, "clusters must be 2 or more"),
        ({"probe_stage_epochs": 0}, "probe_stage_epochs must be positive"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PostProcessing(**settings)


def test_how_many_clusters_must_be_known_and_fit():
    unlabelled = ImageDataset.from_tensors(tiny_images().images, name="nameless")
    with pytest.raises(ValueError, match="'nameless' has no classes to count.*--clusters"):
        PostProcessing().count(unlabelled)
    with pytest.raises(ValueError, match="30 clusters are more than the 24 images"):
        PostProcessing(clusters=30).count(unlabelled)
    assert PostProcessing(clusters=5).count(unlabelled) == 5 and PostProcessing().count(tiny_images()) == 3
