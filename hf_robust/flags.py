"""From dataclasses to flags: what the command lines of pre-training and fine-tuning have in common.

Fields become flags, the keys of a YAML file become their defaults, and whatever is unknown is an error that says where
it belongs.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments

from hf_robust.attacks import parse_budget
from hf_robust.objectives import Objective, load_objective, objective_names
from hf_robust.training_args import WITHOUT_EFFECT

__all__ = [
    "FlagParser",
    "ImageArguments",
    "ShortErrors",
    "as_flags",
    "belongs_to",
    "flag_names",
    "given",
    "method_defaults",
    "method_names",
    "pixel_budget",
    "read_yaml",
    "set_defaults",
    "show_budget",
    "take",
]


@dataclass
class ImageArguments:
    """Which images are read, and how."""

    dataset_name: str = field(
        default="digits", metadata={"help": "Hub id, folder of parquet/arrow/images, or the embedded digits."}
    )
    split: str = field(default="train", metadata={"help": "Split to train on."})
    image_column: None | str = field(default=None, metadata={"help": "Image column; found by type when unset."})
    label_column: None | str = field(default=None, metadata={"help": "Label column; found by type when unset."})
    max_examples: None | int = field(default=None, metadata={"help": "Train on a (stratified) subset of this size."})
    on_error: Literal["raise", "skip"] = field(
        default="raise", metadata={"help": "Corrupt images: raise (naming the row) or skip (and count)."}
    )
    check_images: bool = field(
        default=True,
        metadata={"help": "Look at every image first; false, for millions that do not fit memory: when it is needed."},
    )


class ShortErrors(argparse.ArgumentParser):
    """Errors in two lines: the stock parser prints a hundred lines of usage before the one that matters."""

    def error(self, message: str) -> NoReturn:
        """Print the message and where to read on; exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog}: --help lists all flags\n")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults shown, and the description as it was written."""


class FlagParser(ShortErrors, HfArgumentParser):
    """Reads all flags; those it does not know are errors that say where they belong.

    Args:
        groups (`Sequence[tuple[str, type]]`): title in `--help` and dataclass, in the order of `--help`. Training
            arguments are shown in two groups, ours under the title and those of the stock trainer at the end.
        owner (`Callable[[str], str]`): says of a flag that is not among them where it belongs, or nothing.
        kwargs: of `argparse.ArgumentParser`.
    """

    def __init__(self, groups: Sequence[tuple[str, Any]], owner: Callable[[str], str], **kwargs: Any) -> None:
        for title, kind in groups:
            kind._argument_group_name = title
        super().__init__([kind for _, kind in groups], allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)
        self.owner = owner
        for title, kind in groups:
            if issubclass(kind, TrainingArguments):
                self._separate_inherited(title, kind)
        for action in self._actions:
            if action.dest in WITHOUT_EFFECT:
                action.help = argparse.SUPPRESS
            if action.dest in ("eps", "step_size"):
                action.type = pixel_budget  # argparse's float would refuse 8/255
                action.default = show_budget(action.default)
            if action.dest == "attack_step_sizes":
                action.type = pixel_budget
            if action.dest == "start_std":
                action.type = _number_or_none

    def _separate_inherited(self, title: str, kind: type[Any]) -> None:
        own = {
            name
            for parent in kind.__mro__
            if issubclass(parent, TrainingArguments) and parent is not TrainingArguments
            for name in vars(parent).get("__annotations__", {})
        }
        group = next(g for g in self._action_groups if g.title == title)
        rest = self.add_argument_group(f"{title}, inherited from transformers.TrainingArguments")
        rest._group_actions.extend(a for a in group._group_actions if a.dest not in own)
        group._group_actions[:] = [a for a in group._group_actions if a.dest in own]

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Values of all flags; see `argparse.ArgumentParser.parse_args`."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            starts = [k for k, text in enumerate(unknown) if k == 0 or text.startswith("--")]
            found = []
            for start, end in zip(starts, [*starts[1:], None], strict=True):
                key = unknown[start].partition("=")[0].removeprefix("--").replace("-", "_")
                found.append(" ".join(unknown[start:end]) + self.hint(key))
            self.error(f"unrecognized arguments: {', '.join(found)}")
        return parsed

    def hint(self, key: str) -> str:
        """Where an unknown flag belongs, or which known one is spelt nearly so; empty if neither."""
        owner = self.owner(key)
        if owner:
            return f" ({owner})"
        close = difflib.get_close_matches(key, [action.dest for action in self._actions], 1)
        return f" (did you mean {close[0]!r}?)" if close else ""


def method_names(*, finetuning: bool) -> list[str]:
    """List the methods of one of the two stages.

    Args:
        finetuning (`bool`): methods that fine-tune an encoder, else those that pre-train one.

    Returns:
        `list[str]`: sorted names that `load_objective` takes.
    """
    # Of the methods with labels, those of fine-tuning have a recipe each; without labels nothing is fine-tuned.
    kinds = {name: load_objective(name) for name in objective_names()}
    return [name for name, kind in kinds.items() if bool(kind.needs_labels and kind.recipe) is finetuning]


