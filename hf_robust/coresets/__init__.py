"""Coresets: train on a part of the images, chosen again and again as training goes; one file per method."""

from __future__ import annotations

import difflib
import importlib
import pkgutil

from .base import ChosenCoreset, Coreset, CoresetMethod, Selection, SelectionTask
from .file import StoredCoreset
from .full import FullData
from .random import RandomCoreset
from .rcs import RCS

__all__ = [
    "RCS",
    "ChosenCoreset",
    "Coreset",
    "CoresetMethod",
    "FullData",
    "RandomCoreset",
    "Selection",
    "SelectionTask",
    "StoredCoreset",
    "coreset_names",
    "load_coreset_method",
]


def coreset_names() -> list[str]:
    """List the coreset methods on disk: the files of this folder that hold one.

    Returns:
        `list[str]`: sorted names that `load_coreset_method` takes.
    """
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if _methods(m.name))


def load_coreset_method(name: str) -> type[CoresetMethod]:
    """Find a coreset method by its file name.

    Args:
        name (`str`): such as `"rcs"`, `"random"`, `"full"`, in any case.

    Returns:
        `type[CoresetMethod]`: the dataclass; its fields are the flags `--coreset_...`.

    Raises:
        ValueError: for a name without a file.
    """
    known = coreset_names()
    if name.lower() not in known:
        close = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown coreset method {name!r}: {hint}known are {', '.join(known)}")
    (found,) = _methods(name.lower())
    return found


def _methods(name: str) -> list[type[CoresetMethod]]:
    module = importlib.import_module(f"{__name__}.{name}")
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, CoresetMethod)
        and value not in (CoresetMethod, ChosenCoreset)
        and value.__module__ == module.__name__
    ]
