"""Time the kernels against bf16, torch._int_mm, Triton and mma.sync.

On a CUDA device: CUDA-graph replay over inputs that are cold in L2, quantizing included, every peer
checked before it is timed. A line is `M K N | us | baseline us | x baseline | % floor`; the floor
is the bytes that must move at copy speed, or the products at the int8 peak. On a CPU: int8_linear
against F.linear. The exit code is 1 if a peer returned something wrong or could not run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .._bench import cpu, cuda, peers
from .._bench.shapes import SUITES, Shape
from .._bench.timing import GraphTimer
from . import CommandError, check_cpu_isa, pick_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench``."""
    parser.add_argument("--device", help="cpu or cuda[:index] (default: cuda where there is one)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--suite",
        nargs="+",
        choices=(*SUITES, "all"),
        default=["all"],
        metavar="SUITE",
        help="; ".join(f"{name}: {summary}" for name, summary in SUITES.items())
        + "; all (default). CUDA only",
    )
    what.add_argument(
        "--shapes",
        type=parse_shape,
        nargs="+",
        default=[],
        metavar="M,K,N",
        help="only these, x [M, K] times a weight [N, K]",
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=peers.NAMES,
        default=[],
        metavar="PEER",
        help="only these, in every suite; an absent one is then an error: "
        + "; ".join(f"{peer.name!r}: {peer.summary}" for peer in peers.PEERS)
        + ". By default all, the slow ones (Triton, _int_mm) in the suite llama alone. CUDA only",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few shapes of each suite, fewer replays"
    )
    parser.add_argument(
        "--time-budget",
        type=float,
        metavar="SECONDS",
        help="begin no further shape after so long, and tell which were not run",
    )
    parser.add_argument(
        "--peak-tops",
        type=float,
        metavar="TOPS",
        help="int8 peak of the floor (default: known for an H100 or H200; else bytes alone count)",
    )
    parser.add_argument("--commit", help="what was measured, where git can't be asked")
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="write everything measured here, as it comes"
    )


def parse_shape(text: str) -> Shape:
    """``M,K,N``, each at least 1."""
    try:
        shape = Shape(*(int(size) for size in text.split(",")))
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"expected M,K,N, got {text!r}") from None
    if min(shape) < 1:
        raise argparse.ArgumentTypeError(f"expected sizes of at least 1, got {text!r}")
    return shape


def run(args: argparse.Namespace) -> int:
    """Carry out ``bench``: 0, or 1 when a peer returned something wrong or could not run."""
    device = pick_device(args.device)
    suites = tuple(name for name in SUITES if {name, "all"} & set(args.suite))
    if device.type == "cpu":
        check_cpu_isa()
        if len(suites) != len(SUITES) or args.peers:
            raise CommandError("--suite and --peers are for CUDA devices; on a CPU: --shapes")
        return cpu.run(
            args.shapes,
            quick=args.quick,
            commit=args.commit,
            json=args.json,
            time_budget=args.time_budget,
        )
    options = cuda.Options(
        suites=suites,
        shapes=tuple(args.shapes),
        peers=tuple(args.peers),
        quick=args.quick,
        peak_tops=args.peak_tops,
        commit=args.commit,
        json=args.json,
        time_budget=args.time_budget,
    )
    current = torch.device("cuda", torch.cuda.current_device())
    try:
        return cuda.Run(options, GraphTimer(current)).run()
    except cuda.AbsentPeer as error:
        raise CommandError(f"--peers: {error}") from error
