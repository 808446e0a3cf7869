"""The Triton backend: its kernels under the interpreter, compiled for Hopper, and on a GPU."""

from __future__ import annotations

import collections
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton_cases

from int8_ops import backends, reference
from int8_ops.backends import triton as backend
from int8_ops.backends.triton import configs

INTERPRETER_SECONDS = 900
H100 = configs.DeviceLimits()
A100 = configs.DeviceLimits(multiprocessors=108, smem_bytes=166_912, has_wgmma=False)

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """Each case -> None or its traceback, from one process: most of a case is starting torch."""
    root = Path(__file__).parents[1]
    result = tmp_path_factory.mktemp("triton") / "result.json"
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, str(root / "tests" / "triton_cases.py"), str(result)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=INTERPRETER_SECONDS,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(result.read_text())


@needs_triton
@pytest.mark.parametrize("case", triton_cases.INTERPRETER_CASES)
def test_interpreted(case: str, interpreted: dict[str, str | None]) -> None:
    assert interpreted[case] is None, interpreted[case]


def test_reason_without_a_device() -> None:
    reason = backend.unavailable_reason(torch.device("cpu"))
    assert reason is not None
    assert re.search("triton is not installed|run on CUDA devices, this one is cpu", reason)
    with pytest.raises(RuntimeError, match=re.escape(f"cannot be used on cpu: {reason}")):
        backend.int8_linear(
            torch.zeros(2, 8), torch.zeros(4, 8, dtype=torch.int8), torch.ones(4, 1), None
        )


@needs_triton
def test_reason_for_an_old_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    reason = backend.unavailable_reason(torch.device("cuda", 0))
    assert reason == "triton kernels need compute capability 8.0, this device has 7.5"


def test_reason_on_a_build_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_installed", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "need a CUDA build of torch" in str(backend.unavailable_reason())
    monkeypatch.setattr(backend, "_installed", lambda: False)
    assert backend.unavailable_reason() == "triton is not installed: pip install triton"


SHAPES = [
    (m, n, k)
    for m in (1, 2, 16, 17, 48, 64, 128, 256, 2048, 32768)
    for n in (1, 40, 1024, 4096, 14336)
    for k in (1, 31, 64, 128, 256, 512, 1024, 4096, 14336, reference.MAX_K)
]


@pytest.mark.parametrize("device", [H100, A100], ids=["h100", "a100"])
def test_shortlist_fits(device: configs.DeviceLimits) -> None:
    for m, n, k in SHAPES:
        chosen = configs.shortlist(m, n, k, 2, device)
        assert 1 <= len(chosen) <= configs.MAX_TIMED
        assert len(set(chosen)) == len(chosen)
        tiles = collections.Counter((c.block_m, c.block_n) for c in chosen)
        assert max(tiles.values()) <= configs.MAX_TIMED_PER_TILE
        for config in chosen:
            assert config.smem_bytes <= device.smem_bytes
            assert config.block_m < 2 * max(m, 16)
            assert config.block_n < 2 * max(n, 32)


def test_every_matmul_config_is_reachable() -> None:
    reached = {c for shape in SHAPES for c in configs.shortlist(*shape, 2, H100)}
    assert reached == set(configs.MATMUL_CONFIGS)


def test_shortlist_of_known_shapes() -> None:
    large = configs.shortlist(8192, 14336, 4096, 2, H100)
    assert {large[0].block_m, large[0].block_n} == {128, 256}
    small = configs.shortlist(1, 14336, 4096, 2, H100)
    assert {c.block_m for c in small} == {16}


def test_quantize_shortlist_holds_whole_rows() -> None:
    for rows in (1, 3, 128, 32768):
        for cols in (1, 7, 128, 512, 1000, 4096, 14336, configs.MAX_ROW_IN_REGISTERS):
            chosen = configs.quantize_shortlist(rows, cols)
            assert len(set(chosen)) == len(chosen)
            for config in chosen:
                assert cols <= config.block_cols < 2 * cols or cols == 1
                elements = config.block_rows * config.block_cols
                assert elements <= 32 * 32 * config.num_warps
                assert config.num_warps <= 32


