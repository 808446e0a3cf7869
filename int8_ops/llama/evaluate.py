"""Perplexity as a user of the cache gets it: what came before is read from the cache."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._cache_names import cache_of, passed

__all__ = ["Score", "score"]


@dataclass(frozen=True)
class Score:
    """What ``score`` measured: summed negative log likelihood (nats) of ``predicted`` tokens."""

    nll: float
    predicted: int
    seconds: float

    @property
    def perplexity(self) -> float:
        """``exp(nll / predicted)``."""
        return math.exp(self.nll / self.predicted)


def feed(
    model: Any, window: Tensor, chunk: int, make_cache: Callable[[], Any] | None
) -> Iterator[tuple[int, Any]]:
    """The first position of each chunk of ``window [n]``, and what the model made of it.

    The cache goes on from chunk to chunk; ``make_cache`` makes it, or else the model.
    """
    cache = None if make_cache is None else make_cache()
    for start in range(0, len(window), chunk):
        piece = window[start : start + chunk]
        out = model(input_ids=piece[None], use_cache=True, **passed(model, cache))
        cache = cache_of(out)
        yield start, out


@torch.inference_mode()
def score(
    model: Any,
    windows: Iterable[Tensor],
    chunk: int = 128,
    make_cache: Callable[[], Any] | None = None,
) -> Score:
    """Perplexity of ``model`` on windows of tokens, through its cache.

    Each window is fed ``chunk`` tokens at a time with the cache on, so that all but a chunk's own
    tokens are attended to as the cache stores them.

    Args:
        model: a causal language model of transformers, converted or not.
        windows: token ids ``[n]`` each, n >= 2, on the model's device; they do not see each other.
        chunk: tokens a pass.
        make_cache: makes the cache of a window; by default the model makes it.

    Raises:
        ValueError: a chunk below 1, or no window.
    """
    if chunk < 1:
        raise ValueError(f"score: expected chunk >= 1, got {chunk}")
    total, predicted = 0.0, 0
    started = time.perf_counter()
    for window in windows:
        targets = window[1:]
        for start, out in feed(model, window, chunk, make_cache):
            wanted = targets[start : start + chunk]
            logits = out.logits[0, : len(wanted)].float()
            total += float(F.cross_entropy(logits, wanted, reduction="sum"))
            predicted += len(wanted)
    if predicted == 0:
        raise ValueError("score: expected at least one window of 2 tokens or more, got none")
    return Score(total, predicted, time.perf_counter() - started)
