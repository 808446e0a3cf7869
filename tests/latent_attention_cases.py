"""Problems for latent_attention_decode, and the comparison with the float64 reference."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from int8_ops import ops, reference
from int8_ops.llama.packing import pack_int4
from int8_ops.reference import LatentStream

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = (2, 6, 8, 32, 64, 64, 80, 128, 128)


@dataclass(frozen=True)
class Problem:
    """Arguments of ``latent_attention_decode``."""

    name: str
    q: Tensor
    k: LatentStream
    v: LatentStream
    inv_freq: Tensor
    start: Tensor
    length: Tensor
    scaling: float
    origin: Tensor | None = None
    rope_scaling: float = 1.0
    window: int | None = None

    def __repr__(self) -> str:
        ranks = [
            [(q.shape[-1], a.shape[-1]) for q, a in zip(s.q, s.a, strict=True)] for s in self.kv
        ]
        return (
            f"{self.name}: q {tuple(self.q.shape)} {self.q.dtype}, KV heads {self.kv_heads} in "
            f"{self.k.q[0].shape[1]} groups, width and rank {ranks}, S {self.k.q[0].shape[2]}, "
            f"start {self.start.tolist()}, length {self.length.tolist()}, origin "
            f"{None if self.origin is None else self.origin.tolist()}, window {self.window}"
        )

    @property
    def kv(self) -> tuple[LatentStream, LatentStream]:
        return self.k, self.v

    @property
    def kv_heads(self) -> int:
        return self.k.a[0].shape[0] * self.k.a[0].shape[1] // self.q.shape[3]

    @property
    def arguments(self) -> tuple:
        return (
            *(self.q, self.k, self.v, self.inv_freq, self.start, self.length),
            *(self.scaling, self.origin, self.rope_scaling, self.window),
        )

    @property
    def op_arguments(self) -> tuple:
        """As the registered op takes them."""
        k, v = (s.arguments() for s in self.kv)
        tail = (self.origin, self.scaling, self.rope_scaling, self.window)
        return (self.q, *k, *v, self.inv_freq, self.start, self.length, *tail)

    def map(self, move: Callable[[Tensor], Tensor]) -> Problem:
        """With every tensor replaced."""

        def stream(s: LatentStream) -> LatentStream:
            bias = None if s.bias is None else move(s.bias)
            return LatentStream(*([move(t) for t in part] for part in s[:4]), bias)

        origin = None if self.origin is None else move(self.origin)
        moved = (move(t) for t in (self.q, self.inv_freq, self.start, self.length))
        q, inv_freq, start, length = moved
        return replace(
            self, q=q, k=stream(self.k), v=stream(self.v), inv_freq=inv_freq, start=start,
            length=length, origin=origin,
        )  # fmt: skip

    def with_key_scale(self, head: int, channel: int, scale: float, part: int = 0) -> Problem:
        """Another scale of A for one channel of a KV head, in slice ``part``."""
        scales = [t.clone() for t in self.k.a_scale]
        scales[part].view(self.kv_heads, -1)[head, channel] = scale
        return replace(self, k=self.k._replace(a_scale=scales))

    def rows(self, chosen: slice) -> Problem:
        """Some rows of the batch."""

        def stream(s: LatentStream) -> LatentStream:
            return s._replace(q=[t[chosen] for t in s.q], scale=[t[chosen] for t in s.scale])

        return replace(
            self, q=self.q[chosen], k=stream(self.k), v=stream(self.v), start=self.start[chosen],
            length=self.length[chosen], origin=None if self.origin is None else self.origin[chosen],
        )  # fmt: skip


class Maker:
    """Random problems from one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def integers(self, low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, dtype=torch.int16).to(
            torch.int8
        )

    def stream(
        self, batch: int, groups: int, tokens: int, out: int, size: int,
        slices: list[tuple[int, int]], pairs: bool, bias: torch.dtype | None, static: bool,
    ) -> LatentStream:  # fmt: skip
        """``slices``: bits and rank. ``static``: views into a buffer of more tokens and rows."""
        parts: list[list[Tensor]] = [[], [], [], []]
        room = tokens + 37 if static else tokens
        for bits, rank in slices:
            low, high = (-8, 8) if bits == 4 else (-128, 128)
            q = self.integers(low, high, (batch, groups, room, rank))
            q = pack_int4(q) if bits == 4 else q
            scale = torch.rand((batch, groups, room), generator=self.generator) + 0.1
            scale = scale / (high * math.sqrt(rank))
            if bits == 4:  # an int4 scale may be negative
                sign = self.integers(0, 2, (batch, groups, room)).float() * 2 - 1
                scale = scale * sign
            a = self.integers(-128, 128, (groups, out, rank))
            a_scale = (torch.rand((groups, out, 1), generator=self.generator) + 0.2) / 64
            if pairs:
                halves = a_scale.view(groups, -1, 2, size // 2)
                halves[:, :, 1] = halves[:, :, 0]
            for part, t in zip(
                parts, (q[:, :, :tokens], scale[:, :, :tokens], a, a_scale), strict=True
            ):
                part.append(t)
        b = None if bias is None else torch.randn(groups * out, generator=self.generator).to(bias)
        return LatentStream(*parts, b)

    def problem(
        self, name: str, batch: int = 1, groups: int = 1, group_heads: int = 2, repeats: int = 2,
        size: int = 64, q_len: int = 1, tokens: int = 50, k: list[tuple[int, int]] | None = None,
        v: list[tuple[int, int]] | None = None, dtype: torch.dtype = torch.float32,
        k_bias: torch.dtype | None = None, v_bias: torch.dtype | None = None, static: bool = False,
        lengths: list[int] | None = None, starts: list[int] | None = None,
        origins: list[int] | None = None, window: int | None = None, rope_scaling: float = 1.0,
    ) -> Problem:  # fmt: skip
        out = group_heads * size
        q = torch.randn(
            (batch, q_len, groups * group_heads * repeats, size), generator=self.generator
        )
        shape = (batch, groups, tokens, out, size)
        return Problem(
            name,
            q=q.to(dtype).transpose(1, 2),
            k=self.stream(*shape, k or [(8, 32)], True, k_bias, static),
            v=self.stream(*shape, v or [(8, 48)], False, v_bias, static),
            inv_freq=10000.0 ** (-torch.arange(0, size, 2) / size),
            start=torch.tensor(starts or [0] * batch, dtype=torch.int32),
            length=torch.tensor(lengths or [tokens] * batch, dtype=torch.int32),
            scaling=1.5 * size**-0.5,
            origin=None if origins is None else torch.tensor(origins, dtype=torch.int32),
            rope_scaling=rope_scaling,
            window=window,
        )

    def slices(self) -> list[tuple[int, int]]:
        def one() -> tuple[int, int]:
            rank = self.rng.choice((1, 2, 7, 8, 16, 24, 31, 32, 48, 64, 65, 88, 96, 128, 160, 256))
            return (4, rank + rank % 2) if self.rng.random() < 0.4 else (8, rank)

        return [one() for _ in range(self.rng.choice((1, 1, 1, 2, 2, 3)))]

    def like_a_model(self, name: str) -> Problem:
        """Sizes that models have; as many tokens as a comparison in float64 allows."""
        rng = self.rng
        size = rng.choice((64, 64, 128))
        batch, groups = rng.choice((1, 1, 2, 4, 8)), rng.choice((1, 1, 2))
        group_heads, q_len = rng.choice((1, 2, 4)), rng.choice((1, 1, 1, 2, 4, 7, 16))
        dtype = rng.choice(DTYPES[1:])

        def slices() -> list[tuple[int, int]]:
            ranks = [rng.choice((32, 64, 96, 128, 160, 256, 320, 512, 1024))]
            ranks += [rng.choice((32, 64, 128, 256))] * rng.choice((0, 0, 1))
            return [(rng.choice((8, 8, 4)), rank) for rank in ranks]

        k, v = slices(), slices()
        ranks = sum(rank for _, rank in (*k, *v))
        most = (1 << 29) // (batch * groups * group_heads * size * ranks)
        tokens = max(min(rng.choice((100, 256, 300, 700, 1025, 3000)), most), q_len + 1)
        lengths = [rng.choice((tokens, rng.randint(q_len, tokens))) for _ in range(batch)]
        starts = [rng.choice((0, rng.randint(0, n - q_len))) for n in lengths]
        return self.problem(
            name, batch, groups, group_heads, rng.choice((1, 2, 3, 4, 8)), size, q_len, tokens,
            k, v, dtype, rng.choice((None, None, dtype)), rng.choice((None, None, dtype)),
            rng.random() < 0.5, lengths, starts,
            rng.choice((None, [rng.randint(-n, 100_000) for n in starts])),
            rng.choice((None, None, None, 17, 600)),
        )  # fmt: skip

    def random(self, name: str, sizes: tuple[int, ...] = SIZES) -> Problem:
        rng = self.rng
        batch = rng.choice((1, 1, 2, 3))
        q_len = rng.choice((1, 1, 1, 2, 3, 8, 16))
        tokens = rng.choice((q_len, 17, 31, 32, 33, 64, 255, 256, 257, 300, 513, 700))
        tokens = max(tokens, q_len)
        lengths, starts, origins = [], [], []
        for _ in range(batch):
            length = tokens if rng.random() < 0.4 else rng.randint(q_len, tokens)
            start = 0 if rng.random() < 0.5 else rng.randint(0, length - q_len)
            lengths.append(length)
            starts.append(start)
            origins.append(rng.choice((-start, rng.randint(-start, 5000), 100_000)))
        return self.problem(
            name, batch, rng.choice((1, 1, 2, 3)), rng.choice((1, 2, 3)),
            rng.choice((1, 1, 2, 3, 4)),
            rng.choice(sizes), q_len, tokens, self.slices(),
            self.slices(), rng.choice(DTYPES), rng.choice((None, *DTYPES)),
            rng.choice((None, *DTYPES)), rng.random() < 0.5, lengths, starts,
            rng.choice((None, origins)), rng.choice((None, None, 1, 5, 64, 300)),
            rng.choice((1.0, 1.0, 1.2)),
        )  # fmt: skip


def unpadded(row: Problem) -> Problem:
    """The one row's tokens from its first to its last, in tensors that hold no others."""
    begin, end = int(row.start), int(row.length)
    if begin >= end:
        return row

    def cut(s: LatentStream) -> LatentStream:
        return s._replace(**{
            name: [t[:, :, begin:end].contiguous() for t in getattr(s, name)]
            for name in ("q", "scale")
        })  # fmt: skip

    return replace(
        row,
        k=cut(row.k),
        v=cut(row.v),
        start=torch.zeros_like(row.start),
        length=row.length - begin,
        origin=(-row.start if row.origin is None else row.origin) + begin,
    )


def sdpa_over_rebuilt(p: Problem, dtype: torch.dtype) -> Tensor:
    """What a cache of keys and values would give: made in float64, then rounded to ``dtype``."""
    size, q_len = p.q.shape[3], p.q.shape[2]
    keys, values = (reference.rebuild(s, size) for s in p.kv)
    tokens = torch.arange(keys.shape[2])
    origin = -p.start if p.origin is None else p.origin
    angle = (tokens + origin[:, None])[:, None, :, None].double() * p.inv_freq.double()
    cos, sin = angle.cos() * p.rope_scaling, angle.sin() * p.rope_scaling
    first, second = keys.chunk(2, dim=-1)
    keys = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    own = (p.length.long()[:, None] - q_len + torch.arange(q_len))[..., None]
    seen = (tokens >= p.start[:, None, None]) & (tokens <= own)
    if p.window is not None:
        seen = seen & (tokens > own - p.window)
    repeats = p.q.shape[1] // keys.shape[1]
    keys, values = (t.repeat_interleave(repeats, dim=1).to(dtype) for t in (keys, values))
    out = F.scaled_dot_product_attention(
        p.q.to(dtype), keys, values, attn_mask=seen[:, None], scale=p.scaling
    )
    return out.transpose(1, 2)


def error(got: Tensor, expected: Tensor) -> float:
    """Root mean square, relative to the expected."""
    return float((got.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def outcome(got: Tensor, p: Problem) -> str | None:
    """None, or what is wrong with a result.

    The bar is twice the error of SDPA in q's dtype over rebuilt keys and values. Where that one is
    exact by luck (a single token, say), float32's own rounding: a sum over d and over the ranks,
    and the exponential of a score that has the sum's error, some 2^-18 of the largest score.
    """
    expected = reference.latent_attention_decode(*p.arguments)
    if got.dtype != p.q.dtype or got.shape != expected.shape:
        return f"{p}: got {got.dtype} {tuple(got.shape)}"
    if not torch.equal(got.isnan(), expected.isnan()):
        return f"{p}: NaN in other places"
    got, expected = got.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0)
    peer = error(sdpa_over_rebuilt(p, p.q.dtype).nan_to_num(nan=0.0), expected)
    floor = 2.0**-18 + torch.finfo(p.q.dtype).eps / 2
    mine = error(got, expected)
    return None if mine <= 2 * peer + floor else f"{p}: error {mine:.2e}, that of SDPA {peer:.2e}"


def named() -> dict[str, list[Problem]]:
    """Problems by what they are about."""
    make = Maker(1)
    regular = [
        make.problem("smollm2", 1, 1, 3, 3, 64, 1, 600, [(8, 96)], [(8, 160)], torch.bfloat16),
        make.problem(
            "llama3 layer", 2, 1, 8, 4, 128, 1, 300, [(8, 256)], [(8, 256)], torch.float16
        ),
        make.problem("mha in groups", 1, 2, 4, 1, 128, 1, 300, [(8, 128)], [(4, 192)]),
        make.problem("slices", 2, 1, 4, 2, 64, 1, 90, [(8, 24), (4, 40)], [(8, 64), (4, 96)]),
        make.problem("int4", 1, 1, 4, 2, 64, 1, 400, [(4, 128)], [(4, 192)], torch.bfloat16),
    ]
    biases = [
        make.problem("biases", 2, 1, 2, 2, 64, 2, 70, k_bias=a, v_bias=b, dtype=c)
        for a, b, c in ((*DTYPES,), (DTYPES[1], None, DTYPES[0]), (None, DTYPES[2], DTYPES[1]))
    ]
    queries = [
        make.problem("q_len", 2, 1, 2, 3, 64, n, 40 + n, lengths=[40 + n, 30], starts=[0, 7])
        for n in range(1, 17)
    ]
    rows = [
        make.problem("padding", 3, tokens=40, starts=[0, 39, 11], static=True),
        make.problem("origins", 3, tokens=40, starts=[0, 5, 11], origins=[0, 100, 131_000]),
        make.problem("lengths", 4, tokens=600, lengths=[600, 1, 256, 257], static=True),
        make.problem(
            "nothing seen", 4, q_len=2, tokens=9, lengths=[9, 0, 1, 4], starts=[0, 0, 0, 3]
        ),
        make.problem("rope scaling", 2, tokens=40, rope_scaling=1.25, k_bias=torch.float32),
    ]
    windows = [
        make.problem(
            "window", 2, q_len=n, tokens=900, lengths=[900, 300], starts=[3, 250], window=w
        )
        for n, w in ((1, 1), (1, 256), (4, 3), (16, 300), (16, 5000), (2, 257))
    ]
    empty = [make.problem("no rows", 0, tokens=20), make.problem("one token", 2, tokens=1)]
    large = [
        make.problem("ranks", 1, 1, 2, 2, 64, 2, 300, [(8, 320), (4, 96)], [(8, 512)], DTYPES[2]),
        make.problem("large rank", 1, 1, 1, 2, 128, 1, 70, [(8, 1500)], [(8, 1100)], DTYPES[1]),
        make.problem("largest rank", 1, 1, 1, 2, 4, 1, 20, [(8, 9000)], [(4, 5002)]),
        make.problem("large head", 1, 1, 1, 9, 640, 1, 40, [(8, 200)], [(8, 72)]),
        make.problem("largest head", 1, 1, 1, 1, 4096, 1, 40, [(8, 16)], [(8, 8)]),
        make.problem("rows of a head", 1, 1, 2, 8, 64, 16, 300, [(8, 96)], [(8, 96)], DTYPES[2]),
        make.problem("batch", 700, 1, 2, 1, 8, 1, 5, [(8, 8)], [(8, 8)]),
    ]
    return {
        "regular": regular, "biases": biases, "queries": queries, "rows": rows, "windows": windows,
        "empty": empty, "extremes": extremes(make), "layout": layout(make), "large": large,
    }  # fmt: skip


def extremes(make: Maker) -> list[Problem]:
    """Saturated sums, NaN in and out of sight, zero scales."""
    base = make.problem("extremes", 2, tokens=300, lengths=[300, 290], starts=[0, 20], q_len=3)
    flat = replace(base, name="saturated")
    for part in (*flat.k.q, *flat.k.a, *flat.v.q, *flat.v.a):
        part.fill_(-128)
    for part in (*flat.k.scale, *flat.k.a_scale, *flat.v.scale, *flat.v.a_scale):
        part.fill_(1e-3)
    unseen = make.problem("NaN out of sight", 2, tokens=300, lengths=[280, 270], starts=[9, 20])
    for stream in unseen.kv:
        stream.scale[0][:, :, :9] = torch.nan
        stream.scale[0][:, :, 280:] = torch.nan
    seen = make.problem("NaN in sight", 2, tokens=300, q_len=3)
    seen.k.scale[0][0, 0, 299] = torch.nan  # of row 0 the last query alone sees it
    other = make.problem("NaN value", 2, tokens=300, q_len=3)
    other.v.scale[0][1, 0, 298] = torch.nan
    zero = make.problem("zero scales", 1, tokens=40)
    zero.k.scale[0].zero_()
    sharp = make.problem("one token takes all", 1, tokens=400)
    sharp = replace(sharp, q=sharp.q * 200)
    return [flat, unseen, seen, other, zero, sharp]


def layout(make: Maker) -> list[Problem]:
    """Views that are taken as they are, and others that are copied."""
    base = make.problem("layout", 3, 2, tokens=60, k=[(4, 32)], v=[(8, 40)], static=True)
    spread = base.map(lambda t: torch.stack((t, t), dim=-1)[..., 0])
    rows = make.problem("rows", 6, 2, tokens=60, static=True).rows(slice(1, None, 2))
    contiguous = base.map(lambda t: t.contiguous())
    return [base, replace(spread, name="every second"), rows, contiguous]


def random_problems(count: int, seed: int = 0) -> Iterator[Problem]:
    make = Maker(seed)
    for i in range(count):
        yield make.random(f"random {i} of seed {seed}")


def check(p: Problem) -> None:
    """The op on a problem, against the reference."""
    found = outcome(ops.latent_attention_decode(*p.arguments), p)
    assert found is None, found
