"""Launches the kernels of ``latent_attention_decode``: buffers, tiles and grids.

Sizes come from shapes alone, never from lengths, so that a launch can be captured in a CUDA graph.
"""

# mypy: disable-error-code="no-untyped-call, misc"

from __future__ import annotations

import torch
from torch import Tensor

from ...reference import LatentStream
from . import attention_kernels as kernels
from .configs import next_power_of_2
from .launch import INTERPRETED, _on

# Tokens of a split: what one program sums, and the unit that the combination folds.
SPLIT = 512
BLOCK_T = 64
# From 64 rows on products would be other instructions': see Note [A row alone].
MAX_BLOCK_M = 32
MAX_BLOCK_R = 128
NUM_WARPS = 4


def _block(size: int, least: int, most: int) -> int:
    return min(max(next_power_of_2(size), least), most)


def _laid_out(t: Tensor) -> Tensor:
    """``t``, copied where its last dimension is not contiguous."""
    return t if t.stride(-1) == 1 else t.contiguous()


def decode(
    q: Tensor,
    k: LatentStream,
    v: LatentStream,
    inv_freq: Tensor,
    start: Tensor,
    length: Tensor,
    origin: Tensor | None,
    scaling: float,
    window: int | None,
) -> Tensor:
    """Checked arguments -> ``[B, q_len, H, d]``; RoPE's factor is in ``scaling``."""
    batch, heads, q_len, size = q.shape
    groups, capacity = k.q[0].shape[1:3]
    kv_heads = groups * k.a[0].shape[1] // size
    repeats = heads // kv_heads
    rows, group_rows = repeats * q_len, heads // groups * q_len
    tiles, splits = -(-capacity // BLOCK_T), -(-capacity // SPLIT)
    padded = tiles * BLOCK_T
    out = q.new_empty((batch, q_len, heads, size))

    def buffer(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    cos, sin = buffer(size // 2, BLOCK_T), buffer(size // 2, BLOCK_T)
    scores = buffer(batch * kv_heads, rows, padded)
    columns = sum(a.shape[-1] for a in v.a)
    sums = buffer(batch * groups, splits, group_rows, columns)
    most, total = buffer(batch * groups, splits, group_rows), buffer(*sums.shape[:3])
    parts = buffer(*out.shape) if len(v.q) > 1 else out
    # What that rounds: see _dot().
    precision = {torch.float16: "tf32"}.get(q.dtype, "ieee")
    numbers = {"BFLOAT16": q.dtype == torch.bfloat16, "PRECISION": precision}
    common = {
        "NATIVE_BFLOAT16": not INTERPRETED,
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": False,
    }
    q = _laid_out(q)
    start, length = start.contiguous(), length.contiguous()
    origin = None if origin is None else origin.contiguous()
    inv_freq = inv_freq.contiguous()

    with _on(q.device):
        kernels.offsets_kernel[(size // 2,)](
            inv_freq, cos, sin, BLOCK_T=BLOCK_T, HALF=size // 2, enable_fp_fusion=False
        )
        block_m = _block(rows, 16, MAX_BLOCK_M)
        for i, (latent, scale, a, a_scale) in enumerate(k.slices()):
            latent, scale = _laid_out(latent), _laid_out(scale)
            width = latent.shape[-1]
            kernels.scores_kernel[(tiles, batch * kv_heads, -(-rows // block_m))](
                q,
                latent,
                scale,
                a.contiguous(),
                a_scale.contiguous(),
                None if k.bias is None or i > 0 else k.bias.contiguous(),
                inv_freq,
                cos,
                sin,
                start,
                length,
                origin,
                scores,
                scaling,
                window or 0,
                *q.stride()[:3],
                *latent.stride()[:3],
                *scale.stride()[:2],
                capacity,
                kv_heads,
                groups,
                repeats,
                q_len,
                a.shape[-1],
                width,
                padded,
                ADD=i > 0,
                PACKED=width != a.shape[-1],
                HALF=size // 2,
                BLOCK_M=block_m,
                BLOCK_T=BLOCK_T,
                BLOCK_K=_block(width, 32, 128),
                **numbers,
                **common,
            )
        block_m = _block(group_rows, 16, MAX_BLOCK_M)
        row_blocks = -(-group_rows // block_m)
        column = 0
        for latent, scale, a in zip(v.q, v.scale, v.a, strict=True):
            latent, scale = _laid_out(latent), _laid_out(scale)
            width = latent.shape[-1]
            block_r = _block(width, 16, MAX_BLOCK_R)
            kernels.sums_kernel[(splits, batch * groups * row_blocks, -(-width // block_r))](
                scores,
                latent,
                scale,
                start,
                length,
                sums,
                most,
                total,
                window or 0,
                *latent.stride()[:3],
                *scale.stride()[:2],
                capacity,
                groups,
                group_rows,
                q_len,
                width,
                padded,
                splits,
                columns,
                column,
                PACKED=width != a.shape[-1],
                SPLIT=SPLIT,
                BLOCK_M=block_m,
                BLOCK_T=BLOCK_T,
                BLOCK_R=block_r,
                **numbers,
                **common,
            )
            column += a.shape[-1]
        column = 0
        for i, (a, a_scale) in enumerate(zip(v.a, v.a_scale, strict=True)):
            kernels.combine_kernel[(batch * kv_heads, rows)](
                sums,
                most,
                total,
                a.contiguous(),
                a_scale.contiguous(),
                None if v.bias is None else v.bias.contiguous(),
                start,
                length,
                parts,
                out,
                capacity,
                kv_heads,
                groups,
                repeats,
                q_len,
                a.shape[-1],
                splits,
                columns,
                column,
                ADD=i > 0,
                LAST=i == len(v.a) - 1,
                SPLIT=SPLIT,
                SIZE=size,
                BLOCK_R=_block(a.shape[-1], 16, 64),
                **common,
            )
            column += a.shape[-1]
    return out
