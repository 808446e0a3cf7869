"""quantize_: what it matches, what it leaves, and that an error leaves everything."""

from __future__ import annotations

import re
import sys
from typing import ClassVar

import cases
import pytest
import torch
from torch import nn

import int8_ops.nn.quantize as quantize_module
from int8_ops import ALRDLinearINT8, INT8Linear, quantize_, reference


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(16, 16, bias=name == "q_proj"))

    def forward(self, x):
        return self.o_proj(self.q_proj(x) * self.k_proj(x) + self.v_proj(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.layers = nn.ModuleList([Attention() for _ in range(3)])
        self.norm = nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, 11, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.lm_head(self.norm(x))


@pytest.fixture
def model() -> Model:
    return Model().eval()


def _kinds(model):
    return {name: type(module) for name, module in model.named_modules()}


V_PROJ = ["layers.0.v_proj", "layers.1.v_proj", "layers.2.v_proj"]


@pytest.mark.parametrize(
    "pattern",
    [
        "*.v_proj",
        "layers.?.v_*",
        re.compile(r"\.v_proj$"),
        lambda module, name: name.endswith("v_proj"),
    ],
)
def test_patterns_in_place(model, pattern):
    kept = {name: module for name, module in model.named_modules() if name not in V_PROJ}
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in V_PROJ}
    assert quantize_(model, pattern) == V_PROJ
    for name in V_PROJ:
        layer = model.get_submodule(name)
        assert type(layer) is INT8Linear
        assert not layer.training
        q, scale = reference.quantize_per_channel(weights[name])
        assert torch.equal(layer.weight, q)
        assert torch.equal(layer.weight_scale, scale)
    assert all(model.get_submodule(name) is module for name, module in kept.items())


def test_the_model_still_computes_what_it_did(model, device):
    model.to(device)
    ids = torch.arange(10, device=device)[None]
    with torch.no_grad():
        before = model(ids).flatten()
        quantize_(model, "*_proj")
        after = model(ids).flatten()
    assert torch.nn.functional.cosine_similarity(before, after, dim=0) > 0.995
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    ("pattern", "exclude", "head"),
    [
        ("*", None, False),
        (lambda module, name: True, None, False),
        (re.compile("."), None, False),
        ("lm_head", None, True),
        ("lm_*", None, False),
        (re.compile("proj|lm_head"), None, True),
        ("*", (), True),
        ("*", "*.q_proj", True),
        (lambda module, name: True, ["lm_head"], False),
    ],
)
def test_lm_head_only_if_named(model, pattern, exclude, head):
    if pattern == "lm_*":
        with pytest.raises(ValueError, match="lm_head only if named"):
            quantize_(model, pattern, exclude=exclude)
        return
    names = quantize_(model, pattern, exclude=exclude)
    assert ("lm_head" in names) is head
    assert (type(model.lm_head) is INT8Linear) is head


def test_exclude(model):
    names = quantize_(model, "*_proj", exclude=["layers.0.*", re.compile("o_proj")])
    assert names == [f"layers.{i}.{n}_proj" for i in (1, 2) for n in "qkv"]
    assert type(model.layers[0].v_proj) is nn.Linear


def test_rank_makes_low_rank_layers(model):
    x = torch.randn(4, 16)
    expected = model.layers[1].q_proj(x)
    names = quantize_(model, "*.q_proj", rank=16, backend="fallback")
    assert len(names) == 3
    layer = model.layers[1].q_proj
    assert type(layer) is ALRDLinearINT8
    assert layer.backend == "fallback"
    assert not layer.training
    assert torch.nn.functional.cosine_similarity(layer(x), expected).min() > 0.999


def test_nothing_matched_tells_what_is_there(model):
    before = _kinds(model)
    with pytest.raises(
        ValueError, match=r"'\*\.w_proj' matched none.*13 nn.Linear.*layers.0.q_proj"
    ):
        quantize_(model, "*.w_proj")
    with pytest.raises(ValueError, match=r"w_proj\$"):
        quantize_(model, re.compile(r"w_proj$"))
    with pytest.raises(ValueError, match=r"the model has no nn.Linear"):
        quantize_(nn.ReLU(), "*")
    assert _kinds(model) == before


