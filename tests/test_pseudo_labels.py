"""Pseudo-labels: clusters of an encoder, files, look-up by index, the same after a resume."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training import tiny_images, tiny_model, tiny_trainer

from hf_robust.hub import encoder_features, load_encoder, save_encoder
from hf_robust.model_fit import check_fit
from hf_robust.objectives.acl import ACL
from hf_robust.objectives.advcl import AdvCL
from hf_robust.pseudo_labels import PSEUDO_LABELS_FILE, Labelling, PseudoLabels, cluster_images

OBJECTIVE = AdvCL(clusters=[2, 3])
IMAGES = 24


class Brightness(nn.Module):
    """The mean of each channel: `tiny_images` fall into their three classes by it."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


def given(images: int = IMAGES) -> PseudoLabels:
    index = torch.arange(images)
    return PseudoLabels({2: index % 2, 3: (index + 1) % 3}, "made up")


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in trainer.model.state_dict().items()}


# ---------------------------------------------------------------------- the labels
def test_clusters_of_an_encoder_that_tells_the_classes_apart():
    data = tiny_images(IMAGES)
    labels = cluster_images(Brightness(), data, (2, 3), size=8, source="brightness", seed=0, progress=False)
    assert labels.source == "k-means of the features of brightness"
    assert len(labels) == IMAGES and {k: v.dtype for k, v in labels.labels.items()} == dict.fromkeys(
        [2, 3], torch.int64
    )
    assert len({(a, b) for a, b in zip(labels.labels[3].tolist(), data.labels.tolist(), strict=True)}) == 3
    again = cluster_images(Brightness(), data, (2, 3), size=8, source="again", seed=0, progress=False)
    assert again.digest == labels.digest != given().digest


def test_look_up_by_index():
    found = given().of(torch.tensor([5, 0, 22]))
    assert {name: row.tolist() for name, row in found.items()} == {
        "pseudo_label_2": [1, 0, 0],
        "pseudo_label_3": [0, 1, 2],
    }


def test_files(tmp_path):
    given().save(tmp_path / "new" / PSEUDO_LABELS_FILE)
    stored = load_file(tmp_path / "new" / PSEUDO_LABELS_FILE)
    assert {k: v.dtype for k, v in stored.items()} == dict.fromkeys(["pseudo_label_2", "pseudo_label_3"], torch.int32)
    again = PseudoLabels.load(tmp_path / "new" / PSEUDO_LABELS_FILE)
    assert again.digest == given().digest and again.source == "made up"
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({"3": [0, 2, 1], "2": [1, 1, 0]}))
    assert {k: v.tolist() for k, v in PseudoLabels.load(path).labels.items()} == {2: [1, 1, 0], 3: [0, 2, 1]}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "no", r"holds no pseudo-labels \(.*such as pseudo_label_10"),
        ("a.json", "[1, 2]", r"holds no pseudo-labels"),
        ("a.json", '{"2": [0, 2]}', r"labels of 2 clusters must be in 0\.\.1, got 0\.\.2"),
        ("a.safetensors", "no", r"holds no pseudo-labels"),
        ("a.pkl", "no", r"read from \.safetensors or \.json, got 'a\.pkl': of a pickle write json\.dump"),
    ],
)
def test_other_files_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        PseudoLabels.load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.json.*pseudo_labels\.safetensors"):
        PseudoLabels.load(tmp_path / "none.json")


def test_labels_of_another_training_are_refused():
    with pytest.raises(
        ValueError, match=r"\(made up\) have 2, 3 clusters, the method asks for 5, too: .*clusters 2 3"
    ):
        given().chosen((2, 5), IMAGES)
    with pytest.raises(ValueError, match=r"are of 24 images, the training set has 25: they go by position"):
        given().chosen((2,), IMAGES + 1)
    assert list(given().chosen((3,), IMAGES).labels) == [3]
    with pytest.raises(ValueError, match=r"one integer per image .*\[\(3,\), \(4,\)\]"):
        PseudoLabels({2: torch.zeros(3, dtype=torch.int32), 3: torch.zeros(4, dtype=torch.int32)})


