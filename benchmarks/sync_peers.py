"""The layers that SyncBatchNorm is measured against, training forward and backward only.

Each is a function (x, weight, bias, running_mean, running_var, group) -> y.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

ops = torch.ops.batchnorm_ext
MOMENTUM, EPS = 0.1, 1e-5


class Synchronized(torch.autograd.Function):
    """Our local kernels around a peer's messages.

    ``exchange(sums, group)`` and ``exchange_back(sums, group)`` make those of all ranks of the sums
    of this rank, which they may overwrite.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, group, exchange, exchange_back):
        sums = exchange(ops.moments(x), group)
        state = running_mean, running_var, None
        y, stats = ops.apply_update(x, weight, bias, *state, sums, MOMENTUM, EPS)
        ctx.save_for_backward(x, weight, stats, sums[-1:])
        ctx.group, ctx.exchange_back = group, exchange_back
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, stats, count = ctx.saved_tensors
        local = ops.grad_moments(dy, x, stats)
        dbias, dweight = local.float().chunk(2)
        dx = ops.grad_apply(dy, x, weight, stats, ctx.exchange_back(local, ctx.group), count)
        return dx, dweight, dbias, *[None] * 5


def gather_statistics(sums: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Forward in torch.nn.SyncBatchNorm, which refuses CPU tensors: all_gather of [mean, invstd,
    count] in the dtype of the statistics, ranks without elements masked out, then the merge."""
    count = sums[-1:]
    channels = sums.numel() // 4
    mean, square = sums[:-1].view(2, 2, channels).sum(1) / count
    invstd = (square - mean.square() + EPS).rsqrt()
    combined = torch.cat([mean, invstd, count]).float()
    gathered = [torch.empty_like(combined) for _ in range(group.size())]
    dist.all_gather(gathered, combined, group=group)
    means, invstds, counts = torch.stack(gathered).split([channels, channels, 1], dim=1)
    mask = counts.squeeze(-1) >= 1
    means, invstds, counts = means[mask].double(), invstds[mask].double(), counts[mask].double()
    # merged in the form that the local kernel takes, where each sum has a second part
    squares = invstds.pow(-2) - EPS + means.square()
    merged = torch.stack([means, squares], 1).mul(counts[:, None]).sum(0)
    return torch.cat([F.pad(merged[:, None], (0, 0, 0, 1)).flatten(), counts.sum(0)])


def add_in_float32(sums: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Backward in torch.nn.SyncBatchNorm: one all_reduce of 2 C sums."""
    total = sums.float()
    dist.all_reduce(total, group=group)
    return total.double()


def add_each_moment(sums: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The same sums as ours, each moment in a message of its own."""
    for part in sums.tensor_split([sums.numel() // 2]):
        dist.all_reduce(part, group=group)
    return sums


class AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local, group):
        ctx.group = group
        total = local.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return AllReduce.forward(ctx, gradient, ctx.group), None


def plain_torch(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, group
) -> Tensor:
    """Written in PyTorch operators, as detectron2's NaiveSyncBatchNorm is: mean and mean of squares
    of equal batches, averaged over the ranks by a differentiable all_reduce."""
    dims = [d for d in range(x.dim()) if d != 1]
    means = torch.cat([x.mean(dims), (x * x).mean(dims)])
    mean, square = (AllReduce.apply(means, group) / group.size()).chunk(2)
    variance = square - mean * mean
    running_mean += MOMENTUM * (mean.detach() - running_mean)
    running_var += MOMENTUM * (variance.detach() - running_var)
    scale = weight * torch.rsqrt(variance + EPS)
    shift = bias - mean * scale
    shape = [-1 if d == 1 else 1 for d in range(x.dim())]
    return x * scale.view(shape) + shift.view(shape)


PEERS = {
    "native's algorithm": lambda *a: Synchronized.apply(*a, gather_statistics, add_in_float32),
    "two all-reduces": lambda *a: Synchronized.apply(*a, add_each_moment, add_each_moment),
    "plain torch": plain_torch,
}
