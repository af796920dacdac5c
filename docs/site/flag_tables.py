"""Tables of flags in the documentation, written from the dataclasses that the command lines are made of.

    python docs/site/flag_tables.py

rewrites every table that stands between `<!-- flags: module:Class [prefix=coreset_] [without=base] -->` (or
`recipe: module:Class`, a method's published settings) and `<!-- end -->`. A test fails when a table is out of date.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from transformers import TrainingArguments

from hf_robust.flags import show_budget

DOCS = Path(__file__).resolve().parents[1]
_TABLE = re.compile(r"<!-- (flags|recipe): (\S+)((?: \w+=\S+)*) -->\n.*?<!-- end -->", flags=re.DOTALL)
_BUDGETS = ("eps", "step_size")


def rewritten(text: str) -> str:
    """The text of a page with every table as the code has it now.

    Args:
        text (`str`): Markdown.
    """

    def table(match: re.Match[str]) -> str:
        kind, where, options = match.groups()
        module, _, name = where.partition(":")
        found = getattr(importlib.import_module(module), name)
        settings = dict(option.split("=") for option in options.split())
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
    for page in sorted(DOCS.rglob("*.md")):
        before = page.read_text(encoding="utf-8")
        if (after := rewritten(before)) != before:
            page.write_text(after, encoding="utf-8")
