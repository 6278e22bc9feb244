"""Measured rows, what is derived from them, and the musts they are held against."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from math import inf, prod
from pathlib import Path
from statistics import geometric_mean

from cases import DTYPES, LAYOUTS
from timing import DISTURBED

# Times that the least memory traffic touches one tensor of x's size: read x and write y; read x
# and dy and write dx; both.
TRAFFIC = {"forward": 2, "backward": 3, "eval": 2, "module": 5}
PASSES = tuple(TRAFFIC)
KINDS = ("layers", "mapped", "steps", "sync", "gpu layers", "gpu steps")  # of files

NOISE = 0.95  # "never slower than native" in a single case, on a machine with noise
MUST_LAYERS = {  # native / ours, geometric mean over the ResNet-50 shapes
    "forward": {"fp32 nchw": 3.5, "fp32 nhwc": 1.5, "bf16 nchw": 3.0, "bf16 nhwc": 2.0},
    "backward": {"fp32 nchw": 1.8, "fp32 nhwc": 2.0, "bf16 nchw": 2.5, "bf16 nhwc": 2.5},
    "eval": {"fp32 nchw": 1.5, "fp32 nhwc": 1.5, "bf16 nchw": 1.5, "bf16 nhwc": 1.5},
}
MUST_SMALL = {(8, 16, 8, 8): 1.2, (32, 64): 1.2}  # native / ours, module call
MUST_COMPILE = 4.0  # compiled native / ours, module call
MUST_COPY = {"forward": 1.35, "backward": 2.1}  # ours / copy, at most, output mapped
MUST_SYNC = {"native's algorithm": 1.1, "plain torch": 2.0}  # theirs / ours, layer on 2 ranks
MUST_SYNC_OVERHEAD = 1.1  # ours without the time in collectives / our local layer, at most
MUST_STEP = {"nchw": 1.2, "nhwc": 1.08}  # native / converted, ResNet-50 training step in fp32

# On an H200: share of the floor, at least, by layout and megabytes. Channels-last layers of 56x56
# and 112x112 at batch 256 exceed what a GPU keeps on chip, and have a must of their own.
MUST_FLOOR = [
    ("nchw", 100, inf, {"forward": 0.80, "backward": 0.80}),
    ("nchw", 25, 100, {"forward": 0.65, "backward": 0.65}),
    ("nhwc", 50, inf, {"forward": 0.70, "backward": 0.70}),
]
MUST_FLOOR_WIDE = {"forward": 0.60, "backward": 0.52}
MUST_SMALL_SECONDS = 8e-6  # forward, NCHW up to 6.4 MB
MUST_NATIVE = [  # native / ours, geometric mean over the ResNet-50 shapes
    ("bf16 nchw", {"forward": 5.0, "backward": 5.0}),
    ("fp32 nchw", {"forward": 2.5, "backward": 2.5}),
    ("fp16 nchw", {"forward": 2.5, "backward": 2.5}),
    ("fp16 nhwc", {"forward": 1.15, "backward": 1.4}),
]


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
    def bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def gigabytes_per_second(self) -> float:
        return TRAFFIC[self.what] * self.bytes / self.seconds["ours"] / 1e9

    @property
    def share_of_floor(self) -> float:
        """The least time at the rate of the copy, which reads once and writes once, over ours."""
        return TRAFFIC[self.what] / 2 * self.seconds["copy"] / self.seconds["ours"]

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


@dataclass(frozen=True)
class Alone:
    """How many of the measurements other processes disturbed."""

    disturbed: int
    measured: int

    @classmethod
    def of(cls, rows: Iterable[Row | dict]) -> "Alone":
        """Of layer rows, or of the steps of model.py."""
        values = [r.disturbance if isinstance(r, Row) else r["disturbance"] for r in rows]
        return cls(sum(value > DISTURBED for value in values), len(values))

    @property
    def enough(self) -> bool:
        return self.disturbed <= self.measured / 10

    def __str__(self) -> str:
        return (
            f"In {self.disturbed} of {self.measured} measurements other processes took more than "
            f"{DISTURBED:.0%} of the processors' time."
        )


def mean_verdict(rows: list[Row], what: str, peer: str, must: float, **kwargs) -> Verdict:
    """On a geometric mean; it says of how many shapes, as a run may leave some out."""
    shapes = len({row.shape for row in rows if peer in row.seconds})
    name = f"{what}, geometric mean of {shapes} shapes"
    return Verdict(name, must, mean_times(rows, peer), **kwargs)


def least_verdict(rows: list[Row], what: str, must: float) -> Verdict:
    """On the smallest speed-up over native."""
    row = worst(rows, "native")
    name = f"{what}, least of {len(rows)} cases, x native"
    return Verdict(name, must, row and row.times("native"), where=str(row or ""))


def layer_verdicts(rows: list[Row]) -> list[Verdict]:
    """The musts on single layers, but for those against the copy."""
    verdicts = []
    for what, musts in MUST_LAYERS.items():
        for kind, must in musts.items():
            group = select(rows, kind, what, "resnet50")
            verdicts.append(
                mean_verdict(group, f"{what} {kind}, ResNet-50, x native", "native", must)
            )
    for what in PASSES:
        verdicts.append(least_verdict(select(rows, what=what), what, NOISE))
    modules = select(rows, what="module")
    for shape, must in MUST_SMALL.items():
        small = [row for row in modules if row.shape == shape]
        verdicts.append(least_verdict(small, f"module call at {shape_name(shape)}", must))
    resnet = select(modules, network="resnet50")
    name = "module call, ResNet-50, x compiled native"
    return [*verdicts, mean_verdict(resnet, name, "compile", MUST_COMPILE)]


def is_wide(row: Row) -> bool:
    """A channels-last layer that the goals treat apart."""
    return row.layout == "nhwc" and row.shape[0] >= 256 and row.shape[2:] in [(56, 56), (112, 112)]


def floor_verdict(rows: list[Row], what: str, must: float) -> Verdict:
    """On the smallest share of the floor."""
    row = min(rows, key=lambda row: row.share_of_floor, default=None)
    name = f"{what}, least of {len(rows)} cases, share of the floor"
    return Verdict(name, must, row and row.share_of_floor, where=str(row or ""))


def gpu_verdicts(rows: list[Row]) -> list[Verdict]:
    """The musts on a GPU, which are for an H200."""
    verdicts = []
    for layout, least, most, musts in MUST_FLOOR:
        size = f"{least} to {most} MB" if most < inf else f">= {least} MB"
        for what, must in musts.items():
            group = [
                row
                for row in select(rows, what=what)
                if row.layout == layout and least <= row.bytes / 1e6 < most and not is_wide(row)
            ]
            verdicts.append(floor_verdict(group, f"{what} {layout} {size}", must))
    for what, must in MUST_FLOOR_WIDE.items():
        group = [row for row in select(rows, what=what) if is_wide(row)]
        verdicts.append(floor_verdict(group, f"{what} nhwc 56x56, 112x112 at batch 256", must))
    small = [r for r in select(rows, what="forward") if r.layout == "nchw" and r.bytes <= 6.4e6]
    slowest = max(small, key=lambda row: row.seconds["ours"], default=None)
    microseconds = slowest and 1e6 * slowest.seconds["ours"]
    name = f"forward nchw <= 6.4 MB, slowest of {len(small)} cases, microseconds"
    where = str(slowest or "")
    verdicts.append(
        Verdict(name, 1e6 * MUST_SMALL_SECONDS, microseconds, at_most=True, where=where)
    )
    for kind, musts in MUST_NATIVE:
        for what, must in musts.items():
            group = select(rows, kind, what, "resnet50")
            name = f"{what} {kind}, ResNet-50, x native"
            verdicts.append(mean_verdict(group, name, "native", must))
    return verdicts + [least_verdict(select(rows, what=what), what, 1.0) for what in PASSES[:3]]


def copy_verdicts(rows: list[Row]) -> list[Verdict]:
    """The musts against the copy, on rows of large inputs measured with the output mapped."""
    verdicts = []
    for what, must in MUST_COPY.items():
        for kind in kinds():
            if group := select(rows, kind, what):
                name = f"{what} {kind}, large, output mapped, time / copy"
                verdicts.append(mean_verdict(group, name, "copy", must, at_most=True))
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


def sync_mean(rows: Iterable[dict], ratio: Callable[[dict[str, float]], float]) -> float | None:
    """The geometric mean of a ratio of times, each row counting as often as the network has it."""
    ratios = [ratio(row["seconds"]) for row in rows for _ in range(row["layers"])]
    return geometric_mean(ratios) if ratios else None


def sync_times(rows: Iterable[dict], peer: str) -> float | None:
    """Peer / ours, where the peer was measured."""
    rows = [row for row in rows if peer in row["seconds"]]
    return sync_mean(rows, lambda seconds: seconds[peer] / seconds["ours"])


def sync_overhead(rows: Iterable[dict]) -> float | None:
    """Our layer without the time inside the collectives / our local one."""
    return sync_mean(rows, lambda s: (s["free messages"] - s["free calls"]) / s["local"])


def sync_verdicts(rows: list[dict]) -> list[Verdict]:
    """The musts on SyncBatchNorm on two ranks, from the rows of bench_sync.py."""
    verdicts = []
    for batch in sorted({row["batch"] for row in rows}):
        group = [row for row in rows if (row["ranks"], row["batch"]) == (2, batch)]
        where = f"batch {batch}, ResNet-50 layers"
        for peer, must in MUST_SYNC.items():
            verdicts.append(Verdict(f"{where}, x {peer}", must, sync_times(group, peer)))
        name = f"{where}, without the collectives, time / local layer"
        overhead = sync_overhead(group)
        verdicts.append(Verdict(name, MUST_SYNC_OVERHEAD, overhead, at_most=True))
    return verdicts


def save(path: Path, kind: str, environment: dict, settings: dict, rows: list) -> None:
    """One file per run: what ran (of KINDS), where, how, and the rows."""
    rows = [asdict(row) if isinstance(row, Row) else row for row in rows]
    content = {"kind": kind, "environment": environment, "settings": settings, "rows": rows}
    path.write_text(json.dumps(content, indent=1) + "\n")


def load(path: Path) -> dict:
    content = json.loads(path.read_text())
    if content["kind"] in ("layers", "mapped", "gpu layers"):
        content["rows"] = [Row(**{**row, "shape": tuple(row["shape"])}) for row in content["rows"]]
    return content
