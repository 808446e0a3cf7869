"""``quantize_``: swap the linear layers of a model for int8 ones, in place, by name."""

from __future__ import annotations

import fnmatch
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from .. import backends
from .alrd import ALRDLinearINT8
from .linear import INT8Linear

__all__ = ["quantize_"]

FilterFn = Callable[[nn.Module, str], bool]
Pattern = str | re.Pattern[str] | FilterFn

# The output head decides between tokens whose logits are close, and gains little from int8.
HEAD = "lm_head"
SAMPLE = 8


def quantize_(
    model: nn.Module,
    pattern_or_filter: Pattern,
    *,
    backend: str = "auto",
    exclude: Pattern | Sequence[Pattern] | None = None,
    rank: int | None = None,
    progress: bool = True,
) -> list[str]:
    """Replace the matching ``nn.Linear`` modules of ``model`` by int8 ones, in place.

    >>> quantize_(model, "*.v_proj")                        # INT8Linear
    >>> quantize_(model, re.compile(r"[kv]_proj$"))
    >>> quantize_(model, "*.v_proj", rank=128)              # ALRDLinearINT8, by SVD

    Every replacement is made before the first one is put in: an error leaves the model untouched.
    A module that appears under several names is converted once and replaced at all of them. Only
    ``nn.Linear`` itself is converted, not its subclasses (their owners use the weight in ways of
    their own); hooks stay with the replaced module.

    Args:
        model: the model; its modules on meta are converted too, to shapes without values.
        pattern_or_filter: a glob over the full dotted name (``*`` crosses dots), a compiled regular
            expression (searched for in the name), or ``filter_fn(module, name) -> bool``.
        backend: of the new modules, see ``int8_ops.backends``.
        exclude: one or more of the same, to be left alone. By default ``lm_head`` is, unless the
            glob or the expression has that word in it; ``exclude=()`` leaves nothing alone.
        rank: None for ``INT8Linear``; otherwise ``ALRDLinearINT8.from_linear(linear, rank)``, which
            keeps its float ALinear until ``prepare_all_int8_weights(model, keep_float=False)``.
        progress: show a bar on stderr, where that is a terminal and tqdm is installed.

    Returns:
        The names replaced, in the model's order.

    Raises:
        ValueError: nothing matched (with the pattern and names that are there), the model itself is
            the match, a rank out of range, or an unknown backend.
        TypeError: a pattern that is none of the above.
        RuntimeError: a weight that int8 cannot hold (its dtype, or K over the limit).
    """
    backends.check_name(backend)
    sites = _sites(model)
    chosen = _choose(sites, pattern_or_filter, _exclusion(pattern_or_filter, exclude))
    if not chosen:
        raise ValueError(_nothing_matched(pattern_or_filter, sites))
    if any(name == "" for linear in chosen for name in sites[linear]):
        raise ValueError(
            "quantize_: the model itself is the nn.Linear that matched, and cannot be replaced in "
            "place; use INT8Linear.from_linear(model)"
        )
    replacements: dict[nn.Linear, nn.Module] = {}
    for linear in _with_bar(chosen, progress):
        replacements[linear] = (
            INT8Linear.from_linear(linear, backend)
            if rank is None
            else ALRDLinearINT8.from_linear(linear, rank, backend)
        )
    return _replace(model, replacements)


def _sites(model: nn.Module) -> dict[nn.Linear, list[str]]:
    """Each nn.Linear with all its names, in the model's order."""
    sites: dict[nn.Linear, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is nn.Linear:
            sites.setdefault(module, []).append(name)
    return sites


def _matcher(pattern: Pattern) -> FilterFn:
    if isinstance(pattern, str):
        return lambda module, name: fnmatch.fnmatchcase(name, pattern)
    if isinstance(pattern, re.Pattern):
        return lambda module, name: pattern.search(name) is not None
    if callable(pattern):
        return pattern
    raise TypeError(
        "quantize_: expected a glob, a compiled regular expression or filter_fn(module, name), "
        f"got {type(pattern).__name__}"
    )


def _exclusion(pattern: Pattern, exclude: Pattern | Sequence[Pattern] | None) -> FilterFn:
    if exclude is None:
        text = pattern if isinstance(pattern, str) else getattr(pattern, "pattern", "")
        patterns: Iterable[Pattern] = () if HEAD in text else (HEAD, f"*.{HEAD}")
    elif isinstance(exclude, Sequence) and not isinstance(exclude, str):
        patterns = exclude
    else:
        patterns = (exclude,)
    matchers = [_matcher(item) for item in patterns]
    return lambda module, name: any(matches(module, name) for matches in matchers)


def _choose(
    sites: dict[nn.Linear, list[str]], pattern: Pattern, excluded: FilterFn
) -> list[nn.Linear]:
    matches = _matcher(pattern)
    return [
        linear
        for linear, names in sites.items()
        if any(matches(linear, name) for name in names)
        and not any(excluded(linear, name) for name in names)
    ]


def _nothing_matched(pattern: Pattern, sites: dict[nn.Linear, list[str]]) -> str:
    names = [name for found in sites.values() for name in found]
    told = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
    if not names:
        return f"quantize_: {told!r} matched nothing: the model has no nn.Linear"
    sample = ", ".join(names[:SAMPLE]) + (", ..." if len(names) > SAMPLE else "")
    return (
        f"quantize_: {told!r} matched none of the model's {len(names)} nn.Linear modules that may "
        f"be converted ({HEAD} only if named); there are: {sample}"
    )


def _with_bar(linears: list[nn.Linear], progress: bool) -> Iterator[nn.Linear]:
    if not progress or not sys.stderr.isatty():
        return iter(linears)
    try:
        from tqdm import tqdm
    except ImportError:
        return iter(linears)
    bar: Any = tqdm(linears, desc="quantize", unit="layer")
    return iter(bar)


def _replace(model: nn.Module, replacements: dict[nn.Linear, nn.Module]) -> list[str]:
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, name, replacements[child])
    new = set(replacements.values())
    named = model.named_modules(remove_duplicate=False)
    return [name for name, module in named if module in new]
