"""What a Llama with a cache of integer latents costs on a GPU, against the same model without.

Random weights of Llama-3-8B's shape: speed and memory do not depend on their values. See
benchmarks/README.md; ``--config tiny`` runs every line on a CPU. Needs transformers 5.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import platform
import re
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor  # noqa: E402

import int8_ops  # noqa: E402
from int8_ops import hf  # noqa: E402
from int8_ops._bench.facts import commit  # noqa: E402
from int8_ops._cache_names import passed  # noqa: E402
from int8_ops.llama import LatentCache, LatentConfig, StaticLatentCache, convert  # noqa: E402
from int8_ops.llama.skeleton import sharing_copy, with_random_factors  # noqa: E402
from int8_ops.llama.spec import LayerSpec, Slice, StreamSpec, stream_rank  # noqa: E402

MEMORY_BAR = 0.03
PREFILL_BAR = 1.15
CONVERT_BAR_S = 600.0
# Logits of one step by two ways that round differently (eager and compiled, 16 bits): more is a
# mistake, and is not timed.
DIFFERENCE_BAR = 0.1
TIE_ULPS = 4.0

COMMON: dict[str, Any] = {
    "max_position_embeddings": 1 << 18,
    "rope_theta": 500000.0,
    "rope_scaling": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 14336,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 256,
        "vocab_size": 512,
    },
}
# What each configuration is measured at, unless the options say otherwise.
SIZES: dict[str, dict[str, Any]] = {
    "8b": {
        "points": [(1, 4096), (1, 32768), (1, 131072), (8, 8192)],
        "prefill_tokens": 8192,
        "memory_tokens": 131072,
        "model_tokens": 16384,
        "calibration": (16, 1024),
        "compiled_layers": [2, 8],
    },
    "tiny": {
        "points": [(1, 256), (2, 512)],
        "prefill_tokens": 256,
        "memory_tokens": 4096,
        "model_tokens": 1024,
        "calibration": (4, 64),
        "compiled_layers": [1, 2],
    },
}


# -- bookkeeping ----------------------------------------------------------------------------------


class OutOfTime(BaseException):
    """Raised in the midst of what took too long; no ``except Exception`` stops it."""


class Run:
    """The record, the clock, and what is printed."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Begin; nothing is measured yet."""
        self.args = args
        self.started = time.perf_counter()
        self.record: dict[str, Any] = {"meta": meta(args), "sections": {}, "not_run": []}
        self.failed = False

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return float(self.args.time_budget - (time.perf_counter() - self.started))

    def progress(self, what: str) -> None:
        """Tell on stderr what begins, and how much time is left."""
        passed_s = time.perf_counter() - self.started
        print(f"[{passed_s:5.0f} s, {self.left():4.0f} s left] {what}", file=sys.stderr, flush=True)

    def begins(self, section: str, what: str) -> bool:
        """Whether there is time for another measurement; where there is none, that is recorded."""
        if self.left() <= 0:
            self.skip(section, what, "no time left")
            return False
        self.progress(f"{section}: {what}")
        return True

    def skip(self, section: str, what: str, why: str) -> None:
        """Record what was not measured."""
        self.record["not_run"].append({"section": section, "what": what, "why": why})
        print(f"not run: {section}: {what}: {why}", flush=True)

    def row(self, section: str, line: str, **values: Any) -> None:
        """Record and print a result."""
        self.record["sections"].setdefault(section, []).append(values)
        print(f"{section:8}  {line}", flush=True)
        self.write()

    def write(self) -> None:
        """Write the JSON, if one is wanted."""
        self.record["meta"]["seconds"] = time.perf_counter() - self.started
        if self.args.json is not None:
            self.args.json.parent.mkdir(parents=True, exist_ok=True)
            self.args.json.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")


