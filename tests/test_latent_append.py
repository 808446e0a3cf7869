"""latent_append: the bits of the separate ops, in the slots of a cache, and what it refuses."""

from __future__ import annotations

import random

import pytest
import torch
from cases import same_bits

from int8_ops import _extension, ops
from int8_ops.llama.packing import quantize_stream
from int8_ops.llama.spec import Slice

pytestmark = pytest.mark.skipif(
    _extension.core.module is None, reason=str(_extension.core.unavailable_reason())
)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def buffers(spec, batch, groups, room):
    """Full of what must stay where nothing is written."""
    q = [torch.full((batch, groups, room, part.width), 77, dtype=torch.int8) for part in spec]
    return q, [torch.full((batch, groups, room), -7.0) for _ in spec]


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
def test_the_bits_are_those_of_the_separate_ops(seed):
    rng = random.Random(seed)
    batch, groups, tokens = rng.choice((1, 2, 3)), rng.choice((1, 2)), rng.choice((0, 1, 2, 16))
    room, dtype = tokens + 9, rng.choice(FLOATS)
    specs, latents, targets = [], [], []
    for _ in range(2):
        spec = tuple(
            Slice(bits, rng.choice((2, 8, 24, 64, 90)) + (rng.random() < 0.3 and bits == 8))
            for bits in rng.choice(((8,), (4,), (8, 4), (4, 8, 8)))
        )
        rank = sum(part.rank for part in spec)
        x = special(torch.randn(batch, groups, tokens, rank).to(dtype), rng)
        if rng.random() < 0.5:  # as a projection leaves it
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        specs.append(spec)
        latents.append(x)
        targets.append(buffers(spec, batch, groups, room))
    slots = torch.tensor(rng.sample(range(room), tokens), dtype=torch.int64)
    call(latents, slots, specs, targets)
    for spec, x, (q, scale) in zip(specs, latents, targets, strict=True):
        expected_q, expected_scale = buffers(spec, batch, groups, room)
        for i, (new_q, new_scale) in enumerate(quantize_stream(x, spec, "auto")):
            expected_q[i][:, :, slots] = new_q
            expected_scale[i][:, :, slots] = new_scale
            assert same_bits(q[i], expected_q[i])
            assert same_bits(scale[i], expected_scale[i])


SPECS = ((Slice(8, 8), Slice(4, 8)), (Slice(8, 6),))


def arguments(room=5):
    """Keyword arguments of a call of two tokens."""
    (k_q, k_scale), (v_q, v_scale) = (buffers(spec, 1, 1, room) for spec in SPECS)
    return {
        "k": torch.randn(1, 1, 2, 16),
        "v": torch.randn(1, 1, 2, 6),
        "slots": torch.tensor([3, 1]),
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


@pytest.mark.parametrize("message", WRONG)
def test_errors(message):
    given = {**arguments(), **WRONG[message]}
    meta = {
        name: [t.to("meta") if isinstance(t, torch.Tensor) else t for t in value]
        if isinstance(value, list)
        else value.to("meta")
        for name, value in given.items()
    }
    for call_with in (given, meta):
        with pytest.raises(RuntimeError, match=rf"int8_ops\.latent_append: .*{message}"):
            ops.latent_append(**call_with)


def test_slots_outside_of_the_buffers_are_refused():
    for slots in ([0, 5], [-1, 0]):
        given = {**arguments(), "slots": torch.tensor(slots)}
        with pytest.raises(RuntimeError, match=r"expected slots from 0 to 4, got (5|-1)"):
            ops.latent_append(**given)
        assert all(bool((t == 77).all()) for t in (*given["k_q"], *given["v_q"]))


def test_registration_and_a_graph():
    given = arguments()
    torch.library.opcheck(torch.ops.int8_ops.latent_append.default, tuple(given.values()))
    torch._dynamo.reset()
    step = torch.compile(
        lambda **given: ops.latent_append(**given), fullgraph=True, backend="aot_eager"
    )
    written, expected = arguments(), arguments()
    expected["k"], expected["v"] = written["k"], written["v"]
    step(**written)
    ops.latent_append(**expected)
    for name in ("k_q", "k_scale", "v_q", "v_scale"):
        for got, wanted in zip(written[name], expected[name], strict=True):
            assert same_bits(got, wanted)
