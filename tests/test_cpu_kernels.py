"""The CPU kernels of every instruction set this machine has, bit for bit against the reference.

The kernel table is chosen once a process, so each instruction set is tested by a process of its
own: this file, run as a script with INT8_OPS_CPU_ISA set, runs every check and prints its findings.
"""

from __future__ import annotations

import ast
import json
import math
import os
import platform
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import latent_attention_cases
import pytest
import torch
from torch import Tensor

from int8_ops import _extension, ops, reference

ROOT = Path(__file__).resolve().parent.parent
ISAS: list[str] = _extension.build_info.require().cpu_isas()
NATIVE = ISAS[-1]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# A failed case in words; a check yields None for each case that passed.
Outcome = str | None


def same_bits(got: Tensor, expected: Tensor) -> bool:
    """Equal in shape, dtype and every bit, -0.0 against 0.0 included; any NaN equals any NaN."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    if not got.is_floating_point():
        return torch.equal(got, expected)
    bits = torch.int32 if got.dtype == torch.float32 else torch.int16
    nan = expected.isnan()
    return torch.equal(got.isnan(), nan) and torch.equal(
        got.view(bits).masked_fill(nan, 0), expected.view(bits).masked_fill(nan, 0)
    )


def outcome(got: Tensor | tuple[Tensor, ...], expected: object, what: str) -> Outcome:
    got = got if isinstance(got, tuple) else (got,)
    expected = expected if isinstance(expected, tuple) else (expected,)
    ok = all(same_bits(g, e) for g, e in zip(got, expected, strict=True))
    return None if ok else what


class Maker:
    """Random problems, all from one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def size(self, edges: tuple[int, ...], largest: int) -> int:
        """Half of the time a size next to a tile's or a vector's edge, else any."""
        if self.rng.random() < 0.5:
            return max(1, self.rng.choice(edges) + self.rng.choice((-1, 0, 0, 1)))
        return self.rng.randint(1, largest)

    def shape(self) -> tuple[int, int, int]:
        m = self.size((1, 2, 4, 6, 8, 12, 16, 24, 36, 64), 70)
        n = self.size((1, 4, 8, 16, 32, 48, 64, 128), 150)
        k = self.size((1, 2, 4, 8, 16, 32, 64, 128, 192, 256), 400)
        return m, n, k

    def layout(self, t: Tensor) -> Tensor:
        """The same values, sometimes behind other strides or an odd storage offset."""
        kind = self.rng.randrange(5)
        if kind == 0:
            return t.t().contiguous().t()
        if kind == 1:
            return torch.stack((t, t), dim=-1)[..., 0]
        if kind == 2:
            return torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)
        return t

    def int8(self, rows: int, cols: int) -> Tensor:
        extreme = self.rng.randrange(10)
        if extreme == 0:
            t = torch.full((rows, cols), self.rng.choice((-128, -127, 127, 0)), dtype=torch.int8)
        elif extreme == 1:
            pick = torch.randint(0, 2, (rows, cols), generator=self.generator, dtype=torch.int8)
            t = pick * 127 + (1 - pick) * -128
        else:
            t = torch.randint(
                -128, 128, (rows, cols), generator=self.generator, dtype=torch.int16
            ).to(torch.int8)
        return self.layout(t)

    def floats(self, rows: int, cols: int) -> Tensor:
        dtype = self.rng.choice(FLOATS)
        spread = 10.0 ** self.rng.uniform(-4, 4)
        x = torch.randn(rows, cols, generator=self.generator) * spread
        if self.rng.random() < 0.2:  # few distinct values: many quotients on or next to a half
            x = torch.randint(-254, 255, (rows, cols), generator=self.generator) * 0.5 * spread
        if self.rng.random() < 0.4:
            special = self.rng.choice(
                (math.nan, math.inf, -math.inf, 0.0, 1e-45, 1e-40, 1.4e-36, 3.4e38, 65504.0)
            )
            row, col = self.rng.randrange(rows), self.rng.randrange(cols)
            whole = self.rng.randrange(3)
            if whole == 0:
                x[row, :] = special
            elif whole == 1:
                x[:, col] = special
            else:
                x[row, col] = special
        return self.layout(x.to(dtype))

    def scale(self, rows: int) -> Tensor:
        scale = torch.rand(rows, 1, generator=self.generator) * 10.0 ** self.rng.uniform(-6, 1)
        if self.rng.random() < 0.1:
            scale[self.rng.randrange(rows)] = self.rng.choice(
                (math.nan, math.inf, 0.0, 1e-40, -1.0)
            )
        return scale

    def bias(self, n: int) -> Tensor | None:
        if self.rng.random() < 0.3:
            return None
        return torch.randn(n, generator=self.generator).to(self.rng.choice(FLOATS))

    def dtype(self) -> torch.dtype:
        return self.rng.choice(FLOATS)