# ---------------------------------------------------------------------- what suits a training
def test_labels_that_are_no_integers_are_refused(tmp_path):
    file = tmp_path / "labels.json"
    file.write_text('{"3": [0.2, 1.9, 2.0]}')
    with pytest.raises(ValueError, match=r"holds no pseudo-labels .*3 clusters must be integers, got torch.float32"):
        PseudoLabels.load(file)


def test_more_clusters_than_images_are_refused_with_those_that_fit(tmp_path):
    with pytest.raises(ValueError, match=r"AdvCL learns 500 clusters, more than the 24 .*'tiny': .*--clusters 2 10$"):
        check_fit(AdvCL(), tiny_model(AdvCL()), tiny_images(IMAGES))
    with pytest.raises(ValueError, match=r"--clusters 2 10$"):
        tiny_trainer(tmp_path, AdvCL())
    check_fit(OBJECTIVE, tiny_model(OBJECTIVE), tiny_images(IMAGES))


def test_labels_nobody_learns_or_two_sources_are_refused():
    data = tiny_images(IMAGES)
    with pytest.raises(ValueError, match="ACL learns no pseudo-labels: leave them out, or train AdvCL"):
        Labelling(ACL(), data, given(), None)
    with pytest.raises(ValueError, match=r"got pseudo-labels and a teacher \('there'\).*give one of the two"):
        Labelling(OBJECTIVE, data, given(), "there")
    assert Labelling(ACL(), data, None, None).of({"index": torch.arange(2)}) == {}
    with pytest.raises(RuntimeError, match=r"no pseudo-labels yet: trainer.train\(\) makes them"):
        Labelling(OBJECTIVE, data, None, None).of({"index": torch.arange(2)})


