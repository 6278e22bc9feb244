"""Derivatives of SyncBatchNorm across ranks, to the third order, by finite differences."""

import pytest
import torch
import torch.distributed as dist

import batchnorm_ext  # noqa: F401  the operators, on the ranks too


class Linear(torch.autograd.Function):
    """A linear map of what the ranks hold, differentiated to any order by its adjoint."""

    @staticmethod
    def forward(ctx, value, function, adjoint):
        ctx.functions = adjoint, function
        return function(value)

    @staticmethod
    def backward(ctx, gradient):
        return Linear.apply(gradient, *ctx.functions), None, None


def _scatter(whole):
    """This rank's part of a whole that is the same on every rank; the adjoint of the next."""
    return whole.chunk(dist.get_world_size())[dist.get_rank()].clone()


def _gather(part):
    """The whole of what the ranks have parts of, where the whole is the same on every rank."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts)


def _share(parameter):
    """A parameter of every rank, whose gradient is the sum of theirs."""
    return parameter.clone()


def _add(summand):
    total = summand.clone()
    dist.all_reduce(total)
    return total


def check_derivatives(affine, order):
    """All ranks hold the same whole input, normalize their parts and put them together."""
    op = torch.ops.batchnorm_ext.sync_batch_norm
    name = dist.group.WORLD.group_name

    def normalize(x, *parameters):
        shared = [Linear.apply(p, _share, _add) for p in parameters]
        weight, bias = shared if affine else (None, None)
        part = Linear.apply(x, _scatter, _gather)
        y, _ = op(part, weight, bias, None, None, None, 0.1, 1e-3, name, "layer")
        return Linear.apply(y, _gather, _scatter)

    def gradient(x, *parameters):
        y = normalize(x, *parameters)
        return torch.autograd.grad(y.pow(3).sum(), (x, *parameters[:1]), create_graph=True)

    leaves = [(4, 2, 3), *[(2,)] * (2 * affine)]
    leaves = [torch.randn(size, dtype=torch.float64).requires_grad_() for size in leaves]
    if order == 1:
        assert torch.autograd.gradcheck(normalize, leaves)
    else:
        assert torch.autograd.gradgradcheck(normalize if order == 2 else gradient, leaves)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_derivatives(order, affine, ranks):
    ranks(2).run(check_derivatives, affine, order)
