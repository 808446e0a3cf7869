"""latent_append: the bits of the separate ops, in the slots of a cache, and what it refuses."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import same_bits

from int8_ops import _extension, ops
from int8_ops.llama.packing import quantize_stream
from int8_ops.llama.spec import Slice

pytestmark = pytest.mark.skipif(
    _extension.core.module is None, reason=str(_extension.core.unavailable_reason())
)
ROOT = Path(__file__).resolve().parents[1]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def buffers(spec, batch, groups, room, device="cpu"):
    """Full of what must stay where nothing is written."""
    shape = (batch, groups, room)
    q = [torch.full((*shape, part.width), 77, dtype=torch.int8, device=device) for part in spec]
    return q, [torch.full(shape, -7.0, device=device) for _ in spec]


def views(spec, batch, groups, room, device):
    """The same inside of larger tensors, from an odd address on; and those tensors."""
    whole = buffers(
        [Slice(8, part.width + 4) for part in spec], batch + 1, groups + 2, room + 3, device
    )
    q, scale = whole
    cut = slice(1, None), slice(1, groups + 1), slice(2, room + 2)
    q = [t[cut][..., 3 : part.width + 3] for t, part in zip(q, spec, strict=True)]
    return (q, [t[cut] for t in scale]), whole


def call(latents, slots, specs, targets):
    bits = [[part.bits for part in spec] for spec in specs]
    ops.latent_append(*latents, slots, *bits, *targets[0], *targets[1])


def special(x, rng):
    """Ties of +m and -m, zeros, tiny and huge values, NaN and Inf, each in a row of its own."""
    rows = x.view(-1, x.shape[-1])
    info = torch.finfo(x.dtype)
    for row in range(len(rows)):
        value = rng.choice((None, None, 0.0, -0.0, torch.nan, -torch.inf, info.max, info.tiny))
        if value is not None:
            rows[row, rng.randrange(rows.shape[1]) :] = value
        if rng.random() < 0.3:
            rows[row, 0] = 3.0
            rows[row, -1] = -3.0
        if rng.random() < 0.2:
            rows[row] = torch.randint(-17, 18, rows[row].shape) / 2
    return x


@pytest.mark.parametrize("seed", range(60))
def test_the_bits_are_those_of_the_separate_ops(seed, device):
    rng = random.Random(seed)
    batch, groups, tokens = rng.choice((1, 2, 3)), rng.choice((1, 2)), rng.choice((0, 1, 2, 16))
    room = tokens + 9
    specs, latents, targets, wholes = [], [], [], []
    for _ in range(2):
        dtype = rng.choice(FLOATS)
        spec = tuple(
            Slice(bits, rng.choice((2, 8, 24, 64, 90, 602)) + (rng.random() < 0.3 and bits == 8))
            for bits in rng.choice(((8,), (4,), (8, 4), (4, 8, 8)))
        )
        rank = sum(part.rank for part in spec)
        x = special(torch.randn(batch, groups, tokens, rank).to(dtype), rng)
        if rng.random() < 0.5:  # as a projection leaves it
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        specs.append(spec)
        latents.append(x)
        target, whole = views(spec, batch, groups, room, device)
        targets.append(target)
        wholes.append(whole)
    slots = torch.tensor(rng.sample(range(room), tokens), dtype=torch.int64)
    call([x.to(device) for x in latents], slots.to(device), specs, targets)
    for spec, x, whole in zip(specs, latents, wholes, strict=True):
        (q, scale), expected = views(spec, batch, groups, room, "cpu")
        for i, (new_q, new_scale) in enumerate(quantize_stream(x, spec, "auto")):
            q[i][:, :, slots] = new_q
            scale[i][:, :, slots] = new_scale
        for got, wanted in zip((*whole[0], *whole[1]), (*expected[0], *expected[1]), strict=True):
            assert same_bits(got, wanted)


SPECS = ((Slice(8, 8), Slice(4, 8)), (Slice(8, 6),))


def arguments(device="cpu", room=5):
    """Keyword arguments of a call of two tokens."""
    (k_q, k_scale), (v_q, v_scale) = (buffers(spec, 1, 1, room, device) for spec in SPECS)
    return {
        "k": torch.randn(1, 1, 2, 16, device=device),
        "v": torch.randn(1, 1, 2, 6, device=device),
        "slots": torch.tensor([3, 1], device=device),
        "k_bits": [8, 4],
        "v_bits": [8],
        "k_q": k_q,
        "k_scale": k_scale,
        "v_q": v_q,
        "v_scale": v_scale,
    }


WRONG = {
    "expected k of dtype": {"k": torch.zeros(1, 1, 2, 16, dtype=torch.int8)},
    r"expected v of shape \[B, G, n, rank\]": {"v": torch.zeros(1, 2, 6)},
    "expected 1 to 4 slices of k": {"k_bits": [8]},
    "expected bits of v of 8 or 4, got 16": {"v_bits": [16]},
    "expected a buffer of dtype": {"v_q": [torch.zeros(1, 1, 5, 6)]},
    "expected a buffer's scale of dtype": {"v_scale": [torch.zeros(1, 1, 5).half()]},
    r"expected buffers \[B, G, S, width\]": {"v_scale": [torch.zeros(1, 1, 4)]},
    "whose last dimension is contiguous": {
        "v_q": [torch.zeros(1, 1, 6, 5, dtype=torch.int8).transpose(2, 3)]
    },
    "expected buffers for the 7 numbers of v, got some for 6": {"v": torch.zeros(1, 1, 2, 7)},
    "expected k and v of the same B, G, n and S": {"v": torch.zeros(1, 1, 3, 6)},
    "expected slots of dtype": {"slots": torch.tensor([3, 1], dtype=torch.int32)},
    r"expected slots of shape \[2\]": {"slots": torch.tensor([3])},
}


def moved(given, device):
    return {
        name: [t.to(device) if isinstance(t, torch.Tensor) else t for t in value]
        if isinstance(value, list)
        else value.to(device)
        for name, value in given.items()
    }


@pytest.mark.parametrize("message", WRONG)
def test_errors(message, device):
    given = {**arguments(), **WRONG[message]}
    for where in (device, "meta"):
        with pytest.raises(RuntimeError, match=rf"int8_ops\.latent_append: .*{message}"):
            ops.latent_append(**moved(given, where))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["v", "slots", "k_q", "v_scale"])
def test_tensors_of_two_devices_are_refused(name):
    given = arguments("cuda")
    given[name] = arguments()[name]
    with pytest.raises(RuntimeError, match="device"):
        ops.latent_append(**given)


def test_slots_outside_of_the_buffers_are_refused():
    for slots in ([0, 5], [-1, 0]):
        given = {**arguments(), "slots": torch.tensor(slots)}
        with pytest.raises(RuntimeError, match=r"expected slots from 0 to 4, got (5|-1)"):
            ops.latent_append(**given)
        assert all(bool((t == 77).all()) for t in (*given["k_q"], *given["v_q"]))


OUTSIDE = """
import sys
import test_latent_append as test
import torch
given = {**test.arguments("cuda"), "slots": torch.tensor(eval(sys.argv[1])).to("cuda")}
torch.cuda.synchronize()
test.ops.latent_append(**given)
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.parametrize("slots", ["[0, 5]", "[-1, 0]"])
def test_slots_outside_of_the_buffers_stop_the_device(slots):
    """In a process of its own: no other call would work in it."""
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDE, slots],
        cwd=ROOT / "tests",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert re.search(
        r"int8_ops\.latent_append.*Assertion `0 <= slots\[i\] < S` failed", done.stderr
    )
    assert "device-side assert triggered" in done.stderr


