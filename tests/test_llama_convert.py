"""convert(): what it refuses, what it allocates, what it reports."""

from __future__ import annotations

import itertools
import json
import math
import xml.etree.ElementTree as ET

import pytest
import torch
from llama_cases import ids_of, make_converted, make_model, transformers
from torch import nn

from int8_ops.llama import LatentAttention, LatentCache, LatentConfig, convert
from int8_ops.llama.allocate import allocate, choices_of, noise_variance
from int8_ops.llama.calibrate import Costs, Moments, factorize, grid_of, measure_moments
from int8_ops.llama.conversion import (
    Clock,
    Shown,
    _cut,
    bytes_in_16_bits,
    prepare,
    study_model,
)
from int8_ops.llama.packing import dequantize_int4, quantize_int4
from int8_ops.llama.refine import Student, refine
from int8_ops.llama.report import plot_lines
from int8_ops.llama.spec import Slice

pytestmark = pytest.mark.usefixtures("one_thread")

CALIBRATION = ids_of(2, 64, seed=1)


# -- refusals -------------------------------------------------------------------------------------


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(isinstance(module, LatentAttention) for module in model.modules())
    assert "_prepare_cache_for_generation" not in vars(model)


def gemma():
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes, **heads))


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32)
    )


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (gemma, "Gemma2ForCausalLM cannot be converted: .*got Gemma2Attention"),
        (gpt2, r"model\.layers and model\.rotary_emb, got GPT2LMHeadModel"),
        (lambda: nn.Linear(2, 2), "got Linear"),
    ],
)
def test_other_architectures_are_refused_by_name(make, told):
    model = make()
    before = state_of(model)
    with pytest.raises(TypeError, match=told):
        convert(model, CALIBRATION)
    assert_untouched(model, before)


def test_a_converted_model_is_not_converted_again():
    with pytest.raises(TypeError, match="is converted already"):
        convert(make_converted(), CALIBRATION)


def test_projections_that_are_not_plain_linears_are_refused():
    from int8_ops import quantize_

    model = make_model()
    quantize_(model, "*layers.1.*v_proj", progress=False)
    with pytest.raises(TypeError, match=r"nn\.Linear as v_proj of layer 1, got INT8Linear"):
        convert(model, CALIBRATION)


def test_rope_whose_frequencies_move_is_refused():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = make_model(rope=rope)
    with pytest.raises(ValueError, match="its RoPE is of type 'dynamic'"):
        convert(model, CALIBRATION)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"kv_ratio": 0.3, "mean_rank": 4}, "expected one of kv_ratio and mean_rank, got both"),
        ({"kv_ratio": 1.5}, r"kv_ratio in \(0, 1\], got 1.5"),
        ({"bits": 3}, "bits 8, 4, 16 or 'auto', got 3"),
        ({"objective": "magic"}, "fisher, activation, weight, got 'magic'"),
        ({"mean_rank": 4}, "mean_rank needs bits 8, 4 or 16, got 'auto'"),
        ({"ranks": [(1, 1)]}, "ranks needs bits 8, 4 or 16"),
        ({"rank_multiple": 7}, "an even rank_multiple with 4 bits"),
        ({"heads_per_group": 0}, "heads_per_group >= 1, got 0"),
        ({"backend": "nonsense"}, "unknown backend 'nonsense'"),
        ({"flow": "seed"}, "'seed' with bits=16, got 'seed' with bits='auto'"),
    ],
)
def test_a_bad_configuration_is_refused_by_name(values, told):
    with pytest.raises(ValueError, match=told):
        LatentConfig(**values)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (LatentConfig(heads_per_group=3), "divide the model's 4 KV heads, got 3"),
        (LatentConfig(ranks=[(8, 8)] * 2, bits=8), "ranks for 3 layers, got 2"),
        (LatentConfig(ranks=[(8, 64)] * 3, bits=8), r"ranks\[0\] to be two of 1..32, got \(8, 64"),
        (LatentConfig(mean_rank=33, bits=8), "mean_rank <= 32, got 33"),
        (
            LatentConfig(kv_ratio=0.01),
            "as small as 4 bytes a token: expected at least 120",
        ),
    ],
)
def test_what_a_model_cannot_have_is_refused_before_it_is_touched(config, told):
    model = make_model()
    before = state_of(model)
    with pytest.raises(ValueError, match=told):
        convert(model, CALIBRATION, config, progress=False)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("calibration", "error", "told"),
    [
        (None, ValueError, "objective 'fisher' needs calibration text, got none"),
        (["text"], ValueError, "needs tokenizer=, got None"),
        (7, TypeError, "strings, token ids or batches, got int"),
        ([torch.randn(1, 8)], TypeError, r"batches of token ids \[B, S\], got torch.float32"),
        (torch.arange(5), ValueError, "one window of 1024 tokens, got 5 tokens"),
    ],
)
def test_a_bad_calibration_is_refused(calibration, error, told):
    model = make_model()
    before = state_of(model)
    with pytest.raises(error, match=told):
        convert(model, calibration, progress=False)
    assert_untouched(model, before)


