"""The ``torch`` backend: ``torch._int_mm`` on CUDA, the rest in plain PyTorch.

``torch._int_mm`` wants M > 16 and K and N in multiples of 8; other shapes are padded with zeros,
which add nothing to a sum, and the result is cut back. Never on a CPU: its x86 path adds an offset
of 128 and saturates, so its sums are wrong there (pytorch#136746).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks
from .fallback import epilogue, quantize_per_channel, quantize_per_token

__all__ = [
    "int8_linear",
    "int8_mm",
    "int8_scaled_mm",
    "quantize_per_channel",
    "quantize_per_token",
    "unavailable_reason",
]

MIN_ROWS = 17
MULTIPLE = 8


def unavailable_reason(device: torch.device | None = None) -> str | None:
    """None on CUDA; elsewhere, why not."""
    if device is not None and device.type != "cuda":
        return f"torch._int_mm is used on CUDA only (its CPU sums can be wrong), not on {device}"
    if not torch.cuda.is_available():
        return "torch._int_mm needs a CUDA device, and torch sees none"
    return None


def _padding(size: int) -> int:
    return -size % MULTIPLE


def int8_mm(a: Tensor, w: Tensor) -> Tensor:
    """int8 ``a [..., K]``, ``w [N, K]`` -> int32 ``[..., N]``; copies w to pad K or N."""
    _checks.check_int8_mm(a, w)
    rows = a.reshape(-1, a.shape[-1])
    (m, k), n = rows.shape, w.shape[0]
    if m == 0 or n == 0:
        return a.new_empty((*a.shape[:-1], n), dtype=torch.int32)
    more_m, more_k, more_n = max(MIN_ROWS - m, 0), _padding(k), _padding(n)
    if more_m or more_k:
        rows = F.pad(rows, (0, more_k, 0, more_m))
    if more_n or more_k:
        w = F.pad(w, (0, more_k, 0, more_n))
    out = torch._int_mm(rows.contiguous(), w.contiguous().t())
    return out[:m, :n].reshape(*a.shape[:-1], n)


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
