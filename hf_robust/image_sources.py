"""Which table, columns and labels a data set's name stands for, and what to say when it stands for none."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

MOST_CLASSES = 100_000
_LABELS = ("label", "labels", "cls")  # names of a column of plain numbers or texts; "cls" is WebDataset's


class MissingSplitError(ValueError):
    """The data set is there, the split is not."""


def open_split(name: Any, split: str) -> datasets.Dataset:
    """Return the table behind a name; every way to miss it is an error that says what there is."""
    import datasets
    from huggingface_hub.errors import HFValidationError

    if isinstance(name, datasets.Dataset | datasets.DatasetDict):
        return _one_split(name, "the given data set", split)
    if isinstance(name, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise ValueError(
            f"a data set must give out its images in any order, got {type(name).__name__}, which only runs through "
            "them: coresets and a resumed run ask for single images; leave streaming=True out (the images stay on the "
            "disk, mapped into memory), or write what is needed of it with Dataset.from_generator"
        )
    if not isinstance(name, str | os.PathLike):
        raise ValueError(
            f"a data set must be a Hub id, a folder, 'digits' or a datasets.Dataset, got {type(name).__name__}: "
            "for tensors use ImageDataset.from_tensors"
        )
    text, config = os.path.expanduser(os.fspath(name)), None
    if not os.path.exists(text) and ":" in text:
        text, config = text.rsplit(":", 1)
    folder = Path(text)
    if folder.is_file():
        raise ValueError(f"{text!r} is a file, a data set is a folder: pass {str(folder.parent)!r}, which holds it")
    if any((folder / mark).is_file() for mark in ("dataset_dict.json", "state.json")):
        return _one_split(datasets.load_from_disk(text), text, split)
    if not folder.exists() and (folder.is_absolute() or text.startswith(".") or text.count("/") > 1):
        _unknown_source(text, "it looks like a path")
    try:
        return datasets.load_dataset(text, config, split=split)
    except (FileNotFoundError, ConnectionError) as error:
        if folder.is_dir():
            raise ValueError(
                f"the folder {text!r} holds no data files: put parquet, arrow or image files in it ({error})"
            ) from error
        _unknown_source(text, str(error).rstrip("."), error)
    except HFValidationError as error:
        _unknown_source(text, "not a valid Hub id", error)
    except ValueError as error:
        reason = " ".join(str(error).split())
        if reason.startswith("Unknown split"):
            unknown_split(text, split, datasets.get_dataset_split_names(text, config), error)
        if "corresponds to no data" in reason:
            raise ValueError(f"{text!r} split {split!r} is empty: name another split or add images") from error
        if "Config name" in reason or "BuilderConfig" in reason:
            raise ValueError(
                f"{text!r} has several configurations, got {config!r}: write '{text}:CONFIG' ({reason})"
            ) from error
        raise


def _one_split(source: datasets.Dataset | datasets.DatasetDict, name: str, split: str) -> datasets.Dataset:
    if isinstance(source, dict):
        if split not in source:
            unknown_split(name, split, list(source))
        return source[split]
    if split not in ("train", str(source.split)):
        # Handing out the only split for "test" would evaluate on training images without a word.
        raise MissingSplitError(
            f"{name} is a single Dataset, which has no split {split!r}: leave split out to take it as it is, or use a "
            "DatasetDict with named splits"
        )
    return source


def unknown_split(name: str, split: str, available: Sequence[str], error: Exception | None = None) -> NoReturn:
    """Raise the error for a split that does not exist, naming those that do."""
    if len(available) == 1:
        way_out = f"it has only one split, write split={available[0]!r}"
    else:
        way_out = f"available splits: {', '.join(available)}"
    raise MissingSplitError(f"{name!r} has no split {split!r}: {way_out}") from error


def _unknown_source(name: str, reason: str, error: Exception | None = None) -> NoReturn:
    import datasets

    hint = ""
    if datasets.config.HF_HUB_OFFLINE:
        hint = "; offline mode is on, so only folders and cached data sets are found: unset HF_HUB_OFFLINE and "
        hint += "HF_DATASETS_OFFLINE to reach the Hub"
    if difflib.get_close_matches(name.lower(), ["digits"]):
        hint += "; did you mean 'digits'?"
    raise FileNotFoundError(
        f"{name!r} is not a folder on this machine (looked for {os.path.abspath(name)}) and was not found on the Hub "
        f"({reason}): pass an existing folder, a Hub id like 'owner/name', or 'digits', which needs no download{hint}"
    ) from error


def find_image_column(features: Mapping[str, Any], requested: str | None, name: str) -> str:
    """Return the column of images: the one asked for (unset or empty: none), else the one that type or name tells."""
    import datasets

    if requested:
        kind = features[_existing(requested, features, "image_column", name)]
        if not (isinstance(kind, datasets.Image) or _is_struct(kind) or _dtype(kind) in ("string", "binary")):
            raise ValueError(
                f"image_column {requested!r} of {name!r} has type {kind}, images must be of type Image, encoded bytes "
                f"or file paths: cast it with dataset.cast_column({requested!r}, datasets.Image())"
            )
        return requested
    found = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
    found = found or [column for column, kind in features.items() if _is_struct(kind)]
    if not found:
        columns = ", ".join(f"{column} ({kind})" for column, kind in features.items())
        raise ValueError(
            f"{name!r} has no image column, its columns are {columns}: name the column that holds encoded images or "
            "file paths with image_column=..."
        )
    return _the_one(found, ("image", "img", "images"), "image_column", name)


def find_label_column(features: Mapping[str, Any], requested: str | None, name: str) -> str | None:
    """Return the column of labels by the same rules; `None` when there is none."""
    import datasets

    if requested:
        if requested == "none" and requested not in features:
            return None
        return _existing(requested, features, "label_column", name)
    found = [column for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    usual = [column for column in _LABELS if column in features]
    plain = [column for column in usual if _dtype(features[column]).startswith(("int", "uint", "string"))]
    if not found and not plain:
        return None
    return _the_one(found or plain, _LABELS, "label_column", name)


def _dtype(kind: Any) -> str:
    """Storage type of a plain column without the size prefix of arrow's large variants; "" for a nested one."""
    return str(getattr(kind, "dtype", "")).removeprefix("large_").removesuffix("_view")


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, Mapping) and set(kind) == {"bytes", "path"}


