"""Train the same network three times, and show what Batch Normalization does and what it costs.

    python examples/demo.py

With torch's BatchNorm, with the layers converted by `batchnorm_ext.convert`, and with no BatchNorm
at all: the same seed, data, batches and learning rate. Prints a table and draws `demo.png`.
"""

import argparse
import platform

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from train import History, Trainer, add_arguments, load_data

LABELS = {"native": "native BN", "ours": "converted", "none": "no BN"}
COLORS = {"native": "#E69F00", "ours": "#0072B2", "none": "#7F7F7F"}


def train_all(options: argparse.Namespace) -> dict[str, History]:
    """Train the three in turns, epoch by epoch, so that what else the machine does hits all."""
    data = load_data(options.seed)
    trainers = [Trainer(norm, options, data) for norm in LABELS]
    steps = len(trainers) * options.epochs * trainers[0].steps_per_epoch
    with tqdm(total=steps, unit="step", desc="training") as progress:
        for epoch in range(options.epochs):
            for trainer in trainers if epoch % 2 == 0 else reversed(trainers):
                trainer.train_epoch(progress)
    for trainer in tqdm(trainers, unit="run", desc="profiling"):
        trainer.measure_norm_share()
    return {trainer.norm: trainer.history for trainer in trainers}


def loss_difference(runs: dict[str, History]) -> float:
    """The largest |loss of native - loss of converted| in any step."""
    return np.abs(np.subtract(runs["native"].losses, runs["ours"].losses)).max()


def report(runs: dict[str, History], options: argparse.Namespace) -> None:
    """Print the table and the differences of the loss curves."""
    table = Table(title=f"Training on {machine(options)}")
    table.add_column("run")
    for heading in ("test accuracy", "final loss", "time per epoch", "in BN", "BN share"):
        table.add_column(heading, justify="right")
    for norm, run in runs.items():
        epoch_losses = run.losses[-(len(run.losses) // options.epochs) :]
        table.add_row(
            LABELS[norm],
            f"{run.accuracy[-1]:.1%}",
            f"{np.mean(epoch_losses):.2g}",
            f"{run.epoch_seconds:.2f} s",
            f"{run.norm_seconds:.2f} s",
            f"{run.norm_share:.1%}",
        )
    console = Console()
    console.print(table)
    native, ours = runs["native"], runs["ours"]
    console.print(
        f"native / converted: {native.epoch_seconds / ours.epoch_seconds:.2f}x per epoch, "
        f"{native.norm_seconds / ours.norm_seconds:.2f}x in BN"
    )
    console.print(
        f"largest difference of the loss, native and converted: {loss_difference(runs):.1e} "
        f"in {len(ours.losses)} steps"
    )


def machine(options: argparse.Namespace) -> str:
    """What the times were measured on."""
    if options.device != "cpu":
        return f"{options.device}, torch {torch.__version__}"
    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return f"{platform.machine()} ({capability}), {threads} threads, torch {torch.__version__}"


def plot_losses(axes: Axes, runs: dict[str, History]) -> None:
    """Draw the loss of every step faintly and its running mean on top."""
    styles = {
        "native": {"linewidth": 5, "alpha": 0.55},
        "ours": {"linewidth": 1.6, "linestyle": (0, (5, 1.5))},
        "none": {"linewidth": 2},
    }
    for norm, run in runs.items():
        losses = np.array(run.losses)
        window = 10
        steps = np.arange(window, len(losses) + 1)
        mean = np.convolve(losses, np.full(window, 1 / window), mode="valid")
        axes.plot(np.arange(1, len(losses) + 1), losses, color=COLORS[norm], alpha=0.18, lw=0.8)
        label = f"{LABELS[norm]}: {run.accuracy[-1]:.1%} test accuracy"
        axes.plot(steps, mean, color=COLORS[norm], label=label, **styles[norm])
    axes.set(xlabel="training step", yscale="log", xlim=(0, len(losses)))
    axes.set_ylabel("cross-entropy on the training batch\n(mean of 10 steps; faint: every step)")
    axes.set_title(
        "Training loss;\nnative and converted differ by at most "
        f"{loss_difference(runs):.0e} in any step",
        loc="left",
    )
    axes.grid(alpha=0.25, which="major")
    axes.legend(loc="lower left", frameon=False)


def plot_times(axes: Axes, runs: dict[str, History]) -> None:
    """Draw the time of an epoch, with the part spent in BN on top of the rest."""
    for position, (norm, run) in enumerate(runs.items()):
        rest = run.epoch_seconds - run.norm_seconds
        color = COLORS[norm]
        axes.bar(position, rest, 0.62, color=color, alpha=0.35)
        if run.norm_seconds > 0:
            axes.bar(position, run.norm_seconds, 0.62, rest, color=color, hatch="//", ec="white")
        text = f"{run.epoch_seconds:.2f} s"
        if run.norm_seconds > 0:
            text += f"\nBN {run.norm_seconds:.2f} s, {run.norm_share:.0%}"
        axes.annotate(
            text, (position, run.epoch_seconds), (0, 4), textcoords="offset points", ha="center"
        )
    ratio = runs["native"].norm_seconds / runs["ours"].norm_seconds
    axes.set_title(
        f"Time per training epoch;\nin BN, native / converted = {ratio:.1f}x", loc="left"
    )
    axes.set_xticks(range(len(runs)), [LABELS[norm] for norm in runs])
    axes.set_ylabel("seconds (median of the epochs)")
    axes.margins(y=0.2)
    axes.grid(alpha=0.25, axis="y")
    axes.legend(
        handles=[
            Patch(facecolor="#555555", hatch="//", edgecolor="white", label="in BN"),
            Patch(facecolor="#555555", alpha=0.35, label="everything else"),
        ],
        loc="upper right",
        frameon=False,
        ncols=2,
    )


def draw(runs: dict[str, History], options: argparse.Namespace) -> None:
    """Write the picture to `options.output`."""
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
    plot_losses(left, runs)
    plot_times(right, runs)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    figure.supxlabel(
        f"A 14-layer residual network on handwritten digits (32x32), batch {options.batch_size}, "
        f"{options.dtype}; all three from seed {options.seed} at the same learning rate, "
        f"{options.lr:g}.\nThe run without BN has a bias in its place. "
        f"Measured on {machine(options)}.",
        fontsize=8.5,
        color="#444444",
    )
    figure.savefig(options.output, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compare native, converted and no BatchNorm in training.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument("--output", default="demo.png", help="the picture")
    options = parser.parse_args()
    runs = train_all(options)
    report(runs, options)
    draw(runs, options)
    print(f"picture: {options.output}")


if __name__ == "__main__":
    main()
