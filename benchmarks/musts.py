"""What is asked of the results, and whether it was reached."""

import numpy as np
import pandas as pd

from results import LAYOUTS, NETWORKS, PASSES, mean, select

KINDS = ("fp32 nchw", "fp32 nhwc", "bf16 nchw", "bf16 nhwc")
# On a CPU with tcmalloc on two cores: (must, aim).
SPEEDUPS = {  # native / ours, geometric mean over the ResNet-50 shapes, in the order of KINDS
    "forward": [(3.3, 4.0), (1.35, 1.6), (1.5, 2.0), (1.5, 2.0)],
    "backward": [(1.3, 1.5), (1.1, 1.3), (1.5, 2.0), (1.45, 2.0)],
    "eval": [(1.1, 1.3), (1.2, 1.4), (1.3, 1.6), (1.3, 1.6)],
}
EVERY = (0.97, 1.1)  # native / ours in every single case
OVER_FLOOR = {  # ours / floor, geometric mean of the ResNet-50 layers of 50 MB and more, likewise
    "forward": [(1.35, 1.15), (1.5, 1.2)],
    "backward": [(1.2, 1.1), (1.6, 1.3)],
}
STEPS = {  # native / converted, eager training step in fp32, nchw and nhwc
    "resnet50": [(1.04, 1.06), (1.0, 1.02)],
    "mobilenetv2": [(1.12, 1.2), (1.04, 1.08)],
}
# On an H200: floor / ours, forward and backward, by layout and MB. Channels-last layers of 56x56
# and 112x112 at batch 256 exceed what a GPU keeps on chip.
SHARES = {("nchw", 100, 1e9): (0.80, 0.80), ("nchw", 25, 100): (0.65, 0.65)}
SHARES |= {("nhwc", 50, 1e9): (0.70, 0.70)}
SHARES_WIDE = (0.60, 0.52)
SMALL_US = 8.0  # forward, NCHW up to 6.4 MB
# native / ours, geometric mean over the ResNet-50 shapes, forward and backward
GPU_SPEEDUPS = {"bf16 nchw": (5.0, 5.0), "fp32 nchw": (2.5, 2.5), "fp16 nchw": (2.5, 2.5)}
GPU_SPEEDUPS |= {"fp16 nhwc": (1.15, 1.4)}
HEADER = ["what", "must", "aim", "measured", "verdict", "worst case"]


def verdict(what: str, value: float, must: float, aim=None, where="", at_most=False) -> list[str]:
    """A line of the table of musts."""
    sign = "<=" if at_most else ">="
    met = value <= must if at_most else value >= must
    limits = [f"{sign} {must:g}", "" if aim is None else f"{sign} {aim:g}"]
    word = "not measured" if np.isnan(value) else "PASS" if met else "MISS"
    return [what, *limits, f"{value:.3f}", word, where]


def worst(rows: pd.DataFrame, column: str, largest: bool = False) -> tuple[float, str]:
    """The worst value, and its case."""
    if rows[column].dropna().empty:
        return np.nan, ""
    row = rows.loc[rows[column].idxmax() if largest else rows[column].idxmin()]
    return row[column], f"{row['shape']} {row['kind']}"


def least(rows: pd.DataFrame, what: str, *must: float, column="x", name="x native") -> list[str]:
    value, where = worst(rows, column)
    return verdict(f"{what}, least of {len(rows)} cases, {name}", value, *must, where=where)


def average(rows: pd.DataFrame, what: str, kind: str, *must: float) -> list[str]:
    group = select(rows, what, kind, "resnet50")
    name = f"{what} {kind}, ResNet-50, geometric mean of {len(group)} shapes, x native"
    return verdict(name, mean(group.x), *must)


def layer_verdicts(rows: pd.DataFrame) -> list[list[str]]:
    verdicts = []
    for what, pairs in SPEEDUPS.items():
        pairs = zip(KINDS, pairs, strict=True)
        verdicts += [average(rows, what, kind, *must) for kind, must in pairs]
    verdicts += [least(select(rows, what), what, *EVERY) for what in PASSES]
    cases = [(w, *each) for w in OVER_FLOOR for each in zip(KINDS, OVER_FLOOR[w], strict=False)]
    for what, kind, must in cases:
        group = select(rows[rows.mb >= 50], what, kind, "resnet50")
        name = f"{what} {kind}, mean of {len(group)} layers of >= 50 MB, time / floor"
        _, where = worst(group, "over_floor", largest=True)
        verdicts.append(verdict(name, mean(group.over_floor), *must, where, at_most=True))
    return verdicts


def step_verdicts(steps: pd.DataFrame) -> list[list[str]]:
    verdicts = []
    rows = steps[(steps["dtype"] == "fp32") & (steps["mode"] == "eager")]
    for network, pairs in STEPS.items():
        for layout, must in zip(LAYOUTS, pairs, strict=True):
            row = rows[(rows["network"] == network) & (rows["layout"] == layout)]
            name = f"training step, {NETWORKS[network]} {layout}, x native"
            verdicts.append(verdict(name, mean(row.native / row.ours), *must))
    return verdicts


def gpu_verdicts(rows: pd.DataFrame) -> list[list[str]]:
    rows = rows.assign(share=1 / rows.over_floor)
    wide = rows["shape"].str.match(r"256x\d+x(56x56|112x112)$") & (rows.layout == "nhwc")
    groups = [("nhwc 56x56, 112x112 at batch 256", rows[wide], SHARES_WIDE)]
    for (layout, low, high), limits in SHARES.items():
        name = f"{layout} {low} to {high} MB" if high < 1e9 else f"{layout} >= {low} MB"
        chosen = (rows.layout == layout) & (rows.mb >= low) & (rows.mb < high) & ~wide
        groups.append((name, rows[chosen], limits))
    share = {"column": "share", "name": "share of the floor"}
    verdicts = [
        least(select(group, what), f"{what} {name}", must, **share)
        for name, group, limits in groups
        for what, must in zip(PASSES[:2], limits, strict=True)
    ]
    small = select(rows[(rows.layout == "nchw") & (rows.mb <= 6.4)], "forward")
    slowest, where = worst(small, "ours", largest=True)
    name = f"forward nchw <= 6.4 MB, slowest of {len(small)} cases, microseconds"
    verdicts.append(verdict(name, 1e3 * slowest, SMALL_US, where=where, at_most=True))
    for kind, limits in GPU_SPEEDUPS.items():
        pairs = zip(PASSES[:2], limits, strict=True)
        verdicts += [average(rows, what, kind, must) for what, must in pairs]
    return verdicts + [least(select(rows, what), what, 1.0) for what in PASSES[:3]]
