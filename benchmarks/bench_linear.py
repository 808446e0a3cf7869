"""``int8_linear`` against its peers. README.md beside this file says how it is measured.

python benchmarks/bench_linear.py [--device cuda] [--shapes M,K,N ...] [--peers NAME ...] [--quick]
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _harness as harness
import torch
from torch import Tensor
from torch.nn import functional as F

import int8_ops
from int8_ops import _extension, reference
from int8_ops.backends import triton as triton_backend


class Shape(NamedTuple):
    """x [M, K] times w [N, K] transposed."""

    m: int
    k: int
    n: int

    @property
    def linear_bytes(self) -> int:
        """What int8_linear must move: bf16 x and y, int8 w and its scales."""
        return 2 * self.m * self.k + self.n * self.k + 4 * self.n + 2 * self.m * self.n


# Reconstructions of low-rank latents at prefill, then decode, then whole Llama-3-8B projections.
SHAPES = [
    Shape(32768, 128, 1024),
    Shape(32768, 256, 1024),
    Shape(32768, 512, 1024),
    Shape(32768, 1024, 1024),
    Shape(32768, 256, 4096),
    Shape(32768, 512, 4096),
    Shape(32768, 1024, 4096),
    Shape(1, 512, 1024),
    Shape(128, 512, 4096),
    Shape(1, 4096, 14336),
    Shape(256, 4096, 4096),
    Shape(8192, 4096, 14336),
    Shape(8192, 14336, 4096),
]
QUICK_SHAPES = [SHAPES[0], SHAPES[2], SHAPES[7], SHAPES[8], SHAPES[10]]
QUANTIZE_SHAPES = [(32768, 512), (32768, 1024), (8192, 4096)]

CPU_MS = (1, 16, 64, 256, 1024)
CPU_SIZES = (512, 1024, 2048, 4096)
CPU_ROUND_BUDGET_US = 400_000


@dataclass
class Inputs:
    """One set: what any peer reads."""

    x: Tensor  # bf16 [M, K]
    w: Tensor  # bf16 [N, K]
    x_q: Tensor
    x_scale: Tensor
    w_q: Tensor
    w_scale: Tensor


def make_inputs(shape: Shape, device: torch.device, rng: torch.Generator) -> Inputs:
    """Random normal data: int8 kernels on zeros run at other clocks."""
    x = torch.randn((shape.m, shape.k), generator=rng, device=device, dtype=torch.bfloat16)
    w = torch.randn((shape.n, shape.k), generator=rng, device=device, dtype=torch.bfloat16)
    return Inputs(x, w, *reference.quantize_per_token(x), *reference.quantize_per_channel(w))


def eager_int_mm(inputs: Inputs) -> Tensor:
    """``torch._int_mm`` with quantize and epilogue as a PyTorch user writes them."""
    x = inputs.x.float()
    amax = x.abs().amax(dim=-1, keepdim=True)
    scale = amax / torch.full_like(amax, 127)  # by a number, CUDA multiplies by its reciprocal
    q = (x / scale).round().clamp(-127, 127).to(torch.int8)
    acc = torch._int_mm(q, inputs.w_q.t())
    return (acc.float() * scale * inputs.w_scale.t()).to(inputs.x.dtype)


@dataclass(frozen=True)
class Peer:
    """A way to compute a shape. ``exact`` ones are compared with the reference, bit for bit."""

    name: str
    run: Callable[[Inputs], Tensor]
    exact: bool = True
    takes: Callable[[Shape], bool] = lambda shape: True


def cuda_linear(i: Inputs) -> Tensor:
    """This library's op, quantize included."""
    out: Tensor = torch.ops.int8_ops.int8_linear.default(i.x, i.w_q, i.w_scale, None)
    return out


def cuda_matmul(i: Inputs) -> Tensor:
    """This library's op on an input that is quantized already."""
    out: Tensor = torch.ops.int8_ops.int8_scaled_mm.default(
        i.x_q, i.w_q, i.x_scale, i.w_scale, None, i.x.dtype
    )
    return out


