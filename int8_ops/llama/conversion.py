"""``convert``: a Llama-family model and some text in, the same model with an integer cache out."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .allocate import Choice, allocate, choices_of, cost_of
from .attention import LatentAttention
from .calibrate import (
    Costs,
    Factors,
    Key,
    Moments,
    costs_of_spectrum,
    factorize,
    measure_costs,
    measure_moments,
)
from .checkpoint import LatentQuantizationConfig, mark_converted
from .config import LatentConfig
from .families import attention_class, attentions, check_model, decoder_layers
from .refine import Cut, refine
from .report import ConversionReport, LayerReport, stream_report
from .runtime import install
from .spec import LayerSpec, Slice, StreamSpec

__all__ = ["convert"]

# Tokens that are scored before and after, and of those, for each layer on its own.
MEASURED_TOKENS = 2048
OWN_TOKENS = 256
# Budgets whose predicted losses the report plots, relative to 16 bits.
CURVE = (0.12, 0.14, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5)


def convert(
    model: Any,
    calibration: Any = None,
    config: LatentConfig | None = None,
    *,
    tokenizer: Any = None,
    progress: bool = True,
) -> ConversionReport:
    """Give a Llama-family model of transformers a KV cache of integer latents, in place.

    Each layer's key and value projections are cut to low rank, with factors, ranks and bits chosen
    by what they cost on the calibration text (``calibrate``, ``allocate``); its attention becomes a
    ``LatentAttention``, and ``generate()``, plain calls with ``use_cache=True``, and
    ``save_pretrained`` work as before. An error leaves the model as it was.

    Args:
        model: Llama 2 or 3.x, Mistral, Qwen2, or another with one of their attention classes, its
            projections plain ``nn.Linear`` in any floating dtype.
        calibration: strings, with ``tokenizer``; token ids ``[n]`` or ``[B, S]``; or an iterable of
            batches, ids ``[B, S]`` or mappings with "input_ids". Not needed for
            ``objective="weight"``.
        config: what to reach; by default a quarter of the bytes.
        tokenizer: of transformers, for strings.
        progress: bars on stderr, with the time left, where that is a terminal and tqdm is there.

    Returns:
        Ranks, bits, predicted and measured losses; ``print`` it or ``save`` it.

    Raises:
        TypeError: another architecture, by name, before any weight is touched; a calibration that
            is none of the above.
        ValueError: a configuration that this model cannot have, a calibration without a full
            window, or a loss that is not finite.
    """
    config = LatentConfig() if config is None else config
    shown, clock = Shown(progress), Clock()
    study = study_model(model, calibration, config, tokenizer, shown, clock)
    plan = prepare(model, study, config, shown, clock)
    own = _own_losses(model, plan.attentions, study.batches, shown) if study.batches else {}
    measured = _measured_batches(study.batches)
    loss_before = _mean_loss(model, measured) if measured else None
    plan.install(model)
    loss_after = _mean_loss(model, measured) if measured else None
    clock.lap("measuring")
    losses = (loss_before, loss_after, sum(ids.shape[0] * (ids.shape[1] - 1) for ids in measured))
    return _report(model, plan, study, own, losses, clock, config)


@dataclass
class Study:
    """What calibration tells of a model; enough to convert it to any budget.

    Attributes:
        factors: of every stream, at full rank.
        costs: of every stream.
        batches: the calibration, ids ``[B, S]``.
        groups: latents a layer and stream.
        full_rank: the most a latent's rank can be.
    """

    factors: dict[Key, Factors]
    costs: dict[Key, Costs]
    batches: list[Tensor]
    groups: int
    full_rank: int


@dataclass
class Plan:
    """Converted attention modules, beside the model, and how they store their latents."""

    specs: list[LayerSpec]
    chosen: dict[Key, Choice]
    attentions: dict[int, LatentAttention]
    backend: str

    def install(self, model: Any) -> None:
        """Put the modules into the model, and hook in the cache and the checkpoint format."""
        for index, layer in enumerate(decoder_layers(model)):
            layer.self_attn = self.attentions[index]
        install(model)
        mark_converted(model, LatentQuantizationConfig.of(self.specs, self.backend))


def study_model(
    model: Any,
    calibration: Any,
    config: LatentConfig,
    tokenizer: Any,
    shown: Shown,
    clock: Clock,
) -> Study:
    """Everything that ``convert`` measures before it decides; the model is left as it was.

    Of ``config``, the budget and the bits do not matter here, the rest does. Raises as ``convert``.
    """
    check_model(model)
    groups, full_rank = _groups_of(model, config)
    batches = _batches(calibration, config, tokenizer)
    if not batches and config.objective != "weight":
        raise ValueError(
            f"convert: objective {config.objective!r} needs calibration text, got none; "
            "objective='weight' does without"
        )
    factors = _factors(model, batches, groups, config, shown, clock)
    costs = _costs(model, batches, factors, config, shown, clock)
    return Study(factors, costs, batches, groups, full_rank)


def prepare(model: Any, study: Study, config: LatentConfig, shown: Shown, clock: Clock) -> Plan:
    """Allocate, and make the converted modules; the model is left as it was.

    Raises ValueError for a budget that it cannot have.
    """
    chosen = _choose(model, study, config)
    specs = [
        LayerSpec(chosen[index, "k"].spec, chosen[index, "v"].spec, study.groups, config.flow)
        for index in range(len(decoder_layers(model)))
    ]
    cut = {
        (index, stream): _cut(
            study.factors[index, stream],
            chosen[index, stream].spec,
            (config.seed, index, number),
            config.rotate,
        )
        for index, _ in attentions(model)
        for number, stream in enumerate(("k", "v"))
    }
    # The seed's flow rounds elsewhere than refining does.
    if config.refine and study.batches and config.flow == "integer":
        stored = {key: choice.spec for key, choice in chosen.items()}
        cut = refine(model, cut, stored, study.batches, config.refine, config.backend, shown)
        clock.lap("refining")
    made = {
        index: _convert_layer(model, attention, specs[index], study.factors, cut, config)
        for index, attention in shown(list(attentions(model)), "converting")
    }
    clock.lap("converting")
    return Plan(specs, chosen, made, config.backend)


# -- what is asked for ----------------------------------------------------------------------------


def _groups_of(model: Any, config: LatentConfig) -> tuple[int, int]:
    """Latents a layer and stream, and the most a latent's rank can be."""
    _, attention = next(attentions(model))
    heads = attention.k_proj.out_features // attention.head_dim
    together = heads if config.heads_per_group is None else config.heads_per_group
    if heads % together:
        raise ValueError(
            f"convert: expected heads_per_group to divide the model's {heads} KV heads, got "
            f"{together}"
        )
    full = min(together * attention.head_dim, attention.k_proj.in_features)
    layers = len(decoder_layers(model))
    if config.ranks is not None:
        if len(config.ranks) != layers:
            raise ValueError(
                f"convert: expected ranks for {layers} layers, got {len(config.ranks)}"
            )
        for index, pair in enumerate(config.ranks):
            if len(pair) != 2 or not all(1 <= rank <= full for rank in pair):
                raise ValueError(
                    f"convert: expected ranks[{index}] to be two of 1..{full}, got {pair!r}"
                )
    return heads // together, full


