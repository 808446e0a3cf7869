"""The numerical contract as plain PyTorch: what every backend must return, bit for bit.

Every function works on any device that has float64 (mps has not), in float32 (quantize, epilogue)
and float64 (sums, exact there). They are written to be read, not to be fast; the ``fallback``
backend computes the same bits faster.

Quantize (symmetric, one scale a row or a column of the input):
    1. ``amax = max |x|``, in float32, to which fp16, bf16 and fp32 convert exactly
    2. ``scale = RN(amax / 127)``
    3. ``q = clamp(rint(RN(x / scale)), -127, 127)``, halves to even; -128 never occurs
    4. a scale that would be zero or subnormal: ``q = 0``, ``scale = 1``
    5. a NaN or an Inf in the row: ``q = 0``, ``scale = NaN``, so that every output made from the
       row is NaN and no other row is touched
Multiply: exact int32 sums, K at most 131071.
Epilogue: ``(float(acc) * a_scale) * w_scale + bias``, each operation rounded once in float32 (no
FMA), then one rounding to the output dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

QUANT_MAX = 127
MIN_NORMAL_SCALE = torch.finfo(torch.float32).tiny
MAX_K = 131_071


def _quantize(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    xf = x.to(torch.float32)
    amax = xf.abs().amax(dim=dim, keepdim=True)
    # A tensor as divisor: on CUDA, torch divides by a Python number through its reciprocal, which
    # is not the correctly rounded quotient.
    scale = amax / torch.full_like(amax, QUANT_MAX)
    usable = scale >= MIN_NORMAL_SCALE
    finite = torch.isfinite(xf).all(dim=dim, keepdim=True)
    q = torch.round(xf / scale).clamp(-QUANT_MAX, QUANT_MAX)
    q = torch.where(usable & finite, q, torch.zeros_like(q)).to(torch.int8)
    scale = torch.where(usable, scale, torch.ones_like(scale))
    scale = torch.where(finite, scale, torch.full_like(scale, torch.nan))
    return q, scale


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x [..., K]`` -> ``q`` int8 ``[..., K]``, ``scale`` float32 ``[..., 1]``."""
    return _quantize(x, -1)


def quantize_per_channel(w: Tensor, axis: int = 0) -> tuple[Tensor, Tensor]:
    """``w [N, K]`` -> int8, and a scale a row ``[N, 1]`` (axis 0) or a column ``[1, K]``."""
    return _quantize(w, 1 if axis % 2 == 0 else 0)


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``q * scale`` in float32, rounded once to ``dtype``."""
    return (q.to(torch.float32) * scale).to(dtype)


def int8_mm(a: Tensor, w: Tensor) -> Tensor:
    """``a [..., K]``, ``w [N, K]``, int8 -> int32 ``[..., N]``, exact.

    Through float64: every partial sum is an integer below 2^31, and float64 holds integers to 2^53.
    """
    return (a.to(torch.float64) @ w.to(torch.float64).t()).to(torch.int32)


def epilogue(
    acc: Tensor, a_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """int32 sums ``[..., N]`` -> ``out_dtype``; ``a_scale [..., 1]``, ``w_scale [N, 1]``."""
    y = acc.to(torch.float32) * a_scale
    y = y * w_scale.reshape(-1)
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(out_dtype)


def int8_scaled_mm(
    a: Tensor,
    w: Tensor,
    a_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """``int8_mm`` with the scale epilogue."""
    return epilogue(int8_mm(a, w), a_scale, w_scale, bias, out_dtype)


def int8_linear(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Quantize ``x [..., K]`` per token, multiply, scale, add the bias."""
    q, scale = quantize_per_token(x)
    return int8_scaled_mm(q, w, scale, w_scale, bias, out_dtype or x.dtype)