PEERS = [
    Peer("cuda", cuda_linear),
    Peer("bf16", lambda i: F.linear(i.x, i.w), exact=False),
    Peer("int_mm", eager_int_mm, takes=lambda s: s.m > 16 and s.k % 8 == 0 and s.n % 8 == 0),
    Peer("triton", lambda i: triton_backend.int8_linear(i.x, i.w_q, i.w_scale, None)),
    Peer("cuda mm", cuda_matmul),
    Peer(
        "triton mm",
        lambda i: triton_backend.int8_scaled_mm(
            i.x_q, i.w_q, i.x_scale, i.w_scale, None, i.x.dtype
        ),
    ),
]


def absent_reason(peer: str, device: torch.device) -> str | None:
    """Why a peer can't run here."""
    if peer.startswith("cuda"):
        return _extension.unavailable_reason("cuda")
    if peer.startswith("triton"):
        return triton_backend.unavailable_reason(device)
    return None


def bench_shape(
    shape: Shape, peers: list[Peer], device: torch.device, rounds: int
) -> dict[str, float]:
    """Median us of each peer at a shape, after each has been checked."""
    rng = torch.Generator(device).manual_seed(0)
    # The least that a peer reads decides: the int8 operands.
    sets = harness.input_sets((shape.m + shape.n) * shape.k, device)
    inputs = [make_inputs(shape, device, rng) for _ in range(sets)]
    calls = max(harness.MIN_CALLS, sets)
    replays = {}
    last = (calls - 1) % sets
    want = {}
    for i in {0, last}:
        one = inputs[i]
        want[i] = reference.int8_scaled_mm(
            one.x_q, one.w_q, one.x_scale, one.w_scale, None, one.x.dtype
        )
    for peer in peers:
        if not peer.takes(shape):
            continue
        replay = harness.capture(
            [lambda one=inputs[i % sets], run=peer.run: run(one) for i in range(calls)]
        )
        for i, position in ((0, 0), (last, calls - 1)):
            if peer.exact:
                harness.require_equal(peer.name, tuple(shape), replay.outputs[position], want[i])
        replays[peer.name] = replay
    harness.time_interleaved(list(replays.values()), rounds)
    return {name: replay.median_us for name, replay in replays.items()}


def bench_linear(
    shapes: list[Shape],
    peers: list[Peer],
    device: torch.device,
    rounds: int,
    copy_bytes_per_s: float,
    tops: float | None,
) -> list[dict[str, Any]]:
    """The table of shapes: us a peer, ratios, and the share of the floor."""
    names = [peer.name for peer in peers]
    main = "cuda" if "cuda" in names else "triton"
    print(f"\nint8_linear, us a call; x bf16: bf16's time over {main}'s, higher is better")
    heads = ["M", "K", "N", "floor", *names, "x bf16", "x int_mm", "x triton", "mm x triton"]
    table = harness.Table([*heads, "% floor"])
    rows = []
    for shape in shapes:
        us = bench_shape(shape, peers, device, rounds)
        gc.collect()
        torch.cuda.empty_cache()
        floor_us = 1e6 * shape.linear_bytes / copy_bytes_per_s
        if tops is not None:
            floor_us = max(floor_us, 2 * shape.m * shape.n * shape.k / (tops * 1e6))
        own = us.get(main)
        ratios = {
            "x bf16": harness.ratio(us.get("bf16"), own),
            "x int_mm": harness.ratio(us.get("int_mm"), own),
            "x triton": harness.ratio(us.get("triton"), own),
            "mm x triton": harness.ratio(us.get("triton mm"), us.get("cuda mm")),
        }
        share = harness.ratio(floor_us, own)
        percent = None if share is None else 100 * share
        table.line(
            [
                *(str(size) for size in shape),
                harness.number(floor_us),
                *(harness.number(us.get(name)) for name in names),
                *(harness.number(value, 2) for value in ratios.values()),
                harness.number(percent, 0),
            ]
        )
        rows.append(
            {**shape._asdict(), "floor_us": floor_us, "us": us, "percent_of_floor": percent}
        )
    return rows


