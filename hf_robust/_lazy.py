"""Import hooks that register our architectures and classes the moment timm or transformers is imported.

``import hf_robust`` must stay cheap, and still ``AutoModel.from_pretrained`` has to know our encoders afterwards. A
finder at the front of ``sys.meta_path`` therefore wraps the loaders of timm and transformers; when what we need has
run, our own modules are imported, and they register themselves. Then the finder goes away. It finds nothing by itself,
so whatever finds timm (editable installs, zip files) keeps working, and errors of the wrapped import pass untouched.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
import threading
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["install_import_hooks"]

_TIMM = "timm"
_AUTO = "transformers.models.auto.configuration_auto"

# What has to be there -> what is imported then. Importing these registers them with timm and the Auto classes.
_REGISTRATIONS: dict[str, tuple[str, ...]] = {
    _TIMM: ("hf_robust.models.backbones",),
    _AUTO: ("hf_robust.models.encoder", "hf_robust.models.modeling"),
}
_done: set[str] = set()


class _Imports(threading.local):
    """Imports of the current thread: how many transformers modules are half-way, and whether we are registering."""

    depth = 0
    registering = False


_imports = _Imports()


class _NotifyingLoader(importlib.abc.Loader):
    """Loads through another loader and then calls the registrations.

    At module level and without closures: specs are pickled and copied by others.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module as its own loader would, then register what waits for it."""
        # From here on the module looks as if nobody had been in between (reload, inspect, importlib.resources).
        module.__loader__ = self.inner
        if module.__spec__ is not None:
            module.__spec__.loader = self.inner
        _imports.depth += 1
        try:
            self.inner.exec_module(module)
        finally:
            _imports.depth -= 1
        _register_ready(module.__name__)

    def __getattr__(self, name: str) -> Any:
        # get_source, get_filename, is_package ... of the real loader; nothing private, pickle and copy ask for that.
        if name.startswith("_") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


class _Finder(importlib.abc.MetaPathFinder):
    """Wraps the loaders of timm and transformers; has no state, so probing with `find_spec` changes nothing."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the module as the other finders do and put our loader around its own; `None` for all other modules."""
        if name != _TIMM and name.partition(".")[0] != "transformers":
            return None
        for finder in list(sys.meta_path):
            if _is_ours(finder) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module") and not isinstance(spec.loader, _NotifyingLoader):
                    spec.loader = _NotifyingLoader(spec.loader)
                return spec
        return None


def _is_ours(finder: object) -> bool:
    # By name: after a reload of this module the class is another object.
    return type(finder).__name__ == _Finder.__name__ and type(finder).__module__ == __name__


def _imported(name: str, just_executed: str) -> bool:
    module = sys.modules.get(name)
    half_way = getattr(getattr(module, "__spec__", None), "_initializing", False) and name != just_executed
    return module is not None and not half_way


def _register_ready(just_executed: str = "") -> None:
    if _imports.registering:
        return
    before = len(_done)
    for needed, ours in _REGISTRATIONS.items():
        # Our model files import much of transformers. While any of it is half-way (modeling_utils imports the Auto
        # configuration, say) that would be circular, so they wait for the end of the outermost transformers import.
        if needed in _done or not _imported(needed, just_executed) or (needed != _TIMM and _imports.depth):
            continue
        _imports.registering = True
        try:
            for name in ours:
                importlib.import_module(name)
        finally:
            _imports.registering = False
        _done.add(needed)
    if len(_done) > before:
        _register_ready(just_executed)  # registering with one may have imported the other
    if len(_done) == len(_REGISTRATIONS):
        sys.meta_path[:] = [finder for finder in sys.meta_path if not _is_ours(finder)]


def install_import_hooks() -> None:
    """Registers with timm and transformers now if they are imported already, else as soon as they are.

    May be called any number of times.
    """
    if len(_done) < len(_REGISTRATIONS) and not any(_is_ours(finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    _register_ready()
