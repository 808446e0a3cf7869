"""Decoding straight from the integers: when the fused kernel attends, and what it is told.

A pass of few new tokens takes ``latent_attention_decode``, which never writes a key or a value,
where ``why_general`` finds nothing against it; every other pass takes the general path
(``attention.attend``), which rebuilds them.

Note [Rows of a cache]
The kernel knows of a row where its tokens begin, how many slots are in use, and the position of
slot 0. That says all of a mask that is causal, hides padding on the left and perhaps what lies
before a window; and all of positions that count up by one. Whether a pass is of that kind is read
from its mask and its positions, once a pass. A compiled graph can't branch on what they hold: it
takes the kernel where the last pass outside of a graph was of that kind, and asserts that this one
is, on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _extension, backends
from .._checks import FLOATS, MAX_DECODE_QUERIES, MAX_SLICES
from ..backends import triton
from ..reference import LatentStream
from .packing import Stored

if TYPE_CHECKING:
    from .attention import LatentAttention, LatentProjection

__all__ = ["CHOICES", "FROM_TOKENS", "Rows", "attend_integers", "read_rows", "why_general"]

# From how many cached tokens on the kernel is the faster one, by device and instruction set or
# architecture; None: nowhere, or not measured. benchmarks/bench_decode.py measures it.
FROM_TOKENS: dict[tuple[str, str], int | None] = {
    ("cpu", "avx512_vnni"): 0,
    ("cpu", "avx2"): 128,
    ("cpu", "portable"): None,
    # A layer's step takes 20 us at 4k tokens, the general path's kernels several times that; below,
    # it is one launch or two against a dozen, and has not been timed.
    ("cuda", "sm90"): 0,
    ("cuda", ""): None,
}
CHOICES = ("auto", "kernel", "general")
# RoPE whose frequencies follow the length of the sequence: a key rebuilt later would be rotated by
# other ones than those it was first seen with.
MOVING_ROPE = ("dynamic", "longrope")


class Rows(NamedTuple):
    """What the kernel is told of each row, int32 ``[B]``: see Note [Rows of a cache]."""

    start: Tensor
    length: Tensor
    origin: Tensor


class Reading(NamedTuple):
    """Rows, and whether mask and positions are what they say: a bool tensor."""

    rows: Rows
    regular: Tensor


def _cpu_isa() -> str:
    """The instruction set in use; "" where a call of an op will tell what is wrong."""
    module = _extension.build_info.module
    try:
        return "" if module is None else str(module.cpu_isa())
    except RuntimeError:
        return ""


# Once: a compiler can't trace the call.
CPU_ISA = _cpu_isa()


# "sm90" or "", by the number of the device; a pass outside of a graph fills it in.
CUDA_KINDS: dict[int, str] = {}


def from_tokens(device: torch.device) -> int | None:
    """``FROM_TOKENS`` of a device, for this process."""
    if device.type == "cpu":
        kind = CPU_ISA
    elif device.type == "cuda" and device.index is not None:
        if device.index not in CUDA_KINDS and not torch.compiler.is_compiling():
            hopper = torch.cuda.get_device_capability(device) == (9, 0)
            CUDA_KINDS[device.index] = "sm90" if hopper else ""
        kind = CUDA_KINDS.get(device.index, "")
    else:
        kind = ""
    return FROM_TOKENS.get((device.type, kind))


def rope_of(rotary_emb: nn.Module) -> tuple[Tensor, float] | None:
    """RoPE's inverse frequencies and its factor; None where they change with the text."""
    rope_type = getattr(rotary_emb, "rope_type", "default")
    inv_freq = getattr(rotary_emb, "inv_freq", None)
    if any(name in rope_type for name in MOVING_ROPE) or not isinstance(inv_freq, Tensor):
        return None
    return inv_freq, float(getattr(rotary_emb, "attention_scaling", 1.0))


