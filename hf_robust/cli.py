"""Command lines: dataclasses become flags, YAML keys become their defaults, unknown keys are errors."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, get_type_hints

import yaml
from transformers import HfArgumentParser

from hf_robust.attacks import PGD, parse_budget
from hf_robust.coresets import CoresetMethod, FullData, coreset_names, load_coreset_method
from hf_robust.objectives import Objective, load_objective, objective_names
from hf_robust.training_args import WITHOUT_EFFECT, RobustTrainingArguments

_GROUPS = {
    "DataArguments": "images",
    "ModelArguments": "network",
    "PGD": "attack during training",
    "RobustTrainingArguments": "training",
}

_CORESET = "coreset_"  # the flags of a coreset method are its fields with this in front

__all__ = ["DataArguments", "ModelArguments", "PretrainRun", "parse_pretrain"]


@dataclass
class DataArguments:
    """Where the images come from."""

    dataset_name: str = field(
        default="digits", metadata={"help": "Hub id, folder of parquet/arrow/images, or the embedded digits."}
    )
    split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: None | str = field(
        default="test", metadata={"help": "Labelled split for the linear probe; skipped when the set has none."}
    )
    image_column: None | str = field(default=None, metadata={"help": "Image column; found by type when unset."})
    label_column: None | str = field(default=None, metadata={"help": "Label column; found by type when unset."})
    image_size: None | int = field(
        default=None, metadata={"help": "Side of the square views in pixels; default: the backbone's own."}
    )
    max_examples: None | int = field(default=None, metadata={"help": "Train on a (stratified) subset of this size."})
    on_error: Literal["raise", "skip"] = field(
        default="raise", metadata={"help": "Corrupt images: raise (naming the row) or skip (and count)."}
    )
    interpolation: Literal["bicubic", "bilinear"] = field(
        default="bicubic", metadata={"help": "Crop resampling: bicubic (ACL, AIR, RCS), bilinear (official DynACL)."}
    )


@dataclass
class ModelArguments:
    """What is trained, and against which method it is shown."""

    backbone: str = field(default="resnet18_cifar", metadata={"help": "Any timm architecture, or one of ours."})
    model_args: str = field(
        default="{}", metadata={"help": "JSON passed to the architecture, e.g. '{\"channels\": [16, 32, 64, 128]}'."}
    )
    projector_layers: int = field(default=3, metadata={"help": "Layers of the projection head; published: 3."})
    normalize: bool = field(
        default=True, metadata={"help": "ImageNet mean/std as first layer of the model, as published for ResNet-18."}
    )
    contrast: Literal["simclr", "none"] = field(
        default="none", metadata={"help": "Also train SimCLR with the same budget and show both in one table."}
    )


@dataclass
class PretrainRun:
    """Everything `examples/pretrain.py` needs, parsed and checked.

    Args:
        data ([`DataArguments`]): images.
        model ([`ModelArguments`]): network.
        objective ([`Objective`]): the method with its hyper-parameters.
        attack ([`PGD`]): the training attack.
        training ([`RobustTrainingArguments`]): training knobs.
        coreset ([`CoresetMethod`]): which images an epoch shows; default: all.
    """

    data: DataArguments
    model: ModelArguments
    objective: Objective
    attack: PGD
    training: RobustTrainingArguments
    coreset: CoresetMethod = field(default_factory=FullData)

    @property
    def model_args(self) -> dict[str, Any]:
        """`--model_args` as a dictionary."""
        return json.loads(self.model.model_args)


class _ShortErrors(argparse.ArgumentParser):
    """Errors in two lines: the stock parser prints a hundred lines of usage before the one that matters."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog}: --help lists all flags\n")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults shown, and the description as it was written."""


class _Parser(_ShortErrors, HfArgumentParser):
    """Reads all flags; those it does not know are errors that say where they belong."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Values of all flags; see `argparse.ArgumentParser.parse_args`."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [action.dest for action in self._actions]
            starts = [k for k, text in enumerate(unknown) if k == 0 or text.startswith("--")]
            found = []
            for start, end in zip(starts, [*starts[1:], None], strict=True):
                key = unknown[start].partition("=")[0].removeprefix("--").replace("-", "_")
                found.append(" ".join(unknown[start:end]) + _hint(key, known))
            self.error(f"unrecognized arguments: {', '.join(found)}")
        return parsed


