"""What transformers' models call their KV cache: ``cache`` since 5.24, ``past_key_values`` before.

Read off the model and its output, never off a version: the only place that knows the names. Nothing
here imports transformers.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

__all__ = ["NEW", "OLD", "cache_argument", "cache_of", "cache_position", "passed"]

NEW = "cache"
OLD = "past_key_values"


def cache_argument(model: type[nn.Module]) -> str:
    """The name by which ``forward`` of this class takes its cache.

    Raises TypeError, naming the class, where it takes none.
    """
    names = inspect.signature(model.forward).parameters
    for name in (NEW, OLD):  # where both are there, the old one is on its way out
        if name in names:
            return name
    raise TypeError(
        f"expected a model whose forward takes {NEW} or {OLD}, got {model.__name__}, which takes "
        f"{', '.join(names)}"
    )


def cache_position(model: type[nn.Module]) -> int:
    """Where the cache stands among the positional arguments of a call, ``self`` not counted."""
    return list(inspect.signature(model.forward).parameters).index(cache_argument(model)) - 1


def passed(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The keyword argument that hands ``cache`` to ``model``; none for None.

    A wrapper is asked for what it wraps: ``torch.compile``'s, and adapters' ``get_base_model()``.
    """
    if cache is None:
        return {}
    inner: Any = getattr(model, "_orig_mod", model)
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    return {cache_argument(type(inner)): cache}


def cache_of(output: Any) -> Any:
    """The cache in what a model or ``generate()`` returned, or None.

    Raises AttributeError where the output has no such field.
    """
    # Asked of the class: 5.24 answers to the old name too, with a warning.
    return getattr(output, NEW if hasattr(type(output), NEW) else OLD)