def _batches(calibration: Any, config: LatentConfig, tokenizer: Any) -> list[Tensor]:
    """Calibration in any of its forms -> ids ``[B, S]``, on the CPU."""
    if calibration is None:
        return []
    if isinstance(calibration, str):
        calibration = [calibration]
    if isinstance(calibration, Tensor):
        return _windows(calibration.flatten() if calibration.dim() == 1 else calibration, config)
    if not isinstance(calibration, Iterable):
        raise TypeError(
            "convert: expected calibration to be strings, token ids or batches, got "
            f"{type(calibration).__name__}"
        )
    items = list(calibration)
    if items and all(isinstance(item, str) for item in items):
        if tokenizer is None:
            raise ValueError("convert: calibration is text, which needs tokenizer=, got None")
        encoded = [
            tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in items
        ]
        return _windows(torch.tensor([i for ids in encoded for i in ids], dtype=torch.long), config)
    batches = []
    for item in items:
        ids = item["input_ids"] if isinstance(item, Mapping) else item
        if not isinstance(ids, Tensor) or ids.dtype.is_floating_point or ids.dim() not in (1, 2):
            told = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids)
            raise TypeError(f"convert: expected batches of token ids [B, S], got {told}")
        ids = ids[None] if ids.dim() == 1 else ids
        if ids.shape[1] < 2:
            raise ValueError(
                f"convert: expected batches of at least 2 tokens, got {list(ids.shape)}"
            )
        batches.append(ids.long().cpu())
    return batches


