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
