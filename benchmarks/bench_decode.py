"""Attention of one decode step over integer latents: the kernel and the general path.

``attend_integers`` (``latent_attention_decode``) against ``attend`` (keys rebuilt by the int8
matmul, rotated, scored; values absorbed), on one layer's cache of random integers, in one process
and in turn. Cosines and sines, which the general path makes once a pass for all layers, are made
before. On the CPU ``INT8_OPS_CPU_ISA`` chooses the instruction set; on CUDA the time is that of
captured calls, L2 warm for both. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers.models.llama.modeling_llama import (  # noqa: E402
    LlamaAttention,
    LlamaRotaryEmbedding,
)

from int8_ops._bench.facts import cpu_facts, print_facts, software_facts  # noqa: E402
from int8_ops._bench.timing import GraphTimer  # noqa: E402
from int8_ops.llama import decode  # noqa: E402
from int8_ops.llama.attention import attend  # noqa: E402
from int8_ops.llama.families import attention_class  # noqa: E402
from int8_ops.llama.spec import LayerSpec, Slice  # noqa: E402

# Hidden size, query heads, KV heads, head size, then the slices of keys and values.
SHAPES: dict[str, tuple[int, int, int, int, LayerSpec]] = {
    "smollm2": (576, 9, 3, 64, LayerSpec((Slice(8, 96),), (Slice(8, 160),))),
    "smollm2 8+4": (
        *(576, 9, 3, 64),
        LayerSpec((Slice(8, 32), Slice(4, 64)), (Slice(8, 64), Slice(4, 96))),
    ),
    "llama3-8b": (4096, 32, 8, 128, LayerSpec((Slice(8, 256),), (Slice(8, 256),))),
    "llama3-8b int4": (4096, 32, 8, 128, LayerSpec((Slice(4, 256),), (Slice(4, 512),))),
}
CONTEXTS = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384)
# Root mean square of the difference over that of the result: two orders of sums in q's dtype.
DIFFERENCE_BAR = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
ROUNDS = 15
ROUND_SECONDS = 0.04
CAPTURED_CALLS = 10


def make_layer(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A layer's attention with random integers as A."""
    hidden, heads, kv_heads, size, spec = SHAPES[name]
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=size,
        num_hidden_layers=1,
        max_position_embeddings=1 << 17,
        attn_implementation="sdpa",
    )
    original = LlamaAttention(config, layer_idx=0)
    layer = attention_class(original)(original, spec, LlamaRotaryEmbedding(config)).to(dtype)
    for projection in (layer.k_proj, layer.v_proj):
        for piece in projection.pieces():
            piece.A_int8.random_(-127, 128)
            piece.A_scale.fill_(0.3 / 127)
    return layer.eval().to(device)


def make_stored(
    spec: LayerSpec, batch: int, tokens: int, device: torch.device
) -> tuple[list[Any], list[Any]]:
    """Random integers for ``tokens`` tokens, with scales that make keys and values of size 1."""
    streams = []
    for stream in (spec.k, spec.v):
        parts = []
        for part in stream:
            q = torch.randint(-128, 128, (batch, spec.groups, tokens, part.width)).to(torch.int8)
            step = (0.35 if part.bits == 4 else 0.03) / part.rank**0.5
            scale = torch.rand(batch, spec.groups, tokens) * step + step / 2
            parts.append((q.to(device), scale.to(device)))
        streams.append(parts)
    return streams[0], streams[1]


def seconds_each(calls: list[Callable[[], Tensor]], device: torch.device) -> list[float]:
    """Seconds of each call, taken in turn: the least on a CPU, for what else runs only adds."""
    if device.type == "cuda":
        timer = GraphTimer(device)
        captured = [timer.capture([call] * CAPTURED_CALLS) for call in calls]
        timer.time_interleaved(captured, ROUNDS)
        return [1e-6 * one.median_us for one in captured]
    counts = []
    for call in calls:
        call()
        begin = time.perf_counter()
        call()
        counts.append(max(1, int(ROUND_SECONDS / (time.perf_counter() - begin))))
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for index, call in enumerate(calls):
            begin = time.perf_counter()
            for _ in range(counts[index]):
                call()
            taken[index].append((time.perf_counter() - begin) / counts[index])
    return [min(times) for times in taken]


@torch.inference_mode()
def measure(layer: Any, dtype: torch.dtype, batch: int, queries: int, tokens: int) -> list[float]:
    """Seconds of the general path and of the kernel. Raises where their results differ."""
    spec = layer.spec
    device = layer.k_proj.pieces()[0].A_int8.device
    stored = make_stored(spec, batch, tokens, device)
    heads = layer.config.num_attention_heads
    query = torch.randn(batch, queries, heads, layer.head_dim).to(device, dtype).transpose(1, 2)
    position = torch.arange(tokens, device=device)[None]
    rotary = layer.rotary_emb(query, position)
    numbers = torch.zeros(batch, dtype=torch.int32, device=device)
    rows = decode.Rows(numbers, numbers + tokens, numbers)
    own = tokens - queries + torch.arange(queries, device=device)[:, None]
    mask = None if queries == 1 else (position <= own)[None, None].expand(batch, -1, -1, -1)

    def general() -> Tensor:
        options = {"dropout": 0.0, "scaling": layer.scaling}
        return attend(layer, query, stored, layer.k_proj, layer.v_proj, rotary, mask, **options)[0]

    def kernel() -> Tensor:
        return decode.attend_integers(
            layer, query, stored, layer.k_proj, layer.v_proj, rows, layer.scaling
        )

    expected, got = general().float(), kernel().float()
    difference = float((got - expected).norm() / expected.norm())
    if not difference < DIFFERENCE_BAR[dtype]:
        raise RuntimeError(f"the two paths differ by {difference:.1e} at {tokens} tokens")
    return seconds_each([general, kernel], device)


def main() -> None:
    """Measure, print a line a size, and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--queries", nargs="+", type=int, default=(1, 8))
    parser.add_argument("--dtypes", nargs="+", default=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
        device_facts = GraphTimer(device).device_facts()
    else:
        device_facts = cpu_facts()
    facts = {**software_facts(), **device_facts, "transformers": transformers.__version__}
    print_facts(facts)
    print(f"{'shape':>15} {'dtype':>9} queries  tokens  general us   kernel us  times faster")
    lines = []
    for name in arguments.shapes:
        for dtype_name in arguments.dtypes:
            layer = make_layer(name, getattr(torch, dtype_name), device)
            for queries in arguments.queries:
                for tokens in (n for n in arguments.contexts if n > queries):
                    dtype = getattr(torch, dtype_name)
                    general, kernel = measure(layer, dtype, arguments.batch, queries, tokens)
                    line = {
                        "shape": name,
                        "dtype": dtype_name,
                        "batch": arguments.batch,
                        "queries": queries,
                        "tokens": tokens,
                        "general_us": 1e6 * general,
                        "kernel_us": 1e6 * kernel,
                    }
                    lines.append(line)
                    print(
                        f"{name:>15} {dtype_name:>9} {queries:7d} {tokens:7d} "
                        f"{1e6 * general:11.1f} {1e6 * kernel:11.1f} {general / kernel:13.2f}",
                        flush=True,
                    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"facts": facts, "decode": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
