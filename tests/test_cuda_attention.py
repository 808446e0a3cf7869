"""latent_attention_decode on CUDA tensors: against float64, to the bit, in graphs, compiled."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import latent_attention_cases as cases
import pytest
import torch
from cases import same_bits
from latent_attention_cases import Problem
from test_hopper import on_hopper
from test_latent_attention import WRONG
from torch import Tensor

from int8_ops import _extension, backends, ops

PATH = "INT8_OPS_ATTENTION_PATH"
# The library's own choice, and the path that serves everything.
PATHS = ("", "general")
CHUNKS = 80
PER_CHUNK = 25
REPLAYS = 1000

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        _extension.unavailable_reason("cuda") is not None,
        reason=str(_extension.unavailable_reason("cuda")),
    ),
]


@pytest.fixture
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(PATH, request.param)
    return str(request.param)


either_path = pytest.mark.parametrize("path", PATHS, ids=("own", "general"), indirect=True)


def attend(problem: Problem) -> Tensor:
    return ops.latent_attention_decode(*problem.arguments)


def on_device(problem: Problem) -> Problem:
    return problem.map(lambda t: t.to("cuda"))


def check(problem: Problem) -> None:
    found = cases.outcome(attend(on_device(problem)).cpu(), problem)
    assert found is None, found


def equal(got: Tensor, expected: Tensor, what: object) -> None:
    assert same_bits(got.cpu(), expected.cpu()), f"{what}: {got} is not {expected}"


# ---- against float64 -----------------------------------------------------------------------------


@either_path
@pytest.mark.parametrize("category", cases.named())
def test_named(category: str, path: str) -> None:
    for problem in cases.named()[category]:
        check(problem)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random(chunk: int, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """2,000 problems, every second chunk of sizes that models have; each once on every path."""
    make = cases.Maker(1000 + chunk)
    for i in range(PER_CHUNK):
        name = f"random {i} of chunk {chunk}"
        problem = make.like_a_model(name) if chunk % 2 else make.random(name)
        here = on_device(problem)
        got = {}
        for path in PATHS:
            monkeypatch.setenv(PATH, path)
            got[path] = attend(here).cpu()
        found = cases.outcome(got[""], problem)
        assert found is None, found
        if not same_bits(got["general"], got[""]):
            found = cases.outcome(got["general"], problem)
            assert found is None, f"general: {found}"


def test_views_of_a_larger_buffer_at_any_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents that start unaligned, with odd strides between tokens."""
    problem = cases.Maker(41).problem("unaligned", 2, 2, tokens=300, k=[(8, 64), (4, 64)])

    def shift(t: Tensor) -> Tensor:
        if t.dtype != torch.int8 or t.dim() != 4:
            return t.to("cuda")
        room = torch.zeros((*t.shape[:3], t.shape[3] + 5), dtype=t.dtype, device="cuda")
        room[..., 3:-2] = t.to("cuda")
        return room[..., 3:-2]

    whole = attend(on_device(problem))
    moved = attend(problem.map(shift))
    assert cases.outcome(moved.cpu(), problem) is None
    monkeypatch.setenv(PATH, "general")
    equal(attend(problem.map(shift)), attend(on_device(problem)), "at any byte")
    assert whole.shape == moved.shape


# ---- to the bit ----------------------------------------------------------------------------------


def one_by_one(problem: Problem) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What a query gives in other company, and with its own row's tokens alone."""
    here = on_device(problem)
    whole = attend(here)
    q_len = problem.q.shape[2]
    yield "again", attend(here), whole
    for b in range(problem.q.shape[0]):
        row = here.rows(slice(b, b + 1))
        alone = attend(row)
        yield f"row {b} alone", alone, whole[b : b + 1]
        many = on_device(problem.rows(torch.tensor([b] * 70)))
        yield f"row {b} 70 times", attend(many), alone.expand(70, -1, -1, -1)
        yield f"row {b} unpadded", attend(on_device(cases.unpadded(problem.rows([b])))), alone
        for n in range(q_len):
            one = replace(row, q=row.q[:, :, n : n + 1], length=row.length - q_len + n + 1)
            yield f"row {b}, query {n}", attend(one), alone[:, n : n + 1]


@either_path
@pytest.mark.parametrize("seed", range(20))
def test_a_query_depends_on_its_row_alone(seed: int, path: str) -> None:
    make = cases.Maker(2000 + seed)
    for i in range(2):
        problem = make.like_a_model(f"like a model {i}") if seed % 2 else make.random(f"random {i}")
        for what, got, expected in one_by_one(problem):
            equal(got, expected, f"{problem}: {what}")


@either_path
def test_the_room_of_a_cache_changes_nothing(path: str) -> None:
    """Rows fold their splits in one kernel or in two, with few columns a block or with many."""
    problem = cases.Maker(47).problem(
        "room", 2, 1, 2, 3, 64, 2, 9000, [(8, 64)], [(8, 200), (4, 64)], torch.bfloat16,
        lengths=[700, 8900], starts=[9, 100],
    )  # fmt: skip
    whole = attend(on_device(problem))
    assert cases.outcome(whole.cpu(), problem) is None
    first = problem.rows(slice(0, 1))
    for what, few in (("alone", first), ("alone without room", cases.unpadded(first))):
        equal(attend(on_device(few)), whole[:1], what)
    many = problem.rows(torch.tensor([0, 1] * 60))
    equal(attend(on_device(many)), whole.repeat(60, 1, 1, 1), "120 rows")


