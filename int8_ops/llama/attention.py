"""Attention over a latent cache: one module for every family, and the function that attends.

``LatentAttention`` stands where a decoder layer's ``self_attn`` stood. Its ``k_proj`` and
``v_proj`` are ``LatentProjection``: ``BLinear`` makes a token's latent, which the cache keeps as
integers; the int8 matrices A rebuild keys or values from those integers, exactly
(``int8_scaled_mm``).

Note [Pair-shared scales]
The int8 A of the keys has one scale for each pair of rows that RoPE turns into each other, (i, i +
d/2). A rotation of the pair commutes with a common factor, so a kernel that scores q against
rebuilt keys may fold A's scales into q once, before the rotation, and work on bare integers after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import backends
from ..quantizer import INT8Quantizer, Quantizer, StraightThrough
from . import decode
from .packing import Stored, dequantize_slice, integers_of, quantize_stream
from .rounding import round_with_feedback
from .spec import LayerSpec, Slice, StreamSpec, stream_rank

__all__ = ["LatentAttention", "LatentProjection", "attend"]


class LatentSlice(nn.Module):
    """A for one slice of a latent: int8 ``[G, out, rank]`` with scales ``[G, out, 1]``, or floats.

    The float32 scales are held as their bits, in the int32 buffer ``A_scale_bits``: ``.half()``,
    and loaders that cast every floating tensor of a checkpoint to the model's dtype, leave
    integers alone. ``A_scale`` is a view of it.

    Args:
        part: bits and rank.
        floats: a float A, in the parameter ``weight`` ``[G, out, rank]``.
        groups: G.
        out: outputs a group, heads times head size.
        device: as for nn.Linear.
        dtype: of a float A.
    """

    A_int8: Tensor
    A_scale_bits: Tensor

    def __init__(
        self,
        part: Slice,
        floats: bool,
        groups: int,
        out: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Zeros; see ``set_matrix``."""
        super().__init__()
        self.part, self.floats = part, floats
        shape = (groups, out, part.rank)
        if floats:
            self.weight = nn.Parameter(
                torch.zeros(shape, device=device, dtype=dtype), requires_grad=False
            )
            return
        self.register_buffer("A_int8", torch.zeros(shape, dtype=torch.int8, device=device))
        self.register_buffer(
            "A_scale_bits", torch.zeros((groups, out, 1), dtype=torch.int32, device=device)
        )

    @property
    def A_scale(self) -> Tensor:
        """float32 ``[G, out, 1]``."""
        return self.A_scale_bits.view(torch.float32)

    def extra_repr(self) -> str:
        """Bits and rank."""
        return f"bits={self.part.bits}, rank={self.part.rank}"

    @torch.no_grad()
    def set_matrix(
        self, matrix: Tensor, head_dim: int | None, moment: Tensor | None = None
    ) -> None:
        """Take A, floating ``[G, out, rank]``; with ``head_dim``, RoPE pairs share a scale.

        With the latents' second moment ``[G, rank, rank]``, roundings make up for each other.
        """
        if self.floats:
            self.weight.copy_(matrix)
            return
        for group, rows in enumerate(matrix.float()):
            q, scale = quantize_pairs(rows, head_dim) if head_dim else _per_channel(rows)
            if moment is not None:
                q = round_with_feedback(rows, scale, moment[group])
            self.A_int8[group].copy_(q)
            self.A_scale[group].copy_(scale)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """A as floats ``[G, out, rank]``."""
        if self.floats:
            return self.weight.to(dtype)
        return (self.A_int8.to(torch.float32) * self.A_scale).to(dtype)


def _per_channel(rows: Tensor) -> tuple[Tensor, Tensor]:
    return INT8Quantizer.quantize_per_channel(rows.contiguous())