def method_defaults(method: type[Objective], recipe: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Published settings and attack of a method, by the names of their flags.

    Args:
        method (`type[Objective]`): the class.
        recipe (`Mapping`, *optional*): instead of the method's own.

    Returns:
        `dict[str, Any]`: for `set_defaults`.
    """
    attack = method.training_attack.to_dict()
    budgets = {name: show_budget(attack[name]) for name in ("eps", "step_size")}
    settings = dict(method.recipe if recipe is None else recipe)
    return {**copy.deepcopy(settings), **attack, **budgets}  # its lists go into the arguments of the run


def flag_names(kind: type[Any], prefix: str = "") -> set[str]:
    """Names of the flags of a dataclass."""
    return {prefix + f.name for f in dataclasses.fields(kind)}


def belongs_to(key: str, flag: str, fields_of: Mapping[str, Collection[str]]) -> str:
    """Say which values of a choosing flag bring the flag `key`.

    Args:
        key (`str`): name of a flag.
        flag (`str`): the choosing flag, such as `"mode"`.
        fields_of (`Mapping[str, Collection[str]]`): its values, with the flags that each brings.

    Returns:
        `str`: such as `"belongs to --mode autolora or lora"`; empty if none brings it.
    """
    owners = [name for name, names in fields_of.items() if key in names]
    return f"belongs to --{flag} {' or '.join(owners)}" if owners else ""


def as_flags(kind: type[Any], left_out: Iterable[str] = (), prefix: str = "") -> Any:
    """The dataclass as the parser should see it: without the fields that other flags give, names prefixed."""
    left_out, fields = set(left_out), dataclasses.fields(kind)
    if not prefix and all(f.name not in left_out for f in fields):
        return kind
    types = get_type_hints(kind)  # resolved here, in the module of each annotation
    copies = [
        (
            prefix + f.name,
            types[f.name],
            field(default_factory=f.default_factory, metadata=f.metadata)
            if f.default_factory is not MISSING
            else field(default=f.default, metadata=f.metadata),
        )
        for f in fields
        if f.name not in left_out
    ]
    return dataclasses.make_dataclass(kind.__name__, copies)


def take(kind: type[Any], values: Mapping[str, Any], **extra: Any) -> Any:
    """Build a dataclass from those of the values that are its fields."""
    names = {f.name for f in dataclasses.fields(kind) if f.init} & values.keys() - extra.keys()
    return kind(**{name: values[name] for name in names}, **extra)


def given(argv: Sequence[str], name: str) -> bool:
    """Whether a flag stands on the command line, in either spelling."""
    spellings = (f"--{name}", f"--{name.replace('_', '-')}")
    return any(text.partition("=")[0] in spellings for text in argv)


def pixel_budget(text: str) -> float:
    """Read a pixel budget as argparse wants it, see `parse_budget`."""
    try:
        return parse_budget(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None  # of a ValueError argparse drops the text


def show_budget(budget: float) -> str:
    """A budget as one writes it: whole levels as a fraction of 255."""
    levels = budget * 255
    return f"{levels:g}/255" if abs(levels - round(levels)) < 1e-9 else str(budget)


def _number_or_none(text: str) -> float | None:
    try:
        return None if text.lower() == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"write a number or none, got {text!r}") from None


def read_yaml(parser: argparse.ArgumentParser, path: str) -> dict[str, Any]:
    """Keys and values of a YAML file; what cannot be read is an error of the command line."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        parser.error(f"cannot read --config {path}: {error.strerror}")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"--config {path} is not valid YAML: {error}")
    if not isinstance(values, dict):
        parser.error(f"--config {path} must hold 'flag: value' lines, got {type(values).__name__}")
    return {str(key): value for key, value in values.items()}  # YAML reads the keys 1 and on as number and boolean


def set_defaults(parser: FlagParser, values: Mapping[str, Any], path: str | None, never_null: str = "-") -> None:
    """Make the values of a YAML file the defaults of the flags of the same names.

    Args:
        parser ([`FlagParser`]): exits with a message for an unknown key or a value that is not among the choices.
        values (`Mapping[str, Any]`): as YAML reads them.
        path (`str`, *optional*): of the file, for messages.
        never_null (`str`): flags that begin so take no null unless that is their default; default: none does.
    """
    known = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    unknown = sorted(set(values) - known.keys())
    if unknown:
        hints = [f"{key!r}{parser.hint(key)}" for key in unknown]
        parser.error(f"unknown key in {path}: {', '.join(hints)}; keys are the flags listed by --help")
    for key, value in values.items():
        action = known[key]
        if value is None and key.startswith(never_null) and action.default is not None:
            parser.error(f"{key} in {path} needs a value, got null: leave the line out for {action.default}")
        if isinstance(value, dict):
            value = json.dumps(value)
        elif isinstance(value, (int, float)) and (
            not isinstance(value, bool) or action.type in (int, float, pixel_budget)
        ):
            value = str(value)  # argparse converts text with the flag's own type
        if action.choices is not None and value not in action.choices:
            parser.error(f"{key} in {path} must be one of {list(action.choices)}, got {value!r}")
        parser.set_defaults(**{key: value})
