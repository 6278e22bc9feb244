"""Writes the tables of README.md and docs/*.md from the files in benchmarks/results.

    python benchmarks/report.py          # after new files in benchmarks/results
    python benchmarks/report.py --check  # fails where a table is not that of the results

A table stands between `<!-- bench:NAME:begin -->` and `<!-- bench:NAME:end -->`. Needs no torch.
"""

import argparse
import re
from itertools import product
from pathlib import Path

import pandas as pd

import musts
import results
from results import LAYOUTS, PASSES, mean, select

ROOT = Path(__file__).resolve().parent.parent
NOTHING = "Not measured yet."
DISTURBED = 0.1  # a measurement is disturbed if other processes used more of the processors
ALLOCATORS = ("glibc", "tcmalloc")
KINDS = [f"{dtype} {layout}" for dtype in results.DTYPES for layout in LAYOUTS]
SIZES = {">= 100 MB": (100, 1e9), "25 to 100 MB": (25, 100), "< 25 MB": (0, 25)}
COMPARED = ("native, ms", "converted, ms", "x native")


def table(lines: list[list], header: list[str]) -> str:
    frame = pd.DataFrame(lines, columns=header).map(cell)
    alignment = ["left"] + ["right"] * (len(header) - 1)
    return frame.to_markdown(index=False, disable_numparse=True, colalign=alignment)


def cell(value) -> str:
    if isinstance(value, str):
        return value.replace("|", r"\|")
    return "" if pd.isna(value) else f"{value:.2f}" if isinstance(value, float) else str(value)


def compared(native: float, ours: float) -> list:
    return [f"{native:.4g}", f"{ours:.4g}", native / ours]


def overview(files: dict[str, pd.DataFrame]) -> str:
    """Training steps, then all layers of ResNet-50 together: one line each, both allocators."""
    lines: dict[str, dict[str, list]] = {}
    for allocator in [name for name in ALLOCATORS if f"steps-{name}" in files]:
        for row in files[f"steps-{allocator}"].itertuples():
            name = f"{results.NETWORKS[row.network]}, training step, {row.layout}, {row.mode}"
            lines.setdefault(name, {})[allocator] = compared(row.native, row.ours)
    for allocator in [name for name in ALLOCATORS if f"layers-{name}" in files]:
        rows = select(files[f"layers-{allocator}"], "module", network="resnet50")
        for kind, group in rows.groupby("kind", sort=False):
            total = group[["native", "ours"]].mul(group.resnet50, axis=0).sum()
            lines.setdefault(f"ResNet-50, all layers, {kind}", {})[allocator] = compared(*total)
    cells = [
        [name, *sum((found.get(a, [""] * 3) for a in ALLOCATORS), [])]
        for name, found in lines.items()
    ]
    return table(cells, ["", *(f"{a}: {column}" for a in ALLOCATORS for column in COMPARED)])


def layer_table(rows: pd.DataFrame) -> str:
    """A line per pass, dtype, layout and batch: geometric means over distinct layer shapes."""
    lines = []
    batches = rows["shape"].str.split("x").str[0].astype(int)
    keys = product(PASSES, KINDS, sorted(batches[rows.resnet50 > 0].unique()))
    for what, kind, batch in keys:
        group = select(rows[batches == batch], what, kind)
        resnet = select(group, network="resnet50")
        floors = [mean(resnet.over_floor[resnet.mb.between(*s, "left")]) for s in SIZES.values()]
        value, where = musts.worst(group, "x")
        if where:
            means = mean(resnet.x), *floors, mean(select(group, network="mobilenetv2").x)
            least = f"{value:.2f} at {where.split()[0]}"
            lines.append([f"{what}, {kind}, batch {batch}", *means, least])
    header = ["", "x native", *(f"time / floor, {size}" for size in SIZES)]
    return table(lines, [*header, "MobileNetV2, x native", "least x native"])


