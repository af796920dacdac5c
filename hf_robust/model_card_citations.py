"""What a model card cites: the method by its report, and the protocols, contrasts and metrics it names, as BibTeX.

A method keeps its entry in its own class (`citation`); entries of metrics stand here.
"""

from __future__ import annotations

import re
from typing import Any

from .coresets import coreset_names, load_coreset_method
from .evaluation.report import EncoderReport, describe_metric
from .objectives import load_objective, objective_names

__all__ = ["bibtex"]

AUTOATTACK = """@inproceedings{croce2020reliable,
  title     = {Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks},
  author    = {Croce, Francesco and Hein, Matthias},
  booktitle = {International Conference on Machine Learning},
  year      = {2020}
}"""
CORRUPTIONS = """@inproceedings{hendrycks2019benchmarking,
  title     = {Benchmarking Neural Network Robustness to Common Corruptions and Perturbations},
  author    = {Hendrycks, Dan and Dietterich, Thomas},
  booktitle = {International Conference on Learning Representations},
  year      = {2019}
}"""
_CORRUPTED = re.compile(r"(generated_corruptions|cifar100?c)_")


def bibtex(report: EncoderReport) -> str:
    """BibTeX of everything the card builds on, each paper once.

    Args:
        report (`EncoderReport`): What is released; its own `citation` comes first.

    Returns:
        `str`: Entries with an empty line between them; empty when there is nothing to cite.
    """
    entries = _entries(report.citation or "")
    entries += _methods(str(report.encoder.get("objective") or ""))
    entries += _coreset(str(report.encoder.get("coreset") or ""))
    for result in report.results:
        entries += _methods(str(result.get("protocol") or ""))
        entries += _methods(str(result.get("model") or ""), whole=True)  # the contrast: "SimCLR"
    for result in report.results:
        for name, value in (result.get("metrics") or {}).items():
            entries += _metric(name) if value is not None else []
    kept: dict[str, str] = {}
    seen: set[str] = set()
    for entry in entries:  # two methods of one paper have two keys
        names = {
            _found(r"@\w+\{\s*([^,\s]+)", entry),
            re.sub(r"\W", "", _found(r"title\s*=\s*\{(.*)\}", entry)).lower(),
        }
        if not names - {""} & seen:
            kept[entry] = entry
        seen |= names
    return "\n\n".join(kept)


def _metric(name: str) -> list[str]:
    attack: Any = describe_metric(name).get("attack", "")
    if attack.startswith("autoattack"):
        return [AUTOATTACK]
    if attack.startswith("pgd"):
        return [load_objective("sat").citation]  # the paper of PGD training is that of PGD
    return [CORRUPTIONS] if _CORRUPTED.match(name) else []


def _methods(text: str, whole: bool = False) -> list[str]:
    """Entries of the methods that a title such as `DynACL-AIR` or `fine-tuned by SLF` is made of."""
    words = [text.lower()] if whole else re.findall(r"[a-z]+", text.lower())
    return [entry for word in words if word in objective_names() for entry in _entries(load_objective(word).citation)]


def _coreset(title: str) -> list[str]:
    return _entries(load_coreset_method(title).citation) if title.lower() in coreset_names() else []


def _entries(text: str) -> list[str]:
    return [entry.strip() for entry in re.split(r"^(?=@)", text, flags=re.MULTILINE) if entry.strip()]


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else ""