def meta(args: argparse.Namespace) -> dict[str, Any]:
    """What was measured, with what, on what."""
    cuda = args.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(args.device) if cuda else platform.processor(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "backend": int8_ops.backend_for(args.device),
        "commit": args.commit or commit(),
        "config": args.config,
        "layers": args.layers,
        "dtype": str(args.dtype),
        "kv_ratio": args.kv_ratio,
        "quick": args.quick,
    }


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the block after so many seconds: compilers can't be asked to hurry."""

    def ring(number: int, frame: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, min(max(seconds, 0.01), 1e6))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def sync(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Wall clock of one call, the device's work included."""
    sync(device)
    started = time.perf_counter()
    call()
    sync(device)
    return time.perf_counter() - started


def tidy(device: torch.device) -> None:
    """Free what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# -- models and caches ----------------------------------------------------------------------------


def make_original(run: Run) -> Any:
    """A random Llama of the configuration, made on the device."""
    args = run.args
    values = {**COMMON, **CONFIGS[args.config], "num_hidden_layers": args.layers}
    config = transformers.LlamaConfig(**values)
    run.progress(f"a Llama of {args.layers} layers, {args.dtype}, on {args.device}")
    torch.manual_seed(0)
    with torch.device(args.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=args.dtype)
    return model.eval()


def layer_spec(name: str, config: Any, ratio: float) -> LayerSpec:
    """Equal ranks for keys and values, within ``ratio`` of 16-bit bytes.

    Multiples of 32, which the kernels for Hopper take, or of 16 in small models. ``int8`` and
    ``int4`` have one slice, ``mixed`` has both: a quarter of the bytes in 8 bits. ``int8:256`` has
    that rank, whatever the ratio.
    """
    if ":" in name:
        bits, _, wanted = name.removeprefix("int").partition(":")
        stream: StreamSpec = (Slice(int(bits), int(wanted)),)
        return LayerSpec(stream, stream)
    full = config.num_key_value_heads * config.head_dim
    room = int(ratio * 2 * full)
    multiple = 32 if room >= 128 else 16

    def rank(bits: int, room: int, most: int) -> int:
        return max(multiple, min(most, (room - 4) * 8 // bits // multiple * multiple))

    if name == "mixed":
        eight = rank(8, room // 4, full)
        four = rank(4, room - eight - 4, full - eight)
        both: StreamSpec = (Slice(8, eight), Slice(4, four))
        return LayerSpec(both, both)
    width = int(name.removeprefix("int"))
    stream = (Slice(width, rank(width, room, full)),)
    return LayerSpec(stream, stream)


def converted(run: Run, original: Any, name: str) -> Any:
    """The model with caches of ``layer_spec(name)``, random factors, sharing all other weights."""
    spec = layer_spec(name, original.config, run.args.kv_ratio)
    return with_random_factors(original, [spec] * original.config.num_hidden_layers)


def shortened(model: Any, layers: int) -> Any:
    """The model's first layers, sharing its weights."""
    made = sharing_copy(model)
    made.model.layers = made.model.layers[:layers]
    made.config.num_hidden_layers = layers
    return made


def fill_latents(cache: LatentCache, rows: int, start: int, end: int, like: Tensor) -> None:
    """Tokens ``start`` to ``end`` as random latents, through the cache's own ``update``."""
    device, dtype = like.device, like.dtype
    generator = torch.Generator(device).manual_seed(start)
    for first in range(start, end, 8192):
        count = min(8192, end - first)
        positions = torch.arange(first, first + count, device=device)[None]
        for index, layer in enumerate(cache.layers):
            groups = layer.spec.groups
            shapes = [(rows, groups, count, stream_rank(s)) for s in (layer.spec.k, layer.spec.v)]
            k, v = (
                torch.randn(shape, device=device, dtype=dtype, generator=generator)
                for shape in shapes
            )
            cache.update(k, v, index, position_ids=positions)


def fill_keys(cache: Any, config: Any, rows: int, tokens: int, like: Tensor) -> None:
    """Random keys and values through ``update`` of one of transformers' caches."""
    device, dtype = like.device, like.dtype
    generator = torch.Generator(device).manual_seed(1)
    shape = (rows, config.num_key_value_heads, tokens, config.head_dim)
    for index in range(config.num_hidden_layers):
        new = [
            torch.randn(shape, device=device, dtype=dtype, generator=generator) for _ in range(2)
        ]
        cache.update(*new, index)


def filled(model: Any, ours: bool, static: bool, rows: int, tokens: int, spare: int) -> Any:
    """A cache for ``model`` that holds ``tokens`` random tokens a row."""
    weight = model.lm_head.weight
    if ours:
        cache = StaticLatentCache(model, tokens + spare) if static else LatentCache(model)
        fill_latents(cache, rows, 0, tokens, weight)
        return cache
    if static:
        cache = transformers.StaticCache(config=model.config, max_cache_len=tokens + spare)
    else:
        cache = transformers.DynamicCache(config=model.config)
    fill_keys(cache, model.config, rows, tokens, weight)
    return cache


class Decoder:
    """Steps of one token a row; ``call`` is the model, or what a compiler made of it."""

    def __init__(self, model: Any, call: Any, cache: Any, rows: int, position: int) -> None:
        """``position`` is the next token's."""
        self.model, self.call, self.cache = model, call, cache
        device = model.lm_head.weight.device
        self.token = torch.full((rows, 1), 7, device=device)
        self.position = torch.tensor([[position]], device=device)

    @torch.no_grad()
    def step(self) -> Tensor:
        """Logits ``[B, 1, vocabulary]`` of the next token, the same one every time."""
        torch.compiler.cudagraph_mark_step_begin()
        out = self.call(
            input_ids=self.token,
            position_ids=self.position,
            use_cache=True,
            **passed(self.model, self.cache),
        )
        self.position = self.position + 1
        logits: Tensor = out.logits
        return logits

    def milliseconds(self, steps: int, rounds: int) -> float:
        """A step's time: the median of rounds of ``steps`` steps without a wait in between."""

        def several() -> None:
            for _ in range(steps):
                self.step()

        device = self.token.device
        return 1e3 * statistics.median(seconds_of(several, device) for _ in range(rounds)) / steps


# -- memory ---------------------------------------------------------------------------------------


def memory(run: Run, original: Any) -> None:
    """Bytes that a cached token adds, as the allocator counts them, against what we say."""
    args = run.args
    for name in args.specs:
        model = converted(run, original, name)
        for through, total, chunk in (
            ("the model", args.model_tokens, max(256, args.model_tokens // 8)),
            ("the cache", args.memory_tokens, max(256, args.memory_tokens // 16)),
        ):
            if run.begins("memory", f"{name}, {total} tokens through {through}"):
                what = f"{name} through {through}"
                guarded(run, "memory", what, memory_row)(run, model, name, through, total, chunk)
        del model
        tidy(args.device)


@torch.no_grad()
def memory_row(run: Run, model: Any, name: str, through: str, total: int, chunk: int) -> None:
    """Feed ``total`` tokens, ``chunk`` at a time, and fit a line through the bytes after each."""
    device = run.args.device
    generator = torch.Generator(device).manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (1, chunk), generator=generator, device=device)
    # Workspaces and the like are there before the counting starts.
    model(input_ids=ids[:, :256], use_cache=True, logits_to_keep=1)
    tidy(device)
    cache = LatentCache(model)
    points = []
    for start in range(0, total, chunk):
        if through == "the model":
            position_ids = torch.arange(start, start + chunk, device=device)[None]
            model(
                input_ids=ids,
                position_ids=position_ids,
                use_cache=True,
                logits_to_keep=1,
                **passed(model, cache),
            )
        else:
            fill_latents(cache, 1, start, start + chunk, model.lm_head.weight)
        sync(device)
        points.append((start + chunk, *bytes_now(cache, device)))
        if run.left() <= 0:
            break
    if len(points) < 3:
        run.skip("memory", f"{name} through {through}", f"{len(points)} points by the time limit")
        return
    slope = slope_of([(tokens, allocated) for tokens, allocated, _ in points])
    requested = slope_of([(tokens, wanted) for tokens, _, wanted in points])
    expected = cache.bytes_per_token()
    off = slope / expected - 1
    full = 4 * model.config.num_key_value_heads * model.config.head_dim
    full *= model.config.num_hidden_layers
    run.row(
        "memory",
        f"{name:6} through {through}, {points[-1][0]:6} tokens: {slope:10.1f} bytes a token, "
        f"bytes_per_token() {expected} ({100 * off:+.2f} %), {full / slope:.2f} times fewer than "
        f"16 bits{met(abs(off) <= MEMORY_BAR)}",
        spec=name,
        through=through,
        counted="torch.cuda.memory_allocated" if device.type == "cuda" else "tensors of the cache",
        slope=slope,
        slope_requested=requested,
        bytes_per_token=expected,
        bytes_per_token_16_bits=full,
        off=off,
        bar=MEMORY_BAR,
        met=abs(off) <= MEMORY_BAR,
        points=points,
    )


def bytes_now(cache: LatentCache, device: torch.device) -> tuple[int, int]:
    """Allocated (rounded up by the allocator) and asked for; on a CPU the cache's own tensors."""
    if device.type == "cuda":
        asked = torch.cuda.memory_stats(device)["requested_bytes.all.current"]
        return torch.cuda.memory_allocated(device), asked
    allocated = cache.memory_report()["allocated"]
    return allocated, allocated


def slope_of(points: Sequence[tuple[float, float]]) -> float:
    """Of the line of least squares."""
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def met(reached: bool) -> str:
    """How a line ends that has a bar."""
    return "" if reached else "  MISSED"


# -- prefill --------------------------------------------------------------------------------------


def prefill(run: Run, original: Any) -> None:
    """One pass over a long prompt with an empty cache, logits of the last token alone."""
    args = run.args
    models = {"original": original}
    models.update((name, converted(run, original, name)) for name in args.specs)
    ids = torch.randint(3, original.config.vocab_size, (1, args.prefill_tokens))
    ids = ids.to(args.device)

    @torch.no_grad()
    def once(model: Any) -> None:
        model(input_ids=ids, use_cache=True, logits_to_keep=1)

    if not run.begins("prefill", f"{args.prefill_tokens} tokens, {', '.join(models)}"):
        return
    for model in models.values():
        for _ in range(2):
            once(model)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(args.rounds):
        for name, model in models.items():  # in turn, so that a drift of clocks meets all
            times[name].append(1e3 * seconds_of(lambda model=model: once(model), args.device))
        if run.left() <= 0:
            break
    base = statistics.median(times["original"])
    for name, found in times.items():
        ms = statistics.median(found)
        ratio = ms / base
        told = "" if name == "original" else f", {ratio:.3f}x{met(ratio <= PREFILL_BAR)}"
        run.row(
            "prefill",
            f"{name:8} {args.prefill_tokens} tokens: {ms:9.2f} ms "
            f"({min(found):.2f} to {max(found):.2f}, {len(found)} rounds){told}",
            model=name,
            tokens=args.prefill_tokens,
            ms=ms,
            all_ms=found,
            ratio=ratio,
            bar=None if name == "original" else PREFILL_BAR,
            met=name == "original" or ratio <= PREFILL_BAR,
        )
    if args.profile:
        for name, model in models.items():
            profile(run, f"prefill {name}", lambda model=model: once(model))


def profile(run: Run, what: str, call: Callable[[], Any]) -> float:
    """Print and record the kernels that take longest; the milliseconds of all of them."""
    cuda = run.args.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if cuda else []
    run.progress(f"profile of {what}")
    with torch.profiler.profile(activities=kinds) as found:
        call()
        sync(run.args.device)

    def own_time(event: Any) -> float:
        return float(event.self_device_time_total if cuda else event.self_cpu_time_total)

    events = [e for e in found.key_averages() if own_time(e) > 0]
    if cuda:  # kernels, not the operators that launch them
        events = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=own_time, reverse=True)
    total = sum(map(own_time, events))
    print(f"profile of {what}: {total / 1e3:.2f} ms in {sum(e.count for e in events)} kernels")
    for event in events[:12]:
        print(f"  {own_time(event) / 1e3:9.3f} ms {event.count:6} x {event.key[:100]}")
    run.record.setdefault("profiles", {})[what] = [
        {"ms": own_time(e) / 1e3, "count": e.count, "kernel": e.key} for e in events[:40]
    ]
    run.write()
    return total / 1e3


# -- decode ---------------------------------------------------------------------------------------


def decode(run: Run, original: Any) -> None:
    """Milliseconds a token, after a history of random latents (or keys and values)."""
    models = {"original": original}
    models.update((name, converted(run, original, name)) for name in run.args.specs)
    print("decode: histories are random latents, or keys and values, put into the caches directly")
    for rows, tokens in () if run.args.no_eager else run.args.points:
        for name, model in models.items():
            if run.begins("decode", f"{name}, eager, {rows} x {tokens}"):
                guarded(run, "decode", f"{name}, eager, {rows} x {tokens}", eager_row)(
                    run, model, name, rows, tokens
                )
    if run.args.no_compile:
        return
    # Ours at every point first: what a short run is for.
    for name in run.args.compiled_specs + ([] if run.args.no_original else ["original"]):
        for rows, tokens in run.args.points:
            what = f"{name}, compiled, {rows} x {tokens}"
            if run.begins("decode", what):
                guarded(run, "decode", what, compiled_row)(run, models[name], name, rows, tokens)


def guarded(run: Run, section: str, what: str, measure: Callable[..., None]) -> Callable[..., None]:
    """What goes wrong ends one measurement, not the run; it is recorded.

    Too little memory or time is a matter of the device; anything else fails the run at its end.
    """

    def call(*args: Any) -> None:
        try:
            measure(*args)
        except torch.OutOfMemoryError as error:
            run.skip(section, what, f"out of memory: {str(error).splitlines()[0]}")
        except OutOfTime:
            run.skip(section, what, "took too long")
        except Exception as error:
            traceback.print_exc()
            run.failed = True
            run.skip(section, what, f"FAILED: {type(error).__name__}: {error}"[:500])
        finally:
            torch._dynamo.reset()
            tidy(run.args.device)

    return call


def eager_row(run: Run, model: Any, name: str, rows: int, tokens: int) -> None:
    """An eager step over a dynamic cache."""
    args = run.args
    cache = filled(model, name != "original", False, rows, tokens, 0)
    decoder = Decoder(model, model, cache, rows, tokens)
    for _ in range(3):
        decoder.step()
    ms = decoder.milliseconds(args.steps, args.rounds)
    kernels_ms = None
    if args.profile:
        kernels_ms = profile(run, f"decode {name} eager {rows} x {tokens}", decoder.step)
    told = "" if kernels_ms is None else f", {kernels_ms:.3f} ms of it in kernels"
    run.row(
        "decode",
        f"{rows} x {tokens:6}  {name:8} eager     {ms:9.3f} ms a step{told}",
        rows=rows,
        context=tokens,
        model=name,
        compiled=False,
        layers=model.config.num_hidden_layers,
        ms=ms,
        kernels_ms=kernels_ms,
    )


def compiled_row(run: Run, model: Any, name: str, rows: int, tokens: int) -> None:
    """A step under ``torch.compile(mode="reduce-overhead")`` over a static cache.

    Compiling 32 layers takes a minute and more for every context. So models of a few layers are
    compiled, and the time of all layers follows from the line through theirs.
    """
    args, layers = run.args, model.config.num_hidden_layers
    found: list[dict[str, float]] = []
    for count in sorted({min(c, layers) for c in args.compiled_layers}):
        found.append(compiled_time(run, model, name, rows, tokens, count))
        torch._dynamo.reset()
        tidy(args.device)
    wrong = [f for f in found if not f["difference"] <= DIFFERENCE_BAR]
    if wrong:
        run.failed = True
        run.skip("decode", f"{name}, compiled, {rows} x {tokens}", f"WRONG: {wrong}")
        return
    if len(found) > 1:
        line = statistics.linear_regression([f["layers"] for f in found], [f["ms"] for f in found])
        ms = line.intercept + line.slope * layers
    else:
        ms = found[0]["ms"]
    measured = [int(f["layers"]) for f in found]
    extrapolated = measured[-1] != layers
    how = f"from {' and '.join(map(str, measured))} layers" if extrapolated else "measured"
    run.row(
        "decode",
        f"{rows} x {tokens:6}  {name:8} compiled  {ms:9.3f} ms a step ({how}; compiled in "
        f"{sum(f['compile_s'] for f in found):.0f} s, CUDA graphs skipped "
        f"{int(found[-1]['cudagraph_skips'])})",
        rows=rows,
        context=tokens,
        model=name,
        compiled=True,
        layers=layers,
        extrapolated=extrapolated,
        ms=ms,
        measured=found,
    )


def compiled_time(
    run: Run, model: Any, name: str, rows: int, tokens: int, layers: int
) -> dict[str, float]:
    """Compile the first ``layers`` layers, compare a step with an eager one, and time it."""
    args, ours = run.args, name != "original"
    # Room for the steps, and a size that attention with a mask has kernels for.
    spare = -(-(10 + args.steps * args.rounds) // 64) * 64
    part = shortened(model, layers)
    eager = Decoder(part, part, filled(part, ours, False, rows, tokens, 0), rows, tokens)
    eager.step()
    expected = eager.step().float()
    del eager
    tidy(args.device)
    cache = filled(part, ours, True, rows, tokens, spare)
    decoder = Decoder(part, part, cache, rows, tokens)
    # As a prompt is: whether a graph attends through the kernel is decided outside of it.
    decoder.step()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    decoder.call = torch.compile(part, mode="reduce-overhead", fullgraph=True)
    run.progress(f"compiling {layers} layers of {name} for {rows} x {tokens}")
    with limit(min(args.compile_limit, run.left())):
        started = time.perf_counter()
        got = decoder.step().float()
        difference = float((got - expected).norm() / expected.norm())
        for _ in range(4):
            decoder.step()
        sync(args.device)
        seconds = time.perf_counter() - started
    with torch._dynamo.config.patch(error_on_recompile=True):
        ms = decoder.milliseconds(args.steps, args.rounds)
        if args.profile and layers == max(args.compiled_layers):
            profile(run, f"decode {name} compiled {rows} x {tokens}, {layers} layers", decoder.step)
    return {
        "layers": layers,
        "ms": ms,
        "compile_s": seconds,
        "difference": difference,
        "cudagraph_skips": torch._dynamo.utils.counters["inductor"]["cudagraph_skips"],
    }


# -- the static cache under a compiler ------------------------------------------------------------


def static(run: Run, original: Any) -> None:
    """Greedy steps over a static cache, compiled and not: the growing cache's tokens, one graph."""
    args = run.args
    sixteen = [torch.bfloat16, torch.float16] if args.device.type == "cuda" else [torch.bfloat16]
    for dtype in (*sixteen, torch.float32):  # the last as a control, for ties are rare in it
        what = f"random, {dtype}"
        if "random" in args.static_models and run.begins("static", what):
            guarded(run, "static", what, static_random)(run, what, dtype)
    what = hf.SMOLLM2
    if "smollm2" in args.static_models and run.begins("static", what):
        try:
            loaded = hf.load_causal_lm(args.smollm2, device=args.device, dtype=args.dtype)
        except hf.MissingExtra as error:
            run.skip("static", what, str(error).splitlines()[0])
            return
        guarded(run, "static", what, static_smollm2)(run, what, loaded)


def static_random(run: Run, what: str, dtype: torch.dtype) -> None:
    """On a small random model whose attention depends on its input."""
    values = {**COMMON, **CONFIGS["tiny"], "head_dim": 64, "initializer_range": 0.1}
    torch.manual_seed(0)
    with torch.device(run.args.device):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(**values), dtype=dtype
        ).eval()
    prompts = [
        torch.randint(3, 512, (1, n), generator=torch.Generator().manual_seed(n)) for n in (20, 33)
    ]
    compiled = run.args.compiled_control
    static_rows(run, f"{what}, original", model, prompts, ours=False, compiled=compiled)
    compiled = not run.args.no_compile
    for name in ("int8", "mixed") if dtype == torch.bfloat16 else ("int8",):
        spec = layer_spec(name, model.config, 0.5)
        made = with_random_factors(model, [spec] * model.config.num_hidden_layers)
        static_rows(run, f"{what}, {name}", made, prompts, ours=True, compiled=compiled)


def static_smollm2(run: Run, what: str, loaded: hf.LoadedModel) -> None:
    """On a real model, its cache at nearly full rank; first unconverted, with transformers' caches.

    That control tells what a static cache costs without us.
    """
    what = f"{what}, {run.args.dtype}"
    prompts = [
        loaded.encode(text)[None]
        for text in ("The capital of France is", "Once upon a time, in a small village by the sea,")
    ]
    model, compiled = loaded.model, run.args.compiled_control
    static_rows(run, f"{what}, original", model, prompts, ours=False, compiled=compiled)
    convert(model, config=LatentConfig(kv_ratio=0.55, bits=8, objective="weight"), progress=False)
    static_rows(run, f"{what}, int8", model, prompts, ours=True, compiled=not run.args.no_compile)


class Agreement:
    """How often one way to decode chooses what the growing cache chose."""

    def __init__(self) -> None:
        """No step yet."""
        self.steps = self.same = self.bits = 0
        self.margins: list[float] = []

    def add(self, expected: Tensor, got: Tensor) -> None:
        """A step's logits ``[1, vocabulary]``: of the growing cache, and of this way."""
        chosen, other = int(expected.argmax(-1)), int(got.argmax(-1))
        self.steps += 1
        self.bits += int(torch.equal(expected, got))
        self.same += int(chosen == other)
        if chosen != other:
            top, rival = float(expected[0, chosen]), float(expected[0, other])
            self.margins.append((top - rival) / (abs(top) * torch.finfo(expected.dtype).eps))

    @property
    def ties(self) -> int:
        """Other tokens that the growing cache all but chose."""
        return sum(margin <= TIE_ULPS for margin in self.margins)

    def told(self) -> str:
        """As a line has it."""
        off = f", others off by {', '.join(f'{m:.1f}' for m in self.margins)} ulp"
        return f"{self.same} of {self.steps} tokens ({self.bits} with equal logits" + (
            f"{off})" if self.margins else ")"
        )

    def record(self) -> dict[str, Any]:
        """As the JSON has it."""
        return {
            "same": self.same,
            "equal_logits": self.bits,
            "ties": self.ties,
            "margins_ulp": self.margins,
        }


@torch.no_grad()
def static_rows(
    run: Run, what: str, model: Any, prompts: Sequence[Tensor], ours: bool, compiled: bool
) -> None:
    """Greedy tokens of each prompt by both caches; the compiler may work at the first alone.

    The static cache is fed the growing cache's tokens: if each step chooses the same token, the two
    generate the same text. A compiler rounds elsewhere than eager operators do, so logits differ in
    their last bits: a step that chooses another token of the same logit, within ``TIE_ULPS``, is a
    tie, and is told. A static cache that nothing compiles is fed the same: what differs there is
    the cache's doing, not the compiler's. Of ours it has to have the growing cache's bits.
    """
    args = run.args
    room, count = (128, 24) if args.quick else (256, 64)

    def growing() -> Any:
        return LatentCache(model) if ours else transformers.DynamicCache(config=model.config)

    def fixed() -> Any:
        if ours:
            return StaticLatentCache(model, room)
        return transformers.StaticCache(config=model.config, max_cache_len=room)

    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    call = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    cache = fixed()
    for number, prompt in enumerate(prompts):
        ids = prompt.to(args.device)
        if number:
            cache.reset()
        with contextlib.ExitStack() as stack:
            if number:
                stack.enter_context(torch._dynamo.config.patch(error_on_recompile=True))
            stack.enter_context(limit(min(args.compile_limit, run.left())))
            by_graph, plainly = Agreement(), Agreement()
            graphs: list[int] = []
            dynamic, plain = growing(), fixed()
            left = model(input_ids=ids, use_cache=True, **passed(model, dynamic)).logits[:, -1]
            for one in (cache, plain):
                model(input_ids=ids, use_cache=True, **passed(model, one))
            for i in range(count):
                token = left.argmax(-1, keepdim=True)
                position = torch.tensor([[ids.shape[1] + i]], device=args.device)
                options = {"input_ids": token, "position_ids": position, "use_cache": True}
                left = model(**options, **passed(model, dynamic)).logits[:, -1]
                plainly.add(left, model(**options, **passed(model, plain)).logits[:, -1])
                if compiled:
                    torch.compiler.cudagraph_mark_step_begin()
                    by_graph.add(left, call(**options, **passed(model, cache)).logits[:, -1])
                    graphs.append(counters["stats"]["unique_graphs"])
        row: dict[str, Any] = {"model": what, "prompt": ids.shape[1], "tokens": count}
        row["uncompiled"] = plainly.record()
        told = f"uncompiled {plainly.told()}"
        good = plainly.bits == count
        if compiled:
            breaks = sum(counters["graph_break"].values())
            recompiled = graphs[-1] != graphs[2] or (number > 0 and graphs[-1] != graphs[0])
            skips = counters["inductor"]["cudagraph_skips"]
            if args.device.type != "cuda":
                skips = 0  # there are none to be had
            good = good and by_graph.same + by_graph.ties == count
            good = good and not (recompiled or breaks or skips)
            row.update(
                compiled=by_graph.record(),
                graphs=graphs[-1],
                graph_breaks=breaks,
                recompiled=recompiled,
                cudagraph_skips=skips,
            )
            told += (
                f"; compiled {by_graph.told()}, {graphs[-1]} graphs, breaks {breaks}, recompiled "
                f"{recompiled}, CUDA graphs skipped {skips}"
            )
        if ours:
            row["met"] = good
            told += met(good)
        run.row("static", f"{what}, prompt of {ids.shape[1]}: {told}", **row)


# -- converting -----------------------------------------------------------------------------------


def conversion(run: Run, original: Any) -> None:
    """A whole conversion on random text: how long, and how much memory. The model is used up."""
    args = run.args
    windows, length = args.calibration
    what = f"{windows} x {length} tokens, kv_ratio {args.kv_ratio}"
    if run.begins("convert", what):
        guarded(run, "convert", what, conversion_row)(run, what, original)


def conversion_row(run: Run, what: str, original: Any) -> None:
    """As ``conversion``."""
    args = run.args
    windows, length = args.calibration
    tidy(args.device)
    generator = torch.Generator().manual_seed(0)
    shape = (windows, length)
    ids = torch.randint(3, original.config.vocab_size, shape, generator=generator)
    multiple = 32 if args.config == "8b" else 8
    config = LatentConfig(kv_ratio=args.kv_ratio, rank_multiple=multiple)
    cuda = args.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(args.device)
    started = time.perf_counter()
    with limit(run.left()):
        found = convert(original, ids, config)
        sync(args.device)
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated(args.device) if cuda else None
    with torch.no_grad():
        logits = original(input_ids=ids[:1, :64].to(args.device), use_cache=True).logits
    finite = bool(torch.isfinite(logits).all())
    good = seconds <= CONVERT_BAR_S and finite
    phases = ", ".join(f"{name} {s:.1f}" for name, s in found.seconds.items())
    peak_told = "" if peak is None else f", at most {peak / 2**30:.1f} GiB"
    run.row(
        "convert",
        f"{what}: {seconds:.1f} s ({phases}){peak_told}, {found.kv_ratio:.3f}x the bytes"
        f"{met(good)}",
        seconds=seconds,
        phases=found.seconds,
        peak_bytes=peak,
        kv_ratio=found.kv_ratio,
        finite=finite,
        bar=CONVERT_BAR_S,
        met=good,
    )


SECTIONS: dict[str, Callable[[Run, Any], None]] = {
    "memory": memory,
    "prefill": prefill,
    "decode": decode,
    "static": static,
    "convert": conversion,  # last: it changes the model
}


# -- the command ----------------------------------------------------------------------------------


def point(text: str) -> tuple[int, int]:
    """``8x8192``: rows, tokens."""
    rows, _, tokens = text.partition("x")
    try:
        found = int(rows), int(tokens)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected ROWSxTOKENS, got {text!r}") from error
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"expected ROWSxTOKENS of at least 1, got {text!r}")
    return found


def latents(text: str) -> str:
    """``int8``, ``int4``, ``mixed``, or bits and a rank: ``int8:256``."""
    if re.fullmatch(r"mixed|int[48](:[1-9]\d*)?", text) is None:
        raise argparse.ArgumentTypeError(f"expected int8, int4, mixed or int8:RANK, got {text!r}")
    return text


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, with the configuration's sizes where none are given."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--config", choices=CONFIGS, default="8b", help="(default: %(default)s)")
    add("--layers", type=int, help="of the model (default: the configuration's)")
    add("--section", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="(default: all)")
    add(
        "--specs",
        nargs="+",
        type=latents,
        default=["int8", "int4"],
        help="latents to measure: int8, int4, mixed, or with a rank, as int8:256",
    )
    add(
        "--compiled-specs",
        nargs="*",
        type=latents,
        help="of those, to measure compiled (default: the first)",
    )
    add("--kv-ratio", type=float, default=0.25, help="bytes relative to 16 bits")
    add("--points", nargs="+", type=point, metavar="ROWSxTOKENS", help="contexts of decode")
    add("--prefill-tokens", type=int)
    add("--memory-tokens", type=int, help="put into the cache directly")
    add("--model-tokens", type=int, help="passed through the model, for the memory they take")
    add("--calibration", type=point, metavar="WINDOWSxTOKENS")
    add("--compiled-layers", nargs="+", type=int, help="models that are compiled, by their layers")
    add("--compile-limit", type=float, default=120, help="seconds for one compilation")
    add("--no-compile", action="store_true", help="nothing compiled in decode and static")
    add("--no-original", action="store_true", help="nothing unconverted compiled in decode")
    add("--no-eager", action="store_true", help="nothing but compiled in decode")
    kinds = ("random", "smollm2")
    add("--static-models", nargs="+", choices=kinds, default=list(kinds), help="(default: both)")
    add("--smollm2", default=hf.SMOLLM2, metavar="MODEL", help="where it is, if not installed")
    add(
        "--compiled-control",
        action="store_true",
        help="in static, compile the unconverted model as well",
    )
    add("--rounds", type=int, help="of which the median is taken (default: 5, quick: 3)")
    add("--steps", type=int, help="decode steps a round (default: 8, quick: 4)")
    add("--quick", action="store_true", help="fewer rounds and steps")
    add("--profile", action="store_true", help="the kernels that take longest in a step")
    add("--time-budget", type=float, default=math.inf, metavar="SECONDS")
    add("--json", type=Path, metavar="FILE", help="written after every row")
    add("--device", help="(default: cuda where there is one)")
    add("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    add("--commit", help="what is measured, outside git")
    args = parser.parse_args(arguments)
    if int(transformers.__version__.partition(".")[0]) < 5:
        parser.error(f"expected transformers 5 or newer, got {transformers.__version__}")
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    args.dtype = getattr(torch, args.dtype)
    for name, value in SIZES[args.config].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.layers = args.layers or CONFIGS[args.config]["num_hidden_layers"]
    args.rounds = args.rounds or (3 if args.quick else 5)
    args.steps = args.steps or (4 if args.quick else 8)
    if args.compiled_specs is None:
        args.compiled_specs = args.specs[:1]
    for name in args.compiled_specs:
        if name not in args.specs:
            parser.error(f"--compiled-specs: expected some of {args.specs}, got {name}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections; 0 unless a result was wrong."""
    args = parse(arguments)
    run = Run(args)
    told = run.record["meta"]
    print(", ".join(f"{name} {value}" for name, value in told.items()), flush=True)
    original = make_original(run)
    for section, measure in SECTIONS.items():
        if section in args.section:
            guarded(run, section, "the rest of it", measure)(run, original)
    run.write()
    run.progress("done")
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
