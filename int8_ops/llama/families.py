"""Which models can be converted, and the modules that take the place of their attention.

A family is named by its attention class, whose forward pass ``LatentAttention`` stands in for: RoPE
in half-split pairs over the whole head, no norm on queries or keys, one softmax. A model that
shares that class is covered; any other is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from .._cache_names import cache_argument
from .attention import LatentAttention
from .decode import MOVING_ROPE

__all__ = ["attention_class", "check_model", "decoder_layers"]


# Subclasses of the originals, because transformers finds the modules whose attention weights
# `output_attentions` asks for by their class.
class LatentLlamaAttention(LatentAttention, LlamaAttention):  # type: ignore[misc]
    """Llama 2 and 3.x, SmolLM2, Yi and others with Llama's attention."""


class LatentMistralAttention(LatentAttention, MistralAttention):  # type: ignore[misc]
    """Mistral 7B and its kin. With a sliding window the cache still holds the whole history."""


class LatentQwen2Attention(LatentAttention, Qwen2Attention):  # type: ignore[misc]
    """Qwen2 and 2.5: biases on q, k and v."""


FAMILIES: dict[type[nn.Module], type[LatentAttention]] = {
    LlamaAttention: LatentLlamaAttention,
    MistralAttention: LatentMistralAttention,
    Qwen2Attention: LatentQwen2Attention,
}


def attention_class(attention: nn.Module) -> type[LatentAttention]:
    """What stands in for ``attention``. Raises TypeError naming it where nothing does."""
    found = FAMILIES.get(type(attention))
    if found is None:
        names = ", ".join(sorted(family.__name__ for family in FAMILIES))
        raise TypeError(
            f"int8_ops.llama: expected attention of {names}, got {type(attention).__name__}"
        )
    return found


def decoder_layers(model: nn.Module) -> list[Any]:
    """The model's decoder layers. Raises TypeError where it is not laid out as the families are."""
    base = getattr(model, "model", None)
    layers = getattr(base, "layers", None)
    if layers is None or not hasattr(base, "rotary_emb") or len(layers) == 0:
        raise TypeError(
            "int8_ops.llama: expected a causal language model of transformers with model.layers "
            f"and model.rotary_emb, got {type(model).__name__}"
        )
    return list(layers)


def attentions(model: nn.Module) -> Iterator[tuple[int, Any]]:
    """Index and ``self_attn`` of each decoder layer."""
    for index, layer in enumerate(decoder_layers(model)):
        attention = getattr(layer, "self_attn", None)
        if attention is None:
            raise TypeError(
                f"int8_ops.llama: expected self_attn in layer {index} of {type(model).__name__}, "
                f"a {type(layer).__name__} without one was found"
            )
        yield index, attention


def rope_type(config: Any) -> str:
    """``default``, ``llama3``, ``yarn`` ...: 5.x has rope_parameters, 4.x rope_scaling."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    parameters = parameters or {}
    return str(parameters.get("rope_type", parameters.get("type", "default")))


def check_model(model: nn.Module) -> None:
    """Raises before anything is touched unless ``model`` can be converted.

    Raises:
        TypeError: another architecture, by name; a model that was converted before; projections
            that are not plain ``nn.Linear`` (quantized or adapted ones); a cache argument of
            another name than is known.
        ValueError: RoPE whose frequencies follow the sequence's length.
    """
    name = type(model).__name__
    for index, attention in attentions(model):
        if isinstance(attention, LatentAttention):
            raise TypeError(f"int8_ops.llama: {name} is converted already (layer {index})")
        if type(attention) not in FAMILIES:
            raise TypeError(f"{name} cannot be converted: {_refusal(attention)}")
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            module = getattr(attention, projection)
            if type(module) is not nn.Linear:
                raise TypeError(
                    f"{name} cannot be converted: expected nn.Linear as {projection} of layer "
                    f"{index}, got {type(module).__name__}"
                )
    cache_argument(type(model.model))  # type: ignore[arg-type]
    kind = rope_type(model.config)
    if kind in MOVING_ROPE:
        raise ValueError(
            f"{name} cannot be converted: its RoPE is of type {kind!r}, whose frequencies follow "
            "the sequence's length, so keys rebuilt later would be rotated differently"
        )


def _refusal(attention: nn.Module) -> str:
    try:
        attention_class(attention)
    except TypeError as error:
        return str(error)
    raise AssertionError("refused although its family is known")
