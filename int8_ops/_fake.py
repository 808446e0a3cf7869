"""Shapes and dtypes of the ops for tracing (meta and fake tensors), with the checks.

Registered once; ``torch.compile``, ``torch.export`` and the meta device all come through here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks
from .reference import LatentStream


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 ``[..., K]`` and float32 ``[..., 1]``, without values."""
    _checks.check_quantize_per_token(x)
    q = x.new_empty(x.shape, dtype=torch.int8)
    return q, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def quantize_per_channel(w: Tensor, axis: int = 0) -> tuple[Tensor, Tensor]:
    """int8 ``[N, K]`` and float32 ``[N, 1]`` or ``[1, K]``, without values."""
    _checks.check_quantize_per_channel(w, axis)
    scale_shape = (w.shape[0], 1) if axis % 2 == 0 else (1, w.shape[1])
    return w.new_empty(w.shape, dtype=torch.int8), w.new_empty(scale_shape, dtype=torch.float32)


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``dtype`` of q's shape, without values."""
    _checks.check_dequantize(q, scale, dtype)
    return q.new_empty(q.shape, dtype=dtype)


def int8_mm(a: Tensor, w: Tensor) -> Tensor:
    """int32 ``[..., N]``, without values."""
    _checks.check_int8_mm(a, w)
    return a.new_empty((*a.shape[:-1], w.shape[0]), dtype=torch.int32)


def int8_scaled_mm(
    a: Tensor,
    w: Tensor,
    a_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``out_dtype [..., N]``, without values."""
    _checks.check_int8_scaled_mm(a, w, a_scale, w_scale, bias, out_dtype)
    return a.new_empty((*a.shape[:-1], w.shape[0]), dtype=out_dtype)


def int8_linear(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``out_dtype`` (x's by default) ``[..., N]``, without values."""
    _checks.check_int8_linear(x, w, w_scale, bias, out_dtype)
    return x.new_empty((*x.shape[:-1], w.shape[0]), dtype=out_dtype or x.dtype)


def latent_attention_decode(
    q: Tensor,
    k: Sequence[Tensor],
    k_scale: Sequence[Tensor],
    a_k: Sequence[Tensor],
    a_k_scale: Sequence[Tensor],
    k_bias: Tensor | None,
    v: Sequence[Tensor],
    v_scale: Sequence[Tensor],
    a_v: Sequence[Tensor],
    a_v_scale: Sequence[Tensor],
    v_bias: Tensor | None,
    inv_freq: Tensor,
    start: Tensor,
    length: Tensor,
    origin: Tensor | None,
    scaling: float,
    rope_scaling: float = 1.0,
    window: int | None = None,
) -> Tensor:
    """``[B, q_len, H, d]`` of q's dtype, without values."""
    keys = LatentStream(k, k_scale, a_k, a_k_scale, k_bias)
    values = LatentStream(v, v_scale, a_v, a_v_scale, v_bias)
    _checks.check_latent_attention_decode(q, keys, values, inv_freq, start, length, origin, window)
    batch, heads, q_len, size = q.shape
    return q.new_empty((batch, q_len, heads, size))


def latent_append(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    k_bits: Sequence[int],
    v_bits: Sequence[int],
    k_q: Sequence[Tensor],
    k_scale: Sequence[Tensor],
    v_q: Sequence[Tensor],
    v_scale: Sequence[Tensor],
) -> None:
    """Nothing to make: the buffers are written."""
    _checks.check_latent_append(k, v, slots, k_bits, v_bits, k_q, k_scale, v_q, v_scale)


def register() -> None:
    """Attach the fakes to the ops; called once, when the package is imported."""
    for fake in (
        quantize_per_token,
        quantize_per_channel,
        dequantize,
        int8_mm,
        int8_scaled_mm,
        int8_linear,
        latent_attention_decode,
        latent_append,
    ):
        torch.library.register_fake(f"int8_ops::{fake.__name__}", fake)