def compile_for(
    capability: int, kernel: object, types: dict[str, str], **options: object
) -> object:
    """Compile a kernel without a device; pointers, and specialised sizes, are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    meta = {name: options.pop(name) for name in list(options) if name in kernel.arg_names}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(
        kernel,
        signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in meta.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(kernel.arg_names)
            if types.get(name, "fp32") != "fp32" and not kernel.params[i].do_not_specialize
        },
    )
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={**options, "enable_fp_fusion": False})


def compile_matmul(capability: int, config: configs.MatmulConfig, even_k: bool = True) -> object:
    from int8_ops.backends.triton import kernels

    pointers = {"a": "i8", "w": "i8", "out": "bf16", "a_scale": "fp32", "w_scale": "fp32"}
    types = {f"{name}_ptr": f"*{dtype}" for name, dtype in {**pointers, "bias": "fp32"}.items()}
    return compile_for(
        capability,
        kernels.matmul_kernel,
        {**types, "m": "i32", "n": "i32", "k": "i32"},
        EVEN_K=even_k,
        NATIVE_BFLOAT16=True,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


@needs_triton
@pytest.mark.parametrize("config", configs.MATMUL_CONFIGS, ids=str)
def test_matmul_compiles_for_hopper(config: configs.MatmulConfig) -> None:
    """Every candidate: tensor cores in int8, unfused epilogue, shared memory that fits."""
    compiled = compile_matmul(90, config)
    ptx = compiled.asm["ptx"]
    if config.block_m >= 64:
        assert re.search(r"wgmma\.mma_async\S*\.s32\.s8\.s8", ptx)
    else:
        assert re.search(r"mma\.sync\S*\.s32\.s8\.s8\.s32", ptx)
    assert "cp.async" in ptx
    assert "fma.rn.f32" not in ptx
    assert "mul.rn.f32" in ptx or "mul.f32" in ptx
    assert "cvt.rn.f32.s32" in ptx
    assert ".ftz" not in ptx
    assert compiled.metadata.shared <= H100.smem_bytes
    # What the shortlist assumes of the pipeline is what the compiler took, or less.
    assert compiled.metadata.shared <= max(
        config.smem_bytes, 4 * config.block_m * config.block_n + 1024
    )


@needs_triton
def test_matmul_compiles_with_a_k_tail_and_for_ampere() -> None:
    config = configs.MatmulConfig(128, 128, 64, 4, 5)
    for capability, instruction in ((90, "wgmma.mma_async"), (80, "mma.sync")):
        ptx = compile_matmul(capability, config, even_k=False).asm["ptx"]
        assert instruction in ptx
        assert "fma.rn.f32" not in ptx


@needs_triton
@pytest.mark.parametrize("cols", [128, 512, 1024, 4096])
def test_quantize_compiles_to_wide_accesses(cols: int) -> None:
    from int8_ops.backends.triton import kernels

    config = configs.quantize_shortlist(32768, cols)[0]
    ptx = compile_for(
        90,
        kernels.quantize_rows_kernel,
        {"x_ptr": "*bf16", "q_ptr": "*i8", "scale_ptr": "*fp32", "rows": "i32", "cols": "i32"},
        BLOCK_ROWS=config.block_rows,
        BLOCK_COLS=config.block_cols,
        FMA_DIVISION=True,
        num_warps=config.num_warps,
    ).asm["ptx"]
    # 16 elements a thread: two 16-byte loads, one 16-byte store, four FMAs each; a scale's two
    # divisions for each place a thread computes it in, and none an element.
    assert ptx.count("ld.global.v4.b32") == 2
    assert ptx.count("st.global.v4.b32") == 1
    assert ptx.count("fma.rn.f32") == 4 * 16
    assert ptx.count("div.rn.f32") <= 4
    assert "div.full" not in ptx
    assert ".ftz" not in ptx


def compile_attention(capability: int, kernel: object, pointers: str, **meta: object) -> object:
    """``pointers``: those that have another type than float32, as name=type."""
    named = dict(pair.split("=") for pair in pointers.split())
    types = {}
    for name in kernel.arg_names:
        if name.isupper() or name in meta:
            continue
        kind = f"*{named.get(name, 'fp32')}" if name.endswith("_ptr") else "i32"
        types[name] = "fp32" if name == "scaling" else kind
    return compile_for(capability, kernel, types, **meta)


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_latent_attention_compiles_to_tensor_cores(
    capability: int, packed: bool, dtype: str
) -> None:
    from int8_ops.backends.triton import attention_kernels as kernels
    from int8_ops.backends.triton import attention_launch as launch

    own = {
        "BFLOAT16": dtype == "bf16",
        "PRECISION": "tf32" if dtype == "fp16" else "ieee",
        "NATIVE_BFLOAT16": True,
        "PACKED": packed,
        "BLOCK_M": 16,
        "BLOCK_T": launch.BLOCK_T,
        "num_warps": launch.NUM_WARPS,
    }
    numbers = "start_ptr=i32 length_ptr=i32 origin_ptr=i32 latent_ptr=i8 a_ptr=i8"
    compiled = compile_attention(
        capability,
        kernels.scores_kernel,
        f"{numbers} q_ptr={dtype} bias_ptr={dtype}",
        **own,
        ADD=False,
        HALF=64,
        BLOCK_K=128,
    )
    assert re.search(r"(wgmma\.mma_async|mma\.sync)\S*\.s32\.s8\.s8", compiled.asm["ptx"])
    limit = (H100 if capability == 90 else A100).smem_bytes
    assert compiled.metadata.shared <= limit
    sums = compile_attention(
        capability, kernels.sums_kernel, numbers, **own, SPLIT=launch.SPLIT, BLOCK_R=128
    )
    assert sums.metadata.shared <= limit
    if dtype == "bf16":
        assert re.search(r"mma\S*\.f32\.bf16\.bf16", sums.asm["ptx"])
    compile_attention(
        capability,
        kernels.combine_kernel,
        f"{numbers} out_ptr={dtype}",
        **{"ADD": False, "LAST": True, "SPLIT": launch.SPLIT, "SIZE": 128, "BLOCK_R": 64},
        **{"NATIVE_BFLOAT16": True, "num_warps": launch.NUM_WARPS},
    )


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("block_r", [16, 32, 64])
@pytest.mark.parametrize("block_m", [16, 32])
def test_sums_compile_for_every_tile(capability: int, block_m: int, block_r: int) -> None:
    """To the same instruction whatever the rows: see Note [A row alone]."""
    from int8_ops.backends.triton import attention_kernels as kernels
    from int8_ops.backends.triton import attention_launch as launch

    assert block_m <= launch.MAX_BLOCK_M < 64
    for dtype, instruction in (
        ("fp32", r"fma\.rn\.f32"),
        ("fp16", r"mma\.sync\S*\.m16n8k8\S*\.tf32\.tf32"),
        ("bf16", r"mma\.sync\S*\.m16n8k16\S*\.bf16\.bf16"),
    ):
        compiled = compile_attention(
            capability,
            kernels.sums_kernel,
            "start_ptr=i32 length_ptr=i32 latent_ptr=i8",
            BFLOAT16=dtype == "bf16",
            PRECISION="tf32" if dtype == "fp16" else "ieee",
            NATIVE_BFLOAT16=True,
            PACKED=False,
            BLOCK_M=block_m,
            BLOCK_T=launch.BLOCK_T,
            BLOCK_R=block_r,
            SPLIT=launch.SPLIT,
            num_warps=launch.NUM_WARPS,
        )
        assert re.search(instruction, compiled.asm["ptx"])
        assert "wgmma" not in compiled.asm["ptx"]


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time the candidates, as a user's first call does; conftest.py turns that off."""
    monkeypatch.setenv("INT8_OPS_TRITON_TUNE", "1")