class LatentStream(NamedTuple):
    """The keys' or the values' latents of all cached tokens, and what rebuilds them: a slice each.

    Attributes:
        q: int8 ``[B, G, S, r]``, or two int4 values a byte ``[B, G, S, r / 2]``: byte j holds value
            j in its low half and value j + r/2 in its high half, each in two's complement.
        scale: float32 ``[B, G, S]``.
        a: int8 ``[G, out, r]``; ``out`` is the group's KV heads times the head size.
        a_scale: float32 ``[G, out, 1]``. Of keys, the rows i and i + d/2 of a head, which are a
            RoPE pair, have the same: integers are rotated before scales apply. What this module
            computes is right for others as well; what ``ops.latent_attention_decode`` does then, it
            tells itself.
        bias: floating ``[G * out]``, or None.
    """

    q: Sequence[Tensor]
    scale: Sequence[Tensor]
    a: Sequence[Tensor]
    a_scale: Sequence[Tensor]
    bias: Tensor | None = None

    def slices(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """``q``, ``scale``, ``a`` and ``a_scale`` of each slice."""
        return zip(self.q, self.scale, self.a, self.a_scale, strict=True)

    def arguments(self) -> tuple[Any, ...]:
        """What an op's schema has of this: four lists and the bias."""
        return list(self.q), list(self.scale), list(self.a), list(self.a_scale), self.bias


def rebuild(stream: LatentStream, head_dim: int) -> Tensor:
    """What the integers mean: float64 ``[B, KV heads, S, head_dim]``, not rotated."""
    total = torch.zeros((), dtype=torch.float64, device=stream.q[0].device)
    for q, scale, a, a_scale in stream.slices():
        if q.shape[-1] != a.shape[-1]:
            q = torch.cat(((q << 4) >> 4, q >> 4), dim=-1)
        latent = q.to(torch.float64) * scale.to(torch.float64)[..., None]
        matrix = a.to(torch.float64) * a_scale.to(torch.float64)
        total = total + torch.matmul(latent, matrix.transpose(-1, -2))
    batch, groups, tokens, out = total.shape
    y = total.view(batch, groups, tokens, out // head_dim, head_dim).transpose(2, 3).flatten(1, 2)
    if stream.bias is not None:
        y = y + stream.bias.to(torch.float64).view(-1, 1, head_dim)
    return y


def latent_attention_decode(
    q: Tensor,
    k: LatentStream,
    v: LatentStream,
    inv_freq: Tensor,
    start: Tensor,
    length: Tensor,
    scaling: float,
    origin: Tensor | None = None,
    rope_scaling: float = 1.0,
    window: int | None = None,
) -> Tensor:
    """Attention over latents, all of it in float64: float64 ``[B, q_len, H, d]``.

    Arguments as ``ops.latent_attention_decode`` has them. Unlike the other functions here this one
    is not to be met bit for bit: exponentials and sums of floats differ between machines.
    """
    _, heads, q_len, size = q.shape
    keys, values = rebuild(k, size), rebuild(v, size)
    tokens = torch.arange(keys.shape[2], device=q.device)
    position = tokens - start.long()[:, None] if origin is None else tokens + origin[:, None]
    angle = position[:, None, :, None].to(torch.float64) * inv_freq.to(torch.float64)
    cos, sin = angle.cos() * rope_scaling, angle.sin() * rope_scaling
    first, second = keys.chunk(2, dim=-1)
    keys = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    repeats = heads // keys.shape[1]
    keys, values = (t.repeat_interleave(repeats, dim=1) for t in (keys, values))
    scores = torch.matmul(q.to(torch.float64), keys.transpose(2, 3)) * scaling
    own = (length.long()[:, None] - q_len + torch.arange(q_len, device=q.device))[..., None]
    seen = (tokens >= start[:, None, None]) & (tokens <= own)
    if window is not None:
        seen = seen & (tokens > own - window)
    seen = seen[:, None]
    scores = scores.masked_fill(~seen, -torch.inf)
    weights = torch.where(seen, (scores - scores.amax(-1, keepdim=True)).exp(), 0.0)
    weights = weights / weights.sum(-1, keepdim=True)
    # A query that sees nothing has zeros.
    weights = torch.where(seen.any(-1, keepdim=True), weights, 0.0)
    # A token that a query doesn't see may be anything, and 0 times NaN would be NaN.
    spoiled = torch.matmul(seen.to(torch.float64), values.isnan().to(torch.float64)) > 0
    output = torch.matmul(weights, values.nan_to_num(nan=0.0))
    return output.masked_fill(spoiled, torch.nan).transpose(1, 2)
