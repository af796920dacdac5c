"""Published settings of robust fine-tuning by name: pre-training method, data set and mode, one immutable row each."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

__all__ = ["Preset", "load_preset", "preset_names", "rssl_vanilla"]

_FAMILY = "rssl-vanilla"
_SOURCE = "RobustSSL_Benchmark@19dc714, Finetuning_Methods/Vanilla_Finetuning: utils.py, run_vanilla_tune.sh"

METHODS = (
    *("ACL", "DynACL", "DynACL++", "AdvCL", "A-InfoNCE", "DeACL"),
    *("ACL-AIR", "DynACL-AIR", "DynACL-AIR++", "DynACL-RCS"),
)
DATASETS = ("cifar10", "cifar100", "stl10", "stl10-32")
MODES = ("slf", "alf", "aff")
_IMAGE_SIZES = MappingProxyType({"cifar10": 32, "cifar100": 32, "stl10": 96, "stl10-32": 32})
# Their checkpoints have no pair of a clean and an adversarial branch that the loader could read by name.
_ONE_BRANCH = ("AdvCL", "A-InfoNCE", "DeACL")


@dataclass(frozen=True)
class Preset:
    """Settings of one published fine-tuning run; nothing of it can be changed, flags go over it.

    The released code changed one namespace from mode to mode, so that settings of one run leaked into the next.

    Args:
        name (`str`): as on the command line, such as `"rssl-vanilla/DynACL/cifar10"`.
        mode (`str`): `"slf"`, `"alf"` or `"aff"`.
        batch_size (`int`): images per step, on one device.
        learning_rate (`float`): first learning rate of SGD with momentum 0.9, without Nesterov.
        milestones (`tuple[int, ...]`): epochs after which the rate falls to a tenth.
        epochs (`int`): length of the run; the last epoch is kept.
        norm_branches (`tuple[str, ...]`): `("adv",)`, or `("clean", "adv")` where clean images have their own branch.
        image_size (`int`): side of the images, pixels.
        note (`str`): where the published command did something else than was meant; empty where it did not.
        weight_decay, momentum (`float`): of SGD, on every trained tensor.
        validation_fraction (`float`): share of the training images held out: none, published runs do not choose.
        keep (`str`): `"last"`: weights of the last epoch.
        source (`str`): where the values stand.
    """

    name: str
    mode: str
    batch_size: int
    learning_rate: float
    milestones: tuple[int, ...]
    epochs: int
    norm_branches: tuple[str, ...]
    image_size: int
    note: str = ""
    weight_decay: float = 2e-4
    momentum: float = 0.9
    validation_fraction: float = 0.0
    keep: str = "last"
    source: str = _SOURCE

    @property
    def flags(self) -> dict[str, Any]:
        """The settings by the names of the command line: training arguments, image size and, for AFF, branches."""
        clean = self.norm_branches[0]  # of the clean images and of the reference: their own branch where there is one
        branches = {"clean_branch": clean, "reference_branch": clean} if self.mode == "aff" else {}
        return {
            "image_size": self.image_size,
            "per_device_train_batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "lr_rule": "milestones",
            # runs of 4, 5 and 19 epochs end before the rate would fall
            "lr_milestones": [float(epoch) for epoch in self.milestones if epoch < self.epochs] or None,
            "num_train_epochs": float(self.epochs),
            "weight_decay": self.weight_decay,
            "optimizer": "sgd",
            "momentum": self.momentum,
            "nesterov": False,
            "warmup_epochs": 0.0,
            "validation_fraction": self.validation_fraction,
            "keep": self.keep,
            **branches,
        }


class _Cell(NamedTuple):
    batch_size: int
    learning_rate: float
    milestones: tuple[int, ...]
    epochs: int = 25


_Row = Mapping[str, _Cell | None]


def _row(milestones: tuple[int, ...], *cells: tuple[int, float] | None, epochs: int = 25) -> _Row:
    """One line of the table: batch and learning rate on each of `DATASETS`; `None`: the release leaves it unset."""
    found = [None if cell is None else _Cell(*cell, milestones, epochs) for cell in cells]
    return MappingProxyType(dict(zip(DATASETS, found, strict=True)))


def _changed(row: _Row, dataset: str, **values: Any) -> _Row:
    """The row with another value on one data set."""
    cell = row[dataset]
    assert cell is not None
    return MappingProxyType({**row, dataset: cell._replace(**values)})


_ACL = _row((10, 20), (512, 0.01), (512, 0.05), (512, 0.1), (128, 0.01))
_SINGLE = _row((15, 20), *[(512, 0.01)] * 4)
_AFF = _row((15, 20), *[(128, 0.1)] * 4)
_LONG_AFF = _row((40, 60), *[(128, 0.1)] * 4, epochs=100)
_DYNACL_AFF = _changed(_AFF, "stl10", milestones=(10, 20))
_DYNACL_AIR_ALF = _row((10, 20), (512, 0.01), (512, 0.1), (128, 0.1), (128, 0.01))
_DYNACL_AIR_SLF = _row((10, 20), (512, 0.01), (512, 0.1), (512, 0.1), (128, 0.01))

_TABLE: Mapping[str, tuple[_Row, _Row, _Row]] = MappingProxyType(  # rows of MODES
    {
        "ACL": (_ACL, _ACL, _LONG_AFF),
        "DynACL": (_ACL, _ACL, _DYNACL_AFF),
        "DynACL++": (_ACL, _ACL, _DYNACL_AFF),
        "AdvCL": (_SINGLE, _SINGLE, _AFF),
        "A-InfoNCE": (_SINGLE, _SINGLE, _AFF),
        "DeACL": (_SINGLE, _SINGLE, _AFF),
        "ACL-AIR": (
            _row((10, 20), (512, 0.005), (512, 0.1), (512, 0.01), (128, 0.01)),
            _row((10, 20), (512, 0.01), (512, 0.1), (512, 0.01), (128, 0.01)),
            _LONG_AFF,
        ),
        "DynACL-AIR": (_changed(_DYNACL_AIR_SLF, "cifar10", epochs=5), _DYNACL_AIR_ALF, _AFF),
        "DynACL-AIR++": (
            _row((10, 20), (512, 0.01), (512, 0.09), (512, 0.1), None),
            _changed(_row((10, 20), (512, 0.01), (512, 0.1), (128, 0.1), None), "cifar10", epochs=4),
            _changed(_AFF, "cifar10", epochs=19),
        ),
        "DynACL-RCS": (_ACL, _ACL, _DYNACL_AFF),
    }
)

_FALLBACK = _Cell(128, 0.1, (15, 20))  # what the released code does with a method that its table does not know
_SPELLING = MappingProxyType(
    {
        "DynACL-RCS": (
            "the released code spells DynACL_RCS in its table and DynACL-RCS on its command line: the published "
            "command ran batch 128, learning rate 0.1, milestones 15 and 20"
        ),
        "ACL-AIR": "the released code has these values under ACL_IR, a name that its command line does not take",
    }
)
_LEAK = "the published command runs all modes in turn and the epochs of {} carry over: {} here"
_NOTES: Mapping[tuple[str, str, str], str] = MappingProxyType(
    {
        ("DynACL-AIR", "cifar10", "alf"): _LEAK.format("slf", 5),
        ("DynACL-AIR", "cifar10", "aff"): _LEAK.format("slf", "5, all of them at the first rate,"),
        ("DynACL-AIR++", "cifar10", "aff"): (
            "the 19 epochs stand in a misspelt field of the released code, which runs 25, or 4 after the other modes"
        ),
        ("DynACL-AIR++", "cifar100", "slf"): "learning rate 0.1 in the code of AIR and of AutoLoRa",
    }
)


def rssl_vanilla(method: str, dataset: str, mode: str, *, pretrained_on: str | None = None) -> Preset:
    """Look up the settings of a vanilla fine-tuning run of the RobustSSL benchmark.

    They are those that the released code means. Where the published command runs others, because a name is spelt in
    two ways or an epoch count carries over from another mode, `note` says so. Epochs below 25 were chosen on the test
    set; they are kept. Where the code would start AFF from re-initialised norm branches (AdvCL and A-InfoNCE from
    CIFAR-100 to STL-10), one branch is used.

    Args:
        method (`str`): pre-training method, one of `METHODS`, as the benchmark spells it.
        dataset (`str`): data set of the fine-tuning: `"cifar10"`, `"cifar100"`, `"stl10"` (96 pixels, encoders of
            STL-10) or `"stl10-32"` (32 pixels, encoders of CIFAR).
        mode (`str`): `"slf"`, `"alf"` or `"aff"`.
        pretrained_on (`str`, *optional*): data set of the encoder, for `"stl10-32"` `"cifar10"` (default) or
            `"cifar100"`, which decides the norm branches of AFF; for the others the data set itself.

    Returns:
        [`Preset`]

    Raises:
        ValueError: for an unknown name, a cell that the release leaves unset, another `pretrained_on`.

    Source: `setup_hyperparameter` of `utils.py` and the options of `run_vanilla_tune.sh`, both in
        RobustSSL_Benchmark@19dc714, `Finetuning_Methods/Vanilla_Finetuning`.
    """
    for kind, name, known in (("method", method, METHODS), ("dataset", dataset, DATASETS), ("mode", mode, MODES)):
        if name not in known:
            _unknown(kind, name, known)
    possible = ("cifar10", "cifar100") if dataset == "stl10-32" else (dataset,)
    origin = possible[0] if pretrained_on is None else pretrained_on
    if origin not in possible:
        raise ValueError(
            f"preset {_FAMILY}/{method}/{dataset} is for encoders of {' or '.join(possible)}, got {origin!r}"
            + ("" if dataset == "stl10-32" else ": leave that part out")
        )
    cell = _TABLE[method][MODES.index(mode)][dataset]
    if cell is None:
        raise ValueError(
            f"{_FAMILY} has no values for {method} with mode {mode} on {dataset}: the released code leaves them unset "
            "and falls back to batch 128, learning rate 0.1; take another method's preset, such as DynACL-AIR, or set "
            "them yourself"
        )
    one = mode != "aff" or method in _ONE_BRANCH or (dataset == "stl10-32" and origin == "cifar10")
    written = f"{_FAMILY}/{method}/{dataset}" + (f"/{pretrained_on}" if pretrained_on else "")
    return Preset(
        written,
        mode,
        cell.batch_size,
        cell.learning_rate,
        cell.milestones,
        cell.epochs,
        norm_branches=("adv",) if one else ("clean", "adv"),
        image_size=_IMAGE_SIZES[dataset],
        note=_note(method, dataset, mode, origin, cell),
    )


def _note(method: str, dataset: str, mode: str, origin: str, cell: _Cell) -> str:
    if method in _SPELLING and cell != _FALLBACK:
        return _SPELLING[method]
    if (dataset, origin, mode) == ("stl10-32", "cifar100", "aff") and method in _ONE_BRANCH:
        return "the published command asks for two norm branches, which then start from new weights; one here"
    return _NOTES.get((method, dataset, mode), "")


def load_preset(text: str, mode: str) -> Preset:
    """Read a preset as it is written on the command line.

    Args:
        text (`str`): `"rssl-vanilla/METHOD/DATASET"`, or `"rssl-vanilla/METHOD/stl10-32/cifar100"` for an encoder of
            CIFAR-100 on STL-10.
        mode (`str`): `"slf"`, `"alf"` or `"aff"`; the other modes have no preset.

    Returns:
        [`Preset`]

    Raises:
        ValueError: for a text of another form and as [`rssl_vanilla`].
    """
    family, *parts = text.split("/")
    if family != _FAMILY:
        _unknown("preset", family, (_FAMILY,))
    if not 2 <= len(parts) <= 3 or not all(parts):
        raise ValueError(
            f"a preset is written {_FAMILY}/METHOD/DATASET, got {text!r}: write for example {_FAMILY}/DynACL/cifar10"
        )
    if mode not in MODES:
        raise ValueError(f"preset {text} has the modes {', '.join(MODES)}, got {mode!r}: leave --preset out")
    return rssl_vanilla(parts[0], parts[1], mode, pretrained_on=parts[2] if parts[2:] else None)


def preset_names() -> list[str]:
    """List all presets as they are written on the command line; each serves every mode whose cell is set."""
    return [f"{_FAMILY}/{method}/{dataset}" for method in METHODS for dataset in DATASETS]


def _unknown(kind: str, name: str, known: Iterable[str]) -> NoReturn:
    """Raise with the closest known name; case and underscores are no difference to a reader who mistypes."""
    plain = {word.lower(): word for word in known}
    close = difflib.get_close_matches(name.lower().replace("_", "-"), plain, n=1)
    hint = f"did you mean {plain[close[0]]!r}? " if close else ""
    raise ValueError(f"unknown {kind} {name!r}: {hint}known are {', '.join(plain.values())}")
