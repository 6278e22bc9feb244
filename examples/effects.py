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
    before, after = result.data["before"], result.data["after"]
    axes.scatter(*after.T, s=4, label="after (left, bottom axes)")
    other = axes.twinx().twiny()
    other.scatter(*before.T, s=4, color="#D55E00", alpha=0.3)
    axes.scatter([], [], color="#D55E00", label="before (right, top axes)")


def draw_descent(axes: Axes, result: Result) -> None:
    """Both in units of the solution, about which the loss is drawn."""
    for (name, (path, hessian, best)), color in zip(
        result.data["paths"].items(), ("#D55E00", "#0072B2"), strict=True
    ):
        unit = path / best
        axes.plot(*unit.T, ".-", color=color, lw=0.8, label=f"{name}, {len(path)} steps")
        grid = torch.linspace(-0.5, 2, 80, dtype=torch.float64)
        at = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), -1) * best - best
        loss = torch.einsum("...i,ij,...j->...", at, hessian, at)
        axes.contour(grid, grid, loss / loss.max(), [0.01, 0.1, 0.4], colors=color, linewidths=0.6)
    axes.set(xlabel="first weight / best", ylabel="second weight / best")


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
