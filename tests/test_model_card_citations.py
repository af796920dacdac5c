"""A card cites what it builds on, each paper once, and nothing else."""

from __future__ import annotations

import re
from typing import Any

import pytest
from card_reports import CITATION, report

from hf_robust.coresets import load_coreset_method
from hf_robust.evaluation.report import EncoderReport
from hf_robust.model_card_citations import AUTOATTACK, CORRUPTIONS, bibtex
from hf_robust.objectives import load_objective


def cited(**changes: Any) -> list[str]:
    """Keys of the entries, in order."""
    return re.findall(r"^@\w+\{([^,]+),", bibtex(EncoderReport.from_dict(report(**changes))), flags=re.MULTILINE)


def measured(*names: str, protocol: str = "linear probe") -> dict[str, Any]:
    return {"results": [{"model": "acl-digits", "metrics": dict.fromkeys(names, 0.5), "protocol": protocol}]}


def test_the_method_comes_first_then_contrasts_and_metrics():
    assert cited() == ["acl", "chen2020simclr", "madry2018towards"]
    assert bibtex(EncoderReport.from_dict(report())).startswith(CITATION)


@pytest.mark.parametrize(
    ("metric", "key"),
    [
        ("autoattack_linf_8_255_accuracy", "croce2020reliable"),
        ("autoattackfast_l2_0.5_accuracy", "croce2020reliable"),
        ("pgd10_linf_8_255_accuracy", "madry2018towards"),
        ("cifar10c_mean_accuracy", "hendrycks2019benchmarking"),
        ("generated_corruptions_partial_mean_accuracy", "hendrycks2019benchmarking"),
    ],
)
def test_a_metric_brings_its_paper_when_it_was_measured(metric, key):
    assert cited(**measured("standard_accuracy", metric)) == ["acl", key]
    assert cited(results=[{"model": "acl-digits", "metrics": {metric: None}}]) == ["acl"]
    assert cited(**measured("standard_accuracy")) == ["acl"]


@pytest.mark.parametrize(
    ("protocol", "key"), [("fine-tuned by SLF", "fan2021does"), ("fine-tuned by AutoLoRa", "xu2024autolora")]
)
def test_a_protocol_brings_its_paper(protocol, key):
    assert cited(**measured("standard_accuracy", protocol=protocol)) == ["acl", key]


def test_the_encoder_it_came_from_is_cited_too():
    encoder = {"name": "x", "objective": "DynACL-AIR", "coreset": "RCS"}
    assert cited(results=[], encoder=encoder) == ["acl", "luo2023dynacl", "xu2023air", "xu2023rcs"]


def test_one_paper_under_two_keys_stands_once():
    dynacl, alf = (load_objective(name).citation for name in ("dynacl", "alf"))
    assert "luo2023rethinking" in alf and "luo2023dynacl" in dynacl
    assert cited(citation=dynacl, **measured("standard_accuracy", protocol="fine-tuned by ALF")) == ["luo2023dynacl"]
    assert cited(citation=f"{dynacl}\n\n{dynacl}", results=[]) == ["luo2023dynacl"]


def test_nothing_to_cite_is_nothing():
    assert bibtex(EncoderReport.from_dict(report(citation=None, results=[]))) == ""


@pytest.mark.parametrize("entry", [AUTOATTACK, CORRUPTIONS, load_coreset_method("rcs").citation])
def test_entries_are_whole(entry):
    assert re.fullmatch(r"@\w+\{[\w:-]+,\n.*\n\}", entry, flags=re.DOTALL) and entry.count("{") == entry.count("}")
    for key in ("title", "author", "booktitle", "year"):
        assert re.search(rf"^\s*{key}\s*=\s*\{{.+\}},?$", entry, flags=re.MULTILINE), key