def test_registration_and_a_graph(device):
    given = arguments(device)
    torch.library.opcheck(torch.ops.int8_ops.latent_append.default, tuple(given.values()))
    torch._dynamo.reset()
    step = torch.compile(
        lambda **given: ops.latent_append(**given), fullgraph=True, backend="aot_eager"
    )
    written, expected = arguments(device), arguments(device)
    expected["k"], expected["v"] = written["k"], written["v"]
    step(**written)
    ops.latent_append(**expected)
    for name in ("k_q", "k_scale", "v_q", "v_scale"):
        for got, wanted in zip(written[name], expected[name], strict=True):
            assert same_bits(got, wanted.cpu())


@pytest.mark.gpu
def test_a_captured_call_reads_its_slots_at_each_replay():
    written, expected = arguments("cuda"), arguments("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ops.latent_append(**arguments("cuda"))  # the first launch of a kernel asks for its facts
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.latent_append(**written)
    for slots in ([0, 1], [4, 2]):
        for name in ("k", "v"):
            written[name].copy_(torch.randn(written[name].shape))
        written["slots"].copy_(torch.tensor(slots))
        graph.replay()
        ops.latent_append(**{**expected, **{name: written[name] for name in ("k", "v", "slots")}})
        for name in ("k_q", "k_scale", "v_q", "v_scale"):
            for got, wanted in zip(written[name], expected[name], strict=True):
                assert same_bits(got, wanted.cpu())
