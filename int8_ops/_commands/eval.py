"""Score models through their KV caches: perplexity, speed, and bytes a token.

Each window of the text is fed in chunks with the cache on, so all but a chunk's own tokens are seen
as the cache stores them. With --original the unconverted model is scored beside them, and with it
transformers' own quantized caches, where quanto or hqq is installed. --plot draws what was scored,
perplexity against bytes: give it several conversions of one model.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import hf
from .._cache_names import cache_of
from . import CommandError, format_table
from .common import (
    add_device_arguments,
    add_text_argument,
    add_window_arguments,
    device_name,
    load,
    pick_dtype,
    positive,
    read_text,
    tensor_bytes,
)

# Options of transformers' quantized caches, 8 bits where a backend has them. Groups of 64 and a
# residual of 128 tokens are transformers' defaults; the axes are those that its guide recommends.
QUANTIZED: tuple[dict[str, Any], ...] = (
    {"backend": "quanto", "nbits": 4, "axis_key": 0, "axis_value": 0},
    {"backend": "hqq", "nbits": 4, "axis_key": 1, "axis_value": 1},
    {"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1},
)


@dataclass(frozen=True)
class Scored:
    """A model with one of its caches; ``change`` is relative to the first of an original."""

    model: str
    cache: str
    perplexity: float
    change: float | None
    bytes_per_token: float
    tokens_per_second: float

    def row(self) -> list[str]:
        """Of the table."""
        return [
            self.model,
            self.cache,
            f"{self.perplexity:.3f}",
            "" if self.change is None else f"{100 * self.change:+.2f} %",
            f"{self.bytes_per_token:,.0f}",
            f"{self.tokens_per_second:.0f}",
        ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``eval``."""
    parser.add_argument(
        "model", metavar="MODEL", nargs="+", help="folders of `convert`, or any models"
    )
    add_text_argument(parser)
    parser.add_argument(
        "--original", metavar="MODEL", help="the model before conversion, to compare with"
    )
    add_window_arguments(parser, 12, "windows to score", 1024)
    parser.add_argument(
        "--skip", type=int, default=0, help="windows to pass over first (default: %(default)s)"
    )
    parser.add_argument(
        "--chunk", type=positive, default=128, help="tokens a pass (default: %(default)s)"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw perplexity against bytes a token, SVG"
    )
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Carry out ``eval``; 0 when the table is printed."""
    device, dtype = pick_dtype(args)
    source, text = read_text(args.text)
    if args.skip < 0:
        raise CommandError(f"--skip: expected 0 or more, got {args.skip}")
    found: list[Scored] = []
    base: float | None = None
    models = [args.original, *args.model] if args.original else args.model
    if args.plot is not None and not args.plot.absolute().parent.is_dir():
        raise CommandError(f"--plot: expected an existing folder, got {args.plot.parent}")
    for name in models:
        loaded = load(name, device, dtype)
        ids = loaded.encode(text).to(device)
        try:
            windows = hf.windows_of(ids, args.window_length, args.skip + args.windows)[args.skip :]
        except ValueError as error:
            raise CommandError(f"{source}: {error}") from error
        for label, make_cache in caches_of(loaded.model):
            found.append(measure(loaded, label, windows, args.chunk, make_cache, base))
            if base is None and args.original:
                base = found[0].perplexity
    print(f"{source}: windows {args.skip} to {args.skip + args.windows - 1} of ", end="")
    print(f"{args.window_length} tokens, {args.chunk} a pass, on {device_name(device)}, {dtype}")
    print()
    headers = ["model", "cache", "perplexity", "change", "bytes a token", "tokens/s"]
    print(format_table(headers, [scored.row() for scored in found], left=frozenset({0, 1})))
    if args.plot is not None:
        args.plot.write_text(plot(found), encoding="utf-8")
        print(f"\nplot: {args.plot}")
    return 0


def caches_of(
    model: Any, quantized: Sequence[dict[str, Any]] = QUANTIZED
) -> Iterator[tuple[str, Callable[[], Any] | None]]:
    """Name and maker of each cache to score a model with; None makes the model's own."""
    if is_converted(model):
        yield "int8_ops latents", None
        return
    yield "its own", None
    import transformers
    from transformers.utils import is_hqq_available, is_optimum_quanto_available

    there = {"quanto": is_optimum_quanto_available(), "hqq": is_hqq_available()}
    for options in quantized:
        if there[options["backend"]]:
            yield (
                f"{options['backend']} {options['nbits']} bit",
                functools.partial(transformers.QuantizedCache, config=model.config, **options),
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
) -> Scored:
    """Perplexity through a cache, how far it is from ``base``, and what the cache takes."""
    from ..llama import score

    found = score(loaded.model, windows, chunk, make_cache)
    return Scored(
        loaded.name,
        label,
        found.perplexity,
        None if base is None else found.perplexity / base - 1,
        bytes_a_token(loaded.model, windows[0], chunk, make_cache),
        sum(len(window) for window in windows) / found.seconds,
    )


def plot(found: Sequence[Scored]) -> str:
    """Perplexity against bytes a token, a line a kind of cache, as SVG."""
    from ..llama.report import plot_lines

    lines: dict[str, list[tuple[float, float]]] = {}
    for scored in sorted(found, key=lambda scored: scored.bytes_per_token):
        # Bits of one backend are points of one line.
        kind = scored.cache.partition(" ")[0] if scored.cache.endswith("bit") else scored.cache
        lines.setdefault(kind, []).append((scored.bytes_per_token, scored.perplexity))
    return plot_lines(lines, "Perplexity through the KV cache", "bytes a token", "perplexity")


def bytes_a_token(
    model: Any, window: Tensor, chunk: int, make_cache: Callable[[], Any] | None
) -> float:
    """Of a converted model's cache, by its own account; of another, all its tensors' bytes."""
    import torch

    from ..llama import LatentCache
    from ..llama.evaluate import feed

    if is_converted(model):
        return LatentCache(model).bytes_per_token()
    with torch.inference_mode():
        for _, out in feed(model, window, chunk, make_cache):
            cache = cache_of(out)
    return tensor_bytes(cache) / len(window)