def shapes_table(rows: pd.DataFrame) -> str:
    """Every layer shape of ResNet-50: speed-up over native / time over the floor."""
    rows = select(rows[rows["pass"] != "module"], network="resnet50")
    cells = [f"{x:.2f} / {floor:.2f}" for x, floor in zip(rows.x, rows.over_floor, strict=True)]
    columns = rows["pass"] + " " + rows.kind
    frame = rows.assign(column=columns, cell=cells).pivot(
        index="shape", columns="column", values="cell"
    )
    frame = frame.reindex(index=rows["shape"].unique(), columns=columns.unique()).reset_index()
    return table(frame.values.tolist(), list(frame))


def step_table(rows: pd.DataFrame) -> str:
    found = rows.itertuples(index=False)
    lines = [[" ".join(map(str, row[:5])), *compared(row.native, row.ours)] for row in found]
    return table(lines, ["network, dtype, layout, batch, mode", *COMPARED])


def fused_steps_table(rows: pd.DataFrame) -> str:
    lines = [
        [f"{results.NETWORKS[row.network]}, {row.layout}, {row.mode}"]
        + compared(row.native, row.fused)
        for row in rows.itertuples()
    ]
    return table(lines, ["training step", "native, ms", "fused, ms", "x native"])


def settings_table(rows: pd.DataFrame) -> str:
    lines = []
    for (setting, allocator), group in rows.groupby(["setting", "allocator"], sort=False):
        times = [compared(*pair) for pair in group[["native", "ours"]].values]
        lines.append([setting, allocator, *sum(times, [])])
    layouts = rows["layout"].unique()
    header = [f"{layout}: {column}" for layout in layouts for column in COMPARED]
    return table(lines, ["setting", "allocator in use", *header])


def sync_table(rows: pd.DataFrame) -> str:
    """Geometric means over the layers of ResNet-50, each as often as the network has it."""
    lines = []
    for (ranks, batch), group in rows.groupby(["ranks", "batch"]):
        group = group.loc[group.index.repeat(group.resnet50)]
        ratios = group.native / group.ours, group.plain / group.ours, group.ours / group.local
        name = f"{ranks} ranks, batch {batch} each"
        lines.append([name, f"{group.ours.sum():.4g}", *map(mean, ratios)])
    header = ["", "all layers, ms", "x native's algorithm", "x plain PyTorch", "time / local layer"]
    return table(lines, header)


def family_table(rows: pd.DataFrame) -> str:
    """Each norm, dtype and layout: geometric means over its shapes, and the least."""
    lines, columns = [], [name for name in ("native", "hand", "compiled") if name in rows]
    whole = {"module": ""}  # forward and backward
    for (norm, kind, what), group in rows.groupby(["norm", "kind", "pass"], sort=False):
        ratios = [mean(group[name] / group.ours) for name in columns]
        value, where = musts.worst(group, "x")
        least = f"{value:.2f} at {where.split()[0]}"
        label = f"{norm}, {kind}{whole.get(what, f', {what}')}"
        lines.append([label, *ratios, mean(group.over_floor), least])
    header = [f"x {name}" for name in columns]
    passes = "" if whole.keys().isdisjoint(rows["pass"]) else "forward and backward"
    return table(lines, [passes, *header, "time / floor", "least x native"])


def must_table(verdicts: list[list[str]]) -> str:
    return table([line for line in verdicts if "not measured" not in line], musts.HEADER)


def layer_report(rows: pd.DataFrame) -> str:
    """What bench.py prints at its end."""
    verdicts = (musts.gpu_verdicts if "gpu" in rows.attrs else musts.layer_verdicts)(rows)
    met, missed = (sum(word in line for line in verdicts) for word in ("PASS", "MISS"))
    parts = layer_table(rows), must_table(verdicts), f"{met} of {met + missed} musts met"
    return "\n\n".join(parts)


def described(machine: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in machine.items()) + "."


def machine_line(name: str, rows: pd.DataFrame) -> str:
    """How a file was measured; refuses one with more than a tenth of its rows disturbed."""
    if "disturbance" not in rows:
        return f"- {name}: {described(rows.attrs)}"
    disturbed = int((rows.disturbance > DISTURBED).sum())
    if disturbed > len(rows) / 10:
        raise SystemExit(f"{name}: {disturbed} of {len(rows)} rows were disturbed: measure again")
    used = f"other processes used more than {DISTURBED:.0%} of the processors"
    return f"- {name}: {described(rows.attrs)} In {disturbed} of {len(rows)} rows {used}."