def parse_pretrain(
    argv: Sequence[str] | None = None, *, default_config: str | Path | None = None, description: str | None = None
) -> PretrainRun:
    """Parse the flags of `examples/pretrain.py`.

    Args:
        argv (`Sequence[str]`, *optional*): arguments; default: those of the process.
        default_config (`str` or `Path`, *optional*): YAML used when neither `--config` nor `--dataset_name` is given.
        description (`str`, *optional*): first lines of `--help`.

    Returns:
        [`PretrainRun`]: the run. Errors print one line to stderr and exit with status 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    first = _ShortErrors(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--objective")
    first.add_argument("--base")
    first.add_argument("--coreset")
    first.add_argument("--dataset_name", "--dataset-name")
    chosen, _ = first.parse_known_args(argv)
    config = chosen.config or (str(default_config) if default_config and not chosen.dataset_name else None)
    values = _read_yaml(first, config) if config else {}
    name = str(chosen.objective or values.get("objective") or "acl")
    base = chosen.base or values.get("base")
    written = str(values.get("coreset") or "full")
    coreset = str(chosen.coreset or written)
    values = {key: value for key, value in values.items() if key not in ("objective", "base", "coreset")}
    try:
        objective_type = load_objective(name)
        base_type = load_objective(str(base or "acl")) if _has_base(objective_type) else None
        if base and base_type is None:
            raise ValueError(f"--base {base} has no meaning for {name}: only methods such as air stand on another")
        if base_type is not None and _has_base(base_type):
            raise ValueError(f"--base {base} stands on another method itself: give one that does not, such as acl")
        coreset_type, path = _coreset_type(coreset)
        if chosen.coreset:  # the file's own method may have flags that the one asked for instead has not
            meant = _flag_names(_coreset_type(written)[0], _CORESET) - _flag_names(coreset_type, _CORESET)
            values = {key: value for key, value in values.items() if key not in meant}
    except ValueError as error:
        first.error(str(error))
    methods = [t for t in (objective_type, base_type) if t]
    parser = _parser(
        [DataArguments, ModelArguments, *methods, PGD, RobustTrainingArguments], coreset_type, description
    )
    _set_defaults(parser, values, config)
    namespace = vars(parser.parse_args(argv))
    try:
        method = _take(coreset_type, _prefix_removed(namespace), **path)
        return _build(namespace, objective_type, base_type, method)
    except (ValueError, TypeError, ImportError) as error:
        parser.error(str(error))


def _coreset_type(text: str) -> tuple[type[CoresetMethod], dict[str, str]]:
    """The class behind `NAME` or `NAME:PATH`; a method reads a file when it has a field `path`."""
    name, colon, path = text.partition(":")
    kind = load_coreset_method(name)
    reads = any(f.name == "path" for f in dataclasses.fields(kind))  # type: ignore[arg-type]
    if reads and not path:
        raise ValueError(f"--coreset {text} names no file: write --coreset {name}:PATH, such as {name}:coreset.json")
    if colon and not reads:
        raise ValueError(f"--coreset {name} reads no file, got {text!r}: write --coreset {name}")
    return kind, {"path": path} if reads else {}


def _prefix_removed(values: dict[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(_CORESET): value for key, value in values.items() if key.startswith(_CORESET)}


def _build(
    values: dict[str, Any],
    objective_type: type[Objective],
    base_type: type[Objective] | None,
    coreset: CoresetMethod,
) -> PretrainRun:
    nested = {"base": _take(base_type, values)} if base_type else {}
    model = _take(ModelArguments, values)
    if not isinstance(model.model_args, str):
        model.model_args = json.dumps(model.model_args)
    try:
        parsed = json.loads(model.model_args)
    except json.JSONDecodeError as error:
        raise ValueError(f"--model_args must be JSON, got {model.model_args!r} ({error})") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"--model_args must be a JSON object such as '{{}}', got {model.model_args!r}")
    return PretrainRun(
        data=_take(DataArguments, values),
        model=model,
        objective=_take(objective_type, values, **nested),
        attack=_take(PGD, values),
        training=_take(RobustTrainingArguments, values),
        coreset=coreset,
    )


def _take(kind: type[Any], values: dict[str, Any], **extra: Any) -> Any:
    names = {f.name for f in dataclasses.fields(kind) if f.init} & values.keys() - extra.keys()
    return kind(**{name: values[name] for name in names}, **extra)


def _has_base(kind: type[Objective]) -> bool:
    return any(f.name == "base" for f in dataclasses.fields(kind))


def _parser(
    types: Sequence[type[Any]], coreset: type[CoresetMethod], description: str | None
) -> argparse.ArgumentParser:
    views = [_as_flags(t, "base") for t in types]
    for view in views:
        view._argument_group_name = _GROUPS.get(view.__name__, f"method {view.__name__}")
    chooser = _as_flags(coreset, "path", _CORESET)
    chooser._argument_group_name = f"coreset {coreset.__name__}"
    views.insert(-2, chooser)  # before the attack
    parser = _Parser(
        views,
        description=description,
        usage="%(prog)s [--config FILE] [--objective METHOD] [--coreset METHOD] [--dataset_name NAME] [--FLAG VALUE]",
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    known = ", ".join(objective_names())
    parser.add_argument("--config", help="YAML file whose keys are these flags; flags override it.")
    parser.add_argument("--objective", default="acl", help=f"Method: {known}.")
    parser.add_argument("--base", help="Method that air regularises: acl (default) or dynacl.")
    known = ", ".join(coreset_names()).replace("file", "file:PATH")
    parser.add_argument("--coreset", default="full", help=f"Images that an epoch shows: {known}.")
    _separate_inherited(parser)
    for action in parser._actions:
        if action.dest in WITHOUT_EFFECT:
            action.help = argparse.SUPPRESS
        if action.dest in ("eps", "step_size"):
            action.type = _budget  # argparse's float would refuse 8/255
            action.default = _fraction(action.default)
    return parser


def _separate_inherited(parser: argparse.ArgumentParser) -> None:
    """In `--help`, our own training flags first; the hundred of the stock trainer in a group at the end."""
    own = RobustTrainingArguments.__annotations__
    group = next(g for g in parser._action_groups if g.title == _GROUPS["RobustTrainingArguments"])
    rest = parser.add_argument_group("training, inherited from transformers.TrainingArguments")
    rest._group_actions.extend(a for a in group._group_actions if a.dest not in own)
    group._group_actions[:] = [a for a in group._group_actions if a.dest in own]


def _as_flags(kind: type[Any], left_out: str, prefix: str = "") -> Any:
    """The dataclass as the parser should see it: without the field that another flag gives, names prefixed."""
    fields = dataclasses.fields(kind)
    if not prefix and all(f.name != left_out for f in fields):
        return kind
    types = get_type_hints(kind)  # resolved here, in the module of each annotation
    copies = [
        (prefix + f.name, types[f.name], field(default=f.default, metadata=f.metadata))
        for f in fields
        if f.name != left_out
    ]
    return dataclasses.make_dataclass(kind.__name__, copies)


def _budget(text: str) -> float:
    try:
        return parse_budget(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None  # of a ValueError argparse drops the text


def _fraction(budget: float) -> str:
    levels = budget * 255
    return f"{levels:g}/255" if abs(levels - round(levels)) < 1e-9 else str(budget)


def _read_yaml(parser: argparse.ArgumentParser, path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        parser.error(f"cannot read --config {path}: {error.strerror}")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"--config {path} is not valid YAML: {error}")
    if not isinstance(values, dict):
        parser.error(f"--config {path} must hold 'flag: value' lines, got {type(values).__name__}")
    return {str(key): value for key, value in values.items()}  # YAML reads the keys 1 and on as number and boolean


def _flag_names(kind: type[Any], prefix: str = "") -> set[str]:
    return {prefix + f.name for f in dataclasses.fields(kind)}


def _hint(key: str, known: list[str]) -> str:
    owners = [n for n in objective_names() if key in _flag_names(load_objective(n))]
    if owners:
        return f" (belongs to --objective {' or '.join(owners)})"
    owners = [n for n in coreset_names() if key in _flag_names(load_coreset_method(n), _CORESET)]
    if owners:
        return f" (belongs to --coreset {' or '.join(owners)})"
    close = difflib.get_close_matches(key, known, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _set_defaults(parser: argparse.ArgumentParser, values: dict[str, Any], path: str | None) -> None:
    known = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    unknown = sorted(set(values) - known.keys())
    if unknown:
        hints = [f"{key!r}{_hint(key, list(known))}" for key in unknown]
        parser.error(f"unknown key in {path}: {', '.join(hints)}; keys are the flags listed by --help")
    for key, value in values.items():
        action = known[key]
        if value is None and key.startswith(_CORESET) and action.default is not None:
            parser.error(f"{key} in {path} needs a value, got null: leave the line out for {action.default}")
        if isinstance(value, dict):
            value = json.dumps(value)
        elif isinstance(value, (int, float)) and (not isinstance(value, bool) or action.type in (int, float, _budget)):
            value = str(value)  # argparse converts text with the flag's own type
        if action.choices is not None and value not in action.choices:
            parser.error(f"{key} in {path} must be one of {list(action.choices)}, got {value!r}")
        parser.set_defaults(**{key: value})
