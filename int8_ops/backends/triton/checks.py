"""Argument checks of the backend, with the messages and the exception of the native ops."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from ...reference import MAX_K

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _fail(op: str, message: str) -> NoReturn:
    raise RuntimeError(f"int8_ops.{op} (triton): {message}")


def float_dtype(op: str, name: str, dtype: torch.dtype) -> None:
    """Refuse anything but float32, float16 and bfloat16."""
    if dtype not in FLOATS:
        _fail(op, f"expected {name} of dtype float32, float16 or bfloat16, got {dtype}")


def _int8(op: str, name: str, t: Tensor) -> None:
    if t.dtype is not torch.int8:
        _fail(op, f"expected {name} of dtype torch.int8, got {t.dtype}")


def _same_device(op: str, name: str, t: Tensor, first: Tensor) -> None:
    if t.device != first.device:
        _fail(op, f"expected {name} on {first.device}, got {t.device}")


def rows(op: str, name: str, x: Tensor) -> None:
    """Refuse a scalar and an empty last dimension: neither has a row to find a maximum of."""
    if x.dim() < 1 or x.shape[-1] < 1:
        _fail(op, f"expected {name} with a last dimension of at least 1, got {list(x.shape)}")


def columns(op: str, w: Tensor, axis: int) -> None:
    """Check what ``quantize_per_channel`` takes."""
    float_dtype(op, "w", w.dtype)
    if w.dim() != 2:
        _fail(op, f"expected w of shape [N, K], got {list(w.shape)}")
    if axis not in (-2, -1, 0, 1):
        _fail(op, f"expected axis 0 or 1 (or -2, -1), got {axis}")
    rows(op, "w", w)


def matmul_operands(op: str, name: str, a: Tensor, w: Tensor) -> None:
    """Check the shapes of ``a [..., K]`` and ``w [N, K]``, the limit on K, and w's dtype."""
    if w.dim() != 2:
        _fail(op, f"expected w of shape [N, K], got {list(w.shape)}")
    rows(op, name, a)
    if a.shape[-1] != w.shape[1]:
        _fail(
            op,
            f"expected {name} and w with the same last dimension K, "
            f"got {name} {list(a.shape)} and w {list(w.shape)}",
        )
    if w.shape[1] > MAX_K:
        _fail(
            op,
            f"K = {w.shape[1]} is over the limit of {MAX_K} "
            "at which an int32 sum of int8 products can overflow",
        )
    _int8(op, "w", w)
    _same_device(op, "w", w, a)


def int8_operand(op: str, name: str, a: Tensor) -> None:
    """Refuse a left operand that is not int8."""
    _int8(op, name, a)


def a_scale(op: str, scale: Tensor, a: Tensor) -> None:
    """Check a scale a row of ``a``."""
    _scale(op, "a_scale", scale, [*a.shape[:-1], 1], a)


def w_scale(op: str, scale: Tensor, w: Tensor) -> None:
    """Check a scale a row of ``w``."""
    _scale(op, "w_scale", scale, [w.shape[0], 1], w)


def _scale(op: str, name: str, scale: Tensor, shape: list[int], beside: Tensor) -> None:
    if scale.dtype is not torch.float32:
        _fail(op, f"expected {name} of dtype torch.float32, got {scale.dtype}")
    if list(scale.shape) != shape:
        _fail(op, f"expected {name} of shape {shape}, got {list(scale.shape)}")
    _same_device(op, name, scale, beside)


def bias(op: str, value: Tensor | None, w: Tensor) -> None:
    """Check an optional bias of shape [N]."""
    if value is None:
        return
    float_dtype(op, "bias", value.dtype)
    if value.dim() != 1 or value.shape[0] != w.shape[0]:
        _fail(op, f"expected bias of shape [{w.shape[0]}], got {list(value.shape)}")
    _same_device(op, "bias", value, w)