def test_wrong_arguments(model):
    with pytest.raises(TypeError, match=r"expected a glob.*got int"):
        quantize_(model, 3)
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        quantize_(model, "*.v_proj", backend="gpu")
    with pytest.raises(ValueError, match=r"expected rank in 1..16 .*got 17"):
        quantize_(model, "*.v_proj", rank=17)
    with pytest.raises(ValueError, match="the model itself"):
        quantize_(nn.Linear(4, 4), "*")
    assert not any(isinstance(m, (INT8Linear, ALRDLinearINT8)) for m in model.modules())


def test_an_error_on_the_way_leaves_the_model_untouched(model):
    model.layers[2].v_proj.weight = nn.Parameter(torch.randn(16, 16, dtype=torch.float64))
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(RuntimeError, match="expected w of dtype Float, Half or BFloat16"):
        quantize_(model, "*.v_proj")
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_a_shared_module_is_swapped_once_everywhere():
    model = nn.Module()
    model.a = nn.Linear(8, 8)
    model.b = model.a
    model.inner = nn.ModuleDict({"c": model.a, "d": nn.Linear(8, 8)})
    assert quantize_(model, "a") == ["a", "b", "inner.c"]
    assert model.a is model.b is model.inner["c"]
    assert type(model.a) is INT8Linear
    assert type(model.inner["d"]) is nn.Linear


def test_a_shared_module_with_an_excluded_name_is_left():
    model = nn.Module()
    model.proj = nn.Linear(8, 8)
    model.lm_head = model.proj
    with pytest.raises(ValueError, match="matched none"):
        quantize_(model, "proj")


def test_a_tied_weight_stays_with_its_other_owner(model):
    model.lm_head.weight = model.embed.weight
    before = model.embed.weight.detach().clone()
    quantize_(model, "lm_head")
    assert torch.equal(model.embed.weight, before)


def test_subclasses_are_left_to_their_owners():
    attention = nn.MultiheadAttention(16, 2)
    with pytest.raises(ValueError, match=r"the model has no nn.Linear"):
        quantize_(attention, "*")


def test_meta_models_convert_too():
    with torch.device("meta"):
        model = Model()
    assert quantize_(model, "*.v_proj") == V_PROJ
    assert model.layers[0].v_proj.weight.is_meta
    source = Model()
    quantize_(source, "*.v_proj")
    model.load_state_dict(source.state_dict(), assign=True)
    ids = torch.arange(5)[None]
    assert torch.equal(model(ids), source(ids))


def test_the_state_dict_of_a_converted_model_round_trips(model, device):
    quantize_(model, "*.v_proj")
    other = Model().eval()
    quantize_(other, "*.v_proj")
    other.load_state_dict(model.state_dict())
    ids = torch.arange(7)[None]
    assert cases.same_bits(other.to(device)(ids.to(device)), model.to(device)(ids.to(device)).cpu())


class _FakeTqdm:
    made: ClassVar[list] = []

    def __init__(self, items, **kwargs):
        _FakeTqdm.made.append(kwargs)
        self.items = items

    def __iter__(self):
        return iter(self.items)


def test_the_bar_is_for_terminals(model, monkeypatch, capsys):
    fake = type(sys)("tqdm")
    fake.tqdm = _FakeTqdm
    monkeypatch.setitem(sys.modules, "tqdm", fake)
    _FakeTqdm.made.clear()
    quantize_(model, "*.v_proj")
    assert _FakeTqdm.made == []
    monkeypatch.setattr(quantize_module.sys.stderr, "isatty", lambda: True, raising=False)
    quantize_(model, "*.k_proj", progress=False)
    assert _FakeTqdm.made == []
    quantize_(model, "*.q_proj")
    assert len(_FakeTqdm.made) == 1
    monkeypatch.setitem(sys.modules, "tqdm", None)  # not installed
    quantize_(model, "*.o_proj")
    assert capsys.readouterr() == ("", "")
