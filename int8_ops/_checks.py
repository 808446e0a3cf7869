"""Argument checks of the Python side: the fakes and the backends written in PyTorch.

They refuse what csrc/common/checks.h refuses in C++, and tell what it tells: the op, what was
expected, what was got. The words may differ: a dtype has its Python name here (torch.int8), its C++
name there (Char).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import MAX_K, LatentStream

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MAX_DECODE_QUERIES = 16
MAX_SLICES = 4


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


def check_latent_stream(op: str, name: str, s: LatentStream, q: Tensor) -> None:
    """The latents, scales, A and bias of keys or values, beside ``q [B, H, q_len, d]``."""
    count = len(s.q)
    torch._check(
        1 <= count <= MAX_SLICES and count == len(s.scale) == len(s.a) == len(s.a_scale),
        lambda: (
            f"int8_ops.{op}: expected 1 to {MAX_SLICES} slices of {name}, each with a scale, an A "
            f"and the scale of that, got {count} latents, {len(s.scale)} scales, {len(s.a)} A and "
            f"{len(s.a_scale)} scales of A"
        ),
    )
    first = s.q[0]
    torch._check(
        first.dim() == 4 and first.shape[0] == q.shape[0] and first.shape[1] > 0,
        lambda: (
            f"int8_ops.{op}: expected {name} latents of shape [B, G, S, width] with q's B = "
            f"{q.shape[0]}, got {list(first.shape)}"
        ),
    )
    a = s.a[0]
    torch._check(
        a.dim() == 3
        and a.shape[0] == first.shape[1]
        and a.shape[1] > 0
        and a.shape[1] % q.shape[3] == 0,
        lambda: (
            f"int8_ops.{op}: expected A of {name} of shape [G, out, rank] with the latents' G = "
            f"{first.shape[1]} and out a multiple of d = {q.shape[3]}, got {list(a.shape)}"
        ),
    )
    for parts in s.slices():
        _check_latent_slice(op, name, parts, first, a, q)
    if s.bias is None:
        return
    bias = s.bias
    check_float(op, "bias", bias.dtype)
    torch._check(
        bias.dim() == 1 and bias.shape[0] == a.shape[0] * a.shape[1],
        lambda: (
            f"int8_ops.{op}: expected bias of {name} of shape [{a.shape[0] * a.shape[1]}], got "
            f"{list(bias.shape)}"
        ),
    )
    check_same_device(op, "bias", bias, q, "q")


def _check_latent_slice(
    op: str, name: str, parts: Sequence[Tensor], first: Tensor, first_a: Tensor, q: Tensor
) -> None:
    latent, scale, a, a_scale = parts
    check_dtype(op, name, latent, torch.int8)
    check_dtype(op, "the scale of a latent", scale, torch.float32)
    check_dtype(op, "A", a, torch.int8)
    check_dtype(op, "the scale of A", a_scale, torch.float32)
    for t in parts:
        check_same_device(op, name, t, q, "q")
    torch._check(
        latent.dim() == 4
        and a.dim() == 3
        and latent.shape[:3] == first.shape[:3]
        and scale.shape == first.shape[:3]
        and a.shape[:2] == first_a.shape[:2]
        and list(a_scale.shape) == [*a.shape[:2], 1],
        lambda: (
            f"int8_ops.{op}: expected slices of {name} that agree: latents [B, G, S, width], "
            "scales [B, G, S], A [G, out, rank], its scales [G, out, 1], got "
            f"{list(latent.shape)}, {list(scale.shape)}, {list(a.shape)} and "
            f"{list(a_scale.shape)} after latents {list(first.shape)}"
        ),
    )
    width, rank = latent.shape[3], a.shape[2]
    torch._check(
        1 <= rank <= MAX_K and rank in (width, 2 * width),
        lambda: (
            f"int8_ops.{op}: expected latents of {name} as wide as A's rank (int8), or half as "
            f"wide (int4, two a byte), got width {width} and rank {rank}"
        ),
    )


def _check_row_numbers(op: str, name: str, t: Tensor, q: Tensor) -> None:
    check_dtype(op, name, t, torch.int32)
    torch._check(
        list(t.shape) == [q.shape[0]],
        lambda: f"int8_ops.{op}: expected {name} of shape [{q.shape[0]}], got {list(t.shape)}",
    )
    check_same_device(op, name, t, q, "q")


def check_latent_attention_decode(
    q: Tensor,
    k: LatentStream,
    v: LatentStream,
    inv_freq: Tensor,
    start: Tensor,
    length: Tensor,
    origin: Tensor | None,
    window: int | None,
) -> None:
    """The arguments of ``latent_attention_decode``."""
    op = "latent_attention_decode"
    check_float(op, "q", q.dtype)
    torch._check(
        q.dim() == 4
        and 1 <= q.shape[2] <= MAX_DECODE_QUERIES
        and q.shape[3] >= 2
        and q.shape[3] % 2 == 0,
        lambda: (
            f"int8_ops.{op}: expected q of shape [B, H, q_len, d] with q_len from 1 to "
            f"{MAX_DECODE_QUERIES} and an even d, got {list(q.shape)}"
        ),
    )
    check_latent_stream(op, "k", k, q)
    check_latent_stream(op, "v", v, q)
    a_k, a_v = k.a[0], v.a[0]
    kv_heads = a_k.shape[0] * a_k.shape[1] // q.shape[3]
    torch._check(
        k.q[0].shape[:3] == v.q[0].shape[:3]
        and a_k.shape[1] == a_v.shape[1]
        and q.shape[1] % kv_heads == 0,
        lambda: (
            f"int8_ops.{op}: expected k and v of the same B, G, S and heads, which divide q's "
            f"{q.shape[1]}, got latents {list(k.q[0].shape)} and {list(v.q[0].shape)}, A "
            f"{list(a_k.shape)} and {list(a_v.shape)}"
        ),
    )
    check_dtype(op, "inv_freq", inv_freq, torch.float32)
    torch._check(
        inv_freq.dim() == 1 and inv_freq.shape[0] == q.shape[3] // 2,
        lambda: (
            f"int8_ops.{op}: expected inv_freq of shape [{q.shape[3] // 2}], got "
            f"{list(inv_freq.shape)}"
        ),
    )
    check_same_device(op, "inv_freq", inv_freq, q, "q")
    for name, numbers in (("start", start), ("length", length), ("origin", origin)):
        if numbers is None:
            continue
        _check_row_numbers(op, name, numbers, q)
    torch._check(
        window is None or window >= 1,
        lambda: f"int8_ops.{op}: expected a window of at least 1, got {window}",
    )


def check_append_stream(
    op: str,
    name: str,
    x: Tensor,
    like: Tensor,
    bits: Sequence[int],
    buffers: Sequence[Tensor],
    scales: Sequence[Tensor],
) -> None:
    """New latents ``[B, G, n, rank]`` and the buffers and scales that they go to, a slice each."""
    check_float(op, name, x.dtype)
    torch._check(
        x.dim() == 4,
        lambda: f"int8_ops.{op}: expected {name} of shape [B, G, n, rank], got {list(x.shape)}",
    )
    torch._check(
        1 <= len(bits) <= MAX_SLICES and len(buffers) == len(scales) == len(bits),
        lambda: (
            f"int8_ops.{op}: expected 1 to {MAX_SLICES} slices of {name}, each with bits, a buffer "
            f"and scales, got {len(bits)}, {len(buffers)} and {len(scales)}"
        ),
    )
    rank = 0
    for width, q, scale in zip(bits, buffers, scales, strict=True):
        _check_append_slice(op, name, x, like, width, q, scale)
        rank += q.shape[3] * (8 // width)
    torch._check(
        rank == x.shape[3],
        lambda: (
            f"int8_ops.{op}: expected buffers for the {x.shape[3]} numbers of {name}, got some for "
            f"{rank}"
        ),
    )


def _check_append_slice(
    op: str, name: str, x: Tensor, like: Tensor, bits: int, q: Tensor, scale: Tensor
) -> None:
    torch._check(
        bits in (4, 8),
        lambda: f"int8_ops.{op}: expected bits of {name} of 8 or 4, got {bits}",
    )
    check_dtype(op, "a buffer", q, torch.int8)
    check_dtype(op, "a buffer's scale", scale, torch.float32)
    check_same_device(op, "a buffer", q, like, "k")
    check_same_device(op, "a buffer's scale", scale, like, "k")
    torch._check(
        q.dim() == 4 and q.shape[:2] == x.shape[:2] and scale.shape == q.shape[:3],
        lambda: (
            f"int8_ops.{op}: expected buffers [B, G, S, width] and scales [B, G, S] for {name} "
            f"{list(x.shape)}, got {list(q.shape)} and {list(scale.shape)}"
        ),
    )
    torch._check(
        q.stride(3) == 1 and scale.stride(2) == 1,
        lambda: f"int8_ops.{op}: expected buffers of {name} whose last dimension is contiguous",
    )


def check_latent_append(
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
    """The arguments of ``latent_append``."""
    op = "latent_append"
    check_append_stream(op, "k", k, k, k_bits, k_q, k_scale)
    check_append_stream(op, "v", v, k, v_bits, v_q, v_scale)
    check_same_device(op, "v", v, k, "k")
    room = k_q[0].shape[2]
    torch._check(
        k.shape[:3] == v.shape[:3] and all(q.shape[2] == room for q in (*k_q, *v_q)),
        lambda: (
            f"int8_ops.{op}: expected k and v of the same B, G, n and S, got {list(k.shape)} and "
            f"{list(v.shape)} for buffers {list(k_q[0].shape)} and {list(v_q[0].shape)}"
        ),
    )
    check_dtype(op, "slots", slots, torch.int64)
    check_same_device(op, "slots", slots, k, "k")
    torch._check(
        list(slots.shape) == [k.shape[2]],
        lambda: f"int8_ops.{op}: expected slots of shape [{k.shape[2]}], got {list(slots.shape)}",
    )