def _windows(ids: Tensor, config: LatentConfig) -> list[Tensor]:
    """Ids ``[n]`` -> windows ``[1, S]`` spread evenly over them; ``[B, S]`` -> its rows."""
    if ids.dim() == 2:
        return [row[None].long().cpu() for row in ids]
    length = config.sequence_length
    there = len(ids) // length
    if there == 0:
        raise ValueError(
            f"convert: expected calibration of at least one window of {length} tokens, got "
            f"{len(ids)} tokens"
        )
    count = there if config.windows is None else min(config.windows, there)
    starts = [i * there // count * length for i in range(count)]
    return [ids[start : start + length][None].long().cpu() for start in starts]


# -- statistics and allocation --------------------------------------------------------------------


def _factors(
    model: Any,
    batches: list[Tensor],
    groups: int,
    config: LatentConfig,
    shown: Shown,
    clock: Clock,
) -> dict[Key, Factors]:
    moments: dict[Key, Moments] = {}
    if config.objective != "weight":
        weighted = config.objective == "fisher"
        moments = measure_moments(model, batches, groups, weighted, shown)
        clock.lap("moments")
    factors: dict[Key, Factors] = {}
    for index, attention in shown(list(attentions(model)), "factors"):
        for stream in ("k", "v"):
            weight = getattr(attention, f"{stream}_proj").weight.detach()
            found = factorize(weight, moments.pop((index, stream), None), groups)
            factors[index, stream] = found.to(weight.device, torch.float32)
    clock.lap("factors")
    return factors


def _costs(
    model: Any,
    batches: list[Tensor],
    factors: dict[Key, Factors],
    config: LatentConfig,
    shown: Shown,
    clock: Clock,
) -> dict[Key, Costs]:
    if config.objective == "fisher":
        costs = measure_costs(model, batches, factors, config.rank_multiple, shown)
    else:
        costs = {
            key: costs_of_spectrum(found, config.rank_multiple) for key, found in factors.items()
        }
    clock.lap("costs")
    return costs


def _choose(model: Any, study: Study, config: LatentConfig) -> dict[Key, Choice]:
    bits, costs, groups = config.allowed_bits(), study.costs, study.groups
    if config.ranks is not None:
        return {key: _given(found, bits[0], config.ranks, key) for key, found in costs.items()}
    choices = _choices(study, config)
    if config.mean_rank is not None:
        most = groups * study.full_rank
        if config.mean_rank > most:
            raise ValueError(f"convert: expected mean_rank <= {most}, got {config.mean_rank}")
        # All slices have the same bits, so a budget of ranks is one of bytes.
        each = Slice(bits[0], 2).bytes - Slice(bits[0], 2).width * (2 if bits[0] == 16 else 1)
        budget = len(choices) * (config.mean_rank * bits[0] / 8 + groups * each)
    else:
        assert config.kv_ratio is not None
        budget = config.kv_ratio * bytes_in_16_bits(model)
    return allocate(choices, budget)


def _choices(study: Study, config: LatentConfig) -> dict[Key, list[Choice]]:
    bits, groups = config.allowed_bits(), study.groups
    return {key: choices_of(found, bits, groups) for key, found in study.costs.items()}


def _curve(model: Any, study: Study, config: LatentConfig) -> list[tuple[int, float]]:
    """Bytes a token and predicted loss at the budgets of ``CURVE`` that this model can have."""
    from .cache import POSITION_BYTES

    choices, whole = _choices(study, config), bytes_in_16_bits(model)
    least = sum(found[0].bytes for found in choices.values())
    curve = []
    for budget in (ratio * whole for ratio in CURVE if ratio * whole >= least):
        chosen = allocate(choices, budget).values()
        size = sum(choice.bytes for choice in chosen) + POSITION_BYTES
        curve.append((size, sum(choice.cost for choice in chosen)))
    return curve


def _given(costs: Costs, bits: int, ranks: Sequence[tuple[int, int]], key: Key) -> Choice:
    rank = ranks[key[0]]["kv".index(key[1])]
    spec: StreamSpec = (Slice(bits, rank),)
    known = rank in costs.grid
    return Choice(spec, 0, cost_of(costs, spec) if known else float("nan"))


def bytes_in_16_bits(model: Any) -> int:
    """Bytes a token of plain 16-bit keys and values, all layers, converted or not."""
    total = 0
    for _, attention in attentions(model):
        for name in ("k_proj", "v_proj"):
            projection = getattr(attention, name)
            if isinstance(projection, nn.Linear):
                total += 2 * projection.out_features
            else:
                total += 2 * projection.heads * projection.head_dim
    return total


# -- conversion -----------------------------------------------------------------------------------


def _convert_layer(
    model: Any,
    attention: Any,
    spec: LayerSpec,
    factors: dict[Key, Factors],
    cut: Cut,
    config: LatentConfig,
) -> LatentAttention:
    """A converted attention beside the original, which is left as it is."""
    new = attention_class(attention)(attention, spec, model.model.rotary_emb, config.backend)
    for number, (stream, parts) in enumerate((("k", spec.k), ("v", spec.v))):
        a, b = cut[attention.layer_idx, stream]
        moments = _latent_moments(
            factors[attention.layer_idx, stream],
            parts,
            (config.seed, attention.layer_idx, number),
            config.rotate,
        )
        projection: Any = getattr(new, f"{stream}_proj")
        projection.set_factors(b, a, getattr(attention, f"{stream}_proj").bias, moments)
    new.k_proj.requires_grad_(False)
    new.v_proj.requires_grad_(False)
    return new


def _cut(
    factors: Factors, spec: StreamSpec, seed: tuple[int, int, int], rotate: bool
) -> tuple[Tensor, Tensor]:
    """Factors of the spec's directions, each slice rotated: A ``[G, out, r]``, B ``[G, r, in]``."""
    a_parts, b_parts, start = [], [], 0
    a_all, b_all = factors.a.double(), factors.b.double()
    # The latent's unit is free: share the weight's size evenly, for dtypes of a small range.
    unit = (a_all.norm() / b_all.norm()).sqrt()
    for part, turn in zip(spec, _turns(factors, spec, seed, rotate), strict=True):
        a = a_all[..., start : start + part.rank] / unit
        b = b_all[:, start : start + part.rank] * unit
        start += part.rank
        a_parts.append(a @ turn)
        b_parts.append(turn.transpose(1, 2) @ b)
    return torch.cat(a_parts, dim=2), torch.cat(b_parts, dim=1)


def _turns(
    factors: Factors, spec: StreamSpec, seed: tuple[int, int, int], rotate: bool
) -> list[Tensor]:
    """The rotation of each slice, float64 ``[G, rank, rank]``."""
    generator = torch.Generator().manual_seed(seed[0] * 1_000_003 + seed[1] * 2 + seed[2])
    groups, device = len(factors.a), factors.a.device
    turns = []
    for part in spec:
        if rotate and part.bits < 16:
            turn = torch.stack([_rotation(part.rank, generator) for _ in range(groups)])
        else:
            turn = torch.eye(part.rank, dtype=torch.float64).expand(groups, -1, -1)
        turns.append(turn.to(device))
    return turns


def _latent_moments(
    factors: Factors, spec: StreamSpec, seed: tuple[int, int, int], rotate: bool
) -> list[Tensor]:
    """Of each slice's latents as ``_cut`` turns them, ``[G, rank, rank]``, up to a factor.

    Before the turn it is the spectrum: each factor took its root, in metrics that make the other
    root orthogonal.
    """
    moments, start = [], 0
    for part, turn in zip(spec, _turns(factors, spec, seed, rotate), strict=True):
        energy = factors.spectrum[:, start : start + part.rank].double()
        start += part.rank
        moments.append(turn.transpose(1, 2) @ (energy[..., None] * turn))
    return moments


def _rotation(n: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, float64 ``[n, n]``, Haar distributed (Mezzadri, 2007)."""
    q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    turned: Tensor = q * torch.sign(torch.diagonal(r))
    return turned


# -- measuring ------------------------------------------------------------------------------------


def _measured_batches(batches: list[Tensor]) -> list[Tensor]:
    """The first batches, up to MEASURED_TOKENS, at least one."""
    found: list[Tensor] = []
    for batch in batches:
        if found and sum(b.numel() for b in found) + batch.numel() > MEASURED_TOKENS:
            break
        found.append(batch)
    return found


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    device = model.get_input_embeddings().weight.device
    logits: Tensor = model(input_ids=ids.to(device), use_cache=False).logits
    return logits


def _mean_loss(model: Any, batches: list[Tensor]) -> float:
    """Mean negative log likelihood, nats a token."""
    total, count = 0.0, 0
    training = model.training
    model.eval()
    for ids in batches:
        logits = _logits(model, ids)[:, :-1].flatten(0, 1).float()
        targets = ids[:, 1:].flatten().to(logits.device)
        total += float(F.cross_entropy(logits, targets, reduction="sum"))
        count += len(targets)
    model.train(training)
    return total / count


def _own_losses(
    model: Any, made: dict[int, LatentAttention], batches: list[Tensor], shown: Shown
) -> dict[int, float]:
    """Each layer's own loss: what converting it alone changes, on the first tokens.

    The mean Kullback-Leibler divergence of the predictions, nats a token: unlike a difference of
    losses it is not hidden by chance improvements.
    """
    training = model.training
    model.eval()
    ids = batches[0][:1, :OWN_TOKENS]
    before = _logits(model, ids)[0].float().log_softmax(-1)
    found: dict[int, float] = {}
    layers = decoder_layers(model)
    for index, layer in shown(list(enumerate(layers)), "measuring"):
        original = layer.self_attn
        layer.self_attn = made[index]
        try:
            after = _logits(model, ids)[0].float().log_softmax(-1)
        finally:
            layer.self_attn = original
        found[index] = float(F.kl_div(after, before, reduction="sum", log_target=True)) / len(after)
    model.train(training)
    return found


def _report(
    model: Any,
    plan: Plan,
    study: Study,
    own: dict[int, float],
    losses: tuple[float | None, float | None, int],
    clock: Clock,
    config: LatentConfig,
) -> ConversionReport:
    from .cache import POSITION_BYTES

    fisher = config.objective == "fisher"

    def predicted(key: Key) -> float | None:
        cost = plan.chosen[key].cost
        return cost if fisher and not math.isnan(cost) else None

    layers = [
        LayerReport(
            k=stream_report(spec, "k", study.full_rank, predicted((index, "k"))),
            v=stream_report(spec, "v", study.full_rank, predicted((index, "v"))),
            measured=own.get(index),
        )
        for index, spec in enumerate(plan.specs)
    ]
    known = [cost for cost in map(predicted, plan.chosen) if cost is not None]
    return ConversionReport(
        layers=layers,
        bytes_per_token_before=bytes_in_16_bits(model),
        bytes_per_token=sum(spec.bytes_per_token for spec in plan.specs) + POSITION_BYTES,
        predicted_loss=sum(known) if len(known) == len(plan.chosen) else None,
        loss_before=losses[0],
        loss_after=losses[1],
        measured_tokens=losses[2],
        calibration_tokens=sum(ids.numel() for ids in study.batches),
        seconds=clock.laps,
        config=config.to_dict(),
        curve=_curve(model, study, config) if fisher else [],
    )


# -- telling how far it is ------------------------------------------------------------------------


class Clock:
    """Seconds by step; a step that comes again adds up."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """What passed since the last lap belongs to ``name``."""
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now


class Shown:
    """Bars on stderr, where somebody looks."""

    def __init__(self, wanted: bool) -> None:
        self._bar: Callable[..., Any] | None = None
        if wanted and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm

    def __call__(self, items: Sequence[Any], what: str) -> Iterator[Any]:
        """The items, with a bar named ``what``."""
        if self._bar is None:
            return iter(items)
        return iter(self._bar(items, desc=what, leave=False, file=sys.stderr))
