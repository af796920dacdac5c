"""The command line of pre-training: every dataclass becomes flags, methods and coresets bring their own."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hf_robust.attack_flags import AttackArguments, attack_of, plain_attack_flags
from hf_robust.attacks import PGD
from hf_robust.coresets import CoresetMethod, FullData, coreset_names, load_coreset_method
from hf_robust.flags import (
    FlagParser,
    ImageArguments,
    ShortErrors,
    as_flags,
    belongs_to,
    flag_names,
    method_defaults,
    method_names,
    read_yaml,
    set_defaults,
    take,
)
from hf_robust.objectives import Objective, load_objective
from hf_robust.training_args import RobustTrainingArguments

_CORESET = "coreset_"  # the flags of a coreset method are its fields with this in front

__all__ = ["DataArguments", "ModelArguments", "PretrainRun", "parse_pretrain"]


@dataclass
class DataArguments(ImageArguments):
    """Where the images come from."""

    eval_split: None | str = field(
        default="test", metadata={"help": "Labelled split for the linear probe; skipped when the set has none."}
    )
    image_size: None | int = field(
        default=None, metadata={"help": "Side of the square views in pixels; default: the backbone's own."}
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
    projector_layers: None | int = field(
        default=None, metadata={"help": "Layers of the projection head, 2 or 3; unset: the method's, 3 for most."}
    )
    projector_dim: None | int = field(
        default=None, metadata={"help": "Width of the embedding; unset: the method's, that of the features for most."}
    )
    projector_norms: Literal["all", "hidden", "none"] | None = field(
        default=None, metadata={"help": "Batch norm after which layers of the head; unset: the method's, most: all."}
    )
    projector_norm_branches: Literal["own", "shared"] | None = field(
        default=None, metadata={"help": "Norms of the head per branch or one for all; unset: the method's, most: own."}
    )
    normalize: None | bool = field(
        default=None,
        metadata={"help": "ImageNet mean/std as first layer of the model; unset: as the method was published."},
    )
    contrast: Literal["simclr", "none"] = field(
        default="none", metadata={"help": "Also train SimCLR with the same budget and show both in one table."}
    )
    teacher: None | str = field(
        default=None,
        metadata={
            "help": "Frozen teacher of DeACL and FARE, or encoder whose clusters are AdvCL's pseudo-labels: folder, "
            "Hub repository or timm name with weights."
        },
    )
    pseudo_labels: None | str = field(
        default=None, metadata={"help": "File of pseudo-labels (.safetensors, .json) for AdvCL, instead of a teacher."}
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


def parse_pretrain(
    argv: Sequence[str] | None = None,
    *,
    default_config: str | Path | None = None,
    description: str | None = None,
    prog: str | None = None,
) -> PretrainRun:
    """Parse the flags of `examples/pretrain.py`.

    Args:
        argv (`Sequence[str]`, *optional*): arguments; default: those of the process.
        default_config (`str` or `Path`, *optional*): YAML used when neither `--config` nor `--dataset_name` is given.
        description (`str`, *optional*): first lines of `--help`.
        prog (`str`, *optional*): name of the command in messages; default: that of the script.

    Returns:
        [`PretrainRun`]: the run. Errors print one line to stderr and exit with status 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    first = ShortErrors(prog=prog, add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--objective")
    first.add_argument("--base")
    first.add_argument("--coreset")
    first.add_argument("--dataset_name", "--dataset-name")
    chosen, _ = first.parse_known_args(argv)
    config = chosen.config or (str(default_config) if default_config and not chosen.dataset_name else None)
    values = read_yaml(first, config) if config else {}
    written = str(values.get("coreset") or "full")
    coreset = str(chosen.coreset or written)
    try:
        objective_type, base_type, values = _methods(chosen, values)
        coreset_type, path = _coreset_type(coreset)
        if chosen.coreset:  # the file's own method may have flags that the one asked for instead has not
            meant = flag_names(_coreset_type(written)[0], _CORESET) - flag_names(coreset_type, _CORESET)
            values = {key: value for key, value in values.items() if key not in meant}
    except ValueError as error:
        first.error(str(error))
    methods = [t for t in (objective_type, base_type) if t]
    parser = _parser([DataArguments, ModelArguments, *methods], coreset_type, description, prog)
    published = objective_type if objective_type.recipe else base_type or objective_type  # the host's, if none is own
    set_defaults(parser, method_defaults(published), f"the recipe of {objective_type.__name__}")
    set_defaults(parser, values, config, never_null=_CORESET)
    namespace = vars(parser.parse_args(argv))
    try:
        method = take(coreset_type, _prefix_removed(namespace), **path)
        attack = attack_of(namespace, argv, values)
        return _build(namespace, objective_type, base_type, method, attack)
    except (ValueError, TypeError, ImportError) as error:
        parser.error(str(error))


def _methods(
    chosen: argparse.Namespace, values: dict[str, Any]
) -> tuple[type[Objective], type[Objective] | None, dict[str, Any]]:
    """The method, the one it stands on, and those values of the file that are not about which they are.

    Where a flag asks for another method than the file, what the file says to its own method has no meaning.
    """
    name = str(chosen.objective or values.get("objective") or "acl")
    objective_type = _load_method(name)
    replaced = bool(chosen.objective) and not _has_base(objective_type)
    base = chosen.base or (None if replaced else values.get("base"))
    base_type = _load_method(str(base or "acl")) if _has_base(objective_type) else None
    if base and base_type is None:
        raise ValueError(f"--base {base} has no meaning for {name}: only methods such as air stand on another")
    if base_type is not None and _has_base(base_type):
        raise ValueError(f"--base {base} stands on another method itself: give one that does not, such as acl")
    left_out = {"objective", "base", "coreset"}
    if chosen.objective or chosen.base:
        meant = [_load_method(str(values[key])) for key in ("objective", "base") if values.get(key)]
        asked = [kind for kind in (objective_type, base_type) if kind]
        theirs, ours = (set[str]().union(*map(flag_names, kinds)) for kinds in (meant, asked))
        left_out |= theirs - ours
    return objective_type, base_type, {key: value for key, value in values.items() if key not in left_out}


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
    attack: PGD,
) -> PretrainRun:
    nested = {"base": take(base_type, values)} if base_type else {}
    model = take(ModelArguments, values)
    if not isinstance(model.model_args, str):
        model.model_args = json.dumps(model.model_args)
    try:
        parsed = json.loads(model.model_args)
    except json.JSONDecodeError as error:
        raise ValueError(f"--model_args must be JSON, got {model.model_args!r} ({error})") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"--model_args must be a JSON object such as '{{}}', got {model.model_args!r}")
    objective = take(objective_type, values, **nested)
    _check_teacher(objective, model.teacher)
    _check_pseudo_labels(objective, model)
    return PretrainRun(
        data=take(DataArguments, values),
        model=model,
        objective=objective,
        attack=attack,
        training=take(RobustTrainingArguments, values),
        coreset=coreset,
    )


