"""The talk's tables as package data: what was published in each row, and which network and protocol it stands on."""

from __future__ import annotations

import difflib
import fnmatch
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from hf_robust.evaluation.leaderboard import closest_row

__all__ = [
    "Dataset",
    "Network",
    "Published",
    "Row",
    "Table",
    "choose_rows",
    "load_dataset",
    "load_network",
    "load_table",
    "table_names",
]

DATA = Path(__file__).with_name("tables.json")
Protocol = Literal["vanilla", "autolora", "imagenet32"]
WEBSITE, TALK = "leaderboard", "talk"


@dataclass(frozen=True)
class Dataset:
    """A data set as the commands name it.

    Args:
        key (`str`): our name, such as `"cifar10"`.
        title (`str`): for people.
        name (`str`): Hub id, or a path for the user to fill in.
        image_column, label_column (`str`, *optional*): where the data set has names of its own for them.
        classes (`int`): with labels.
        images (`Mapping[str, int]`): number of images by split.
    """

    key: str
    title: str
    name: str
    classes: int
    images: Mapping[str, int]
    image_column: str | None = None
    label_column: str | None = None

    @property
    def is_missing(self) -> bool:
        """Whether the user has to say where it is, because no data set of the Hub is named."""
        return self.name.startswith("path/to/")


@dataclass(frozen=True)
class Network:
    """A pre-trained encoder.

    Args:
        name (`str`): also its folder.
        config (`str`, *optional*): file of `examples/configs/`; `None` where the flags say everything.
        flags (`Mapping`): over the file, or of the post-processing.
        post_of (`str`, *optional*): the network that this one is post-processed from.
        momentum (`bool`): the encoder that leaves is the momentum encoder, of which checkpoints give no branches.
        note (`str`): what differs from the published run; mostly empty.
    """

    name: str
    config: str | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    post_of: str | None = None
    momentum: bool = False
    note: str = ""

    @property
    def dataset(self) -> str:
        """Key of the data set it is pre-trained on."""
        return self.name.rstrip("+").rpartition("_")[2]


@dataclass(frozen=True)
class Published:
    """Figures of one origin.

    Args:
        origin (`str`): `"leaderboard"` (of RobustSSL) or `"talk"`.
        metrics (`Mapping[str, float]`): accuracies in [0, 1] under the names of our reports.
        note (`str`): what a reader must know before comparing.
    """

    origin: str
    metrics: Mapping[str, float]
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One result of a table: an encoder, fine-tuned in one mode on one data set, and measured.

    Args:
        table (`str`): name of the table.
        name (`str`): within it, such as `"dynacl-air/slf"`.
        method (`str`): as the table spells it.
        mode (`str`): `"slf"`, `"alf"` or `"aff"`.
        network ([`Network`]): the encoder.
        target (`str`): key of the data set of fine-tuning and figures.
        protocol (`str`): `"vanilla"` (presets), `"autolora"` or `"imagenet32"`.
        preset (`str`): method by which the presets know the encoder.
        columns (`tuple[str, ...]`): metrics of the table.
        published (`tuple[Published, ...]`): the first is what ours is compared with; may be empty.
        published_hours (`float`, *optional*): of the pre-training, as published.
        learning_rate (`float`, *optional*): of the fine-tuning, where the protocol has no preset.
        notes (`tuple[str, ...]`): of row and network.
    """

    table: str
    name: str
    method: str
    mode: str
    network: Network
    target: str
    protocol: Protocol
    preset: str
    columns: tuple[str, ...]
    published: tuple[Published, ...] = ()
    published_hours: float | None = None
    learning_rate: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def figures(self) -> Mapping[str, float]:
        """Published figures that ours are compared with; empty where there are none."""
        return self.published[0].metrics if self.published else {}


@dataclass(frozen=True)
class Table:
    """A published table.

    Args:
        name (`str`): as on the command line.
        title (`str`): for people.
        columns (`tuple[str, ...]`): metrics, the standard accuracy first.
        notes (`tuple[str, ...]`): where paper, code and this library differ, and which is used.
        rows (`tuple[Row, ...]`): in the order of the table.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    notes: tuple[str, ...]
    rows: tuple[Row, ...]


