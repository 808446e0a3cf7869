"""The commands convert, eval and generate, on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_llama import save_tiny_llama

transformers = pytest.importorskip("transformers", minversion="4.56")
tokenizers = pytest.importorskip("tokenizers")

from int8_ops import cli, hf  # noqa: E402
from int8_ops._commands.common import tensor_bytes  # noqa: E402
from int8_ops._commands.eval import caches_of, measure  # noqa: E402
from int8_ops.llama import LatentCache  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 12
WINDOWS = ["--windows", "2", "--window-length", "64"]
CPU = ["--device", "cpu", "--dtype", "float32"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A tiny Llama with a byte tokenizer, the same converted, and a text."""
    root = tmp_path_factory.mktemp("commands")
    save_tiny_llama(root / "original")
    text = root / "text.txt"
    text.write_text(TEXT)
    arguments = ["--kv-ratio", "0.4", "--rank-multiple", "2", "--calibration", str(text)]
    command = ["convert", str(root / "original"), str(root / "converted"), *arguments]
    assert cli.main([*command, *WINDOWS, *CPU]) == 0
    return root / "original", root / "converted", text


def test_convert_writes_a_model_a_tokenizer_and_a_report(folders):
    _, converted, _ = folders
    report = json.loads((converted / "conversion.json").read_text())
    assert report["calibration_tokens"] == 128
    assert report["kv_ratio"] <= 0.4 + 4 / 128
    assert (converted / "conversion.svg").read_text().startswith("<svg")
    loaded = hf.load_causal_lm(str(converted), device=torch.device("cpu"), dtype=torch.float32)
    assert LatentCache(loaded.model).bytes_per_token() == report["bytes_per_token"]
    assert loaded.decode(loaded.encode("yes").tolist()) == "yes"


def test_eval_scores_through_the_cache_beside_the_original(folders, capsys):
    original, converted, text = folders
    command = ["eval", str(converted), "--original", str(original), "--text", str(text)]
    assert cli.main([*command, *WINDOWS, "--chunk", "16", *CPU]) == 0
    lines = capsys.readouterr().out.splitlines()
    rule = next(i for i, line in enumerate(lines) if line.startswith("---"))
    rows = [[c.strip() for c in line.split("  ") if c.strip()] for line in lines[rule + 1 :]]
    mine = next(row for row in rows if row[1] == "int8_ops latents")
    plain = next(row for row in rows if row[1] == "its own")
    loaded = hf.load_causal_lm(str(original), device=torch.device("cpu"), dtype=torch.float32)
    ids = loaded.encode(TEXT)[:128].split(64)
    with torch.no_grad():
        losses = [loaded.model(input_ids=w[None], labels=w[None]).loss for w in ids]
    assert float(plain[2]) == pytest.approx(math.exp(torch.stack(losses).mean()), rel=1e-3)
    # Its own cache is float32: 2 layers, keys and values of 2 heads of 8.
    assert plain[3] == str(2 * 2 * 16 * 4)
    report = json.loads((converted / "conversion.json").read_text())
    assert mine[4] == str(report["bytes_per_token"])
    assert mine[3].endswith("%")
    change = 100 * (float(mine[2]) / float(plain[2]) - 1)
    assert float(mine[3].split()[0]) == pytest.approx(change, abs=0.02)


def test_eval_scores_several_models_and_plots_them(folders, tmp_path, capsys):
    original, converted, text = folders
    command = ["eval", *[str(converted)] * 2, "--original", str(original), "--text", str(text)]
    plot = tmp_path / "plot.svg"
    assert cli.main([*command, "--plot", str(plot), *WINDOWS, *CPU]) == 0
    told = capsys.readouterr().out
    assert told.count("int8_ops latents") == 2
    assert f"plot: {plot}" in told
    drawn = plot.read_text()
    assert drawn.count(">int8_ops latents<") == drawn.count(">its own<") == 1
    assert drawn.count("<circle") >= 3


@pytest.mark.parametrize("axis", [0, 1])
def test_transformers_quantized_caches_are_scored_where_they_are_installed(folders, axis):
    pytest.importorskip("hqq")
    loaded = hf.load_causal_lm(str(folders[0]), device=torch.device("cpu"), dtype=torch.float32)
    options = {"backend": "hqq", "nbits": 8, "axis_key": axis, "axis_value": axis}
    caches = dict(caches_of(loaded.model, [{**options, "q_group_size": 8}]))
    assert list(caches) == ["its own", "hqq 8 bit"]
    windows = [torch.arange(64) % 50]
    own, quantized = (measure(loaded, n, windows, 16, m, None) for n, m in caches.items())
    assert quantized.perplexity == pytest.approx(own.perplexity, rel=0.05)
    assert quantized.bytes_per_token < own.bytes_per_token


@pytest.mark.parametrize("more", [[], ["--static"]])
def test_generate_answers_and_tells_what_the_cache_took(folders, capsys, more):
    _, converted, _ = folders
    command = ["generate", str(converted), "the quick", "--max-new-tokens", "5"]
    assert cli.main([*command, *more, *CPU]) == 0
    told = capsys.readouterr().out
    assert told.startswith("the quick")
    report = json.loads((converted / "conversion.json").read_text())
    assert f"cache: {report['bytes_per_token']} bytes a token" in told
    assert "5 tokens in" in told or "<end>" in told


def test_generate_works_on_an_unconverted_model(folders, capsys):
    assert cli.main(["generate", str(folders[0]), "a", "--max-new-tokens", "2", *CPU]) == 0
    assert "cache: DynamicCache, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["convert", "{original}", "{text}"], "OUT must be a folder"),
        (["convert", "{original}", "{out}", "--rank-multiple", "3"], "an even rank_multiple"),
        (["convert", "{converted}", "{out}", *WINDOWS], "is converted already"),
        (["convert", "{original}", "{out}", "--kv-ratio", "0.001", *WINDOWS], "expected at least"),
        (["convert", "{original}", "{out}", "--calibration", "{out}/no"], "--calibration {out}/no"),
        (["eval", "{converted}", "--text", "{text}", "--windows", "100"], "got 8"),
        (["eval", "{converted}", "--skip", "-1"], "--skip: expected 0 or more, got -1"),
        (["generate", "{converted}", ""], "expected at least one token, got none"),
        (["generate", "{out}/none", "a"], "{out}/none"),
    ],
)
def test_what_cannot_be_done_is_refused(folders, tmp_path, capsys, command, told):
    names = dict(zip(("original", "converted", "text"), map(str, folders), strict=True))
    names["out"] = str(tmp_path)
    arguments = [argument.format(**names) for argument in command]
    assert cli.main([*arguments, *CPU]) == 2
    # A loading bar may stand before it.
    error = capsys.readouterr().err.rpartition(f"int8_ops {command[0]}: ")[2]
    assert told.format(**names) in error


def test_tensor_bytes_counts_each_tensor_once():
    t = torch.zeros(3, dtype=torch.float64)

    class Holder:
        def __init__(self):
            self.a, self.b, self.c = t, [t, torch.zeros(2, dtype=torch.int8)], {"x": "text"}
            self.me = self

    assert tensor_bytes(Holder()) == 24 + 2
