"""What NUMA costs, on paper: latency, bandwidth, roofline, all-reduce over sockets. Formulas and worked examples: NUMA models document of
the sources, sections 16.1, 16.4 and its exercises.

Units are the caller's as long as they fit each other (bytes and bytes per second, nanoseconds); shares are between 0 and 1. ValueError
for what cannot be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def mean_access_latency(shares: Sequence[float], latencies: Sequence[float]) -> float:
    """Mean latency of accesses of which `shares[i]` take `latencies[i]`: one entry per distance. Shares sum to 1."""
    if len(shares) != len(latencies) or not shares:
        raise ValueError(f"{len(shares)} shares for {len(latencies)} latencies; give one share per distance")
    if not math.isclose(sum(shares), 1, abs_tol=1e-6) or min(shares) < 0:
        raise ValueError(f"the shares {list(shares)} sum to {sum(shares):g}; expected non-negative shares that sum to 1")
    return sum(share * latency for share, latency in zip(shares, latencies, strict=True))


def effective_bandwidth(local_share: float, local: float, remote: float) -> float:
    """Bandwidth of accesses of which `local_share` are local: a * local + (1 - a) * remote."""
    _check_share(local_share)
    return local_share * local + (1 - local_share) * remote


def bandwidth_efficiency(achieved: float, peak_per_node: float, nodes: int) -> float:
    """Achieved bandwidth of all nodes together as a share of their peaks'."""
    return achieved / (peak_per_node * nodes)


def roofline(peak: float, intensity: float, bandwidth: float) -> float:
    """Attainable operations per second: min(peak, operations per byte * bandwidth)."""
    return min(peak, intensity * bandwidth)


def transfer_seconds(size: float, bandwidth: float, latency: float = 0.0) -> float:
    """One message between nodes: size / bandwidth + latency."""
    return size / bandwidth + latency


def pipelined_seconds(*stages: float) -> float:
    """A stream of chunks through stages that overlap (split, transfer, merge) takes as long as the slowest of them."""
    return max(stages)


def ring_all_reduce_seconds(size: float, devices: int, inter_bandwidth: float, crossing: float = 0.5) -> float:
    """An all-reduce over a ring that knows no sockets: (n - 1) * size travels, of which `crossing` goes over the link between sockets."""
    _check_share(crossing)
    return (devices - 1) * size * crossing / inter_bandwidth


def hierarchical_all_reduce_seconds(size: float, per_socket: int, intra_bandwidth: float, inter_bandwidth: float) -> float:
    """An all-reduce within sockets, then once between them, then within again, one step after the other:
    2 (p - 1) S / (p B_intra) + S / B_inter."""
    return 2 * (per_socket - 1) * size / (per_socket * intra_bandwidth) + size / inter_bandwidth


def overlapped_all_reduce_seconds(size: float, per_socket: int, intra_bandwidth: float, inter_bandwidth: float) -> float:
    """The same in chunks whose steps overlap, each device sending everything within its socket: the slowest step counts.

    This is the exercise of the sources (3.5 times the plain ring). Its text doubles the steps within a socket, but not their figure: 3 * 4
    GB at 200 GB/s = 0.06 s. The figure is followed.
    """
    within = (per_socket - 1) * size / intra_bandwidth
    return pipelined_seconds(within, size / inter_bandwidth, within)


def parallel_efficiency(speedup: float, sockets: int) -> float:
    """Speedup per socket."""
    return speedup / sockets


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"{share} is not a share; expected a number from 0 to 1")
