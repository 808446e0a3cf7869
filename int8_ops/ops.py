"""The ops as plain functions: ``torch.ops.int8_ops`` with names, types and documentation.

They run this library's own kernels, on CUDA and CPU tensors; on meta and fake tensors they give
shapes. Numbers are those of ``int8_ops.reference``, bit for bit. "Floating" below means float32,
float16 or bfloat16. Non-contiguous inputs are copied. Bad arguments raise RuntimeError with what
was expected and what was got; so does the first call when the compiled module did not load.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _extension
from .backends import autocast_dtype

__all__ = [
    "dequantize",
    "int8_linear",
    "int8_mm",
    "int8_scaled_mm",
    "quantize_per_channel",
    "quantize_per_token",
]


def _op(name: str) -> Any:
    if _extension.core.module is None:
        return lambda *args: _extension.core.require()
    return getattr(torch.ops.int8_ops, name).default


_quantize_per_token = _op("quantize_per_token")
_quantize_per_channel = _op("quantize_per_channel")
_dequantize = _op("dequantize")
_int8_mm = _op("int8_mm")
_int8_scaled_mm = _op("int8_scaled_mm")
_int8_linear = _op("int8_linear")


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each row of ``x`` symmetrically to int8.

    Args:
        x: floating ``[..., K]``, K >= 1.

    Returns:
        ``q`` int8 ``[..., K]`` in -127..127, and ``scale`` float32 ``[..., 1]``, x being about
        ``q * scale``. A row of zeros has scale 1; a row with a NaN or an Inf has scale NaN, q = 0.
    """
    q, scale = _quantize_per_token(x)
    return q, scale


def quantize_per_channel(w: Tensor, axis: int = 0) -> tuple[Tensor, Tensor]:
    """Quantize each row (``axis=0``) or column (``axis=1``) of ``w`` symmetrically to int8.

    Args:
        w: floating ``[N, K]``, K >= 1.
        axis: the dimension that keeps a scale an index: 0 or 1, or -2 or -1.

    Returns:
        ``q`` int8 ``[N, K]``, and ``scale`` float32 ``[N, 1]`` (axis 0) or ``[1, K]`` (axis 1).
    """
    q, scale = _quantize_per_channel(w, axis)
    return q, scale


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``q * scale`` in float32, rounded once to ``dtype``.

    Args:
        q: int8 ``[..., K]``.
        scale: float32 ``[..., 1]``, a scale a row, or ``[1, ..., 1, K]``, a scale a column.
        dtype: a floating dtype.

    Returns:
        ``dtype`` of q's shape.
    """
    out: Tensor = _dequantize(q, scale, dtype)
    return out


def int8_mm(a: Tensor, w: Tensor) -> Tensor:
    """``a @ w.T`` with exact int32 sums.

    Args:
        a: int8 ``[..., K]``, K <= 131071.
        w: int8 ``[N, K]`` on the same device.

    Returns:
        int32 ``[..., N]``.
    """
    out: Tensor = _int8_mm(a, w)
    return out


def int8_scaled_mm(
    a: Tensor,
    w: Tensor,
    a_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """``(a @ w.T) * a_scale * w_scale.T + bias``, each step rounded once in float32.

    Args:
        a: int8 ``[..., K]``, K <= 131071.
        w: int8 ``[N, K]``.
        a_scale: float32 ``[..., 1]``.
        w_scale: float32 ``[N, 1]``.
        bias: floating ``[N]``, or None.
        out_dtype: a floating dtype, to which the result is rounded once.

    Returns:
        ``out_dtype [..., N]``.
    """
    out: Tensor = _int8_scaled_mm(a, w, a_scale, w_scale, bias, out_dtype)
    return out


def int8_linear(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Quantize ``x`` per token, multiply by an int8 weight, scale, add the bias: one op.

    Differentiable: ``grad_x = grad_y @ dequantize(w)`` (straight-through), ``grad_bias`` the sum of
    ``grad_y``; the weight and its scale get no gradient.

    Args:
        x: floating ``[..., K]``, K <= 131071. It is not rounded to autocast's dtype first.
        w: int8 ``[N, K]``.
        w_scale: float32 ``[N, 1]``.
        bias: floating ``[N]``, or None.
        out_dtype: a floating dtype. By default autocast's, where autocast is on; else x's.

    Returns:
        ``out_dtype [..., N]``.
    """
    if out_dtype is None:
        out_dtype = autocast_dtype(x.device.type)
    out: Tensor = _int8_linear(x, w, w_scale, bias, out_dtype)
    return out
