"""The command line of fine-tuning: a mode brings its method, its attack and its published recipe as defaults."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hf_robust.attack_flags import AttackArguments, attack_of, plain_attack_flags
from hf_robust.attacks import PGD
from hf_robust.finetuning_args import RobustFinetuningArguments, falls
from hf_robust.flags import (
    FlagParser,
    ImageArguments,
    ShortErrors,
    as_flags,
    belongs_to,
    flag_names,
    given,
    method_defaults,
    method_names,
    read_yaml,
    set_defaults,
    take,
)
from hf_robust.objectives import Objective, load_objective
from hf_robust.objectives.aff import AFF
from hf_robust.postprocessing import PostProcessing
from hf_robust.presets import Preset, load_preset

__all__ = ["ClassifierArguments", "FinetuneDataArguments", "FinetuneRun", "finetune_modes", "parse_finetune"]

_OF_PRETRAINING = ("probe_every", "probe_examples", "probe_eval_examples")  # training arguments without a use here
POST = "lp_aff"  # no method of its own: AFF on pseudo-labels, after a linear probe on them


@dataclass
class FinetuneDataArguments(ImageArguments):
    """Where the images come from."""

    eval_split: None | str = field(
        default="test", metadata={"help": "Labelled split the result is measured on, once, at the end."}
    )
    image_size: None | int = field(
        default=None, metadata={"help": "Side of the square images in pixels; default: the encoder's own."}
    )


@dataclass
class ClassifierArguments:
    """How the classifier on the encoder begins.

    Args:
        head_init (`str`, defaults to `"zero"`, as published): `"zero"`, `"default"` (the random weights of a new
            linear layer) or `"alf"` (trained first, by adversarial linear fine-tuning, after RoLI).

    Raises:
        ValueError: for another word.
    """

    head_init: Literal["zero", "default", "alf"] = field(
        default="zero",
        metadata={"help": "First weights of the classifier: zero (published), default (random), alf (trained first)."},
    )

    def __post_init__(self) -> None:
        if self.head_init not in ("zero", "default", "alf"):
            raise ValueError(f"head_init must be zero, default or alf, got {self.head_init!r}")


@dataclass
class FinetuneRun:
    """Everything `examples/finetune.py` needs, parsed and checked.

    Args:
        encoder (`str`): folder or Hub repository of the encoder, or a training checkpoint.
        mode (`str`): `"slf"`, `"alf"`, `"aff"`, `"lora"`, `"autolora"` or `"lp_aff"`.
        data ([`FinetuneDataArguments`]): images.
        classifier ([`ClassifierArguments`]): how the head begins; for `lp_aff` the probe decides.
        objective ([`Objective`]): the method; for `lp_aff` that of its last stage.
        attack ([`PGD`]): the training attack.
        training ([`RobustFinetuningArguments`]): training knobs.
        preset ([`Preset`], *optional*): published run that gave the defaults.
        post ([`PostProcessing`], *optional*): settings of `lp_aff`, whose result is an encoder; else `None`.
    """

    encoder: str
    mode: str
    data: FinetuneDataArguments
    classifier: ClassifierArguments
    objective: Objective
    attack: PGD
    training: RobustFinetuningArguments
    preset: Preset | None = None
    post: PostProcessing | None = None


def finetune_modes() -> list[str]:
    """List the modes: the fine-tuning methods on disk, and `lp_aff`.

    Returns:
        `list[str]`: sorted names.
    """
    return sorted([*method_names(finetuning=True), POST])


def parse_finetune(
    argv: Sequence[str] | None = None,
    *,
    default_config: str | Path | None = None,
    description: str | None = None,
    prog: str | None = None,
) -> FinetuneRun:
    """Parse the flags of `examples/finetune.py`.

    Defaults come from the dataclasses, over these the recipe and the attack of the mode, then the preset, the YAML
    file and the flags. Where the file is of another mode than `--mode`, what belongs to its mode alone falls away.

    Args:
        argv (`Sequence[str]`, *optional*): arguments; default: those of the process.
        default_config (`str` or `Path`, *optional*): YAML used when none of `--config`, `--dataset_name` and
            `--preset` is given.
        description (`str`, *optional*): first lines of `--help`.
        prog (`str`, *optional*): name of the command in messages; default: that of the script.

    Returns:
        [`FinetuneRun`]: the run. Errors print one line to stderr and exit with status 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    first = ShortErrors(prog=prog, add_help=False, allow_abbrev=False)
    for flag in ("--config", "--mode", "--preset"):
        first.add_argument(flag)
    first.add_argument("--dataset_name", "--dataset-name")
    chosen, _ = first.parse_known_args(argv)
    plain = not (chosen.dataset_name or chosen.preset)
    config = chosen.config or (str(default_config) if default_config and plain else None)
    values = read_yaml(first, config) if config else {}
    written = str(values.get("mode") or "autolora").lower()
    mode = str(chosen.mode or written).lower()
    named = chosen.preset or values.get("preset")
    try:
        for name in (written, mode):
            _check_mode(name)
        preset = load_preset(str(named), mode) if named else None
    except ValueError as error:
        first.error(str(error))
    values = {key: value for key, value in values.items() if key not in _fields_of(written) - _fields_of(mode)}
    parser = _parser(mode, description, prog)
    set_defaults(parser, _method_defaults(mode), f"the recipe of {mode}")
    set_defaults(parser, preset.flags if preset else {}, f"the preset {named}")
    set_defaults(parser, {key: value for key, value in values.items() if key != "mode"}, config)
    namespace = vars(parser.parse_args(argv))
    free = set(namespace) - {name for name in namespace if given(argv, name)}
    if mode == written:  # the file's lists of epochs were written for its own mode
        free -= values.keys()
    _drop_unfit(namespace, mode, free, preset)
    try:
        if preset and not (chosen.dataset_name or values.get("dataset_name")):
            raise ValueError(f"--preset {preset.name} does not say where the images are: add --dataset_name")
        return _build(namespace, mode, attack_of(namespace, argv, values), preset)
    except (ValueError, TypeError, ImportError) as error:
        parser.error(str(error))


