"""Results as plain tables: strings that bench.py and model.py print and report.py writes."""

from dataclasses import dataclass
from statistics import geometric_mean

from rich.console import Console
from rich.table import Table as RichTable

from plan import Gpu, Plan, Request
from results import (
    PASSES,
    TRAFFIC,
    Row,
    Verdict,
    kinds,
    mean_times,
    network_times,
    select,
    shape_name,
    sync_times,
    worst,
)


@dataclass(frozen=True)
class Table:
    title: str
    header: list[str]
    rows: list[list[str]]
    footer: int = 0  # how many of the last rows are aggregates

    def print(self, console: Console) -> None:
        table = RichTable(title=self.title, title_justify="left")
        for i, name in enumerate(self.header):
            table.add_column(name, justify="right" if i else "left", no_wrap=True)
        for i, row in enumerate(self.rows):
            table.add_row(*row, end_section=i == len(self.rows) - self.footer - 1)
        console.print(table)

    def markdown(self) -> str:
        lines = [self.header, ["---"] + ["---:"] * (len(self.header) - 1), *self.rows]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for scale, unit in [(1, "s"), (1e3, "ms")]:
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


PEERS = ("native", "compile", "copy")


def peers_in(rows: list[Row]) -> list[str]:
    return [peer for peer in (*PEERS, "aten") if any(peer in row.seconds for row in rows)]


def case_table(rows: list[Row], kind: str, what: str) -> Table:
    """Every case of one pass, dtype and layout; geometric means and minima last."""
    rows = select(rows, kind, what)
    peers = peers_in(rows)
    cases = [
        [
            shape_name(row.shape),
            " ".join(f"{network} {count}" for network, count in row.layers.items()) or "-",
            *(duration(row.seconds.get(provider)) for provider in ("ours", *peers)),
            f"{row.gigabytes_per_second:.1f}",
            *(ratio(row.times(peer)) for peer in peers),
        ]
        for row in rows
    ]
    footer = []
    for name, group in [("all", rows), ("ResNet-50", select(rows, network="resnet50"))]:
        if not group:
            continue
        worsts = [worst(group, peer) for peer in peers]
        means = [ratio(mean_times(group, peer)) for peer in peers]
        extremes = [ratio(row and row.times(peer)) for row, peer in zip(worsts, peers, strict=True)]
        blank = [""] * (len(peers) + 3)
        footer.append([f"geometric mean, {name}", *blank, *means])
        footer.append([f"worst, {name}", *blank, *extremes])
    header = ["shape", "layers", "ours", *peers, "GB/s", *(f"x {peer}" for peer in peers)]
    return Table(f"{what}, {kind}", header, cases + footer, len(footer))


def summary_table(rows: list[Row]) -> Table:
    """A line per pass, dtype and layout: geometric means over the distinct layer shapes."""
    lines = []
    for what in PASSES:
        for kind in kinds():
            group = select(rows, kind, what)
            if not group:
                continue
            resnet = select(group, network="resnet50")
            slowest = worst(group, "native")
            lines.append(
                [
                    f"{what}, {kind}",
                    *(ratio(mean_times(resnet, peer)) for peer in PEERS),
                    ratio(network_times(group, "resnet50", "native")),
                    ratio(mean_times(select(group, network="mobilenetv2"), "native")),
                    ratio(mean_times(group, "native")),
                    f"{slowest.times('native'):.2f} at {shape_name(slowest.shape)}",
                ]
            )
    header = [
        "pass",
        "ResNet-50",
        "x compiled",
        "x copy",
        "summed layers",
        "MobileNetV2",
        "all",
        "least",
    ]
    title = "Geometric means over the shapes, x native (x compiled, x copy, sum: of ResNet-50)"
    return Table(title, header, lines)


def shapes_table(rows: list[Row], network: str) -> Table:
    """A line per layer shape of the network: x native, forward and backward."""
    present = [kind for kind in kinds() if select(rows, kind)]
    columns = [(what, kind) for what in ("forward", "backward") for kind in present]
    found: dict[tuple[int, ...], dict] = {}
    for row in select(rows, network=network):
        line = found.setdefault(row.shape, {"layers": row.layers[network]})
        line[row.what, row.kind] = ratio(row.times("native"))
    lines = [
        [shape_name(shape), str(line["layers"]), *(line.get(column, "") for column in columns)]
        for shape, line in found.items()
    ]
    header = ["shape", "layers", *(f"{what} {kind}" for what, kind in columns)]
    return Table(f"x native over the layer shapes of {network}", header, lines)


def mapped_table(rows: list[Row]) -> Table:
    lines = [
        [
            shape_name(row.shape),
            f"{row.what}, {row.kind}",
            duration(row.seconds["ours"]),
            duration(row.seconds["copy"]),
            ratio(row.times("copy")),
            ratio(row.times("native")),
        ]
        for row in rows
    ]
    header = ["shape", "pass", "ours", "copy", "time / copy", "x native"]
    return Table("Large inputs with the output mapped already", header, lines)


