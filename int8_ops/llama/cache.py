"""KV caches that hold latents as integers: ``LatentCache`` grows, ``StaticLatentCache`` does not.

Per layer, stream (keys or values) and slice: ``q`` int8 ``[B, G, S, width]`` (4 bits: two a byte,
``packing``) and ``scale`` float32 ``[B, G, S]``, quantized once, when the tokens arrive. Cached
keys are not rotated, so one int32 position a token is kept for all layers together.

Both are ``Cache`` objects of transformers (4.56 or newer), made by ``generate()`` and by the model
itself where no cache is given; a cache belongs to the model it was made for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from .. import _extension, ops
from .._checks import FLOATS, MAX_DECODE_QUERIES, MAX_SLICES
from .decode import Reading, Rows, read_rows
from .packing import Stored, quantize_stream
from .spec import LayerSpec, StreamSpec, stream_rank

__all__ = ["LatentCache", "LatentLayer", "StaticLatentCache", "StaticLatentLayer"]

# A growing buffer gains room for this many tokens at once: each growth copies what is there.
GROWTH_TOKENS = 256
POSITION_BYTES = 4


@contextlib.contextmanager
def _lasting() -> Iterator[None]:
    """Tensors made here outlive the call: made in inference mode they could not be written later.

    Not while a compiler traces, which neither needs nor follows it.
    """
    if torch.compiler.is_compiling():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def _capacity(tokens: int) -> int:
    return -(-tokens // GROWTH_TOKENS) * GROWTH_TOKENS


def _grown(buffer: Tensor, dim: int, capacity: int) -> Tensor:
    shape = list(buffer.shape)
    shape[dim] = capacity
    new = buffer.new_zeros(shape)
    new.narrow(dim, 0, buffer.shape[dim]).copy_(buffer)
    return new


def _query_length(query: Any) -> int:
    """5.x passes the number of new tokens, 4.x their cache positions."""
    return query if isinstance(query, int) else int(query.shape[0])


class Positions:
    """The RoPE position of every cached token: int32 ``[B or 1, S]``, one row if all rows agree."""

    def __init__(self) -> None:
        """No tokens."""
        self.ids: Tensor | None = None
        self.length = 0

    def append(self, position_ids: Tensor, batch: int) -> None:
        """Add ``position_ids [B or 1, q]``."""
        new = position_ids.to(torch.int32)
        with _lasting():
            if self.ids is None:
                self.ids = new.new_zeros((new.shape[0], 0))
            if self.ids.shape[0] != new.shape[0]:
                self.ids = self.ids.expand(batch, -1).contiguous()
                new = new.expand(batch, -1)
            end = self.length + new.shape[1]
            if end > self.ids.shape[1]:
                self.ids = _grown(self.ids, 1, _capacity(end))
            self.ids[:, self.length : end] = new
        self.length = end

    def view(self) -> Tensor:
        """int32 ``[B or 1, S]``."""
        assert self.ids is not None
        return self.ids[:, : self.length]

    def select(self, choose: Callable[[Tensor], Tensor]) -> None:
        """Apply a choice of rows, unless one row stands for all."""
        if self.ids is not None and self.ids.shape[0] > 1:
            with _lasting():
                self.ids = choose(self.ids)

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        self.length = min(self.length, length)

    def reset(self) -> None:
        """Forget every token."""
        self.ids, self.length = None, 0


class StaticPositions(Positions):
    """The same in a buffer of fixed size; its length is the layers' business."""

    def __init__(self, max_cache_len: int) -> None:
        """Room for ``max_cache_len`` tokens a row."""
        super().__init__()
        self.max_cache_len = max_cache_len

    def initialize(self, batch: int, device: torch.device) -> None:
        """Allocate, once."""
        with _lasting():
            self.ids = torch.zeros((batch, self.max_cache_len), dtype=torch.int32, device=device)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.ids)

    def write(self, position_ids: Tensor, slots: Tensor) -> None:
        """Put ``position_ids [B or 1, q]`` at ``slots [q]``."""
        assert self.ids is not None
        rows = position_ids.to(torch.int32).expand(self.ids.shape[0], -1)
        self.ids.index_copy_(1, slots, rows)

    def view(self) -> Tensor:
        """int32 ``[B, max_cache_len]``; beyond the length, whatever was there."""
        assert self.ids is not None
        return self.ids

    def crop(self, length: int) -> None:
        """Nothing: what lies beyond the length is never looked at."""

    def reset(self) -> None:
        """Zero, in place."""
        if self.ids is not None:
            self.ids.zero_()


class LatentLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a ``LatentCache``.

    Args:
        spec: how its keys and values are stored.
        backend: who quantizes int8, see ``int8_ops.backends``.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    # Nothing can be allocated before the model's ranks meet a batch.
    supports_early_init = False

    def __init__(self, spec: LayerSpec, backend: str = "auto") -> None:
        """Empty; nothing is allocated."""
        super().__init__()
        self.spec = spec
        self.backend = backend
        self.k: list[Stored] = []
        self.v: list[Stored] = []
        self.length = 0
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Take device and batch size from the first latents ``[B, G, S, rank]``."""
        self.device = key_states.device
        self.batch_size = key_states.shape[0]
        self.is_initialized = True

    def _check(self, latent: Tensor, spec: StreamSpec, name: str) -> None:
        expected = (self.spec.groups, stream_rank(spec))
        if latent.dim() != 4 or (latent.shape[1], latent.shape[3]) != expected:
            raise ValueError(
                f"LatentLayer: expected {name} latents [B, {expected[0]}, S, {expected[1]}], got "
                f"{list(latent.shape)}: is this cache used with the model it was made for?"
            )
        if self.is_initialized and latent.shape[0] != self.batch_size:
            raise ValueError(
                f"LatentLayer: the cache holds a batch of {self.batch_size}, got {name} latents of "
                f"a batch of {latent.shape[0]}"
            )

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[list[Stored], list[Stored]]:
        """Quantize and keep new latents.

        Args:
            key_states: floating ``[B, G, q, k rank]``.
            value_states: floating ``[B, G, q, v rank]``.

        Returns:
            The stored keys and values of all tokens so far, a ``Stored`` a slice.

        Raises:
            ValueError: latents of another shape, or of another batch size than is cached.
        """
        self._check(key_states, self.spec.k, "key")
        self._check(value_states, self.spec.v, "value")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        if self.k and self._takes_op(key_states):
            self.k, self.v = self._with_room(self.k, end), self._with_room(self.v, end)
            slots = torch.arange(self.length, end, device=key_states.device)
            self._append_by_op(key_states, value_states, slots)
        else:
            self.k = self._append(self.k, quantize_stream(key_states, self.spec.k, self.backend))
            self.v = self._append(self.v, quantize_stream(value_states, self.spec.v, self.backend))
        self.length = end
        return self.stored()

    def _takes_op(self, latent: Tensor) -> bool:
        """Whether ``latent_append``, one call for both streams, serves these new tokens.

        A compiler has the parts instead, which it may fuse and knows how to write in place.
        """
        device, parts = latent.device.type, (*self.spec.k, *self.spec.v)
        return (
            _extension.covers(device)
            and self.backend in ("auto", device)
            and latent.shape[2] <= MAX_DECODE_QUERIES
            and latent.dtype in FLOATS
            and all(part.bits != 16 for part in parts)
            and max(len(self.spec.k), len(self.spec.v)) <= MAX_SLICES
            and not torch.compiler.is_compiling()
        )

    def _append_by_op(self, k: Tensor, v: Tensor, slots: Tensor) -> None:
        ops.latent_append(
            k.detach(),
            v.detach(),
            slots,
            [part.bits for part in self.spec.k],
            [part.bits for part in self.spec.v],
            *(
                [t for t in tensors if t is not None]
                for buffers in (self.k, self.v)
                for tensors in zip(*buffers, strict=True)
            ),
        )

    def _with_room(self, buffers: list[Stored], end: int) -> list[Stored]:
        if end <= buffers[0][0].shape[2]:
            return buffers
        with _lasting():
            return [
                (
                    _grown(q, 2, _capacity(end)),
                    None if scale is None else _grown(scale, 2, _capacity(end)),
                )
                for q, scale in buffers
            ]

    def _append(self, buffers: list[Stored], new: list[Stored]) -> list[Stored]:
        end = self.length + new[0][0].shape[2]
        with _lasting():
            if not buffers:
                buffers = [
                    (q.new_zeros(_emptied(q)), None if s is None else s.new_zeros(_emptied(s)))
                    for q, s in new
                ]
            buffers = self._with_room(buffers, end)
            for (q, scale), (new_q, new_scale) in zip(buffers, new, strict=True):
                q[:, :, self.length : end] = new_q
                if scale is not None and new_scale is not None:
                    scale[:, :, self.length : end] = new_scale
        return buffers

    def stored(self) -> tuple[list[Stored], list[Stored]]:
        """Views of what is kept, keys and values: ``[B, G, length, ...]`` each."""
        return first_tokens(self.k, self.length), first_tokens(self.v, self.length)

    def tensors(self) -> Iterator[Tensor]:
        """Every allocated tensor, room for more tokens included."""
        for q, scale in (*self.k, *self.v):
            yield q
            if scale is not None:
                yield scale

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        with _lasting():
            for name in ("k", "v"):
                buffers = [
                    (fn(q), None if scale is None else fn(scale))
                    for q, scale in getattr(self, name)
                ]
                setattr(self, name, buffers)

    # -- what transformers asks of a layer -------------------------------------------------------

    def get_seq_length(self) -> int:
        """Cached tokens a row."""
        return self.length

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Keys that the next ``query_length`` tokens will see, and the first one's index: 0."""
        return self.length + _query_length(query_length), 0

    def get_max_length(self) -> int:
        """-1: it grows."""
        return -1

    def get_max_cache_shape(self) -> int:
        """``get_max_length`` under its older name."""
        return self.get_max_length()

    def reset(self) -> None:
        """Forget every token, and free the memory."""
        self.k, self.v, self.length, self.is_initialized = [], [], 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``b`` becomes what row ``beam_idx[b]`` was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, in that order."""
        if self.is_initialized:
            self._map(lambda t: t.index_select(0, _as_indices(indices, t)))
            self.batch_size = self._rows()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times, one after another."""
        if self.is_initialized:
            self._map(lambda t: t.repeat_interleave(repeats, dim=0))
            self.batch_size = self._rows()

    def _rows(self) -> int:
        return self.k[0][0].shape[0] if self.k else self.batch_size

    def crop_to(self, length: int) -> None:
        """Keep the first ``length`` tokens; the room stays."""
        self.length = min(self.length, length)

    def crop(self, tokens: int) -> None:
        """See ``LatentCache.crop``, which also crops the positions: use that."""
        self.crop_to(_target_length(self.length, tokens))

    def offload(self) -> None:
        """Move to the CPU."""
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move back to where the layer computes."""
        if self.is_initialized:
            self._map(lambda t: t.to(self.device, non_blocking=True))


def first_tokens(buffers: list[Stored], count: int) -> list[Stored]:
    """Views of the first ``count`` tokens of ``[B, G, S, ...]``."""
    return [(q[:, :, :count], None if s is None else s[:, :, :count]) for q, s in buffers]


def _emptied(t: Tensor) -> list[int]:
    """``t``'s shape without its tokens."""
    shape = list(t.shape)
    shape[2] = 0
    return shape


