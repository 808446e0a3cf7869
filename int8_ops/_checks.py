"""Argument checks of the Python side: the fakes and the backends written in PyTorch.

They refuse what csrc/common/checks.h refuses in C++, and tell what it tells: the op, what was
expected, what was got. The words may differ: a dtype has its Python name here (torch.int8), its C++
name there (Char).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import MAX_K

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_float(op: str, name: str, dtype: torch.dtype) -> None:
    """``dtype`` is float32, float16 or bfloat16."""
    torch._check(
        dtype in FLOATS,
        lambda: f"int8_ops.{op}: expected {name} of dtype Float, Half or BFloat16, got {dtype}",
    )


def check_dtype(op: str, name: str, t: Tensor, dtype: torch.dtype) -> None:
    """``t`` has exactly ``dtype``."""
    torch._check(
        t.dtype == dtype,
        lambda: f"int8_ops.{op}: expected {name} of dtype {dtype}, got {t.dtype}",
    )


def check_same_device(op: str, name: str, t: Tensor, first: Tensor, first_name: str) -> None:
    """``t`` is where ``first`` is."""
    torch._check(
        t.device == first.device,
        lambda: (
            f"int8_ops.{op}: expected {name} on the device of {first_name}, got two different "
            f"devices: {name} on {t.device}, {first_name} on {first.device}"
        ),
    )


def check_rows(op: str, name: str, t: Tensor) -> None:
    """``t`` has a last dimension, which is not empty."""
    torch._check(
        t.dim() >= 1,
        lambda: f"int8_ops.{op}: expected {name} of at least 1 dimension, got a scalar",
    )
    torch._check(
        t.shape[-1] > 0,
        lambda: (
            f"int8_ops.{op}: expected {name} with a last dimension of at least 1, "
            f"got {list(t.shape)}"
        ),
    )


def check_quantize_per_token(x: Tensor) -> None:
    """``x [..., K]``, floating."""
    check_float("quantize_per_token", "x", x.dtype)
    check_rows("quantize_per_token", "x", x)


def check_quantize_per_channel(w: Tensor, axis: int) -> None:
    """``w [N, K]``, floating; ``axis`` one of its two."""
    op = "quantize_per_channel"
    check_float(op, "w", w.dtype)
    torch._check(
        w.dim() == 2, lambda: f"int8_ops.{op}: expected w of shape [N, K], got {list(w.shape)}"
    )
    torch._check(
        axis in (-2, -1, 0, 1),
        lambda: f"int8_ops.{op}: expected axis 0 or 1 (or -2, -1), got {axis}",
    )
    check_rows(op, "w", w)
    torch._check(
        axis in (0, -2) or w.shape[0] > 0,
        lambda: (
            f"int8_ops.{op}: expected at least one row for scales a column, got {list(w.shape)}"
        ),
    )


def check_dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    """int8 ``q``, float32 ``scale`` a row or a column of it."""
    op = "dequantize"
    check_dtype(op, "q", q, torch.int8)
    check_dtype(op, "scale", scale, torch.float32)
    check_float(op, "dtype", dtype)
    check_same_device(op, "scale", scale, q, "q")
    check_rows(op, "q", q)
    per_row = [*q.shape[:-1], 1]
    per_column = [*([1] * (q.dim() - 1)), q.shape[-1]]
    torch._check(
        list(scale.shape) == per_row or list(scale.shape) == per_column,
        lambda: (
            f"int8_ops.{op}: expected scale of shape {per_row} (a scale a row) or {per_column} "
            f"(a scale a column), got {list(scale.shape)} for q {list(q.shape)}"
        ),
    )


def check_matmul(op: str, name: str, a: Tensor, w: Tensor) -> None:
    """``a [..., K]`` and int8 ``w [N, K]``, on one device."""
    torch._check(
        w.dim() == 2, lambda: f"int8_ops.{op}: expected w of shape [N, K], got {list(w.shape)}"
    )
    check_rows(op, name, a)
    torch._check(
        a.shape[-1] == w.shape[1],
        lambda: (
            f"int8_ops.{op}: expected {name} and w with the same last dimension K, "
            f"got {name} {list(a.shape)} and w {list(w.shape)}"
        ),
    )
    torch._check(
        w.shape[1] <= MAX_K,
        lambda: (
            f"int8_ops.{op}: K = {w.shape[1]} is over the limit of {MAX_K} at which an int32 "
            "sum of int8 products can overflow"
        ),
    )
    check_dtype(op, "w", w, torch.int8)
    check_same_device(op, "w", w, a, name)


def check_a_scale(op: str, a_scale: Tensor, a: Tensor) -> None:
    """float32, of ``a``'s shape with a last dimension of 1."""
    check_dtype(op, "a_scale", a_scale, torch.float32)
    torch._check(
        list(a_scale.shape) == [*a.shape[:-1], 1],
        lambda: (
            f"int8_ops.{op}: expected a_scale of a's shape with a last dimension of 1, "
            f"got a_scale {list(a_scale.shape)} for a {list(a.shape)}"
        ),
    )
    check_same_device(op, "a_scale", a_scale, a, "a")


def check_w_scale(op: str, w_scale: Tensor, w: Tensor) -> None:
    """float32 ``[N, 1]``."""
    check_dtype(op, "w_scale", w_scale, torch.float32)
    torch._check(
        w_scale.dim() == 2 and w_scale.shape[0] == w.shape[0] and w_scale.shape[1] == 1,
        lambda: (
            f"int8_ops.{op}: expected w_scale of shape [{w.shape[0]}, 1], got {list(w_scale.shape)}"
        ),
    )
    check_same_device(op, "w_scale", w_scale, w, "w")


def check_bias(op: str, bias: Tensor | None, w: Tensor) -> None:
    """Absent, or floating ``[N]``."""
    if bias is None:
        return
    check_float(op, "bias", bias.dtype)
    torch._check(
        bias.dim() == 1 and bias.shape[0] == w.shape[0],
        lambda: f"int8_ops.{op}: expected bias of shape [{w.shape[0]}], got {list(bias.shape)}",
    )
    check_same_device(op, "bias", bias, w, "w")


def check_int8_mm(a: Tensor, w: Tensor) -> None:
    """The arguments of ``int8_mm``."""
    check_matmul("int8_mm", "a", a, w)
    check_dtype("int8_mm", "a", a, torch.int8)


def check_int8_scaled_mm(
    a: Tensor,
    w: Tensor,
    a_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    """The arguments of ``int8_scaled_mm``."""
    op = "int8_scaled_mm"
    check_matmul(op, "a", a, w)
    check_dtype(op, "a", a, torch.int8)
    check_a_scale(op, a_scale, a)
    check_w_scale(op, w_scale, w)
    check_bias(op, bias, w)
    check_float(op, "out_dtype", out_dtype)


def check_int8_linear(
    x: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None
) -> None:
    """The arguments of ``int8_linear``."""
    op = "int8_linear"
    check_matmul(op, "x", x, w)
    check_float(op, "x", x.dtype)
    check_w_scale(op, w_scale, w)
    check_bias(op, bias, w)
    if out_dtype is not None:
        check_float(op, "out_dtype", out_dtype)
