"""Converted attention: what it computes, for every family, with and without a cache."""

from __future__ import annotations

import pytest
import torch
from llama_cases import FAMILIES, ids_of, make_converted, make_model, through_cache

from int8_ops import INT8Quantizer, reference
from int8_ops._cache_names import cache_of, passed
from int8_ops.llama import LatentAttention, LatentCache, LatentConfig, convert
from int8_ops.llama.attention import quantize_pairs, rotate, scores_of_one
from int8_ops.llama.packing import unpack_int4

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_same(got, expected):
    """Equal but for the order of float32 sums, and for what that does to a rounding.

    Passes over chunks, or over rows in a batch, sum the same numbers in another order. That alone
    is some 2^-20 of a logit; but now and then it moves a latent across the border between two
    integers, and such a flip costs a step: of a latent with 8 or more numbers, up to 1/7 of its
    largest in 4 bits. A flip in a hundred thousand roundings leaves the whole within 0.5 %, where
    the quantization itself costs 5 % and more; any wrong position, mask, scale or row costs 100 %.
    """
    assert got.shape == expected.shape
    assert float((got - expected).norm() / expected.norm()) < 5e-3


@pytest.fixture(params=list(FAMILIES))
def family(request):
    return request.param


@torch.no_grad()
def test_full_rank_in_16_bits_is_the_original(family):
    ids = ids_of(2, 40)
    model = make_model(family)
    expected = model(ids, use_cache=False).logits
    config = LatentConfig(kv_ratio=1.0, bits=16, rank_multiple=8)
    convert(model, ids_of(2, 64, seed=1), config, progress=False)
    assert torch.allclose(model(ids, use_cache=False).logits, expected, rtol=1e-3, atol=1e-3)
    assert torch.allclose(through_cache(model, ids, 7), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_int8_at_full_rank_is_close_and_less_is_less_close(family):
    ids = ids_of(2, 40)
    expected = make_model(family)(ids, use_cache=False).logits
    errors = []
    for bits in (8, 4):
        config = LatentConfig(kv_ratio=1.0, bits=bits, rank_multiple=8)
        got = make_converted(family, config)(ids, use_cache=False).logits
        errors.append(float((got - expected).norm() / expected.norm()))
    assert 0 < errors[0] < 0.05
    assert errors[0] < errors[1] / 4  # a step is 16 times wider


@torch.no_grad()
def test_a_cache_changes_nothing(family):
    model, ids = make_converted(family), ids_of(2, 40)
    plain = model(ids, use_cache=False).logits
    assert torch.equal(model(ids, use_cache=True).logits, plain)
    for chunk in (1, 7, 39):
        assert_same(through_cache(model, ids, chunk), plain)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_rows_padded_on_the_left_are_what_they_are_alone(family, implementation):
    model = make_converted(family)
    model.set_attn_implementation(implementation)
    ids = ids_of(2, 24)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    ids[0, :9] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    alone = model(ids[:1, 9:], use_cache=False).logits[0]
    out = model(ids[:, :20], attention_mask=mask[:, :20], position_ids=position_ids[:, :20])
    assert cache_of(out).row_starts().tolist() == [-9, 0]
    more = model(
        ids[:, 20:],
        attention_mask=mask,
        position_ids=position_ids[:, 20:],
        **passed(model, cache_of(out)),
    )
    got = torch.cat((out.logits[0, 9:], more.logits[0]))
    assert_same(got, alone)


@torch.no_grad()
def test_padding_in_the_middle_takes_the_general_path():
    model = make_converted()
    ids = ids_of(2, 12)
    mask = torch.ones_like(ids)
    mask[0, 5:8] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    out = model(ids, attention_mask=mask, position_ids=position_ids)
    assert cache_of(out).row_starts() is None
    alone = model(ids[:1][mask[:1] == 1][None], use_cache=False).logits[0]
    assert_same(out.logits[0][mask[0] == 1], alone)


@torch.no_grad()
def test_attention_weights_are_returned_by_eager(family):
    model, ids = make_converted(family), ids_of(1, 12)
    model.set_attn_implementation("eager")
    out = model(ids, output_attentions=True, use_cache=False)
    assert len(out.attentions) == 3
    assert out.attentions[0].shape == (1, 8, 12, 12)
    assert torch.allclose(out.attentions[0].sum(-1), torch.ones(1, 8, 12))
    model.set_attn_implementation("sdpa")
    assert_same(out.logits, model(ids, use_cache=False).logits)


@torch.no_grad()
def test_keys_and_values_are_rebuilt_as_the_reference_does():
    model = make_converted("llama-mha-bias", LatentConfig(kv_ratio=0.4, heads_per_group=4))
    attention = model.model.layers[1].self_attn
    latent = torch.randn(2, 2, 9, attention.k_proj.rank)
    cache = LatentCache([attention.spec])
    value = torch.randn(2, 2, 9, attention.v_proj.rank)
    keys, _ = cache.update(latent, value, 0, position_ids=torch.arange(9)[None])
    rebuilt = attention.k_proj.rebuild(keys, torch.float32)
    assert rebuilt.shape == (2, 8, 9, 8)
    parts = []
    for group in range(2):
        total = torch.zeros(())
        for i, (piece, (q, scale)) in enumerate(zip(attention.k_proj.slices, keys, strict=True)):
            total = total + reference.int8_scaled_mm(
                unpack_int4(q[:, group]) if piece.part.bits == 4 else q[:, group],
                piece.A_int8[group],
                scale[:, group, :, None],
                piece.A_scale[group],
                attention.k_proj.bias.view(2, -1)[group] if i == 0 else None,
                torch.float32,
            )
        parts.append(total)
    expected = torch.cat(parts, dim=-1).view(2, 9, 8, 8).transpose(1, 2)
    assert torch.equal(rebuilt, expected)


def test_the_keys_scales_are_shared_by_rope_pairs():
    model = make_converted()
    for layer in model.model.layers:
        for piece in layer.self_attn.k_proj.slices:
            scale = piece.A_scale.view(-1, 4, 2, 4)  # [G, heads, half, d/2]
            assert torch.equal(scale[:, :, 0], scale[:, :, 1])


def test_pair_shared_scales_are_those_of_both_rows_together():
    rows = torch.randn(16, 6)
    q, scale = quantize_pairs(rows, 8)
    for head in range(2):
        for i in range(4):
            pair = rows[[head * 8 + i, head * 8 + i + 4]].reshape(1, -1)
            expected_q, expected_scale = reference.quantize_per_channel(pair)
            for half in range(2):
                row = head * 8 + i + 4 * half
                assert torch.equal(q[row], expected_q[0, half * 6 : half * 6 + 6])
                assert torch.equal(scale[row], expected_scale[0])


def test_a_pairs_scale_commutes_with_its_rotation():
    # Powers of two, so that scaling rounds nothing and equality is exact.
    scale = 2.0 ** torch.randint(-3, 4, (4,)).float()
    x = torch.randn(1, 1, 5, 8)
    angle = torch.randn(1, 5, 4)
    cos, sin = (torch.cat((t, t), dim=-1) for t in (angle.cos(), angle.sin()))
    both = torch.cat((scale, scale))
    assert torch.equal(rotate(x * both, cos, sin), rotate(x, cos, sin) * both)


def test_gradients_pass_straight_through_without_a_cache():
    model, ids = make_converted(), ids_of(1, 12)
    weight = model.model.layers[0].self_attn.v_proj.BLinear.weight
    weight.requires_grad_(True)
    out = model(ids, labels=ids, use_cache=False)
    out.loss.backward()
    assert weight.grad is not None
    assert float(weight.grad.norm()) > 0
    embeddings = model.get_input_embeddings().weight.grad
    assert float(embeddings.norm()) > 0
    with torch.no_grad():
        assert_same(model(ids, use_cache=False).logits, out.logits)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_keep_float32_scales(dtype):
    model, ids = make_converted(), ids_of(1, 20)
    expected = model(ids, use_cache=False).logits
    scales = [p.A_scale.clone() for p in model.modules() if hasattr(p, "A_scale")]
    model.to(dtype)
    got = model(ids, use_cache=False).logits
    assert got.dtype == dtype
    assert float((got.float() - expected).norm() / expected.norm()) < 0.1
    now = [p.A_scale for p in model.modules() if hasattr(p, "A_scale")]
    assert len(now) == len(scales) > 0
    assert all(torch.equal(a, b) for a, b in zip(now, scales, strict=True))


def test_the_repr_says_how_latents_are_stored():
    model = make_converted(config=LatentConfig(kv_ratio=0.3, bits=4, rank_multiple=8))
    attention = model.model.layers[0].self_attn
    assert isinstance(attention, LatentAttention)
    assert "in 4 bits" in repr(attention)


@torch.no_grad()
def test_the_seed_flow_is_kept_to_compare_with():
    """Fake-quantized float latents, keys in floats, values through int8; close to the integers."""
    ids = ids_of(2, 40)
    ranks = [(24, 24)] * 3
    seed = make_converted(config=LatentConfig(ranks=ranks, bits=16, flow="seed", refine=0))
    attention = seed.model.layers[0].self_attn
    assert not hasattr(attention.k_proj.slices[0], "A_int8")
    assert hasattr(attention.v_proj.slices[0], "A_int8")
    x = torch.randn(1, 5, 64)
    latent = attention.v_proj.latent(x)[0, 0]
    rounded = INT8Quantizer.dequantize(*INT8Quantizer.quantize_per_token(latent))
    assert torch.allclose(latent, rounded, atol=1e-6)  # it is on the int8 grid already
    out = seed(ids)
    assert {t.dtype for layer in cache_of(out).layers for t in layer.tensors()} == {torch.float32}
    integers = make_converted(config=LatentConfig(ranks=ranks, bits=8, refine=0))
    exact = make_converted(config=LatentConfig(ranks=ranks, bits=16, refine=0))(ids).logits
    for got in (out.logits, integers(ids).logits):
        assert 0 < float((got - exact).norm() / exact.norm()) < 0.05
    assert_same(through_cache(seed, ids, 7), seed(ids, use_cache=False).logits)


@torch.no_grad()
@pytest.mark.parametrize("groups", [None, 2])
def test_one_query_absorbs_values_as_if_they_were_rebuilt(monkeypatch, groups):
    """Same integers, other order of sums: float32 apart, for every kind of mask and for biases."""
    config = LatentConfig(kv_ratio=0.45, heads_per_group=groups, rank_multiple=4)
    model = make_converted("qwen2", config)
    ids = ids_of(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        for more in ({}, {"attention_mask": mask}):
            cut = {name: value[:, :-1] for name, value in more.items()}
            results = []
            for absorbs in (True, False):
                cache = cache_of(model(ids[:, :-1], **cut))
                with monkeypatch.context() as patch:
                    if not absorbs:
                        patch.setattr(LatentAttention, "absorbs", lambda self, options: False)
                    arguments = {**more, **passed(model, cache)}
                    results.append(model(ids[:, -1:], **arguments).logits)
            assert_same(*results)
            assert not torch.equal(*results)  # two ways, not one


@pytest.mark.parametrize("batch", [1, 3])
def test_scores_of_one_query_are_the_products(batch):
    query, key = torch.randn(batch, 8, 1, 16), torch.randn(batch, 5, 4, 16).transpose(1, 2)
    expected = query @ key.repeat_interleave(2, dim=1).transpose(2, 3)
    assert torch.allclose(scores_of_one(query, key), expected, atol=1e-5)


def test_rope_is_the_same_compiled_and_has_its_gradient():
    x = torch.randn(2, 5, 4, 16).transpose(1, 2).requires_grad_()
    cos, sin = torch.randn(2, 2, 5, 16).unbind(0)
    first, second = x.chunk(2, dim=-1)
    expected = x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
    compiled = torch.compile(rotate, fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    for function in (rotate, compiled):
        got = function(x, cos, sin)
        assert torch.allclose(got, expected, atol=1e-6)
        (found,) = torch.autograd.grad(got.square().sum(), x)
        assert torch.allclose(found, gradient, atol=1e-5)
