"""The card: what it says comes from the report, what the report does not say is not in it."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from card_reports import CLASSIFIER, CORESET, report
from huggingface_hub import ModelCard

from hf_robust.evaluation.report import EncoderReport
from hf_robust.model_card import copy_evaluation_pictures, write_model_card


def written(folder: Path, **changes: Any) -> str:
    return write_model_card(report(**changes), folder).read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a card needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_the_metadata_reads_back(tmp_path: Path) -> None:
    data = {"name": "CIFAR-10", "hub_id": "uoft-cs/cifar10"}
    path = write_model_card(report(dataset=data, license="apache-2.0"), tmp_path)
    card = ModelCard.load(path).data
    assert path == tmp_path / "README.md"
    assert (card.library_name, card.pipeline_tag, card.license) == (
        "transformers",
        "image-feature-extraction",
        "apache-2.0",
    )
    assert {"adversarial-robustness", "contrastive-learning", "timm", "acl"} <= set(card.tags)
    assert card.datasets == ["uoft-cs/cifar10"] and card.model_name == "acl-digits"
    assert card.eval_results is not None
    clean, attacked = card.eval_results
    assert clean.metric_name == "Standard accuracy, linear probe" and clean.metric_value == 0.9
    assert attacked.metric_name == "PGD-20 accuracy (L-inf, eps 8/255), linear probe"
    assert attacked.metric_value == 0.1 * 7 and attacked.metric_type == "accuracy"
    assert (attacked.dataset_name, attacked.dataset_split) == ("digits", "test")
    expected = {"attack": "pgd20", "norm": "linf", "eps": "8/255", "step_size": "2/255", "steps": 20}
    assert attacked.metric_args == {**expected, "n_train": 1437, "n_eval": 360, "seed": 0}


def test_only_this_encoders_results_are_metadata_but_the_table_shows_the_contrast(tmp_path: Path) -> None:
    text = written(tmp_path)
    header = yaml.safe_load(text.split("---")[1])
    assert len(header["model-index"]) == 1 and len(header["model-index"][0]["results"]) == 1
    assert len(header["model-index"][0]["results"][0]["metrics"]) == 2
    results = text.split("## Results")[1].split("## ")[0]
    assert "SimCLR" in results and "**acl-digits**" in results and "97.0 %" in results


def test_contrast_with_the_same_budget_stands_beside_and_another_budget_apart(tmp_path: Path) -> None:
    values = report()
    del values["results"][1]["dataset"]
    values["results"].append({**values["results"][0], "model": "small", "n_train": 100})
    text = write_model_card(values, tmp_path).read_text()
    assert "| metric | **acl-digits** | SimCLR |" in text and "| metric | small |" in text
    row = next(line for line in text.splitlines() if line.startswith("| PGD-20 accuracy (L-inf, eps 8/255) | 70.0 %"))
    assert row == "| PGD-20 accuracy (L-inf, eps 8/255) | 70.0 % (65.1\u201374.5) | 0.0 % (0.0\u20131.1) |"


def test_a_missing_number_has_no_row(tmp_path: Path) -> None:
    text = written(tmp_path / "full")
    assert all(word in text for word in ("PGD-20 accuracy", "| batch size | 128 |", "| hours | 0.50 |", "| commit |"))
    results = [{"model": "acl-digits", "metrics": {"standard_accuracy": 0.9, "pgd20_linf_8_255_accuracy": None}}]
    text = written(
        tmp_path / "less", results=results, training={}, commit=None, hardware={}, citation=None, command=None
    )
    for word in ("PGD-20 accuracy", "batch size", "hours", "commit", "hardware", "## Citation", "None", "fitted on"):
        assert word not in text
    assert "| Standard accuracy | 90.0 % |" in text


def test_a_report_with_the_least_gives_a_card_without_results(tmp_path: Path) -> None:
    least = {"name": "x", "architecture": "resnet18", "exported_format": "timm_wrapper"}
    text = write_model_card(least, tmp_path).read_text()
    assert "## Results" not in text and "None" not in text.replace("None: this encoder", "")
    card = ModelCard(text).data
    assert card.eval_results is None and card.datasets is None and "license" not in card.to_dict()


def test_loading_a_native_encoder_needs_nothing_of_ours(tmp_path: Path) -> None:
    use = written(tmp_path, exported_format="timm_wrapper", hub_id="ann/acl").split("## Use")[1].split("## ")[0]
    assert 'AutoModel.from_pretrained("ann/acl")' in use
    assert "trust_remote_code" not in use and "hf_robust" not in use and "native" not in use


def test_loading_another_stem_names_all_doors_that_exist(tmp_path: Path) -> None:
    use = written(tmp_path).split("## Use")[1].split("## ")[0]
    assert "import hf_robust" in use and "trust_remote_code=True" in use and "native" not in use
    assert "branch is `adv`" in use
    (tmp_path / "native").mkdir()
    (tmp_path / "native" / "config.json").write_text("{}")
    assert use != written(tmp_path).split("## Use")[1].split("## ")[0]
    native = written(tmp_path / "other", native=True)
    assert native.count('subfolder="native"') == 2 and 'subfolder="native"' not in written(tmp_path, native=False)


def test_the_code_of_the_card_is_python(tmp_path: Path) -> None:
    blocks = written(tmp_path, native=True).split("```python\n")[1:]
    assert len(blocks) == 3
    for block in blocks:
        compile(block.split("```")[0], "card", "exec")


def test_an_encoder_without_attack_says_that_it_is_not_robust(tmp_path: Path) -> None:
    text = written(tmp_path, threat_model=None, objective={"name": "SimCLR"})
    assert "is not robust" in text and "never saw an attacked image" in text and "Robust only against" not in text
    assert "Robust only against what it was trained and tested for: L-inf changes up to 8/255" in written(tmp_path)
    assert "AutoAttack" in text.split("## Limits")[1]


def test_pictures_are_shown_when_they_exist_and_come_along_from_the_parent(tmp_path: Path) -> None:
    encoder = tmp_path / "encoder"
    assert "## Pictures" not in written(encoder)
    (tmp_path / "curves.png").write_bytes(b"parent")
    (encoder / "examples.png").write_bytes(b"own")
    (tmp_path / "coreset.png").write_bytes(b"parent")
    text = written(encoder)
    assert all(f"]({name}.png)" in text for name in ("curves", "examples", "coreset"))
    assert (encoder / "curves.png").read_bytes() == b"parent" and (encoder / "examples.png").read_bytes() == b"own"


def test_the_coreset_has_a_section_when_there_was_one(tmp_path: Path) -> None:
    assert "oreset" not in written(tmp_path)
    text = written(tmp_path, coreset=CORESET)
    section = text.split("## Coreset")[1].split("## ")[0]
    assert "After 2 epochs on all images, the training showed only a part of the images, chosen by RCS." in section
    for row in (
        "| method | RCS (fraction=0.2, interval=2, attack_steps=None) |",
        "| fraction asked for | 20 % |",
        "| fraction chosen | 20 % |",
        "| images | 284 of 1423 |",
        "| validation images, never trained on | 14 |",
        "| selections | 5 |",
        "| selection seconds | 12.3 |",
        "| training seconds without selection | 100.0 |",
    ):
        assert row in section
    assert "coreset.json" not in section
    (tmp_path / "coreset.json").write_text("{}")
    assert "--coreset file:coreset.json" in written(tmp_path, coreset=CORESET)
    assert "coreset.json" not in written(tmp_path)  # left there by another run


def test_a_coreset_of_which_little_is_known_shows_that_little(tmp_path: Path) -> None:
    section = written(tmp_path, coreset={"name": "Stored", "images": 7}).split("## Coreset")[1].split("## ")[0]
    assert "The training showed" in section and "| images | 7 |" in section
    assert "None" not in section and "seconds" not in section and "validation" not in section


def test_a_supervised_method_is_not_called_self_supervised(tmp_path: Path) -> None:
    sat = ModelCard(written(tmp_path, objective={"name": "SAT", "parameters": {}, "supervised": True}))
    assert "pre-trained with labels by SAT on digits" in sat.text and "without labels" not in sat.text
    tags = set(sat.data.tags)
    assert {"supervised-learning", "sat"} <= tags and not tags & {"contrastive-learning", "self-supervised-learning"}
    acl = ModelCard(written(tmp_path))
    assert "pre-trained without labels by ACL" in acl.text and "supervised-learning" not in acl.data.tags


def test_the_card_of_a_classifier(tmp_path: Path) -> None:
    text = written(tmp_path, **CLASSIFIER)
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.base_model) == (
        "transformers",
        "image-classification",
        "ann/acl",
    )
    assert {"adversarial-robustness", "aff"} <= set(data.tags)
    assert not {"contrastive-learning", "supervised-learning"} & set(data.tags)
    assert [entry.metric_name for entry in data.eval_results] == [
        "Standard accuracy, test images",
        "PGD-20 accuracy (L-inf, eps 8/255), test images",
    ]
    assert (
        "A `resnet10_cifar` image classifier of 3 classes fine-tuned by AFF on CIFAR-10 from the encoder `acl-digits` "
        "(ACL on digits). It was fine-tuned on attacked images"
    ) in text
    assert "## Fine-tuning recipe" in text and "| encoder | `acl-digits` (ACL on digits) |" in text
    assert "| classes | cat, dog, newt |" in text and "| objective: beta | 6.0 |" in text
    assert "inear-probe" not in text and "Accuracy under PGD is an upper bound" in text
    assert "encoder =" not in text and text.count("AutoModelForImageClassification.from_pretrained(") == 2


def test_a_native_classifier_is_found_below_the_card(tmp_path: Path) -> None:
    assert "native" not in written(tmp_path, **CLASSIFIER)
    (tmp_path / "classifier" / "native").mkdir(parents=True)
    (tmp_path / "classifier" / "native" / "config.json").write_text("{}")
    assert 'subfolder="native"' in written(tmp_path, **CLASSIFIER) and "native" not in written(tmp_path)


def test_many_classes_are_counted(tmp_path: Path) -> None:
    text = written(tmp_path, **{**CLASSIFIER, "label_names": [f"c{i}" for i in range(100)]})
    assert "c18, c19, ... (100) |" in text and "c20" not in text


def test_a_classifier_fine_tuned_without_attack_does_not_promise_robustness(tmp_path: Path) -> None:
    text = written(tmp_path, **{**CLASSIFIER, "threat_model": None, "encoder": {"name": "./out/encoder"}})
    assert "owes to its encoder" in text and "None of its own" in text and "depends on its encoder" in text
    assert "from the encoder `./out/encoder`." in text and ModelCard(text).data.base_model is None
    assert "Robust only against" not in text and "this encoder never saw" not in text


def test_an_adapter_is_loaded_on_its_encoder(tmp_path: Path) -> None:
    values = {**CLASSIFIER, "exported_format": "peft", "hub_id": "ann/lora"}
    text = written(tmp_path, **values)
    assert ModelCard(text).data.library_name == "peft"
    use = text.split("## Use")[1].split("## ")[0]
    assert 'from_pretrained("ann/acl", num_labels=3)' in use and "import hf_robust" in use
    assert 'PeftModel.from_pretrained(encoder, "ann/lora").eval()' in use and "subfolder" not in use
    assert "the weights of the encoder stay where they are" in text
    native = {**CLASSIFIER["encoder"], "exported_format": "timm_wrapper"}
    assert "import hf_robust" not in written(tmp_path, **{**values, "encoder": native})


def test_an_encoder_that_started_from_another_says_so(tmp_path: Path) -> None:
    text = written(tmp_path, encoder={"name": "acl"})
    assert "pre-trained without labels by ACL on digits, starting from `acl`. It was trained" in text


def test_pictures_of_a_classifier_show_validation_accuracies(tmp_path: Path) -> None:
    (tmp_path / "curves.png").write_bytes(b"x")
    assert "linear-probe accuracies" in written(tmp_path) and "validation" not in written(tmp_path)
    assert "validation accuracies" in written(tmp_path, **CLASSIFIER)


@pytest.mark.parametrize("exported_format", ["timm_wrapper", "hf_robust_timm", "peft"])
def test_the_code_of_a_classifiers_card_is_python(tmp_path: Path, exported_format: str) -> None:
    text = written(tmp_path, **CLASSIFIER, exported_format=exported_format, native=True)
    blocks = text.split("```python\n")[1:]
    assert len(blocks) == {"timm_wrapper": 1, "hf_robust_timm": 3, "peft": 1}[exported_format]
    for block in blocks:
        compile(block.split("```")[0], "card", "exec")


def test_tokens_never_appear(tmp_path: Path) -> None:
    token = "hf_" + "aB3" * 11 + "Z"
    text = written(tmp_path, command=f"train --hub_token {token}", training={"optimizer": token}, citation=token)
    assert token not in text and "REDACTED" in text


def test_odd_texts_do_not_break_the_card(tmp_path: Path) -> None:
    text = written(
        tmp_path, command="echo ```", training={"optimizer": "a|b\nc"}, objective={"name": "A: 'C' \u2013 L"}
    )
    assert "| optimizer | a\\|b c |" in text and "````bash\necho ```\n````" in text
    assert ModelCard(text).data.tags[-1] == "a-c-l"


def test_a_report_object_and_its_dict_give_the_same_card(tmp_path: Path) -> None:
    first = write_model_card(report(), tmp_path / "a").read_text()
    assert first == write_model_card(EncoderReport.from_dict(report()), tmp_path / "b").read_text()


@pytest.mark.parametrize("hub_id", ["/data/my images", "./x", "a/b/c", ""])
def test_a_data_set_that_is_no_hub_id_is_refused(tmp_path: Path, hub_id: str) -> None:
    with pytest.raises(ValueError, match="hub_id must be an id such as.*write None"):
        write_model_card(report(dataset={"name": "x", "hub_id": hub_id}), tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_pictures_of_an_evaluation_stand_under_its_name(tmp_path: Path) -> None:
    source, card = tmp_path / "evaluation", tmp_path / "card"
    source.mkdir()
    card.mkdir()
    for name in ("robustness_curve", "corruptions", "classes", "examples"):
        (source / f"{name}.png").write_bytes(name.encode())
    entry = {**report()["results"][1], "protocol": "fine-tuned by SLF"}
    entry = copy_evaluation_pictures(entry, source, card)
    assert entry["pictures"][0] == "fine-tuned-by-slf-digits-n360-seed0_robustness_curve.png"
    assert len(entry["pictures"]) == 4
    text = write_model_card(report(results=[entry]), card).read_text()
    shown = text.split("## Pictures")[1].split("## ")[0]
    assert shown.count("](fine-tuned-by-slf-digits-n360-seed0_") == 4
    assert "*Accuracy under each corruption at each severity (fine-tuned by SLF, digits).*" in shown
    (source / "corruptions.png").unlink()  # the next one measured less
    entry = copy_evaluation_pictures(entry, source, card)
    assert len(entry["pictures"]) == 3 and len(list(card.glob("*.png"))) == 3
    other = copy_evaluation_pictures({**entry, "seed": 1}, source, card)
    assert not {*other["pictures"]} & {*entry["pictures"]}
    assert "pictures" not in copy_evaluation_pictures(entry, tmp_path / "none", card)


def test_pictures_that_the_report_names_but_are_not_there_or_elsewhere_are_not_shown(tmp_path: Path) -> None:
    (tmp_path / "x_classes.png").write_bytes(b"x")
    names = ["x_classes.png", "x_corruptions.png", "../x_classes.png", "x_other.png"]
    entry = {**report()["results"][1], "pictures": names}
    text = write_model_card(report(results=[entry]), tmp_path).read_text()
    assert text.count("](") == 1 and "](x_classes.png)" in text


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    assert "AutoAttack was not measured" in written(tmp_path)
    own = {**report()["results"][1], "metrics": {"autoattack_linf_8_255_accuracy": 0.5}}
    part = {**report()["results"][1], "metrics": {"autoattackfast_linf_8_255_accuracy": 0.5}}
    assert "was not measured" not in written(tmp_path, results=[own])
    assert "AutoAttack was not measured" in written(tmp_path, results=[part])
    contrast = {**own, "model": "SimCLR"}
    assert "AutoAttack was not measured" in written(tmp_path, results=[report()["results"][1], contrast])
    made = {**own, "metrics": {"generated_corruptions_mean_accuracy": 0.5}}
    text = written(tmp_path, results=[made])
    assert "not the published CIFAR-10-C" in text and "rotations and patches are another matter" in text


def test_writing_twice_changes_nothing(tmp_path: Path) -> None:
    first = write_model_card(report(), tmp_path).read_bytes()
    assert first == write_model_card(report(), tmp_path).read_bytes() and b"\r" not in first
