"""Tables of flags and methods in the documentation, written from the classes that the command lines are made of.

    python docs/site/flag_tables.py

rewrites every table that stands between `<!-- flags: module:Class [prefix=coreset_] [without=base] -->` (or
`recipe: module:Class`, a method's published settings, or `methods: FOLDER`, all pre-training methods, with the folder
of their pages as seen from this one) and `<!-- end -->`. A test fails when a table is out of date.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from transformers import TrainingArguments

from hf_robust.flags import method_names, show_budget
from hf_robust.objectives import Objective, load_objective

DOCS = Path(__file__).resolve().parents[1]
PAGES = (DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md")))
_TABLE = re.compile(r"<!-- (flags|recipe|methods): (\S+)((?: \w+=\S+)*) -->\n.*?<!-- end -->", flags=re.DOTALL)
_BUDGETS = ("eps", "step_size")


def rewritten(text: str) -> str:
    """The text of a page with every table as the code has it now.

    Args:
        text (`str`): Markdown.
    """

    def table(match: re.Match[str]) -> str:
        kind, where, options = match.groups()
        settings = dict(option.split("=") for option in options.split())
        if kind == "methods":
            lines = methods(where, **settings)
        else:
            module, _, name = where.partition(":")
            found = getattr(importlib.import_module(module), name)
            lines = recipe(found) if kind == "recipe" else flags(found, **settings)
        return "\n".join([f"<!-- {kind}: {where}{options} -->", "", *lines, "", "<!-- end -->"])

    return _TABLE.sub(table, text)


def flags(kind: Any, prefix: str = "", without: str = "") -> list[str]:
    """Lines of the table of a dataclass: flag, default, meaning.

    Args:
        kind (`type`): a dataclass whose fields have a `help`.
        prefix (`str`): stands before every flag, such as `"coreset_"`.
        without (`str`): fields that are no flags, with commas between.
    """
    hints = get_type_hints(kind)
    lines = ["| flag | default | meaning |", "| --- | --- | --- |"]
    for entry in dataclasses.fields(kind):
        if entry.name in without.split(",") or "help" not in entry.metadata or not _ours(kind, entry.name):
            continue
        value = entry.default if entry.default is not dataclasses.MISSING else entry.default_factory()  # type: ignore
        chosen = _choices(hints[entry.name])
        words = f" One of {', '.join(f'`{c}`' for c in chosen)}." if chosen else ""
        meaning = entry.metadata["help"].replace("|", "\\|")
        lines.append(f"| `--{prefix}{entry.name}` | {shown(entry.name, value)} | {meaning}{words} |")
    return lines


def recipe(kind: Any) -> list[str]:
    """Lines of the table of the settings that a method brings as defaults of training and attack.

    Args:
        kind (`type`): an objective with a `recipe`, or `PostProcessing`.
    """
    lines = ["| flag | value |", "| --- | --- |"]
    attack = getattr(kind, "training_attack", None)
    values = {**kind.recipe, **(attack.to_dict() if attack else {})}
    return [*lines, *(f"| `--{name}` | {shown(name, value)} |" for name, value in values.items())]


def methods(folder: str, columns: str = "all") -> list[str]:
    """Lines of the table of the methods that pre-train an encoder, in the order of their files.

    Args:
        folder (`str`): of their pages, relative to the page with the table.
        columns (`str`): `"all"`, or `"few"` for name, line and when to take it.
    """
    heads = ["`--objective`", "method", "in one line", "take it when"]
    heads += ["norm branches", "learns from", "views", "attack in training"] if columns == "all" else []
    folder = "" if folder == "." else f"{folder}/"
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for name in method_names(finetuning=False):
        kind = load_objective(name)
        about = (sys.modules[kind.__module__].__doc__ or "").partition("\n")[0].rstrip(".")
        spelt, _, line = about.partition(": ")
        cells = [f"`{name}`", f"[{spelt}]({folder}{name}.md)", line, kind.take_when]
        lines.append(f"| {' | '.join([*cells, *(declared(kind()) if columns == 'all' else [])])} |")
    return lines


def declared(objective: Objective) -> list[str]:
    """What a method says it needs: norm branches, labels or teacher, views, attack.

    Args:
        objective ([`Objective`]): with its defaults.
    """
    sources = ["labels"] if objective.needs_labels else []
    sources += ["pseudo-labels: clusters of an encoder"] if objective.pseudo_classes else []
    sources += ["a frozen encoder"] if objective.teacher_kind == "frozen" else []
    attack = objective.training_attack.title if objective.adversarial else "none"
    return [
        ", ".join(f"`{branch}`" for branch in objective.norm_branches),
        " and ".join(sources) or "images alone",
        ", ".join(f"`{view}`" for view in objective.views),
        attack,
    ]


def shown(name: str, value: Any) -> str:
    """A default as one writes it on the command line."""
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if name in _BUDGETS:
        return f"`{show_budget(value)}`"
    if isinstance(value, float):
        return f"`{value:g}`"
    if isinstance(value, list | tuple):
        return f"`{' '.join(map(str, value))}`" if value else "unset"
    return f"`{value}`" if str(value) else "empty"


def _choices(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) in (Union, types.UnionType):
        return next((found for found in map(_choices, get_args(hint)) if found), ())
    return get_args(hint) if get_origin(hint) is Literal else ()


def _ours(kind: Any, name: str) -> bool:
    """Of training arguments those that this package sets; the rest is the stock trainer's."""
    if not issubclass(kind, TrainingArguments):
        return True
    parents = [p for p in kind.__mro__ if issubclass(p, TrainingArguments) and p is not TrainingArguments]
    return any(name in vars(parent).get("__annotations__", {}) for parent in parents)


if __name__ == "__main__":
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        if (after := rewritten(before)) != before:
            page.write_text(after, encoding="utf-8")
