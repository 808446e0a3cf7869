"""Score a model through its KV cache: perplexity, speed, and bytes a token.

Each window of the text is fed in chunks with the cache on, so all but a chunk's own tokens are seen
as the cache stores them. With --original the unconverted model is scored beside it, and with it
transformers' own quantized caches, where quanto or hqq is installed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import hf
from .._cache_names import cache_of, passed
from . import CommandError, format_table
from .common import (
    add_device_arguments,
    device_name,
    load,
    pick_dtype,
    positive,
    read_text,
    tensor_bytes,
)

# What transformers' quantized caches are scored with: its defaults, and 8 bits where a backend has
# them.
QUANTIZED = (("quanto", 4), ("hqq", 4), ("hqq", 8))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``eval``."""
    parser.add_argument("model", metavar="MODEL", help="a folder of `convert`, or any model")
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="text to score (default: the topics of Python's own help, pydoc_data.topics)",
    )
    parser.add_argument(
        "--original", metavar="MODEL", help="the model before conversion, to compare with"
    )
    parser.add_argument(
        "--windows", type=positive, default=12, help="windows to score (default: %(default)s)"
    )
    parser.add_argument(
        "--skip", type=int, default=0, help="windows to pass over first (default: %(default)s)"
    )
    parser.add_argument(
        "--window-length",
        type=positive,
        default=1024,
        metavar="TOKENS",
        help="tokens a window (default: %(default)s)",
    )
    parser.add_argument(
        "--chunk", type=positive, default=128, help="tokens a pass (default: %(default)s)"
    )
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Carry out ``eval``; 0 when the table is printed."""
    device, dtype = pick_dtype(args)
    source, text = read_text(args.text)
    if args.skip < 0:
        raise CommandError(f"--skip: expected 0 or more, got {args.skip}")
    rows = []
    base: float | None = None
    models = [args.original, args.model] if args.original else [args.model]
    for name in models:
        loaded = load(name, device, dtype)
        ids = loaded.encode(text).to(device)
        try:
            windows = hf.windows_of(ids, args.window_length, args.skip + args.windows)[args.skip :]
        except ValueError as error:
            raise CommandError(f"{source}: {error}") from error
        for label, make_cache in caches_of(loaded.model):
            row, perplexity = measure(loaded, label, windows, args.chunk, make_cache, base)
            base = perplexity if base is None and args.original else base
            rows.append(row)
    print(f"{source}: windows {args.skip} to {args.skip + args.windows - 1} of ", end="")
    print(f"{args.window_length} tokens, {args.chunk} a pass, on {device_name(device)}, {dtype}")
    print()
    headers = ["model", "cache", "perplexity", "change", "bytes a token", "tokens/s"]
    print(format_table(headers, rows, left=frozenset({0, 1})))
    return 0


def caches_of(model: Any) -> Iterator[tuple[str, Callable[[], Any] | None]]:
    """Name and maker of each cache to score a model with; None makes the model's own."""
    if is_converted(model):
        yield "int8_ops latents", None
        return
    yield "its own", None
    import transformers
    from transformers.utils import is_hqq_available, is_optimum_quanto_available

    there = {"quanto": is_optimum_quanto_available(), "hqq": is_hqq_available()}
    for backend, bits in QUANTIZED:
        if there[backend]:
            yield (
                f"{backend} {bits} bit",
                lambda backend=backend, bits=bits: transformers.QuantizedCache(  # type: ignore[misc]
                    backend=backend, config=model.config, nbits=bits
                ),
            )


def is_converted(model: Any) -> bool:
    """Whether ``convert`` made it."""
    from ..llama import LatentAttention

    return any(isinstance(module, LatentAttention) for module in model.modules())


def measure(
    loaded: hf.LoadedModel,
    label: str,
    windows: list[Tensor],
    chunk: int,
    make_cache: Callable[[], Any] | None,
    base: float | None,
) -> tuple[list[str], float]:
    """A row of the table, and the perplexity."""
    from ..llama import score

    found = score(loaded.model, windows, chunk, make_cache)
    tokens = sum(len(window) for window in windows)
    change = "" if base is None else f"{100 * (found.perplexity / base - 1):+.2f} %"
    row = [
        loaded.name,
        label,
        f"{found.perplexity:.3f}",
        change,
        f"{bytes_a_token(loaded.model, windows[0], chunk, make_cache):,.0f}",
        f"{tokens / found.seconds:.0f}",
    ]
    return row, found.perplexity


def bytes_a_token(
    model: Any, window: Tensor, chunk: int, make_cache: Callable[[], Any] | None
) -> float:
    """Of a converted model's cache, by its own account; of another, all its tensors' bytes."""
    import torch

    from ..llama import LatentCache

    if is_converted(model):
        return LatentCache(model).bytes_per_token()
    cache = None if make_cache is None else make_cache()
    with torch.inference_mode():
        for piece in window.split(chunk):
            out = model(input_ids=piece[None], use_cache=True, **passed(model, cache))
            cache = cache_of(out)
    return tensor_bytes(cache) / len(window)
