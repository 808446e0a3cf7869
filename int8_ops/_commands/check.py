"""Check that this installation computes what it should, and how fast.

Quantizes, multiplies and times on this machine; compares every backend that is present with the
reference, bit for bit. The exit code is 1 if anything is off.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import INT8Linear, INT8Quantizer, _extension, backends, reference
from . import check_cpu_isa, format_table, pick_backend, pick_device

WIDTH = 70
X_SHAPE = (2, 512, 256)
W_SHAPE = (1024, 256)
MIN_COSINE = 0.99
# (M, N, K) of the comparison with the reference: one row, tiles and their tails, odd sizes, the
# guide's own shapes.
SHAPES = ((1, 1, 1), (1, 192, 576), (5, 7, 3), (16, 64, 128), (33, 129, 100), (1024, 1024, 256))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Values with rules of their own, a row each, beside the largest of the dtype: zero (a whole row of
# it), a subnormal of every dtype, NaN, infinity.
AWKWARD = (0.0, 1e-40, math.nan, math.inf)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``check``."""
    parser.add_argument("--device", help="cpu or cuda[:index] (default: cuda where there is one)")
    parser.add_argument(
        "--backend", default="auto", help="backend of the timed layer (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default: %(default)s)")


@dataclass
class Findings:
    """What is off so far; a finding is printed where it is made and repeated at the end."""

    off: list[str] = field(default_factory=list)

    def expect(self, condition: bool, what: str) -> None:
        """Note ``what`` unless ``condition``."""
        if not condition:
            self.off.append(what)
            print(f"OFF: {what}")


def run(args: argparse.Namespace) -> int:
    """Carry out ``check``: 0 when all is well, 1 when something is off."""
    device = pick_device(args.device)
    check_cpu_isa()  # whatever the device: the backends of the CPU are compared too
    backend = pick_backend(device, args.backend)
    generator = torch.Generator().manual_seed(args.seed)
    findings = Findings()

    banner("INT8 Operations Test")
    print(f"Device: {describe(device)}")
    print(f"Backend: {backend}")
    print(f"Triton available: {available('triton', device)}")
    print(f"torch._int_mm available: {available('torch', device)}")
    print()
    check_modules(findings)
    with torch.inference_mode():
        x = torch.randn(X_SHAPE, generator=generator).to(device, torch.float16)
        weight = torch.randn(W_SHAPE, generator=generator).to(device)
        bias = torch.randn(W_SHAPE[0], generator=generator).to(device)
        print(f"Input shape: {x.shape}")
        print(f"Weight shape: {weight.shape}")
        check_quantizer(x, backend, findings)
        layer = check_linear(x, weight, bias, backend, findings)
        check_accuracy(layer(x), x, weight, bias, findings)
        check_speed(layer, x, weight, bias)
        check_backends(device, generator, findings)
    print("=" * WIDTH)
    for what in findings.off:
        print(f"OFF: {what}")
    print(
        f"{len(findings.off)} findings: this installation is not to be trusted"
        if findings.off
        else "All is well."
    )
    return 1 if findings.off else 0


def banner(title: str) -> None:
    """``title`` between two rules."""
    print("=" * WIDTH)
    print(title)
    print("=" * WIDTH)


def section(title: str) -> None:
    """The head of a section."""
    print(f"\n--- {title} ---")