def load(directory: Path) -> dict[str, pd.DataFrame]:
    files = {path.stem: results.read(path) for path in sorted(directory.glob("*.csv"))}
    if quick := [name for name, rows in files.items() if "quick" in rows.attrs]:
        raise SystemExit(f"{', '.join(quick)}: a --quick run is no measurement")
    return files


def gpu_block(directory: Path) -> str:
    """What gpu_run.py found."""
    files = load(directory)
    stages = files["stages"]
    parts = [described(stages.attrs), table(stages.values.tolist(), list(stages))]
    if layers := [rows for name, rows in files.items() if name.startswith("layers")]:
        rows = pd.concat(layers, ignore_index=True)
        rows = rows.drop_duplicates(["pass", "dtype", "layout", "shape"])
        parts += [layer_table(rows), must_table(musts.gpu_verdicts(rows))]
    tables = {"family": family_table, "steps": step_table}
    parts += [make(files[name]) for name, make in tables.items() if name in files]
    if "fused" in files:
        parts += [described(files["fused"].attrs), family_table(files["fused"])]
    return "\n\n".join(parts)


def blocks(directory: Path) -> dict[str, str]:
    """Marker name -> markdown, of all that was measured."""
    files = load(directory)
    keys = ("cpu", "cores", "torch", "commit", "date")
    named = [rows for name, rows in files.items() if name.startswith(("layers", "steps"))]
    machines = {described({key: rows.attrs[key] for key in keys}) for rows in named}
    found = {"machine": " ".join(sorted(machines))}
    found["machines"] = "\n".join(machine_line(*item) for item in files.items())
    if any(name.startswith(("layers", "steps")) for name in files):
        found["results"] = overview(files)
    tables = {"settings": settings_table, "sync": sync_table}
    for allocator in ALLOCATORS:
        tables |= {f"layers-{allocator}": layer_table, f"shapes-{allocator}": shapes_table}
        tables[f"family-{allocator}"] = family_table
        files[f"shapes-{allocator}"] = files.get(f"layers-{allocator}")
        tables |= {f"fused-{allocator}": family_table}
        steps = files.get(f"steps-{allocator}")
        if steps is not None and "fused" in steps:
            found[f"fused-steps-{allocator}"] = fused_steps_table(steps)
    found |= {
        name: make(files[name]) for name, make in tables.items() if files.get(name) is not None
    }
    judges = {"layers-tcmalloc": musts.layer_verdicts, "steps-tcmalloc": musts.step_verdicts}
    verdicts = [
        line for name, judge in judges.items() if name in files for line in judge(files[name])
    ]
    if verdicts:
        found["musts"] = must_table(verdicts)
    # the newest of the directories <gpu>-<year>-<month>-<day>
    runs = sorted(directory.glob("*/stages.csv"), key=lambda path: path.parent.name[-10:])
    return found | ({"gpu": gpu_block(runs[-1].parent)} if runs else {})


def fill(text: str, found: dict[str, str]) -> str:
    """The text with every marked block replaced."""
    marked = re.compile(r"(<!-- bench:(\S+):begin -->\n).*?(<!-- bench:\2:end -->)", re.DOTALL)
    return marked.sub(lambda m: f"{m[1]}{found.get(m[2]) or NOTHING}\n{m[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--results", type=Path, default=results.RESULTS)
    parser.add_argument("--root", type=Path, default=ROOT, help="where README.md and docs are")
    args = parser.parse_args()
    found, different = blocks(args.results), []
    for path in [args.root / "README.md", *sorted((args.root / "docs").glob("*.md"))]:
        text = path.read_text()
        if (filled := fill(text, found)) != text:
            different.append(path.name)
            if not args.check:
                path.write_text(filled)
    if args.check and different:
        raise SystemExit(f"{', '.join(different)}: run python benchmarks/report.py")
    print(f"tables written: {', '.join(different) or 'none'}")


if __name__ == "__main__":
    main()
