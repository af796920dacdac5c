"""The tables of a card: figures apart by protocol, data, number and seed, with intervals; what was tried."""

from __future__ import annotations

import json
from typing import Any

from card_reports import CLASSIFIER, report

from hf_robust.attacks import PGD
from hf_robust.evaluation.report import EncoderReport
from hf_robust.model_card_tables import recipe, results, threat_model

PGD20, AUTO = "pgd20_linf_8_255_accuracy", "autoattack_linf_8_255_accuracy"


def shown(part: Any, **changes: Any) -> str:
    return part(EncoderReport.from_dict(report(**changes)))


def result(**changes: Any) -> dict[str, Any]:
    plain = {"model": "acl-digits", "metrics": {"standard_accuracy": 0.5}, "protocol": "linear probe"}
    return {**plain, "n_eval": 100, "seed": 0, "dataset": {"name": "digits"}, **changes}


def test_each_protocol_data_set_number_split_and_seed_has_its_table():
    others = [
        {"protocol": "fine-tuned by SLF"},
        {"dataset": {"name": "x"}},
        {"n_eval": 50},
        {"seed": 1},
        {"n_train": 3},
    ]
    others += [{"dataset": {"name": "digits", "split": "train"}}]
    text = shown(results, results=[result(), *(result(**other) for other in others), result(model="SimCLR")])
    assert text.count("| metric |") == 7 and text.count("| metric | **acl-digits** | SimCLR |") == 1
    assert "**Linear probe**, on digits, judged on 100 images, seed 0." in text
    assert "**Linear probe**, on digits (split train), judged on 100 images, seed 0." in text
    assert "on digits, fitted on 3 images, judged on 100 images" in text


def test_intervals_are_those_of_the_report_where_it_has_them():
    assert "| Standard accuracy | 50.0 % (40.4\u201359.6) |" in shown(results, results=[result()])
    given = result(intervals={"standard_accuracy": [0.25, 0.75]})
    assert "| Standard accuracy | 50.0 % (25.0\u201375.0) |" in shown(results, results=[given])
    unknown = shown(results, results=[result(n_eval=None)])
    assert "| Standard accuracy | 50.0 % |" in unknown and "interval" not in unknown


def test_what_was_tried_is_said_and_what_was_not():
    assert "Tested against PGD-20 (L-inf, eps 8/255), linear probe." in shown(threat_model)
    both = shown(threat_model, results=[result(metrics={PGD20: 0.4}), result(metrics={AUTO: 0.3, "x": 1.0})])
    assert "; AutoAttack (L-inf, eps 8/255), linear probe." in both and both.count("Tested against") == 1
    assert "Not tested against any attack." in shown(threat_model, results=[result()])
    assert "Not tested" in shown(threat_model, results=[result(metrics={PGD20: None})])
    assert "Not tested" in shown(threat_model, results=[result(model="SimCLR", metrics={PGD20: 0.0})])


def test_the_attack_of_the_training_is_a_row():
    text = shown(threat_model)
    assert "| L-inf | 8/255 | 2/255 | 5 |" in text and "White box and untargeted" in text
    plain = shown(threat_model, **{**CLASSIFIER, "threat_model": None})
    assert "None of its own" in plain and "White box" not in plain


def test_an_attack_other_than_the_published_one_is_called_so():
    assert "not the published" not in shown(threat_model)
    attack = PGD(step_sizes=(8 / 255, 4 / 255), min_gain=0.03, replay=True).to_dict()
    text = shown(threat_model, threat_model=json.loads(json.dumps(attack)))
    assert "| L-inf | 8/255 | 8/255, 4/255 | 2 |" in text
    assert "not the published training attack: steps of different lengths; it stops below a gain of 3 %" in text
    assert "starts where its last one ended" in text


def test_whole_numbers_of_the_training_have_no_decimals():
    text = shown(recipe, training={"epochs": 12.0, "learning_rate": 0.5})
    assert "| epochs | 12 |" in text and "| learning rate | 0.5 |" in text