def why_general(
    module: LatentAttention, query: Tensor, tokens: int, options: dict[str, Any]
) -> str | None:
    """What keeps a module from the kernel whatever the mask, in words; None where nothing does.

    Args:
        module: the attention module; its ``decode`` is one of ``CHOICES``.
        query: ``[B, H, q, d]``.
        tokens: slots of the cache that the pass may look at.
        options: what the attention function would be called with.
    """
    device = query.device.type
    slices = (*module.spec.k, *module.spec.v)
    if module.decode == "general":
        return "asked for"
    if device not in backends.ATTENTION:
        return f"no kernel for {device}"
    backend = backends.ATTENTION[device][0] if module.backend == "auto" else module.backend
    if backend not in backends.ATTENTION[device]:
        return f"the backend asked for is {module.backend}"
    if backend in backends.NATIVE and not _extension.covers(device):
        return f"no kernel for {device}"
    if backend == "triton" and query.shape[3] not in triton.HEAD_SIZES:
        return f"heads of {query.shape[3]}"
    if module.config._attn_implementation != "sdpa" or not module.absorbs(options):
        return "not plain scaled_dot_product_attention"
    if any(part.bits == 16 for part in slices):
        return "latents in 16 bits"
    if max(len(module.spec.k), len(module.spec.v)) > MAX_SLICES:
        return f"more than {MAX_SLICES} slices"
    if query.dtype not in FLOATS or query.shape[3] % 2:
        return f"queries of {query.dtype}, heads of {query.shape[3]}"
    if torch.is_grad_enabled() and query.requires_grad:
        return "a gradient is recorded"
    if rope_of(module.rotary_emb) is None:
        return "RoPE that changes with the length"
    return too_few(module, query, tokens)


def too_few(module: LatentAttention, query: Tensor, tokens: int) -> str | None:
    """Of ``why_general``, what is a matter of the number of slots."""
    if tokens <= query.shape[2]:
        return "nothing was cached before"
    if module.decode == "kernel":
        return None
    least = from_tokens(query.device)
    if least is None:
        return f"not measured to be faster on this {query.device.type} device"
    return f"below {least} tokens" if tokens < least else None


def read_rows(
    positions: Tensor,
    length: Any,
    mask: Tensor | None,
    window: int | None,
    batch: int,
    queries: int,
) -> Reading | None:
    """A pass's rows, after its first layer has stored its tokens; None if the mask can't tell.

    Args:
        positions: int32 ``[B or 1, S]``, of the slots.
        length: of these in use; a tensor in a compiled graph, and then all of this stays one.
        mask: None, or ``[B or 1, 1, queries, >= S]``, True where to attend.
        window: slots that a query sees.
        batch: rows.
        queries: new tokens a row; of more than the kernel takes, the last ones are looked at.
    """
    device, size = positions.device, positions.shape[1]
    slots = torch.arange(size, device=device)
    last = (positions * (slots == length - 1)).sum(-1)
    origin = (last - (length - 1)).expand(batch)
    if mask is None:
        # A query sees all slots, or each of as many as there are tokens its predecessors.
        if isinstance(length, Tensor) or (queries > 1 and queries != length):
            return None
        if window is not None and length > window:
            return None
        start = torch.zeros(batch, dtype=torch.int64, device=device)
        regular = torch.ones((), dtype=torch.bool, device=device)
    else:
        if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1:
            return None
        checked = min(queries, MAX_DECODE_QUERIES)
        given = mask[:, 0, -checked:, :size].to(device).expand(batch, -1, -1)
        own = length - checked + torch.arange(checked, device=device)[:, None]
        # What hides the first slots may be the window; padding shows in the positions as well.
        # No argmax: beside the reductions below Inductor fails on it (torch 2.11 to 2.14, one row
        # of more than 8192 slots). A query that sees nothing counts from slot 0.
        first = torch.where(given[:, 0], slots, size).amin(-1) % size
        start = first if window is None else (-origin).clamp(min=0)
        seen = (slots >= start[:, None, None]) & (slots <= own)
        if window is not None:
            seen = seen & (slots > own - window)
        regular = (given == seen).all()
    counts_up = positions == origin[:, None] + slots
    regular = regular & (counts_up | (slots < start[:, None]) | (slots >= length)).all()
    lengths = torch.zeros_like(start) + length
    return Reading(Rows(*(t.to(torch.int32) for t in (start, lengths, origin))), regular)


def _stream(stored: Sequence[Stored], projection: LatentProjection) -> LatentStream:
    scales = [scale for _, scale in stored if scale is not None]
    pieces = projection.pieces()
    return LatentStream(
        [q for q, _ in stored],
        scales,
        [piece.A_int8 for piece in pieces],
        [piece.A_scale for piece in pieces],
        projection.bias,
    )


def attend_integers(
    module: LatentAttention,
    query: Tensor,
    stored: tuple[Sequence[Stored], Sequence[Stored]],
    a_k: LatentProjection,
    a_v: LatentProjection,
    rows: Rows,
    scaling: float,
) -> Tensor:
    """The kernel, called with what ``attend`` has: ``query [B, H, q, d]`` -> ``[B, q, H, d]``."""
    rope = rope_of(module.rotary_emb)
    assert rope is not None
    return backends.latent_attention_decode(
        query,
        _stream(stored[0], a_k),
        _stream(stored[1], a_v),
        rope[0].to(query.device, torch.float32),
        rows.start,
        rows.length,
        scaling,
        rows.origin,
        rope[1],
        module.sliding_window,
        module.backend,
    )
