"""Result files: CSV with one line per case, under comment lines that say how it was measured.
Times are in milliseconds. Needs neither torch nor the library."""

from math import prod
from pathlib import Path

import numpy as np
import pandas as pd

RESULTS = Path(__file__).resolve().parent / "results"
# Columns that identify a measurement, as far as a file has them.
CASE = ("network", "mode", "batch", "norm", "pass", "dtype", "layout", "shape")
DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes of an element
LAYOUTS = ("nchw", "nhwc")
NETWORKS = {"resnet50": "ResNet-50", "mobilenetv2": "MobileNetV2"}
# The least memory traffic in units of a clone (one read, one write): forward and eval read x and
# write y, backward reads x and dy and writes dx, a module call does forward and backward.
FLOOR = {"forward": 1.0, "backward": 1.5, "eval": 1.0, "module": 2.5}
PASSES = tuple(FLOOR)


def shape_name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def write(path: Path, machine: dict, rows: pd.DataFrame) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = "".join(f"# {key}: {value}\n" for key, value in machine.items())
    path.write_text(header + rows.to_csv(index=False, float_format="%.4g", lineterminator="\n"))


def read(path: Path) -> pd.DataFrame:
    """The rows, with the header in `attrs`, and derived columns where they are those of layers."""
    header = [line for line in path.read_text().splitlines() if line.startswith("# ")]
    rows = pd.read_csv(path, skiprows=len(header))
    rows = derive(rows) if "copy" in rows else rows
    rows.attrs = dict(line[2:].split(": ", 1) for line in header)
    return rows


def derive(rows: pd.DataFrame) -> pd.DataFrame:
    """Add what the tables need: speed-up over native, time over the floor, MB of the input."""
    sizes = rows["shape"].map(lambda text: prod(map(int, text.split("x"))))
    clones = rows["pass"].map(FLOOR)
    if "norm" in rows:  # a residual is read, its gradient written, and the output read again
        clones += 1.5 * rows["norm"].str.contains("add")
    floor = rows["copy"] * clones
    rows = rows.assign(x=rows["native"] / rows["ours"], over_floor=rows["ours"] / floor)
    mb = sizes * rows["dtype"].map(DTYPES) / 1e6
    return rows.assign(kind=rows["dtype"] + " " + rows["layout"], mb=mb)


def median_run(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each case the run with the median speed-up, whose times were taken side by side."""
    keys = [rows[column] for column in CASE if column in rows]
    ratios = (rows.native / rows.ours).groupby(keys, sort=False)
    return rows[ratios.rank(method="first") == (ratios.transform("size") + 1) // 2]


def select(rows: pd.DataFrame, what: str = "", kind: str = "", network: str = "") -> pd.DataFrame:
    for column, value in ("pass", what), ("kind", kind):
        rows = rows[rows[column] == value] if value else rows
    return rows[rows[network] > 0] if network else rows


def mean(values: pd.Series) -> float:
    """The geometric mean; NaN of nothing."""
    return float(np.exp(np.log(values).mean()))