@pytest.mark.gpu
@pytest.mark.parametrize("case", triton_cases.CASES)
def test_gpu(case: str, cuda: torch.device) -> None:
    triton_cases.CASES[case](cuda)


@pytest.mark.gpu
def test_gpu_every_config(cuda: torch.device) -> None:
    """Every tile gives the same bits: launched one by one on a problem with tails."""
    from int8_ops.backends.triton import launch

    rng = triton_cases.generator(11)
    a, w = (triton_cases.int8((rows, 1040), rng, cuda) for rows in (300, 528))
    want = reference.int8_mm(a, w)
    limits = launch._limits(cuda)
    fitting = [c for c in configs.MATMUL_CONFIGS if c.smem_bytes <= limits.smem_bytes]
    assert fitting
    for config in fitting:
        key = ("matmul", a.device, configs.m_bucket(300), 528, 1040, torch.int32)
        launch._tuned[key] = config
        triton_cases.assert_same(backend.int8_mm(a, w), want, config)
    launch._tuned.clear()


@pytest.mark.gpu
def test_gpu_tunes_once(cuda: torch.device, tuned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from int8_ops.backends.triton import launch

    launch._tuned.clear()
    triton_cases.check_linear(100, 256, 512, 12, cuda)
    tuned = dict(launch._tuned)
    assert {key[0] for key in tuned} == {"quantize", "matmul"}
    monkeypatch.setattr(launch, "_fastest", lambda *_: pytest.fail("timed a tuned problem"))
    triton_cases.check_linear(101, 256, 512, 13, cuda)
    assert launch._tuned == tuned


@pytest.mark.gpu
@pytest.mark.parametrize("warm", [True, False])
def test_gpu_graph_replay(cuda: torch.device, tuned: None, warm: bool) -> None:
    """A captured call computes anew from changed inputs; an untuned shape can be captured too."""
    from int8_ops.backends.triton import launch

    rng = triton_cases.generator(14)
    x = torch.randn((24, 96), generator=rng).to(cuda, torch.bfloat16)
    w, w_scale = triton_cases.int8((56, 96), rng, cuda), torch.rand((56, 1), device=cuda)
    launch._tuned.clear()
    if warm:
        backend.int8_linear(x, w, w_scale, None)
    assert bool(launch._tuned) == warm
    # Modules are loaded at a first launch, which a capture may not do.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_fastest", lambda key, candidates, run: candidates[0])
        backend.int8_linear(x, w, w_scale, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = backend.int8_linear(x, w, w_scale, None)
    for seed in (1, 2):
        x.copy_(torch.randn((24, 96), generator=triton_cases.generator(seed)))
        graph.replay()
        triton_cases.assert_same(y, reference.int8_linear(x, w, w_scale, None))


@pytest.mark.gpu
def test_gpu_reduce_overhead(cuda: torch.device, tuned: None) -> None:
    rng = triton_cases.generator(15)
    w, w_scale = triton_cases.int8((48, 64), rng, cuda), torch.rand((48, 1), device=cuda)
    layer = torch.compile(
        lambda x: backends.int8_linear(x, w, w_scale, None, None, "triton"),
        fullgraph=True,
        mode="reduce-overhead",
    )
    for _ in range(4):
        x = torch.randn((8, 64), generator=rng).to(cuda, torch.float16)
        y = layer(x).clone()
        triton_cases.assert_same(y, reference.int8_linear(x, w, w_scale, None))


@pytest.mark.gpu
def test_gpu_offsets_past_int32(cuda: torch.device) -> None:
    """More than 2^31 elements in x, and in out: the last rows are what an overflow would spoil."""
    free, _ = torch.cuda.mem_get_info(cuda)
    if free < 24 * 2**30:
        pytest.skip(f"needs 24 GiB of device memory, {free / 2**30:.0f} are free")
    rows = 2**31 // 2048 + 64
    x = torch.zeros((rows, 2048), dtype=torch.bfloat16, device=cuda)
    x[-32:] = torch.randn((32, 2048), generator=triton_cases.generator(16))
    q, scale = backend.quantize_per_token(x)
    want_q, want_scale = reference.quantize_per_token(x[-32:])
    triton_cases.assert_same(q[-32:], want_q)
    triton_cases.assert_same(scale[-32:], want_scale)
    q, scale = backend.quantize_per_channel(x, 1)
    want_q, want_scale = reference.quantize_per_channel(x[-32:], 1)
    triton_cases.assert_same(q[-32:], want_q)
    triton_cases.assert_same(scale, want_scale)
    del x, q

    rng = triton_cases.generator(17)
    a = triton_cases.int8((rows, 32), rng, cuda)
    w = triton_cases.int8((2048, 32), rng, cuda)
    out = backend.int8_mm(a, w)
    triton_cases.assert_same(out[-32:], reference.int8_mm(a[-32:], w))


@pytest.mark.gpu
def test_gpu_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    triton_cases.named("tails", torch.device("cuda", 1))
