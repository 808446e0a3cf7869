"""Rounding a matrix to int8 so that what the roundings add up to is small, not each of them.

The error of ``A l`` by a rounded A is ``dA l``: what counts is ``dA H dA^T``, H the latents' second
moment. Column by column, each rounding's error is made up for by the columns still to come, as far
as H lets them (GPTQ: Frantar et al., 2023, after Hassibi and Stork's optimal brain surgeon, 1993).
A latent's energy lies in few directions, so most of the error can be moved to where it costs
little.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["round_with_feedback"]

# Added to H, relative to its mean diagonal.
DAMPING = 1e-3


@torch.no_grad()
def round_with_feedback(rows: Tensor, scale: Tensor, moment: Tensor) -> Tensor:
    """int8 ``[N, r]`` in -127..127 that stands for ``rows`` with the given scales.

    Args:
        rows: floating ``[N, r]``.
        scale: ``[N, 1]``, of each row.
        moment: H, ``[r, r]``, symmetric and not negative; its size does not matter.
    """
    left = rows.double() / scale.double()
    damped = moment.to(left.device, torch.float64)
    mean = damped.diagonal().mean()
    if not bool(mean > 0):
        return torch.round(left).clamp(-127, 127).to(torch.int8)
    damped = damped / mean
    damped.diagonal().add_(DAMPING)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse).mT
    q = torch.empty_like(left)
    for j in range(left.shape[1]):
        q[:, j] = torch.round(left[:, j]).clamp(-127, 127)
        error = (left[:, j] - q[:, j]) / upper[j, j]
        left[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    return q.to(torch.int8)