# ---- the checks: each a generator over its cases ------------------------------------------------


def sweep(cases: int) -> Iterator[Outcome]:
    ops = torch.ops.int8_ops
    make = Maker(20)
    for case in range(cases):
        m, n, k = make.shape()
        torch.set_num_threads(make.rng.choice((1, 2, 3)))
        op = ("int8_linear", "int8_mm", "int8_scaled_mm", "per_token", "per_channel", "dequantize")[
            case % 6
        ]
        what = f"case {case}: {op} m={m} n={n} k={k}"
        if op == "int8_mm":
            a, w = make.int8(m, k), make.int8(n, k)
            yield outcome(ops.int8_mm(a, w), reference.int8_mm(a, w), what)
        elif op == "int8_scaled_mm":
            scaled = (make.int8(m, k), make.int8(n, k), make.scale(m), make.scale(n))
            tail = (make.bias(n), make.dtype())
            got = ops.int8_scaled_mm(*scaled, *tail)
            yield outcome(got, reference.int8_scaled_mm(*scaled, *tail), f"{what} {tail[1]}")
        elif op == "int8_linear":
            x = make.floats(m, k)
            linear = (x, make.int8(n, k), make.scale(n), make.bias(n))
            out_dtype = make.rng.choice((None, *FLOATS))
            got = ops.int8_linear(*linear, out_dtype)
            expected = reference.int8_linear(*linear, out_dtype)
            yield outcome(got, expected, f"{what} {x.dtype} -> {out_dtype}")
        elif op == "per_token":
            x = make.floats(m, k)
            got = ops.quantize_per_token(x)
            yield outcome(got, reference.quantize_per_token(x), f"{what} {x.dtype}")
        elif op == "per_channel":
            x, axis = make.floats(n, k), make.rng.choice((0, 1))
            got = ops.quantize_per_channel(x, axis)
            expected = reference.quantize_per_channel(x, axis)
            yield outcome(got, expected, f"{what} {x.dtype} axis={axis}")
        else:
            q, dtype = make.int8(m, k), make.dtype()
            scale = make.scale(m) if make.rng.random() < 0.5 else make.scale(k).t()
            yield outcome(
                ops.dequantize(q, scale, dtype), reference.dequantize(q, scale, dtype), what
            )


def tiles() -> Iterator[Outcome]:
    """Every M of 0..40, so every register tile and the way between the two matmul paths."""
    make = Maker(21)
    for m in range(41):
        for n, k in ((1, 1), (17, 65), (33, 130), (96, 64)):
            a, w = make.int8(max(m, 1), k)[:m], make.int8(n, k)
            expected = reference.int8_mm(a, w)
            yield outcome(torch.ops.int8_ops.int8_mm(a, w), expected, f"m={m} n={n} k={k}")


def largest_k() -> Iterator[Outcome]:
    """K = 131071: the largest sums that int32 holds, on both matmul paths."""
    for m, n in ((1, 9), (3, 17), (14, 33)):
        for a_value, w_value in ((-128, -128), (-128, 127), (127, -128), (127, 127)):
            a = torch.full((m, reference.MAX_K), a_value, dtype=torch.int8)
            w = torch.full((n, reference.MAX_K), w_value, dtype=torch.int8)
            expected = torch.full((m, n), a_value * w_value * reference.MAX_K, dtype=torch.int32)
            yield outcome(
                torch.ops.int8_ops.int8_mm(a, w), expected, f"m={m} {a_value} * {w_value}"
            )


def threads() -> Iterator[Outcome]:
    """Problems large enough to be split: by rows, columns and k, over any number of threads."""
    make = Maker(22)
    for m, n, k in (
        (1, 4099, 700),
        (7, 1500, 513),
        (40, 1031, 259),
        (700, 24, 600),
        (301, 333, 301),
        (20, 50, 5003),
        (500, 150, 2100),
    ):
        x, w, w_scale = torch.randn(m, k, generator=make.generator), make.int8(n, k), make.scale(n)
        expected = reference.int8_linear(x, w, w_scale)
        quantized = reference.quantize_per_channel(x, 1)
        for count in (1, 2, 3, 7, 16):
            torch.set_num_threads(count)
            got = torch.ops.int8_ops.int8_linear(x, w, w_scale, None)
            yield outcome(got, expected, f"m={m} n={n} k={k} threads={count}")
            got = torch.ops.int8_ops.quantize_per_channel(x, 1)
            yield outcome(got, quantized, f"columns of [{m}, {k}] threads={count}")
    torch.set_num_threads(2)


