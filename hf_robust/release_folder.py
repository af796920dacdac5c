"""A folder before it is published: what it is, which of its files go along, and whether they may."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import huggingface_hub

from hf_robust.coresets.base import Coreset
from hf_robust.evaluation.environment import holds_secret
from hf_robust.evaluation.report import EXPORTED_FORMATS
from hf_robust.hub_folders import check_weights, read_config

__all__ = ["Release", "find_release", "is_replaced"]

CARD = "README.md"
_PARTS = ("encoder", "classifier", "adapter")  # of the output folder of a run
# What an earlier push may have left and a later one replaces; patterns match name by name, never across a "/".
_OURS = (
    *("config.json", "preprocessor_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("adapter_config.json", "adapter_model.safetensors", "labels.json", "report.json", "coreset*.json"),
    *("backbones.py", "encoder.py", "curves.png", "examples.png", "coreset.png"),
    *("native/config.json", "native/preprocessor_config.json", "native/model.safetensors"),
    *("natural_lora/adapter_config.json", "natural_lora/adapter_model.safetensors", "natural_lora/labels.json"),
    *("evaluation/*/report.html", "evaluation/*/report.json", "evaluation/*/*.png"),
)
_MORE = (CARD, "LICENSE*", "CITATION*", "*.png", "*.svg", "*.bib", "natural_lora/README.md", ".eval_results/*.yaml")
_CORESET = (CARD, "LICENSE*", "coreset*.json", "coreset*.png")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
_PICKLED = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # first bytes, by protocol
_OF_TRAINING = ("training_args.bin", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state*.pth")
_TEXTS = (".md", ".json", ".py", ".yaml", ".html", ".svg", ".bib")


@dataclass(frozen=True)
class Release:
    """A folder that may be published.

    Args:
        folder (`Path`): what was found; of a run's output folder the part that leaves.
        kind (`str`): `"encoder"`, `"classifier"`, `"adapter"` or `"coreset"`.
        files (`dict[str, Path]`): every file that goes along, by its name in the repository.
        left_out (`tuple[str, ...]`): names of those that stay here.
    """

    folder: Path
    kind: str
    files: dict[str, Path]
    left_out: tuple[str, ...] = field(default=())

    @property
    def repo_type(self) -> str:
        """`"dataset"` for a coreset, else `"model"`."""
        return "dataset" if self.kind == "coreset" else "model"

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files.values())


def find_release(folder: str | Path) -> Release:
    """Find what a folder publishes and check it, without any network.

    Args:
        folder (`str` or `Path`): written by `save_encoder`, `save_classifier` or `save_adapter`, with a card beside
            the weights; or the output folder of a run, whose `encoder/`, `classifier/` or `adapter/` is taken; or a
            folder (or file) of coresets.

    Returns:
        [`Release`]: weights whole and in safetensors, a card with readable metadata.

    Raises:
        FileNotFoundError: When there is no such folder.
        ValueError: When it holds a training checkpoint, pickles, damaged weights, an access token or no card, or it
            is not clear what to publish.
    """
    folder = Path(folder).expanduser()
    if folder.is_file() and fnmatch.fnmatch(folder.name, "coreset*.json"):
        return _coresets(folder.parent, [folder], alone=True)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}: write the folder of an encoder, a classifier or a run")
    _refuse_checkpoint(folder)
    part = _part(folder)
    if part is None:
        return _coresets(folder, sorted(folder.glob("coreset*.json")))
    _refuse_checkpoint(part)
    kind = _kind(part)
    _refuse_pickles(part)
    release = _collect(part, kind, (*_OURS, *_MORE))
    _refuse_links(part, release.files)
    _refuse_disguises(release.files)
    _check_network(part, kind)
    _check_card(part)
    _refuse_tokens(release.files.values())
    return release


def is_replaced(name: str) -> bool:
    """Whether a file of the repository is one that a push writes, so that an old one must go.

    Args:
        name (`str`): relative to the repository.
    """
    return _matches(name, _OURS)


def _part(folder: Path) -> Path | None:
    """The folder with the network; of a run's output folder the one inside."""
    if _has_network(folder):
        return folder
    inside = [folder / name for name in _PARTS if _has_network(folder / name)]
    if len(inside) > 1:
        names = " or ".join(repr(str(path)) for path in inside)
        raise ValueError(f"{str(folder)!r} holds several networks: push {names}")
    if inside:
        return inside[0]
    if any(folder.glob("coreset*.json")) and not any(folder.glob("checkpoint-*")):
        return None
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
    raise ValueError(
        f"{str(folder)!r} holds no encoder, classifier or adapter (but {found}): push the folder of save_encoder, "
        "save_classifier or save_adapter, or the output folder of a finished run"
    )