def test_a_loss_that_is_not_finite_is_refused():
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[5, 5] = math.inf
    with pytest.raises(ValueError, match="expected a finite loss, got"):
        convert(model, CALIBRATION, progress=False)
    assert not any(isinstance(module, LatentAttention) for module in model.modules())


# -- calibration ----------------------------------------------------------------------------------


class Words:
    """A tokenizer of one id a word."""

    def __call__(self, text, **kwargs):
        return {"input_ids": [3 + len(word) for word in text.split()]}


def test_text_ids_and_batches_are_the_same_calibration():
    text = ["a bb ccc dddd " * 10, "eeeee a a ffffff " * 6]
    ids = [i for t in text for i in Words()(t)["input_ids"]]
    config = LatentConfig(kv_ratio=0.4, rank_multiple=8, sequence_length=32)
    reports = []
    for calibration, tokenizer in (
        (text, Words()),
        (torch.tensor(ids), None),
        ([torch.tensor([ids[:32]]), {"input_ids": torch.tensor([ids[32:64]])}], None),
    ):
        report = convert(
            make_model(), calibration, config, tokenizer=tokenizer, progress=False
        ).to_dict()
        report.pop("seconds")
        reports.append(report)
    assert reports[0]["calibration_tokens"] == 64
    assert reports[0] == reports[1] == reports[2]


def assert_close(got, expected):
    """Float32 sums of 128 products, against float64 ones."""
    assert float((got.double() - expected).norm() / expected.norm()) < 128 * 2**-24


def test_moments_are_those_of_the_definition():
    model = make_model(num_hidden_layers=1)
    found = measure_moments(model, [CALIBRATION], 2, True, lambda items, what: iter(items))
    attention = model.model.layers[0].self_attn
    captured = {}
    hook = attention.v_proj.register_forward_hook(
        lambda module, inputs, output: captured.update(x=inputs[0], y=output)
    )
    out = model(CALIBRATION, use_cache=False).logits[:, :-1]
    loss = nn.functional.cross_entropy(
        out.flatten(0, 1), CALIBRATION[:, 1:].flatten(), reduction="sum"
    )
    (grad,) = torch.autograd.grad(loss, captured["y"])
    hook.remove()
    x, g = captured["x"].detach().flatten(0, 1).double(), grad.flatten(0, 1).double()
    moments = found[0, "v"]
    by_g = g.square().sum(1, keepdim=True)
    by_x = x.square().sum(1, keepdim=True)
    assert_close(moments.c, (x * by_g).T @ x)
    for group in range(2):
        part = g[:, group * 16 : group * 16 + 16]
        assert_close(moments.g[group], (part * by_x).T @ part)
    assert float(moments.energy) == pytest.approx(float((by_g * by_x).sum()), rel=1e-4)
    assert moments.tokens == 128
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_factors_multiply_to_the_weight_and_cut_best_in_their_metric():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(12, 20, generator=generator)
    x = torch.randn(400, 20, generator=generator) * torch.logspace(0, -2, 20)
    g = torch.randn(400, 12, generator=generator) * torch.logspace(0, -1, 12)
    moments = Moments(x.T @ x, (g.T @ g)[None], torch.tensor(1.0, dtype=torch.float64), 400)
    weighted, plain = factorize(w, moments, 1), factorize(w, None, 1)
    assert torch.allclose(weighted.a[0] @ weighted.b[0], w.double(), atol=1e-9)
    assert torch.allclose(plain.a[0] @ plain.b[0], w.double(), atol=1e-9)

    def loss(factors, rank):
        d = w.double() - factors.a[0][:, :rank] @ factors.b[0][:rank]
        return float(torch.einsum("ij,jk,lk,il->", d, moments.c.double(), d, moments.g[0].double()))

    for rank in (2, 5, 9):
        assert loss(weighted, rank) < 0.8 * loss(plain, rank)
    assert torch.equal(weighted.spectrum, weighted.spectrum.sort(descending=True).values)