def _as_indices(indices: Tensor, t: Tensor) -> Tensor:
    if indices.dtype == torch.bool:
        indices = indices.nonzero().squeeze(-1)
    return indices.to(device=t.device, dtype=torch.int64)


def _target_length(length: int, tokens: Any) -> int:
    """Negative: so many fewer; positive: so many in all; 0: no change. 5.17 passes a tensor."""
    change = int(tokens)
    if change > 0:
        return min(change, length)
    if -change > length:
        raise ValueError(f"LatentCache: expected to crop at most {length} tokens, got {-change}")
    return length + change


class StaticLatentLayer(LatentLayer):
    """One layer of a ``StaticLatentCache``: buffers of a fixed size at a fixed address."""

    is_compileable = True
    cumulative_length: Tensor

    def __init__(self, spec: LayerSpec, max_cache_len: int, backend: str = "auto") -> None:
        """Empty; the first tokens allocate all of it."""
        super().__init__(spec, backend)
        self.max_cache_len = max_cache_len
        # A tensor: as a Python number it would be a constant of a compiled graph.
        self.cumulative_length = torch.tensor(0, dtype=torch.int64)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Allocate for the batch of these latents ``[B, G, S, rank]``."""
        super().lazy_initialization(key_states, value_states)
        with _lasting():
            self.cumulative_length = self.cumulative_length.to(self.device)
            for name, spec in (("k", self.spec.k), ("v", self.spec.v)):
                buffers: list[Stored] = []
                for part in spec:
                    shape = (self.batch_size, self.spec.groups, self.max_cache_len)
                    dtype = key_states.dtype if part.bits == 16 else torch.int8
                    q = torch.zeros((*shape, part.width), dtype=dtype, device=self.device)
                    scale = torch.zeros(shape, dtype=torch.float32, device=self.device)
                    buffers.append((q, None if part.bits == 16 else scale))
                setattr(self, name, buffers)
        if not torch.compiler.is_compiling():
            for tensor in (*self.tensors(), self.cumulative_length):
                torch._dynamo.mark_static_address(tensor)

    def slots(self, count: int) -> Tensor:
        """Where the next ``count`` tokens go, int64 ``[count]``."""
        return torch.arange(count, device=self.device) + self.cumulative_length

    def end_after(self, count: int) -> int:
        """Tokens in use after ``count`` more; waits for the device.

        Raises ValueError where they do not fit. In a compiled graph that is a device-side
        assertion, and all of the buffer counts as in use.
        """
        end = self.cumulative_length + count
        if torch.compiler.is_compiling():
            torch._assert_async(
                end <= self.max_cache_len, "StaticLatentCache: more tokens than max_cache_len"
            )
            return self.max_cache_len
        found = int(end)
        if found > self.max_cache_len:
            raise ValueError(
                f"StaticLatentCache: holds {found - count} of at most {self.max_cache_len} tokens, "
                f"got {count} more; make it with a larger max_cache_len"
            )
        return found

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[list[Stored], list[Stored]]:
        """As ``LatentLayer.update``; what it returns has ``max_cache_len`` tokens, for a mask."""
        self._check(key_states, self.spec.k, "key")
        self._check(value_states, self.spec.v, "value")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.shape[2]
        slots = kwargs["slots"] if "slots" in kwargs else self.slots(count)
        if self._takes_op(key_states):
            self._append_by_op(key_states, value_states, slots)
            self.cumulative_length.add_(count)
            return self.k, self.v
        for buffers, latent, spec in (
            (self.k, key_states, self.spec.k),
            (self.v, value_states, self.spec.v),
        ):
            new = quantize_stream(latent, spec, self.backend)
            for (q, scale), (new_q, new_scale) in zip(buffers, new, strict=True):
                q.index_copy_(2, slots, new_q)
                if scale is not None and new_scale is not None:
                    scale.index_copy_(2, slots, new_scale)
        self.cumulative_length.add_(count)
        return self.k, self.v

    def stored(self) -> tuple[list[Stored], list[Stored]]:
        """All of the buffers, keys and values."""
        return self.k, self.v

    def get_seq_length(self) -> Any:
        """Cached tokens a row: a tensor, which a compiled graph may depend on; 0 when fresh."""
        return self.cumulative_length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """All of the buffer, whatever it holds: the mask tells what is there."""
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        """The size it was made with."""
        return self.max_cache_len

    def reset(self) -> None:
        """Forget every token, in place."""
        self.cumulative_length.zero_()
        for tensor in self.tensors():
            tensor.zero_()

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        """In place where the shape stays, so that the addresses do."""
        if not self.is_initialized:
            return
        for tensor, new in [(t, fn(t)) for t in self.tensors()]:
            if new.shape != tensor.shape or new.device != tensor.device:
                super()._map(fn)
                return
            tensor.copy_(new)

    def crop_to(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        self.cumulative_length.clamp_(max=length)

    def crop(self, tokens: int) -> None:
        """See ``LatentCache.crop``."""
        self.crop_to(_target_length(int(self.cumulative_length), tokens))


class LatentCache(Cache):  # type: ignore[misc]
    """The KV cache of a converted model: integers, growing with its tokens.

    Args:
        model: a model that ``convert`` made, or its layers' specs in order.
        offloading: keep layers on the CPU and fetch each ahead of its turn; CUDA only.
        backend: who quantizes, where ``model`` is specs; otherwise each layer's own.

    Raises:
        ValueError: the model has no converted attention.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[LayerSpec],
        offloading: bool = False,
        backend: str = "auto",
    ) -> None:
        """Empty; see the class."""
        layers = [self._make_layer(spec, name) for spec, name in _specs_of(model, backend)]
        super().__init__(layers=layers, offloading=offloading, offload_only_non_sliding=False)
        self.positions = self._make_positions()
        self._rotary: tuple[Tensor, Tensor] | None = None
        # Of this pass, by window; and whether the last one outside of a graph was regular.
        self._readings: dict[int | None, Reading | None] = {}
        self._regular: dict[int | None, bool] = {}

    def _make_layer(self, spec: LayerSpec, backend: str) -> LatentLayer:
        return LatentLayer(spec, backend)

    def _make_positions(self) -> Positions:
        return Positions()

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[list[Stored], list[Stored]]:
        """Quantize and keep the latents of one layer's new tokens.

        Args:
            key_states: floating ``[B, G, q, k rank]``, not rotated.
            value_states: floating ``[B, G, q, v rank]``.
            layer_idx: the layer; layer 0 comes first and brings the positions.
            position_ids: integers ``[B or 1, q]``, the tokens' RoPE positions.

        Returns:
            What is stored of all tokens, keys and values, a ``Stored`` a slice.

        Raises:
            ValueError: latents of another shape or batch, a missing ``position_ids``, or a static
                cache that is full.
        """
        layer: LatentLayer = self.layers[layer_idx]
        if layer_idx == 0:
            if position_ids is None:
                raise ValueError("LatentCache: expected position_ids with layer 0, got None")
            kwargs = {**kwargs, **self._place(layer, key_states, position_ids)}
        if not self.offloading:
            return layer.update(key_states, value_states, **kwargs)
        # As transformers does it: the fetch of the next layer runs beside this layer's work.
        current = torch.cuda.current_stream(key_states.device)
        current.wait_stream(self.prefetch_stream)
        layer.prefetch()
        self.prefetch_stream.wait_stream(current)
        with torch.cuda.stream(self.prefetch_stream):
            self.layers[(layer_idx + 1) % len(self.layers)].prefetch()
        stored = layer.update(key_states, value_states, **kwargs)
        layer.offload()
        return stored

    def _place(self, layer: LatentLayer, latent: Tensor, position_ids: Tensor) -> dict[str, Any]:
        layer._check(latent, layer.spec.k, "key")
        self.positions.append(position_ids, latent.shape[0])
        return {}

    def _seen(self) -> tuple[Tensor, Any]:
        """Positions ``[B or 1, S]`` of the slots that a pass looks at, and how many are in use."""
        return self.positions.view(), self.get_seq_length()

    def mask_of(self, layer_idx: int, mask: Any, window: int | None, queries: int) -> Any:
        """What to attend under: the mask that transformers made for this cache."""
        return mask

    def rotary(self, layer_idx: int, rotary_emb: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
        """``cos, sin [B or 1, S, d]`` of every cached token, from the model's own rotary embedding.

        Made by the first layer of a pass and dropped by the last: nothing of the size of the
        history outlives a pass.
        """
        made = self._rotary
        if layer_idx == 0 or made is None or made[0].device != like.device:
            cos, sin = rotary_emb(like, self._seen()[0].to(like.device))
            # Spread over devices, the embedding answers from its own.
            made = cos.to(like.device), sin.to(like.device)
        self._rotary = None if layer_idx == len(self.layers) - 1 else made
        return made

    def rows(
        self, layer_idx: int, mask: Tensor | None, window: int | None, query: Tensor
    ) -> Rows | None:
        """What the fused kernel is told of this pass, None where it can't be told.

        Note [Rows of a cache] in ``decode``. Read by the first layer of a pass, dropped by the
        last.

        Args:
            layer_idx: the layer; it has stored the pass's tokens.
            mask: as transformers makes it.
            window: of this layer's attention.
            query: ``[B, H, q, d]``.
        """
        batch, queries = query.shape[0], query.shape[2]
        if layer_idx == 0:
            self._readings = {}
        if window not in self._readings:
            reading = read_rows(*self._seen(), mask, window, batch, queries)
            if torch.compiler.is_compiling():
                if reading is not None and self._regular.get(window, False):
                    torch._assert_async(
                        reading.regular,
                        "LatentCache: padding in the middle, in a graph compiled for none",
                    )
                else:
                    reading = None
            else:
                self._regular[window] = reading is not None and bool(reading.regular)
                reading = reading if self._regular[window] else None
            self._readings[window] = reading
        found = self._readings[window]
        if layer_idx == len(self.layers) - 1:
            self._readings = {}
        return None if found is None or queries > MAX_DECODE_QUERIES else found.rows

    # -- what transformers asks of a cache -------------------------------------------------------

    def reset(self) -> None:
        """Forget every token."""
        super().reset()
        self.positions.reset()
        self._regular = {}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``b`` becomes what row ``beam_idx[b]`` was, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        super().batch_select_indices(indices)
        self.positions.select(lambda t: t.index_select(0, _as_indices(indices, t)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times, one after another."""
        super().batch_repeat_interleave(repeats)
        self.positions.select(lambda t: t.repeat_interleave(repeats, dim=0))

    def crop(self, tokens: int) -> None:
        """Drop tokens from the end: ``-n`` drops n, ``n`` keeps the first n, 0 changes nothing.

        transformers 4.x passes what to keep, 5.x what to drop.

        Raises ValueError for dropping more than there are.
        """
        length = _target_length(int(self.get_seq_length()), tokens)
        for layer in self.layers:
            layer.crop_to(length)
        self.positions.crop(length)

    # -- what it costs ---------------------------------------------------------------------------

    def bytes_per_token(self) -> int:
        """Bytes a token of one row takes in all layers: integers, scales, and its position."""
        specs: list[LayerSpec] = [layer.spec for layer in self.layers]
        return sum(spec.bytes_per_token for spec in specs) + POSITION_BYTES

    def memory_report(self) -> dict[str, int]:
        """Bytes, as ``bytes_per_token``, ``tokens`` (a row), ``rows``, ``used`` and ``allocated``.

        ``used`` counts the cached tokens; ``allocated`` is the size of the tensors, which have room
        for up to 255 tokens more (a static cache: for all of its tokens).
        """
        tensors = [tensor for layer in self.layers for tensor in layer.tensors()]
        if self.positions.ids is not None:
            tensors.append(self.positions.ids)
        tokens = int(self.get_seq_length())
        rows = max((layer.batch_size for layer in self.layers if layer.is_initialized), default=0)
        return {
            "bytes_per_token": self.bytes_per_token(),
            "tokens": tokens,
            "rows": rows,
            "used": self.bytes_per_token() * tokens * rows,
            "allocated": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        }

    def row_starts(self) -> Tensor | None:
        """Each row's position of slot 0, int64 ``[B or 1]``; negative by its left padding.

        None if a row's tokens, from position 0 on, are not consecutive in the cache (padding in the
        middle): then only ``positions`` tells. Waits for the device.
        """
        ids = self.positions.view().to(torch.int64)[:, : int(self.get_seq_length())]
        if ids.shape[1] == 0:
            return None
        slots = torch.arange(ids.shape[1], device=ids.device)
        start = ids[:, -1] - slots[-1]
        expected = start[:, None] + slots
        return start if bool(((ids == expected) | (expected < 0)).all()) else None


class StaticLatentCache(LatentCache):
    """A ``LatentCache`` of a fixed size: for ``torch.compile`` and CUDA graphs.

    A compiled pass looks at the whole buffer, under a mask. One outside of a graph looks at the
    tokens in use, as a ``LatentCache`` has them: it does what that does, with the same bits.

    Args:
        model: as for ``LatentCache``.
        max_cache_len: tokens a row it can hold.
        offloading: as for ``LatentCache``.
        backend: as for ``LatentCache``.

    Raises:
        ValueError: the model has no converted attention, or a size below 1.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[LayerSpec],
        max_cache_len: int,
        offloading: bool = False,
        backend: str = "auto",
    ) -> None:
        """Empty; the first tokens allocate all of it."""
        if max_cache_len < 1:
            raise ValueError(f"StaticLatentCache: expected max_cache_len >= 1, got {max_cache_len}")
        self._room = max_cache_len  # 4.x has a property max_cache_len
        # Of the pass under way, outside of a graph: tokens in use; by window, the mask that was
        # given and what it came to.
        self._end = 0
        self._masks: dict[int | None, tuple[Tensor, Tensor | None]] = {}
        super().__init__(model, offloading, backend)

    def _make_layer(self, spec: LayerSpec, backend: str) -> LatentLayer:
        return StaticLatentLayer(spec, self._room, backend)

    def _make_positions(self) -> Positions:
        return StaticPositions(self._room)

    def _place(self, layer: LatentLayer, latent: Tensor, position_ids: Tensor) -> dict[str, Any]:
        assert isinstance(layer, StaticLatentLayer)
        assert isinstance(self.positions, StaticPositions)
        layer._check(latent, layer.spec.k, "key")
        if not layer.is_initialized:
            layer.lazy_initialization(latent)
        if self.positions.ids is None:
            self.positions.initialize(latent.shape[0], latent.device)
        # Once a pass: the other layers hold as many.
        end = layer.end_after(latent.shape[2])
        if not torch.compiler.is_compiling():
            self._end = end
        slots = layer.slots(latent.shape[2])
        self.positions.write(position_ids, slots)
        return {"slots": slots}

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[list[Stored], list[Stored]]:
        """As ``LatentCache.update``; in a compiled graph, what it returns is the whole buffer."""
        found = super().update(
            key_states, value_states, layer_idx, *args, position_ids=position_ids, **kwargs
        )
        if torch.compiler.is_compiling():
            return found
        return first_tokens(found[0], self._end), first_tokens(found[1], self._end)

    def mask_of(self, layer_idx: int, mask: Any, window: int | None, queries: int) -> Any:
        """Outside of a graph, the mask of the tokens in use.

        None where transformers gives a ``LatentCache`` none: without a mask SDPA takes other
        kernels, which round elsewhere. Once a pass, dropped by the last layer; waits for the
        device.
        """
        if torch.compiler.is_compiling() or not isinstance(mask, Tensor) or mask.dim() != 4:
            return mask
        if layer_idx == 0:
            self._masks = {}
        given, found = self._masks.get(window, (None, None))
        if given is not mask:
            found = mask[..., : self._end].contiguous()
            if (
                queries in (1, self._end)
                and (window is None or self._end < window)
                and mask.dtype == torch.bool
                and bool((found == torch.ones_like(found).tril(self._end - queries)).all())
            ):
                found = None
            self._masks[window] = mask, found
        if layer_idx == len(self.layers) - 1:
            self._masks = {}
        return found

    def _seen(self) -> tuple[Tensor, Any]:
        if torch.compiler.is_compiling():
            return super()._seen()
        return self.positions.view()[:, : self._end], self._end


def _specs_of(
    model: nn.Module | Sequence[LayerSpec], backend: str
) -> Iterator[tuple[LayerSpec, str]]:
    if not isinstance(model, nn.Module):
        for spec in model:
            yield spec, backend
        return
    from .attention import LatentAttention

    found = [module for module in model.modules() if isinstance(module, LatentAttention)]
    if not found:
        raise ValueError(
            f"LatentCache: expected a model that int8_ops.llama.convert made, got "
            f"{type(model).__name__} without a converted attention"
        )
    for module in sorted(found, key=lambda module: module.layer_idx):
        yield module.spec, module.backend