def batch_invariance() -> Iterator[Outcome]:
    """A row gives the same bits alone, in any part of a batch and in the whole batch."""
    make = Maker(23)
    for n, k in ((65, 300), (512, 257)):
        x = torch.randn(130, k, generator=make.generator)
        x[7, 3], x[90, 0] = math.nan, math.inf
        w, bias = make.int8(n, k), torch.randn(n, generator=make.generator)
        w_scale = torch.rand(n, 1, generator=make.generator)
        whole = torch.ops.int8_ops.int8_linear(x, w, w_scale, bias)
        clean = torch.ones(130, dtype=torch.bool)
        clean[7] = clean[90] = False
        only_own_rows = bool(whole[clean].isfinite().all() and whole[~clean].isnan().all())
        yield None if only_own_rows else f"k={k}: NaN or Inf reached another row"
        for begin, count in (
            (0, 1),
            (7, 1),
            (90, 1),
            (129, 1),
            (5, 4),
            (60, 9),
            (80, 13),
            (1, 100),
        ):
            part = torch.ops.int8_ops.int8_linear(x[begin : begin + count], w, w_scale, bias)
            what = f"k={k} rows [{begin}, {begin + count})"
            yield outcome(part, whole[begin : begin + count], what)


def halves() -> Iterator[Outcome]:
    """Quotients on a half and one float32 step to either side of it."""
    half = torch.arange(-127, 127) + 0.5
    for unit in (1.0, 2.0**-20, 2.0**-126, 2.0**121, 0.1, 3.7e-5, 1e-30, 77777.7, 1.00000012):
        middle = half * unit
        x = torch.stack((middle.nextafter(middle - unit), middle, middle.nextafter(middle + unit)))
        x = torch.cat((x, torch.full((3, 1), 127.0) * unit), dim=1)
        got = torch.ops.int8_ops.quantize_per_token(x)
        yield outcome(got, reference.quantize_per_token(x), f"rows, unit {unit}")
        x = x.t().contiguous()
        got = torch.ops.int8_ops.quantize_per_channel(x, 1)
        yield outcome(got, reference.quantize_per_channel(x, 1), f"columns, unit {unit}")


def conversions() -> Iterator[Outcome]:
    """Every 16-bit float read as a bias; every rounding boundary between two of them written."""
    zeros = torch.zeros(2**16, 1, dtype=torch.int8)
    ones = torch.ones(2**16, 1)
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        # The bias meets -0.0, so that its own sign of zero comes out.
        got = torch.ops.int8_ops.int8_scaled_mm(
            zeros[:1], zeros, -ones[:1], ones, every, torch.float32
        )
        yield outcome(got, every.to(torch.float32)[None], f"load {dtype}")
        value = every.to(torch.float32)
        above = (every.view(torch.int16) + 1).view(dtype).to(torch.float32)
        middle = (value.to(torch.float64) * 0.5 + above.to(torch.float64) * 0.5).to(torch.float32)
        inf = torch.tensor(math.inf)
        for name, f in {
            "value": value,
            "middle": middle,
            "below the middle": middle.nextafter(-inf),
            "above the middle": middle.nextafter(inf),
        }.items():
            got = torch.ops.int8_ops.dequantize(zeros + 1, f[:, None], dtype)
            yield outcome(got, f[:, None].to(dtype), f"store {dtype}, {name}")


def latent_attention(cases: int) -> Iterator[Outcome]:
    """Named and random problems: float sums, so against float64 within what SDPA itself is off."""
    for problems in latent_attention_cases.named().values():
        for problem in problems:
            got = ops.latent_attention_decode(*problem.arguments)
            yield latent_attention_cases.outcome(got, problem)
    for i, problem in enumerate(latent_attention_cases.random_problems(cases, seed=24)):
        torch.set_num_threads(1 + i % 3)
        got = ops.latent_attention_decode(*problem.arguments)
        yield latent_attention_cases.outcome(got, problem)
    torch.set_num_threads(2)


def latent_attention_alone() -> Iterator[Outcome]:
    """A query has the same bits in a batch and alone, padded or not, with others or one by one."""
    make = latent_attention_cases.Maker(25)
    for i in range(40):
        problem = make.random(f"problem {i}")
        whole = ops.latent_attention_decode(*problem.arguments)
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            got = ops.latent_attention_decode(*problem.arguments)
            yield outcome(got, whole, f"{problem}: threads={threads}")
        for b in range(problem.q.shape[0]):
            row = problem.rows(slice(b, b + 1))
            alone = ops.latent_attention_decode(*row.arguments)
            yield outcome(alone, whole[b : b + 1], f"{problem}: row {b} alone")
            got = ops.latent_attention_decode(*latent_attention_cases.unpadded(row).arguments)
            yield outcome(got, alone, f"{problem}: row {b} without padding")
            for n in range(problem.q.shape[2]):
                one = replace(
                    row, q=row.q[:, :, n : n + 1], length=row.length - problem.q.shape[2] + n + 1
                )
                got = ops.latent_attention_decode(*one.arguments)
                yield outcome(got, alone[:, n : n + 1], f"{problem}: row {b}, query {n} by itself")
    torch.set_num_threads(2)