# ---------------------------------------------------------------------- in a training
@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A training whose labels are clusters of another encoder."""
    folder = tmp_path_factory.mktemp("run")
    trainer = tiny_trainer(
        folder, OBJECTIVE, teacher=Brightness(), save_strategy="steps", save_steps=4, save_total_limit=9
    )
    start = weights(trainer)
    trainer.train()
    return SimpleNamespace(folder=folder, trainer=trainer, start=start, end=weights(trainer))


def test_clusters_of_the_teacher_are_the_labels_and_the_teacher_is_nothing_more(uninterrupted):
    trainer, data = uninterrupted.trainer, tiny_images(IMAGES)
    labels = trainer.labelling.labels
    assert labels.source == "k-means of the features of Brightness" and trainer.teacher is None
    assert len({(a, b) for a, b in zip(labels.labels[3].tolist(), data.labels.tolist(), strict=True)}) == 3
    assert PseudoLabels.load(uninterrupted.folder / PSEUDO_LABELS_FILE).digest == labels.digest


def test_a_batch_carries_the_labels_of_its_images(uninterrupted):
    trainer, data = uninterrupted.trainer, tiny_images(IMAGES)
    index = torch.tensor([3, 1, 20])
    batch = trainer.prepare_batch({"image": data.images[index], "index": index}, torch.Generator())
    for k in (2, 3):
        assert torch.equal(batch[f"pseudo_label_{k}"], trainer.labelling.labels.labels[k][index])
    assert set(OBJECTIVE.views) <= set(batch)


def test_everything_trains_with_finite_terms(uninterrupted):
    log = [entry for entry in uninterrupted.trainer.state.log_history if "loss" in entry]
    assert len(log) == 12 and all(entry["loss_contrastive"] > 0 and entry["loss_pseudo_labels"] > 0 for entry in log)
    parameters = {name for name, _ in uninterrupted.trainer.model.named_parameters()}
    still = {n for n in parameters if torch.equal(uninterrupted.start[n], uninterrupted.end[n])}
    assert still <= {"projector.fc1.bias"}


def test_a_resumed_training_has_the_same_labels_and_weights(uninterrupted, tmp_path):
    checkpoint = uninterrupted.folder / "checkpoint-4"
    again = tiny_trainer(tmp_path, OBJECTIVE)  # no teacher this time: the labels come with the checkpoint
    again.train(resume_from_checkpoint=str(checkpoint))
    assert again.labelling.labels.digest == uninterrupted.trainer.labelling.labels.digest
    for name, value in weights(again).items():
        assert torch.equal(value, uninterrupted.end[name]), name


def test_other_labels_than_those_of_the_checkpoint_are_refused(uninterrupted, tmp_path):
    trainer = tiny_trainer(tmp_path, OBJECTIVE, pseudo_labels=given())
    with pytest.raises(ValueError, match=r"was trained on other pseudo-labels \(k-means .*given \(made up\): leave"):
        trainer.train(resume_from_checkpoint=str(uninterrupted.folder / "checkpoint-4"))


def test_the_exported_encoder_is_the_adversarial_branch(uninterrupted, tmp_path):
    trainer = uninterrupted.trainer
    assert trainer.encoder_branch == "adv"
    folder = save_encoder(trainer.encoder_model, tmp_path / "encoder", trainer.encoder_branch, native=False)
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model.features(x, "adv")
        torch.testing.assert_close(encoder_features(load_encoder(folder))(x), expected, atol=1e-6, rtol=1e-5)
        assert not torch.allclose(trainer.model.features(x, "adv_ce"), expected, atol=1e-3)
    trainer.model.train()


def test_given_labels_are_used_and_written(tmp_path):
    file = tmp_path / "labels.json"
    file.write_text(json.dumps({str(k): v.tolist() for k, v in given().labels.items()}))
    trainer = tiny_trainer(tmp_path / "run", OBJECTIVE, pseudo_labels=file, max_steps=1)
    trainer.train()
    assert trainer.labelling.labels.digest == given().digest
    assert PseudoLabels.load(tmp_path / "run" / PSEUDO_LABELS_FILE).digest == given().digest


def test_without_a_teacher_the_network_itself_is_clustered_and_a_warning_says_so(tmp_path, caplog):
    trainer = tiny_trainer(tmp_path, OBJECTIVE, max_steps=1)
    before = weights(trainer)
    with caplog.at_level(logging.WARNING, logger="hf_robust.pseudo_labels"):
        trainer.labelling.prepare(trainer.model, trainer.args)
    assert "clusters of the network as it is before training" in caplog.text and "--teacher" in caplog.text
    assert trainer.labelling.labels.source == "k-means of the features of the network before training"
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())
    assert trainer.model.training is False or all(m.training for m in trainer.model.modules())


def test_a_teacher_from_a_folder_is_clustered_at_its_own_size(tmp_path, monkeypatch):
    teacher = tiny_model(ACL(), seed=3, image_size=16)
    save_encoder(teacher, tmp_path / "simclr" / "encoder", native=False)
    seen = []
    features = type(teacher).features
    trainer = tiny_trainer(tmp_path / "run", OBJECTIVE, teacher=str(tmp_path / "simclr" / "encoder"))
    trainer.labelling.prepare(trainer.model, trainer.args)
    assert trainer.labelling.labels.source == "k-means of the features of simclr/encoder"
    assert Path(tmp_path / "run" / PSEUDO_LABELS_FILE).is_file()
    monkeypatch.setattr(type(teacher), "features", lambda self, x, b: (seen.append(x.shape), features(self, x, b))[1])
    other = tiny_trainer(tmp_path / "other", OBJECTIVE, teacher=teacher)
    other.labelling.prepare(other.model, other.args)
    assert {shape[-1] for shape in seen} == {16}
