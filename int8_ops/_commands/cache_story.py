"""The demo's second table: one model with its KV cache in 16 bits, int8 and int4 latents."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import hf
from . import format_table

# (bits, bytes relative to 16 bits).
VARIANTS: tuple[tuple[Any, float], ...] = ((8, 0.5), (4, 0.27), ("auto", 0.27), ("auto", 0.17))
NAMES = {8: "int8 latents", 4: "int4 latents", "auto": "int8 + int4 latents"}


@dataclass
class Result:
    """One row."""

    label: str
    bytes_per_token: int
    perplexity: float
    tokens_per_second: float
    answer: str


def tell(
    loaded: hf.LoadedModel,
    scored: list[Tensor],
    calibration: list[Tensor],
    prompt: Tensor,
    new_tokens: int,
    backend: str,
    progress: Callable[[Iterable[Any], str, int], Iterator[Any]],
) -> list[Result]:
    """Convert a model to each variant and measure it; the model ends as the last of them.

    Args:
        loaded: unconverted.
        scored: windows ``[n]``, scored through the cache in eight passes each.
        calibration: windows ``[n]``.
        prompt: ids ``[n]`` to answer.
        new_tokens: of the answer, each step but the first timed.
        backend: of the converted layers.
        progress: wraps an iterable, given what is being done and how long it is.
    """
    from ..llama import LatentCache, LatentConfig
    from ..llama.conversion import Clock, Shown, bytes_in_16_bits, prepare, study_model
    from ..llama.families import attentions

    model: Any = loaded.model
    before = bytes_in_16_bits(model)
    results = [measure(loaded, "16 bits (original)", before, scored, prompt, new_tokens)]
    objective: Any = "fisher" if calibration else "weight"
    shown, clock = Shown(True), Clock()
    _, attention = next(attentions(model))
    # Finer than the default of 32, which is a tenth of a large model's latent.
    multiple = 8 if attention.k_proj.out_features >= 64 else 2

    def config_of(bits: Any, ratio: float) -> LatentConfig:
        return LatentConfig(
            kv_ratio=ratio,
            bits=bits,
            rank_multiple=multiple,
            objective=objective,
            # Minutes a variant, on a CPU: more than the rest of the demo.
            refine=0,
            backend=backend,
        )

    batches = [window[None] for window in calibration]
    study = study_model(model, batches or None, config_of("auto", 1.0), None, shown, clock)
    configs = [config_of(bits, ratio) for bits, ratio in VARIANTS]
    # All are made before the first is put in: they are made from the original projections.
    plans = [prepare(model, study, config, shown, clock) for config in configs]
    for (bits, _), plan in progress(list(zip(VARIANTS, plans, strict=True)), "scoring", len(plans)):
        plan.install(model)
        held = LatentCache(model).bytes_per_token()
        results.append(measure(loaded, NAMES[bits], held, scored, prompt, new_tokens))
    return results


def measure(
    loaded: hf.LoadedModel,
    label: str,
    bytes_per_token: int,
    scored: list[Tensor],
    prompt: Tensor,
    new_tokens: int,
) -> Result:
    """Perplexity through the cache, an answer, and the speed of it."""
    from ..llama import score

    found = score(loaded.model, scored, chunk=max(1, len(scored[0]) // 8))
    tokens: list[int] = []
    steps: list[float] = []
    last = 0.0
    for token in hf.greedy_tokens(loaded.model, prompt, new_tokens):
        now = time.perf_counter()
        if tokens:
            steps.append(now - last)
        last = now
        tokens.append(token)
    speed = 1 / statistics.median(steps) if steps else float("nan")
    answer = " ".join(loaded.decode(tokens).split())
    return Result(label, bytes_per_token, found.perplexity, speed, answer)


def table(results: list[Result]) -> str:
    """A line a variant."""
    first = results[0]
    rows = [
        [
            result.label,
            f"{result.bytes_per_token:,}",
            f"{result.bytes_per_token / first.bytes_per_token:.2f}x",
            f"{result.perplexity:.3f}",
            f"{100 * (result.perplexity / first.perplexity - 1):+.2f} %",
            "-" if math.isnan(result.tokens_per_second) else f"{result.tokens_per_second:.1f}",
            result.answer,
        ]
        for result in results
    ]
    headers = ["KV cache", "bytes a token", "vs 16-bit", "perplexity", "change", "tokens/s"]
    headers.append("answer")
    return format_table(headers, rows, left=frozenset({0, 6}))


def plot(results: list[Result]) -> str:
    """Perplexity against bytes a token, as SVG."""
    from ..llama.report import plot_lines

    first = results[0]
    lines: dict[str, list[tuple[float, float]]] = {}
    for result in sorted(results, key=lambda result: result.bytes_per_token):
        point = (result.bytes_per_token / first.bytes_per_token, result.perplexity)
        lines.setdefault(result.label, []).append(point)
    return plot_lines(
        lines, "Perplexity through the KV cache", "bytes a token, relative to 16 bits", "perplexity"
    )
