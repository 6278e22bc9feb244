"""Speed-up over native by shape: a panel per pass, a dot per dtype and layout."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator

from cases import GROUPS
from results import MUST_LAYERS, PASSES, Row, kinds, shape_name

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
