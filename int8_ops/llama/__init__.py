"""Llama-family models with a KV cache of integer latents. Needs transformers 4.56 or newer.

>>> import int8_ops
>>> report = int8_ops.llama.convert(model, [text], tokenizer=tokenizer)
>>> print(report)
>>> model.generate(**prompt)  # its cache holds integers
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention import LatentAttention
    from .cache import LatentCache, StaticLatentCache
    from .config import LatentConfig
    from .conversion import convert
    from .evaluate import score
    from .report import ConversionReport

# Imported when first used: transformers takes seconds to import.
_HOMES = {
    "ConversionReport": "report",
    "LatentAttention": "attention",
    "LatentCache": "cache",
    "LatentConfig": "config",
    "StaticLatentCache": "cache",
    "convert": "conversion",
    "score": "evaluate",
}

__all__ = [
    "ConversionReport",
    "LatentAttention",
    "LatentCache",
    "LatentConfig",
    "StaticLatentCache",
    "convert",
    "score",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "transformers":
            raise
        raise ImportError(
            f"int8_ops.llama.{name} needs transformers 4.56 or newer, which is not installed: "
            'pip install --no-build-isolation ".[llama]" in the source tree'
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
