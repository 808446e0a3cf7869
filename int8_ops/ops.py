"""The ops as plain functions: ``torch.ops.int8_ops`` with names, types and documentation.

They run this library's own kernels, on CUDA and CPU tensors; on meta and fake tensors they give
shapes. Numbers are those of ``int8_ops.reference``, bit for bit. "Floating" below means float32,
float16 or bfloat16. Non-contiguous inputs are copied. Bad arguments raise RuntimeError with what
was expected and what was got; so does the first call when the compiled module did not load.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _extension
from .backends import autocast_dtype
from .reference import LatentStream

__all__ = [
    "LatentStream",
    "dequantize",
    "int8_linear",
    "int8_mm",
    "int8_scaled_mm",
    "latent_append",
    "latent_attention_decode",
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
_latent_attention_decode = _op("latent_attention_decode")
_latent_append = _op("latent_append")


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
    """Attention of a few new tokens a row straight from integer latents.

    On CPU and CUDA tensors; for CUDA ones there is the backend triton's as well
    (``int8_ops.backends.latent_attention_decode``).

    A key is ``sum over slices of scale_t * A_scale * (A . latent_t) + bias``, then rotated by RoPE
    (halves (i, i + d/2) are pairs; Su et al., 2021, RoFormer); a value the same without rotation.
    Neither is ever written to memory: keys are rebuilt a tile at a time, values are absorbed,
    ``sum_t p_t (scale_t latent_t)`` first and A once (Note [Splits of a row] and Note [RoPE inside
    a tile] in csrc/cpu/latent_attention_plan.h).

    Tokens are counted by their slot t in the cache. A row's valid tokens are
    ``start <= t < length``, the last q_len of them the new ones, whose latents are in the cache
    already. Query i sees slots ``start .. length - q_len + i``, of these the last ``window``. A
    query that sees nothing gets zeros. What the cache holds in other slots is never looked at.

    The numbers: each element of a key is an exact int32 sum a slice; rotation, scores and all that
    follows are float32, the angle of a token accurate to 1e-6; on Hopper, for queries in 16 bits,
    factors of scores and of sums are rounded to float16 and added up in float32. In float64 the
    same is ``reference.latent_attention_decode``, and errors against it are at most twice those of
    ``scaled_dot_product_attention`` in q's dtype over rebuilt keys and values. A query's result
    depends on its own row alone, to the bit: not on the batch, the padding or q_len. A NaN scale of
    a token makes NaN what sees the token, and nothing else.

    The keys' A has the same scale for the two channels of a RoPE pair, in each slice: integers are
    rotated before their scales apply. Scales that differ are an error on CPU tensors. On CUDA ones
    no call waits to look at them: there the heads of such a pair are NaN or, on the paths that
    scale before they rotate, right.

    Args:
        q: floating ``[B, H, q_len, d]``, q_len 1..16, d even, rotated by its own positions.
        k: the keys' latents, 1 to 4 slices. Views with the strides of a larger buffer are taken as
            they are where a token's values, and the scales of neighbouring tokens, are neighbours.
        v: the values' latents, of the same B, G and S; ranks and slices may differ.
        inv_freq: float32 ``[d/2]``, RoPE's inverse frequencies: radians a position.
        start: int32 ``[B]``, on q's device: slots before it are left padding; at least 0.
        length: int32 ``[B]``, on q's device: slots in use, at most S.
        scaling: of the scores, usually ``d ** -0.5``.
        origin: int32 ``[B]``, the RoPE position of slot 0, negative where padding precedes the
            first token; by default ``-start``.
        rope_scaling: the factor that the rotary embedding applies to its cosines and sines; q has
            it already.
        window: how many slots a query sees, its own included; None: all.

    Returns:
        q's dtype, ``[B, q_len, H, d]``.
    """
    out: Tensor = _latent_attention_decode(
        q,
        *k.arguments(),
        *v.arguments(),
        inv_freq,
        start,
        length,
        origin,
        scaling,
        rope_scaling,
        window,
    )
    return out


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
    """Quantize the latents of new tokens, keys' and values', into slots of a cache, in place.

    The bits are those of ``quantize_per_token`` (8 bits) and of ``int8_ops.llama.packing`` (4), and
    each slice of each token has a scale of its own. Meant for few tokens; one kernel on CUDA.
    It begins at the latents, not at what they are made from: the bits of a float matmul are torch's
    to choose, those of everything after it are this library's.

    Args:
        k: floating ``[B, G, n, rank]``, the slices' directions one after another.
        v: the same of values; its rank and slices may differ.
        slots: int64 ``[n]``, where each token goes, 0 to S - 1, no slot twice. Any other raises on
            the CPU, before anything is written; on CUDA, where reading it would wait for the
            device, it fails an assertion of the kernel, as an index of torch's does: a later call
            reports it, and the process can't use the device again.
        k_bits: 8 or 4 for each slice of k, 1 to 4 of them.
        v_bits: of v.
        k_q: int8 ``[B, G, S, width]`` a slice, as wide as its rank, or half as wide in 4 bits;
            written, so its last dimension must be contiguous.
        k_scale: float32 ``[B, G, S]`` a slice, likewise.
        v_q: of v.
        v_scale: of v.
    """
    _latent_append(
        k,
        v,
        slots,
        list(k_bits),
        list(v_bits),
        list(k_q),
        list(k_scale),
        list(v_q),
        list(v_scale),
    )
