"""Attention of one decode step over int8 latents on CUDA against SDPA over a cache in 16 bits.

``latent_attention_decode`` and ``scaled_dot_product_attention`` with the same queries and as many
cached tokens, both in bfloat16, in one process and in turn: CUDA graphs of calls over inputs that
rotate, so that what a call reads is not in L2. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from int8_ops import ops  # noqa: E402
from int8_ops._bench.facts import print_facts, software_facts  # noqa: E402
from int8_ops._bench.timing import GraphTimer  # noqa: E402
from int8_ops.reference import LatentStream  # noqa: E402

DTYPE = torch.bfloat16
CALLS = 10
ROUNDS = 15
# Of the two paths' results, root mean square over that of the result: both round in 16 bits.
DIFFERENCE_BAR = 1e-2


@dataclass(frozen=True)
class Shape:
    """A decode step of one layer: KV heads in groups, ranks of keys and values."""

    batch: int
    tokens: int
    k_rank: int
    v_rank: int
    bits: int = 8
    groups: int = 1
    group_heads: int = 8
    repeats: int = 4
    q_len: int = 1
    target: float | None = None

    size = 128

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.groups * self.group_heads * self.repeats

    def __str__(self) -> str:
        """In words."""
        text = f"{self.batch} x {self.tokens}, ranks {self.k_rank} and {self.v_rank}"
        text += f", {self.heads} heads over {self.groups} x {self.group_heads}"
        return text + f", int{self.bits}" + (f", {self.q_len} queries" if self.q_len > 1 else "")


K = 1024
TABLE = (
    Shape(1, 128 * K, 256, 256, target=75),
    Shape(1, 128 * K, 128, 128, target=50),
    Shape(1, 128 * K, 512, 512, target=150),
    Shape(1, 32 * K, 256, 256, target=24),
    Shape(8, 8 * K, 256, 256, target=40),
    Shape(32, 16 * K, 256, 256, target=290),
    Shape(1, 128 * K, 192, 384, target=80),
    Shape(8, 16 * K, 256, 256, groups=8, group_heads=4, repeats=1, target=290),
    Shape(1, 128 * K, 256, 256, bits=4),
    Shape(1, 128 * K, 256, 256, q_len=4),
    Shape(1, 128 * K, 256, 256, q_len=16),
)
SWEEPS = (
    *(Shape(1, 512 << i, 256, 256) for i in range(9)),
    *(Shape(1 << i, 4 * K, 256, 256) for i in range(7)),
    *(Shape(1, 32 * K, rank, rank) for rank in (64, 128, 192, 256, 384, 512)),
)
SUITES = {"table": TABLE, "sweeps": SWEEPS}


def make_stream(shape: Shape, rank: int, rng: torch.Generator) -> LatentStream:
    """Random integers, with scales that make keys and values of size 1."""
    packed = shape.bits == 4
    rows = (shape.batch, shape.groups, shape.tokens)
    width = rank // 2 if packed else rank
    device = rng.device
    q = torch.randint(-127, 128, (*rows, width), generator=rng, device=device, dtype=torch.int8)
    scale = torch.rand(rows, generator=rng, device=device) + 0.5
    scale = scale / ((4.6 if packed else 73) * math.sqrt(rank))
    out = shape.group_heads * shape.size
    a_shape = (shape.groups, out, rank)
    a = torch.randint(-127, 128, a_shape, generator=rng, device=device, dtype=torch.int8)
    a_scale = torch.full((shape.groups, out, 1), 1 / 73, device=device)
    return LatentStream([q], [scale], [a], [a_scale])


def measure(shape: Shape, timer: GraphTimer, peers: bool) -> dict[str, float]:
    """Median us of the op and of SDPA. Raises where the op's two CUDA paths differ."""
    rng = torch.Generator(timer.device).manual_seed(0)
    device = timer.device
    q_shape = (shape.batch, shape.heads, shape.q_len, shape.size)
    q = torch.randn(q_shape, generator=rng, device=device).to(DTYPE)
    inv_freq = 500000.0 ** (-torch.arange(0, shape.size, 2, device=device) / shape.size)
    start = torch.zeros(shape.batch, dtype=torch.int32, device=device)
    length = start + shape.tokens
    rows = shape.batch * shape.groups * shape.tokens
    sets = timer.input_sets(rows * (shape.k_rank + shape.v_rank) * shape.bits // 8)
    streams = [
        (make_stream(shape, shape.k_rank, rng), make_stream(shape, shape.v_rank, rng))
        for _ in range(sets)
    ]

    def latent(k: LatentStream, v: LatentStream) -> Tensor:
        return ops.latent_attention_decode(q, k, v, inv_freq, start, length, shape.size**-0.5)

    if shape.batch * shape.tokens <= 32 * K:
        got = latent(*streams[0]).float()
        os.environ["INT8_OPS_ATTENTION_PATH"] = "general"
        expected = latent(*streams[0]).float()
        del os.environ["INT8_OPS_ATTENTION_PATH"]
        difference = float((got - expected).norm() / expected.norm())
        if not difference < DIFFERENCE_BAR:
            raise RuntimeError(f"{shape}: the two paths differ by {difference:.1e}")
    calls = max(CALLS, sets)
    captured = {
        "latent": timer.capture(
            [functools.partial(latent, *streams[i % sets]) for i in range(calls)]
        )
    }
    if peers:
        kv_heads = shape.groups * shape.group_heads
        cache = (shape.batch, kv_heads, shape.tokens, shape.size)
        sets = timer.input_sets(4 * math.prod(cache))
        kv = [
            [torch.randn(cache, generator=rng, device=device, dtype=DTYPE) for _ in range(2)]
            for _ in range(sets)
        ]
        own = shape.tokens - shape.q_len + torch.arange(shape.q_len, device=device)[:, None]
        mask = None if shape.q_len == 1 else torch.arange(shape.tokens, device=device) <= own

        def sdpa(k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, enable_gqa=shape.repeats > 1
            )

        calls = max(CALLS, sets)
        captured["sdpa"] = timer.capture(
            [functools.partial(sdpa, *kv[i % sets]) for i in range(calls)]
        )
    timer.time_interleaved(list(captured.values()), ROUNDS)
    return {name: one.median_us for name, one in captured.items()}


@torch.inference_mode()
def main() -> None:
    """Measure, print a line a shape, and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suites", nargs="+", default=list(SUITES), choices=SUITES)
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="without SDPA")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    timer = GraphTimer(torch.device("cuda", torch.cuda.current_device()))
    facts = {**software_facts(), **timer.device_facts()}
    print_facts(facts)
    print(f"{'us':>8} {'SDPA':>8} {'times faster':>12} {'target':>7}  shape")
    lines = []
    for suite in arguments.suites:
        for shape in SUITES[suite]:
            us = measure(shape, timer, arguments.peers)
            timer.release()
            line = {"suite": suite, "shape": str(shape), "target_us": shape.target, "us": us}
            lines.append(line)
            sdpa = us.get("sdpa", math.nan)
            target = "-" if shape.target is None else f"{shape.target:.0f}"
            print(
                f"{us['latent']:8.1f} {sdpa:8.1f} {sdpa / us['latent']:12.2f} {target:>7}  {shape}",
                flush=True,
            )
            if arguments.json is not None:
                record = {"facts": facts, "attention": lines}
                arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
