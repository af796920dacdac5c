"""The command line of evaluation: which classifier, on which images, against what; or an encoder by protocols."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hf_robust.evaluation.robustness import METRICS, check_settings, plan_metrics
from hf_robust.flags import FlagParser, ShortErrors, read_yaml, set_defaults, take

__all__ = [
    "EvaluateArguments",
    "EvaluateDataArguments",
    "EvaluateModelArguments",
    "EvaluateRun",
    "ProtocolArguments",
    "parse_evaluate",
]

PROTOCOLS = ("slf", "alf", "aff", "autolora", "lora")
_GIVEN_BY_US = ("encoder", "mode", "dataset_name", "split", "eval_split", "output_dir", "image_column", "label_column")


@dataclass
class EvaluateDataArguments:
    """Where the images come from."""

    dataset_name: str = field(
        default="digits", metadata={"help": "Hub id, folder of parquet/arrow/images, or the embedded digits."}
    )
    split: str = field(default="test", metadata={"help": "Labelled split that is judged."})
    image_column: None | str = field(default=None, metadata={"help": "Image column; found by type when unset."})
    label_column: None | str = field(default=None, metadata={"help": "Label column; found by type when unset."})
    on_error: Literal["raise", "skip"] = field(
        default="raise", metadata={"help": "Corrupt images: raise (naming the row) or skip (and count)."}
    )


@dataclass
class EvaluateModelArguments:
    """What else is needed to read the classifier; mostly nothing."""

    subfolder: None | str = field(default=None, metadata={"help": "Folder in the repository, such as native."})
    branch: None | str = field(default=None, metadata={"help": "Norm branch of a training checkpoint: adv or clean."})
    mean: list[float] | None = field(
        default=None, metadata={"help": "Input normalisation, where no image processor tells it: three numbers."}
    )
    std: list[float] | None = field(default=None, metadata={"help": "Likewise."})
    image_size: None | int = field(
        default=None, metadata={"help": "Side of the attacked images in pixels; default: the model's own input."}
    )


@dataclass
class EvaluateArguments:
    """What is measured, and where the report goes."""

    metrics: list[str] = field(
        default_factory=lambda: list(METRICS),
        metadata={"help": "accuracy, pgd20 (any number of steps), autoattack, corruptions."},
    )
    eps: float = field(default=8 / 255, metadata={"help": "Budget of the attacks in pixels of [0, 1]; write 8/255."})
    norm: Literal["linf", "l2", "l1"] = field(default="linf", metadata={"help": "Threat model."})
    preset: Literal["standard", "fast", "smoke"] = field(
        default="standard",
        metadata={"help": "AutoAttack: standard; fast: its two APGD attacks, an upper bound; smoke: to try it out."},
    )
    n_examples: None | int = field(default=None, metadata={"help": "Judge so many images, stratified; default: all."})
    corruptions: None | str = field(
        default=None,
        metadata={"help": "CIFAR-10-C or 100-C as published: folder, tar or repository; default: generated ones."},
    )
    curve_examples: int = field(default=200, metadata={"help": "Images of the curve over budgets; 0: no curve."})
    batch_size: int = field(default=128, metadata={"help": "Images per batch; random draws depend on it."})
    seed: int = field(default=0, metadata={"help": "Of the choice of images and of the attacks."})
    output_dir: None | str = field(
        default=None, metadata={"help": "Receives the report; default: evaluation/ beside the model."}
    )
    resume: bool = field(default=True, metadata={"help": "Go on from what the folder holds; false starts over."})
    update_card: bool = field(default=False, metadata={"help": "Write the figures into the model card, too."})
    strict: bool = field(default=False, metadata={"help": "Exit with status 3 when the report has a warning."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave a GPU alone."})
    cpu_threads: None | int = field(default=None, metadata={"help": "Threads on a CPU; default: torch's choice."})


@dataclass
class ProtocolArguments:
    """The model is an encoder: it is fine-tuned first, once per mode, and each classifier is evaluated."""

    protocol: list[str] | None = field(
        default=None, metadata={"help": f"Modes of fine-tuning: {', '.join(PROTOCOLS)}; published: slf alf aff."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to fine-tune on."})
    finetune_args: str = field(
        default="", metadata={"help": "Further flags of fine-tuning in quotes, '--num_train_epochs 5 --bf16 true'."}
    )


@dataclass
class EvaluateRun:
    """Everything an evaluation needs, parsed and checked.

    Args:
        model (`str`): folder or Hub repository of a classifier; with `protocol` of an encoder.
        data ([`EvaluateDataArguments`]): images.
        loading ([`EvaluateModelArguments`]): how the classifier is read.
        settings ([`EvaluateArguments`]): what is measured.
        protocol ([`ProtocolArguments`]): how an encoder is fine-tuned first.
    """

    model: str
    data: EvaluateDataArguments
    loading: EvaluateModelArguments
    settings: EvaluateArguments
    protocol: ProtocolArguments


def parse_evaluate(
    argv: Sequence[str] | None = None,
    *,
    default_config: str | Path | None = None,
    description: str | None = None,
    prog: str | None = None,
) -> EvaluateRun:
    """Parse the flags of `examples/evaluate.py`.

    Args:
        argv (`Sequence[str]`, *optional*): arguments; default: those of the process.
        default_config (`str` or `Path`, *optional*): YAML used when none of `--config`, `--model` and
            `--dataset_name` is given.
        description (`str`, *optional*): first lines of `--help`.
        prog (`str`, *optional*): name of the command in messages; default: that of the script.

    Returns:
        [`EvaluateRun`]: the run. Errors print one line to stderr and exit with status 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    first = ShortErrors(prog=prog, add_help=False, allow_abbrev=False)
    for flag in ("--config", "--model"):
        first.add_argument(flag)
    first.add_argument("--dataset_name", "--dataset-name")
    chosen, _ = first.parse_known_args(argv)
    plain = not (chosen.model or chosen.dataset_name)
    config = chosen.config or (str(default_config) if default_config and plain else None)
    parser = _parser(description, prog)
    if config:
        set_defaults(parser, read_yaml(parser, config), config)
    namespace = vars(parser.parse_args(argv))
    try:
        return _build(namespace)
    except (ValueError, TypeError) as error:
        parser.error(str(error))


