"""A converted model in generate(): which cache it gets, and that every mode gives the same."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle

import pytest
import torch
from llama_cases import FOUR, ids_of, make_converted, make_model, through_cache, transformers

from int8_ops._cache_names import cache_argument, cache_of, cache_position, passed
from int8_ops.llama import LatentAttention, LatentCache, LatentConfig, StaticLatentCache, score

pytestmark = pytest.mark.usefixtures("one_thread")

ACCEPTED = inspect.signature(transformers.LlamaForCausalLM.forward).parameters
# No end token: every run has the same length.
OPTIONS = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": 10_000}


@pytest.fixture(scope="module")
def model():
    return make_converted(config=LatentConfig(kv_ratio=0.45, rank_multiple=8))


def by_hand(model, ids, count, cache=None):
    """Greedy tokens, one a pass."""
    found = ids
    out = model(input_ids=ids, use_cache=True, **passed(model, cache))
    for _ in range(count):
        token = out.logits[:, -1:].argmax(-1)
        found = torch.cat((found, token), dim=1)
        out = model(input_ids=token, use_cache=True, **passed(model, cache_of(out)))
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
        passed(model, LatentCache(model)),
        passed(model, StaticLatentCache(model, 26)),
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},  # assisted: crops what it guessed wrong
    ):
        assert torch.equal(model.generate(ids, **OPTIONS, **more), expected), more


def test_generate_returns_our_cache(model):
    out = model.generate(ids_of(1, 10), **OPTIONS, return_dict_in_generate=True)
    assert type(cache_of(out)) is LatentCache
    assert cache_of(out).get_seq_length() == 25
    out = model.generate(
        ids_of(1, 10), **OPTIONS, return_dict_in_generate=True, cache_implementation="static"
    )
    assert type(cache_of(out)) is StaticLatentCache


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


class Adapted(torch.nn.Module):
    """As adapters wrap a model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def get_base_model(self):
        return self.model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


@pytest.mark.parametrize(
    "wrap",
    [Adapted, lambda model: torch.compile(model, backend="eager")],
    ids=["adapter", "compiled"],
)
def test_a_wrapped_model_is_scored_as_it_is(model, wrap):
    windows = list(ids_of(2, 24))
    plain = score(model, windows, chunk=8)
    assert score(wrap(model), windows, chunk=8).nll == pytest.approx(plain.nll, rel=1e-6)


def test_a_cache_of_another_kind_is_refused_with_the_reason(model):
    ids = ids_of(1, 4)
    foreign = transformers.DynamicCache()
    for call in (
        lambda: model(ids, **passed(model, foreign)),
        lambda: model.generate(ids, **passed(model, foreign), **OPTIONS),
        lambda: model.model(ids, None, None, foreign),
    ):
        with pytest.raises(TypeError, match=r"cannot use a DynamicCache: expected an int8_ops\.ll"):
            call()


def test_a_cache_implementation_without_a_counterpart_is_refused(model):
    with pytest.raises(ValueError, match="cache_implementation='quantized' has no counterpart"):
        model.generate(ids_of(1, 4), **OPTIONS, cache_implementation="quantized")


def test_a_static_cache_that_is_too_small_is_refused(model):
    options = {**OPTIONS, **passed(model, StaticLatentCache(model, 8))}
    with pytest.raises(ValueError, match="holds 8 of at most 8 tokens, got 1 more"):
        model.generate(ids_of(1, 8), **options)


def test_use_cache_decides_whether_there_is_one(model):
    ids = ids_of(1, 4)
    assert cache_of(model(ids, use_cache=False)) is None
    assert type(cache_of(model(ids))) is LatentCache  # the configuration says so
    assert type(cache_of(model.model(ids))) is LatentCache


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
    cache = cache_of(model(ids[:, :20]))
    got = through_cache(model, ids[:, 20:], 3, cache)
    expected = model(ids, use_cache=False).logits[:, 20:]
    assert float((got - expected).norm() / expected.norm()) < 5e-3


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen2"])
@pytest.mark.parametrize("flow", ["integer", "seed", "eager"])
def test_a_static_cache_gives_the_bits_of_a_growing_one(family, flow):
    """In bfloat16, where sums in another order show: prompt, chunks, and steps one by one."""
    assert_same_bits(family, flow, 16, "cpu")


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen2"])
@pytest.mark.parametrize("flow", ["integer", "seed", "eager"])
def test_a_static_cache_gives_the_bits_of_a_growing_one_on_a_gpu(family, flow):
    """The same on CUDA, with heads and ranks that the Hopper kernel takes."""
    assert_same_bits(family, flow, 64, "cuda")


