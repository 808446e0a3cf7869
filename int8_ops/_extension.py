"""Loads the compiled modules; a failure is kept and raised, with its reason, at first use.

Importing the modules registers the ops. Nothing here initialises CUDA.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, NoReturn

import torch

REBUILD = "Rebuild with `pip install --no-build-isolation .` in the source tree."
OP_NAMES = (
    "quantize_per_token",
    "quantize_per_channel",
    "dequantize",
    "int8_mm",
    "int8_scaled_mm",
    "int8_linear",
    "latent_attention_decode",
    "latent_append",
)


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

    def unavailable_reason(self) -> str | None:
        """None when loaded; otherwise why not."""
        if self.module is not None:
            return None
        return f"int8_ops.{self.name} could not be loaded: {self.error}. {REBUILD}"

    def require(self) -> ModuleType:
        """The module. Raises RuntimeError with the reason it failed to load."""
        if self.module is None:
            raise RuntimeError(self.unavailable_reason())
        return self.module


build_info = Extension("_build")
core = Extension("_C")
cuda = Extension("_C_cuda")


def covers(device_type: str) -> bool:
    """Whether this library's compiled ops run on tensors of that device type."""
    if device_type == "cuda":
        return core.module is not None and cuda.module is not None
    return device_type == "cpu" and core.module is not None


def unavailable_reason(device_type: str) -> str | None:
    """Why the compiled ops do not run on that device type; None when they do."""
    if device_type not in ("cpu", "cuda"):
        return f"this library has no kernels for {device_type} tensors"
    reason = core.unavailable_reason()
    if reason is None and device_type == "cuda" and cuda.module is None:
        skipped = build_info.module.info()["cuda_skipped"] if build_info.module else ""
        if skipped:
            return f"int8_ops was built without CUDA kernels: {skipped}. {REBUILD}"
        reason = cuda.unavailable_reason()
    return reason


def register_missing_cuda() -> torch.library.Library:
    """Make the ops tell why they have no CUDA kernels, instead of the dispatcher's table."""
    lib = torch.library.Library("int8_ops", "IMPL")

    def refuse(*args: Any) -> NoReturn:
        raise RuntimeError(unavailable_reason("cuda"))

    for name in OP_NAMES if cuda.module is None else ():
        lib.impl(name, refuse, "CUDA")
    return lib
