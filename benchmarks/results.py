"""Measured rows, what is derived from them, and the musts they are held against."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from statistics import geometric_mean

from cases import DTYPES, LAYOUTS
from timing import DISTURBED

# Times that the least memory traffic touches one tensor of x's size: read x and write y; read x
# and dy and write dx; both.
TRAFFIC = {"forward": 2, "backward": 3, "eval": 2, "module": 5}
PASSES = tuple(TRAFFIC)

NOISE = 0.95  # "never slower than native" in a single case, on a machine with noise
MUST_LAYERS = {  # native / ours, geometric mean over the ResNet-50 shapes
    "forward": {"fp32 nchw": 3.5, "fp32 nhwc": 1.5, "bf16 nchw": 3.0, "bf16 nhwc": 2.0},
    "backward": {"fp32 nchw": 1.8, "fp32 nhwc": 2.0, "bf16 nchw": 2.5, "bf16 nhwc": 2.5},
    "eval": {"fp32 nchw": 1.5, "fp32 nhwc": 1.5, "bf16 nchw": 1.5, "bf16 nhwc": 1.5},
}
MUST_SMALL = {(8, 16, 8, 8): 1.2, (32, 64): 1.2}  # native / ours, module call
MUST_COMPILE = 4.0  # compiled native / ours, module call
MUST_COPY = {"forward": 1.35, "backward": 2.1}  # ours / copy, at most, output mapped
MUST_STEP = {"nchw": 1.2, "nhwc": 1.08}  # native / converted, ResNet-50 training step in fp32


@dataclass(frozen=True)
class Row:
    """Median seconds of each provider in one case, and how much others took of the processors."""

    shape: tuple[int, ...]
    layers: dict[str, int]
    dtype: str
    layout: str
    what: str
    seconds: dict[str, float]
    disturbance: float

    @property
    def kind(self) -> str:
        return f"{self.dtype} {self.layout}"

    @property
    def gigabytes_per_second(self) -> float:
        size = prod(self.shape) * DTYPES[self.dtype].itemsize
        return TRAFFIC[self.what] * size / self.seconds["ours"] / 1e9

    def times(self, peer: str) -> float | None:
        """How many times faster than the peer; against the copy, how many times its time."""
        if peer not in self.seconds:
            return None
        ratio = self.seconds[peer] / self.seconds["ours"]
        return 1 / ratio if peer == "copy" else ratio

    def __str__(self) -> str:
        return f"{shape_name(self.shape)} {self.kind}"


@dataclass(frozen=True)
class Verdict:
    """One must: what was asked, what was measured (None: nothing was), and where."""

    what: str
    must: float
    value: float | None
    at_most: bool = False
    where: str = ""

    @property
    def word(self) -> str:
        if self.value is None:
            return "not measured"
        met = self.value <= self.must if self.at_most else self.value >= self.must
        return "PASS" if met else "MISS"


def shape_name(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def select(rows: Iterable[Row], kind: str = "", what: str = "", network: str = "") -> list[Row]:
    return [
        row
        for row in rows
        if kind in ("", row.kind)
        and what in ("", row.what)
        and (not network or network in row.layers)
    ]


def mean_times(rows: Iterable[Row], peer: str) -> float | None:
    ratios = [ratio for row in rows if (ratio := row.times(peer)) is not None]
    return geometric_mean(ratios) if ratios else None


def worst(rows: Iterable[Row], peer: str) -> Row | None:
    """The case where the peer is nearest to ours, or furthest ahead."""
    measured = [row for row in rows if peer in row.seconds]
    if not measured:
        return None
    return (max if peer == "copy" else min)(measured, key=lambda row: row.times(peer))


def network_times(rows: Iterable[Row], network: str, peer: str) -> float | None:
    """The ratio of the times of all layers of a network together."""
    rows = [row for row in select(rows, network=network) if peer in row.seconds]

    def total(provider: str) -> float:
        return sum(row.layers[network] * row.seconds[provider] for row in rows)

    return total(peer) / total("ours") if rows else None


def kinds() -> list[str]:
    return [f"{dtype} {layout}" for dtype in DTYPES for layout in LAYOUTS]


def disturbed(rows: Iterable[Row]) -> str:
    """A sentence on how alone the process was."""
    rows = list(rows)
    count = sum(row.disturbance > DISTURBED for row in rows)
    return (
        f"In {count} of {len(rows)} rows other processes took more than {DISTURBED:.0%} of the "
        "processors' time."
    )


def layer_verdicts(rows: list[Row]) -> list[Verdict]:
    """The musts on single layers, but for those against the copy."""
    verdicts = [
        Verdict(f"{what}, {kind}, ResNet-50 shapes, geometric mean, x native", must, value)
        for what, musts in MUST_LAYERS.items()
        for kind, must in musts.items()
        for value in [mean_times(select(rows, kind, what, "resnet50"), "native")]
    ]
    for what in PASSES:
        verdicts.append(least(f"{what}, every case, x native", NOISE, select(rows, what=what)))
    for shape, must in MUST_SMALL.items():
        small = [row for row in select(rows, what="module") if row.shape == shape]
        verdicts.append(least(f"module call at {shape_name(shape)}, x native", must, small))
    compiled = mean_times(select(rows, what="module", network="resnet50"), "compile")
    what = "module call, ResNet-50 shapes, geometric mean, x compiled native"
    return [*verdicts, Verdict(what, MUST_COMPILE, compiled)]


def least(what: str, must: float, rows: list[Row]) -> Verdict:
    row = worst(rows, "native")
    return Verdict(what, must, row and row.times("native"), where=str(row or ""))


def copy_verdicts(rows: list[Row]) -> list[Verdict]:
    """The musts against the copy, on rows of large inputs measured with the output mapped."""
    verdicts = []
    for what, must in MUST_COPY.items():
        for kind in kinds():
            if group := select(rows, kind, what):
                name = f"large {kind} {what}, output mapped, geometric mean, time / copy"
                verdicts.append(Verdict(name, must, mean_times(group, "copy"), at_most=True))
    return verdicts


def step_verdicts(steps: list[dict]) -> list[Verdict]:
    """The musts on the training step, from the rows of model.py."""
    measured = {
        step["layout"]: step["seconds"]["native"] / step["seconds"]["ours"]
        for step in steps
        if (step["network"], step["dtype"]) == ("resnet50", "fp32")
    }
    return [
        Verdict(f"ResNet-50 training step, fp32 {layout}, x native", must, measured.get(layout))
        for layout, must in MUST_STEP.items()
    ]


def save(path: Path, kind: str, environment: dict, settings: dict, rows: list) -> None:
    """One file per run: what ran ("layers", "mapped" or "steps"), where, how, and the rows."""
    rows = [asdict(row) if isinstance(row, Row) else row for row in rows]
    content = {"kind": kind, "environment": environment, "settings": settings, "rows": rows}
    path.write_text(json.dumps(content, indent=1) + "\n")


def load(path: Path) -> dict:
    content = json.loads(path.read_text())
    if content["kind"] != "steps":
        content["rows"] = [Row(**{**row, "shape": tuple(row["shape"])}) for row in content["rows"]]
    return content
