"""Loads the compiled modules; a failure is kept and raised, with its reason, at first use.

Importing the modules registers the ops. Nothing here initialises CUDA.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class Extension:
    """One compiled module of the package: the module, or the reason it is not there."""

    def __init__(self, name: str) -> None:
        """Try to import ``int8_ops.<name>``."""
        self.name = name
        self.module: ModuleType | None = None
        self.error: str | None = None
        try:
            self.module = importlib.import_module(f"int8_ops.{name}")
        except ImportError as error:
            self.error = f"{type(error).__name__}: {error}"

    def require(self) -> ModuleType:
        """The module. Raises RuntimeError with the reason it failed to load."""
        if self.module is None:
            raise RuntimeError(
                f"int8_ops.{self.name} could not be loaded: {self.error}. "
                "Rebuild with `pip install --no-build-isolation .` in the source tree."
            )
        return self.module


build_info = Extension("_build")
core = Extension("_C")
cuda = Extension("_C_cuda")
