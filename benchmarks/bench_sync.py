"""SyncBatchNorm against its peers: one layer, forward and backward, on several ranks.

    python benchmarks/bench_sync.py --allocator tcmalloc
    python benchmarks/bench_sync.py --ranks 2 --batch 2 --rounds 5

Over the layer shapes of ResNet-50 with a small batch, one core and one thread for each rank of a
gloo process group. Writes sync.csv, milliseconds of

    ours    this library's SyncBatchNorm
    native  the algorithm of torch.nn.SyncBatchNorm around our kernels (on CUDA: that layer itself)
    plain   the layer written in PyTorch operators, as in detectron2
    local   this library's BatchNorm2d, which does not synchronize
    free    ours in a process group whose messages arrive at once
    calls   the two messages of "free" alone
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import pandas as pd
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: F401  (the backend)
from tqdm import tqdm

import batchnorm_ext
import environment
import report
import results
from arguments import make_parser, numbers
from cases import layer_shapes
from sync_peers import PEERS
from timing import Timing, disturbance, no_gc, processor_seconds

WARMUP = 3


def free_calls(group, channels: int, device: str) -> Callable[[], object]:
    sizes = 4 * channels + 1, 2 * channels
    sums = [torch.zeros(size, dtype=torch.float64, device=device) for size in sizes]

    def run() -> None:
        for message in sums:
            group.allreduce(message).wait()

    return run


def contestants(shape: tuple[int, ...], device: str, free) -> dict[str, Callable[[], object]]:
    channels = shape[1]
    x = torch.randn(shape, device=device, requires_grad=True)
    dy = torch.randn(shape, device=device)

    def step(layer: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            x.grad = None
            layer(x).backward(dy)
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    layers = {
        "ours": batchnorm_ext.SyncBatchNorm(channels),
        "local": batchnorm_ext.BatchNorm2d(channels),
        "free": batchnorm_ext.SyncBatchNorm(channels, process_group=free),
    }
    if device == "cuda":
        layers["native"] = nn.SyncBatchNorm(channels)
    calls = {name: step(layer.to(device)) for name, layer in layers.items()}
    for name in PEERS.keys() - calls.keys():
        weight, bias = (torch.ones(channels, requires_grad=True, device=device) for _ in range(2))
        mean, var = torch.zeros(channels, device=device), torch.ones(channels, device=device)
        operands = weight, bias, mean, var, dist.group.WORLD
        calls[name] = step(lambda x, peer=PEERS[name], a=operands: peer(x, *a))
    return calls | {"calls": free_calls(free, channels, device)}


def all_processor_seconds() -> tuple[float, float]:
    """processor_seconds() with the ranks in place of this process."""
    total, others = processor_seconds()
    own = os.times()
    used = torch.tensor([own.user + own.system], dtype=torch.float64)
    dist.all_reduce(used)
    return total, others + own.user + own.system - used.item()


def timed(calls: dict[str, Callable[[], object]], rounds: int) -> Timing:
    """All ranks start each sample together and in the same order."""
    for call in calls.values():
        for _ in range(WARMUP):
            call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = sorted(calls)
    before = all_processor_seconds()
    with no_gc():
        for i in range(rounds):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                dist.barrier()
                start = perf_counter()
                calls[name]()
                samples[name].append(perf_counter() - start)
    seconds = {name: median(times) for name, times in samples.items()}
    return Timing(seconds, disturbance(before, all_processor_seconds()))


def serve(rank: int, ranks: int, store: str, args: argparse.Namespace, pipe) -> None:
    """One rank. The first one sends the rows."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        # Otherwise a rank that was waiting may wake up on the core of another, and stay there.
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
        # Threads of gloo share this core. Without SCHED_BATCH some messages take milliseconds more.
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    free = dist.new_group(backend="fake")
    for batch in args.batch:
        shapes = list(layer_shapes("resnet50", batch).items())
        for shape, count in shapes[:: 6 if args.quick else 1]:
            torch.manual_seed(rank)
            timing = timed(contestants(shape, args.device, free), args.rounds)
            row = {"ranks": ranks, "batch": batch, "shape": results.shape_name(shape)}
            if rank == 0:
                pipe.send(row | {"resnet50": count} | timing.row())
    dist.barrier()
    # A thread of gloo that releases a tensor while Python shuts down would abort.
    os._exit(0)


def run(ranks: int, args: argparse.Namespace, bar: tqdm) -> list[dict]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as directory:
        operands = ranks, str(Path(directory) / "store"), args, theirs
        processes = [context.Process(target=serve, args=(r, *operands)) for r in range(ranks)]
        for process in processes:
            process.start()
        theirs.close()
        rows = []
        try:
            while True:
                rows.append(ours.recv())
                bar.update()
        except EOFError:  # all ranks are done
            for process in processes:
                process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a rank failed")
    return rows


def main() -> None:
    parser = make_parser(__doc__, rounds=31)
    parser.add_argument("--ranks", type=numbers, default=[2, 4], help="comma-separated (2,4)")
    parser.add_argument("--batch", type=numbers, default=[2, 8], help="of each rank (2,8)")
    args = parser.parse_args()
    environment.use_allocator(args.allocator)
    args.rounds = 3 if args.quick else args.rounds
    machine = environment.machine(args.device) | {"threads": 1, "rounds": args.rounds}
    machine |= {"quick": True} if args.quick else {}
    with tqdm(unit="layer", file=sys.stderr) as bar:
        rows = [row for ranks in args.ranks for row in run(ranks, args, bar)]
    results.write(args.out / "sync.csv", machine, pd.DataFrame(rows))
    print(report.sync_table(pd.DataFrame(rows)))


if __name__ == "__main__":
    main()
