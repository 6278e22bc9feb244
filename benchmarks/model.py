"""Training steps of whole networks: native, converted and fused, eager and compiled, interleaved.

    python benchmarks/model.py --allocator both
    python benchmarks/model.py --networks resnet50 --layout nchw --dtype bf16 --modes eager
    python benchmarks/model.py --settings

A step is forward, cross entropy, backward and SGD with momentum, on random images. All copies of a
network start from the same weights. bf16 and fp16 run under autocast. "fused" is the network after
`fuse` in eager mode, and the native one with the backend "batchnorm_ext" where it is compiled.
Writes steps-<allocator>.csv (steps.csv on a GPU), milliseconds per step. `--settings` measures
eager ResNet-50 steps under each of SETTINGS instead, and writes settings.csv.
"""

import copy
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torch._functorch import config as functorch
from torch._inductor import config as inductor

import batchnorm_ext
import batchnorm_ext.backend  # registers it
import environment
import report
import results
from bench import run
from cases import DTYPES
from networks import NETWORKS
from timing import interleaved

MODES = ("eager", "compiled")
LAUNCHER = ["-m", "torch.backends.xeon.run_cpu"]
SETTINGS = [  # allocator, environment variables, launcher
    ("glibc", {}, []),
    ("glibc", {"THP_MEM_ALLOC_ENABLE": "1"}, []),
    ("glibc", {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, []),
    ("glibc", {}, LAUNCHER),
    ("tcmalloc", {}, []),
    ("tcmalloc", {}, LAUNCHER),
]


def training_step(network: nn.Module, images, labels, dtype: torch.dtype) -> Callable[[], float]:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    low = None if dtype is torch.float32 else dtype
    autocast = torch.autocast(images.device.type, dtype=low, enabled=low is not None)

    def step() -> float:
        optimizer.zero_grad()
        with autocast:
            loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def measure(case: dict, args: Namespace) -> Iterator[dict]:
    """A row for each mode. All contestants are interleaved."""
    torch.manual_seed(0)
    memory_format = torch.channels_last if case["layout"] == "nhwc" else torch.contiguous_format
    original = NETWORKS[case["network"]]().to(args.device, memory_format=memory_format)
    size = (args.batch, 3, args.size, args.size)
    images = torch.randn(size, device=args.device).to(memory_format=memory_format)
    labels = torch.randint(1000, (args.batch,), device=args.device)
    torch._dynamo.reset()
    steps = {}
    for mode in args.modes:
        native, ours, fused = (copy.deepcopy(original) for _ in range(3))
        batchnorm_ext.convert(ours)
        if mode == "compiled":
            native, ours = torch.compile(native), torch.compile(ours)
            fused = torch.compile(fused, backend="batchnorm_ext")
        else:
            batchnorm_ext.fuse(fused)
        for key, network in {"native": native, "ours": ours, "fused": fused}.items():
            steps[f"{key} {mode}"] = training_step(network, images, labels, DTYPES[case["dtype"]])
    times = interleaved(steps, args.rounds)
    for mode in args.modes:
        found = {key: times[f"{key} {mode}"] for key in ("native", "ours", "fused")}
        yield case | {"mode": mode} | found | {"disturbance": times["disturbance"]}


def run_settings(args: Namespace) -> None:
    """Each setting in a process of its own: an allocator is chosen when a process starts."""
    options = ["--networks", "resnet50", "--modes", "eager", "--batch", str(args.batch)]
    options += ["--rounds", str(args.rounds), "--size", str(args.size)]
    frames = []
    for allocator, variables, launcher in SETTINGS:
        name = ", ".join([allocator, *map("=".join, variables.items()), *launcher[1:]])
        print(name, flush=True)
        variables = environment.with_allocator(allocator) | variables
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, *launcher, __file__, *options, "--out", out]
            subprocess.run(command, env=variables, check=True)
            (path,) = Path(out).iterdir()
            rows = results.read(path)
        frames.append(rows.assign(setting=name, allocator=rows.attrs["allocator"]))
    path, machine, rows = args.out / "settings.csv", environment.machine(args), pd.concat(frames)
    results.write(path, machine | {"allocator": "see its column"}, rows)
    print(f"{path}\n\n{report.settings_table(rows)}")


def main() -> None:
    parser = environment.make_parser(__doc__, rounds=7, runs=True)
    add = partial(parser.add_argument, nargs="+")
    add("--networks", choices=NETWORKS, default=list(NETWORKS))
    add("--dtype", choices=DTYPES, default=["fp32"])
    add("--layout", choices=results.LAYOUTS, default=results.LAYOUTS)
    add("--modes", choices=MODES, default=MODES)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--settings", action="store_true", help="compare settings, see above")
    args = parser.parse_args()
    if args.quick:
        args.batch, args.size, args.rounds = 2, 64, 1
    environment.start(args)
    # a graph in the cache may have been compiled for another build of this library
    inductor.fx_graph_cache = functorch.enable_autograd_cache = False
    if args.settings:
        return run_settings(args)
    columns = ("network", "dtype", "layout", "batch")
    runs = product(args.networks, args.dtype, args.layout, [args.batch])
    cases = [dict(zip(columns, values, strict=True)) for values in runs]
    run(args, "steps", cases, measure, report.step_table)


if __name__ == "__main__":
    main()
