"""Tells transformers how to load converted models, without importing it.

``AutoModelForCausalLM.from_pretrained`` looks the method up in a registry of its process. Where
transformers has been imported before this package, that is done at once; otherwise when it is, by
a finder that waits for the registry's module: importing transformers takes seconds, and most users
of this package have no use for it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"


class _Loader(importlib.abc.Loader):
    """The registry's own loader, and a registration after it."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()


class _Finder(importlib.abc.MetaPathFinder):
    """Waits for one module."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != REGISTRY:
            return None
        sys.meta_path.remove(self)  # the search below must not come here again
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def _register() -> None:
    """A version of transformers that lacks what it takes is told of when it is used."""
    registry = sys.modules[REGISTRY]
    if hasattr(registry, "register_quantizer"):
        importlib.import_module("int8_ops.llama.checkpoint")


def watch() -> None:
    """Register now or when transformers is imported; once a process."""
    module = sys.modules.get(REGISTRY)
    if module is not None and hasattr(module, "AutoHfQuantizer"):
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
