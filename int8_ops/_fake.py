"""Shapes and dtypes of the ops for tracing (meta and fake tensors), with the shape checks.

Registered once; ``torch.compile``, ``torch.export`` and the meta device all come through here.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _check_float(op: str, name: str, dtype: torch.dtype) -> None:
    torch._check(
        dtype in _FLOATS,
        lambda: f"int8_ops.{op}: expected {name} of dtype Float, Half or BFloat16, got {dtype}",
    )


def _check_int8(op: str, name: str, t: Tensor) -> None:
    torch._check(
        t.dtype == torch.int8,
        lambda: f"int8_ops.{op}: expected {name} of dtype Char, got {t.dtype}",
    )


def _check_matmul(op: str, name: str, a: Tensor, w: Tensor) -> None:
    torch._check(
        w.dim() == 2,
        lambda: f"int8_ops.{op}: expected w of shape [N, K], got {list(w.shape)}",
    )
    torch._check(
        a.dim() >= 1 and a.shape[-1] == w.shape[1],
        lambda: f"int8_ops.{op}: expected {name} and w with the same last dimension K, "
        f"got {name} {list(a.shape)} and w {list(w.shape)}",
    )
    _check_int8(op, "w", w)


def _quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    _check_float("quantize_per_token", "x", x.dtype)
    q = x.new_empty(x.shape, dtype=torch.int8)
    return q, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _quantize_per_channel(w: Tensor, axis: int = 0) -> tuple[Tensor, Tensor]:
    op = "quantize_per_channel"
    _check_float(op, "w", w.dtype)
    torch._check(
        w.dim() == 2, lambda: f"int8_ops.{op}: expected w of shape [N, K], got {list(w.shape)}"
    )
    torch._check(
        axis in (-2, -1, 0, 1),
        lambda: f"int8_ops.{op}: expected axis 0 or 1 (or -2, -1), got {axis}",
    )
    scale_shape = (w.shape[0], 1) if axis % 2 == 0 else (1, w.shape[1])
    return w.new_empty(w.shape, dtype=torch.int8), w.new_empty(scale_shape, dtype=torch.float32)


def _dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    _check_int8("dequantize", "q", q)
    _check_float("dequantize", "dtype", dtype)
    return q.new_empty(q.shape, dtype=dtype)


def _int8_mm(a: Tensor, w: Tensor) -> Tensor:
    _check_matmul("int8_mm", "a", a, w)
    _check_int8("int8_mm", "a", a)
    return a.new_empty((*a.shape[:-1], w.shape[0]), dtype=torch.int32)


def _int8_scaled_mm(
    a: Tensor,
    w: Tensor,
    a_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    _check_matmul("int8_scaled_mm", "a", a, w)
    _check_int8("int8_scaled_mm", "a", a)
    _check_float("int8_scaled_mm", "out_dtype", out_dtype)
    return a.new_empty((*a.shape[:-1], w.shape[0]), dtype=out_dtype)


def _int8_linear(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    _check_matmul("int8_linear", "x", x, w)
    _check_float("int8_linear", "x", x.dtype)
    return x.new_empty((*x.shape[:-1], w.shape[0]), dtype=out_dtype or x.dtype)


def register() -> None:
    """Attach the fakes to the ops; called once, when the package is imported."""
    for name, fake in {
        "quantize_per_token": _quantize_per_token,
        "quantize_per_channel": _quantize_per_channel,
        "dequantize": _dequantize,
        "int8_mm": _int8_mm,
        "int8_scaled_mm": _int8_scaled_mm,
        "int8_linear": _int8_linear,
    }.items():
        torch.library.register_fake(f"int8_ops::{name}", fake)
