"""Statistics of a model on calibration text, and the factors that they give.

Let ``x_t`` be a projection's input at token t, ``g_t`` the gradient of the summed loss at its
output. Replacing its weight W by W - D changes the loss, to second order and with tokens taken
one by one, by ``1/2 sum_t (g_t . D x_t)^2``: the Gauss-Newton form with the empirical Fisher matrix
(Martens and Grosse, 2015, K-FAC; Kunstner et al., 2019, on how far to trust it).

Note [Two passes]
*Factors.* Pass 1 gathers ``C = E[|g|^2 x x^T]`` and ``G = E[|x|^2 g g^T]``: one step from identity
of the power iteration for the best Kronecker approximation of the Fisher matrix (Van Loan and
Pitsianis, 1993). Further steps measured worse: they follow a few tokens. W is factored in these
two metrics, ``G^(1/2) W C^(1/2) = U S V^T``, and each side takes the root of the spectrum, which is
what makes uniform noise on a rotated latent cheapest.
*Costs.* Kronecker factors rank layers wrongly, so what a rank or a bit costs is not read off S.
Pass 2 projects every token's x on the latent and g on the latent's gradient, and averages what the
loss would change by: exactly for cut directions, and for noise that follows each token's own
scale.

Sink tokens need no rule of their own: |g| is large where the model looks, and there every moment
and every cost counts it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from .families import attentions, decoder_layers

__all__ = ["Costs", "Factors", "Moments", "factorize", "measure_costs", "measure_moments"]

# Added to a moment, relative to its mean diagonal: directions that the calibration never took count
# this much. Lower fits the calibration closer and other text worse: on SmolLM2 at 0.16 of the
# bytes, 32 windows, 0.01 lost 2.98 % on held-out text, 0.03 2.80 %, 0.1 3.31 % (one run each, not
# refined; the rotations' seed alone scatters by some 0.3).
DAMPING = 3e-2
# Above this many bytes of activations in a backward pass, layers are run twice instead.
CHECKPOINT_BYTES = 8 << 30

Key = tuple[int, str]
"""A stream: layer index and "k" or "v"."""


@dataclass
class Moments:
    """Sums over tokens for one stream; see Note [Two passes].

    Attributes:
        c: ``sum |g|^2 x x^T`` (or ``sum x x^T``), float32 ``[in, in]``.
        g: ``sum |x|^2 g g^T`` of each group of heads, float32 ``[G, out, out]``; None without
            gradients.
        energy: ``sum |x|^2 |g|^2``, the trace of both.
        tokens: how many.
    """

    c: Tensor
    g: Tensor | None
    energy: Tensor
    tokens: int = 0


@dataclass(frozen=True)
class Factors:
    """``W[group] = a[group] @ b[group]`` in float64, most important direction first.

    Attributes:
        a: ``[G, out, n]``.
        b: ``[G, n, in]``.
        spectrum: ``[G, n]``, in the metrics' units.
    """

    a: Tensor
    b: Tensor
    spectrum: Tensor

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Factors:
        """Moved and cast."""
        return Factors(*(t.to(device, dtype) for t in (self.a, self.b, self.spectrum)))


@dataclass
class Costs:
    """What storing less of a latent costs, in nats a token: pass 2's sums, or a spectrum's.

    Attributes:
        tail: ``[n + 1]``; entry r is the loss of keeping the first r directions.
        noise: ``[m, m]`` over the grid of ranks: entry (i, j) is ``E[sum of l^2 below grid[i] times
            sum of h^2 below grid[j]]``, l the latent and h its gradient.
        grid: ranks at which slices may begin and end, 0 first, n last.
        tokens: how many tokens the sums are over.
    """

    tail: Tensor
    noise: Tensor
    grid: list[int]
    tokens: float = 0.0
    _index: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Index the grid."""
        self._index = {rank: i for i, rank in enumerate(self.grid)}

    def truncation(self, rank: int) -> float:
        """Loss of keeping only the first ``rank`` directions, nats a token."""
        return 0.5 * float(self.tail[rank]) / self.tokens

    def quantization(self, start: int, end: int, variance: float) -> float:
        """Loss of storing directions start..end as one rotated slice, nats a token.

        ``variance`` is a quantizer's mean square error relative to the mean square of its input.
        """
        i, j = self._index[start], self._index[end]
        e = self.noise
        energy = float(e[j, j] - e[i, j] - e[j, i] + e[i, i])
        return 0.5 * variance * energy / (end - start) / self.tokens


# -- running the model ----------------------------------------------------------------------------


