"""From a row of a table to the commands that reproduce it, in order; rows that need the same network share them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

import hf_robust
from hf_robust.presets import load_preset
from hf_robust.reproduction.hours import (
    NETWORKS,
    Work,
    evaluation_passes,
    finetuning_passes,
    pretraining_passes,
)
from hf_robust.reproduction.tables import Dataset, Network, Row, load_dataset, load_network

__all__ = ["LastCheckpoint", "Plan", "Stage", "flags_by_name", "row_stages", "unique_stages"]

CONFIGS = Path("examples", "configs")
_ARCHITECTURES = {"imagenet32": ("wide_resnet28_10", 32), "stl10": ("resnet18_stl", 96)}
# Everything in seconds on two CPU cores, on the embedded digits: shows that the commands work, and nothing else.
_THIN = '{"channels": [8, 8, 16, 16], "stem_stride": 2}'
_QUICK: Mapping[str, Any] = MappingProxyType(
    {"dataset_name": "digits", "image_size": 32, "cpu_threads": 1, "report_to": "none"}
)
_SMOKE: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "pretrain": {
            **_QUICK,
            **{"backbone": "resnet10_cifar", "model_args": _THIN, "split": "train", "eval_split": ""},
            **{"max_examples": 200, "num_train_epochs": 2, "per_device_train_batch_size": 50, "steps": 1},
            **{"warmup_epochs": 0, "learning_rate": 0.1},
        },
        "coreset": {"coreset_warmup_epochs": 1, "coreset_interval": 1, "coreset_fraction": 0.5},
        "rcs": {"coreset_validation_fraction": 0.1},
        "finetune": {
            **_QUICK,
            **{"split": "train", "max_examples": 200, "num_train_epochs": 2, "per_device_train_batch_size": 50},
            **{"steps": 1, "validation_steps": 1},
        },
        "autolora": {"auto_lr_epochs": [1]},
        "lp_aff": {"clusters": 4, "probe_stage_epochs": 1},
        "evaluate": {"dataset_name": "digits", "preset": "smoke", "n_examples": 10, "cpu_threads": 1},
    }
)
_EPOCHS_OF_AUTOLORA = {  # looked back at, of 50
    "aff": [16, 24, 28, 36, 40, 42, 44, 46, 48],
    "linear": [4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48],
}


@dataclass(frozen=True)
class LastCheckpoint:
    """The newest checkpoint of a run, whose number is known when it is there.

    Args:
        folder (`str`): of the run.
    """

    folder: str

    def __str__(self) -> str:
        return f"{self.folder}/checkpoint-*"

    @property
    def shell(self) -> str:
        """For a shell."""
        return f'"$(ls -d {shlex.quote(self.folder)}/checkpoint-* | sort -V | tail -n 1)"'


Word = str | LastCheckpoint


@dataclass(frozen=True)
class Stage:
    """One command.

    Args:
        name (`str`): its folder below the output folder.
        command (`str`): `"pretrain"`, `"finetune"` or `"evaluate"`.
        arguments (`tuple`): its flags.
        folder (`str`): output folder.
        makes (`tuple[str, ...]`): files in the folder that are there when it has ended.
        needs (`tuple[str, ...]`): stages that come before it.
        work ([`Work`]): arithmetic; that of the full size, also for a smoke test.
        settings (`Mapping`): the flags by name, with those of configuration and preset.
        note (`str`): what the preset says about the published run.
    """

    name: str
    command: str
    arguments: tuple[Word, ...]
    folder: str
    makes: tuple[str, ...]
    needs: tuple[str, ...]
    work: Work
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)
    note: str = ""

    @property
    def words(self) -> list[str]:
        """The flags as text; equal texts are the same stage."""
        return [str(word) for word in self.arguments]

    @property
    def shell(self) -> str:
        """The command for a shell, one flag per line."""
        parts: list[list[str]] = [["hf-robust", self.command]]
        for word in self.arguments:
            if isinstance(word, str) and word.startswith("--"):
                parts.append([])
            parts[-1].append(word.shell if isinstance(word, LastCheckpoint) else shlex.quote(word))
        return _wrapped([" ".join(part) for part in parts])


@dataclass(frozen=True)
class Plan:
    """What is the same for all rows.

    Args:
        output_dir (`str`): holds `encoders/` and `classifiers/`.
        data (`Mapping[str, Dataset]`): where the user's data sets are, by key; default: as published.
        precision (`str`): `"bf16"` or `"fp32"` (published) of trainings; evaluations are in float32.
        smoke (`bool`): a few images of the digits, thin networks, two epochs.
        n_examples (`int`, *optional*): test images that are judged; default: all.
        pretrain_args, finetune_args (`tuple[str, ...]`): flags that come last, and therefore win.

    Raises:
        ValueError: for another precision.
    """

    output_dir: str = "outputs/reproduction"
    data: Mapping[str, Dataset] = field(default_factory=dict)
    precision: str = "bf16"
    smoke: bool = False
    n_examples: int | None = None
    pretrain_args: tuple[str, ...] = ()
    finetune_args: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision must be bf16 or fp32, got {self.precision!r}")

    def dataset(self, key: str) -> Dataset:
        """A data set, where the user has it.

        Args:
            key (`str`): our name of it.
        """
        return self.data.get(key) or load_dataset(key)

    @property
    def trains_in(self) -> dict[str, Any]:
        """The flag of the precision."""
        return {"bf16": True} if self.precision == "bf16" and not self.smoke else {}


def row_stages(row: Row, plan: Plan) -> list[Stage]:
    """The commands of a row: pre-training, post-processing where the method has it, fine-tuning, evaluation.

    Args:
        row ([`Row`]): of a table.
        plan ([`Plan`]): where and how.

    Returns:
        `list[Stage]`: in order.
    """
    before = _network_stages(row.network, plan)
    tuned = _finetuning(row, before[-1], plan)
    return [*before, tuned, _evaluation(row, tuned, plan)]


def unique_stages(rows: Iterable[Row], plan: Plan) -> list[Stage]:
    """The commands of several rows, every stage once.

    Args:
        rows (`Iterable[Row]`): of one or several tables.
        plan ([`Plan`]): where and how.

    Returns:
        `list[Stage]`: in an order in which each comes after what it needs.
    """
    return list({stage.name: stage for row in rows for stage in row_stages(row, plan)}.values())


def _network_stages(network: Network, plan: Plan) -> list[Stage]:
    if network.post_of is None:
        return [_pretraining(network, plan)]
    before = _network_stages(load_network(network.post_of), plan)
    return [*before, _post_processing(network, before[-1], plan)]


def _pretraining(network: Network, plan: Plan) -> Stage:
    name = f"encoders/{network.name}"
    dataset, folder = plan.dataset(network.dataset), f"{plan.output_dir}/{name}"
    flags: dict[str, Any] = {"config": str(CONFIGS / network.config)} if network.config else {}
    flags |= dict(network.flags)
    if network.dataset in plan.data or not network.config:
        published = load_dataset(network.dataset)  # whose columns stand in the file
        flags |= {"image_column": "", "label_column": ""} if published.image_column else {}
        flags |= _where(dataset)
    flags |= {"eval_split": ""} if network.dataset == "imagenet32" else {}  # a probe of 1,000 classes and a million
    flags |= plan.trains_in
    settings = _settings(_words(flags) + list(plan.pretrain_args))
    work = Work(_forward(network) * pretraining_passes(settings, _images(dataset, settings)), plan.precision)
    if plan.smoke:
        kind = str(settings.get("coreset", "full"))
        flags |= {**_SMOKE["pretrain"], **(_SMOKE["coreset"] if kind != "full" else {}), **_SMOKE.get(kind, {})}
        flags |= {"steps": 0} if str(settings.get("steps")) == "0" else {}
    words = (*_words({**flags, "output_dir": folder}), *plan.pretrain_args)
    made = ("encoder/config.json", "report.json")
    return Stage(name, "pretrain", words, folder, made, (), work, _settings(words))


def _post_processing(network: Network, before: Stage, plan: Plan) -> Stage:
    name, origin = f"encoders/{network.name}", load_network(str(network.post_of))
    dataset, folder = plan.dataset(network.dataset), f"{plan.output_dir}/{name}"
    start: Word = f"{before.folder}/encoder" if origin.momentum else LastCheckpoint(before.folder)
    flags = {"mode": "lp_aff", **_where(dataset), "split": "unlabeled" if "unlabeled" in dataset.images else "train"}
    flags |= {"num_train_epochs": 25, "probe_stage_epochs": 10, **network.flags, "seed": 1, **plan.trains_in}
    work = _finetuning_work(network, flags, dataset, plan)
    if plan.smoke:
        flags |= {**_SMOKE["finetune"], **_SMOKE["lp_aff"]}
        flags = {key: value for key, value in flags.items() if not key.endswith("_column")}
    words = ("--encoder", start, *_words({**flags, "output_dir": folder}), *plan.finetune_args)
    made = ("encoder/config.json", "report.json")
    return Stage(name, "finetune", words, folder, made, (before.name,), work, _settings(words))


def _finetuning(row: Row, before: Stage, plan: Plan) -> Stage:
    kind = "" if row.protocol != "autolora" else "autolora-"
    name = f"classifiers/{row.network.name}-{row.target}-{kind}{row.mode}"
    dataset, folder = plan.dataset(row.target), f"{plan.output_dir}/{name}"
    own = {"vanilla": _vanilla, "autolora": _autolora, "imagenet32": _imagenet32}[row.protocol](row)
    flags = {**own, **_where(dataset), "eval_split": "", "seed": 1, **plan.trains_in}
    preset = load_preset(own["preset"], row.mode) if "preset" in own else None
    work = _finetuning_work(row.network, {**(preset.flags if preset else {}), **flags}, dataset, plan)
    two = row.mode == "aff" and preset is not None and "clean" in preset.norm_branches
    momentum, post = row.network.momentum, row.network.post_of is not None
    # A checkpoint has both norm branches, an exported encoder the adversarial one.
    start: Word = LastCheckpoint(before.folder) if two and not momentum and not post else f"{before.folder}/encoder"
    if plan.smoke:
        flags |= {**_SMOKE["finetune"], **(_SMOKE["autolora"] if row.protocol == "autolora" else {})}
        flags = {key: value for key, value in flags.items() if not key.endswith("_column")}
    words = ("--encoder", start, *_words({**flags, "output_dir": folder}), *plan.finetune_args)
    made = ("classifier/config.json", "report.json")
    note = preset.note if preset else ""
    return Stage(name, "finetune", words, folder, made, (before.name,), work, _settings(words), note)


def _vanilla(row: Row) -> dict[str, Any]:
    crossed = row.target == "stl10" and row.network.dataset != "stl10"
    data = f"stl10-32/{row.network.dataset}" if crossed else row.target
    return {"mode": row.mode, "preset": f"rssl-vanilla/{row.preset}/{data}"}


def _autolora(row: Row) -> dict[str, Any]:
    linear = row.mode != "aff"
    halving = _EPOCHS_OF_AUTOLORA["linear" if linear else "aff"]
    return {
        "mode": row.mode if linear else "autolora",
        **{"image_size": 32, "num_train_epochs": 50, "per_device_train_batch_size": 128, "learning_rate": 0.1},
        **{"lr_rule": "auto", "auto_lr_epochs": halving, "validation_fraction": 0.05, "keep": "best"},
    }


def _imagenet32(row: Row) -> dict[str, Any]:
    one_branch = {"clean_branch": "adv", "reference_branch": "adv"} if row.mode == "aff" else {}
    return {
        **{"mode": row.mode, "image_size": 32, "num_train_epochs": 30},
        **{"per_device_train_batch_size": 64 if row.mode == "slf" else 128, "learning_rate": row.learning_rate},
        **{"lr_rule": "cosine", "min_learning_rate": "1e-6", "nesterov": True, "weight_decay": "5e-4"},
        **{"validation_fraction": 0, "keep": "last", **one_branch},
    }


def _evaluation(row: Row, tuned: Stage, plan: Plan) -> Stage:
    dataset, folder = plan.dataset(row.target), f"{tuned.folder}/evaluation"
    metrics = ["accuracy", "pgd20", *(["autoattack"] if any("autoattack" in name for name in row.columns) else [])]
    flags = {"model": f"{tuned.folder}/classifier", **_where(dataset), "metrics": metrics, "curve_examples": 0}
    flags |= {"n_examples": plan.n_examples} if plan.n_examples else {}
    judged = min(plan.n_examples or dataset.images["test"], dataset.images["test"])
    figures = [row.figures.get(name) for name in row.columns]
    passes = evaluation_passes(metrics, judged, *(figures if len(figures) == 2 else (None, None)))
    if plan.smoke:
        flags = {key: value for key, value in flags.items() if not key.endswith("_column")}
        flags |= _SMOKE["evaluate"]
    words = tuple(_words({**flags, "update_card": True, "output_dir": folder}))
    work, name = Work(_forward(row.network, _size(row)) * passes, "fp32"), f"{tuned.name}/evaluation"
    return Stage(name, "evaluate", words, folder, ("report.json",), (tuned.name,), work, _settings(words))


def _finetuning_work(network: Network, flags: Mapping[str, Any], dataset: Dataset, plan: Plan) -> Work:
    settings = {**flags, **_settings(plan.finetune_args)}
    passes = finetuning_passes(settings, _images(dataset, settings))
    size = int(settings.get("image_size") or _ARCHITECTURES.get(network.dataset, ("", 32))[1])
    return Work(_forward(network, size) * passes, plan.precision)


def _size(row: Row) -> int:
    return 96 if row.network.dataset == row.target == "stl10" else 32


def _forward(network: Network, image_size: int | None = None) -> float:
    """FLOP of a forward pass of the network of a data set."""
    architecture, side = _ARCHITECTURES.get(network.dataset, ("resnet18_cifar", 32))
    return NETWORKS[architecture, image_size or side]


def _images(dataset: Dataset, settings: Mapping[str, Any]) -> int:
    known = dataset.images[settings.get("split") or "train"]
    return min(int(settings.get("max_examples") or known), known)


def _where(dataset: Dataset) -> dict[str, Any]:
    columns = {"image_column": dataset.image_column, "label_column": dataset.label_column}
    return {"dataset_name": dataset.name, **{key: value for key, value in columns.items() if value}}


def _words(flags: Mapping[str, Any]) -> list[str]:
    """`--key value ...` of each flag."""
    words: list[str] = []
    for key, value in flags.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{key}", *(str(v).lower() if isinstance(v, bool) else str(v) for v in values)]
    return words


def flags_by_name(words: Sequence[Word]) -> dict[str, list[str]]:
    """Group the words of a command.

    Args:
        words (`Sequence`): `--name value ...` or `--name=value`; what comes before the first flag is left out.

    Returns:
        `dict[str, list[str]]`: values by name; of a flag that comes twice, those of the last.
    """
    found: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if isinstance(word, str) and word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            found[name := key.replace("-", "_")] = [value] if equals else []
        elif name:
            found[name].append(str(word))
    return found


def _settings(words: Sequence[Word]) -> dict[str, Any]:
    """The flags of a command by name, over those of its configuration file."""
    found = flags_by_name(words)
    file = found.pop("config", None)
    flat = {key: value[0] if len(value) == 1 else value or "true" for key, value in found.items()}
    return {**(_config(file[0]) if file else {}), **flat}


@cache
def _config(path: str) -> dict[str, Any]:
    file = Path(path) if Path(path).is_file() else Path(hf_robust.__file__).parents[1] / path
    if not file.is_file():
        raise ValueError(
            f"no file {path!r}: the commands name files of a clone of the repository, install it there by pip "
            "install -e . and run them from its root"
        )
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def _wrapped(parts: list[str], width: int = 110) -> str:
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) + 3 > width:
            lines[-1] += " \\"
            lines.append(f"    {part}")
        else:
            lines[-1] += f" {part}"
    return "\n".join(lines)