def test_groups_have_factors_of_their_own():
    w = torch.randn(12, 20)
    factors = factorize(w, None, 3)
    assert factors.a.shape == (3, 4, 4)
    assert torch.allclose((factors.a @ factors.b).reshape(12, 20), w.double(), atol=1e-9)


def test_costs_predict_what_a_cut_does():
    """Against the definition: half the mean square of the loss's linear change, on real passes."""
    model = make_model(num_hidden_layers=1)
    config = LatentConfig(mean_rank=24, bits=16, rank_multiple=8)
    report = convert(make_model(num_hidden_layers=1), CALIBRATION, config, progress=False)
    assert report.predicted_loss > 0
    measured = report.loss_after - report.loss_before
    assert abs(measured) < 20 * report.predicted_loss + 0.05
    less = LatentConfig(mean_rank=12, bits=16, rank_multiple=4)
    assert (
        convert(model, CALIBRATION, less, progress=False).predicted_loss
        > 1.5 * report.predicted_loss
    )


# -- allocation -----------------------------------------------------------------------------------


def some_costs(seed, n=8, multiple=2):
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.rand(n, generator=generator, dtype=torch.float64).sort(descending=True).values
    spectrum *= torch.logspace(0, -2, n, dtype=torch.float64)
    squares = spectrum.square()
    tail = torch.cat((squares.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)))
    grid = grid_of(n, multiple)
    below = torch.cat((torch.zeros(1, dtype=torch.float64), spectrum.cumsum(0)))[grid]
    return Costs(tail, below[:, None] * below, grid, 1.0)


def test_choices_rise_in_bytes_and_fall_in_cost():
    choices = choices_of(some_costs(0, 64, 8), (8, 4), 3)
    assert len(choices) > 4
    for a, b in itertools.pairwise(choices):
        assert a.bytes < b.bytes
        assert a.cost > b.cost
    assert choices[-1].spec == (Slice(8, 64),)
    assert choices[-1].bytes == 3 * 68
    assert any(len(choice.spec) == 2 for choice in choices)


def test_allocation_is_close_to_the_best_of_all():
    choices = {(i, "k"): choices_of(some_costs(i), (8, 4), 1) for i in range(3)}
    for budget in (16, 20, 26, 33):
        chosen = allocate(choices, budget)
        assert sum(choice.bytes for choice in chosen.values()) <= budget
        cost = sum(choice.cost for choice in chosen.values())
        best = min(
            sum(choice.cost for choice in combination)
            for combination in itertools.product(*choices.values())
            if sum(choice.bytes for choice in combination) <= budget
        )
        # Lagrange finds the best on the convex hull; the rest of the budget is filled greedily.
        assert best <= cost <= 1.3 * best


def test_noise_falls_with_bits():
    assert noise_variance(16, 32) == 0
    assert 0.005 < noise_variance(4, 32) < noise_variance(4, 192) < 0.02
    # An int8 step is 127/8 times finer, squared: 252.
    assert 200 < noise_variance(4, 192) / noise_variance(8, 192) < 320


