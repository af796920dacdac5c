"""Models for the demo: classifiers, encoders with a probe, the default, and what is said when they are not there."""

from __future__ import annotations

import pytest
import torch
from exhibits import TINY, brightness, digits_run
from PIL import Image
from released import trained_model

from hf_robust.classifiers import save_classifier
from hf_robust.data import ImageDataset
from hf_robust.demo.rendering import to_picture
from hf_robust.demo.sources import (
    Exhibit,
    default_models,
    examples_of,
    find_model,
    known_dataset,
    labelled_images,
    load_model,
    pictures_in,
    title_of,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return digits_run(tmp_path_factory.mktemp("outputs") / "digits")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetuned")
    model = trained_model(**TINY, head="classifier", num_classes=3)
    save_classifier(model, folder / "classifier", label_names=["a", "b", "c"], native=False)
    return folder


def test_the_default_is_the_first_run_of_the_readme(run, tmp_path):
    robust, plain = default_models(run)
    assert (find_model(robust), find_model(plain)) == (
        (str(run / "encoder"), True),
        (str(run / "contrast_simclr" / "checkpoint-4"), True),
    )
    assert (title_of(robust), title_of(plain)) == ("ACL resnet10_cifar digits", "SimCLR")
    assert known_dataset([plain]) == "digits"  # by the report of the run around it
    with pytest.raises(FileNotFoundError, match="run 'python examples/pretrain.py' first .*, or name a model with"):
        default_models(tmp_path / "digits")


def test_an_encoder_gets_a_probe_that_knows_the_digits(run):
    train, test = (labelled_images("digits", split, 150) for split in ("train", "test"))
    for source in default_models(run):
        model = load_model(source, train, progress=False)
        assert model.label_names == tuple("0123456789") and model.image_size == 32
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        with torch.no_grad():
            answers = model(test.images.float() / 255).argmax(1)
        assert float((answers == test.labels).float().mean()) > 0.5  # of a random network; chance is 0.1


def test_a_classifier_is_read_as_it_is(classifier):
    model = load_model(str(classifier), None)
    assert model.label_names == ("a", "b", "c") and find_model(str(classifier)) == (
        str(classifier / "classifier"),
        False,
    )
    assert title_of(str(classifier)) == classifier.name and known_dataset([str(classifier)]) is None


def test_an_encoder_without_images_says_what_to_do(run):
    with pytest.raises(ValueError, match="is an encoder and has no classes: name labelled images .* --dataset_name"):
        load_model(str(run / "encoder"), None)
    unlabelled = ImageDataset.from_tensors(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), name="mine")
    with pytest.raises(ValueError, match="'mine' has no labels with two classes or more"):
        load_model(str(run / "encoder"), unlabelled)
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_model("./nowhere", None)


def test_examples_show_every_class_and_are_recognised(tmp_path):
    examples = examples_of(labelled_images("digits", "test", None))
    assert len(examples) == 12 and {e.truth for e in examples} == set("0123456789")
    exhibit = Exhibit({"robust": brightness(size=32)}, {"robust": "x"}, examples)
    assert exhibit.truth_of(to_picture(examples[5].image.float() / 255, 1)) == examples[5].truth
    assert exhibit.truth_of(Image.new("RGB", (32, 32), "red")) is None and exhibit.size_of("robust") == 32


def test_pictures_of_files_and_folders(tmp_path):
    Image.new("RGB", (20, 10), "red").save(tmp_path / "b.png")
    Image.new("L", (8, 8)).save(tmp_path / "a.jpg")
    (tmp_path / "notes.txt").write_text("no picture")
    found = pictures_in([str(tmp_path), str(tmp_path / "b.png")])
    assert [tuple(p.image.shape) for p in found] == [(3, 8, 8), (3, 10, 10), (3, 10, 10)]
    with pytest.raises(FileNotFoundError, match="is not there"):
        pictures_in([str(tmp_path / "c.png")])
    with pytest.raises(ValueError, match="no picture that can be read"):
        pictures_in([str(tmp_path / "notes.txt")])
