"""Training steps of whole networks, native and converted, eager and compiled, interleaved.

    python benchmarks/model.py --allocator both
    python benchmarks/model.py --networks resnet50 --layout nchw --dtype bf16 --modes eager
    python benchmarks/model.py --networks resnet50 --device cuda --dtype bf16 --batch 128
    python benchmarks/model.py --settings

A step is forward, cross entropy, backward and SGD with momentum, on random images. All copies of a
network start from the same weights. bf16 and fp16 run under autocast. Writes steps-<allocator>.csv
(steps.csv on a GPU), a line per network, dtype and layout, in milliseconds per step.

`--settings` measures eager ResNet-50 steps under each of SETTINGS and writes settings.csv.
"""

import argparse
import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import batchnorm_ext
import environment
import report
import results
from arguments import add_choice, make_parser
from cases import DTYPES
from networks import NETWORKS
from timing import interleaved

WARMUP = 2
MODES = ("eager", "compiled")
LAUNCHER = ("-m", "torch.backends.xeon.run_cpu")
SETTINGS = {  # name -> environment variables, launcher; "tcmalloc" stands for its LD_PRELOAD
    "glibc": ({}, ()),
    "THP_MEM_ALLOC_ENABLE=1": ({"THP_MEM_ALLOC_ENABLE": "1"}, ()),
    "GLIBC_TUNABLES=glibc.malloc.hugetlb=1": ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, ()),
    "python -m torch.backends.xeon.run_cpu": ({}, LAUNCHER),
    "tcmalloc": ("tcmalloc", ()),
    "tcmalloc and run_cpu": ("tcmalloc", LAUNCHER),
}


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


def measure(name: str, dtype: str, layout: str, args, bar: tqdm) -> dict:
    torch.manual_seed(0)
    memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    native = NETWORKS[name]().to(args.device, memory_format=memory_format)
    size = (args.batch, 3, args.size, args.size)
    images = torch.randn(size, device=args.device).to(memory_format=memory_format)
    labels = torch.randint(1000, (args.batch,), device=args.device)
    torch._dynamo.reset()
    steps = {}
    for mode in args.modes:
        networks = {"native": copy.deepcopy(native), "ours": copy.deepcopy(native)}
        batchnorm_ext.convert(networks["ours"])
        for contestant, network in networks.items():
            network = torch.compile(network) if mode == "compiled" else network
            key = contestant if mode == "eager" else f"{contestant} compiled"
            steps[key] = training_step(network, images, labels, DTYPES[dtype])
    bar.set_description(f"{name} {dtype} {layout}")
    timing = interleaved(steps, args.rounds, warmup=WARMUP, after_sample=bar.update)
    row = {"network": name, "dtype": dtype, "layout": layout, "batch": args.batch}
    return row | timing.row()


def run(args, path: Path, machine: dict) -> None:
    runs = [(n, d, layout) for n in args.networks for d in args.dtype for layout in args.layout]
    total = len(runs) * 2 * len(args.modes) * (WARMUP + args.rounds)
    rows: list[dict] = []
    with tqdm(total=total, unit="step", file=sys.stderr) as bar:
        for each in runs:
            rows.append(measure(*each, args, bar))
            results.write(path, machine, pd.DataFrame(rows))


def run_settings(args, machine: dict) -> None:
    """Each setting in a process of its own, since allocators are chosen at its start."""
    options = ["--networks", "resnet50", "--modes", "eager", "--batch", str(args.batch)]
    options += ["--rounds", str(args.rounds), "--size", str(args.size)]
    machine.pop("allocator")  # each row has its own
    frames = []
    for name, (variables, launcher) in SETTINGS.items():
        print(name, flush=True)
        if variables == "tcmalloc":
            variables = environment.with_allocator("tcmalloc")
        else:
            variables = environment.with_allocator("glibc") | variables
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, *launcher, __file__, *options, "--out", out]
            subprocess.run(command, env=os.environ | variables, check=True)
            (path,) = Path(out).glob("steps-*.csv")
            found, rows = results.read(path)
        frames.append(rows.assign(setting=name, allocator=found["allocator"]))
        results.write(args.out / "settings.csv", machine, pd.concat(frames))


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=7)
    add_choice(parser, "--networks", tuple(NETWORKS))
    add_choice(parser, "--dtype", tuple(DTYPES), default=["fp32"])
    add_choice(parser, "--layout", results.LAYOUTS)
    add_choice(parser, "--modes", MODES)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--settings", action="store_true", help="compare settings, see above")
    args = parser.parse_args()
    if args.quick:
        args.batch, args.size, args.rounds = 2, 64, 1
    return args


def main() -> None:
    args = parse_arguments()
    if args.device == "cpu" and not args.settings:
        environment.use_allocator(args.allocator)
    torch.set_num_threads(args.threads)
    machine = environment.machine(args.device)
    machine |= {"rounds": args.rounds, "size": args.size} | ({"quick": True} if args.quick else {})
    if args.settings:
        run_settings(args, machine)
        print(report.settings_table(results.read(args.out / "settings.csv")[1]))
        return
    on_gpu = args.device == "cuda"
    path = args.out / ("steps.csv" if on_gpu else f"steps-{machine['allocator']}.csv")
    run(args, path, machine)
    print(report.step_table(results.read(path)[1]))
    print(path)


if __name__ == "__main__":
    main()
