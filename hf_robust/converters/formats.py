"""The formats on disk, found by their files; which one a state dictionary is of."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from pathlib import Path

from .base import Converter, Tensors, some

__all__ = ["format_names", "load_converter", "recognise"]


def format_names() -> list[str]:
    """Names that `--format` takes, other than `auto`.

    Returns:
        `list[str]`: Sorted; formats of several methods appear under each method's name.
    """
    return sorted(name for kind in _kinds() for name in kind.names)


def load_converter(name: str) -> Converter:
    """The converter of a format.

    Args:
        name (`str`): One of [`format_names`], in any case.

    Returns:
        [`Converter`]: Ready to be asked.

    Raises:
        ValueError: For an unknown name; the message lists the known ones.
    """
    for kind in _kinds():
        if name.lower().replace("_", "-") in kind.names:
            return kind()
    known = format_names()
    close = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"unknown format {name!r}: {hint}known are auto, {', '.join(known)}")


def recognise(tensors: Tensors) -> tuple[Converter, str]:
    """The one format whose keys these are.

    Args:
        tensors (`dict[str, torch.Tensor]`): State dictionary as it lies in the file.

    Returns:
        `tuple[Converter, str]`: The converter and why it was chosen.

    Raises:
        ValueError: When none or several recognise the keys; the message shows some of them.
    """
    found = [(converter, why) for converter in (kind() for kind in _kinds()) if (why := converter.recognise(tensors))]
    if len(found) == 1:
        return found[0]
    if found:
        listed = "; ".join(f"{converter.names[0]} ({why})" for converter, why in found)
        raise ValueError(f"the keys fit several formats: {listed}; name one of them as format")
    raise ValueError(
        f"no format knows these {len(tensors)} keys ({some(list(tensors))}): known are {', '.join(format_names())}; "
        "check that the file is the one you mean, or write a converter, one file in hf_robust/converters"
    )


def _kinds() -> list[type[Converter]]:
    folder = Path(__file__).parent
    package = __name__.rpartition(".")[0]
    modules = (importlib.import_module(f"{package}.{m.name}") for m in pkgutil.iter_modules([str(folder)]))
    return [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Converter)
        and value is not Converter
        and value.__module__ == module.__name__
    ]
