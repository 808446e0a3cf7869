"""Ranks and bits for every stream, from one objective under one budget of bytes.

Every way to store a stream has a cost in nats a token (``calibrate.Costs``) and a size in bytes a
token. The sum of the costs is least, for the bytes it takes, where every stream stands at the same
price: cost + price * bytes (Lagrange; Shoham and Gersho, 1988). The price that meets the budget is
found by bisection, and what is left of the budget is spent where it buys most.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..quantizer import INT8Quantizer
from .calibrate import Costs, Key
from .packing import dequantize_int4, quantize_int4
from .spec import Slice, StreamSpec, stream_bytes

__all__ = ["Choice", "allocate", "choices_of"]

BISECTIONS = 80


@functools.cache
def noise_variance(bits: int, rank: int) -> float:
    """A quantizer's mean square error on rotated rows of ``rank``, relative to their mean square.

    Measured on Gaussian rows, which rotated latents resemble; 0 for 16 bits.
    """
    if bits == 16:
        return 0.0
    rows = torch.randn(2048, rank, generator=torch.Generator().manual_seed(rank))
    if bits == 8:
        rounded = INT8Quantizer.dequantize(*INT8Quantizer.quantize_per_token(rows))
    else:
        rounded = dequantize_int4(*quantize_int4(rows))
    return float((rounded - rows).square().mean())


@dataclass(frozen=True)
class Choice:
    """One way to store a stream.

    Attributes:
        spec: its slices.
        bytes: a token, over all groups.
        cost: predicted, nats a token.
    """

    spec: StreamSpec
    bytes: int
    cost: float


def cost_of(costs: Costs, spec: StreamSpec) -> float:
    """Predicted cost of storing a stream as ``spec``, nats a token."""
    cost, start = 0.0, 0
    for part in spec:
        variance = noise_variance(part.bits, part.rank)
        if variance:
            cost += costs.quantization(start, start + part.rank, variance)
        start += part.rank
    return cost + costs.truncation(start)


def choices_of(costs: Costs, bits: Sequence[int], groups: int) -> list[Choice]:
    """Every sensible way to store a stream, by rising bytes and falling cost.

    Args:
        costs: of the stream.
        bits: allowed, descending; two make up to two slices.
        groups: latents a token.
    """
    found = []
    grid = costs.grid
    for middle in grid if len(bits) > 1 else [0]:
        for end in grid:
            ranks = (middle, end - middle) if len(bits) > 1 else (end,)
            if min(ranks) < 0 or sum(ranks) == 0:
                continue
            pairs = [(b, r) for b, r in zip(bits, ranks, strict=True) if r]
            if any(b == 4 and r % 2 for b, r in pairs):
                continue
            spec = tuple(Slice(b, r) for b, r in pairs)
            found.append(Choice(spec, groups * stream_bytes(spec), cost_of(costs, spec)))
    found.sort(key=lambda choice: (choice.bytes, choice.cost))
    best: list[Choice] = []
    for choice in found:
        if not best or choice.cost < best[-1].cost:
            best.append(choice)
    return best


def allocate(choices: dict[Key, list[Choice]], budget: float) -> dict[Key, Choice]:
    """The choice of each stream with the least total cost within ``budget`` bytes a token.

    Raises ValueError, with the least that is possible, when the budget cannot be met.
    """
    least = sum(found[0].bytes for found in choices.values())
    if least > budget:
        raise ValueError(
            f"the cache cannot be made as small as {budget:.0f} bytes a token: expected at least "
            f"{least}, which the smallest rank of every layer takes"
        )

    def at_price(price: float) -> dict[Key, Choice]:
        return {
            key: min(found, key=lambda choice: choice.cost + price * choice.bytes)
            for key, found in choices.items()
        }

    def total(chosen: dict[Key, Choice]) -> int:
        return sum(choice.bytes for choice in chosen.values())

    low, high = 1e-18, 1e6
    for _ in range(BISECTIONS):
        price = (low * high) ** 0.5
        if total(at_price(price)) > budget:
            low = price
        else:
            high = price
    chosen = at_price(high)
    if total(chosen) > budget:  # costs so steep that no price is high enough
        chosen = {key: found[0] for key, found in choices.items()}
    while True:
        left = budget - total(chosen)
        best: tuple[float, Key, Choice] | None = None
        for key, found in choices.items():
            now = chosen[key]
            for choice in found:
                more = choice.bytes - now.bytes
                if 0 < more <= left:
                    gain = (now.cost - choice.cost) / more
                    if gain > 0 and (best is None or gain > best[0]):
                        best = gain, key, choice
        if best is None:
            return chosen
        chosen[best[1]] = best[2]
