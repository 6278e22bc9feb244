"""What a message costs with the number of ranks: a model fitted to measured ones.

A message takes `latency` for each step that waits for a neighbour, and `per_byte` for each byte
that a rank sends, where the algorithm decides on both (Thakur, Rabenseifner & Gropp, "Optimization
of collective communication operations in MPICH", 2005, sections 4.1 and 4.5). With p ranks and n
bytes:

    ring all_reduce   2 (p - 1) steps       2 n (p - 1) / p bytes      gloo's, and what is fitted
    ring all_gather   p - 1 steps           n (p - 1) bytes
    tree all_reduce   2 ceil(log2 p) steps  2 n bytes
    tree all_gather   ceil(log2 p) steps    n (p - 1) bytes            by recursive doubling

Assumed: all links are alike and idle, ranks arrive together, adding is free, messages of a step
follow each other, as one layer waits for the one before. Latency and bandwidth are those of the
processes of one machine; in a cluster both are worse, which moves all curves up together.
"""

from collections.abc import Iterable
from math import ceil, log2
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RANKS = [2**k for k in range(1, 15)]


def all_reduce(ranks: int, size: int, tree: bool = False) -> tuple[float, float]:
    """(steps, bytes) of a rank."""
    if tree:
        return 2 * ceil(log2(ranks)), 2 * size
    return 2 * (ranks - 1), 2 * size * (ranks - 1) / ranks


def all_gather(ranks: int, size: int, tree: bool = False) -> tuple[float, float]:
    return ceil(log2(ranks)) if tree else ranks - 1, size * (ranks - 1)


# The messages of one layer and step, with C channels: (algorithm, bytes).
MESSAGES = {
    "ours": lambda c: [(all_reduce, 8 * (4 * c + 1)), (all_reduce, 8 * 2 * c)],
    "native's algorithm": lambda c: [(all_gather, 4 * (2 * c + 1)), (all_reduce, 4 * 2 * c)],
    "two all-reduces": lambda c: [
        *[(all_reduce, 8 * 2 * c), (all_reduce, 8 * (2 * c + 1))],
        *[(all_reduce, 8 * c)] * 2,
    ],
}


class Model(NamedTuple):
    """Seconds per step and per byte, and the median of the relative errors of the fit."""

    latency: float
    per_byte: float
    error: float

    def seconds(self, steps: float, size: float) -> float:
        return self.latency * steps + self.per_byte * size

    def __str__(self) -> str:
        return (
            f"cost model: {self.latency * 1e6:.0f} us per step, {1e-9 / self.per_byte:.2g} GB/s, "
            f"median error {self.error:.0%}"
            if self.per_byte
            else f"cost model: {self.latency * 1e6:.0f} us per step, no cost of bytes to be seen, "
            f"median error {self.error:.0%}"
        )


def fit(rows: Iterable[dict]) -> Model:
    """Least squares of the relative errors, over all messages that were timed."""
    terms, times = [], []
    for row in rows:
        channels = row["shape"][1]
        for name, seconds in row["messages"].items():
            algorithm, dtype = name.split()
            # those of bench_sync.py: ours in float64, native's in float32
            size = 8 * (4 * channels + 1) if dtype == "float64" else 4 * (2 * channels + 1)
            terms.append(
                {"all_reduce": all_reduce, "all_gather": all_gather}[algorithm](row["ranks"], size)
            )
            times.append(seconds)
    terms, times = np.array(terms), np.array(times)
    relative = terms / times[:, None]
    (latency, per_byte), *_ = np.linalg.lstsq(relative, np.ones(len(times)), rcond=None)
    if per_byte < 0:  # payloads of a few KB may show no cost of bytes
        latency, per_byte = (relative[:, 0].sum() / (relative[:, 0] ** 2).sum()), 0.0
    errors = abs(relative @ [latency, per_byte] - 1)
    return Model(float(latency), float(per_byte), float(np.median(errors)))


def network_seconds(model: Model, name: str, layers: dict[int, int], ranks: int, tree: bool):
    """The messages of all layers of a network in one step; `layers`: channels -> how many."""
    return sum(
        count * model.seconds(*algorithm(ranks, size, tree))
        for channels, count in layers.items()
        for algorithm, size in MESSAGES[name](channels)
    )


def network_bytes(name: str, layers: dict[int, int], ranks: int) -> float:
    """What a rank sends for all layers of a network in one step, by rings."""
    return sum(
        count * algorithm(ranks, size)[1]
        for channels, count in layers.items()
        for algorithm, size in MESSAGES[name](channels)
    )


def channels_of(rows: Iterable[dict]) -> dict[int, int]:
    """channels -> number of layers of the network, each layer once."""
    layers: dict[int, int] = {}
    for shape, count in {tuple(row["shape"]): row["layers"] for row in rows}.items():
        layers.setdefault((shape[1], *shape[2:]), count)
    totals: dict[int, int] = {}
    for (channels, *_), count in layers.items():
        totals[channels] = totals.get(channels, 0) + count
    return totals


def plot(model: Model, rows: list[dict], path: Path) -> None:
    layers = channels_of(rows)
    fig, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    titles = ["time, rings (gloo)", "time, trees", "bytes that a rank sends"]
    colours = dict(zip(MESSAGES, ["#0072B2", "#D55E00", "#009E73"], strict=True))
    for name, colour in colours.items():
        for axis, tree in zip(axes, (False, True), strict=False):
            times = [network_seconds(model, name, layers, p, tree) for p in RANKS]
            axis.loglog(RANKS, times, color=colour, label=name)
        sent = [network_bytes(name, layers, p) for p in RANKS]
        axes[2].loglog(RANKS, sent, color=colour, label=name)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("ranks")
        axis.grid(alpha=0.3)
    axes[0].axvspan(2, 4, color="0.9", label="measured")
    for axis in axes[:2]:
        axis.set_ylabel("seconds")
    axes[2].set_ylabel("bytes")
    axes[0].legend()
    count = sum(layers.values())
    fig.suptitle(f"Messages of the {count} normalizations of ResNet-50 in a step: {model}")
    fig.savefig(path, dpi=120)
    plt.close(fig)