def _existing(requested: str, features: Mapping[str, Any], argument: str, name: str) -> str:
    if requested in features:
        return requested
    close = difflib.get_close_matches(requested, list(features), n=3)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "name one of these"
    raise ValueError(f"{name!r} has no {argument} {requested!r}, its columns are {', '.join(features)}: {hint}")


def _the_one(found: Sequence[str], preferred: Sequence[str], argument: str, name: str) -> str:
    for column in found if len(found) == 1 else preferred:
        if column in found:
            return column
    without = ', or label_column="none" to load no labels' if argument == "label_column" else ""
    raise ValueError(
        f"{name!r} has {len(found)} columns that could be the {argument}: {', '.join(found)}: choose one with "
        f"{argument}={found[0]!r}{without}"
    )


def read_labels(
    table: datasets.Dataset, column: str | None, name: str
) -> tuple[Tensor | None, tuple[str, ...] | None, int | None]:
    """Labels int64 (N,) or None, their names where known, and the number of classes."""
    if column is None:
        return None, None, None
    import pyarrow as pa

    kind = table.features[column]
    values = table.select_columns([column]).with_format("arrow")[:].column(column)
    names = getattr(kind, "names", None)
    if names is None and _dtype(kind) == "string":
        texts = [text or None for text in values.to_pylist()]
        names = sorted({text for text in texts if text is not None})
        number = {text: index for index, text in enumerate(names)}
        labels = np.array([-1 if text is None else number[text] for text in texts], dtype=np.int64)
    elif names is not None or _dtype(kind).startswith(("int", "uint", "bool")):
        labels = np.array(values.cast(pa.int64()).fill_null(-1).to_numpy(), dtype=np.int64)
    else:
        raise ValueError(
            f"label_column {column!r} of {name!r} has type {kind}, labels must be ClassLabel, integers or strings, "
            'one per image: cast the column, name another one, or write label_column="none"'
        )
    missing = np.flatnonzero(labels < 0)
    if len(missing) == len(labels):
        logger.info("%s: every label in column %r is missing, the set counts as unlabelled", name, column)
        return None, None, None
    if len(missing):
        raise ValueError(
            f"{len(missing)} of {len(labels)} labels in column {column!r} of {name!r} are missing (null, negative or "
            f"empty; the first in row {missing[0]}), a set is labelled wholly or not at all: drop these rows with "
            'datasets.Dataset.filter, or write label_column="none"'
        )
    limit = len(names) if names is not None else MOST_CLASSES
    if labels.max() >= limit:
        raise ValueError(
            f"column {column!r} of {name!r} holds the label {labels.max()}, class numbers must be below {limit}: "
            "number the classes from 0 (an identifier is no label)"
        )
    num_classes = len(names) if names is not None else int(labels.max()) + 1
    return torch.from_numpy(labels), None if names is None else tuple(names), num_classes
