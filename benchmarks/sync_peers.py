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


class Native(torch.autograd.Function):
    """The messages of torch.nn.SyncBatchNorm, which refuses CPU tensors, around our kernels."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, group):
        sums = gather_statistics(ops.moments(x), group)
        state = running_mean, running_var, None
        y, stats = ops.apply_update(x, weight, bias, *state, sums, MOMENTUM, EPS)
        ctx.save_for_backward(x, weight, stats, sums[-1:])
        ctx.group = group
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, stats, count = ctx.saved_tensors
        local = ops.grad_moments(dy, x, stats)
        dbias, dweight = local.float().chunk(2)
        total = local.float()
        dist.all_reduce(total, group=ctx.group)
        dx = ops.grad_apply(dy, x, weight, stats, total.double(), count)
        return dx, dweight, dbias, None, None, None


def gather_statistics(sums: Tensor, group: dist.ProcessGroup) -> Tensor:
    """all_gather of [mean, invstd, count] in float32 without empty ranks, then the merge."""
    count = sums[-1:]
    channels = sums.numel() // 4
    mean, square = (sums[:-1].view(2, 2, channels).sum(1) / count).unbind()
    combined = torch.cat([mean, (square - mean.square() + EPS).rsqrt(), count]).float()
    gathered = [torch.empty_like(combined) for _ in range(group.size())]
    dist.all_gather(gathered, combined, group=group)
    gathered = torch.stack(gathered)
    gathered = gathered[gathered[:, -1] >= 1].double()
    means, invstds, counts = gathered.split([channels, channels, 1], dim=1)
    # merged in the form that the local kernel takes, in which each sum has a second part
    squares = invstds.pow(-2) - EPS + means.square()
    merged = torch.stack([means, squares], 1).mul(counts[:, None]).sum(0)
    return torch.cat([F.pad(merged[:, None], (0, 0, 0, 1)).flatten(), counts.sum(0)])


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


def plain(x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, group):
    """PyTorch operators, as in detectron2's NaiveSyncBatchNorm: mean and mean of squares of equal
    batches, averaged over the ranks by a differentiable all_reduce."""
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


PEERS = {"native": Native.apply, "plain": plain}
