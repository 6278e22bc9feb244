"""SyncBatchNorm against its peers: one layer, forward and backward, on several ranks.

    python benchmarks/bench_sync.py --allocator tcmalloc --ranks 2 4

Over the layer shapes of ResNet-50 with a small batch, one core and one thread for each rank of a
gloo process group. Writes sync.csv: milliseconds of this library's SyncBatchNorm ("ours"), of the
messages of torch.nn.SyncBatchNorm around our kernels ("native"), of the layer in PyTorch operators
("plain"), and of our BatchNorm2d, which does not synchronize ("local").
"""

import os
import tempfile
from argparse import Namespace
from collections.abc import Callable

import pandas as pd
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

import batchnorm_ext
import environment
import report
import results
from cases import layer_shapes
from timing import interleaved

ops = torch.ops.batchnorm_ext
MOMENTUM, EPS = 0.1, 1e-5


def gather_statistics(sums: Tensor) -> Tensor:
    """all_gather of [mean, invstd, count] in float32 without empty ranks, then the merge."""
    count, channels = sums[-1:], sums.numel() // 4
    mean, square = (sums[:-1].view(2, 2, channels).sum(1) / count).unbind()
    combined = torch.cat([mean, (square - mean.square() + EPS).rsqrt(), count]).float()
    gathered = [torch.empty_like(combined) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, combined)
    gathered = torch.stack(gathered)
    gathered = gathered[gathered[:, -1] >= 1].double()
    means, invstds, counts = gathered.split([channels, channels, 1], dim=1)
    # merged in the form that the local kernel takes, in which each sum has a second part
    squares = invstds.pow(-2) - EPS + means.square()
    merged = torch.stack([means, squares], 1).mul(counts[:, None]).sum(0)
    return torch.cat([F.pad(merged[:, None], (0, 0, 0, 1)).flatten(), counts.sum(0)])


class Native(torch.autograd.Function):
    """The messages of torch.nn.SyncBatchNorm, which refuses CPU tensors, around our kernels."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var):
        sums = gather_statistics(ops.moments(x))
        state = running_mean, running_var, None
        y, stats = ops.apply_update(x, weight, bias, *state, sums, MOMENTUM, EPS)
        ctx.save_for_backward(x, weight, stats, sums[-1:])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, stats, count = ctx.saved_tensors
        local = ops.grad_moments(dy, x, stats)
        dbias, dweight = local.float().chunk(2)
        total = local.float()
        dist.all_reduce(total)
        dx = ops.grad_apply(dy, x, weight, stats, total.double(), count)
        return dx, dweight, dbias, None, None


class AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local: Tensor) -> Tensor:
        total = local.clone()
        dist.all_reduce(total)
        return total

    backward = forward  # the gradient is added up over the ranks as well


def plain(x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor):
    """As in detectron2's NaiveSyncBatchNorm: mean and mean of squares of equal batches, averaged
    over the ranks by a differentiable all_reduce."""
    dims = [d for d in range(x.dim()) if d != 1]
    means = torch.cat([x.mean(dims), (x * x).mean(dims)])
    mean, square = (AllReduce.apply(means) / dist.get_world_size()).chunk(2)
    variance = square - mean * mean
    running_mean += MOMENTUM * (mean.detach() - running_mean)
    running_var += MOMENTUM * (variance.detach() - running_var)
    scale = weight * torch.rsqrt(variance + EPS)
    shift = bias - mean * scale
    shape = [-1 if d == 1 else 1 for d in range(x.dim())]
    return x * scale.view(shape) + shift.view(shape)


def contestants(shape: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    channels = shape[1]
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)

    def step(layer: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            x.grad = None
            layer(x).backward(dy)

        return run

    def peer(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        weight, bias = (torch.ones(channels, requires_grad=True) for _ in range(2))
        mean, var = torch.zeros(channels), torch.ones(channels)
        return lambda x: function(x, weight, bias, mean, var)

    return {
        "ours": step(batchnorm_ext.SyncBatchNorm(channels)),
        "native": step(peer(Native.apply)),
        "plain": step(peer(plain)),
        "local": step(batchnorm_ext.BatchNorm2d(channels)),
    }


def serve(rank: int, ranks: int, directory: str, args: Namespace) -> None:
    """One rank. The first one writes the rows."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        # Otherwise a rank that was waiting may wake up on the core of another, and stay there.
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
        # Threads of gloo share this core. Without SCHED_BATCH some messages take milliseconds more.
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    dist.init_process_group("gloo", f"file://{directory}/store", rank=rank, world_size=ranks)
    cases = [(b, *item) for b in args.batch for item in layer_shapes("resnet50", b).items()]
    rows = []
    for batch, shape, count in cases[:: 6 if args.quick else 1]:
        torch.manual_seed(rank)
        # The barrier lets all ranks start a sample together.
        times = interleaved(contestants(shape), args.rounds, after_sample=dist.barrier)
        del times["disturbance"]  # which counts the other ranks
        row = {"ranks": ranks, "batch": batch, "shape": results.shape_name(shape)}
        rows.append(row | {"resnet50": count} | times)
    if rank == 0:
        pd.DataFrame(rows).to_csv(f"{directory}/rows.csv", index=False)
    dist.barrier()
    os._exit(0)  # a thread of gloo that releases a tensor while Python shuts down would abort


def main() -> None:
    parser = environment.make_parser(__doc__, rounds=31)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 8], help="of each rank")
    parser.set_defaults(threads=1)
    args = parser.parse_args()
    environment.start(args)
    path, machine = args.out / "sync.csv", environment.machine(args)
    frames = []
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as directory:
            torch.multiprocessing.spawn(serve, (ranks, directory, args), nprocs=ranks)
            frames.append(pd.read_csv(f"{directory}/rows.csv"))
    rows = pd.concat(frames)
    results.write(path, machine, rows)
    print(f"{path}\n\n{report.sync_table(rows)}")


if __name__ == "__main__":
    main()