def assert_same_bits(family, flow, head_dim, device):
    multiple = head_dim // 2
    config = LatentConfig(kv_ratio=0.6, rank_multiple=multiple)
    if flow == "seed":
        config = LatentConfig(kv_ratio=1.0, bits=16, rank_multiple=multiple, flow="seed")
    model = make_converted(family, config, head_dim=head_dim).to(device, torch.bfloat16)
    if flow == "eager":
        model.set_attn_implementation("eager")
    parts = ((0, 13), (13, 14), (14, 33), (33, 37), *((n, n + 1) for n in range(37, 41)))
    ids = ids_of(2, 41).to(device)
    for decode, padding in itertools.product(("kernel", "general"), (0, 3)):
        for module in model.modules():
            if isinstance(module, LatentAttention):
                module.decode = decode
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
        caches = (LatentCache(model), StaticLatentCache(model, 67))
        for begin, end in parts:
            dynamic, static = (
                model(
                    ids[:, begin:end],
                    attention_mask=mask[:, :end],
                    position_ids=position_ids[:, begin:end],
                    use_cache=True,
                    **passed(model, cache),
                ).logits
                for cache in caches
            )
            assert torch.equal(dynamic, static), (decode, padding, begin, end)


@torch.no_grad()
def test_a_compiled_step_over_a_static_cache_neither_breaks_nor_recompiles(model):
    ids = ids_of(1, 10)
    expected = by_hand(model, ids, 12)
    cache = StaticLatentCache(model, 32)
    out = model(input_ids=ids, use_cache=True, **passed(model, cache))
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
            input_ids=token, position_ids=position, use_cache=True, **passed(model, cache), **more
        )
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert torch.equal(found, expected)
    assert counts[-1] == counts[1]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_the_cache_is_taken_by_every_name_that_the_model_takes(model):
    ids = ids_of(1, 6)
    expected = model(ids, use_cache=False).logits
    for name in {"past_key_values", cache_argument(type(model))}:
        for part in (model, model.model):
            cache = LatentCache(model)
            out = part(ids, use_cache=True, **{name: cache})
            assert cache_of(out) is cache
            assert cache.get_seq_length() == 6
            out = part(ids, use_cache=True, **{name: None})  # None is as good as absent
            assert type(cache_of(out)) is LatentCache
            assert part is model.model or torch.equal(out.logits, expected)
        options = {**OPTIONS, "return_dict_in_generate": True, name: cache}
        assert cache_of(model.generate(ids_of(1, 7), **options)) is cache


@pytest.mark.skipif("cache" in ACCEPTED, reason="this transformers takes its cache as cache")
def test_a_cache_under_a_name_that_the_model_ignores_is_refused(model):
    with pytest.raises(TypeError, match="expected the cache as past_key_values"):
        model(ids_of(1, 4), cache=LatentCache(model))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_a_model_that_runs_its_layers_twice_has_a_cache_where_transformers_has_one(model):
    """With gradients there is none; without, since the release that renamed the argument."""
    training = make_converted()
    training.gradient_checkpointing_enable()
    training.train()
    ids = ids_of(1, 4)
    plain = make_model()
    plain.gradient_checkpointing_enable()
    plain.train()
    with torch.enable_grad():
        assert cache_of(training(ids, use_cache=True)) is None
        assert cache_of(plain(ids, use_cache=True)) is None
    assert (cache_of(training(ids, use_cache=True)) is None) == (
        cache_of(plain(ids, use_cache=True)) is None
    )


def test_the_cache_names_are_read_off_classes():
    class New(torch.nn.Module):
        def forward(self, ids, mask=None, cache=None, past_key_values=None):
            """Takes both."""

    class Old(torch.nn.Module):
        def forward(self, ids, past_key_values=None):
            """Takes one."""

    assert (cache_argument(New), cache_position(New)) == ("cache", 2)
    assert (cache_argument(Old), cache_position(Old)) == ("past_key_values", 1)
    with pytest.raises(TypeError, match="takes cache or past_key_values, got Linear, which takes"):
        cache_argument(torch.nn.Linear)
