"""What ``convert`` may be asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .. import backends
from .spec import FLOWS

__all__ = ["LatentConfig"]

OBJECTIVES = ("fisher", "activation", "weight")
BITS: dict[int | str, tuple[int, ...]] = {8: (8,), 4: (4,), "auto": (8, 4), 16: (16,)}


@dataclass(frozen=True)
class LatentConfig:
    """How to convert a model. Exactly one of ``kv_ratio``, ``mean_rank`` and ``ranks`` is given.

    Attributes:
        kv_ratio: bytes of the cache relative to 16-bit keys and values, scales counted, in (0, 1];
            0.25 where none of the three is given.
        mean_rank: numbers a token of all groups together, averaged over the layers' keys and
            values; not with ``bits="auto"``, which leaves open what a rank costs.
        ranks: a pair (k, v) for each layer, of each group's latent; not with ``bits="auto"``.
        bits: 8, 4, or "auto": both, in up to two slices of every latent, where each costs least
            (``spec``, Note [Slices]). 16 keeps floats, to compare with.
        heads_per_group: neighbouring KV heads that share a latent; None: all of a layer.
        rank_multiple: of every slice's rank, unless it ends at the full rank.
        objective: "fisher" (input and gradient moments of the calibration), "activation" (input
            moments alone) or "weight" (plain SVD; needs no calibration).
        flow: "integer", or "seed", the flow that it replaces (``spec.LayerSpec``); with 16 bits.
        rotate: spread each slice's energy by a random rotation, folded into the factors.
        sequence_length: tokens of a calibration window.
        windows: calibration windows, spread over the text; None: all that it has. More keep more:
            small ranks fit few windows too closely.
        refine: steps by which the factors are refined on calibration windows, one a step
            (``refine``); 0, and flow "seed": as the statistics give them.
        seed: of the rotations.
        backend: of the converted modules, see ``int8_ops.backends``.

    Raises:
        ValueError: a value out of range, naming it.
    """

    kv_ratio: float | None = None
    mean_rank: int | None = None
    ranks: Sequence[tuple[int, int]] | None = None
    bits: int | Literal["auto"] = "auto"
    heads_per_group: int | None = None
    rank_multiple: int = 32
    objective: Literal["fisher", "activation", "weight"] = "fisher"
    flow: Literal["integer", "seed"] = "integer"
    rotate: bool = True
    sequence_length: int = 1024
    windows: int | None = 32
    refine: int = 16
    seed: int = 0
    backend: str = "auto"

    def __post_init__(self) -> None:
        """Check every value."""
        given = [n for n in ("kv_ratio", "mean_rank", "ranks") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"LatentConfig: expected one of {' and '.join(given)}, got both")
        if not given:
            object.__setattr__(self, "kv_ratio", 0.25)
        if self.bits not in BITS:
            raise ValueError(f"LatentConfig: expected bits 8, 4, 16 or 'auto', got {self.bits!r}")
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"LatentConfig: expected objective {', '.join(OBJECTIVES)}, got {self.objective!r}"
            )
        if self.flow not in FLOWS or (self.flow == "seed" and self.bits != 16):
            raise ValueError(
                f"LatentConfig: expected flow 'integer', or 'seed' with bits=16, got {self.flow!r} "
                f"with bits={self.bits!r}"
            )
        if self.bits == "auto" and self.kv_ratio is None:
            raise ValueError(
                f"LatentConfig: {given[0]} needs bits 8, 4 or 16, got 'auto': a rank alone does "
                "not say what it may cost"
            )
        if self.kv_ratio is not None and not 0 < self.kv_ratio <= 1:
            raise ValueError(f"LatentConfig: expected kv_ratio in (0, 1], got {self.kv_ratio}")
        for name, least in (
            ("mean_rank", 1),
            ("heads_per_group", 1),
            ("rank_multiple", 1),
            ("sequence_length", 2),
            ("windows", 1),
            ("refine", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"LatentConfig: expected {name} >= {least}, got {value}")
        if self.rank_multiple % 2 and self.bits in (4, "auto"):
            raise ValueError(
                f"LatentConfig: expected an even rank_multiple with 4 bits, which share a byte, "
                f"got {self.rank_multiple}"
            )
        backends.check_name(self.backend)

    def allowed_bits(self) -> tuple[int, ...]:
        """Bits that a slice may have, descending."""
        return BITS[self.bits]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return dataclasses.asdict(self)
