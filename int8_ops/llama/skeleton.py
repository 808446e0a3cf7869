"""Converted models without a conversion: given how latents are stored, the modules for it.

Loading a checkpoint starts from this, with values to come; so does measuring speed and memory,
which do not depend on them: ``with_random_factors``.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .attention import LatentProjection
from .families import attention_class, attentions, check_model, decoder_layers
from .runtime import install
from .spec import LayerSpec

__all__ = ["sharing_copy", "swap_attentions", "with_random_factors"]

# The root of the mean square of integers spread evenly over -127..127.
INTEGERS_RMS = math.sqrt(127 * 128 / 3)


def swap_attentions(model: Any, specs: Sequence[LayerSpec], backend: str) -> None:
    """Give every layer of an unconverted model a ``LatentAttention`` of zeros, and hook the cache.

    Raises:
        TypeError: as ``check_model``; nothing has been touched.
        ValueError: as ``check_model``, or specs that do not fit the layers, likewise.
    """
    check_model(model)
    layers = decoder_layers(model)
    if len(specs) != len(layers):
        raise ValueError(
            f"expected specs of {len(layers)} layers, as the model has, got {len(specs)}"
        )
    for index, attention in attentions(model):
        heads = attention.k_proj.out_features // attention.head_dim
        if heads % specs[index].groups:
            raise ValueError(
                f"expected groups that divide the {heads} KV heads of layer {index}, got "
                f"{specs[index].groups}"
            )
    for index, attention in attentions(model):
        layers[index].self_attn = attention_class(attention)(
            attention, specs[index], model.model.rotary_emb, backend
        )
    install(model)


def sharing_copy(model: Any) -> Any:
    """A copy of the modules and the configuration that holds the same tensors."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


@torch.no_grad()
def with_random_factors(
    model: Any, specs: Sequence[LayerSpec], backend: str = "auto", seed: int = 0
) -> Any:
    """A converted model of random factors beside ``model``, which shares all its other weights.

    For measuring what does not depend on values. What it says is noise.

    Args:
        model: unconverted; left as it is.
        specs: how each layer stores its latents.
        backend: of the converted modules.
        seed: of the factors.

    Raises:
        TypeError: the model cannot be converted.
        ValueError: the specs do not fit it.
    """
    made = sharing_copy(model)
    swap_attentions(made, specs, backend)
    for index, attention in attentions(made):
        for number, name in enumerate(("k_proj", "v_proj")):
            projection: LatentProjection = getattr(attention, name)
            generator = torch.Generator(projection.BLinear.weight.device)
            _fill(projection, generator.manual_seed(seed * 1_000_003 + 2 * index + number))
            projection.requires_grad_(False)
    return made


def _fill(projection: LatentProjection, generator: torch.Generator) -> None:
    """Latents and what is rebuilt from them have about the size of the input."""

    def normal(tensor: Tensor, fan_in: int) -> None:
        tensor.normal_(std=fan_in**-0.5, generator=generator)

    normal(projection.BLinear.weight, projection.BLinear.in_features)
    for piece in projection.pieces():
        if piece.floats:
            normal(piece.weight, projection.rank)
            continue
        piece.A_int8.random_(-127, 128, generator=generator)
        piece.A_scale.fill_(1 / (INTEGERS_RMS * math.sqrt(projection.rank)))