def describe(device: torch.device) -> str:
    """The device with what computes on it."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{device} ({torch.cuda.get_device_name(device)}, capability {major}.{minor})"
    module = _extension.build_info.module
    isa = f"{module.cpu_isa()}, " if module is not None else ""
    return f"{device} ({isa}{torch.get_num_threads()} threads)"


def available(name: str, device: torch.device) -> str:
    """True, or False with the reason."""
    reason = backends.unavailable_reason(name, device)
    return "True" if reason is None else f"False ({reason})"


def check_modules(findings: Findings) -> None:
    """A module that was built and does not load is off; one that was never built is not."""
    findings.expect(_extension.core.module is not None, f"int8_ops._C: {_extension.core.error}")
    module = _extension.build_info.module
    findings.expect(module is not None, f"int8_ops._build: {_extension.build_info.error}")
    if module is not None and module.info()["cuda_archs"]:
        findings.expect(
            _extension.cuda.module is not None, f"int8_ops._C_cuda: {_extension.cuda.error}"
        )


def check_quantizer(x: Tensor, backend: str, findings: Findings) -> None:
    """Types and shapes of INT8Quantizer, and the largest error of its round trip."""
    section("Test INT8Quantizer")
    q, scale = INT8Quantizer.quantize_per_token(x, backend)
    print(f"x_int8 dtype: {q.dtype}, shape: {q.shape}")
    print(f"x_scale shape: {scale.shape}")
    findings.expect(q.dtype == torch.int8 and q.shape == x.shape, "x_int8 dtype or shape")
    findings.expect(
        scale.dtype == torch.float32 and scale.shape == (*x.shape[:-1], 1), "x_scale dtype or shape"
    )
    error = (INT8Quantizer.dequantize(q, scale) - x.float()).abs() / scale
    worst = float(error.max())
    print(f"Round trip: off by {worst:.4f} of a step at most")
    # Half a step, and the float32 rounding of x / scale <= 127 and of q * scale.
    findings.expect(worst <= 0.5 + 3 * 127 * 2**-24, f"round trip off by {worst} of a step")


def check_linear(
    x: Tensor, weight: Tensor, bias: Tensor, backend: str, findings: Findings
) -> INT8Linear:
    """Shape and dtype of INT8Linear's output."""
    section("Test INT8Linear")
    layer = INT8Linear(weight, bias, backend=backend)
    out = layer(x)
    print(f"Output shape: {out.shape}, dtype: {out.dtype}")
    findings.expect(out.shape == (*x.shape[:-1], weight.shape[0]), f"output shape {out.shape}")
    findings.expect(out.dtype == x.dtype, f"output dtype {out.dtype} for input {x.dtype}")
    return layer


def check_accuracy(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, findings: Findings
) -> None:
    """MSE and cosine of the INT8 output with the FP16 layer's."""
    section("Accuracy vs FP16")
    expected = F.linear(x, weight.half(), bias.half()).double()
    mse = float((out.double() - expected).square().mean())
    cosine = float(F.cosine_similarity(out.double().flatten(), expected.flatten(), dim=0))
    print(f"MSE: {mse:.6f}")
    print(f"Cosine Similarity: {cosine:.6f}")
    findings.expect(cosine > MIN_COSINE, f"cosine {cosine:.6f}, expected more than {MIN_COSINE}")


