"""What the commands that load a model share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from .. import hf
from . import CommandError, check_cpu_isa, pick_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def positive(text: str) -> int:
    """An argument that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def not_negative(text: str) -> int:
    """An argument that counts something there may be none of."""
    return 0 if text == "0" else positive(text)


def ratio(text: str) -> float:
    """An argument in (0, 1]."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, got {value}")
    return value


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where its matmuls are known to be fast, else float32."""
    if device.type == "cuda":
        return torch.bfloat16
    # torch documents no way to ask: a build without oneDNN, or another version, may lack this one.
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return torch.bfloat16 if supported is not None and supported() else torch.float32


def read_text(path: Path | None, option: str = "--text") -> tuple[str, str]:
    """(what the text is, the text). Raises CommandError where there is none to read."""
    if path is not None:
        try:
            return path.name, path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CommandError(f"{option} {path}: {error}") from error
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CommandError(
            f"this Python comes without its help topics ({error}): name a text with {option} FILE"
        ) from error
    return "pydoc_data.topics", "\n".join(topics[key] for key in sorted(topics))


def add_text_argument(parser: argparse.ArgumentParser) -> None:
    """``--text``, for ``read_text``."""
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="text to score (default: the topics of Python's own help, pydoc_data.topics)",
    )


def add_window_arguments(
    parser: argparse.ArgumentParser, windows: int, purpose: str, length: int
) -> None:
    """``--windows`` and ``--window-length``, with these defaults."""
    parser.add_argument(
        "--windows", type=positive, default=windows, help=f"{purpose} (default: %(default)s)"
    )
    parser.add_argument(
        "--window-length",
        type=positive,
        default=length,
        metavar="TOKENS",
        help="tokens a window (default: %(default)s)",
    )


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """``--device``, ``--dtype`` and ``--threads``."""
    parser.add_argument("--device", help="cpu or cuda[:index] (default: cuda where there is one)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of everything that is not an integer (default: bfloat16, or float32 on a CPU "
        "without bfloat16 instructions)",
    )
    parser.add_argument("--threads", type=positive, help="threads on the CPU (default: torch's)")


def pick_dtype(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """What ``add_device_arguments`` was given. Raises CommandError if it can't be used."""
    device = pick_device(args.device)
    if device.type == "cpu":
        check_cpu_isa()
    if args.threads:
        torch.set_num_threads(args.threads)
    return device, DTYPES[args.dtype] if args.dtype else default_dtype(device)


def load(source: str, device: torch.device, dtype: torch.dtype) -> hf.LoadedModel:
    """``hf.load_causal_lm``, a failure told as one of the command."""
    try:
        return hf.load_causal_lm(source, device=device, dtype=dtype)
    except (hf.MissingExtra, OSError, ValueError, TypeError) as error:
        raise CommandError(str(error)) from error


def device_name(device: torch.device) -> str:
    """``cuda:0``, or ``cpu, 2 threads``."""
    return f"{device}" + (f", {torch.get_num_threads()} threads" if device.type == "cpu" else "")


def tensor_bytes(thing: Any, seen: set[int] | None = None) -> int:
    """Bytes of every tensor that an object holds, in its attributes, lists and dictionaries.

    Each tensor once; a subclass that wraps others (a quantized tensor) by what it wraps.
    """
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, (str, bytes, int, float, type, torch.nn.Module)):
        return 0
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        if hasattr(thing, "__tensor_flatten__"):
            names, _ = thing.__tensor_flatten__()
            return sum(tensor_bytes(getattr(thing, name), seen) for name in names)
        return thing.numel() * thing.element_size()
    if isinstance(thing, dict):
        return sum(tensor_bytes(value, seen) for value in thing.values())
    if isinstance(thing, (list, tuple, set)):
        return sum(tensor_bytes(value, seen) for value in thing)
    return tensor_bytes(vars(thing), seen) if hasattr(thing, "__dict__") else 0
