"""Decoding through the fused kernel: that it is taken, where it is not, and that tokens agree."""

from __future__ import annotations

import pytest
import torch
from llama_cases import FAMILIES, FOUR, ids_of, make_converted, through_cache

from int8_ops import backends
from int8_ops._cache_names import cache_of, passed
from int8_ops.llama import LatentAttention, LatentCache, LatentConfig, StaticLatentCache, decode

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": 10_000}
BOTH = LatentConfig(kv_ratio=0.45, rank_multiple=8)


def attentions(model):
    return [module for module in model.modules() if isinstance(module, LatentAttention)]


def choose(model, name):
    for module in attentions(model):
        module.decode = name
    return model


@pytest.fixture
def calls(monkeypatch):
    """Counts the kernel's calls."""
    found = []
    original = backends.latent_attention_decode

    def counted(q, *arguments, **more):
        found.append(q.shape[2])
        return original(q, *arguments, **more)

    monkeypatch.setattr(backends, "latent_attention_decode", counted)
    return found


@pytest.fixture(params=list(FAMILIES))
def model(request):
    return choose(make_converted(request.param, BOTH), "kernel")


def close(got, expected):
    """As ``assert_same`` of test_llama_attention.py: another order of sums, and a flip or two."""
    assert float((got - expected).norm() / expected.norm()) < 5e-3


