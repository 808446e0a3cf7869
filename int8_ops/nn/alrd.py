"""``ALRDLinearINT8``: a low-rank linear layer whose reconstruction matrix runs on int8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from ..quantizer import INT8Quantizer, StraightThrough
from ._state import apply_keeping_dtypes, describe_backend, dtype_errors

__all__ = ["ALRDLinearINT8", "prepare_all_int8_weights"]


class _Reconstruction(nn.Linear):
    """``ALinear``: an nn.Linear whose weight may be freed while its bias stays."""

    def forward(self, input: Tensor) -> Tensor:
        """``input [..., rank]`` -> ``[..., out_features]`` in floats, while the weight is there."""
        if self.weight is None:
            raise RuntimeError(
                "ALinear has no float weight: prepare_int8_weights(keep_float=False) freed it, or "
                "a checkpoint without it was loaded; use forward_int8"
            )
        return super().forward(input)


class ALRDLinearINT8(nn.Module):
    """``y = A (B x) + bias`` of rank ``rank``: B in floats, A as int8 with a scale a row.

    ``BLinear`` (in -> rank, no bias) makes the latent, which is what a low-rank KV cache stores;
    ``ALinear`` (rank -> out) holds A in floats, and the bias. ``prepare_int8_weights`` quantizes A
    into the persistent buffers ``A_int8`` int8 ``[out_features, rank]`` and ``A_scale`` float32
    ``[out_features, 1]``, which have their final shape from the start (``A_scale`` is all zeros,
    which no quantization returns, until then). With ``keep_float=False`` it frees
    ``ALinear.weight``; ``ALinear.bias`` stays where it is.

    The integers follow the floats: after ``load_state_dict`` of float weights, or any other change
    of ``ALinear.weight`` in place, the next use quantizes anew. A checkpoint that holds integers
    keeps them. A checkpoint of a freed module frees ``ALinear.weight`` of the module it is loaded
    into; one with floats, loaded into a freed module, leaves it freed. Casts (``.half()``) touch
    the floats alone.

    Under ``torch.compile`` and ``torch.export`` nothing is quantized on the way: call
    ``prepare_int8_weights`` first.

    Args:
        in_features: size of the input.
        out_features: size of the output.
        rank: size of the latent.
        bias: whether ``ALinear`` has a bias.
        backend: ``"auto"`` or a backend's name (``int8_ops.backends``).
        device: as for nn.Linear, meta included.
        dtype: of the float weights.

    Raises:
        ValueError: an unknown backend, or a rank below 1.
    """

    A_int8: Tensor
    A_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the float weights, as nn.Linear does, and empty int8 ones; see the class."""
        super().__init__()
        if rank < 1:
            raise ValueError(f"ALRDLinearINT8: expected rank >= 1, got {rank}")
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.backend = backends.check_name(backend)
        self.BLinear = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.ALinear = _Reconstruction(rank, out_features, bias=bias, device=device, dtype=dtype)
        self.register_buffer(
            "A_int8", torch.zeros((out_features, rank), dtype=torch.int8, device=device)
        )
        self.register_buffer(
            "A_scale", torch.zeros((out_features, 1), dtype=torch.float32, device=device)
        )
        self._source: tuple[Tensor, int] | None = None
        self._prepared = False
        self._takes_ints = False
        self.register_load_state_dict_post_hook(_after_load)

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int, backend: str = "auto") -> ALRDLinearINT8:
        """The best approximation of ``linear`` of that rank, prepared, with its floats kept.

        By SVD in float64, each side taking the square root of the spectrum, so that neither A nor
        the latent has to carry all of it. Device, dtype and training mode are ``linear``'s.

        Raises ValueError for a rank outside 1..min(in_features, out_features).
        """
        w = linear.weight.detach()
        limit = min(w.shape)
        if not 1 <= rank <= limit:
            raise ValueError(
                f"ALRDLinearINT8: expected rank in 1..{limit} for a weight {list(w.shape)}, "
                f"got {rank}"
            )
        layer = cls(
            linear.in_features,
            linear.out_features,
            rank,
            bias=linear.bias is not None,
            backend=backend,
            device=w.device,
            dtype=w.dtype,
        ).train(linear.training)
        if not w.is_meta:
            u, s, vh = torch.linalg.svd(w.to(torch.float64), full_matrices=False)
            root = s[:rank].sqrt()
            with torch.no_grad():
                layer.BLinear.weight.copy_(root[:, None] * vh[:rank])
                layer.ALinear.weight.copy_(u[:, :rank] * root)
                if linear.bias is not None:
                    layer.ALinear.bias.copy_(linear.bias)
        layer.prepare_int8_weights()
        return layer

    def extra_repr(self) -> str:
        """Shapes, backend, and the state of the int8 weights."""
        state = "prepared" if self._prepared else "not prepared"
        if self.ALinear.weight is None:
            state += ", float A freed"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"backend={describe_backend(self.backend, self.A_int8.device)}, int8 weights {state}"
        )

    # -- int8 weights -----------------------------------------------------------------------------

    def _is_fresh(self) -> bool:
        """Whether the integers are those of the float weight as it is now (or it is freed)."""
        a_linear = self._modules["ALinear"]
        weight = a_linear._parameters.get("weight")  # type: ignore[union-attr]
        if weight is None and "weight" not in a_linear._parameters:  # type: ignore[union-attr]
            weight = self.ALinear.weight  # parametrized: made anew at each look, so never fresh
        if weight is None or not self._prepared:
            return self._prepared
        source = self._source
        return source is not None and source[0] is weight and source[1] == _version(weight)

    def _mark_fresh(self) -> None:
        weight = self.ALinear.weight
        # A tuple, so that nn.Module does not take the weight for a parameter of this module.
        self._source = None if weight is None else (weight, _version(weight))
        self._prepared = True

    def prepare_int8_weights(self, keep_float: bool = True) -> None:
        """Quantize A per output channel into ``A_int8`` and ``A_scale``; again only if A changed.

        Args:
            keep_float: False also frees ``ALinear.weight``, whatever was quantized when.
        """
        if not self._is_fresh():
            weight = self.ALinear.weight
            if weight is None:
                raise RuntimeError(
                    "ALRDLinearINT8: there is nothing to quantize: ALinear.weight was freed and no "
                    "int8 weights were loaded"
                )
            # The buffers outlive the call: made in inference mode, they could not be trained with.
            with torch.inference_mode(False), torch.no_grad():
                self.A_int8, self.A_scale = INT8Quantizer.quantize_per_channel(weight.detach())
            self._mark_fresh()
        if not keep_float and self.ALinear.weight is not None:
            self.ALinear.register_parameter("weight", None)
            self._mark_fresh()

    def _int8_weights(self) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            if not self._prepared:
                raise RuntimeError(
                    "ALRDLinearINT8: call prepare_int8_weights() before compiling or exporting"
                )
            return self.A_int8, self.A_scale
        if not self._is_fresh():
            self.prepare_int8_weights()
        buffers = self._buffers
        return buffers["A_int8"], buffers["A_scale"]  # type: ignore[return-value]

    # -- forward ----------------------------------------------------------------------------------

    def quantize_latent(self, latent: Tensor) -> Tensor:
        """What a latent becomes by being stored as int8: floats, rounded per token.

        Floating ``latent [..., rank]`` -> the same shape and dtype; the gradient is
        straight-through. ``quantize_latent_int8`` gives the integers themselves.
        """
        q, scale = self.quantize_latent_int8(latent)
        y: Tensor = StraightThrough.apply(latent, INT8Quantizer.dequantize(q, scale, latent.dtype))
        return y

    def quantize_latent_int8(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Floating ``latent [..., rank]`` -> int8 ``[..., rank]``, float32 ``[..., 1]``."""
        return INT8Quantizer.quantize_per_token(latent.detach(), self.backend)

    def forward_int8(
        self,
        latent: Tensor,
        latent_scale: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Reconstruct from a latent, by an int8 matmul.

        Args:
            latent: floating ``[..., rank]``, quantized per token here; or int8 ``[..., rank]``, as
                ``quantize_latent_int8`` made it, with its scale: then nothing is quantized again.
            latent_scale: float32 ``[..., 1]`` with an int8 latent, else None.
            out_dtype: of the result. By default autocast's where autocast is on; else the latent's
                for a floating latent, and BLinear's for an int8 one.

        Returns:
            ``out_dtype [..., out_features]``. A floating latent and the bias get gradients; of an
            int8 latent nothing is differentiated.

        Raises:
            ValueError: an int8 latent without its scale, or a floating one with a scale.
            RuntimeError: a wrong shape or dtype, two devices, a backend that cannot be used.
        """
        w, w_scale = self._int8_weights()
        bias = self._modules["ALinear"]._parameters["bias"]  # type: ignore[union-attr]
        if (latent.dtype == torch.int8) != (latent_scale is not None):
            raise ValueError(
                "ALRDLinearINT8.forward_int8: expected an int8 latent with latent_scale, or a "
                f"floating one without, got {latent.dtype} "
                f"{'without' if latent_scale is None else 'with'} latent_scale"
            )
        if latent_scale is None:
            return backends.int8_linear(latent, w, w_scale, bias, out_dtype, self.backend)
        if out_dtype is None:
            out_dtype = backends.autocast_dtype(latent.device.type) or self.BLinear.weight.dtype
        bias = None if bias is None else bias.detach()
        return backends.int8_scaled_mm(
            latent, w, latent_scale, w_scale, bias, out_dtype, self.backend
        )

    def forward(self, x: Tensor) -> Tensor:
        """``forward_int8(BLinear(x))``: ``[..., in_features]`` -> ``[..., out_features]``."""
        return self.forward_int8(self.BLinear(x))

    def forward_float(self, x: Tensor) -> Tensor:
        """The same product in floats, to compare with; needs ``ALinear.weight``."""
        y: Tensor = self.ALinear(self.BLinear(x))
        return y

    # -- state ------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ALRDLinearINT8:
        fresh = self._is_fresh()
        apply_keeping_dtypes(self, ("A_int8", "A_scale"), super()._apply, fn, recurse)
        if fresh:
            self._mark_fresh()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """With integers that are the float weight's: versions mean nothing in a copy."""
        if self._prepared and not self._is_fresh():
            self.prepare_int8_weights()
        return {**self.__dict__, "_source": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The copy's integers are as fresh as the original's were."""
        super().__setstate__(state)
        if self._prepared:
            self._mark_fresh()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # Integers that were made from floats since changed must not be saved beside them.
        if self._prepared and not self._is_fresh():
            self.prepare_int8_weights()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        errors = dtype_errors(
            self,
            state_dict,
            prefix,
            {"A_int8": torch.int8, "A_scale": torch.float32},
            "take it from a module's state_dict, whose casts leave these alone",
        )
        if errors:
            error_msgs.extend(errors)
            return
        q_key, scale_key, a_key = (prefix + k for k in ("A_int8", "A_scale", "ALinear.weight"))
        freed = self.ALinear.weight is None
        has_ints = q_key in state_dict and _is_prepared_scale(state_dict.get(scale_key))
        has_floats = a_key in state_dict
        # Note [Loading]
        # What reaches the children is what is in state_dict after this method, so entries that the
        # module's state has no place for are taken out, and ones it can make are put in.
        if has_ints:
            wrong = [
                f"size mismatch for {key}: expected {list(own.shape)}, "
                f"got {list(state_dict[key].shape)}"
                for key, own in ((q_key, self.A_int8), (scale_key, self.A_scale))
                if key in state_dict and state_dict[key].shape != own.shape
            ]
            if wrong or q_key not in state_dict:
                # Before anything is changed: the layer stays as it was.
                error_msgs.extend(wrong or [f"ALRDLinearINT8: {scale_key} came without {q_key}"])
                return
            if has_floats and freed:
                del state_dict[a_key]
            elif not has_floats and not freed:
                self.ALinear.register_parameter("weight", None)
            self._prepared = True
        elif has_floats and freed:
            floats = state_dict.pop(a_key).to(self.BLinear.weight.dtype)
            if not self.A_int8.is_meta:  # on meta the values would be lost
                floats = floats.to(self.A_int8.device)
            q, scale = INT8Quantizer.quantize_per_channel(floats)
            state_dict[q_key], state_dict[scale_key] = q, scale
            self._prepared = True
        elif has_floats:
            state_dict[q_key], state_dict[scale_key] = self.A_int8, self.A_scale
            self._source = None  # whatever its version says, the weight is another one now
        elif scale_key in state_dict:
            error_msgs.append(
                f"ALRDLinearINT8: {q_key} was saved before prepare_int8_weights(), and there is no "
                f"{a_key} to quantize: expected one of the two"
            )
            return
        self._takes_ints = has_ints
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _is_prepared_scale(scale: Tensor | None) -> bool:
    """Whether a saved A_scale was ever quantized into: none of its entries is the initial zero."""
    return scale is not None and (scale.is_meta or bool((scale != 0).all()))


def _after_load(module: nn.Module, incompatible_keys: Any) -> None:
    """Runs when a module's children are loaded too: settle whether integers follow floats."""
    assert isinstance(module, ALRDLinearINT8)
    if module._takes_ints:
        module._mark_fresh()
    elif module._prepared:
        module.prepare_int8_weights()
    module._takes_ints = False


def _version(weight: Tensor) -> int:
    """The count of in-place changes; inference tensors keep none, and cannot be changed outside."""
    return -1 if weight.is_inference() else weight._version


def prepare_all_int8_weights(model: nn.Module, keep_float: bool = True) -> int:
    """``prepare_int8_weights`` on every ``ALRDLinearINT8`` of ``model``; returns how many."""
    layers = [module for module in model.modules() if isinstance(module, ALRDLinearINT8)]
    for layer in layers:
        layer.prepare_int8_weights(keep_float)
    return len(layers)
