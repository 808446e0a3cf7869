"""How a latent is stored: which slices of it, of how many bits, and what that costs.

A *stream* is the keys or the values of one layer. Its latent (``rank`` numbers a token and group)
is cut into slices, each with bits and a scale of its own: directions that matter most in 8 bits,
the rest in 4, those that hardly matter nowhere. One slice is the plain case.

Note [Slices]
Within a slice every direction gets the same step, so a rotated slice of ``r`` directions of
standard deviations ``s_i`` costs about ``(sum s_i)^2 / r``: an arithmetic mean where the best code
for a Gaussian source costs a geometric one (reverse water-filling; Cover and Thomas, Elements of
Information Theory, section 10.3.3). Two slices take most of the difference where the spectrum is
steep, as that of a latent is, for 4 more bytes a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["LayerSpec", "Slice", "StreamSpec", "parse_stream"]

# 16: floats of the model's dtype, without a scale, to compare with.
BITS = (4, 8, 16)
SCALE_BYTES = 4


@dataclass(frozen=True)
class Slice:
    """``rank`` neighbouring directions of a latent, stored in ``bits`` each with one scale a token.

    Raises ValueError for bits other than 4, 8 or 16, a rank below 1, or an odd rank in 4 bits.
    """

    bits: int
    rank: int

    def __post_init__(self) -> None:
        """See the class."""
        if self.bits not in BITS:
            raise ValueError(f"Slice: expected bits 4, 8 or 16, got {self.bits}")
        if self.rank < 1 or (self.bits == 4 and self.rank % 2):
            raise ValueError(
                f"Slice: expected rank >= 1, even in 4 bits (two share a byte), got rank "
                f"{self.rank} in {self.bits} bits"
            )

    @property
    def width(self) -> int:
        """Stored elements a token: bytes for 4 and 8 bits, floats for 16."""
        return self.rank // 2 if self.bits == 4 else self.rank

    @property
    def bytes(self) -> int:
        """Bytes a token and group, the float32 scale included."""
        return 2 * self.rank if self.bits == 16 else self.width + SCALE_BYTES


StreamSpec = tuple[Slice, ...]


def stream_rank(spec: StreamSpec) -> int:
    """Numbers a token and group, over all slices."""
    return sum(part.rank for part in spec)


def stream_bytes(spec: StreamSpec) -> int:
    """Bytes a token and group, scales included."""
    return sum(part.bytes for part in spec)


def stream_bits(spec: StreamSpec) -> str:
    """``8``, ``4`` or ``8+4``."""
    return "+".join(str(part.bits) for part in spec)


def parse_stream(value: Any, where: str) -> StreamSpec:
    """``[[bits, rank], ...]``, as a configuration holds it, -> a spec.

    Raises ValueError naming ``where`` when it is anything else.
    """
    try:
        spec = tuple(Slice(int(bits), int(rank)) for bits, rank in value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: expected [[bits, rank], ...], got {value!r}: {error}"
        ) from error
    if not spec:
        raise ValueError(f"{where}: expected at least one [bits, rank], got none")
    return spec


FLOWS = ("integer", "seed")


@dataclass(frozen=True)
class LayerSpec:
    """How one layer's keys and values are stored, a latent a group of ``groups`` KV-head groups.

    ``flow`` is "integer", or "seed": the flow that this one replaces, kept to compare with. There
    latents are fake-quantized to 8 bits and cached as floats, keys are rebuilt in floats, and
    values quantize the latents again for an int8 product. Its slices have 16 bits.

    Raises ValueError for another flow, or slices of the seed flow with other bits.
    """

    k: StreamSpec
    v: StreamSpec
    groups: int = 1
    flow: str = "integer"

    def __post_init__(self) -> None:
        """See the class."""
        if self.flow not in FLOWS:
            raise ValueError(f"LayerSpec: expected flow {' or '.join(FLOWS)}, got {self.flow!r}")
        if self.flow == "seed" and {part.bits for part in (*self.k, *self.v)} != {16}:
            raise ValueError("LayerSpec: expected slices of 16 bits in the seed flow, got others")

    @property
    def bytes_per_token(self) -> int:
        """Bytes a token in this layer, scales included."""
        return self.groups * (stream_bytes(self.k) + stream_bytes(self.v))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; ``from_dict`` takes it back."""
        return {
            "k": [[part.bits, part.rank] for part in self.k],
            "v": [[part.bits, part.rank] for part in self.v],
            "groups": self.groups,
            "flow": self.flow,
        }

    @classmethod
    def from_dict(cls, value: Any, where: str) -> LayerSpec:
        """Raises ValueError naming ``where`` when ``value`` is not what ``to_dict`` returns."""
        if not isinstance(value, dict) or set(value) != {"k", "v", "groups", "flow"}:
            raise ValueError(f"{where}: expected the keys k, v, groups and flow, got {value!r}")
        groups = value["groups"]
        if not isinstance(groups, int) or groups < 1:
            raise ValueError(f"{where}: expected groups >= 1, got {groups!r}")
        k, v = (parse_stream(value[name], f"{where}.{name}") for name in ("k", "v"))
        try:
            return cls(k, v, groups, value["flow"])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def layer_specs(values: Sequence[Any]) -> tuple[LayerSpec, ...]:
    """Each layer's ``to_dict``, in order, -> specs. Raises ValueError naming the layer."""
    return tuple(LayerSpec.from_dict(value, f"layers[{i}]") for i, value in enumerate(values))