def check_speed(layer: INT8Linear, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """INT8 against FP16; on a CPU against each float type, as FP16 is rarely its fastest."""
    section("Speed Benchmark")
    dtypes = [torch.float16]
    if x.device.type == "cpu":
        dtypes += [torch.bfloat16, torch.float32]
    calls: dict[str, Callable[[], Tensor]] = {"INT8": lambda: layer(x)}
    for dtype in dtypes:
        a, w, b = (t.to(dtype) for t in (x, weight, bias))
        name = {torch.float16: "FP16", torch.bfloat16: "BF16", torch.float32: "FP32"}[dtype]
        calls[name] = lambda a=a, w=w, b=b: F.linear(a, w, b)  # type: ignore[misc]
    measure = cuda_milliseconds if x.device.type == "cuda" else cpu_milliseconds
    times = measure(calls)
    for name, milliseconds in times.items():
        print(f"{name} time: {milliseconds:.4f} ms")
    int8 = times.pop("INT8")
    peer = min(times, key=lambda name: times[name])
    against = "" if peer == "FP16" and len(times) == 1 else f" (against {peer}, the fastest)"
    print(f"Speedup: {times[peer] / int8:.2f}x{against}")


def cpu_milliseconds(calls: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Median time of each call, measured in turns so that a busy moment hits all of them."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + 2.0
    while time.perf_counter() < deadline or min(map(len, samples.values())) < 5:
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(taken) for name, taken in samples.items()}


def cuda_milliseconds(calls: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Median time of each call in a replayed CUDA graph, so without the host's cost; L2 warm."""
    repeats = 20
    graphs = {}
    for name, call in calls.items():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for _ in range(repeats):
                call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(20):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples[name].append(start.elapsed_time(end) / repeats)
    return {name: statistics.median(taken) for name, taken in samples.items()}


@dataclass(frozen=True)
class Case:
    """An op's inputs, on the CPU, with the reference's outputs."""

    op: str
    inputs: tuple[object, ...]
    expected: tuple[Tensor, ...]


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One output or several, as a tuple on the CPU."""
    tensors = (result,) if isinstance(result, Tensor) else result
    return tuple(tensor.cpu() for tensor in tensors)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in dtype, shape and every bit, but that one NaN is as good as another."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    integer = torch.int32 if a.dtype == torch.float32 else torch.int16
    nan = torch.isnan(a)
    if not torch.equal(nan, torch.isnan(b)):
        return False
    return torch.equal(a.masked_fill(nan, 0).view(integer), b.masked_fill(nan, 0).view(integer))


def cases(generator: torch.Generator) -> Iterator[Case]:
    """Every op on every shape and dtype, awkward rows among them."""

    def case(op: str, *inputs: object) -> Case:
        return Case(op, inputs, outputs(getattr(reference, op)(*inputs)))

    def integers(*shape: int) -> Tensor:
        return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)

    for m, n, k in SHAPES:
        a, w = integers(m, k), integers(n, k)
        a_scale = torch.rand(m, 1, generator=generator) + 1e-3
        w_scale = torch.rand(n, 1, generator=generator) + 1e-3
        yield case("int8_mm", a, w)
        for dtype in DTYPES:
            x = torch.randn(m, k, generator=generator).to(dtype)
            if m > len(AWKWARD):
                for row, value in enumerate((*AWKWARD, torch.finfo(dtype).max)):
                    x[row, k // 2 :] = value
                x[0] = 0.0
            bias = torch.randn(n, generator=generator).to(dtype)
            yield case("quantize_per_token", x)
            yield case("quantize_per_channel", x, 0)
            yield case("quantize_per_channel", x, 1)
            for optional in (bias, None):
                yield case("int8_scaled_mm", a, w, a_scale, w_scale, optional, dtype)
                yield case("int8_linear", x, w, w_scale, optional, dtype)


def check_backends(device: torch.device, generator: torch.Generator, findings: Findings) -> None:
    """Every backend present here on its device, against the reference."""
    section("Backends against the reference, bit for bit")
    # Timing every tile on every small shape would take minutes; each tile returns the same bits.
    os.environ.setdefault("INT8_OPS_TRITON_TUNE", "0")
    compared = list(cases(generator))
    rows = []
    for where in dict.fromkeys((device, torch.device("cpu"))):
        for name in backends.available_backends():
            reason = backends.unavailable_reason(name, where)
            if reason is not None:
                if where == device:
                    rows.append([name, str(where), "-", f"absent: {reason}"])
                continue
            different = [case.op for case in compared if not agrees(case, name, where)]
            state = "identical"
            if different:
                state = f"{len(different)} DIFFER: {', '.join(sorted(set(different)))}"
            rows.append([name, str(where), str(len(compared)), state])
            findings.expect(not different, f"backend {name} on {where}: {state}")
    print(format_table(["backend", "device", "cases", "result"], rows, left=frozenset({0, 1, 3})))


def agrees(case: Case, name: str, device: torch.device) -> bool:
    """Whether the backend returns the reference's bits for the case."""
    inputs = [item.to(device) if isinstance(item, Tensor) else item for item in case.inputs]
    got = outputs(getattr(backends.select(name, device), case.op)(*inputs))
    return len(got) == len(case.expected) and all(map(same_bits, got, case.expected))
