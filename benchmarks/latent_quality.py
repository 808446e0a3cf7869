"""What conversions of a model cost in perplexity, through their caches, and what others' caches do.

  python benchmarks/latent_quality.py --calibration valid.txt --text test.txt \
      --json benchmarks/results/latent_quality_cpu.json

Every ratio is converted with every seed, from one set of statistics, and scored on windows of
--text. Beside them stand the original and, where quanto or hqq is installed, transformers' own
quantized caches. The JSON is written after every row; rows that it has already are not run again,
so a run that was cut short goes on, and one may add ratios or seeds.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers

from int8_ops import hf
from int8_ops._bench import facts
from int8_ops._bench.record import RecordFile
from int8_ops._commands.eval import QUANTIZED, bytes_a_token, caches_of
from int8_ops.llama import LatentCache, LatentConfig, score
from int8_ops.llama.conversion import Clock, Shown, bytes_in_16_bits, prepare, study_model

# More bits of transformers' caches than the eval command scores.
MORE = (
    {"backend": "quanto", "nbits": 2, "axis_key": 0, "axis_value": 0},
    {"backend": "hqq", "nbits": 2, "axis_key": 1, "axis_value": 1},
)
CHUNK = 128


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", default=hf.SMOLLM2)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.16, 0.2, 0.26, 0.39, 0.51])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--refine", type=int, default=LatentConfig().refine)
    parser.add_argument("--first", type=int, nargs="+", default=[0, 100], help="window of a range")
    parser.add_argument("--count", type=int, default=12, help="windows of a range")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--statistics", type=Path, help="kept here, made where absent")
    parser.add_argument("--json", type=Path, required=True)
    return parser.parse_args()


def main() -> int:
    """Measure what the record lacks."""
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    loaded = hf.load_causal_lm(args.model, device=torch.device("cpu"), dtype=torch.float32)
    model: Any = loaded.model
    ids = loaded.encode(args.text.read_text(encoding="utf-8"))
    last = max(args.first) + args.count
    windows = hf.windows_of(ids, 1024, last)
    ranges = {f"{n}..{n + args.count - 1}": windows[n : n + args.count] for n in args.first}
    record = RecordFile(args.json)
    if args.json.exists():
        record.data = json.loads(args.json.read_text())
    record.data.setdefault("rows", [])
    before = record.data.get("facts", {})
    record.data["facts"] = {
        **before,
        **facts.software_facts(),
        **facts.cpu_facts(),
        "transformers": transformers.__version__,
        "model": loaded.name,
        "text": args.text.name,
        "calibration": args.calibration.name,
        "bytes_in_16_bits": bytes_in_16_bits(model),
    }
    for key in ("model", "text", "calibration"):
        if before.get(key, record.data["facts"][key]) != record.data["facts"][key]:
            raise SystemExit(
                f"{args.json} was measured with {key} {before[key]}, got "
                f"{record.data['facts'][key]}: name another --json"
            )
    rows: list[dict[str, Any]] = record.data["rows"]
    # Of each row, for a record may be made in several runs.
    commit = record.data["facts"].pop("commit")

    def add(
        scored: Any, name: dict[str, Any], make_cache: Callable[[], Any] | None, more: Any
    ) -> None:
        began = time.perf_counter()
        found = {
            text: score(scored, part, CHUNK, make_cache).perplexity for text, part in ranges.items()
        }
        more = {"seconds_scoring": round(time.perf_counter() - began), "commit": commit, **more}
        rows.append({**name, "perplexity": found, **more})
        line = json.dumps(told(rows[-1], rows))
        record.save()
        print(line, flush=True)

    for label, make_cache in caches_of(model, (*QUANTIZED, *MORE)):
        name: dict[str, Any] = {"cache": label}
        if not any(name.items() <= row.items() for row in rows):
            half = copy.deepcopy(model).to(torch.bfloat16)
            held = [bytes_a_token(m, windows[0], CHUNK, make_cache) for m in (model, half)]
            sizes = {"bytes_per_token_float32": held[0], "bytes_per_token": held[1]}
            add(model, name, make_cache, sizes)
    study = None
    for seed in args.seeds:
        for ratio in args.ratios:
            config = LatentConfig(kv_ratio=ratio, rank_multiple=8, seed=seed, refine=args.refine)
            name = {"cache": "latents", "ratio": ratio, "seed": seed, "refine": args.refine}
            if any(name.items() <= row.items() for row in rows):
                continue
            if study is None:
                study = statistics(model, loaded, args, config)
            clock, began = Clock(), time.perf_counter()
            plan = prepare(model, study, config, Shown(True), clock)
            took = {"seconds_preparing": round(time.perf_counter() - began)}
            converted = copy.deepcopy(model)
            plan.install(converted)
            held_bytes = LatentCache(converted).bytes_per_token()
            add(converted, name, None, {"bytes_per_token": held_bytes, **took})
    return 0


def statistics(model: Any, loaded: hf.LoadedModel, args: Any, config: LatentConfig) -> Any:
    """Of the calibration; from --statistics where they are kept already."""
    if args.statistics and args.statistics.exists():
        return torch.load(args.statistics, weights_only=False)
    ids = loaded.encode(args.calibration.read_text(encoding="utf-8"))
    study = study_model(model, ids, config, None, Shown(True), Clock())
    if args.statistics:
        torch.save(study, args.statistics)
    return study


def told(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row with its changes relative to the original, in percent."""
    base = next((other for other in rows if other["cache"] == "its own"), None)
    if base is None:
        return row
    row["change_percent"] = {
        text: round(100 * math.expm1(math.log(found / base["perplexity"][text])), 3)
        for text, found in row["perplexity"].items()
    }
    return row


if __name__ == "__main__":
    sys.exit(main())
