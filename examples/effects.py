"""What the literature says that normalization does, tried on small networks.

    python examples/effects.py

Trains on scikit-learn's handwritten digits for some minutes, prints a table of claims, sources and
findings, and draws `effects.png`. What a run does not confirm is said in the table.
"""

import argparse
from collections.abc import Callable

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import effects_runs as runs
from effects_ranks import batch_sizes
from effects_runs import Result

COLORS = {"with BN": "#0072B2", "without": "#D55E00"}


def draw_lines(axes: Axes, result: Result) -> None:
    for name, values in result.data["lines"].items():
        axes.plot(result.data["x"], values, "o-", label=name, color=COLORS.get(name))
    axes.set_xscale("log")


def draw_losses(axes: Axes, result: Result) -> None:
    draw_lines(axes, result)
    axes.set_ylabel("final training loss")


def draw_accuracy(axes: Axes, result: Result) -> None:
    draw_lines(axes, result)
    axes.set(xlabel="images per process", ylabel="test accuracy")


def draw_gradients(axes: Axes, result: Result) -> None:
    for name, layers in result.data["curves"].items():
        for depth, norms in enumerate(layers):
            label = name if depth == 0 else None
            alpha = 0.25 + 0.75 * depth / len(layers)
            axes.plot(norms, color=COLORS[name], alpha=alpha, lw=0.8, label=label)
    axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="norm of the gradient (darker: higher layer)")


def draw_distribution(axes: Axes, result: Result) -> None:
    for name, quantiles in result.data["curves"].items():
        low, middle, high = torch.tensor(quantiles).T.tolist()
        axes.plot(middle, color=COLORS[name], label=name)
        axes.fill_between(range(len(low)), low, high, color=COLORS[name], alpha=0.2, lw=0)
    axes.set(xlabel="step", ylabel="15th, 50th and 85th percentile")


def draw_bars(axes: Axes, result: Result) -> None:
    bars = result.data["bars"]
    drawn = axes.bar(bars.keys(), bars.values(), color=["#0072B2", "#D55E00"])
    axes.bar_label(drawn, [f"{value:.1%}" for value in bars.values()])


def draw_clouds(axes: Axes, result: Result) -> None:
    """Before and after on the same axes, with arrows of the standard deviations at the means."""
    for when, marker, alpha in (("before", "o", 0.35), ("after", "x", 0.8)):
        clouds = result.data[when]
        for cloud, color in zip(clouds, COLORS.values(), strict=True):
            axes.scatter(*cloud.T, s=10, marker=marker, color=color, alpha=alpha, lw=0.7)
        points = torch.cat(clouds)
        mean, std = points.mean(0).tolist(), points.std(0).tolist()
        axes.errorbar(*mean, xerr=std[0], yerr=std[1], color="black", capsize=4, lw=2)
        axes.annotate(f"{when}\nmean and std", mean, (8, 8), textcoords="offset points")
    axes.axhline(0, color="gray", lw=0.5)
    axes.axvline(0, color="gray", lw=0.5)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set(xlabel="first feature", ylabel="second feature")


def draw_descent(axes: Axes, result: Result) -> None:
    """Side by side, each with the contours of its loss around the solution."""
    axes.set_axis_off()
    for (name, (path, hessian, best)), color, left in zip(
        result.data["paths"].items(), ("#D55E00", "#0072B2"), (0.04, 0.54), strict=True
    ):
        part = axes.inset_axes((left, 0.06, 0.44, 0.84))
        radius = 1.25 * best.norm()
        grid = torch.linspace(-1, 1, 120, dtype=torch.float64) * radius
        at = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), -1)
        loss = torch.einsum("...i,ij,...j->...", at, hessian, at)
        levels = (loss.max() * 0.5 ** torch.arange(14, 0, -1)).tolist()
        part.contour(grid + best[0], grid + best[1], loss, levels, cmap="Greys_r", linewidths=0.7)
        part.plot(*path.T, ".-", color=color, lw=1.2, ms=4)
        part.plot(*best, "*", color="black", ms=9)
        part.set_title(f"{name} features: {len(path)} steps", fontsize=8, color=color)
        part.set_aspect("equal")
        part.set_xlabel("first weight", fontsize=7)
        part.tick_params(labelsize=6)


DRAWN: dict[Callable[[], Result], Callable[[Axes, Result], None]] = {
    runs.learning_rates: draw_losses,
    runs.initial_scales: draw_losses,
    runs.gradient_norms: draw_gradients,
    runs.input_distribution: draw_distribution,
    batch_sizes: draw_accuracy,
    runs.regularization: draw_bars,
    runs.population: draw_bars,
    runs.clouds: draw_clouds,
    runs.descent: draw_descent,
}


def report(results: list[Result]) -> None:
    table = Table(title="What normalization does", show_lines=True)
    for heading in ("claim", "source", "found here", "confirmed"):
        table.add_column(heading)
    for result in results:
        confirmed = "yes" if result.confirmed else "NO"
        table.add_row(result.claim, result.source, result.found, confirmed)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="effects.png", help="the picture")
    options = parser.parse_args()
    torch.set_num_threads(1)  # for networks this small, threads cost more than they gain
    results = [run() for run in tqdm(DRAWN, unit="experiment")]
    report(results)
    figure = Figure(figsize=(15, 13), layout="constrained")
    for axes, draw, result in zip(figure.subplots(3, 3).flat, DRAWN.values(), results, strict=True):
        draw(axes, result)
        verdict = "" if result.confirmed else " - NOT CONFIRMED"
        axes.set_title(f"{result.title}{verdict}\n{result.claim}\n({result.source})", fontsize=8)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    figure.savefig(options.output, dpi=110)
    print(f"drawn in {options.output}")


if __name__ == "__main__":
    main()