@contextlib.contextmanager
def _checkpointed(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Decoder layers forget their activations and run again in the backward pass."""
    layers = decoder_layers(model) if enabled else []
    forwards = [layer.forward for layer in layers]
    for layer, forward in zip(layers, forwards, strict=True):
        layer.forward = functools.partial(
            torch.utils.checkpoint.checkpoint, forward, use_reentrant=False
        )
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _activation_bytes(model: Any, tokens: int) -> int:
    config = model.config
    a_token = 16 * config.hidden_size + 4 * config.intermediate_size
    size = next(model.parameters()).element_size()
    return int(tokens * config.num_hidden_layers * a_token * size)


def recomputed(model: Any, batches: Sequence[Tensor]) -> contextlib.AbstractContextManager[None]:
    """Activations of these batches are recomputed in backward passes if they are too many."""
    tokens = max(batch.numel() for batch in batches)
    return _checkpointed(model, _activation_bytes(model, tokens) > CHECKPOINT_BYTES)


@contextlib.contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Evaluation mode, no gradient for any weight, gradients from the embeddings on."""
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    training = model.training

    def start_gradient(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.requires_grad_()

    handle = model.get_input_embeddings().register_forward_hook(start_gradient)
    try:
        model.requires_grad_(False)
        model.eval()
        yield
    finally:
        handle.remove()
        model.train(training)
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)


Visit = Callable[[Key, Tensor, Tensor], None]
"""Called with a stream, its input ``[B, S, in]`` and its gradient ``[B, S, out]`` (or None)."""


def _run(
    model: Any,
    batches: Sequence[Tensor],
    visit: Callable[[Key, Tensor, Tensor | None], None],
    gradients: bool,
    progress: Callable[[Sequence[Tensor], str], Iterator[Tensor]],
    what: str,
) -> None:
    """Pass every batch ``[B, S]`` through the model and visit every stream of every layer."""
    handles = []

    def watch(key: Key) -> Any:
        def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach()
            if gradients:
                if output.requires_grad:
                    output.register_hook(lambda grad: visit(key, x, grad))
            else:
                visit(key, x, None)

        return after

    for index, attention in attentions(model):
        for stream in ("k", "v"):
            projection = getattr(attention, f"{stream}_proj")
            handles.append(projection.register_forward_hook(watch((index, stream))))
    again = recomputed(model, batches) if gradients else contextlib.nullcontext()
    device = model.get_input_embeddings().weight.device
    try:
        with frozen(model), again, torch.set_grad_enabled(gradients):
            for batch in progress(batches, what):
                ids = batch.to(device)
                if not gradients:
                    model.model(input_ids=ids, use_cache=False)
                    continue
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
                loss = F.cross_entropy(
                    logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"
                )
                # The sum, not the mean: fp16 gradients of a mean over many tokens underflow.
                loss.backward()
                if not torch.isfinite(loss):
                    raise ValueError(
                        f"calibration: expected a finite loss, got {float(loss.detach())}; is the "
                        "model's dtype wide enough?"
                    )
    finally:
        for handle in handles:
            handle.remove()


# -- pass 1: moments and factors ------------------------------------------------------------------


def measure_moments(
    model: Any,
    batches: Sequence[Tensor],
    groups: int,
    weighted: bool,
    progress: Callable[[Sequence[Tensor], str], Iterator[Tensor]],
) -> dict[Key, Moments]:
    """Pass 1 over ``batches`` of ids ``[B, S]``: the moments of every stream.

    Args:
        model: unconverted; left as it was.
        batches: the calibration.
        groups: of KV heads, each with a latent of its own.
        weighted: by gradients; otherwise ``E[x x^T]`` alone, without a backward pass.
        progress: wraps the batches, given what is being done.
    """
    moments: dict[Key, Moments] = {}

    def visit(key: Key, x: Tensor, grad: Tensor | None) -> None:
        x = x.flatten(0, -2).float()
        if key not in moments:
            c = torch.zeros(x.shape[1], x.shape[1], device=x.device)
            g = None
            if grad is not None:
                out = grad.shape[-1] // groups
                g = torch.zeros(groups, out, out, device=x.device)
            moments[key] = Moments(c, g, torch.zeros((), dtype=torch.float64, device=x.device))
        found = moments[key]
        found.tokens += len(x)
        if grad is None or found.g is None:
            found.c.addmm_(x.t(), x)
            return
        grad = grad.flatten(0, -2).float()
        by_grad = grad.square().sum(dim=-1, keepdim=True)
        by_x = x.square().sum(dim=-1, keepdim=True)
        found.c.addmm_((x * by_grad).t(), x)
        parts = grad.view(len(x), groups, -1).transpose(0, 1)
        found.g.baddbmm_((parts * by_x).transpose(1, 2), parts)
        found.energy += (by_grad.double() * by_x.double()).sum()

    _run(model, batches, visit, weighted, progress, "moments")
    return moments


def _root(moment: Tensor) -> Tensor:
    """A lower triangular R with ``R R^T = moment`` (damped), float64."""
    moment = moment.double()
    scale = moment.diagonal().mean()
    if not bool(scale > 0):
        # Nothing came this way: every direction counts the same.
        return torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    damped = moment / scale
    damped.diagonal().add_(DAMPING)
    root: Tensor = torch.linalg.cholesky(damped) * scale.sqrt()
    return root


@torch.no_grad()
def factorize(weight: Tensor, moments: Moments | None, groups: int) -> Factors:
    """``weight [G * out, in]`` factored in the moments' metrics; without any, by plain SVD.

    The spectrum is in the units of the predicted loss: half the sum of the squares that are cut is
    what the Kronecker approximation says it costs, in nats a token.
    """
    pieces = weight.double().view(groups, -1, weight.shape[1])
    root_c = None if moments is None else _root(moments.c)
    a, b, spectrum = [], [], []
    for group, w in enumerate(pieces):
        root_g = None
        if moments is not None and moments.g is not None:
            root_g = _root(moments.g[group])
        inner = w if root_c is None else w @ root_c
        inner = inner if root_g is None else root_g.t() @ inner
        # The SVD by the eigenvectors of the small side: many times faster on a GPU, and whatever
        # becomes of the smallest singular values, left @ right is u u^T inner, which is inner.
        short = inner if len(inner) <= inner.shape[1] else inner.t()
        squares, u = torch.linalg.eigh(short @ short.t())
        s, u = squares.flip(0).clamp_min(0).sqrt(), u.flip(1)
        half = s.clamp_min(s[0] * torch.finfo(torch.float64).eps).sqrt()
        left, right = u * half, (u.t() @ short) / half[:, None]
        if short is not inner:
            left, right = right.t(), left.t()
        if root_g is not None:
            left = torch.linalg.solve_triangular(root_g.t(), left, upper=True)
        if root_c is not None:
            right = torch.linalg.solve_triangular(root_c, right, upper=False, left=False)
        if moments is not None:
            # Both moments are sums with the same trace, so their product holds it twice.
            s = s / (float(moments.energy) ** 0.5 if root_g is not None else moments.tokens**0.5)
            s = s / (moments.tokens**0.5 if root_g is not None else 1.0)
        a.append(left)
        b.append(right)
        spectrum.append(s)
    return Factors(torch.stack(a), torch.stack(b), torch.stack(spectrum))


# -- pass 2: costs --------------------------------------------------------------------------------


def grid_of(n: int, multiple: int) -> list[int]:
    """0, multiples, and n."""
    return sorted({*range(0, n + 1, multiple), n})


def costs_of_spectrum(factors: Factors, multiple: int) -> Costs:
    """Costs by the spectrum alone, for objectives without gradients."""
    s = factors.spectrum.double()
    n = s.shape[1]
    grid = grid_of(n, multiple)
    squares = s.square().sum(dim=0)
    tail = F.pad(squares.flip(0).cumsum(0).flip(0), (0, 1))
    below = F.pad(s.cumsum(dim=1), (1, 0))[:, grid]
    return Costs(tail.cpu(), torch.einsum("gi,gj->ij", below, below).cpu(), grid, 1.0)


def measure_costs(
    model: Any,
    batches: Sequence[Tensor],
    factors: dict[Key, Factors],
    multiple: int,
    progress: Callable[[Sequence[Tensor], str], Iterator[Tensor]],
) -> dict[Key, Costs]:
    """Pass 2 over ``batches`` of ids ``[B, S]``: what ranks and bits of every stream cost.

    A cut direction's change of the loss is summed in two ways, whose mean is taken: token by token,
    and over the tokens of a sequence together, which tells errors that add up from those that
    cancel. Either alone measured worse.

    Args:
        model: unconverted; left as it was.
        batches: the calibration.
        factors: of every stream, at full rank.
        multiple: of the ranks at which slices may begin and end.
        progress: wraps the batches, given what is being done.
    """
    found: dict[Key, Costs] = {}

    def visit(key: Key, x: Tensor, grad: Tensor | None) -> None:
        assert grad is not None
        fs = factors[key]
        if fs.a.device != x.device or fs.a.dtype != torch.float32:
            fs = factors[key] = fs.to(x.device, torch.float32)
        groups, _, n = fs.a.shape
        if key not in found:
            grid = grid_of(n, multiple)
            zeros = functools.partial(torch.zeros, dtype=torch.float64, device=x.device)
            found[key] = Costs(zeros(n + 1), zeros(len(grid), len(grid)), grid)
        costs = found[key]
        for group in range(groups):
            out = fs.a.shape[1]
            g = grad[..., group * out : (group + 1) * out].float()
            latent = x.float() @ fs.b[group].t()
            slope = g @ fs.a[group]
            # [B, S, n]: what cutting from direction i on changes the loss by, at each token.
            change = (latent * slope).flip(-1).cumsum(-1).flip(-1)
            alone = change.square().sum(dim=(0, 1))
            together = change.sum(dim=1).square().sum(dim=0)
            costs.tail[:n] += (alone.double() + together.double()) / 2
            below_l = F.pad(latent.square().cumsum(-1), (1, 0))[..., costs.grid].flatten(0, 1)
            below_h = F.pad(slope.square().cumsum(-1), (1, 0))[..., costs.grid].flatten(0, 1)
            costs.noise += (below_l.t() @ below_h).double()
        costs.tokens += x.shape[0] * x.shape[1]

    _run(model, batches, visit, True, progress, "costs")
    for costs in found.values():  # read number by number from here on
        costs.tail, costs.noise = costs.tail.cpu(), costs.noise.cpu()
    return found
