"""The public leaderboard of robust self-supervised learning as a table, to print the published row beside ours."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

__all__ = [
    "LeaderboardRow",
    "closest_method",
    "closest_row",
    "leaderboard_dataset",
    "leaderboard_methods",
    "leaderboard_rows",
    "leaderboard_sources",
]

TABLE = Path(__file__).with_name("leaderboard.json")
MODES = ("slf", "alf", "aff")
FINE_TUNINGS = ("vanilla", "autolora")
# What the site calls robust accuracy is AutoAttack's at the budget of the benchmark.
AUTOATTACK = "autoattack_linf_8_255_accuracy"
_SIMILAR = 0.85  # a slip of the pen; "ACL-AIR" and "DynACL-AIR" are 0.8 alike and different methods
_LONG = 8  # letters; in shorter names one letter makes another method: "FACL" is not ACL, "AdvACL" not AdvCL
_FORMATS = ("jpeg", "jpg", "png", "parquet", "images", "32")  # how a folder may be called, beside its data set


@dataclass(frozen=True)
class LeaderboardRow:
    """Published accuracies of one method: its encoder, pre-trained on one data set, fine-tuned on another.

    Args:
        method (`str`): pre-training method as the leaderboard spells it, such as `"DynACL-AIR++"`.
        mode (`str`): fine-tuning, `"slf"`, `"alf"` or `"aff"`.
        source (`str`): data set of the pre-training, labels unused.
        target (`str`): data set of the fine-tuning and of the figures.
        fine_tuning (`str`): `"vanilla"` or `"autolora"`.
        image_size (`int`): side of the images, pixels.
        metrics (`Mapping[str, float]`): accuracies in [0, 1] under the names of our reports: `accuracy`,
            `autoattack_linf_8_255_accuracy` and, where there is one, `cifar10c_mean_accuracy` or
            `cifar100c_mean_accuracy`. What was not measured, and what the page only repeats, is missing.
        origin (`str`): a key of [`leaderboard_sources`].
        note (`str`): what a reader must know before comparing; mostly empty.
    """

    method: str
    mode: str
    source: str
    target: str
    fine_tuning: str
    image_size: int
    metrics: Mapping[str, float]
    origin: str
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Give the row as plain Python, with the title of its origin, ready for a report."""
        title = leaderboard_sources()[self.origin]["title"]
        return {**vars(self), "metrics": dict(self.metrics), "origin_title": title}


def leaderboard_rows(
    method: str | None = None,
    source: str = "cifar10",
    target: str = "cifar10",
    *,
    mode: str | None = None,
    fine_tuning: str = "vanilla",
) -> list[LeaderboardRow]:
    """Look up published results: standard AutoAttack on the whole test set at 8/255, ResNet-18.

    Cells that the page fills with a copy of another cell are left out, and so are the AutoLoRa columns of the boards
    whose source is their target, which the page hides.

    Args:
        method (`str`, *optional*): one method, in any spelling that [`closest_method`] reads; default: all of them.
        source (`str`, defaults to `"cifar10"`): data set of the pre-training.
        target (`str`, defaults to `"cifar10"`): data set of the fine-tuning.
        mode (`str`, *optional*): `"slf"`, `"alf"` or `"aff"`; default: all three.
        fine_tuning (`str`, defaults to `"vanilla"`): or `"autolora"`.

    Returns:
        `list[LeaderboardRow]`: by mode, and in each as on the page: by the AutoAttack accuracy of the vanilla SLF
            column, rows of the talk after those of the page. A known method without a row on this board gives an
            empty list.

    Raises:
        ValueError: for an unknown method, mode or fine-tuning, or a pair of data sets without a board.

    Source: `leaderboard/*.js` of RobustSSL/RobustSSL.github.io@7a45d66; for pairs and methods that the site does not
        have, table 3 of the talk "Towards Robust Foundation Models".
    """
    wanted = None if method is None else closest_method(method)
    if method is not None and wanted is None:
        _unknown("method", method, leaderboard_methods())
    if mode is not None and mode.lower() not in MODES:
        _unknown("mode", mode, MODES)
    if fine_tuning not in FINE_TUNINGS:
        _unknown("fine_tuning", fine_tuning, FINE_TUNINGS)
    pair = (leaderboard_dataset(source), leaderboard_dataset(target))
    rows = [row for row in _all_rows() if (row.source, row.target) == pair and row.fine_tuning == fine_tuning]
    if not rows:
        known = sorted({f"{row.source}->{row.target}" for row in _all_rows() if row.fine_tuning == fine_tuning})
        raise ValueError(
            f"the leaderboard has no {fine_tuning} results from {source!r} to {target!r}: known are {', '.join(known)}"
        )
    modes = MODES if mode is None else (mode.lower(),)
    return [row for m in modes for row in rows if row.mode == m and wanted in (None, row.method)]


