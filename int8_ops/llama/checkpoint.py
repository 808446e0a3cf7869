"""Saving and loading converted models by transformers' own means: ``quant_method: "int8_latent"``.

``save_pretrained`` writes safetensors and, in ``config.json``, how each layer stores its latents
and a fingerprint of its factors. ``from_pretrained`` finds the method in transformers' registry of
quantizers, where ``import int8_ops`` puts it, swaps the attention modules on the meta device, lets
transformers load the tensors, and compares the fingerprints.

This module is imported while transformers' registry is, so it takes nothing else of transformers at
its head; see ``int8_ops._transformers``.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .spec import LayerSpec, layer_specs

if TYPE_CHECKING:
    from .attention import LatentProjection

__all__ = ["METHOD", "LatentQuantizationConfig", "LatentQuantizer", "mark_converted"]

METHOD = "int8_latent"
FORMAT = 1
# A sum of absolute values moves by less than this when its terms are rounded to bfloat16.
SUM_TOLERANCE = 2.0**-8


@register_quantization_config(METHOD)
class LatentQuantizationConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What ``config.json`` holds of a converted model.

    Args:
        layers: each layer's ``LayerSpec.to_dict()``, in order.
        backend: of the converted modules.
        fingerprints: of each layer's factors, ``{"k": {...}, "v": {...}}``.
        format: of this record.
        kwargs: anything else is refused.

    Raises:
        ValueError: another format, or entries that are not what they should be, naming them.
    """

    def __init__(
        self,
        layers: Sequence[Any] = (),
        backend: str = "auto",
        fingerprints: Sequence[Any] = (),
        format: int = FORMAT,
        **kwargs: Any,
    ) -> None:
        """See the class."""
        method = kwargs.pop("quant_method", METHOD)
        if method != METHOD or kwargs:
            raise ValueError(
                f"{METHOD}: expected a quantization_config made by int8_ops, got quant_method "
                f"{method!r} with {sorted(kwargs) or 'nothing else'}"
            )
        if format != FORMAT:
            raise ValueError(
                f"{METHOD}: expected a checkpoint of format {FORMAT}, got {format!r}; a newer "
                "int8_ops may read it"
            )
        if not layers:
            raise ValueError(f"{METHOD}: expected layers in the quantization_config, got none")
        layer_specs(layers)
        self.quant_method = METHOD
        self.layers = list(layers)
        self.backend = backend
        self.fingerprints = list(fingerprints)
        self.format = format

    @classmethod
    def of(cls, specs: Sequence[LayerSpec], backend: str) -> LatentQuantizationConfig:
        """The record of a model with these specs, fingerprints not taken yet."""
        return cls(layers=[spec.to_dict() for spec in specs], backend=backend)

    def specs(self) -> tuple[LayerSpec, ...]:
        """Each layer's spec."""
        return layer_specs(self.layers)


@register_quantizer(METHOD)
class LatentQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads and saves converted models; it never converts one: see ``int8_ops.llama.convert``."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Swap the attention modules of the skeleton, which has no values yet."""
        from .skeleton import swap_attentions

        config = self.quantization_config
        try:
            swap_attentions(model, config.specs(), config.backend)
        except ValueError as error:
            raise ValueError(f"{METHOD}: {error}") from error
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Compare the fingerprints: transformers fills what is missing with random numbers."""
        self._check_fingerprints(model)
        return model

    def _check_fingerprints(self, model: Any) -> None:
        from .families import attentions

        expected = self.quantization_config.fingerprints
        found = fingerprints(model)
        if len(expected) != len(found):
            raise ValueError(
                f"{METHOD}: expected fingerprints of {len(found)} layers in the "
                f"quantization_config, got {len(expected)}"
            )
        for index, _ in attentions(model):
            for stream in ("k", "v"):
                want, got = expected[index][stream], found[index][stream]
                wrong = [name for name in ("a", "b", "bias") if not _same(want[name], got[name])]
                if wrong:
                    told = ", ".join(f"{n}: expected {want[n]}, got {got[n]}" for n in wrong)
                    raise ValueError(
                        f"{METHOD}: damaged checkpoint: {stream}_proj of layer {index} is not what "
                        f"was saved: {told}"
                    )

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No: the integers get no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Yes."""
        return True


def mark_converted(model: Any, config: LatentQuantizationConfig) -> None:
    """Make ``model.save_pretrained`` write a checkpoint that loads converted."""
    config.fingerprints = fingerprints(model)
    model.config.quantization_config = config
    model.hf_quantizer = LatentQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = METHOD


def fingerprints(model: Any) -> list[dict[str, dict[str, Any]]]:
    """Of every layer: a CRC of A and its scales, sums of B's and the bias's absolute values.

    The sums hold in any dtype the floats are loaded in. None for what is on meta.
    """
    from .families import attentions

    return [
        {stream: _fingerprint(getattr(attention, f"{stream}_proj")) for stream in ("k", "v")}
        for _, attention in attentions(model)
    ]


def _fingerprint(projection: LatentProjection) -> dict[str, Any]:
    a: int | float | None = 0
    for piece in projection.pieces():
        if piece.floats:
            total = _sum(piece.weight)
            a = None if total is None or a is None else a + total
            continue
        for tensor in (piece.A_int8, piece.A_scale_bits):
            if a is None or tensor.is_meta:
                a = None
                continue
            assert isinstance(a, int)
            a = zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), a)
    return {"a": a, "b": _sum(projection.BLinear.weight), "bias": _sum(projection.bias)}


def _sum(tensor: Tensor | None) -> float | None:
    if tensor is None or tensor.is_meta:
        return None
    return float(tensor.detach().to(torch.float64).abs().sum())


def _same(want: Any, got: Any) -> bool:
    if got is None:  # on meta, or there is none
        return True
    if isinstance(got, float):
        return isinstance(want, float) and abs(want - got) <= SUM_TOLERANCE * abs(want)
    return bool(want == got)
