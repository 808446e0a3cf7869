"""``benchmarks/bench_llama.py`` on a tiny model: every section but the compiled ones runs."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5.0")

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "bench_llama.py"
if not SCRIPT.is_file():
    pytest.skip("needs the source tree", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_llama", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TINY = ["--config", "tiny", "--device", "cpu", "--quick"]


def test_the_sections_run_and_are_recorded(bench, tmp_path, capsys):
    path = tmp_path / "record.json"
    sections = ["memory", "prefill", "decode", "convert"]
    options = ["--specs", "int8", "mixed", "--points", "2x64", "--no-compile"]
    assert bench.main([*TINY, *options, "--json", str(path), "--section", *sections]) == 0
    record = json.loads(path.read_text())
    found = record["sections"]
    assert list(found) == sections
    assert record["not_run"] == []
    assert record["meta"]["transformers"]
    for row in found["memory"]:
        assert row["met"]
        assert row["slope"] == pytest.approx(row["bytes_per_token"], rel=1e-6)
    assert [row["through"] for row in found["memory"]] == ["the model", "the cache"] * 2
    assert [row["model"] for row in found["prefill"]] == ["original", "int8", "mixed"]
    assert [row["model"] for row in found["decode"]] == ["original", "int8", "mixed"]
    assert all(row["ms"] > 0 for row in (*found["prefill"], *found["decode"]))
    assert found["convert"][0]["met"]
    printed = capsys.readouterr()
    assert printed.out.count("bytes_per_token()") == 4
    assert "s left] decode: mixed, eager, 2 x 64" in printed.err


def test_a_profile_tells_what_kernels_take_of_an_eager_step(bench, tmp_path):
    path = tmp_path / "record.json"
    options = ["--section", "decode", "--specs", "int8", "--points", "1x64", "--no-compile"]
    assert bench.main([*TINY, *options, "--profile", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    for row in record["sections"]["decode"]:
        kernels = record["profiles"][f"decode {row['model']} eager 1 x 64"]
        assert row["kernels_ms"] >= sum(kernel["ms"] for kernel in kernels) * (1 - 1e-9) > 0


def test_eager_steps_can_be_left_out(bench, tmp_path):
    path = tmp_path / "record.json"
    options = ["--section", "decode", "--points", "1x64", "--no-eager", "--no-compile"]
    assert bench.main([*TINY, *options, "--json", str(path)]) == 0
    assert json.loads(path.read_text())["sections"] == {}


def test_what_there_is_no_time_for_is_recorded(bench, tmp_path):
    path = tmp_path / "record.json"
    options = ["--time-budget", "0", "--section", "memory", "decode", "--points", "1x64"]
    assert bench.main([*TINY, *options, "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["sections"] == {}
    assert {row["why"] for row in record["not_run"]} == {"no time left"}
    assert len(record["not_run"]) == 4 + 3 + 2


def test_a_limit_ends_what_takes_too_long(bench):
    with pytest.raises(bench.OutOfTime), bench.limit(0.05):
        time.sleep(20)


@pytest.mark.parametrize("name", ["int8", "int4", "mixed"])
@pytest.mark.parametrize("ratio", [0.125, 0.25, 0.5])
def test_specs_stay_within_their_bytes(bench, name, ratio):
    class Config:
        num_key_value_heads, head_dim = 8, 128

    spec = bench.layer_spec(name, Config, ratio)
    rank = sum(part.rank for part in spec.k)
    spare = ratio * 4 * 8 * 128 - spec.bytes_per_token
    assert spare >= 0
    # Less than the next multiple of 32 takes, of keys and of values.
    assert spare < 2 * 32 or rank == 1024
    assert all(part.rank % 32 == 0 for part in spec.k)
    assert rank <= 1024


def test_a_spec_may_name_its_rank(bench):
    spec = bench.layer_spec("int4:384", None, 0.25)
    assert [(part.bits, part.rank) for part in (*spec.k, *spec.v)] == [(4, 384)] * 2
    with pytest.raises(SystemExit):
        bench.main([*TINY, "--specs", "int8:"])


def test_a_static_cache_is_compared_by_its_bits(bench, tmp_path, capsys):
    path = tmp_path / "record.json"
    options = ["--section", "static", "--static-models", "random", "--no-compile"]
    assert bench.main([*TINY, *options, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["sections"]["static"]
    ours = [row for row in rows if "original" not in row["model"]]
    assert len(ours) == 6
    assert all(row["met"] and row["uncompiled"]["equal_logits"] == row["tokens"] for row in ours)
    assert len(rows) == 10
    # transformers' own caches, in bfloat16, say that another order of sums does show.
    others = [row["uncompiled"]["equal_logits"] for row in rows if row not in ours]
    assert min(others) < 24
    assert "with equal logits" in capsys.readouterr().out