def closest_row(
    method: str, mode: str, source: str = "cifar10", target: str = "cifar10", fine_tuning: str = "vanilla"
) -> LeaderboardRow | None:
    """Find the published row to print beside a result of ours.

    Args:
        method (`str`): as [`closest_method`].
        mode (`str`): `"slf"`, `"alf"` or `"aff"`, in any case.
        source, target (`str`): data sets of pre-training and fine-tuning, as the user named them.
        fine_tuning (`str`, defaults to `"vanilla"`): or `"autolora"`.

    Returns:
        [`LeaderboardRow`] or `None`: the row of the same method, mode and data sets. Nothing comes back rather than
            the row of a method, mode or data set that merely resembles ours.
    """
    wanted, pair = closest_method(method), (leaderboard_dataset(source), leaderboard_dataset(target))
    for row in _all_rows():
        if (row.method, row.mode, row.fine_tuning) == (wanted, mode.lower(), fine_tuning):
            if (row.source, row.target) == pair:
                return row
    return None


def closest_method(name: str) -> str | None:
    """Read a method's name as the leaderboard spells it.

    Case, hyphens, underscores and the order of the parts do not matter (`"air_dynacl"`, `"A-INFONCE"`), and a slip of
    the pen in a long name is read past. `"++"` stands for post-processing and is never added or dropped.

    Args:
        name (`str`): such as the `objective` of a report, with its coreset: `"DynACL-RCS"`.

    Returns:
        `str` or `None`: one of [`leaderboard_methods`]; `None` for a method that the leaderboard does not have.
    """
    known = {_plain(method): method for method in leaderboard_methods()}
    plain = _plain(name)
    for parts in (plain, *_orders(name)):
        if parts in known:
            return known[parts]
    # Names are put together from parts: a slip of the pen is one letter, what is longer or shorter has another part.
    alike = [word for word in known if abs(len(word) - len(plain)) <= 1 and len(plain) >= _LONG]
    close = difflib.get_close_matches(plain, alike, n=1, cutoff=_SIMILAR)
    return known[close[0]] if close else None


def leaderboard_dataset(name: str) -> str:
    """Read a data set's name, Hub id or folder as the leaderboard spells it.

    Args:
        name (`str`): such as `"uoft-cs/cifar10"`, `"CIFAR-10"` or `"data/cifar10-jpeg"`.

    Returns:
        `str`: `"cifar10"`, `"cifar100"` or `"stl10"`; any other name comes back as it is. Other versions of a data
            set, such as `"cifar10-c"`, are other data sets.
    """
    last = name.rstrip("/\\").replace("\\", "/").rpartition("/")[2].lower()
    parts = [part for part in re.split(r"[^a-z0-9]+", last) if part]
    while len(parts) > 1 and parts[-1] in _FORMATS:
        parts.pop()
    plain = "".join(parts)
    return plain if plain in {row.target for row in _all_rows()} else name


def leaderboard_methods() -> list[str]:
    """List the methods of the leaderboard, as it spells them.

    Returns:
        `list[str]`: in the order of the CIFAR-10 board, methods that only the talk has at the end.
    """
    return list(dict.fromkeys(row.method for row in _all_rows()))


def leaderboard_sources() -> dict[str, dict[str, str]]:
    """Say where the figures stand.

    Returns:
        `dict[str, dict[str, str]]`: origins (`"website"`, `"talk"`) to `title`, `source`, `date` and, where there is
            one, `url`.
    """
    return {name: dict(values) for name, values in _table()["origins"].items()}


@lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def _all_rows() -> tuple[LeaderboardRow, ...]:
    return tuple(
        LeaderboardRow(
            method=entry["method"],
            mode=mode,
            metrics=_metrics(board, entry[mode]),
            note=" ".join(text for text in (entry.get("note"), entry.get(f"note_{mode}")) if text),
            **{key: board[key] for key in ("source", "target", "fine_tuning", "image_size", "origin")},
        )
        for board in _table()["boards"]
        for entry in board["rows"]
        for mode in MODES
        if mode in entry
    )


def _metrics(board: Mapping[str, Any], cells: Iterable[float | None]) -> Mapping[str, float]:
    names = {"autoattack": AUTOATTACK, "corruptions": f"{board['target']}c_mean_accuracy", "standard": "accuracy"}
    values = zip(board["columns"], cells, strict=True)
    found = {names[column]: round(percent / 100, 4) for column, percent in values if percent is not None}
    return MappingProxyType({name: found[name] for name in ("accuracy", *found) if name in found})


def _plain(name: str) -> str:
    """Letters and digits in lower case, and the mark of post-processing at the end."""
    return re.sub(r"[^a-z0-9]", "", name.lower()) + ("++" if "++" in name else "")


def _orders(name: str) -> list[str]:
    """The same name with its parts in the other order."""
    parts = [part for part in re.split(r"[^a-z0-9]+", name.lower()) if part]
    return ["".join(reversed(parts)) + ("++" if "++" in name else "")] if len(parts) > 1 else []


def _unknown(kind: str, name: str, known: Iterable[str]) -> NoReturn:
    names = list(known)
    plain = {_plain(word): word for word in names}
    close = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=0.5)
    hint = f"did you mean {plain[close[0]]!r}? " if close else ""
    raise ValueError(f"the leaderboard has no {kind} {name!r}: {hint}known are {', '.join(names)}")