def bench_quantize(
    backends: list[str], device: torch.device, rounds: int, copy_bytes_per_s: float
) -> list[dict[str, Any]]:
    """``quantize_per_token`` of bf16, as a share of the copy bandwidth."""
    functions: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
        "cuda": lambda x: torch.ops.int8_ops.quantize_per_token.default(x),
        "triton": triton_backend.quantize_per_token,
    }
    print("\nquantize_per_token, bf16: us, and bytes read and written as % of the copy bandwidth")
    heads = [head for name in backends for head in (f"{name} us", f"{name} GB/s", f"{name} %")]
    table = harness.Table(["rows", "cols", *heads])
    result = []
    for rows, cols in QUANTIZE_SHAPES:
        moved = 3 * rows * cols + 4 * rows
        sets = harness.input_sets(2 * rows * cols, device)
        rng = torch.Generator(device).manual_seed(1)
        xs = [
            torch.randn((rows, cols), generator=rng, device=device, dtype=torch.bfloat16)
            for _ in range(sets)
        ]
        calls = max(harness.MIN_CALLS, sets)
        replays = {}
        want_q, want_scale = reference.quantize_per_token(xs[0])
        for name in backends:
            replay = harness.capture(
                [lambda x=xs[i % sets], run=functions[name]: run(x) for i in range(calls)]
            )
            harness.require_equal(name, (rows, cols), replay.outputs[0][0], want_q)
            harness.require_equal(name, (rows, cols), replay.outputs[0][1], want_scale)
            replays[name] = replay
        harness.time_interleaved(list(replays.values()), rounds)
        line: dict[str, Any] = {"rows": rows, "cols": cols}
        cells = []
        for name, replay in replays.items():
            rate = moved / (replay.median_us * 1e-6)
            percent = 100 * rate / copy_bytes_per_s
            line[name] = {
                "us": replay.median_us,
                "gb_per_s": rate / 1e9,
                "percent_of_copy": percent,
            }
            cells += [
                harness.number(replay.median_us),
                harness.number(rate / 1e9, 0),
                harness.number(percent, 0),
            ]
        table.line([str(rows), str(cols), *cells])
        result.append(line)
    return result


def bench_host(backends: list[str], device: torch.device, count: int) -> dict[str, float]:
    """Host time of one eager call at M = 1, K = 512, N = 1024, without waiting for the device."""
    inputs = make_inputs(Shape(1, 512, 1024), device, torch.Generator(device).manual_seed(2))
    calls: dict[str, harness.Call] = {"F.linear": lambda: F.linear(inputs.x, inputs.w)}
    for backend in backends:
        layer = int8_ops.INT8Linear(inputs.w, None, backend=backend)
        calls[f"INT8Linear({backend})"] = lambda layer=layer: layer(inputs.x)
    if "cuda" in backends:
        calls["ops.int8_linear"] = lambda: cuda_linear(inputs)
    with torch.no_grad():
        us = harness.host_us(calls, count)
    print("\nhost us of one eager call, M = 1, K = 512, N = 1024")
    table = harness.Table(["call", "us", "x F.linear"], min_width=20)
    for name, value in us.items():
        table.line([name, harness.number(value, 2), harness.number(value / us["F.linear"], 2)])
    return us


