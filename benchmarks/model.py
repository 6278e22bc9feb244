"""One training step of whole networks, native against converted, interleaved.

    python benchmarks/model.py --json steps.json
    python benchmarks/model.py --networks resnet50 --layout nchw --dtype bf16 --batch 8
    python benchmarks/model.py --networks resnet50 --device cuda --compile --dtype bf16 --batch 256

A step is forward, cross entropy, backward and SGD with momentum, on random images. Both copies
start from the same weights. bf16 and fp16 run under autocast. With `--compile` both run under
torch.compile. The share of BatchNorm in a step is measured on a CPU, in eager mode.
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
    "batchnorm_ext::batch_norm_update",
    "batchnorm_ext::batch_norm_backward",
}
WARMUP = 2
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own lines would cut the bar


def training_step(network: nn.Module, images, labels, dtype: torch.dtype) -> Callable[[], float]:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    low = dtype is not torch.float32
    autocast = torch.autocast(images.device.type, dtype=dtype if low else None, enabled=low)

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
    native = NETWORKS[name]().to(args.device, memory_format=memory_format)
    ours = batchnorm_ext.convert(copy.deepcopy(native))
    size = (args.batch, 3, args.size, args.size)
    images = torch.randn(size, device=args.device).to(memory_format=memory_format)
    labels = torch.randint(1000, (args.batch,), device=args.device)
    torch._dynamo.reset()
    steps = {
        provider: training_step(
            torch.compile(network) if args.compile else network, images, labels, DTYPES[dtype]
        )
        for provider, network in [("native", native), ("ours", ours)]
    }
    bar.set_description(f"{name} {dtype} {layout}")
    timing = interleaved(steps, args.rounds, warmup=WARMUP, after_sample=bar.update)
    skipped = args.compile or args.device == "cuda"
    return {
        "network": name,
        "dtype": dtype,
        "layout": layout,
        "batch": args.batch,
        "compiled": args.compile,
        **asdict(timing),
        "norm share": {} if skipped else {p: norm_share(step) for p, step in steps.items()},
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_choice(parser, "--networks", tuple(NETWORKS))
    add_choice(parser, "--dtype", tuple(DTYPES), default=["fp32"])
    add_choice(parser, "--layout", LAYOUTS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="both under torch.compile")
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
    machine = environment(args.device)
    console.print("\n".join(f"{key}: {value}" for key, value in machine.items()), highlight=False)

    on_gpu = args.device == "cuda"
    runs = [(n, d, layout) for n in args.networks for d in args.dtype for layout in args.layout]
    with tqdm(total=len(runs) * 2 * (WARMUP + args.rounds), unit="step", file=sys.stderr) as bar:
        steps = []
        for run in runs:
            steps.append(measure(*run, args, bar))
            if args.json:  # a long run leaves what it has
                settings = {"rounds": args.rounds, "batch": args.batch, "size": args.size}
                save(args.json, "gpu steps" if on_gpu else "steps", machine, settings, steps)
    step_table(steps).print(console)
    # The musts are for batch 16 at 224x224 on a CPU; the rest is for a look.
    if (args.batch, args.size, on_gpu, args.compile) == (16, 224, False, False):
        verdict_table(step_verdicts(steps)).print(console)
    if not on_gpu:
        console.print(str(Alone.of(steps)), highlight=False)


if __name__ == "__main__":
    main()