def step_table(steps: list[dict]) -> Table:
    lines = [
        [
            f"{step['network']}, {step['dtype']} {step['layout']}, batch {step['batch']}"
            + (", compiled" if step.get("compiled") else ""),
            duration(step["seconds"]["native"]),
            duration(step["seconds"]["ours"]),
            ratio(step["seconds"]["native"] / step["seconds"]["ours"]),
            *(f"{share:.0%}" for share in step["norm share"].values()),
        ]
        for step in steps
    ]
    header = ["training step", "native", "converted", "x native"]
    if any(step["norm share"] for step in steps):
        header += ["BN share native", "converted"]
    return Table("Training step: forward, loss, backward, SGD", header, lines)


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def mean_share(rows: list[Row]) -> float | None:
    return geometric_mean(row.share_of_floor for row in rows) if rows else None


def gpu_table(rows: list[Row]) -> Table:
    """A line per pass, dtype, layout and batch: geometric means over the shapes."""
    lines = []
    for what in PASSES:
        for kind in kinds():
            group = select(rows, kind, what)
            batches = sorted({row.shape[0] for row in select(group, network="resnet50")})
            for batch in batches:
                resnet = [r for r in select(group, network="resnet50") if r.shape[0] == batch]
                slowest = worst(resnet, "native")
                lines.append(
                    [
                        f"{what}, {kind}, batch {batch}",
                        percent(mean_share([r for r in resnet if r.bytes >= 100e6])),
                        percent(mean_share([r for r in resnet if 25e6 <= r.bytes < 100e6])),
                        percent(mean_share([r for r in resnet if r.bytes < 25e6])),
                        *(
                            ratio(mean_times(resnet, peer))
                            for peer in ("native", "aten", "compile")
                        ),
                        f"{slowest.times('native'):.2f} at {shape_name(slowest.shape)}",
                    ]
                )
    header = [
        "ResNet-50 layers",
        ">= 100 MB",
        "25 to 100 MB",
        "< 25 MB",
        "x native",
        "x ATen",
        "x compiled",
        "least x native",
    ]
    return Table("Share of the floor by size of the tensor, and times faster", header, lines)


def plan_table(gpu: Gpu, requests: list[Request], plans: list[Plan]) -> Table:
    """A line per launch plan: how the tensor is cut up, and what that moves."""
    lines = [
        [
            f"{shape_name(request.shape)} {request.layout} {8 * request.element_bytes} bit",
            request.what,
            plan.pattern,
            plan.policy,
            str(plan.ranks),
            str(plan.width),
            str(plan.blocks),
            f"{plan.passes:.1f}",
            f"{plan.bytes / 1e6:.2f}",
            duration(plan.bytes / gpu.bandwidth),
            plan.rule,
        ]
        for request, plan in zip(requests, plans, strict=True)
    ]
    header = ["case", "pass", "pattern", "policy", "ranks", "width", "blocks", "passes", "MB"]
    title = f"Plans for an {gpu.name}; time: the bytes at {gpu.bandwidth / 1e12:g} TB/s"
    return Table(title, [*header, "time", "rule"], lines)


def plan_totals(gpu: Gpu, requests: list[Request], plans: list[Plan]) -> Table:
    """A line per pass and policy: how many plans, and their traffic against the least."""
    groups: dict[tuple[str, str], list[Plan]] = {}
    for request, plan in zip(requests, plans, strict=True):
        groups.setdefault((request.what, plan.policy), []).append(plan)
    lines = []
    for (what, policy), group in groups.items():
        passes = {plan.passes for plan in group}
        moved = sum(plan.bytes for plan in group)
        least = sum(TRAFFIC[what] * plan.elements * plan.element_bytes for plan in group)
        lines.append(
            [
                f"{what}, {policy}",
                str(len(group)),
                " ".join(f"{p:.1f}" for p in sorted(passes)),
                f"{moved / 1e9:.2f}",
                duration(moved / gpu.bandwidth),
                ratio(moved / least),
            ]
        )
    header = ["pass, policy", "cases", "passes", "GB", "time", "x least traffic"]
    return Table(f"Totals for an {gpu.name}", header, lines)


def sync_table(rows: list[dict], ranks: int, batch: int) -> Table:
    """A line per layer shape, on so many ranks with so large batches; geometric means last."""
    rows = [row for row in rows if (row["ranks"], row["batch"]) == (ranks, batch)]
    peers = [name for name in rows[0]["seconds"] if name != "ours"]
    lines = [
        [
            shape_name(row["shape"]),
            str(row["layers"]),
            *(duration(row["seconds"][name]) for name in ("ours", *peers)),
            duration(row["messages"]["all_reduce float64"]),
        ]
        for row in rows
    ]
    means = [ratio(sync_times(rows, peer)) for peer in peers]
    lines.append(["x ours, mean over the layers", "", "", *means, ""])
    header = ["shape", "layers", "ours", *peers, "message"]
    return Table(f"{ranks} ranks, batch {batch} each", header, lines, footer=1)


def verdict_table(verdicts: list[Verdict]) -> Table:
    lines = [
        [v.what, f"{'<=' if v.at_most else '>='} {v.must:g}", ratio(v.value), v.word, v.where]
        for v in verdicts
    ]
    return Table("Musts", ["what", "must", "measured", "verdict", "worst case"], lines)
