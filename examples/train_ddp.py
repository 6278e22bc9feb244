"""Train on several processes with two images each, as in detection, with and without sync.

    torchrun --nproc_per_node=4 examples/train_ddp.py              # all three runs, a picture
    torchrun --nproc_per_node=4 examples/train_ddp.py --sync       # one of them
    torchrun --nproc_per_node=4 examples/train_ddp.py --no-sync

The network and data of `train.py` under DistributedDataParallel: once with `SyncBatchNorm`, once
with batch normalization of each process by itself, and, to compare them with, once in one process
with the batches of all put together. The same seed, weights, batches and learning rate. Processes
find gloo on the CPU and NCCL on GPUs by themselves. Prints a table and draws `demo_ddp.png`.
"""

import argparse
import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import batchnorm_ext
from train import Digits, build_model, load_data

COLORS = {"one process": "#E69F00", "sync": "#0072B2", "no sync": "#7F7F7F"}


@dataclass
class Run:
    """The loss of each step, over the batches of all processes, and the share of right answers."""

    losses: np.ndarray
    accuracy: float

    def smooth(self, steps: int = 25) -> np.ndarray:
        return np.convolve(self.losses, np.full(steps, 1 / steps), mode="valid")


def start() -> torch.device:
    """Join the other processes, if there are any; the device of this one."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cpu":
            torch.set_num_threads(max(1, os.cpu_count() // dist.get_world_size()))
    return device


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def train(name: str, options: argparse.Namespace, data: Digits, device: torch.device) -> Run:
    """One run on this process: its share of every batch, or all of it."""
    model = batchnorm_ext.convert(build_model("native", options.seed)).to(device)
    if name == "sync":
        batchnorm_ext.convert_sync_batchnorm(model)
    network = model
    together = name == "one process" or ranks() == 1
    if not together:
        network = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9)
    order = torch.Generator().manual_seed(options.seed)
    losses = []
    for _ in tqdm(range(options.steps), desc=name, unit="step", disable=rank() > 0):
        batch = torch.randint(len(data.train_y), (options.batch_size * ranks(),), generator=order)
        own = batch if together else batch.chunk(ranks())[rank()]
        loss = F.cross_entropy(network(data.train_x[own]), data.train_y[own])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / (1 if together else ranks())
        if not together:
            dist.all_reduce(mean)
        losses.append(mean)
    model.eval()
    with torch.no_grad():
        right = (model(data.test_x).argmax(1) == data.test_y).float().mean().item()
    return Run(torch.stack(losses).cpu().numpy(), right)


def report(runs: dict[str, Run]) -> None:
    table = Table(title=f"{ranks()} processes")
    for heading in ("run", "last loss", "test accuracy", "distance from one process"):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for name, run in runs.items():
        curve = run.smooth()
        distance = ""
        if "one process" in runs and name != "one process":
            distance = f"{np.abs(curve - runs['one process'].smooth()).mean():.2g}"
        table.add_row(name, f"{curve[-1]:.2g}", f"{run.accuracy:.1%}", distance)
    Console().print(table)


def draw(runs: dict[str, Run], options: argparse.Namespace) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    labels = {
        "one process": f"one process, batch {options.batch_size * ranks()}",
        "sync": f"{ranks()} processes, batch {options.batch_size} each, SyncBatchNorm",
        "no sync": f"{ranks()} processes, batch {options.batch_size} each, BatchNorm",
    }
    for name, run in runs.items():
        style = {"linewidth": 4, "alpha": 0.5} if name == "one process" else {}
        axes.plot(run.smooth(), color=COLORS[name], label=labels[name], **style)
    axes.set(xlabel="step", ylabel="training loss, mean of 25 steps", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(options.output, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train on handwritten digits with a tiny batch on each process.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--sync", action=argparse.BooleanOptionalAction, help="only this run, instead of all three"
    )
    parser.add_argument("--batch-size", type=int, default=2, help="of each process")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate (SGD, momentum 0.9)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="demo_ddp.png")
    options = parser.parse_args()

    device = start()
    data = Digits(*(part.to(device) for part in load_data(options.seed)))
    names = list(COLORS) if options.sync is None else ["sync" if options.sync else "no sync"]
    runs = {}
    for name in names:
        if name != "one process" or rank() == 0:
            runs[name] = train(name, options, data, device)
        if dist.is_initialized():
            dist.barrier()
    if rank() == 0:
        report(runs)
        draw(runs, options)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
