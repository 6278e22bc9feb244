"""Pictures of results: speed-ups over native by shape, and a roofline for a GPU."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator

from cases import GROUPS, LAYOUTS
from results import MUST_LAYERS, PASSES, TRAFFIC, Row, kinds, shape_name

TITLES = {
    "forward": "training forward",
    "backward": "training backward",
    "eval": "eval forward",
    "module": "module call, forward + backward",
}
# Okabe-Ito colours: one hue per dtype, and the layout by filled or hollow.
COLOURS = {"fp32": "#0072B2", "bf16": "#D55E00", "fp16": "#009E73"}


def by_network(rows: list[Row]) -> list[tuple[str, tuple[int, ...]]]:
    """(group, shape), each shape once, under the first group that has it."""
    first = {row.shape: next(iter(row.layers), "odd") for row in rows}
    return [(group, shape) for group in GROUPS for shape, g in first.items() if g == group]


def span(lines: list[tuple[str, tuple[int, ...]]], group: str) -> tuple[float, float] | None:
    """Where the lines of a group begin and end on the y axis."""
    members = [i for i, (name, _) in enumerate(lines) if name == group]
    return (members[0] - 0.5, members[-1] + 0.5) if members else None


def roofline(rows: list[Row], machine: dict, path: Path) -> None:
    """The least traffic over the time, against the traffic: a panel per pass and layout.

    The roof is the highest rate of a copy in the run; what takes more passes than it must, or
    waits, stays below it.
    """
    passes = [what for what in PASSES if any(row.what == what for row in rows)]
    roof = max(2 * row.bytes / row.seconds["copy"] for row in rows) / 1e9
    markers = {"ours": "o", "native": "x", "aten": "+", "compile": "^"}
    fig, axes = plt.subplots(
        len(LAYOUTS),
        len(passes),
        figsize=(1 + 4.2 * len(passes), 7.5),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for line, layout in zip(axes, LAYOUTS, strict=True):
        for ax, what in zip(line, passes, strict=True):
            for dtype, colour in COLOURS.items():
                dots = [r for r in rows if (r.what, r.layout, r.dtype) == (what, layout, dtype)]
                for provider, marker in markers.items():
                    measured = [row for row in dots if provider in row.seconds]
                    if not measured:
                        continue
                    traffic = [TRAFFIC[what] * row.bytes for row in measured]
                    rates = [
                        t / row.seconds[provider] / 1e9
                        for t, row in zip(traffic, measured, strict=True)
                    ]
                    megabytes = [t / 1e6 for t in traffic]
                    label = f"{provider}, {dtype}"
                    ax.scatter(megabytes, rates, s=22, c=colour, marker=marker, label=label)
            ax.axhline(roof, color="black", linewidth=1)
            ax.set(title=f"{TITLES[what]}, {layout.upper()}", xscale="log", yscale="log")
            ax.grid(linewidth=0.4, color="0.88")
            ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[-1]:
        ax.set_xlabel("MB that have to be moved")
    for ax in axes[:, 0]:
        ax.set_ylabel("GB/s")
    handles = {}
    for ax in axes.flat:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    fig.legend(handles.values(), handles, loc="outside lower center", ncols=6, frameon=False)
    fig.suptitle(
        f"{machine['gpu']}, driver {machine['driver']}, torch {machine['torch']}\n"
        "the least traffic over the time; the line is the fastest copy",
        fontsize=11,
    )
    fig.savefig(path, dpi=130)
    plt.close(fig)


def plot(rows: list[Row], machine: dict, path: Path) -> None:
    lines = by_network(rows)
    position = {shape: i for i, (_, shape) in enumerate(lines)}
    resnet = span(lines, "resnet50")
    passes = [what for what in PASSES if any(row.what == what for row in rows)]
    fig, axes = plt.subplots(
        1,
        len(passes),
        figsize=(2.2 + 3.4 * len(passes), 1.9 + 0.21 * len(lines)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for ax, what in zip(axes[0], passes, strict=True):
        for kind in kinds():
            dtype, layout = kind.split()
            colour, hollow = COLOURS[dtype], layout == "nhwc"
            dots = [row for row in rows if (row.what, row.kind) == (what, kind)]
            if not dots:
                continue
            ax.scatter(
                [row.times("native") for row in dots],
                [position[row.shape] for row in dots],
                s=26,
                edgecolors=colour,
                facecolors="none" if hollow else colour,
                linewidths=1.2,
                label=kind,
                zorder=3,
            )
            must = MUST_LAYERS.get(what, {}).get(kind)
            if must and resnet:
                style = ":" if hollow else "--"
                ax.vlines(must, *resnet, color=colour, linewidth=1, linestyle=style)
        ax.axvline(1, color="black", linewidth=1)
        ax.set(title=TITLES[what], xscale="log", xlabel="times faster than native (log)")
        ax.grid(axis="y", linewidth=0.4, color="0.88")
        ax.spines[["top", "right"]].set_visible(False)
        for group in GROUPS:
            if place := span(lines, group):
                ax.axhline(place[1], color="0.6", linewidth=0.8)
        low, high = ax.get_xlim()
        ticks = [t for t in (0.25, 0.5, 1, 2, 4, 8, 16, 32) if low / 2 <= t <= high * 2]
        ax.set_xticks(ticks, [f"{t:g}x" for t in ticks])
        ax.xaxis.set_minor_locator(NullLocator())
    axes[0, 0].set_yticks(range(len(lines)), [shape_name(shape) for _, shape in lines], fontsize=8)
    axes[0, 0].set_ylim(len(lines) - 0.4, -0.6)
    for group in GROUPS:
        if place := span(lines, group):
            axes[0, -1].text(
                1.02,
                sum(place) / 2,
                group,
                transform=axes[0, -1].get_yaxis_transform(),
                rotation=270,
                va="center",
                color="0.4",
            )
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    fig.suptitle(
        f"batchnorm_ext against native BatchNorm, {machine['cpu']}, {machine['threads']} threads, "
        f"torch {machine['torch']}\nlines: the geometric mean asked for over the ResNet-50 shapes "
        "(dashed NCHW, dotted NHWC)",
        fontsize=11,
    )
    fig.savefig(path, dpi=130)
    plt.close(fig)
