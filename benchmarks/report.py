"""Writes the tables of README.md and docs/*.md from the files in benchmarks/results.

    python benchmarks/report.py          # after new files in benchmarks/results
    python benchmarks/report.py --check  # fails where a table is not that of the results

A table stands between `<!-- bench:NAME:begin -->` and `<!-- bench:NAME:end -->`. What has not been
measured says so. Needs neither torch nor the library.
"""

import argparse
import re
from itertools import product
from pathlib import Path

import pandas as pd

import musts
from results import (
    CASE,
    DISTURBED,
    KINDS,
    LAYOUTS,
    NETWORKS,
    PASSES,
    RESULTS,
    derive,
    mean,
    read,
    select,
)

ROOT = Path(__file__).resolve().parent.parent
NOTHING = "Not measured yet."
ALLOCATORS = ("glibc", "tcmalloc")


def table(lines: list[list], header: list[str] | None = None) -> str:
    frame = pd.DataFrame(lines, columns=header).map(cell)
    alignment = ["left"] + ["right"] * (frame.shape[1] - 1)
    return frame.to_markdown(index=False, disable_numparse=True, colalign=alignment)


def cell(value) -> str:
    if isinstance(value, str):
        return value.replace("|", r"\|")
    return "" if pd.isna(value) else f"{value:.2f}" if isinstance(value, float) else str(value)


def duration(milliseconds: float) -> str:
    if pd.isna(milliseconds):
        return ""
    for scale, unit in (1e-3, "s"), (1, "ms"):
        if milliseconds * scale >= 1:
            return f"{milliseconds * scale:.3g} {unit}"
    return f"{milliseconds * 1e3:.3g} us"


def worst_name(rows: pd.DataFrame) -> str:
    value, where = musts.worst(rows, "x")
    return f"{value:.2f} at {where.split()[0]}" if where else ""


def overview(files: dict) -> str:
    """Training steps, then all layers of ResNet-50 together: one line each, both allocators."""

    def times(rows: pd.DataFrame, suffix: str = "") -> tuple[float, float]:
        columns = [f"native{suffix}", f"ours{suffix}"]
        return tuple(rows.reindex(columns=columns).sum(min_count=1))

    lines = []
    for (network, title), layout, suffix in product(NETWORKS.items(), LAYOUTS, ("", " compiled")):
        line = [f"{title} step, {layout.upper()}{',' * bool(suffix)}{suffix}"]
        for allocator in ALLOCATORS:
            rows = files.get(f"steps-{allocator}", pd.DataFrame({"network": [], "layout": []}))
            rows = rows[(rows.network == network) & (rows.layout == layout)]
            native, ours = times(rows, suffix)
            line += [duration(native), duration(ours), native / ours]
        lines.append(line)
    for kind in KINDS[:4]:
        line = [f"the 53 layers of ResNet-50, {kind.replace('nchw', 'NCHW').replace('nhwc', 'NHWC')}"]
        for allocator in ALLOCATORS:
            rows = files.get(f"layers-{allocator}")
            if rows is not None:
                rows = select(rows, "module", kind, "resnet50")
                rows = rows[["native", "ours"]].mul(rows.resnet50, axis=0)
            native, ours = times(pd.DataFrame() if rows is None else rows)
            line += [duration(native), duration(ours), native / ours]
        lines.append(line)
    return table(lines, ["", *[f"{a}: {c}" for a in ALLOCATORS for c in ("native", "ours", "x")]])


def summary_table(rows: pd.DataFrame) -> str:
    """A line per pass, dtype and layout: geometric means over the distinct layer shapes."""
    lines = []
    for what, kind in product(PASSES, KINDS):
        group = select(rows, what, kind)
        resnet = select(group, network="resnet50")
        if len(resnet):
            large = resnet[resnet.mb >= 50]
            line = [f"{what}, {kind}", mean(resnet.x), mean(resnet.over_floor)]
            line += [mean(large.x), mean(large.over_floor)]
            line += [mean(select(group, network="mobilenetv2").x), mean(group.x)]
            lines.append([*line, worst_name(group)])
    header = ["pass", "ResNet-50: x native", "/ floor", ">= 50 MB: x native", "/ floor"]
    return table(lines, [*header, "MobileNetV2: x native", "all: x native", "least x native"])


def shapes_table(rows: pd.DataFrame, network: str = "resnet50") -> str:
    """Every layer shape: speed-up over native, and time over the floor."""
    rows = select(rows, network=network)
    cells = rows.x.map("{:.2f}".format) + " / " + rows.over_floor.map("{:.2f}".format)
    columns = [(w, k) for w, k in product(PASSES[:3], KINDS) if len(select(rows, w, k))]
    found = dict(zip(zip(rows["shape"], rows["pass"], rows.kind, strict=True), cells, strict=True))
    counts = dict(zip(rows["shape"], rows[network], strict=True))
    lines = [
        [shape, str(count), *(found.get((shape, *column), "") for column in columns)]
        for shape, count in counts.items()
    ]
    return table(lines, ["shape", "layers", *(" ".join(column) for column in columns)])


