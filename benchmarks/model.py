"""One training step of whole networks, native against converted, interleaved.

    python benchmarks/model.py --json steps.json
    python benchmarks/model.py --networks resnet50 --layout nchw --dtype bf16 --batch 8

A step is forward, cross entropy, backward and SGD with momentum, on random images. Both copies
start from the same weights. bf16 runs under autocast.
"""

import argparse
import copy
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm

import batchnorm_ext
from arguments import add_choice
from cases import DTYPES, LAYOUTS
from environment import environment
from networks import NETWORKS
from results import Alone, save, step_verdicts
from tables import step_table, verdict_table
from timing import interleaved

# What BatchNorm runs in a step, native and ours. The module's own Python and native's count of
# batches are left out of both shares.
NORM_OPS = {
    "aten::batch_norm",
    "aten::native_batch_norm_backward",
    "batchnorm_ext::batch_norm",
    "batchnorm_ext::batch_norm_backward",
}
WARMUP = 2
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own lines would cut the bar


def training_step(network: nn.Module, images, labels, dtype: torch.dtype) -> Callable[[], float]:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16)

    def step() -> float:
        optimizer.zero_grad()
        with autocast:
            loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def norm_share(step: Callable[[], object]) -> float:
    """Part of a step's time spent in BatchNorm operators, forward and backward."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        with record_function("step"):
            step()

    def outermost(event) -> bool:
        """An operator may appear again below itself, once per dispatch key."""
        while event := event.cpu_parent:
            if event.name in NORM_OPS:
                return False
        return True

    events = profiler.events()
    norm = sum(e.cpu_time_total for e in events if e.name in NORM_OPS and outermost(e))
    return norm / sum(e.cpu_time_total for e in events if e.name == "step")


def measure(name: str, dtype: str, layout: str, args, bar: tqdm) -> dict:
    torch.manual_seed(0)
    memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    native = NETWORKS[name]().to(memory_format=memory_format)
    ours = batchnorm_ext.convert(copy.deepcopy(native))
    images = torch.randn(args.batch, 3, args.size, args.size).to(memory_format=memory_format)
    labels = torch.randint(1000, (args.batch,))
    steps = {
        provider: training_step(network, images, labels, DTYPES[dtype])
        for provider, network in [("native", native), ("ours", ours)]
    }
    bar.set_description(f"{name} {dtype} {layout}")
    timing = interleaved(steps, args.rounds, warmup=WARMUP, after_sample=bar.update)
    return {
        "network": name,
        "dtype": dtype,
        "layout": layout,
        "batch": args.batch,
        **asdict(timing),
        "norm share": {provider: norm_share(step) for provider, step in steps.items()},
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_choice(parser, "--networks", tuple(NETWORKS))
    add_choice(parser, "--dtype", tuple(DTYPES), default=["fp32"])
    add_choice(parser, "--layout", LAYOUTS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the result to this file")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    console = Console(width=None if sys.stdout.isatty() else 160)
    machine = environment()
    console.print("\n".join(f"{key}: {value}" for key, value in machine.items()), highlight=False)

    runs = [(n, d, layout) for n in args.networks for d in args.dtype for layout in args.layout]
    with tqdm(total=len(runs) * 2 * (WARMUP + args.rounds), unit="step", file=sys.stderr) as bar:
        steps = [measure(*run, args, bar) for run in runs]
    step_table(steps).print(console)
    # The musts are for batch 16 at 224x224; other sizes are for a look.
    if (args.batch, args.size) == (16, 224):
        verdict_table(step_verdicts(steps)).print(console)
    console.print(str(Alone.of(steps)), highlight=False)
    if args.json:
        settings = {"rounds": args.rounds, "batch": args.batch, "size": args.size}
        save(args.json, "steps", machine, settings, steps)


if __name__ == "__main__":
    main()