def _check_teacher(objective: Objective, teacher: str | None) -> None:
    if objective.teacher_kind == "frozen" and not teacher:
        raise ValueError(
            f"{objective.title} learns from a frozen teacher: add --teacher with the folder of an encoder, a Hub "
            "repository or a timm architecture with pre-trained weights"
        )
    if teacher and objective.teacher_kind != "frozen" and not objective.pseudo_classes:
        raise ValueError(
            f"--teacher {teacher} has no meaning for {objective.title}: only methods such as deacl and fare learn "
            "from a frozen one"
        )


def _check_pseudo_labels(objective: Objective, model: ModelArguments) -> None:
    if model.pseudo_labels and not objective.pseudo_classes:
        raise ValueError(
            f"--pseudo_labels {model.pseudo_labels} has no meaning for {objective.title}: only methods such as advcl "
            "learn them"
        )
    if model.pseudo_labels and model.teacher:
        raise ValueError("--pseudo_labels are there already, so --teacher has nothing to cluster: give one of the two")


def _has_base(kind: type[Objective]) -> bool:
    return any(f.name == "base" for f in dataclasses.fields(kind))


def _load_method(name: str) -> type[Objective]:
    """The class of a pre-training method; a mode of fine-tuning is another command's."""
    known = method_names(finetuning=False)
    if name.lower() in known:
        return load_objective(name)
    if name.lower() in method_names(finetuning=True):
        raise ValueError(f"{name} fine-tunes an encoder: run examples/finetune.py --mode {name.lower()}")
    close = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"unknown objective {name!r}: {hint}known objectives are {', '.join(known)}")


def _owner(key: str) -> str:
    """Where a flag belongs that the chosen methods do not have."""
    fields_of = {name: flag_names(load_objective(name)) for name in method_names(finetuning=False)}
    coresets = {name: flag_names(load_coreset_method(name), _CORESET) for name in coreset_names()}
    return belongs_to(key, "objective", fields_of) or belongs_to(key, "coreset", coresets)


def _parser(
    types: Sequence[type[Any]], coreset: type[CoresetMethod], description: str | None, prog: str | None
) -> FlagParser:
    titles = {DataArguments: "images", ModelArguments: "network"}
    groups = [(titles.get(t, f"method {t.__name__}"), as_flags(t, ["base"])) for t in types]
    groups += [
        (f"coreset {coreset.__name__}", as_flags(coreset, ["path"], _CORESET)),
        ("attack during training", plain_attack_flags()),
        ("attack during training, other algorithms", AttackArguments),
        ("training", RobustTrainingArguments),
    ]
    parser = FlagParser(
        groups,
        _owner,
        prog=prog,
        description=description,
        usage="%(prog)s [--config FILE] [--objective METHOD] [--coreset METHOD] [--dataset_name NAME] [--FLAG VALUE]",
    )
    known = ", ".join(method_names(finetuning=False))
    parser.add_argument("--config", help="YAML file whose keys are these flags; flags override it.")
    parser.add_argument("--objective", default="acl", help=f"Method: {known}.")
    parser.add_argument("--base", help="Method that air or a_infonce stands on, such as dynacl; default: acl.")
    off = "The same as --normalize false."  # unset is a third value, so the stock parser does not offer it
    parser.add_argument("--no_normalize", action="store_false", default=None, dest="normalize", help=off)
    known = ", ".join(coreset_names()).replace("file", "file:PATH")
    parser.add_argument("--coreset", default="full", help=f"Images that an epoch shows: {known}.")
    return parser