def quantize_pairs(rows: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """int8 with one scale for each RoPE pair of rows, see Note [Pair-shared scales].

    Args:
        rows: float32 ``[heads * head_dim, rank]``.
        head_dim: even.

    Returns:
        int8 ``[heads * head_dim, rank]`` and float32 ``[heads * head_dim, 1]``, in which rows i and
        i + head_dim/2 of a head are equal.
    """
    heads, rank = rows.shape[0] // head_dim, rows.shape[1]
    half = head_dim // 2
    pairs = rows.view(heads, 2, half, rank).transpose(1, 2).reshape(heads * half, 2 * rank)
    q, scale = _per_channel(pairs)
    q = q.view(heads, half, 2, rank).transpose(1, 2).reshape(heads * head_dim, rank)
    return q, scale.view(heads, 1, half).expand(heads, 2, half).reshape(heads * head_dim, 1)


class LatentProjection(nn.Module):
    """``x -> latent -> keys (or values)``: what replaces ``k_proj`` and ``v_proj``.

    Args:
        in_features: size of x.
        head_dim: size of a head.
        heads: KV heads.
        groups: each of ``heads / groups`` neighbouring KV heads with a latent of its own.
        spec: how the latent is stored.
        bias: whether the projection has one; it is added to what A rebuilds.
        pairs: whether RoPE pairs share A's scales (keys).
        flow: as in ``LayerSpec``.
        backend: ``"auto"`` or a backend's name (``int8_ops.backends``).
        device: as for nn.Linear, meta included.
        dtype: of the float weights.
    """

    def __init__(
        self,
        in_features: int,
        head_dim: int,
        heads: int,
        groups: int,
        spec: StreamSpec,
        bias: bool,
        pairs: bool,
        flow: str = "integer",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Zeros of the right shapes; see ``set_factors``."""
        super().__init__()
        self.head_dim, self.heads, self.groups = head_dim, heads, groups
        self.spec, self.pairs = spec, pairs
        self.backend = backends.check_name(backend)
        self.rank = stream_rank(spec)
        self.BLinear = nn.Linear(
            in_features, groups * self.rank, bias=False, device=device, dtype=dtype
        )
        out = heads // groups * head_dim
        # In the seed flow values have an int8 A beside float latents, keys a float one.
        self.fake = Quantizer(n_bits=8) if flow == "seed" else None
        self.slices = nn.ModuleList(
            LatentSlice(
                part, part.bits == 16 and (pairs or flow != "seed"), groups, out, device, dtype
            )
            for part in self.spec
        )
        self.bias = (
            nn.Parameter(torch.zeros(heads * head_dim, device=device, dtype=dtype))
            if bias
            else None
        )

    @torch.no_grad()
    def set_factors(
        self, b: Tensor, a: Tensor, bias: Tensor | None, moments: Sequence[Tensor] | None = None
    ) -> None:
        """Take B ``[G, rank, in]``, A ``[G, out, rank]``, and the bias of the projection.

        ``moments``: of each slice's latents, ``[G, rank, rank]``, to round A by.
        """
        self.BLinear.weight.copy_(b.flatten(0, 1))
        for i, (piece, columns) in enumerate(zip(self.pieces(), self._split(a), strict=True)):
            moment = None if moments is None else moments[i]
            piece.set_matrix(columns, self.head_dim if self.pairs else None, moment)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def _split(self, t: Tensor) -> Sequence[Tensor]:
        pieces: Sequence[Tensor] = t.split([part.rank for part in self.spec], dim=-1)
        return pieces

    def pieces(self) -> list[LatentSlice]:
        """The slices' A, in order."""
        return cast("list[LatentSlice]", list(self.slices))

    def latent(self, x: Tensor) -> Tensor:
        """``x [B, q, in]`` -> ``[B, G, q, rank]``."""
        y: Tensor = self.BLinear(x)
        y = y.view(*x.shape[:-1], self.groups, self.rank).transpose(1, 2)
        return y if self.fake is None else self.fake(y)

    def rebuild(self, stored: Sequence[Stored], dtype: torch.dtype) -> Tensor:
        """Keys or values of stored tokens: ``[B, heads, S, head_dim]`` in ``dtype``."""
        group_bias = None if self.bias is None else self.bias.view(self.groups, -1)
        rebuilt = []
        for group in range(self.groups):
            parts = []
            for i, (piece, (q, scale)) in enumerate(zip(self.pieces(), stored, strict=True)):
                # Added once, with the first slice.
                bias = group_bias[group] if group_bias is not None and i == 0 else None
                # One slice is rounded once, to dtype; several are summed in float32 before that.
                out_dtype = dtype if len(stored) == 1 else torch.float32
                parts.append(self._product(piece, group, q[:, group], scale, bias, out_dtype))
            rebuilt.append(_total(parts, dtype))
        y = rebuilt[0] if self.groups == 1 else torch.cat(rebuilt, dim=-1)
        return y.view(*y.shape[:-1], self.heads, self.head_dim).transpose(1, 2)

    def _product(
        self,
        piece: LatentSlice,
        group: int,
        q: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """``[B, S, width]`` of one slice -> ``[B, S, out]``."""
        if scale is None and not piece.floats:
            return backends.int8_linear(
                q, piece.A_int8[group], piece.A_scale[group], bias, dtype, self.backend
            )
        if scale is None:
            weight = piece.weight[group].to(q.dtype)
            return F.linear(q, weight, None if bias is None else bias.to(q.dtype)).to(dtype)
        return backends.int8_scaled_mm(
            integers_of(q, piece.part),
            piece.A_int8[group],
            scale[:, group, :, None],
            piece.A_scale[group],
            bias,
            dtype,
            self.backend,
        )

    def rebuild_with_gradient(self, latent: Tensor, stored: Sequence[Stored]) -> Tensor:
        """As ``rebuild`` of what ``latent [B, G, S, rank]`` was stored as, straight-through for it.

        In floats of latent's dtype: integers pass no gradient, and without this the gradient would
        end here without a word. B and the bias get theirs; A is int8 and gets none.
        """
        floats = [
            dequantize_slice(one, part, latent.dtype)
            for one, part in zip(stored, self.spec, strict=True)
        ]
        rounded: Tensor = StraightThrough.apply(latent, torch.cat(floats, dim=-1))
        a = torch.cat([piece.matrix(latent.dtype) for piece in self.pieces()], dim=-1)
        y = torch.matmul(rounded, a.transpose(-1, -2)).transpose(1, 2).flatten(2)
        y = y if self.bias is None else y + self.bias
        return y.view(*y.shape[:-1], self.heads, self.head_dim).transpose(1, 2)

    def extra_repr(self) -> str:
        """Shapes."""
        return f"heads={self.heads}, head_dim={self.head_dim}, groups={self.groups}"


def _total(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The sum of float32 parts, rounded once to ``dtype``; a single part as it is."""
    if len(parts) == 1:
        return parts[0]
    total, last = parts[0], parts[-1]
    for part in parts[1:-1]:
        total = total + part
    if torch.compiler.is_compiling() or total.requires_grad or last.requires_grad:
        # A compiler fuses these by itself, and out= passes no gradient.
        return (total + last).to(dtype)
    # The same bits in one pass instead of two.
    return torch.add(total, last, out=torch.empty_like(total, dtype=dtype))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: ``x [B, H, S, d]``, ``cos`` and ``sin [B or 1, S, d]`` (Su et al., 2021, RoFormer)."""
    cos, sin = cos[:, None], sin[:, None]
    half = x.shape[-1] // 2
    # With a long history, rotating its keys is most of what a decode step moves.
    if torch.compiler.is_compiling():
        # One kernel of four loads: a flip is arithmetic on indices, halves would be masked.
        partner = x.view(*x.shape[:-1], 2, half).flip(-2).flatten(-2)
        first = torch.arange(2 * half, device=x.device) < half
        return x * cos + partner * torch.where(first, -sin, sin)
    # Half the bytes of the usual x * cos + cat(-second, first) * sin, and a rounding less.
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return y


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention that returns its weights; arguments and results as transformers' interface has."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def attend(
    module: LatentAttention,
    query: Tensor,
    stored: tuple[Sequence[Stored], Sequence[Stored]],
    a_k: LatentProjection,
    a_v: LatentProjection,
    rotary: tuple[Tensor, Tensor],
    mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend to stored latents, with any mask and positions: the general path.

    Keys are rebuilt from the integers for this pass and dropped; nothing is quantized. So are
    values, unless there is one query: then the probabilities are applied to the latents, and A to
    what comes of that (``attend_one``), which is a fraction of the work.

    Args:
        module: the attention module, for transformers' interface.
        query: floating ``[B, H, q, d]``, rotated.
        stored: keys and values of all S tokens as the cache has them, a ``Stored`` a slice.
        a_k: rebuilds keys; its A and scales.
        a_v: rebuilds values.
        rotary: cos and sin ``[B or 1, S, d]`` of the cached tokens.
        mask: as transformers makes it for the implementation in use, of S slots or more.
        kwargs: passed on to it.

    Returns:
        ``[B, q, H, d]``, and the weights ``[B, H, q, S]`` where the implementation has them.
    """
    key = rotate(a_k.rebuild(stored[0], query.dtype), *rotary)
    if isinstance(mask, Tensor):
        mask = mask[..., : key.shape[2]]
    if query.shape[2] == 1 and module.absorbs(kwargs):
        output, weights = attend_one(query, key, stored[1], a_v, mask, kwargs["scaling"])
        told = module.config._attn_implementation == "eager"
        return output, weights.to(query.dtype) if told else None
    value = a_v.rebuild(stored[1], query.dtype)
    return module.interface()(module, query, key, value, mask, **kwargs)


def attend_one(
    query: Tensor,
    key: Tensor,
    stored: Sequence[Stored],
    a_v: LatentProjection,
    mask: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Attend with one query a row, without rebuilding values.

    ``sum_t p_t (A s_t l_t) = A sum_t (p_t s_t) l_t``: a token's scale goes into its probability,
    and the bias passes through, for probabilities sum to 1.

    Args:
        query: floating ``[B, H, 1, d]``.
        key: ``[B, heads, S, d]``, rotated.
        stored: the values of all S tokens.
        a_v: what would rebuild them.
        mask: None, or ``[B, 1, 1, S]``: what to add to the scores, or True where to attend.
        scaling: of the scores.

    Returns:
        ``[B, 1, H, d]`` and the weights, float32 ``[B, H, 1, S]``.
    """
    batch, heads, _, size = query.shape
    groups, together = a_v.groups, heads // a_v.groups
    repeats = heads // key.shape[1]
    # The scale goes to the query: a pass over the scores less, and a rounding of them.
    scores = scores_of_one(query * scaling, key)
    if mask is not None:
        chosen = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if chosen else scores.float() + mask
    weights = scores.softmax(dim=-1, dtype=torch.float32)
    grouped = weights.view(batch, groups, together, -1)
    total: Tensor | None = None
    for piece, (q, scale) in zip(a_v.pieces(), stored, strict=True):
        latents = integers_of(q, piece.part).to(query.dtype)
        scaled = grouped if scale is None else grouped * scale[:, :, None]
        mixed = torch.matmul(scaled.to(query.dtype), latents)  # [B, G, H / G, rank]
        # Each query head takes the rows of A that belong to its KV head.
        a = piece.matrix(query.dtype).view(groups, -1, size, piece.part.rank)
        mixed = mixed.view(batch, groups, -1, repeats, piece.part.rank)
        part = torch.matmul(mixed, a.transpose(-1, -2))
        total = part if total is None else total + part
    assert total is not None
    output = total.reshape(batch, 1, heads, size)
    if a_v.bias is not None:
        output = output + a_v.bias.view(-1, 1, size).expand(-1, repeats, -1).reshape(heads, size)
    return output, weights


def scores_of_one(query: Tensor, key: Tensor) -> Tensor:
    """``query [B, H, 1, d]`` against ``key [B, heads, S, d]``: ``[B, H, 1, S]``.

    Rebuilt keys lie token by token, ``[B, S, heads, d]``. One row is a batch of products over its
    heads; several would have to be copied for that, so each row is one product over all heads, with
    zeros in a query for the heads that aren't its own: the same bytes, which are what takes time.
    """
    batch, heads, size = query.shape[0], query.shape[1], query.shape[3]
    kv_heads = key.shape[1]
    query = query.view(batch, kv_heads, -1, size)
    if batch == 1:
        return torch.matmul(query, key.transpose(2, 3)).view(batch, heads, 1, -1)
    spread = query.new_zeros((batch, kv_heads, query.shape[2], kv_heads, size))
    spread.diagonal(dim1=1, dim2=3).copy_(query.permute(0, 2, 3, 1))
    tokens = key.transpose(1, 2).flatten(2)
    return torch.bmm(spread.view(batch, heads, -1), tokens.transpose(1, 2)).unsqueeze(2)


class LatentAttention(nn.Module):
    """Attention whose KV cache holds latents. Families subclass it with their own class.

    It takes over ``q_proj`` and ``o_proj`` of the module it replaces. Without a cache the latents
    are quantized and rebuilt all the same, so that a pass without one equals a pass with one.

    Args:
        original: the family's attention module, or its skeleton on meta.
        spec: how the latents are stored.
        rotary_emb: the model's rotary embedding; referred to, not owned.
        backend: ``"auto"`` or a backend's name (``int8_ops.backends``).

    Attributes:
        decode: of passes of few new tokens through a cache, ``"auto"``: whichever path was measured
            to be faster (``decode.FROM_TOKENS``); ``"kernel"``: the fused kernel wherever it can;
            ``"general"``: never.
    """

    def __init__(
        self, original: nn.Module, spec: LayerSpec, rotary_emb: nn.Module, backend: str = "auto"
    ) -> None:
        """See the class."""
        nn.Module.__init__(self)
        config: Any = original.config
        self.config = config
        self.layer_idx: int = original.layer_idx  # type: ignore[assignment]
        self.spec, self.backend = spec, backends.check_name(backend)
        self.decode = "auto"
        k_proj: Any = original.k_proj
        self.head_dim: int = original.head_dim  # type: ignore[assignment]
        self.num_kv_heads = k_proj.out_features // self.head_dim
        self.num_key_value_groups: int = original.num_key_value_groups  # type: ignore[assignment]
        self.scaling: float = original.scaling  # type: ignore[assignment]
        self.attention_dropout: float = original.attention_dropout  # type: ignore[assignment]
        self.is_causal = True
        self.sliding_window = _sliding_window(original)
        self.q_proj, self.o_proj = original.q_proj, original.o_proj
        for name, stream, pairs in (("k_proj", spec.k, True), ("v_proj", spec.v, False)):
            linear = getattr(original, name)
            projection = LatentProjection(
                linear.in_features,
                self.head_dim,
                self.num_kv_heads,
                spec.groups,
                stream,
                bias=linear.bias is not None,
                pairs=pairs,
                flow=spec.flow,
                backend=backend,
                device=linear.weight.device,
                dtype=linear.weight.dtype,
            )
            setattr(self, name, projection)
        self.set_rotary(rotary_emb)
        self.train(original.training)

    def set_rotary(self, rotary_emb: nn.Module) -> None:
        """Refer to the model's rotary embedding: in a tuple, so that it is not a child of this."""
        self._rotary_emb = (rotary_emb,)

    @property
    def rotary_emb(self) -> nn.Module:
        """The model's."""
        return self._rotary_emb[0]

    def absorbs(self, options: dict[str, Any]) -> bool:
        """Whether a step may go around transformers' attention function: plain softmax attention.

        Values that were quantized again after they were stored (the seed flow) have to be rebuilt.
        """
        return (
            self.config._attn_implementation in ("sdpa", "eager")
            and not options.get("dropout")
            and self.spec.flow == "integer"
        )

    def interface(self) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """transformers' attention function for the model's ``attn_implementation``."""
        name = self.config._attn_implementation
        if name == "eager":
            return eager_attention
        function: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS[name]
        return function

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """``hidden_states [B, q, hidden]`` -> ``[B, q, hidden]`` and weights or None.

        Decoder layers pass the cache as ``cache`` or as ``past_key_values`` (``_cache_names``).

        Raises:
            TypeError: the cache is not a ``LatentCache``.
            ValueError: a cache of another model, of another batch, or a static one that is full.
        """
        shape = hidden_states.shape[:-1]
        q_proj, o_proj = cast(nn.Linear, self.q_proj), cast(nn.Linear, self.o_proj)
        k_proj = cast(LatentProjection, self.k_proj)
        v_proj = cast(LatentProjection, self.v_proj)
        query = q_proj(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)
        query = rotate(query, *position_embeddings)
        k_latent, v_latent = k_proj.latent(hidden_states), v_proj.latent(hidden_states)
        options = {
            "dropout": self.attention_dropout if self.training else 0.0,
            "scaling": self.scaling,
            **kwargs,
        }
        if self.sliding_window is not None:
            options["sliding_window"] = self.sliding_window
        cache = past_key_values if cache is None else cache
        if cache is not None:
            check_cache(cache)
            stored = cache.update(k_latent, v_latent, self.layer_idx, position_ids=position_ids)
            tokens, rows = stored[0][0][0].shape[2], None
            # A graph sees all of a static cache: a pass before it decides what the graph does.
            most = max(tokens, cache.layers[self.layer_idx].get_max_length())
            if decode.why_general(self, query, most, options) is None:
                rows = cache.rows(self.layer_idx, attention_mask, self.sliding_window, query)
                if tokens < most and decode.too_few(self, query, tokens) is not None:
                    rows = None
            if rows is not None:
                output, weights = (
                    decode.attend_integers(
                        self, query, stored, k_proj, v_proj, rows, options["scaling"]
                    ),
                    None,
                )
            else:
                rotary = cache.rotary(self.layer_idx, self.rotary_emb, hidden_states)
                mask = cache.mask_of(
                    self.layer_idx, attention_mask, self.sliding_window, query.shape[2]
                )
                output, weights = attend(
                    self, query, stored, k_proj, v_proj, rotary, mask, **options
                )
        else:
            k_stored = quantize_stream(k_latent, self.spec.k, self.backend)
            v_stored = quantize_stream(v_latent, self.spec.v, self.backend)
            if torch.is_grad_enabled() and (k_latent.requires_grad or v_latent.requires_grad):
                key = rotate(k_proj.rebuild_with_gradient(k_latent, k_stored), *position_embeddings)
                value = v_proj.rebuild_with_gradient(v_latent, v_stored)
                output, weights = self.interface()(
                    self, query, key, value, attention_mask, **options
                )
            else:
                output, weights = attend(
                    self,
                    query,
                    (k_stored, v_stored),
                    k_proj,
                    v_proj,
                    position_embeddings,
                    attention_mask,
                    **options,
                )
        return o_proj(output.reshape(*shape, -1).contiguous()), weights

    def extra_repr(self) -> str:
        """How the latents are stored."""
        told = {
            name: ", ".join(f"{part.rank} in {part.bits} bits" for part in stream)
            for name, stream in (("k", self.spec.k), ("v", self.spec.v))
        }
        return f"layer_idx={self.layer_idx}, k: {told['k']}; v: {told['v']}"


def _sliding_window(original: nn.Module) -> int | None:
    """The window of this layer: Qwen2's modules have it, Mistral's read it from the config."""
    if hasattr(original, "sliding_window"):
        return original.sliding_window  # type: ignore[return-value]
    window: int | None = getattr(original.config, "sliding_window", None)
    return window


def check_cache(cache: Any) -> None:
    """Raises TypeError, with the way out, unless ``cache`` is one of ours."""
    from .cache import LatentCache

    if not isinstance(cache, LatentCache):
        raise TypeError(
            f"this model keeps its history as integer latents and cannot use a "
            f"{type(cache).__name__}: expected an int8_ops.llama.LatentCache(model) or "
            "StaticLatentCache(model, max_cache_len), or no cache argument at all"
        )