@torch.no_grad()
def test_greedy_tokens_are_those_of_the_general_path(model, calls):
    ids = ids_of(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    ids[0, :7] = 0
    for more in ({}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 4}):
        rows = slice(1, 2) if "prompt_lookup_num_tokens" in more else slice(0, 2)
        arguments = {"attention_mask": mask[rows], **OPTIONS, **more}
        calls.clear()
        got = choose(model, "kernel").generate(ids[rows], **arguments)
        assert len(calls) >= 3 * 10
        calls.clear()
        expected = choose(model, "general").generate(ids[rows], **arguments)
        assert calls == []
        assert torch.equal(got, expected), more


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_logits_are_those_of_the_general_path(model, calls, chunk):
    ids = ids_of(2, 48)
    for cache in (LatentCache, lambda model: StaticLatentCache(model, 50)):
        calls.clear()
        got = through_cache(choose(model, "kernel"), ids, chunk, cache(model))
        assert calls.count(chunk) >= 3 * (48 // chunk - 1)
        close(got, through_cache(choose(model, "general"), ids, chunk, cache(model)))


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_a_padded_row_is_what_it_is_alone(model, static):
    ids = ids_of(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)

    def cache():
        return StaticLatentCache(model, 64) if static else LatentCache(model)

    kept = cache()
    whole = []
    for begin, end in ((0, 26), (26, 27), (27, 30)):
        out = model(
            ids[:, begin:end],
            attention_mask=mask[:, :end],
            position_ids=position_ids[:, begin:end],
            **passed(model, kept),
        )
        whole.append(out.logits)
    alone = through_cache(model, ids[:1, 9:], 17, cache())
    close(torch.cat(whole, dim=1)[:1, 9:], alone)


@torch.no_grad()
def test_beams_reorder_what_the_kernel_reads(model):
    options = {**OPTIONS, "num_beams": 3, "max_new_tokens": 12}
    ids = ids_of(1, 20)
    got = choose(model, "kernel").generate(ids, **options)
    assert torch.equal(got, choose(model, "general").generate(ids, **options))


class Asked:
    """One module, and what a pass of one query over 20 tokens asks of it."""

    def __init__(self, config=BOTH, **changes):
        self.model = choose(make_converted("llama", config, **changes), "kernel")
        self.module = attentions(self.model)[0]

    def reason(self, query=None, tokens=20, **options):
        query = torch.zeros(1, 8, 1, 8) if query is None else query
        with torch.no_grad():
            return decode.why_general(self.module, query, tokens, {"dropout": 0.0, **options})


def test_reasons_for_the_general_path(monkeypatch):
    asked = Asked()
    assert asked.reason() is None
    assert asked.reason(tokens=1) == "nothing was cached before"
    assert asked.reason(dropout=0.1) == "not plain scaled_dot_product_attention"
    assert "float64" in asked.reason(torch.zeros(1, 8, 1, 8, dtype=torch.float64))
    assert asked.reason(torch.zeros(1, 8, 1, 8, device="meta")) == "no kernel for meta"
    asked.module.decode = "general"
    assert asked.reason() == "asked for"
    asked.module.decode = "auto"
    isa = decode.CPU_ISA
    for least, reason in ((0, None), (21, "below 21 tokens"), (None, "not measured")):
        monkeypatch.setitem(decode.FROM_TOKENS, ("cpu", isa), least)
        assert asked.reason() == reason or asked.reason().startswith(str(reason))
    asked.module.backend = "fallback"
    assert asked.reason() == "the backend asked for is fallback"
    asked = Asked()
    asked.model.set_attn_implementation("eager")
    assert asked.reason() == "not plain scaled_dot_product_attention"
    sixteen = Asked(LatentConfig(kv_ratio=1.0, bits=16, rank_multiple=8))
    assert sixteen.reason() == "latents in 16 bits"
    asked = Asked()
    asked.module.rotary_emb.rope_type = "dynamic"
    assert asked.reason() == "RoPE that changes with the length"
    query = torch.zeros(1, 8, 1, 8, requires_grad=True)
    found = decode.why_general(asked.module, query, 20, {})
    assert found == "a gradient is recorded"


def test_every_instruction_set_has_its_measured_rule():
    from int8_ops import _build

    assert {("cpu", isa) for isa in _build.cpu_isas()} <= set(decode.FROM_TOKENS)


def test_the_rule_of_a_gpu_is_that_of_its_architecture(monkeypatch):
    monkeypatch.setattr(decode, "CUDA_KINDS", {0: "sm90", 1: ""})
    assert decode.from_tokens(torch.device("cuda", 0)) == 0
    assert decode.from_tokens(torch.device("cuda", 1)) is None
    assert decode.from_tokens(torch.device("meta")) is None


@pytest.mark.gpu
@torch.no_grad()
def test_a_model_on_hopper_takes_the_kernel_by_itself(calls):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("not a Hopper GPU")
    model = make_converted("llama", BOTH).to("cuda")
    ids = ids_of(2, 30).to("cuda")
    out = model(ids[:, :29], use_cache=True)
    before = len(calls)
    model(ids[:, 29:], past_key_values=out.past_key_values)
    assert len(calls) > before


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral-window"])
def test_padding_in_the_middle_and_masks_of_ones_own_take_the_general_path(calls, family):
    model = choose(make_converted(family, BOTH), "kernel")
    ids = ids_of(2, 30)
    mask = torch.ones_like(ids)
    mask[0, 5:8] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    got = {}
    for name in ("kernel", "general"):
        choose(model, name)
        out = model(ids[:, :29], attention_mask=mask[:, :29], position_ids=position_ids[:, :29])
        step = {"attention_mask": mask, "position_ids": position_ids[:, 29:]}
        got[name] = model(ids[:, 29:], **step, **passed(model, cache_of(out))).logits
    assert calls == []
    assert torch.equal(got["kernel"], got["general"])
    choose(model, "kernel")
    # A mask that lets a token see what comes after it, and one that adds floats.
    cache = cache_of(model(ids[:1, :20]))
    calls.clear()
    for whole in (torch.ones(1, 1, 3, 23, dtype=torch.bool), torch.zeros(1, 1, 3, 23)):
        model(ids[:1, 20:23], attention_mask=whole, **passed(model, cache))
        cache.crop(20 if FOUR else -3)
    assert calls == []
    model(ids[:1, 20:23], **passed(model, cache))
    assert calls == [3] * 3


@torch.no_grad()
def test_padding_that_positions_do_not_know_of(calls):
    """Positions that count through the padding: the mask tells where a row begins."""
    model = choose(make_converted("llama", BOTH), "kernel")
    ids = ids_of(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    got = {}
    for name in ("kernel", "general"):
        choose(model, name)
        out = model(ids[:, :29], attention_mask=mask[:, :29])
        got[name] = model(ids[:, 29:], attention_mask=mask, **passed(model, cache_of(out))).logits
    assert len(calls) == 3
    close(got["kernel"], got["general"])


def recorded(model):
    """A compiled model, and the operators of its graphs once it was called."""
    torch._dynamo.reset()
    targets = []

    def record(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    return torch.compile(model, fullgraph=True, backend=record), targets


@torch.no_grad()
def test_a_compiled_step_takes_the_kernel_after_a_prompt_without_a_mask():
    """Which is what transformers gives a fresh static cache."""
    length = 20
    model = choose(make_converted("llama", BOTH), "kernel")
    ids = ids_of(1, length + 1)
    compiled, targets = recorded(model)
    logits = []
    for step in (compiled, model):
        cache = StaticLatentCache(model, 32)
        model(ids[:, :length], use_cache=True, **passed(model, cache))
        more = {"cache_position": torch.tensor([length])} if FOUR else {}
        out = step(
            input_ids=ids[:, length:],
            position_ids=torch.tensor([[length]]),
            **passed(model, cache),
            **more,
        )
        logits.append(out.logits)
    assert sum("latent_attention_decode" in name for name in targets) == 3
    close(*logits)


@torch.no_grad()
def test_a_compiled_step_takes_the_kernel_where_the_prompt_was_regular():
    model = choose(make_converted("llama", BOTH), "kernel")
    ids = ids_of(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)

    def run(step, kernel):
        choose(model, "kernel" if kernel else "general")
        cache = StaticLatentCache(model, 32)
        arguments = {"attention_mask": mask, "position_ids": position_ids}
        out = model(ids, **arguments, **passed(model, cache))
        logits = []
        for n in range(20, 26):
            grown = torch.cat((mask, mask.new_ones(2, n - 19)), dim=1)
            slots = torch.arange(32)
            seen = (slots < n + 1) & torch.nn.functional.pad(grown, (0, 31 - n)).bool()
            out = step(
                input_ids=out.logits[:, -1:].argmax(-1),
                attention_mask=seen[:, None, None],
                position_ids=torch.tensor([[n - 4], [n]]),
                **({"cache_position": torch.tensor([n])} if FOUR else {}),
                **passed(model, cache),
            )
            logits.append(out.logits)
        return torch.cat(logits, dim=1), cache

    compiled, targets = recorded(model)
    got, cache = run(compiled, True)
    assert sum("latent_attention_decode" in name for name in targets) >= 3
    close(got, run(model, False)[0])
    # What a graph takes for granted it asserts.
    holed = torch.ones(2, 1, 1, 32, dtype=torch.bool)
    holed[..., 27:] = False
    holed[0, 0, 0, 9] = False
    choose(model, "kernel")
    with pytest.raises(RuntimeError, match="padding in the middle"):
        compiled(
            input_ids=ids[:, :1],
            attention_mask=holed,
            position_ids=torch.tensor([[22], [26]]),
            **({"cache_position": torch.tensor([26])} if FOUR else {}),
            **passed(model, cache),
        )
