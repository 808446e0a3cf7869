"""The ``fallback`` backend: plain PyTorch, on any device that has float64. Exact, not fast.

Sums go through float64: every partial sum is an integer below 2^31 and float64 holds integers to
2^53, so no order of summation rounds. float32 would be exact only up to K = 1040, and only where
neither TF32 nor autocast touches it; both leave float64 alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from ..reference import MIN_NORMAL_SCALE, QUANT_MAX


def unavailable_reason(device: torch.device | None = None) -> str | None:
    """None, except for a device without float64."""
    if device is not None and device.type == "mps":
        return "the fallback sums in float64, which mps does not have"
    return None


def _quantize(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    # amax is exact in x's own dtype, and is NaN or Inf exactly when the row holds one.
    amax = x.abs().amax(dim=dim, keepdim=True).to(torch.float32)
    # A tensor as divisor: torch on CUDA divides by a Python number through its reciprocal.
    scale = amax / torch.full_like(amax, QUANT_MAX)
    finite = torch.isfinite(amax)
    usable = finite & (scale >= MIN_NORMAL_SCALE)
    scale = torch.where(usable, scale, 1.0)
    q = (x.to(torch.float32) / scale).round_().clamp_(-QUANT_MAX, QUANT_MAX)
    q = q.masked_fill_(~usable, 0).to(torch.int8)
    return q, scale.masked_fill_(~finite, torch.nan)


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x [..., K]`` -> int8 ``[..., K]``, float32 ``[..., 1]``."""
    _checks.check_quantize_per_token(x)
    return _quantize(x.detach(), -1)


def quantize_per_channel(w: Tensor, axis: int = 0) -> tuple[Tensor, Tensor]:
    """``w [N, K]`` -> int8 ``[N, K]``, float32 ``[N, 1]`` (axis 0) or ``[1, K]`` (axis 1)."""
    _checks.check_quantize_per_channel(w, axis)
    return _quantize(w.detach(), 1 if axis % 2 == 0 else 0)


def int8_mm(a: Tensor, w: Tensor) -> Tensor:
    """int8 ``a [..., K]``, ``w [N, K]`` -> int32 ``[..., N]``."""
    _checks.check_int8_mm(a, w)
    return (a.to(torch.float64) @ w.to(torch.float64).t()).to(torch.int32)


def epilogue(
    acc: Tensor, a_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """int32 sums ``[..., N]`` -> ``out_dtype``, each operation rounded once in float32."""
    y = acc.to(torch.float32).mul_(a_scale).mul_(w_scale.reshape(-1))
    if bias is not None:
        y.add_(bias.to(torch.float32))
    return y.to(out_dtype)


@torch.no_grad()
def int8_scaled_mm(
    a: Tensor,
    w: Tensor,
    a_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``int8_mm`` with the scale epilogue -> ``out_dtype [..., N]``."""
    _checks.check_int8_scaled_mm(a, w, a_scale, w_scale, bias, out_dtype)
    return epilogue(int8_mm(a, w), a_scale, w_scale, bias, out_dtype)


@torch.no_grad()
def int8_linear(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``x [..., K]`` -> ``out_dtype`` (x's by default) ``[..., N]``, without gradient."""
    _checks.check_int8_linear(x, w, w_scale, bias, out_dtype)
    q, scale = quantize_per_token(x)
    return epilogue(int8_mm(q, w), scale, w_scale, bias, out_dtype or x.dtype)
