"""Devices for the tests: everything runs on the CPU, and again on CUDA where there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import int8_ops.backends

# Thousands of shapes would each be timed on first sight; test_triton.py tests the tuner.
os.environ.setdefault("INT8_OPS_TRITON_TUNE", "0")

# Workers of pytest-xdist share the cores: with all of them each, they mostly wait for one another.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many small tensors: on a busy machine, threads that share one mostly wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(request.param)


@pytest.fixture(
    params=[
        ("cpu", "cpu"),
        ("fallback", "cpu"),
        *(
            pytest.param((name, "cuda"), marks=pytest.mark.gpu)
            for name in ("cuda", "triton", "torch", "fallback")
        ),
    ],
    ids=lambda pair: f"{pair[0]}-on-{pair[1]}",
)
def backend_on(request: pytest.FixtureRequest) -> tuple[str, torch.device]:
    """A backend that this machine has, and a device it runs on."""
    name, kind = request.param
    device = (
        torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
    )
    reason = int8_ops.backends.unavailable_reason(name, device)
    if reason is not None:
        pytest.skip(f"backend {name}: {reason}")
    return name, device
