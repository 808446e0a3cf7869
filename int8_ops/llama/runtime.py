"""What makes a converted model use its own cache: in a plain forward pass and in ``generate()``."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

from .._cache_names import NEW, OLD, cache_argument, cache_position
from .attention import check_cache
from .cache import LatentCache, StaticLatentCache

__all__ = ["install"]

DYNAMIC = (None, "dynamic", "dynamic_full")
STATIC = ("static",)
OFFLOADED = {"offloaded": False, "offloaded_static": True}


def install(model: Any) -> None:
    """Hook the cache into a model whose attention is converted; once."""
    if "_prepare_cache_for_generation" in vars(model):
        return
    base = type(model.model)
    # Looked up here: the hook runs at every step, compiled ones included.
    hook = functools.partial(_before_forward, cache_argument(base), cache_position(base))
    model.model.register_forward_pre_hook(hook, with_kwargs=True)
    # Instance attributes, so that the class, which other models share, is left as it is.
    model._prepare_cache_for_generation = functools.partial(_prepare_cache, model)


def _before_forward(
    name: str, position: int, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Make a cache where one is wanted and none is given; refuse another kind.

    ``name`` and ``position`` are those of the cache among the arguments. A model that takes the new
    name still takes the old one.
    """
    if name == OLD and kwargs.get(NEW) is not None:
        raise TypeError(
            f"{type(base).__name__}: expected the cache as {OLD}, as this version of transformers "
            f"calls it, got it as {NEW}"
        )
    given = args[position] if len(args) > position else kwargs.get(name, kwargs.get(OLD))
    if given is not None:
        check_cache(given)
        return None
    wanted = kwargs.get("use_cache")
    wanted = base.config.use_cache if wanted is None else wanted
    if not wanted or _drops_cache(name, base):
        return None
    cache = LatentCache(base)
    if len(args) > position:
        return (*args[:position], cache, *args[position + 1 :]), kwargs
    # A None under the other name would be warned of as a second cache.
    others = {key: value for key, value in kwargs.items() if key != OLD or value is not None}
    return args, {**others, name: cache}


def _drops_cache(name: str, base: Any) -> bool:
    """Whether the model goes without a cache because its layers run again for gradients."""
    if not base.training or not getattr(base, "gradient_checkpointing", False):
        return False
    # The release that renamed the argument also keeps the cache where there is no gradient.
    return name == OLD or torch.is_grad_enabled()


def _prepare_cache(
    model: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """``generate()``'s own method, except that the cache it makes is ours.

    Raises:
        TypeError: a cache passed to ``generate()`` is not one of ours.
        ValueError: ``cache_implementation`` names one that has no integer counterpart.
    """
    original = type(model)._prepare_cache_for_generation
    name = cache_argument(type(model))
    given = model_kwargs.get(name)
    if given is not None:
        check_cache(given)
    wanted = generation_config.cache_implementation
    if given is not None or generation_config.use_cache is False:
        return original(model, generation_config, model_kwargs, *args, **kwargs)
    offloaded = wanted in OFFLOADED
    if wanted in STATIC or OFFLOADED.get(wanted, False):
        bound = inspect.signature(original).bind(
            model, generation_config, model_kwargs, *args, **kwargs
        )
        length = int(bound.arguments["max_cache_length"])
        length = max(length, getattr(generation_config, "max_cache_len", None) or 0)
        cache: LatentCache = StaticLatentCache(model, length, offloading=offloaded)
    elif wanted in DYNAMIC or offloaded:
        cache = LatentCache(model, offloading=offloaded)
    else:
        raise ValueError(
            f"generate: cache_implementation={wanted!r} has no counterpart for a model whose cache "
            "holds integer latents: expected None, 'dynamic', 'static', 'offloaded' or "
            "'offloaded_static'"
        )
    model_kwargs[name] = cache
    return None
