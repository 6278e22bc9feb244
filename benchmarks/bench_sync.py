"""SyncBatchNorm against its peers: one layer forward and backward on several ranks.

    python benchmarks/bench_sync.py --json sync.json --plot sync.png
    python benchmarks/bench_sync.py --ranks 2 --batch 2 --rounds 5
    python benchmarks/bench_sync.py --device cuda --ranks 2

Over the layer shapes of ResNet-50, with a small batch, a core and a thread on each rank of a gloo
process group. All contestants but "plain torch" run the same local kernels; "free messages" is our
layer in a group whose messages arrive at once, and "free calls" those messages alone; "halves" is
what it computes and "fused" what the local layer computes, without autograd and messages. On CUDA,
torch.nn.SyncBatchNorm itself takes part instead of its algorithm. The times of single messages are
fitted by a cost model (sync_model.py), drawn up to 16,384 ranks.
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

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: F401  (the backend)
from tqdm import tqdm

import batchnorm_ext
import sync_model
from cases import layer_shapes
from environment import environment
from mapped import MALLOC
from networks import NETWORKS
from results import save, sync_verdicts
from sync_peers import PEERS
from tables import sync_table, verdict_table
from timing import no_gc, processor_seconds

ops = torch.ops.batchnorm_ext
WARMUP = 3


def kernels(x: torch.Tensor, dy: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The operators of a step in sequence: ours, and those of the local layer."""
    weight, bias, mean, var = (x.new_ones(x.shape[1]) for _ in range(4))
    parameters = weight, bias, mean, var, torch.tensor(0, device=x.device)

    def halves() -> None:
        sums = ops.moments(x)
        y, stats = ops.apply_update(x, *parameters, sums, 0.1, 1e-5)
        grads = ops.grad_moments(dy, x, stats)
        dx = ops.grad_apply(dy, x, weight, stats, grads, sums[-1:])
        del y, dx

    def fused() -> None:
        y, stats = ops.batch_norm_update(x, *parameters, 0.1, 1e-5)
        dx, *_ = ops.batch_norm_backward(dy, x, weight, stats, True, [True] * 3)
        del y, dx

    return {"halves": halves, "fused": fused}


def free_calls(group, channels: int, device: str) -> Callable[[], object]:
    """What PyTorch takes to send our two messages in a group where they arrive at once."""
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
        "free messages": batchnorm_ext.SyncBatchNorm(channels, process_group=free),
        "local": batchnorm_ext.BatchNorm2d(channels),
    }
    if device == "cuda":
        layers["native"] = nn.SyncBatchNorm(channels)
    calls = {name: step(layer.to(device)) for name, layer in layers.items()}
    for name, peer in PEERS.items() if device == "cpu" else ():
        weight, bias = (torch.ones(channels, requires_grad=True) for _ in range(2))
        state = torch.zeros(channels), torch.ones(channels), dist.group.WORLD
        calls[name] = step(lambda x, peer=peer, a=(weight, bias, *state): peer(x, *a))
    return calls | {"free calls": free_calls(free, channels, device)} | kernels(x.detach(), dy)


def messages(channels: int, ranks: int) -> dict[str, Callable[[], object]]:
    """The single messages of the contestants' forwards."""
    ours = torch.zeros(4 * channels + 1, dtype=torch.float64)
    native = torch.zeros(2 * channels + 1)
    gathered = [torch.empty_like(native) for _ in range(ranks)]
    return {
        "all_reduce float64": lambda: dist.all_reduce(ours),
        "all_reduce float32": lambda: dist.all_reduce(native),
        "all_gather float32": lambda: dist.all_gather(gathered, native),
    }


def timed(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds per call; all ranks start each sample together and in the same order."""
    for call in calls.values():
        for _ in range(WARMUP):
            call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    with no_gc():
        for i in range(rounds):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                dist.barrier()
                start = perf_counter()
                calls[name]()
                samples[name].append(perf_counter() - start)
    return {name: median(times) for name, times in samples.items()}


def disturbance(before: tuple[float, float], after: tuple[float, float]) -> float:
    """The part of the processors' time that others than the ranks took; see timing.py."""
    total, others = (b - a for a, b in zip(before, after, strict=True))
    return max(others / total, 0.0) if total else 0.0


def all_processor_seconds() -> tuple[float, float]:
    total, others = processor_seconds()
    own = os.times()
    used = torch.tensor([own.user + own.system], dtype=torch.float64)
    dist.all_reduce(used)
    return total, others + own.user + own.system - used.item()


def serve(rank: int, ranks: int, store: str, args: argparse.Namespace, pipe) -> None:
    """One rank; the first one sends the rows."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        # else a rank that was waiting may wake up on the core of another, and stay there
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
        # else a message now and then takes some milliseconds more: threads of gloo share this core
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    free = dist.new_group(backend="fake")
    for batch in args.batch:
        with torch.device("meta"):
            network = NETWORKS["resnet50"]()
        for shape, count in layer_shapes(network, batch).items():
            torch.manual_seed(rank)
            before = all_processor_seconds()
            seconds = timed(contestants(shape, args.device, free), args.rounds)
            single = timed(messages(shape[1], ranks), args.rounds)
            row = {
                "ranks": ranks,
                "batch": batch,
                "shape": shape,
                "layers": count,
                "seconds": seconds,
                "messages": single,
                "disturbance": disturbance(before, all_processor_seconds()),
            }
            if rank == 0:
                pipe.send(row)
    dist.barrier()
    # At once: a thread of gloo that lets go of a tensor while Python shuts down would abort.
    os._exit(0)


def run(ranks: int, args: argparse.Namespace, bar: tqdm) -> list[dict]:
    context = multiprocessing.get_context("spawn")
    os.environ.update(MALLOC)  # else whose outputs cost page faults is a matter of luck
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as directory:
        store = str(Path(directory) / "store")
        processes = [
            context.Process(target=serve, args=(rank, ranks, store, args, theirs))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        theirs.close()
        rows = []
        try:
            while True:
                rows.append(ours.recv())
                bar.update()
        except EOFError:  # all are done
            for process in processes:
                process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a rank failed")
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = {"type": lambda text: [int(part) for part in text.split(",")]}
    parser.add_argument("--ranks", default=[2, 4], help="comma-separated (2,4)", **numbers)
    parser.add_argument(
        "--batch", default=[2, 8], help="per rank, comma-separated (2,8)", **numbers
    )
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--plot", type=Path, help="draw the cost model into this file")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    console = Console(width=None if sys.stdout.isatty() else 160)
    machine = environment() | {"threads": 1}
    console.print("\n".join(f"{key}: {value}" for key, value in machine.items()), highlight=False)
    with tqdm(unit="layer", file=sys.stderr) as bar:
        rows = [row for ranks in args.ranks for row in run(ranks, args, bar)]
    for ranks in args.ranks:
        for batch in args.batch:
            sync_table(rows, ranks, batch).print(console)
    verdict_table(sync_verdicts(rows)).print(console)
    model = sync_model.fit(rows)
    console.print(str(model), highlight=False)
    if args.json:
        settings = {"rounds": args.rounds, "device": args.device, "model": model._asdict()}
        save(args.json, "sync", machine, settings, rows)
    if args.plot:
        sync_model.plot(model, rows, args.plot)


if __name__ == "__main__":
    main()
