"""latent_attention_decode: the op, its fake and its errors.

test_cpu_kernels.py tries every ISA, test_cuda_attention.py the CUDA kernels.
"""

from __future__ import annotations

from dataclasses import replace

import latent_attention_cases as cases
import pytest
import torch

from int8_ops import _extension, ops, reference

pytestmark = pytest.mark.skipif(
    _extension.core.module is None, reason=str(_extension.core.unavailable_reason())
)
OP = "latent_attention_decode"
NAMED = cases.named()


@pytest.mark.parametrize("category", NAMED)
def test_named_cases(category):
    for problem in NAMED[category]:
        cases.check(problem)


def test_random_problems():
    for problem in cases.random_problems(60, seed=5):
        cases.check(problem)


def test_the_reference_is_attention_over_rebuilt_keys_and_values():
    """Written another way: torch's own attention, in float64."""
    for problem in cases.random_problems(40, seed=6):
        expected = cases.sdpa_over_rebuilt(problem, torch.float64)
        got = reference.latent_attention_decode(*problem.arguments)
        assert torch.allclose(got, expected.nan_to_num(nan=0.0), rtol=1e-9, atol=1e-12), problem


def test_registration():
    op = torch.ops.int8_ops.latent_attention_decode
    for problem in (*NAMED["regular"][3:], *NAMED["biases"][:2], NAMED["windows"][2]):
        torch.library.opcheck(op.default, problem.op_arguments)


def test_fakes_agree_with_the_kernel():
    for problem in (*NAMED["regular"], *NAMED["empty"], *NAMED["layout"]):
        real = ops.latent_attention_decode(*problem.arguments)
        meta = problem.map(lambda t: t.to("meta"))
        fake = ops.latent_attention_decode(*meta.arguments)
        assert fake.is_meta
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


BASE = cases.Maker(3).problem("base", 2, 2, tokens=9, k=[(8, 8), (4, 8)], v_bias=torch.float32)


def _with(stream: str, **parts: object) -> cases.Problem:
    return replace(BASE, **{stream: getattr(BASE, stream)._replace(**parts)})


WRONG = {
    "expected q of dtype": replace(BASE, q=BASE.q.double()),
    r"expected q of shape \[B, H, q_len, d\] with q_len from 1 to 16": replace(
        BASE, q=BASE.q.expand(-1, -1, 17, -1)
    ),
    "and an even d": replace(BASE, q=BASE.q[..., :63]),
    "expected 1 to 4 slices of k": _with("k", q=[], scale=[], a=[], a_scale=[]),
    "each with a scale": _with("v", scale=[]),
    "expected k latents of shape": _with("k", q=[t[0] for t in BASE.k.q]),
    "with q's B = 2": replace(BASE.rows(slice(0, 1)), q=BASE.q),
    "expected A of v of shape": _with("v", a=[BASE.v.a[0][:1]]),
    "expected v of dtype": _with("v", q=[BASE.v.q[0].int()]),
    "expected the scale of a latent of dtype": _with("v", scale=[BASE.v.scale[0].half()]),
    "expected A of dtype": _with("v", a=[BASE.v.a[0].float()]),
    "expected the scale of A of dtype": _with("v", a_scale=[BASE.v.a_scale[0].double()]),
    "expected slices of v that agree": _with("v", scale=[BASE.v.scale[0][:, :, :8]]),
    "expected latents of v as wide as A's rank": _with("v", q=[BASE.v.q[0][..., :7]]),
    r"expected bias of v of shape \[256\]": _with("v", bias=torch.zeros(255)),
    "expected bias of dtype": _with("v", bias=torch.zeros(256, dtype=torch.int32)),
    "expected k and v of the same B, G, S and heads": _with(
        "v", q=[BASE.v.q[0][:, :, :8]], scale=[BASE.v.scale[0][:, :, :8]]
    ),
    "which divide q's 7": replace(BASE, q=BASE.q[:, :7]),
    "expected inv_freq of dtype": replace(BASE, inv_freq=BASE.inv_freq.double()),
    r"expected inv_freq of shape \[32\]": replace(BASE, inv_freq=BASE.inv_freq[:31]),
    "expected start of dtype": replace(BASE, start=BASE.start.long()),
    r"expected length of shape \[2\]": replace(BASE, length=BASE.length[:1]),
    r"expected origin of shape \[2\]": replace(BASE, origin=BASE.length[None]),
    "expected a window of at least 1, got 0": replace(BASE, window=0),
}


@pytest.mark.parametrize("message", WRONG)
def test_errors(message):
    cases.check(BASE)
    problem = WRONG[message]
    for moved in (problem, problem.map(lambda t: t.to("meta"))):
        with pytest.raises(RuntimeError, match=f"int8_ops.{OP}: expected.*{message[9:]}"):
            ops.latent_attention_decode(*moved.arguments)


@pytest.mark.parametrize("channel", [5, 37])
def test_scales_that_differ_within_a_pair_are_refused_on_a_cpu(channel):
    """A fake has no data, and takes them."""
    base = replace(
        BASE, k=BASE.k._replace(a_scale=[torch.full_like(t, 0.5) for t in BASE.k.a_scale])
    )
    values = ("0.75", "0.5") if channel == 5 else ("0.5", "0.75")
    problem = base.with_key_scale(3, channel, 0.75, 1)
    message = (
        f"expected scales of A of k that are the same for the two channels of a RoPE pair, got "
        f"{values[0]} for channel 5 and {values[1]} for channel 37 of KV head 3 in slice 1"
    )
    with pytest.raises(RuntimeError, match=f"int8_ops.{OP}: {message}"):
        ops.latent_attention_decode(*problem.arguments)
    fake = ops.latent_attention_decode(*problem.map(lambda t: t.to("meta")).arguments)
    assert fake.is_meta
    cases.check(base)
    cases.check(base.with_key_scale(3, 5, torch.nan).with_key_scale(3, 37, torch.nan))


def test_two_devices_are_refused():
    wrong = replace(BASE, length=BASE.length.to("meta"))
    with pytest.raises(RuntimeError, match="device"):
        ops.latent_attention_decode(*wrong.arguments)


def test_compiled_as_one_graph():
    """Lengths are data: steps of a static cache share a graph."""
    make = cases.Maker(4)
    problem = make.problem("compiled", 2, tokens=40, k=[(8, 8), (4, 8)], static=True)

    def step(length, q):
        return ops.latent_attention_decode(*replace(problem, q=q, length=length).arguments)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for n in (9, 10, 40):
        length = torch.tensor([n, n - 5], dtype=torch.int32)
        assert torch.equal(compiled(length, problem.q), step(length, problem.q))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
