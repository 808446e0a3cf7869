"""LatentCache and StaticLatentCache by themselves: what they hold and what is done to it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", minversion="4.56")

from int8_ops.llama import LatentCache, StaticLatentCache
from int8_ops.llama import cache as cache_module
from int8_ops.llama.packing import quantize_stream
from int8_ops.llama.spec import LayerSpec, Slice

SPECS = [
    LayerSpec(k=(Slice(8, 6), Slice(4, 8)), v=(Slice(4, 12),), groups=2),
    LayerSpec(k=(Slice(8, 10),), v=(Slice(8, 4), Slice(4, 4)), groups=2),
]
RANKS = [(14, 12), (10, 8)]


def latents(rows, length, seed=0):
    """Latents (k, v) of both layers."""
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randn(rows, 2, length, rank, generator=generator) for rank in ranks)
        for ranks in RANKS
    ]


def feed(cache, found, start=0, chunk=None, positions=None):
    """Put latents into the cache, from position ``start`` on."""
    length = found[0][0].shape[2]
    chunk = chunk or length
    stored = None
    for begin in range(0, length, chunk):
        end = min(begin + chunk, length)
        for index, (k, v) in enumerate(found):
            ids = positions
            if ids is None:
                ids = torch.arange(start + begin, start + end, device=k.device)[None]
            stored = cache.update(k[:, :, begin:end], v[:, :, begin:end], index, position_ids=ids)
    return stored


def make(kind):
    return LatentCache(SPECS) if kind == "dynamic" else StaticLatentCache(SPECS, 600)


def contents(cache):
    """Every stored tensor of the tokens that count, layer by layer."""
    n = int(cache.get_seq_length())
    found = []
    for layer in cache.layers:
        for stream in layer.stored():
            for q, scale in stream:
                found += [q[:, :, :n], scale[:, :, :n]]
    return found


def expected_of(found):
    tensors = []
    for spec, (k, v) in zip(SPECS, found, strict=True):
        for latent, parts in ((k, spec.k), (v, spec.v)):
            for q, scale in quantize_stream(latent, parts, "auto"):
                tensors += [q, scale]
    return tensors


def assert_holds(cache, found):
    got, expected = contents(cache), expected_of(found)
    assert len(got) == len(expected) == 12
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.fixture(params=["dynamic", "static"])
def kind(request):
    return request.param


@pytest.mark.parametrize("chunk", [None, 1, 100, 257])
def test_tokens_are_quantized_once_and_kept(kind, chunk):
    cache = make(kind)
    assert cache.get_seq_length() == 0
    found = latents(2, 300 if chunk == 1 else 520)
    feed(cache, found, chunk=chunk)
    assert int(cache.get_seq_length()) == found[0][0].shape[2]
    assert_holds(cache, found)
    assert cache.row_starts().tolist() == ([0] if kind == "dynamic" else [0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_call_stores_what_the_separate_ops_do(kind, dtype, device, monkeypatch):
    found = [tuple(x.to(device, dtype) for x in pair) for pair in latents(2, 40)]
    one, calls = make(kind), []
    append = cache_module.ops.latent_append
    monkeypatch.setattr(
        cache_module.ops, "latent_append", lambda *args: (calls.append(args), append(*args))
    )
    feed(one, found, chunk=8)
    # The first tokens of a growing buffer make it.
    assert len(calls) == len(SPECS) * (4 if kind == "dynamic" else 5)
    monkeypatch.setattr(cache_module.LatentLayer, "_takes_op", lambda self, latent: False)
    many = make(kind)
    feed(many, found, chunk=8)
    assert len(calls) == len(SPECS) * (4 if kind == "dynamic" else 5)
    for got, expected in zip(contents(one), contents(many), strict=True):
        assert torch.equal(got, expected)


def test_only_integers_and_scales_are_kept(kind):
    cache = make(kind)
    feed(cache, latents(1, 256))
    tensors = [t for layer in cache.layers for t in layer.tensors()]
    assert {t.dtype for t in tensors} == {torch.int8, torch.float32}
    scales = [t for t in tensors if t.dtype == torch.float32]
    assert all(t.dim() == 3 for t in scales)  # a scale a token and group, no float latent


def test_bytes_per_token_are_what_the_tensors_take(kind):
    cache = make(kind)
    room = 512 if kind == "dynamic" else 600
    feed(cache, latents(3, 512), positions=None)
    report = cache.memory_report()
    k0, v0 = 6 + 4 + 4 + 4, 6 + 4
    k1, v1 = 10 + 4, 4 + 4 + 2 + 4
    assert cache.bytes_per_token() == 2 * (k0 + v0 + k1 + v1) + 4
    assert report["tokens"] == 512
    assert report["rows"] == 3
    assert report["used"] == 3 * 512 * cache.bytes_per_token()
    rows_of_positions = 1 if kind == "dynamic" else 3  # all rows agree: one is kept
    latent_bytes = cache.bytes_per_token() - 4
    assert report["allocated"] == room * (3 * latent_bytes + 4 * rows_of_positions)


def test_rows_are_reordered_selected_and_repeated(kind):
    cache, found = make(kind), latents(3, 5)
    feed(cache, found)
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    found = [tuple(t[[2, 2, 0]] for t in pair) for pair in found]
    assert_holds(cache, found)
    cache.batch_select_indices(torch.tensor([0, 2]))
    found = [tuple(t[[0, 2]] for t in pair) for pair in found]
    assert_holds(cache, found)
    cache.batch_repeat_interleave(3)
    found = [tuple(t.repeat_interleave(3, dim=0) for t in pair) for pair in found]
    assert_holds(cache, found)
    more = latents(6, 2, seed=1)
    feed(cache, more, start=5)
    both = [
        tuple(torch.cat(two, dim=2) for two in zip(a, b, strict=True))
        for a, b in zip(found, more, strict=True)
    ]
    assert_holds(cache, both)


def test_positions_follow_their_rows(kind):
    cache, found = make(kind), latents(2, 4)
    feed(cache, found, positions=torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3]]))
    assert cache.row_starts().tolist() == [-2, 0]
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.row_starts().tolist() == [0, -2]
    cache.batch_repeat_interleave(2)
    assert cache.row_starts().tolist() == [0, 0, -2, -2]
    cache.batch_select_indices(torch.tensor([3]))
    assert cache.row_starts().tolist() == [-2]


def test_one_row_of_positions_grows_to_many(kind):
    cache = make(kind)
    feed(cache, latents(2, 3))
    feed(cache, latents(2, 2, seed=1), positions=torch.tensor([[3, 4], [7, 8]]))
    assert cache.positions.view()[:, :5].tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 7, 8]]
    assert cache.row_starts() is None


@pytest.mark.parametrize(("tokens", "kept"), [(-2, 5), (5, 5), (0, 7), (9, 7), (-7, 0)])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_crop(kind, tokens, kept, as_tensor):
    cache, found = make(kind), latents(2, 7)
    feed(cache, found)
    cache.crop(torch.tensor(tokens) if as_tensor else tokens)
    assert int(cache.get_seq_length()) == kept
    assert_holds(cache, [tuple(t[:, :, :kept] for t in pair) for pair in found])
    more = latents(2, 3, seed=1)
    feed(cache, more, start=kept)
    assert_holds(
        cache,
        [
            tuple(torch.cat((a[:, :, :kept], b), dim=2) for a, b in zip(old, new, strict=True))
            for old, new in zip(found, more, strict=True)
        ],
    )
    assert cache.row_starts().tolist() == ([0] if kind == "dynamic" else [0, 0])


def test_crop_refuses_more_than_there_is(kind):
    cache = make(kind)
    feed(cache, latents(1, 3))
    with pytest.raises(ValueError, match="at most 3 tokens, got 4"):
        cache.crop(-4)


def test_reset_forgets_everything(kind):
    cache = make(kind)
    feed(cache, latents(2, 7))
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    found = latents(2, 3, seed=5)
    feed(cache, found)
    assert_holds(cache, found)


def test_static_buffers_stay_where_they_are():
    cache = StaticLatentCache(SPECS, 16)
    feed(cache, latents(2, 7))
    addresses = [t.data_ptr() for layer in cache.layers for t in layer.tensors()]
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.crop(-2)
    feed(cache, latents(2, 3, seed=1), start=5)
    cache.reset()
    assert addresses == [t.data_ptr() for layer in cache.layers for t in layer.tensors()]


def test_a_full_static_cache_says_so_and_takes_nothing():
    cache = StaticLatentCache(SPECS, 8)
    found = latents(1, 6)
    feed(cache, found)
    with pytest.raises(ValueError, match="holds 6 of at most 8 tokens, got 3 more"):
        feed(cache, latents(1, 3, seed=1), start=6)
    assert_holds(cache, found)
    feed(cache, latents(1, 2, seed=1), start=6)
    assert int(cache.get_seq_length()) == 8


def test_latents_of_another_model_or_batch_are_refused(kind):
    cache = make(kind)
    ids = torch.arange(3)[None]
    with pytest.raises(ValueError, match=r"expected key latents \[B, 2, S, 14\], got \[1, 2, 3, 1"):
        cache.update(torch.randn(1, 2, 3, 10), torch.randn(1, 2, 3, 12), 0, position_ids=ids)
    assert int(cache.get_seq_length()) == 0
    feed(cache, latents(2, 3))
    with pytest.raises(ValueError, match="holds a batch of 2, got key latents of a batch of 1"):
        cache.update(torch.randn(1, 2, 3, 14), torch.randn(1, 2, 3, 12), 0, position_ids=ids)
    with pytest.raises(ValueError, match="expected position_ids with layer 0"):
        cache.update(torch.randn(2, 2, 3, 14), torch.randn(2, 2, 3, 12), 0)


def test_a_cache_needs_a_converted_model():
    with pytest.raises(ValueError, match="got Linear without a converted attention"):
        LatentCache(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="expected max_cache_len >= 1, got 0"):
        StaticLatentCache(SPECS, 0)


def test_a_cache_filled_in_inference_mode_can_be_used_outside(kind):
    cache, found = make(kind), latents(1, 3)
    with torch.inference_mode():
        feed(cache, found)
        cache.reorder_cache(torch.tensor([0]))
    more = latents(1, 2, seed=1)
    feed(cache, more, start=3)
    assert int(cache.get_seq_length()) == 5


@pytest.mark.gpu
def test_offloaded_layers_wait_on_the_cpu():
    cache = LatentCache(SPECS, offloading=True)
    found = [tuple(t.cuda() for t in pair) for pair in latents(1, 40)]
    feed(cache, found, chunk=8)
    torch.cuda.synchronize()
    assert all(t.device.type == "cpu" for t in cache.layers[1].tensors())
    for layer in cache.layers:
        layer.prefetch()
    assert_holds(cache, found)