@pytest.mark.parametrize("ratio", [0.25, 0.4, 0.6, 1.0])
@pytest.mark.parametrize("bits", [8, 4, "auto"])
def test_the_budget_is_kept_scales_counted(ratio, bits):
    model = make_model()
    budget = ratio * bytes_in_16_bits(model)
    assert bytes_in_16_bits(model) == 3 * 2 * 32 * 2
    convert(model, CALIBRATION, LatentConfig(kv_ratio=ratio, bits=bits, rank_multiple=2))
    cache = LatentCache(model)
    assert cache.bytes_per_token() - 4 <= budget
    most = 3 * 2 * (32 // (2 if bits == 4 else 1) + 4)
    assert cache.bytes_per_token() - 4 > min(0.93 * budget, most - 1)


def test_explicit_ranks_and_mean_ranks_are_kept():
    model = make_model()
    ranks = [(8, 16), (4, 30), (32, 2)]
    convert(model, CALIBRATION, LatentConfig(ranks=ranks, bits=4), progress=False)
    specs = [layer.self_attn.spec for layer in model.model.layers]
    assert [(spec.k[0].rank, spec.v[0].rank) for spec in specs] == ranks
    assert {part.bits for spec in specs for part in (*spec.k, *spec.v)} == {4}
    model = make_model()
    convert(model, CALIBRATION, LatentConfig(mean_rank=16, bits=8, rank_multiple=2))
    specs = [layer.self_attn.spec for layer in model.model.layers]
    found = [part.rank for spec in specs for part in (*spec.k, *spec.v)]
    assert 15.5 <= sum(found) / 6 <= 16
    assert len(set(found)) > 1


@pytest.mark.parametrize("objective", ["activation", "weight"])
def test_other_objectives_convert_too(objective):
    model = make_model()
    config = LatentConfig(kv_ratio=0.5, objective=objective, rank_multiple=4)
    report = convert(model, None if objective == "weight" else CALIBRATION, config, progress=False)
    assert report.predicted_loss is None
    assert model(ids_of(1, 8)).logits.isfinite().all()


def test_groups_are_converted_on_their_own():
    model = make_converted(config=LatentConfig(kv_ratio=0.7, heads_per_group=2, rank_multiple=8))
    attention = model.model.layers[0].self_attn
    assert attention.spec.groups == 2
    assert (
        LatentCache(model).bytes_per_token()
        == sum(layer.self_attn.spec.bytes_per_token for layer in model.model.layers) + 4
    )


# -- determinism and report -----------------------------------------------------------------------


def test_a_seed_decides_everything():
    ids = ids_of(1, 20)

    def logits(seed):
        config = LatentConfig(kv_ratio=0.35, rank_multiple=8, seed=seed)
        with torch.no_grad():
            return make_converted(config=config)(ids).logits

    assert torch.equal(logits(0), logits(0))
    assert not torch.equal(logits(0), logits(1))


def test_rotation_spreads_a_latents_energy_and_changes_no_product():
    """Where few directions carry most of a latent, int4 loses the rest of it unless rotated."""
    w = torch.randn(32, 48) * torch.logspace(0, -3, 48)
    factors = factorize(w, None, 1)
    spec = (Slice(4, 32),)
    x = torch.randn(256, 48, dtype=torch.float64)
    error = []
    for rotate in (False, True):
        a, b = _cut(factors, spec, (0, 0, 0), rotate)
        assert torch.allclose(a[0] @ b[0], w.double(), atol=1e-9)
        assert torch.allclose(a.norm(), b.norm())
        part = (x @ b[0].T).float()
        rounded = dequantize_int4(*quantize_int4(part))
        error.append(float(((rounded - part).double() @ a[0].T).norm()))
    assert error[1] < 0.85 * error[0]


def test_the_report_prints_and_saves(tmp_path):
    model = make_model()
    report = convert(model, CALIBRATION, LatentConfig(kv_ratio=0.4, rank_multiple=4))
    told = str(report)
    assert len(told.splitlines()) >= 7
    assert f"bytes a token: {report.bytes_per_token:,} of 384 in 16 bits" in told
    assert report.bytes_per_token == LatentCache(model).bytes_per_token()
    assert all(layer.measured >= 0 for layer in report.layers)
    total = sum(layer.k.predicted + layer.v.predicted for layer in report.layers)
    assert report.predicted_loss == pytest.approx(total)
    report.save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved == json.loads(json.dumps(report.to_dict()))
    assert saved["layers"][0]["k"]["full_rank"] == 32
    svg = ET.parse(tmp_path / "report.svg").getroot()
    assert len(svg.findall("{http://www.w3.org/2000/svg}circle")) == 6
    # Of both conversions' losses, and the budgets that a model as small as this can have.
    assert report.curve == sorted(report.curve)
    assert [loss for _, loss in report.curve] == sorted((c[1] for c in report.curve), reverse=True)
    assert report.curve[-1][0] <= 0.5 * 384 + 4
    svg = ET.parse(tmp_path / "report_bytes.svg").getroot()
    points = svg.findall("{http://www.w3.org/2000/svg}circle")
    assert len(points) == len(report.curve) + 2 > 2


def test_without_calibration_there_is_no_perplexity_to_plot(tmp_path):
    report = convert(make_model(), None, LatentConfig(kv_ratio=0.4, objective="weight"))
    report.save(tmp_path / "report.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.svg"]
    with pytest.raises(ValueError, match="expected a conversion with calibration text"):
        report.plot_perplexity()


def test_a_plot_needs_points():
    with pytest.raises(ValueError, match="at least one point"):
        plot_lines({"a": []}, "t", "x", "y")


def test_training_mode_and_gradient_flags_survive():
    model = make_model().train()
    model.lm_head.weight.requires_grad_(False)
    model.model.layers[1].self_attn.q_proj.requires_grad_(False)
    convert(model, CALIBRATION, LatentConfig(kv_ratio=0.5, rank_multiple=8), progress=False)
    assert model.training
    assert all(module.training for module in model.modules())
    assert not model.lm_head.weight.requires_grad
    flags = [layer.self_attn.q_proj.weight.requires_grad for layer in model.model.layers]
    assert flags == [True, False, True]
    assert not model.model.layers[0].self_attn.k_proj.BLinear.weight.requires_grad
    assert model.model.layers[0].mlp.up_proj.weight.requires_grad


# -- refinement -----------------------------------------------------------------------------------


def divergence(model, original) -> float:
    """From the original's predictions, nats a token, on tokens that were not calibrated on."""
    ids = ids_of(4, 64, seed=9)
    with torch.no_grad():
        found, wanted = (m(ids).logits.log_softmax(-1) for m in (model, original))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def test_refined_factors_stay_closer_to_the_model():
    original, found = make_model(), {}
    for steps in (0, 48):
        model = make_model()
        config = LatentConfig(kv_ratio=0.3, rank_multiple=4, refine=steps)
        report = convert(model, ids_of(16, 64, seed=1), config)
        assert ("refining" in report.seconds) == (steps > 0)
        found[steps] = divergence(model, original)
    assert found[48] < 0.95 * found[0]


@pytest.mark.parametrize("family", ["llama-mha-bias", "mistral-window"])
def test_the_student_predicts_as_the_converted_model_will(family):
    """But for A, which is not rounded to int8 yet, and the int4 values that this tips over."""
    config = LatentConfig(kv_ratio=0.4, rank_multiple=4, heads_per_group=2, refine=0)
    model, shown = make_model(family), Shown(False)
    study = study_model(model, CALIBRATION, config, None, shown, Clock())
    plan = prepare(model, study, config, shown, Clock())
    specs = {key: choice.spec for key, choice in plan.chosen.items()}
    cut = {
        (index, stream): _cut(study.factors[index, stream], spec, (0, index, number), True)
        for number, stream in enumerate(("k", "v"))
        for index, spec in ((i, specs[i, stream]) for i in plan.attentions)
    }
    ids = ids_of(1, 64, seed=9)
    student = Student(model, cut, specs, "auto")
    with torch.no_grad():
        predicted = model(ids).logits
        student.active = False
        before = model(ids).logits
        student.remove()
        assert torch.equal(model(ids).logits, before)
        plan.install(model)
        after = model(ids).logits
    assert (predicted - after).norm() < 0.3 * (before - after).norm()


def test_refining_leaves_the_model_and_the_given_factors_alone():
    model, shown = make_model(), Shown(False)
    model.lm_head.weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    before = state_of(model)
    specs = {(i, s): (Slice(4, 16),) for i in range(3) for s in "kv"}
    cut = {key: (torch.randn(1, 32, 16), torch.randn(1, 16, 64)) for key in specs}
    copies = {key: (a.clone(), b.clone()) for key, (a, b) in cut.items()}
    batches = list(CALIBRATION.split(1))
    refined = refine(model, cut, specs, batches, 3, "auto", shown)
    again = refine(model, cut, specs, batches, 3, "auto", shown)
    assert_untouched(model, before)
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert not any(m._forward_hooks for m in model.modules())
    for key, pair in cut.items():
        for given, copy, new, same in zip(pair, copies[key], refined[key], again[key], strict=True):
            assert torch.equal(given, copy)
            assert torch.equal(new, same)
            assert not new.requires_grad
            assert 0 < (new - given).norm() < 0.1 * given.norm()
    model.lm_head.weight.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="refine: expected a finite divergence, got nan"):
        refine(model, cut, specs, batches, 3, "auto", shown)
    assert not any(m._forward_hooks for m in model.modules())
