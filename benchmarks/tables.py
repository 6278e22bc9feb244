"""Results as plain tables: strings that bench.py and model.py print and report.py writes."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table as RichTable

from results import (
    PASSES,
    Row,
    Verdict,
    kinds,
    mean_times,
    network_times,
    select,
    shape_name,
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


PROVIDERS = ("ours", "native", "compile", "copy")
PEERS = PROVIDERS[1:]
PEER_HEADER = ["x native", "x compile", "x copy"]


def case_table(rows: list[Row], kind: str, what: str) -> Table:
    """Every case of one pass, dtype and layout; geometric means and minima last."""
    rows = select(rows, kind, what)
    cases = [
        [
            shape_name(row.shape),
            " ".join(f"{network} {count}" for network, count in row.layers.items()) or "-",
            *(duration(row.seconds.get(provider)) for provider in PROVIDERS),
            f"{row.gigabytes_per_second:.1f}",
            *(ratio(row.times(peer)) for peer in PEERS),
        ]
        for row in rows
    ]
    footer = []
    for name, group in [("all", rows), ("ResNet-50", select(rows, network="resnet50"))]:
        if not group:
            continue
        worsts = [worst(group, peer) for peer in PEERS]
        means = [ratio(mean_times(group, peer)) for peer in PEERS]
        extremes = [ratio(row and row.times(peer)) for row, peer in zip(worsts, PEERS, strict=True)]
        footer.append([f"geometric mean, {name}", *[""] * 6, *means])
        footer.append([f"worst, {name}", *[""] * 6, *extremes])
    header = ["shape", "layers", *PROVIDERS, "GB/s", *PEER_HEADER]
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
    columns = [(what, kind) for what in ("forward", "backward") for kind in kinds()]
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
            f"{step['network']}, {step['dtype']} {step['layout']}, batch {step['batch']}",
            duration(step["seconds"]["native"]),
            duration(step["seconds"]["ours"]),
            ratio(step["seconds"]["native"] / step["seconds"]["ours"]),
            f"{step['norm share']['native']:.0%}",
            f"{step['norm share']['ours']:.0%}",
        ]
        for step in steps
    ]
    header = ["training step", "native", "converted", "x native", "BN share native", "converted"]
    return Table("Training step: forward, loss, backward, SGD", header, lines)


def verdict_table(verdicts: list[Verdict]) -> Table:
    lines = [
        [v.what, f"{'<=' if v.at_most else '>='} {v.must:g}", ratio(v.value), v.word, v.where]
        for v in verdicts
    ]
    return Table("Musts", ["what", "must", "measured", "verdict", "worst case"], lines)