def step_table(rows: pd.DataFrame) -> str:
    lines = []
    for row in rows.to_dict("records"):
        for suffix in ("", " compiled"):
            native, ours = row.get(f"native{suffix}"), row.get(f"ours{suffix}")
            if native and ours:
                name = f"{row['network']}, {row['dtype']} {row['layout']}, batch {row['batch']}"
                ratio = native / ours
                lines.append([name + "," * bool(suffix) + suffix, duration(native), duration(ours), ratio])
    return table(lines, ["training step", "native", "converted", "x native"])


def settings_table(rows: pd.DataFrame) -> str:
    lines = []
    for setting, group in rows.groupby("setting", sort=False):
        line = [f"`{setting}`", group.allocator.iloc[0]]
        for layout in LAYOUTS:
            times = group[group.layout == layout].iloc[0]
            line += [duration(times.native), duration(times.ours), times.native / times.ours]
        lines.append(line)
    header = [f"{lay.upper()}: {c}" for lay in LAYOUTS for c in ("native", "converted", "x")]
    return table(lines, ["setting", "allocator", *header])


def sync_table(rows: pd.DataFrame) -> str:
    """Geometric means over the layers of ResNet-50."""
    lines = []
    for (ranks, batch), group in rows.groupby(["ranks", "batch"]):
        means = musts.sync_means(group)
        total = duration((group.ours * group.resnet50).sum())
        lines.append([f"{ranks} ranks, batch {batch}", total, *means.values()])
    header = ["", "ours, sum of the layers", "x native's algorithm", "x plain PyTorch"]
    return table(lines, [*header, "without messages / local"])


def gpu_table(rows: pd.DataFrame) -> str:
    """A line per pass, dtype, layout and batch: geometric means over the ResNet-50 shapes."""
    lines = []
    resnet = select(rows, network="resnet50")
    batches = resnet["shape"].str.split("x").str[0].astype(int)
    for what, kind, batch in product(PASSES, KINDS, sorted(batches.unique())):
        group = select(resnet[batches == batch], what, kind)
        if len(group):
            bins = [(100, 1e9), (25, 100), (0, 25)]
            shares = [mean(1 / group.over_floor[group.mb.between(*b, "left")]) for b in bins]
            peers = [mean(group[p] / group.ours) for p in ("native", "aten", "compiled") if p in group]
            peers += [""] * (3 - len(peers))
            line = [f"{what}, {kind}, batch {batch}"]
            line += ["" if pd.isna(share) else f"{share:.0%}" for share in shares]
            lines.append([*line, *peers, worst_name(group)])
    header = ["ResNet-50 layers", ">= 100 MB", "25 to 100 MB", "< 25 MB"]
    return table(lines, [*header, "x native", "x ATen", "x compiled", "least x native"])


def must_table(verdicts: list[dict]) -> str:
    measured = [v for v in verdicts if v["verdict"] != "not measured"]
    return table([list(v.values()) for v in measured], list(verdicts[0]))


def disturbance(rows: pd.DataFrame) -> str:
    disturbed = int((rows.disturbance > DISTURBED).sum())
    if disturbed > len(rows) / 10:
        raise SystemExit(f"{disturbed} of {len(rows)} measurements were disturbed: measure again")
    used = f"other processes used more than {DISTURBED:.0%} of the processors"
    return f"In {disturbed} of {len(rows)} measurements {used}."


def machine_line(name: str, machine: dict, rows: pd.DataFrame) -> str:
    values = ", ".join(f"{key} {value}" for key, value in machine.items())
    return f"- {name}: {values}. {disturbance(rows)}"


def layer_report(machine: dict, rows: pd.DataFrame) -> str:
    """What bench.py prints at its end."""
    rows = derive(rows)
    if "gpu" in machine:
        tables = [gpu_table(rows), must_table(musts.gpu_verdicts(rows))]
    else:
        tables = [summary_table(rows), must_table(musts.layer_verdicts(rows))]
    return "\n\n".join(tables)


def load(directory: Path) -> tuple[dict, dict]:
    """Machine and rows by the names of the files."""
    machines, rows = {}, {}
    for path in sorted(directory.glob("*.csv")):
        machines[path.stem], rows[path.stem] = read(path)
        if "quick" in machines[path.stem]:
            raise SystemExit(f"{path.name} is of a --quick run, which is no measurement")
    return machines, rows


def gpu_layers(files: dict) -> pd.DataFrame | None:
    """All layers, each case once, from the measurement with the most contestants."""
    found = [rows for name, rows in files.items() if name.startswith("layers")]
    if not found:
        return None
    rows = pd.concat(found, ignore_index=True)
    order = rows.notna().sum(axis=1).sort_values(kind="stable").index
    return derive(rows.loc[order].drop_duplicates(CASE, keep="last").sort_index())


