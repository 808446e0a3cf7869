"""int8_ops.llama on the oldest transformers it takes; the rest of the tests run on the newest."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="4.56")

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
# What touches transformers; the real model is left to the newest version.
FILES = (
    "test_llama_attention.py",
    "test_llama_cache.py",
    "test_llama_checkpoint.py",
    "test_llama_convert.py",
    "test_llama_generate.py",
    "test_llama_skeleton.py",
)


def oldest() -> str:
    """The lower bound of the extra `llama`."""
    text = (ROOT / "pyproject.toml").read_text()
    return re.search(r'^llama = \["transformers>=([\d.]+)"', text, re.M).group(1)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables with which Python finds the oldest transformers, and its own needs."""
    folder = tmp_path_factory.mktemp("oldest-transformers")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
    run = subprocess.run(
        [*install, f"transformers=={oldest()}.*"], capture_output=True, text=True, timeout=600
    )
    if run.returncode != 0:
        pytest.skip(f"pip could not install transformers {oldest()}: {run.stderr.strip()[-300:]}")
    path = [str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}


def test_the_oldest_transformers(environment: dict[str, str]) -> None:
    version = subprocess.run(
        [sys.executable, "-c", "import transformers; print(transformers.__version__)"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert version.stdout.startswith(f"{oldest()}."), version.stdout + version.stderr
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu"]
    run = subprocess.run(
        [*command, *(str(TESTS / name) for name in FILES)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=1500,
    )
    print(run.stdout[-400:])
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout).group(1)) > 100, run.stdout[-400:]