def table_names() -> list[str]:
    """List the tables.

    Returns:
        `list[str]`: as the command line takes them.
    """
    return [table["name"] for table in _data()["tables"]]


@cache
def load_table(name: str) -> Table:
    """Look a table up.

    Args:
        name (`str`): one of [`table_names`].

    Returns:
        [`Table`].

    Raises:
        ValueError: for an unknown name.
    """
    known = {table["name"]: table for table in _data()["tables"]}
    if name not in known:
        raise ValueError(_unknown("table", name, known))
    values = known[name]
    rows = tuple(_row(values, entry, mode) for entry in values["rows"] for mode in values["modes"])
    return Table(name, values["title"], tuple(values["columns"]), tuple(values["notes"]), rows)


def choose_rows(table: Table, only: Sequence[str] = ()) -> tuple[Row, ...]:
    """The rows that the user asks for.

    Args:
        table ([`Table`]): the whole table.
        only (`Sequence[str]`): names (`"dynacl/slf"`), their beginnings up to a slash (`"dynacl"` is not
            `"dynacl-air"`) or patterns (`"*/slf"`); none: all rows.

    Returns:
        `tuple[Row, ...]`: in the order of the table.

    Raises:
        ValueError: for a text that fits no row.
    """
    chosen: set[str] = set()
    for text in only:
        found = {row.name for row in table.rows if _fits(row.name, text.lower())}
        if not found:
            raise ValueError(_unknown_row(table, text))
        chosen |= found
    return tuple(row for row in table.rows if not only or row.name in chosen)


def load_network(name: str) -> Network:
    """Look an encoder up.

    Args:
        name (`str`): such as `"dynacl_cifar10++"`.
    """
    return Network(name, **_data()["networks"][name])


def load_dataset(key: str) -> Dataset:
    """Look a data set up.

    Args:
        key (`str`): `"cifar10"`, `"cifar100"`, `"stl10"` or `"imagenet32"`.

    Raises:
        ValueError: for another key.
    """
    known = _data()["datasets"]
    if key not in known:
        raise ValueError(_unknown("data set", key, known))
    return Dataset(key, **known[key])


def _fits(name: str, text: str) -> bool:
    return name == text or name.startswith(f"{text}/") or fnmatch.fnmatchcase(name, text)


def _row(table: Mapping[str, Any], entry: Mapping[str, Any], mode: str) -> Row:
    network, target = load_network(entry["network"]), entry.get("target") or table["target"]
    columns, published = tuple(table["columns"]), []
    if mode in entry.get("talk", {}):
        values = zip(columns, entry["talk"][mode], strict=True)
        published.append(Published(TALK, {name: round(percent / 100, 6) for name, percent in values}))
    if "board" in table:
        board = closest_row(entry["method"], mode, network.dataset, target, table["board"])
        if board is not None:
            # rows of the talk that the leaderboard does not have are kept beside its own, under their origin
            origin = WEBSITE if board.origin == "website" else TALK
            published.append(Published(origin, {name: board.metrics[name] for name in columns}, board.note))
    rate = table.get("learning_rates", {}).get(mode)
    notes = tuple(text for text in (entry.get("note"), network.note) if text)
    return Row(
        table=table["name"],
        name=f"{entry.get('name') or entry['method'].lower()}/{mode}",
        method=entry["method"],
        mode=mode,
        network=network,
        target=target,
        protocol=table["protocol"],
        preset=entry.get("preset") or entry["method"],
        columns=columns,
        published=tuple(published),
        published_hours=entry.get("published_hours"),
        learning_rate=rate,
        notes=notes,
    )


def _unknown_row(table: Table, text: str) -> str:
    names = [row.name for row in table.rows]
    close = difflib.get_close_matches(text.lower(), names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    groups = dict.fromkeys(name.rpartition("/")[0] for name in names)
    modes = ", ".join(dict.fromkeys(f"/{name.rpartition('/')[2]}" for name in names))
    return f"unknown row {text!r} of table {table.name}: {hint}known are {', '.join(groups)}, each with {modes}"


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(name.lower(), names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown {kind} {name!r}: {hint}known are {', '.join(names)}"


@cache
def _data() -> dict[str, Any]:
    return json.loads(DATA.read_text(encoding="utf-8"))