def _parser(description: str | None, prog: str | None) -> FlagParser:
    groups: list[tuple[str, Any]] = [
        ("images", EvaluateDataArguments),
        ("what is measured", EvaluateArguments),
        ("how the model is read", EvaluateModelArguments),
        ("an encoder, fine-tuned first", ProtocolArguments),
    ]
    parser = FlagParser(
        groups,
        _owner,
        prog=prog,
        description=description,
        usage="%(prog)s --model DIR_OR_REPO [--dataset_name NAME] [--metrics NAME ...] [--FLAG VALUE]",
    )
    parser.add_argument("--config", help="YAML file whose keys are these flags; flags override it.")
    parser.add_argument("--model", help="Folder or Hub repository of a classifier; with --protocol of an encoder.")
    return parser


def _owner(key: str) -> str:
    """Where a flag belongs that evaluation does not have."""
    if key == "encoder":
        return "write --model ENCODER --protocol slf alf aff"
    if key in ("steps", "step_size"):
        return "the number of steps is part of the metric: --metrics pgd50"
    return "the modes of fine-tuning are --protocol" if key == "mode" else ""


def _build(values: dict[str, Any]) -> EvaluateRun:
    if not values["model"]:
        raise ValueError("--model is missing: name a folder that examples/finetune.py wrote, or a Hub repository")
    run = EvaluateRun(
        model=str(values["model"]),
        data=take(EvaluateDataArguments, values),
        loading=take(EvaluateModelArguments, values),
        settings=take(EvaluateArguments, values),
        protocol=take(ProtocolArguments, values),
    )
    settings = run.settings
    plan = plan_metrics(settings.metrics, settings.norm)
    check_settings(
        settings.eps,
        settings.norm,
        settings.preset,
        batch_size=settings.batch_size,
        seed=settings.seed,
        curve_examples=settings.curve_examples,
    )
    if settings.corruptions and "corruptions" not in plan:
        raise ValueError("--corruptions names the images of the metric corruptions: add it to --metrics")
    for name in run.protocol.protocol or ():
        if name not in PROTOCOLS:
            raise ValueError(f"unknown protocol {name!r}: known are {', '.join(PROTOCOLS)}")
    try:
        words = shlex.split(run.protocol.finetune_args)
    except ValueError as error:
        raise ValueError(
            f"cannot read --finetune_args {run.protocol.finetune_args!r}: {error}; check the quotes"
        ) from None
    extra = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in words}
    for flag in _GIVEN_BY_US:
        if flag in extra:
            raise ValueError(f"--finetune_args must leave --{flag} out: it follows from the flags of this command")
    if extra & {"push_to_hub", "hub_token"}:
        raise ValueError("--finetune_args publishes nothing: push the classifiers afterwards with hf-robust push")
    if run.protocol.finetune_args and not run.protocol.protocol:
        raise ValueError("--finetune_args is for --protocol, which is not given: name the modes of fine-tuning")
    if settings.n_examples is not None and settings.n_examples < 1:
        raise ValueError(f"n_examples must be 1 or more, got {settings.n_examples}: leave it out for all images")
    return run
