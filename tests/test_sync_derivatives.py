"""Derivatives of SyncBatchNorm across ranks, to the third order, by finite differences."""

import pytest
import torch
import torch.distributed as dist

import batchnorm_ext  # noqa: F401  the operators, on the ranks too
from activations import ACTIVATIONS


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


def check_derivatives(affine, order, activation="", has_residual=False):
    """All ranks hold the same whole input, normalize their parts and put them together."""
    op = torch.ops.batchnorm_ext.sync_batch_norm
    name = dist.group.WORLD.group_name

    def normalize(x, *others):
        parts = [Linear.apply(t, _scatter, _gather) for t in (x, *others[: int(has_residual)])]
        shared = [Linear.apply(p, _share, _add) for p in others[int(has_residual) :]]
        weight, bias = shared if affine else (None, None)
        state = (None, None, None, 0.1, 1e-3, name, "layer")
        y, _ = op(parts[0], weight, bias, *state, *(parts[1:] or [None]), activation)
        return Linear.apply(y, _gather, _scatter)

    def gradient(x, *others):
        y = normalize(x, *others)
        return torch.autograd.grad(y.pow(3).sum(), (x, *others[:1]), create_graph=True)

    leaves = [(4, 2, 3), *[(4, 2, 3)] * has_residual, *[(2,)] * (2 * affine)]
    leaves = [torch.randn(size, dtype=torch.float64).requires_grad_() for size in leaves]
    fast = bool(activation)  # there are many: along random directions, the same on every rank
    if order == 1:
        assert torch.autograd.gradcheck(normalize, leaves, fast_mode=fast)
    else:
        function = normalize if order == 2 else gradient
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=fast)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_derivatives(order, affine, ranks):
    ranks(2).run(check_derivatives, affine, order)


def check_activated(order):
    for has_residual in (False, True):
        for affine in (True, False):
            for activation in ACTIVATIONS if order < 3 else ("relu", "silu"):
                refused = has_residual and activation == "leaky_relu(-0.5)"
                if activation != "identity" and not refused:
                    check_derivatives(affine, order, activation, has_residual)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_derivatives_through_activations(order, ranks):
    ranks(2).run(check_activated, order)
