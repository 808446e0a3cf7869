"""Let a model answer a prompt, and tell how fast it was and what its KV cache took."""

from __future__ import annotations

import argparse
import time

import torch

from .._cache_names import cache_of
from . import CommandError
from .common import add_device_arguments, device_name, load, pick_dtype, positive, tensor_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``generate``."""
    parser.add_argument("model", metavar="MODEL", help="a folder of `convert`, or any model")
    parser.add_argument("prompt", metavar="PROMPT", help="what to continue, or with --chat answer")
    parser.add_argument(
        "--chat", action="store_true", help="put the prompt into the model's chat template"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        default=64,
        metavar="TOKENS",
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--static", action="store_true", help="use a cache of a fixed size (cache_implementation)"
    )
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Carry out ``generate``; 0 when the text is printed."""
    device, dtype = pick_dtype(args)
    loaded = load(args.model, device, dtype)
    prompt = loaded.encode_question(args.prompt) if args.chat else loaded.encode(args.prompt)
    if len(prompt) == 0:
        raise CommandError("PROMPT: expected at least one token, got none")
    ids = prompt[None].to(device)
    started = time.perf_counter()
    out = loaded.model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=args.max_new_tokens,
        do_sample=False,
        cache_implementation="static" if args.static else None,
        return_dict_in_generate=True,
        pad_token_id=loaded.tokenizer.eos_token_id,
    )
    new = out.sequences[0, len(prompt) :].tolist()
    seconds = time.perf_counter() - started
    cache = cache_of(out)
    print(loaded.decode(new) if args.chat else args.prompt + loaded.decode(new))
    print()
    print(
        f"{len(new)} tokens in {seconds:.1f} s, {len(new) / seconds:.1f} tokens/s with reading the "
        f"prompt of {len(prompt)}, on {device_name(device)}, {dtype}"
    )
    if hasattr(cache, "memory_report"):
        report = cache.memory_report()
        print(
            f"cache: {report['bytes_per_token']:,} bytes a token, {report['used']:,} used by "
            f"{report['tokens']} tokens, {report['allocated']:,} allocated"
        )
    else:
        print(f"cache: {type(cache).__name__}, {tensor_bytes(cache):,} bytes allocated")
    return 0
