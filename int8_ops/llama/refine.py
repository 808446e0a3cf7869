"""Factors refined on what the cache will hold: a few steps of distillation.

The factors come of statistics of the unconverted model (``calibrate``): nothing in them knows how
latents are rounded, nor what the other streams lose. Here both factors of every stream follow the
gradient of the Kullback-Leibler divergence from the unconverted model's predictions (Hinton et al.,
2015), with latents rounded as the cache rounds them (straight-through: Bengio et al., 2013). The
target is what the model itself predicts, not the text: it is to be kept, not taught.

Teacher and student are one model: hooks on its key and value projections replace their outputs by
what the factors rebuild, and let them pass for the teacher. No weight of the model changes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantizer import StraightThrough
from .calibrate import Key, frozen, recomputed
from .families import attentions
from .packing import dequantize_slice, quantize_stream
from .spec import StreamSpec

__all__ = ["refine"]

# Of Adam, relative to the root mean square of each factor and to the root of the divergence so far
# in nats a token; it rises over WARMUP steps and falls linearly to 0. Adam's steps have the size
# that they are given, whatever there is to gain, and what their noise costs goes with its square:
# so it stays the same share, some percent, of the divergence. A fixed step that was best for a
# divergence of 0.05 made one of 0.00004 ten times larger.
LEARNING_RATE = 3e-3
WARMUP = 3
# In nats a token: below, factors stay as they are. What is left to gain there is less than what a
# rotation's seed changes.
LEAST_DIVERGENCE = 1e-3
BETAS = (0.9, 0.95)

Cut = dict[Key, tuple[Tensor, Tensor]]
"""A ``[G, out, r]`` and B ``[G, r, in]`` of each stream, slices one after another."""


def refine(
    model: Any,
    cut: Cut,
    specs: Mapping[Key, StreamSpec],
    batches: Sequence[Tensor],
    steps: int,
    backend: str,
    progress: Callable[[Sequence[Tensor], str], Iterator[Tensor]],
) -> Cut:
    """Better factors, float32; the model and the ones given are left as they are.

    The same ones again where the first step finds a divergence below ``LEAST_DIVERGENCE``.

    Args:
        model: unconverted.
        cut: the factors to begin with.
        specs: how each stream is stored.
        batches: the calibration, ids ``[B, S]``; one is a step's, spread over them all.
        steps: how many.
        backend: who quantizes int8, see ``int8_ops.backends``.
        progress: wraps the batches, given what is being done.

    Raises:
        ValueError: a divergence, or a gradient, that is not finite.
    """
    count = len(batches)
    picked = [batches[i * count // steps if steps <= count else i % count] for i in range(steps)]
    trained: Cut = {
        key: tuple(t.detach().float().clone().requires_grad_() for t in pair)  # type: ignore[misc]
        for key, pair in cut.items()
    }
    parameters = [t for pair in trained.values() for t in pair]
    sizes = [float(t.detach().square().mean().sqrt()) for t in parameters]
    optimizer = torch.optim.Adam([{"params": [t]} for t in parameters], betas=BETAS)
    student = Student(model, trained, specs, backend)
    divergences: list[float] = []
    try:
        with frozen(model), recomputed(model, picked), torch.enable_grad():
            for step, ids in enumerate(progress(picked, "refining")):
                optimizer.zero_grad()
                divergence = _divergence(model, student, ids)
                divergences.append(float(divergence.detach()) / ids.numel())
                if divergences[0] < LEAST_DIVERGENCE:
                    break
                divergence.backward()
                _require_finite(parameters, step)
                rate = LEARNING_RATE * statistics.fmean(divergences) ** 0.5
                rate *= min(1.0, (step + 1) / WARMUP) * (1 - step / steps)
                for group, size in zip(optimizer.param_groups, sizes, strict=True):
                    group["lr"] = rate * size
                optimizer.step()
    finally:
        student.remove()
    return {key: (a.detach(), b.detach()) for key, (a, b) in trained.items()}


def _require_finite(parameters: list[Tensor], step: int) -> None:
    """Before a step is taken: after the last one nothing would look again."""
    total = sum(float(t.grad.square().sum()) for t in parameters if t.grad is not None)
    if not math.isfinite(total):
        raise ValueError(
            f"refine: expected finite gradients, got others at step {step}: the model's dtype may "
            "overflow; convert it in bfloat16 or float32, or with refine=0"
        )


class Student:
    """Hooks that make a model predict as it would if it were converted, while ``active``."""

    def __init__(
        self, model: Any, factors: Cut, specs: Mapping[Key, StreamSpec], backend: str
    ) -> None:
        """Hook into ``model``'s key and value projections."""
        self.active = True
        self.backend = backend
        self._handles = [
            getattr(attention, f"{stream}_proj").register_forward_hook(
                self._replacing(factors[index, stream], specs[index, stream])
            )
            for index, attention in attentions(model)
            for stream in ("k", "v")
        ]

    def remove(self) -> None:
        """Unhook."""
        for handle in self._handles:
            handle.remove()

    def _replacing(self, factors: tuple[Tensor, Tensor], spec: StreamSpec) -> Any:
        def after(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self.active:
                return None
            (a, b), x = (t.to(inputs[0].dtype) for t in factors), inputs[0]
            latent = F.linear(x, b.flatten(0, 1)).view(*x.shape[:-1], len(a), -1).transpose(1, 2)
            stored = quantize_stream(latent, spec, self.backend)
            floats = [
                dequantize_slice(one, part, latent.dtype)
                for one, part in zip(stored, spec, strict=True)
            ]
            rounded: Tensor = StraightThrough.apply(latent, torch.cat(floats, dim=-1))
            y = torch.matmul(rounded, a.transpose(-1, -2)).transpose(1, 2).flatten(2)
            return y if module.bias is None else y + module.bias

        return after


def _divergence(model: Any, student: Student, ids: Tensor) -> Tensor:
    """From the teacher's predictions, summed over tokens: fp16 gradients of a mean underflow."""
    ids = ids.to(model.get_input_embeddings().weight.device)
    student.active = False
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    student.active = True
    found = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    divergence = F.kl_div(found, wanted, reduction="sum", log_target=True)
    if not torch.isfinite(divergence):
        raise ValueError(
            f"refine: expected a finite divergence, got {float(divergence.detach())}; is the "
            "model's dtype wide enough?"
        )
    return divergence
