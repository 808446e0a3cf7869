"""Low rank that keeps a model alive: which directions of a layer's input matter to the loss.

Cutting the SVD of a weight cuts by the weight's size alone, and the text barely uses some large
directions. So the weight is decomposed in a basis in which every direction counts as much as the
text makes it count: with ``C = E[|g|^2 x x^T]`` (x the layer's input at a token, g the loss
gradient at its output there), the factors of ``W C^(1/2)`` are cut, and the root is undone. The
gradient in the moment gives weight to the few tokens that every other token attends to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ALRDLinearINT8, hf

# Added to C, relative to its mean diagonal: directions that the few calibration tokens never took
# still count this much. A lower value fits the calibration text closer and other text worse.
DAMPING = 1e-2


def weighted_moments(
    model: nn.Module, linears: dict[str, nn.Linear], windows: Iterable[Tensor]
) -> dict[str, Tensor]:
    """``E[|g|^2 x x^T]`` of each layer's input, up to a factor: float32 ``[in, in]`` by name.

    Runs the model forward and backward once a window ``[n]``. Weights get no gradient, and each
    parameter's ``requires_grad`` is as it was afterwards.
    """
    moments = {
        name: torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device)
        for name, linear in linears.items()
    }

    def watch(name: str) -> Any:
        def after_forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach().flatten(0, -2).float()

            def with_gradient(grad: Tensor) -> None:
                weight = grad.flatten(0, -2).float().square().sum(dim=-1, keepdim=True)
                moments[name].addmm_((x * weight).t(), x)

            output.register_hook(with_gradient)

        return after_forward

    def start_gradient(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.requires_grad_()

    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    handles = [linear.register_forward_hook(watch(name)) for name, linear in linears.items()]
    handles.append(model.get_input_embeddings().register_forward_hook(start_gradient))  # type: ignore[operator]
    try:
        model.requires_grad_(False)
        for window in windows:
            logits = hf.logits_of(model, window)
            # The sum, not the mean: fp16 gradients of a mean over many tokens underflow.
            F.cross_entropy(logits[:-1].float(), window[1:], reduction="sum").backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)
    return moments


@dataclass(frozen=True)
class Factors:
    """``W = left @ diag(spectrum) @ right`` in float64, most important direction first."""

    left: Tensor
    spectrum: Tensor
    right: Tensor


@torch.no_grad()
def factorize(weight: Tensor, moment: Tensor | None) -> Factors:
    """``weight [out, in]`` factored in the basis of ``moment [in, in]``.

    Without a moment, this is the plain SVD of the weight.
    """
    weight = weight.double()
    if moment is None:
        return Factors(*torch.linalg.svd(weight, full_matrices=False))
    moment = moment.double()
    moment = moment / moment.diagonal().mean()
    moment.diagonal().add_(DAMPING)
    values, vectors = torch.linalg.eigh(moment)
    root = values.clamp_min(DAMPING).sqrt()
    left, spectrum, right = torch.linalg.svd((weight @ vectors) * root, full_matrices=False)
    return Factors(left, spectrum, (right / root) @ vectors.t())


@torch.no_grad()
def low_rank(linear: nn.Linear, factors: Factors, rank: int, backend: str) -> ALRDLinearINT8:
    """``linear`` cut to ``rank``; each side takes the square root of the spectrum."""
    layer = ALRDLinearINT8(
        linear.in_features,
        linear.out_features,
        rank,
        bias=linear.bias is not None,
        backend=backend,
        device=linear.weight.device,
        dtype=linear.weight.dtype,
    )
    root = factors.spectrum[:rank].sqrt()
    layer.ALinear.weight.copy_(factors.left[:, :rank] * root)
    layer.BLinear.weight.copy_(root[:, None] * factors.right[:rank])
    if linear.bias is not None:
        layer.ALinear.bias.copy_(linear.bias)
    layer.prepare_int8_weights(keep_float=False)
    return layer
