"""Tiny random models of every family, and what the tests of int8_ops.llama share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="4.56")

from int8_ops._cache_names import cache_of, passed  # noqa: E402
from int8_ops.llama import LatentConfig, convert  # noqa: E402

# 4.x wants to be told what 5.x reads from the cache.
FOUR = transformers.__version__.startswith("4.")
VOCABULARY = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # attention that depends on its input, unlike with the usual 0.02
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": ("Llama", {}),
    "llama-mha-bias": ("Llama", {"num_key_value_heads": 8, "attention_bias": True}),
    "llama3-rope": ("Llama", {"rope": LLAMA3_ROPE}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 16}),
    "qwen2": ("Qwen2", {}),
}


def make_model(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model in evaluation mode; the same every time."""
    name, special = FAMILIES[family]
    values = {**SIZES, **special, **changes}
    rope = values.pop("rope", None)
    if rope is not None:
        values["rope_scaling"] = rope
        values["rope_theta"] = rope["rope_theta"]
    if name == "Qwen2":
        values.pop("head_dim")
    config = getattr(transformers, f"{name}Config")(**values)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    if name == "Qwen2" or values.get("attention_bias"):
        with torch.no_grad():  # they are initialised to zero
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith("_proj.bias"):
                    parameter.normal_(std=0.5)
    return model.to(dtype).eval()


def ids_of(rows: int, length: int, seed: int = 0) -> Tensor:
    """Token ids ``[rows, length]`` without special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def make_converted(
    family: str = "llama", config: LatentConfig | None = None, **changes: Any
) -> Any:
    """``make_model`` after conversion, calibrated on random tokens."""
    model = make_model(family, **changes)
    config = config or LatentConfig(kv_ratio=0.6, rank_multiple=8)
    convert(model, ids_of(2, 64, seed=1), config, progress=False)
    return model


def through_cache(model: Any, ids: Tensor, chunk: int, cache: Any = None) -> Tensor:
    """Logits ``[B, n, vocabulary]``, ``chunk`` tokens a pass."""
    logits = []
    for piece in ids.split(chunk, dim=1):
        out = model(input_ids=piece, use_cache=True, **passed(model, cache))
        cache = cache_of(out)
        logits.append(out.logits)
    return torch.cat(logits, dim=1)