def _has_network(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def _kind(folder: Path) -> str:
    if not (folder / "config.json").is_file():
        return "adapter"
    config = read_config(folder)
    kind = config.get("model_type")
    if kind not in EXPORTED_FORMATS:
        raise ValueError(
            f"{str(folder)!r} is a training checkpoint or somebody else's model (model_type {kind!r}): push the "
            "'encoder' or 'classifier' folder of its run, or write one with save_encoder or save_classifier"
        )
    return "classifier" if config.get("num_classes") else "encoder"


def _refuse_checkpoint(folder: Path) -> None:
    network = _has_network(folder)  # the output folder of a run may hold such files, beside what leaves
    found = [p.name for name in _OF_TRAINING for p in folder.glob(name)] if network else []
    if found:
        raise ValueError(
            f"{str(folder)!r} is a training checkpoint, it holds {', '.join(found[:3])}, which is never published: "
            "push the 'encoder' or 'classifier' folder of its run"
        )


def _refuse_pickles(folder: Path) -> None:
    found = sorted(_name(p, folder) for p in _visible(folder) if p.suffix.lower() in _PICKLES)
    if found:
        raise ValueError(
            f"{str(folder)!r} holds {', '.join(found[:3])}, and only safetensors are published, since other formats "
            "may run code when opened: move such files out of the folder"
        )


def _refuse_disguises(files: dict[str, Path]) -> None:
    """Pickles and zipped ones under another name; weights in safetensors are read and checked elsewhere."""
    for name, path in files.items():
        with open(path, "rb") as file:
            head = file.read(4)
        if path.suffix != ".safetensors" and (head == b"PK\x03\x04" or head[:2] in _PICKLED):
            raise ValueError(
                f"{str(path)!r} holds pickled objects or an archive under the name {name}, which may run code when "
                "opened: move it out of the folder"
            )


def _refuse_links(folder: Path, files: dict[str, Path]) -> None:
    """What lies elsewhere was not meant to be published by whoever names this folder."""
    home = folder.resolve()
    for path in files.values():
        if not path.resolve().is_relative_to(home):
            raise ValueError(
                f"{str(path)!r} is a link to {str(path.resolve())!r}, outside the folder, and only what lies in it is "
                "published: put a copy there (cp -rL copies a whole folder with what its links point to)"
            )


def _visible(folder: Path) -> Iterable[Path]:
    """Every file but those of tools that hide theirs."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts[:-1])
        if path.is_file() and not hidden and not path.name.startswith("."):
            yield path


def _collect(folder: Path, kind: str, patterns: tuple[str, ...]) -> Release:
    results = [path for path in sorted(folder.glob(".eval_results/*.yaml")) if path.is_file()]
    named = {_name(path, folder): path for path in (*_visible(folder), *results)}
    files = {name: path for name, path in named.items() if _matches(name, patterns)}
    return Release(folder, kind, files, tuple(name for name in named if name not in files))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    parts = name.split("/")
    for pattern in patterns:
        wanted = pattern.split("/")
        if len(wanted) == len(parts) and all(map(fnmatch.fnmatchcase, parts, wanted)):
            return True
    return False


def _name(path: Path, folder: Path) -> str:
    return str(PurePosixPath(path.relative_to(folder)))


def _check_network(folder: Path, kind: str) -> None:
    places = [folder, *(folder / name for name in ("native", "natural_lora") if _has_network(folder / name))]
    for place in places:
        check_weights(place)
        index = place / "model.safetensors.index.json"
        wanted = {"adapter_model.safetensors" if not (place / "config.json").is_file() else "model.safetensors"}
        if index.is_file() and not (place / "model.safetensors").is_file():
            wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        absent = sorted(name for name in wanted if not (place / name).is_file())
        if absent:
            raise ValueError(f"{str(place)!r} lacks {', '.join(absent[:3])}: export the {kind} again")
    code = (read_config(folder).get("auto_map") or {}) if kind != "adapter" else {}
    absent = sorted(
        {f"{value.partition('.')[0]}.py" for value in code.values()} | ({"backbones.py"} if code else set())
    )
    absent = [name for name in absent if not (folder / name).is_file()]
    if absent:
        raise ValueError(f"{str(folder)!r} lacks its code files {', '.join(absent)}: export the {kind} again")


def _check_card(folder: Path) -> None:
    card = folder / CARD
    if not card.is_file():
        raise ValueError(
            f"{str(folder)!r} has no model card {CARD}, and what is not described is not published: "
            "write one with write_model_card(report, folder), as the runs do"
        )
    try:
        metadata = huggingface_hub.ModelCard(card.read_text(encoding="utf-8")).data.to_dict()
    except Exception as error:  # noqa: BLE001 - of the YAML reader or of the client, by version
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"the metadata of {str(card)!r} cannot be read ({line}): write the card again") from None
    if not metadata:
        raise ValueError(f"{str(card)!r} has no metadata between '---' lines at its top: write the card again")


def _refuse_tokens(files: Iterable[Path]) -> None:
    for path in files:
        if path.suffix in _TEXTS and holds_secret(path.read_text(encoding="utf-8", errors="replace")):
            raise ValueError(
                f"{str(path)!r} seems to hold an access token: take it out, and make a new token, for files get copied"
            )


def _coresets(folder: Path, chosen: list[Path], *, alone: bool = False) -> Release:
    """Coresets without a network, as a data set; `alone` without what else the folder holds."""
    for path in chosen:
        Coreset.load(path)
    if not alone:
        _refuse_pickles(folder)
    found = _collect(folder, "coreset", _CORESET).files
    files = {name: path for name, path in found.items() if path in chosen or not (alone or name.endswith(".json"))}
    _refuse_links(folder, files)
    _refuse_disguises(files)
    _refuse_tokens(files.values())
    return Release(folder, "coreset", files)