def gpu_block(directory: Path | None) -> str:
    if directory is None:
        return NOTHING
    machines, files = load(directory)
    stages = files["stages"]
    machine = ", ".join(f"{key} {value}" for key, value in machines["stages"].items())
    parts = [f"{machine}.", table(stages.astype(str).values.tolist(), list(stages))]
    layers = gpu_layers(files)
    if layers is not None:
        parts.append(gpu_table(layers))
    if "steps" in files:
        parts.append(step_table(files["steps"]))
    if layers is not None:
        parts.append(must_table(musts.gpu_verdicts(layers)))
    return "\n\n".join(parts)


def newest_gpu(directory: Path) -> Path | None:
    """Of the directories <gpu>-<year>-<month>-<day> that hold a run."""
    found = [path.parent for path in directory.glob("*/stages.csv")]
    return max(found, key=lambda path: path.name[-len("2000-01-01") :], default=None)


def blocks(directory: Path) -> dict[str, str]:
    """Marker name -> markdown."""
    machines, files = load(directory)
    lines = [machine_line(name, machines[name], files[name]) for name in files]
    result = dict.fromkeys(["results", "musts", "settings", "sync", "sync-musts"], NOTHING)
    result["machines"] = "\n".join(lines) or NOTHING
    sentences = {(m["cpu"], m["cores"], m["torch"], m["commit"], m["date"]) for m in machines.values()}
    sentence = "{}, {} cores, torch {}, commit {}, {}.".format
    result["machine"] = " ".join(sentence(*each) for each in sorted(sentences)) or NOTHING
    files = {n: derive(rows) if n.startswith("layers") else rows for n, rows in files.items()}
    verdicts = []
    for allocator in ALLOCATORS:
        result[f"layers-{allocator}"] = result[f"shapes-{allocator}"] = NOTHING
        if (layers := files.get(f"layers-{allocator}")) is not None:
            result[f"layers-{allocator}"] = summary_table(layers)
            result[f"shapes-{allocator}"] = shapes_table(layers)
    if any(name.startswith(("layers", "steps")) for name in files):
        result["results"] = overview(files)
    if "layers-tcmalloc" in files:
        verdicts += musts.layer_verdicts(files["layers-tcmalloc"])
    if "steps-tcmalloc" in files:
        verdicts += musts.step_verdicts(files["steps-tcmalloc"])
    if verdicts:
        result["musts"] = must_table(verdicts)
    if "settings" in files:
        result["settings"] = settings_table(files["settings"])
    if "sync" in files:
        result["sync"] = sync_table(files["sync"])
        result["sync-musts"] = must_table(musts.sync_verdicts(files["sync"]))
    return result | {"gpu": gpu_block(newest_gpu(directory))}


def fill(text: str, blocks: dict[str, str]) -> str:
    """The text with every marked block replaced; an unknown marker is an error."""
    marked = re.compile(r"(<!-- bench:(\S+):begin -->\n).*?(<!-- bench:\2:end -->)", re.DOTALL)
    return marked.sub(lambda found: f"{found[1]}{blocks[found[2]]}\n{found[3]}", text)


def plot(layers: pd.DataFrame, path: Path) -> None:
    """Time over the floor against the size of the input: a panel per pass and layout."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    options = {"sharex": True, "sharey": True, "layout": "constrained", "figsize": (14, 7)}
    figure, axes = plt.subplots(len(LAYOUTS), len(PASSES), **options)
    for axis, (layout, what) in zip(axes.flat, product(LAYOUTS, PASSES), strict=True):
        for dtype, group in select(layers, what)[layers.layout == layout].groupby("dtype"):
            for contestant, marker in ("native", "x"), ("ours", "o"):
                over = group.over_floor * group[contestant] / group.ours
                axis.scatter(group.mb, over, s=18, marker=marker, label=f"{contestant}, {dtype}")
        axis.set(title=f"{what}, {layout.upper()}", xscale="log", yscale="log", xlabel="MB")
        axis.grid(linewidth=0.4)
    axes[0, 0].set_ylabel("time / floor")
    axes[0, 0].legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--root", type=Path, default=ROOT, help="where README.md and docs are")
    parser.add_argument("--gpu", type=Path, help="print the tables of a directory of gpu_run.py")
    parser.add_argument("--plot", type=Path, help="draw the layers of --gpu, or under tcmalloc")
    args = parser.parse_args()
    if args.plot:
        files = load(args.gpu or args.results)[1]
        layers = gpu_layers(files) if args.gpu else derive(files["layers-tcmalloc"])
        if layers is not None:
            plot(layers, args.plot)
    if args.gpu:
        print(gpu_block(args.gpu))
    if args.gpu or args.plot:
        return
    tables = blocks(args.results)
    different = []
    for path in [args.root / "README.md", *sorted((args.root / "docs").glob("*.md"))]:
        text = path.read_text()
        if (filled := fill(text, tables)) != text:
            different.append(path.name)
            if not args.check:
                path.write_text(filled)
    if args.check and different:
        names = ", ".join(different)
        raise SystemExit(f"{names}: tables differ from the results; run python benchmarks/report.py")
    print(f"written: {', '.join(different) or 'nothing'}" if not args.check else "tables: as measured")


if __name__ == "__main__":
    main()