def main_cuda(args: argparse.Namespace) -> dict[str, Any]:
    """The whole run on a CUDA device."""
    if not torch.cuda.is_available():
        raise SystemExit("bench_linear: --device cuda, but torch sees no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    peers = []
    for peer in PEERS:
        if args.peers and peer.name not in args.peers:
            continue
        reason = absent_reason(peer.name, device)
        if reason is None:
            peers.append(peer)
        elif args.peers:
            raise SystemExit(f"bench_linear: {peer.name} was asked for, but is absent: {reason}")
        else:
            print(f"left out: {peer.name}: {reason}")
    shapes = args.shapes or (QUICK_SHAPES if args.quick else SHAPES)
    rounds = 5 if args.quick else 15

    facts = {**harness.software_facts(), **harness.gpu_facts(device)}
    copy = harness.copy_bandwidth(device, rounds)
    tops = harness.peak_tops(facts["device"], args.peak_tops)
    facts |= {"copy_gb_per_s": round(copy / 1e9), "floor_int8_tops": tops, "replays": rounds}
    harness.print_facts(facts)

    result: dict[str, Any] = {}
    result["linear"] = bench_linear(shapes, peers, device, rounds, copy, tops)
    # The clocks of a device that has just been at work.
    facts |= {
        f"{name} (after)": v for name, v in harness.gpu_facts(device).items() if "cloc" in name
    }
    backends = [name for name in ("cuda", "triton") if name in (peer.name for peer in peers)]
    if backends:
        result["quantize"] = bench_quantize(backends, device, rounds, copy)
        result["host_us"] = bench_host(backends, device, 500 if args.quick else 3000)
    return {"facts": facts, **result}


def _last_level_cache_bytes() -> int:
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    size = path.read_text().strip() if path.exists() else "32768K"
    return int(size.rstrip("KM")) << (20 if size.endswith("M") else 10)


def main_cpu(args: argparse.Namespace) -> dict[str, Any]:
    """The CPU kernels against F.linear in float32 and bfloat16, each on x of its own dtype."""
    _extension.core.require()
    facts = {
        **harness.software_facts(),
        "isa": _extension.build_info.require().cpu_isa(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cache_bytes": _last_level_cache_bytes(),
    }
    harness.print_facts(facts)
    sizes = (512, 2048) if args.quick else CPU_SIZES
    shapes = args.shapes or [Shape(m, k, n) for k, n, m in itertools.product(sizes, sizes, CPU_MS)]
    print("\nint8_linear against F.linear, us a call; x: F.linear's time over ours")
    table = harness.Table(["M", "K", "N", "int8 f32", "f32", "x", "int8 bf16", "bf16", "x"])
    rows = []
    for shape in shapes:
        us = bench_cpu_shape(shape, args.quick)
        speedups = {name: us[name] / us[f"int8 {name}"] for name in ("f32", "bf16")}
        table.line(
            [
                *(str(size) for size in shape),
                *(
                    cell
                    for name in ("f32", "bf16")
                    for cell in (
                        harness.number(us[f"int8 {name}"]),
                        harness.number(us[name]),
                        harness.number(speedups[name], 2),
                    )
                ),
            ]
        )
        rows.append({**shape._asdict(), "us": us, "speedup": speedups})
    return {"facts": facts, "linear": rows}


def bench_cpu_shape(shape: Shape, quick: bool) -> dict[str, float]:
    """Median us of int8_linear and F.linear at a shape, x in float32 and in bfloat16."""
    rng = torch.Generator().manual_seed(0)
    w = torch.randn((shape.n, shape.k), generator=rng)
    w_q, w_scale = reference.quantize_per_channel(w)
    linear = torch.ops.int8_ops.int8_linear.default
    # A decode step streams its weights from memory: rotate over more than the cache holds. Where
    # a weight is used many times a call, two sets are enough.
    sets = 2
    if shape.m <= 16:
        sets = min(max(2, -(-2 * _last_level_cache_bytes() // (shape.n * shape.k))), 64)
    calls: dict[str, list[harness.Call]] = {}
    for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        x = torch.randn((shape.m, shape.k), generator=rng).to(dtype)
        want = reference.int8_linear(x, w_q, w_scale)
        harness.require_equal(f"cpu {name}", tuple(shape), linear(x, w_q, w_scale, None), want)
        ours = [w_q.clone() for _ in range(sets)]
        floats = [w.to(dtype, copy=True) for _ in range(sets)]
        calls[f"int8 {name}"] = [lambda x=x, one=one: linear(x, one, w_scale, None) for one in ours]
        calls[name] = [lambda x=x, one=one: F.linear(x, one) for one in floats]
    with torch.no_grad():
        once = sum(harness.wall_us(calls, 1).values())
        rounds = min(max(int(CPU_ROUND_BUDGET_US / once), 3), 200)
        return harness.wall_us(calls, 3 if quick else rounds)


def _shape(text: str) -> Shape:
    try:
        shape = Shape(*(int(size) for size in text.split(",")))
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"expected M,K,N, got {text!r}") from None
    return shape


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", type=_shape, nargs="+", metavar="M,K,N", help="only these")
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=[peer.name for peer in PEERS],
        help="only these (CUDA); an absent one is then an error",
    )
    parser.add_argument("--quick", action="store_true", help="fewer shapes and replays")
    parser.add_argument("--peak-tops", type=float, help="int8 peak of the floor, by default known")
    parser.add_argument("--commit", help="what was measured, where git can't be asked")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything measured here")
    args = parser.parse_args()
    result = main_cuda(args) if args.device == "cuda" else main_cpu(args)
    if args.commit is not None:
        result["facts"]["commit"] = args.commit
    if args.json is not None:
        harness.write_json(args.json, result)


if __name__ == "__main__":
    main()