def _check_mode(name: str) -> None:
    known = finetune_modes()
    if name in known:
        return
    if name in method_names(finetuning=False):
        raise ValueError(f"{name} pre-trains an encoder: run examples/pretrain.py --objective {name}")
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"unknown mode {name!r}: {hint}known modes are {', '.join(known)}")


def _types(mode: str) -> Iterator[tuple[str, type[Any], tuple[str, ...]]]:
    """What a mode brings: group of `--help`, dataclass, fields that are no flags of this mode."""
    if mode == POST:
        yield "post-processing", PostProcessing, ()
        yield "method AFF", AFF, ("clean_branch", "reference_branch", "augmentation")  # decided by the stages
    else:
        method = load_objective(mode)
        yield f"method {method.__name__}", method, ()
        yield "classifier", ClassifierArguments, ()


def _fields_of(mode: str) -> set[str]:
    """Flags that a mode brings, those it shares with other modes included."""
    return {name for _, kind, hidden in _types(mode) for name in flag_names(kind) - set(hidden)}


def _owner(key: str) -> str:
    """Where a flag belongs that the chosen mode does not have."""
    if key == "objective":
        return "fine-tuning says --mode"
    return belongs_to(key, "mode", {name: _fields_of(name) for name in finetune_modes()})


def _method_defaults(mode: str) -> dict[str, Any]:
    """Recipe and attack of a mode, by the names of their flags."""
    return method_defaults(AFF, PostProcessing.recipe) if mode == POST else method_defaults(load_objective(mode))


def _parser(mode: str, description: str | None, prog: str | None) -> FlagParser:
    groups = [
        ("images", FinetuneDataArguments),
        *((title, as_flags(kind, hidden)) for title, kind, hidden in _types(mode)),
        ("attack during training", plain_attack_flags()),
        ("attack during training, other algorithms", AttackArguments),
        ("training", RobustFinetuningArguments),
    ]
    parser = FlagParser(
        groups,
        _owner,
        prog=prog,
        description=description,
        epilog=_modes_explained(),
        usage="%(prog)s --encoder DIR_OR_REPO [--mode MODE] [--config FILE] [--dataset_name NAME] [--FLAG VALUE]",
    )
    for action in parser._actions:
        if action.dest in _OF_PRETRAINING:
            action.help = argparse.SUPPRESS
    parser.add_argument("--config", help="YAML file whose keys are these flags; flags override it.")
    parser.add_argument("--encoder", help="Folder or Hub repository of the encoder, or a training checkpoint.")
    parser.add_argument(
        "--mode", default=mode, help=f"How it is fine-tuned: {', '.join(finetune_modes())}; see below."
    )
    parser.add_argument(
        "--preset", help="Published settings, such as rssl-vanilla/DynACL/cifar10; modes slf, alf, aff only."
    )
    return parser


def _modes_explained() -> str:
    lines = []
    for name in finetune_modes():
        kind = PostProcessing if name == POST else load_objective(name)
        about = (sys.modules[kind.__module__].__doc__ or "").partition("\n")[0]
        lines.append(f"  {name:<10}{about}")
    return "\n".join(["modes (--mode MODE --help shows the flags and defaults of each):", *lines])


def _drop_unfit(namespace: dict[str, Any], mode: str, free: set[str], preset: Preset | None) -> None:
    """Defaults that what was chosen beside them makes meaningless fall away; `free` are those nobody wrote."""
    if "start_std" in free and namespace["random_start"] is False:
        namespace["start_std"] = None
    # In a run of another length than the published one the rate falls at the same shares of it.
    recipe = {**_method_defaults(mode), **(preset.flags if preset else {})}
    fitting = falls(recipe, namespace["num_train_epochs"], namespace["lr_rule"])
    for name, value in fitting.items():
        wanted = namespace["lr_rule"] == ("milestones" if name == "lr_milestones" else "auto")
        if name in free and (not wanted or namespace[name] == recipe.get(name)):
            namespace[name] = value


def _build(values: dict[str, Any], mode: str, attack: PGD, preset: Preset | None) -> FinetuneRun:
    if not values["encoder"]:
        raise ValueError("--encoder is missing: name a folder that examples/pretrain.py wrote, or a Hub repository")
    classifier = take(ClassifierArguments, values)
    if classifier.head_init == "alf" and mode in ("slf", "alf"):
        raise ValueError(
            f"--head_init alf trains the classifier before the encoder; --mode {mode} trains nothing else"
        )
    post = take(PostProcessing, values) if mode == POST else None
    return FinetuneRun(
        encoder=str(values["encoder"]),
        mode=mode,
        data=take(FinetuneDataArguments, values),
        classifier=classifier,
        objective=post.objective(values["beta"]) if post else take(load_objective(mode), values),
        attack=attack,
        training=take(RobustFinetuningArguments, values),
        preset=preset,
        post=post,
    )
