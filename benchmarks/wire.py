"""How long a sum of gradients takes on a network, simulated: `python -m benchmarks.wire`.

Each process has one link, on which it sends one message at a time and receives one at a time; a message takes
`latency_s` to arrive, after `bytes / bandwidth` on the link and a fixed `overhead_s` of its sender. What is added
where costs its reads of memory. Compared are a ring's all-reduce, a binary tree's (up, then down, in chunks), and
raytrain's exchange: each process gets its share of every node from all others, adds up in the tree's order, and
sends the sum to all (engine/collectives.py), with the gather as a ring, as gloo and NCCL have it.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence

import numpy as np

from benchmarks.measure import run, table
from raytrain.engine.tree import additions

WORKERS = (8, 16, 64, 256, 1024)
CHUNKS = 16  # of a binary tree's pipeline
MEMORY = 10e9  # bytes a second, of one core that adds


@dataclasses.dataclass(frozen=True)
class Network:
    name: str
    latency_s: float
    bandwidth: float  # bytes a second, each way
    overhead_s: float = 1e-6


NETWORKS = (Network("10 Gb/s, 50 us", 50e-6, 1.25e9), Network("100 Gb/s, 5 us", 5e-6, 12.5e9))


@dataclasses.dataclass(frozen=True)
class Cost:
    """sent: bytes that the busiest process sends;   seconds: until the last one has the sum"""

    sent: float
    seconds: float


def rounds(ready_s: np.ndarray, sizes: Sequence[float], network: Network, is_chain: bool) -> np.ndarray:
    """When each process has received the last of as many messages as there are `sizes`, of so many bytes.

    ready_s:  (W,) when each begins
    is_chain: each is sent to the next process, and only once the one before has come (a ring); else to another one
              each time, one behind the other
    """
    link_s, receiver_s, have_s = ready_s.copy(), ready_s.copy(), ready_s.copy()
    for number, size in enumerate(sizes, 1):
        on_link_s = network.overhead_s + size / network.bandwidth
        link_s = np.maximum(link_s, have_s if is_chain else ready_s) + on_link_s
        arrives_s = np.roll(link_s, 1 if is_chain else number) + network.latency_s
        receiver_s = np.maximum(arrives_s, receiver_s + size / network.bandwidth)
        have_s = receiver_s
    return have_s


def ring(workers: int, size: float, network: Network) -> Cost:
    """Reduce-scatter, then all-gather: 2 (W - 1) messages of 1 / W, each after the one before."""
    share = size / workers
    reduced_s = rounds(np.zeros(workers), [share] * (workers - 1), network, is_chain=True)
    reduced_s += (workers - 1) * 3 * share / MEMORY
    done_s = rounds(reduced_s, [share] * (workers - 1), network, is_chain=True)
    return Cost(2 * (workers - 1) * share, float(done_s.max()))


def tree(workers: int, size: float, network: Network) -> Cost:
    """Up a binary tree and down again in chunks: a parent receives from two children on one link."""
    chunk = size / CHUNKS
    on_link_s = network.overhead_s + chunk / network.bandwidth
    hop_s = 2 * on_link_s + network.latency_s + 2 * 3 * chunk / MEMORY  # both children's
    levels = max(1, math.ceil(math.log2(workers)))
    up_s = levels * hop_s + (CHUNKS - 1) * 2 * on_link_s
    down_s = levels * (2 * on_link_s + network.latency_s) + (CHUNKS - 1) * 2 * on_link_s
    return Cost(3 * size, up_s + down_s)


def exchange(workers: int, size: float, network: Network, virtual_workers: int) -> Cost:
    """Ours, with as many nodes of each process as the virtual workers leave it."""
    counts = additions(0, workers, virtual_workers).counts
    share = size / workers
    # Who sends most holds the others up: all are taken to send as much in each round.
    got_s = rounds(np.zeros(workers), [max(counts) * share] * (workers - 1), network, is_chain=False)
    got_s += (sum(counts) + 1) * share / MEMORY
    done_s = rounds(got_s, [share] * (workers - 1), network, is_chain=True)
    return Cost((max(counts) + 1) * (workers - 1) * share, float(done_s.max()))


def compared(size: float, network: Network) -> list[list[str]]:
    """A row for each number of workers."""
    rows = []
    for workers in WORKERS:
        by_ring, by_tree = ring(workers, size, network), tree(workers, size, network)
        own = exchange(workers, size, network, workers)
        uneven = exchange(workers, size, network, 3 * workers)
        ways = [by_ring, by_tree, own, uneven]
        rows.append([str(workers), *(f"{way.seconds * 1e3:.1f}" for way in ways), f"{own.sent / by_ring.sent:.2f}"])
        rows[-1].append(f"{uneven.sent / by_ring.sent:.2f}")
    return rows


def shown(size: float, network: Network) -> str:
    heads = ["workers", "ring, ms", "binary tree, ms", "ours, ms", "ours, V = 3 W, ms", "bytes x ring's"]
    return table([*heads, "the same, V = 3 W"], compared(size, network))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wire", description=__doc__)
    parser.add_argument("--megabytes", type=float, nargs="*", default=[1.0, 100.0], help="of gradients")
    args = parser.parse_args()
    for network in NETWORKS:
        for megabytes in args.megabytes:
            print(f"{network.name}, {megabytes:g} MB\n{shown(megabytes * 1e6, network)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