CHECKS: dict[str, Callable[..., Iterator[Outcome]]] = {
    check.__name__: check
    for check in (
        *(sweep, tiles, largest_k, threads, batch_invariance, halves, conversions),
        *(latent_attention, latent_attention_alone),
    )
}
COUNTS = {
    "sweep": {isa: 2400 if isa == NATIVE else 800 for isa in ISAS},
    "latent_attention": {isa: 500 if isa == NATIVE else 250 for isa in ISAS},
}


def run_all() -> None:
    """As a script: every check on the instruction set that the environment names."""
    isa = _extension.build_info.require().cpu_isa()
    found = {}
    for name, check in CHECKS.items():
        outcomes = list(check(COUNTS[name][isa]) if name in COUNTS else check())
        failed = [text for text in outcomes if text is not None]
        found[name] = {"cases": len(outcomes), "failed": len(failed), "first": failed[:5]}
    print(json.dumps({"isa": isa, "checks": found}))


# ---- the tests ----------------------------------------------------------------------------------


def run_python(*args: str, isa: str) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "INT8_OPS_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, *args], env=env, capture_output=True, text=True, check=False, timeout=600
    )


_results: dict[str, dict[str, dict[str, object]]] = {}


def results(isa: str) -> dict[str, dict[str, object]]:
    if isa not in _results:
        done = run_python(__file__, isa=isa)
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout.splitlines()[-1])
        assert report["isa"] == isa
        _results[isa] = report["checks"]
    return _results[isa]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_as_reference(isa: str, check: str) -> None:
    found = results(isa)[check]
    assert found["cases"] >= (COUNTS[check][isa] if check in COUNTS else 8)
    assert found["failed"] == 0, f"{found['failed']} of {found['cases']} cases: {found['first']}"


def test_unknown_isa_is_refused_by_name() -> None:
    script = (
        "import torch, int8_ops\n"
        "from int8_ops import _extension\n"
        "a = torch.ones(2, 2, dtype=torch.int8)\n"
        "for call in (_extension.build_info.module.cpu_isa,\n"
        "             lambda: torch.ops.int8_ops.int8_mm(a, a)):\n"
        "    try:\n"
        "        call()\n"
        "    except RuntimeError as error:\n"
        "        print(error)\n"
    )
    done = run_python("-c", script, isa="avx9000")
    assert done.returncode == 0, done.stderr
    expected = "INT8_OPS_CPU_ISA=avx9000 is not available on this machine; it has: " + " ".join(
        ISAS
    )
    assert done.stdout.count(expected) == 2, done.stdout


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo to compare with")
def test_isas_are_those_of_the_processor() -> None:
    needed = {
        "portable": set(),
        "avx2": {"avx2", "f16c", "fma"},
        "avx512_vnni": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "f16c"},
    }
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    assert [isa for isa, names in needed.items() if names <= flags] == ISAS


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not shutil.which("c++") or not shutil.which("nm"),
    reason="needs an x86-64 compiler and nm",
)
@pytest.mark.parametrize("unit", ["avx2", "avx512_vnni"])
def test_isa_units_share_no_code_with_others(unit: str, tmp_path: Path) -> None:
    """No inline function of a unit with flags of its own may stand in for the others' copy.

    Unoptimised, so that no inlining hides one: a weak symbol is code that the linker may share.
    """
    source = f"csrc/cpu/{unit}.cpp"
    tree = ast.parse((ROOT / "setup.py").read_text())
    flags = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CPU_ISA_FLAGS"
    )
    out = tmp_path / "unit.o"
    command = ["c++", "-std=c++20", "-O0", "-c", source, "-o", str(out), *flags[source]]
    subprocess.run(command, cwd=ROOT, check=True)
    symbols = subprocess.run(["nm", "-C", str(out)], capture_output=True, text=True, check=True)
    kinds = {line.split(maxsplit=1)[-1] for line in symbols.stdout.splitlines()}
    assert any("Kernels" in name for name in kinds)
    shared = [line for line in symbols.stdout.splitlines() if line[17:18] in "WVu"]
    assert shared == []


if __name__ == "__main__":
    run_all()
