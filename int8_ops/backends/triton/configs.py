"""Launch configurations: candidates and the cost model that prunes them. Pure Python, no Triton.

The model ranks; the tuner in ``launch.py`` times the few best. Every candidate returns the same
bits, so a wrong guess costs time and nothing else.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

# What the tuner times for a problem: enough to forgive the model, few enough to tune in a second.
MAX_TIMED = 10
# Of one tile, with other stages and warps, so that the shortlist holds several tiles.
MAX_TIMED_PER_TILE = 3

# Hopper's int8 rates a clock and SM, which set how compute, loads and stores weigh against each
# other. A part with other rates gets a slightly worse shortlist, not a wrong one.
_MAC_PER_CLOCK = 4096
_MAC_PER_CLOCK_MMA_SYNC = 2048
_LOAD_BYTES_PER_CLOCK = 24.0
_STORE_BYTES_PER_CLOCK = 13.0
# Launching a tile, filling its pipeline and draining it.
_TILE_CLOCKS = 1500.0
_REGISTERS = 65_536


@dataclass(frozen=True)
class MatmulConfig:
    """A tile of the matmul and how it is compiled."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8

    @property
    def elements(self) -> int:
        """Of out, a program."""
        return self.block_m * self.block_n

    @property
    def smem_bytes(self) -> int:
        """Shared memory of the pipelined int8 operands."""
        return self.num_stages * (self.block_m + self.block_n) * self.block_k


@dataclass(frozen=True)
class QuantizeConfig:
    """Rows a program of ``quantize_rows_kernel``, the power of two that holds one, its warps."""

    block_rows: int
    block_cols: int
    num_warps: int

    @property
    def elements(self) -> int:
        """Of x, a program."""
        return self.block_rows * self.block_cols


@dataclass(frozen=True)
class DeviceLimits:
    """What a launch may use of a device; the defaults are an H100's."""

    multiprocessors: int = 132
    smem_bytes: int = 232_448
    has_wgmma: bool = True


MATMUL_CONFIGS: tuple[MatmulConfig, ...] = (
    MatmulConfig(128, 256, 128, 8, 3),
    MatmulConfig(128, 256, 128, 8, 4),
    MatmulConfig(256, 128, 128, 8, 3),
    MatmulConfig(256, 128, 128, 8, 4),
    MatmulConfig(128, 256, 64, 8, 4),
    MatmulConfig(128, 128, 128, 8, 3),
    MatmulConfig(128, 128, 128, 4, 3),
    MatmulConfig(128, 128, 128, 8, 4),
    MatmulConfig(128, 128, 64, 4, 5),
    MatmulConfig(64, 256, 128, 4, 3),
    MatmulConfig(64, 256, 128, 8, 4),
    MatmulConfig(128, 64, 128, 4, 4),
    MatmulConfig(64, 128, 128, 4, 4),
    MatmulConfig(64, 128, 256, 4, 3),
    MatmulConfig(64, 64, 128, 4, 5),
    MatmulConfig(64, 64, 256, 4, 3),
    MatmulConfig(32, 128, 128, 4, 5),
    MatmulConfig(32, 64, 256, 4, 4),
    MatmulConfig(32, 64, 128, 4, 5),
    MatmulConfig(16, 128, 256, 4, 4),
    MatmulConfig(16, 64, 512, 4, 3),
    MatmulConfig(16, 64, 256, 4, 4),
    MatmulConfig(16, 64, 128, 2, 5),
    MatmulConfig(16, 32, 512, 4, 3),
    MatmulConfig(16, 32, 256, 2, 5),
    MatmulConfig(16, 32, 128, 2, 5),
    MatmulConfig(64, 64, 64, 4, 4),
    MatmulConfig(16, 32, 32, 2, 3),
)

# Longer rows take the kernel that reads x twice.
MAX_ROW_IN_REGISTERS = 32_768


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is at least ``value`` (and at least 1)."""
    return 1 << max(value - 1, 0).bit_length()


def m_bucket(m: int) -> int:
    """M as the tuner sees it: neighbouring batch sizes share one choice."""
    return min(max(next_power_of_2(m), 16), 65_536)


def _tiles(size: int, block: int) -> int:
    return -(-size // block)


def estimated_clocks(
    config: MatmulConfig, m: int, n: int, k: int, out_bytes: int, device: DeviceLimits
) -> float:
    """Clocks the busiest SM spends on the problem; tiles on one SM share its throughput."""
    tiles = _tiles(m, config.block_m) * _tiles(n, config.block_n)
    padded_k = _tiles(k, config.block_k) * config.block_k
    wgmma = device.has_wgmma and config.block_m >= 64
    rate = _MAC_PER_CLOCK if wgmma else _MAC_PER_CLOCK_MMA_SYNC
    compute = config.block_m * config.block_n * padded_k / rate
    load = (min(config.block_m, m) + min(config.block_n, n)) * padded_k / _LOAD_BYTES_PER_CLOCK
    rows = min(config.block_m, m)
    store = rows * min(config.block_n, n) * out_bytes / _STORE_BYTES_PER_CLOCK
    # Tiles that fit an SM together overlap their fixed costs and one's stores with another's sums.
    accumulators = config.block_m * config.block_n + 64 * 32 * config.num_warps
    resident = max(1, min(device.smem_bytes // config.smem_bytes, _REGISTERS // accumulators, 8))
    per_sm = _tiles(tiles, device.multiprocessors)
    overlap = min(resident, per_sm)
    body = max(compute, load)
    return per_sm * (body + (store + _TILE_CLOCKS) / overlap)


def shortlist(
    m: int, n: int, k: int, out_bytes: int, device: DeviceLimits, limit: int = MAX_TIMED
) -> list[MatmulConfig]:
    """The candidates worth timing for a problem, best estimate first; never empty."""
    # A tile that is mostly padding can't win; the smallest tile always stays.
    max_m = max(16, next_power_of_2(m))
    max_n = max(32, next_power_of_2(n))
    max_k = max(32, next_power_of_2(k))
    fitting = [
        config
        for config in MATMUL_CONFIGS
        if config.block_m <= max_m
        and config.block_n <= max_n
        and config.block_k <= max_k
        and config.smem_bytes <= device.smem_bytes
    ]
    chosen: list[MatmulConfig] = []
    taken: Counter[tuple[int, int]] = Counter()
    for config in sorted(fitting, key=lambda c: estimated_clocks(c, m, n, k, out_bytes, device)):
        tile = (config.block_m, config.block_n)
        if taken[tile] < MAX_TIMED_PER_TILE and len(chosen) < limit:
            taken[tile] += 1
            chosen.append(config)
    return chosen


def quantize_shortlist(rows: int, cols: int) -> list[QuantizeConfig]:
    """Ways to quantize rows of ``cols`` elements in one read, the likeliest first."""
    block_cols = next_power_of_2(cols)
    configs = []
    # 16 elements a thread is one 16-byte store of int8; more of them is more bytes in flight.
    for elements_per_thread in (16, 32):
        for threads in (128, 256, 64, 32, 512, 1024):
            block_rows = elements_per_thread * threads // block_cols
            fits = block_rows >= 1 and (block_rows <= next_power_of_2(rows) or threads == 32)
            if fits:
                configs.append(QuantizeConfig(block_rows, block_cols, threads // 32))
    return configs[:6] or [QuantizeConfig(1, block_cols, 1)]
