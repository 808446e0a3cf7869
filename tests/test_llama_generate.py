"""A converted model in generate(): which cache it gets, and that every mode gives the same."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from llama_cases import ids_of, make_converted, through_cache, transformers

from int8_ops.llama import LatentCache, LatentConfig, StaticLatentCache

pytestmark = pytest.mark.usefixtures("one_thread")

# 4.x wants to be told what 5.x reads from the cache.
FOUR = transformers.__version__.startswith("4.")
# No end token: every run has the same length.
OPTIONS = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": 10_000}


@pytest.fixture(scope="module")
def model():
    return make_converted(config=LatentConfig(kv_ratio=0.45, rank_multiple=8))


def by_hand(model, ids, count, cache=None):
    """Greedy tokens, one a pass."""
    found = ids
    out = model(input_ids=ids, past_key_values=cache, use_cache=True)
    for _ in range(count):
        token = out.logits[:, -1:].argmax(-1)
        found = torch.cat((found, token), dim=1)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    return found


@torch.no_grad()
def test_every_way_to_generate_greedily_gives_the_same_tokens(model):
    ids = ids_of(1, 10)
    expected = by_hand(model, ids, 16)
    assert len(expected[0].unique()) > 5  # not one token over and over
    assert torch.equal(model.generate(ids, **OPTIONS), expected)
    assert torch.equal(by_hand(model, ids, 16, StaticLatentCache(model, 40)), expected)
    for more in (
        {"cache_implementation": "static"},
        {"past_key_values": LatentCache(model)},
        {"past_key_values": StaticLatentCache(model, 26)},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},  # assisted: crops what it guessed wrong
    ):
        assert torch.equal(model.generate(ids, **OPTIONS, **more), expected), more


def test_generate_returns_our_cache(model):
    out = model.generate(ids_of(1, 10), **OPTIONS, return_dict_in_generate=True)
    assert type(out.past_key_values) is LatentCache
    assert out.past_key_values.get_seq_length() == 25
    out = model.generate(
        ids_of(1, 10), **OPTIONS, return_dict_in_generate=True, cache_implementation="static"
    )
    assert type(out.past_key_values) is StaticLatentCache


def test_padded_rows_generate_what_they_generate_alone(model):
    ids = ids_of(3, 12)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((5, 0, 2)):
        mask[row, :padding] = 0
    ids = ids * mask
    for more in ({}, {"cache_implementation": "static"}):
        got = model.generate(ids, attention_mask=mask, **OPTIONS, **more)
        for row, padding in enumerate((5, 0, 2)):
            alone = model.generate(ids[row : row + 1, padding:], **OPTIONS)
            assert torch.equal(got[row, padding:], alone[0])


@pytest.mark.parametrize("more", [{}, {"cache_implementation": "static"}])
def test_beams_are_scored_as_without_a_cache(model, more):
    ids = ids_of(2, 8)
    options = {**OPTIONS, "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 8}
    expected = model.generate(ids, **options, use_cache=False)
    assert torch.equal(model.generate(ids, **options, **more), expected)


@torch.no_grad()
def test_an_assistant_changes_nothing(model):
    ids = ids_of(1, 8)
    assistant = make_converted(num_hidden_layers=1)
    expected = model.generate(ids, **OPTIONS)
    assert torch.equal(model.generate(ids, **OPTIONS, assistant_model=assistant), expected)


def test_a_cache_of_another_kind_is_refused_with_the_reason(model):
    ids = ids_of(1, 4)
    foreign = transformers.DynamicCache()
    for call in (
        lambda: model(ids, past_key_values=foreign),
        lambda: model.generate(ids, past_key_values=foreign, **OPTIONS),
        lambda: model.model(ids, None, None, foreign),
    ):
        with pytest.raises(TypeError, match=r"cannot use a DynamicCache: expected an int8_ops\.ll"):
            call()


def test_a_cache_implementation_without_a_counterpart_is_refused(model):
    with pytest.raises(ValueError, match="cache_implementation='quantized' has no counterpart"):
        model.generate(ids_of(1, 4), **OPTIONS, cache_implementation="quantized")


def test_a_static_cache_that_is_too_small_is_refused(model):
    with pytest.raises(ValueError, match="holds 8 of at most 8 tokens, got 1 more"):
        model.generate(ids_of(1, 8), **OPTIONS, past_key_values=StaticLatentCache(model, 8))


def test_use_cache_decides_whether_there_is_one(model):
    ids = ids_of(1, 4)
    assert model(ids, use_cache=False).past_key_values is None
    assert type(model(ids).past_key_values) is LatentCache  # the configuration says so
    assert type(model.model(ids).past_key_values) is LatentCache


@torch.no_grad()
def test_copies_and_pickles_work_on_their_own(model):
    ids = ids_of(1, 10)
    expected = by_hand(model, ids, 8)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        options = {**OPTIONS, "max_new_tokens": 8}
        assert torch.equal(other.generate(ids, **options), expected)
        rotary = other.model.layers[0].self_attn._rotary_emb[0]
        assert rotary is other.model.rotary_emb
        assert rotary is not model.model.rotary_emb


@torch.no_grad()
def test_chunked_prefill_after_a_first_turn(model):
    ids = ids_of(1, 30)
    cache = model(ids[:, :20]).past_key_values
    got = through_cache(model, ids[:, 20:], 3, cache)
    expected = model(ids, use_cache=False).logits[:, 20:]
    assert float((got - expected).norm() / expected.norm()) < 5e-3


@torch.no_grad()
def test_a_compiled_step_over_a_static_cache_neither_breaks_nor_recompiles(model):
    ids = ids_of(1, 10)
    expected = by_hand(model, ids, 12)
    cache = StaticLatentCache(model, 32)
    out = model(input_ids=ids, past_key_values=cache, use_cache=True)
    torch._dynamo.reset()
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = ids
    counts = []
    for _ in range(12):
        token = out.logits[:, -1:].argmax(-1)
        found = torch.cat((found, token), dim=1)
        position = torch.tensor([[found.shape[1] - 1]])
        more = {"cache_position": position[0]} if FOUR else {}
        out = step(
            input_ids=token, position_ids=position, past_key_values=cache, use_cache=True, **more
        )
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert torch.equal(found, expected)
    assert counts[-1] == counts[1]