@either_path
def test_more_splits_than_a_fold_has_at_hand(path: str) -> None:
    check(cases.Maker(48).problem("long", 1, 1, 1, 2, 8, 1, 300_000, [(8, 8)], [(8, 12)]))


# ---- scales of A that differ within a RoPE pair -------------------------------------------------


@on_hopper
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("dtype", cases.DTYPES[1:], ids=str)
def test_a_pair_of_unequal_scales_is_nan_on_hopper(
    dtype: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its head; the others have the same bits."""
    monkeypatch.setenv(PATH, "sm90")
    problem = cases.Maker(49).problem(
        "pairs", 2, 1, 4, 3, size, 2, 600, [(8, 96), (4, 64)], [(8, 160)], dtype
    )
    whole = attend(on_device(problem))
    assert not whole.isnan().any()
    for head, channel, part in itertools.product((0, 2), (3, size - 1), (0, 1)):
        got = attend(on_device(problem.with_key_scale(head, channel, 0.75, part)))
        spoiled = torch.arange(whole.shape[2]) // 3 == head
        what = f"head {head}, channel {channel}, slice {part}"
        assert got[:, :, spoiled].isnan().all(), what
        equal(got[:, :, ~spoiled], whole[:, :, ~spoiled], what)


def test_the_general_path_takes_unequal_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATH, "general")
    for dtype in cases.DTYPES:
        problem = cases.Maker(50).problem("pairs", 2, q_len=2, k=[(8, 96), (4, 64)], dtype=dtype)
        check(problem.with_key_scale(1, 40, 0.02, 1))


# ---- graphs, streams, compilers ------------------------------------------------------------------


def captured(problem: Problem) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    attend(problem)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(problem)
    return graph, out


@either_path
def test_a_graph_replays_to_the_bit(path: str) -> None:
    problem = on_device(
        cases.Maker(42).problem(
            "graph", 2, 1, 2, 4, 128, 2, 1500, [(8, 128)], [(8, 256)], torch.bfloat16,
            lengths=[1500, 700], starts=[0, 33],
        )
    )  # fmt: skip
    expected = attend(problem)
    graph, out = captured(problem)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(REPLAYS):
        out.zero_()
        graph.replay()
        wrong += (out.view(torch.int16) != expected.view(torch.int16)).sum()
    assert int(wrong) == 0


@either_path
def test_a_graph_serves_growing_lengths(path: str) -> None:
    problem = cases.Maker(43).problem(
        "growing", 3, 1, 2, 3, 64, 1, 900, [(8, 64)], [(4, 64), (8, 32)], torch.float16,
        lengths=[1, 1, 1],
    )  # fmt: skip
    here = on_device(problem)
    graph, out = captured(here)
    for n in (1, 2, 31, 255, 256, 257, 511, 512, 513, 900):
        lengths = torch.tensor([n, max(n - 7, 1), 900], dtype=torch.int32)
        here.length.copy_(lengths)
        here.start.copy_(torch.tensor([0, max(n - 300, 0), 5], dtype=torch.int32))
        graph.replay()
        equal(out, attend(here), n)
        own = replace(problem, length=lengths, start=here.start.cpu())
        found = cases.outcome(out.cpu(), own)
        assert found is None, found


def test_a_stream_of_its_own() -> None:
    problem = on_device(cases.Maker(44).problem("stream", 2, tokens=600))
    expected = attend(problem)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = attend(problem)
    stream.synchronize()
    equal(got, expected, "another stream")


def test_compiled_as_one_graph() -> None:
    """Through the package's entry point, and as torch.library wants its ops."""
    problem = cases.Maker(45).problem("compiled", 2, tokens=40, v=[(4, 32), (8, 16)], static=True)
    here = on_device(problem)

    def entry(*arguments: object) -> Tensor:
        return backends.latent_attention_decode(*arguments, "auto")

    torch._dynamo.reset()
    got = torch.compile(entry, fullgraph=True)(*here.arguments)
    equal(got, attend(here), "compiled")
    torch.library.opcheck(torch.ops.int8_ops.latent_attention_decode, here.op_arguments)


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("message", WRONG)
def test_errors(message: str) -> None:
    problem = on_device(WRONG[message])
    with pytest.raises(RuntimeError, match=f"int8_ops.latent_attention_decode: .*{message}"):
        attend(problem)


@on_hopper
def test_hopper_takes_many_query_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATH, "sm90")
    check(
        cases.Maker(50).problem(
            "heads", 1, 1, 1, 129, 64, 16, 40, [(8, 32)], [(8, 32)], torch.float16
        )
    )


def test_an_unknown_path_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = on_device(cases.Maker(46).problem("path"))
    monkeypatch.setenv(PATH, "skinny")
    with pytest.raises(RuntimeError, match=f'{PATH} names the path "skinny"; known are general'):
        attend(problem)
