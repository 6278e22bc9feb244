"""SyncBatchNorm where ranks have nothing, want nothing, or are alone."""

import itertools

import pytest
import torch
import torch.distributed as dist

import batchnorm_ext
from batchnorm_ext import reference
from support import assert_bitwise
from sync_problems import CHANNELS, assert_close, make_batches, with_parameters


def check_all_empty():
    for affine, dtype in itertools.product([True, False], [torch.float32, torch.bfloat16]):
        layer = batchnorm_ext.SyncBatchNorm(CHANNELS, affine=affine)
        x = torch.empty(0, CHANNELS, 4, 3, dtype=dtype, requires_grad=True)
        before = {k: v.clone() for k, v in layer.named_buffers()}
        y = layer(x)
        y.sum().backward()
        assert y.shape == x.shape == x.grad.shape
        for name, buffer in layer.named_buffers():
            assert_bitwise(name, buffer, before[name])
        for parameter in layer.parameters():
            assert_bitwise("gradient", parameter.grad, torch.zeros(CHANNELS))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_all_ranks_empty(size, ranks):
    ranks(size).run(check_all_empty)


def check_one_element():
    layer = batchnorm_ext.SyncBatchNorm(CHANNELS)
    x = torch.full((1 - dist.get_rank(), CHANNELS), 3.0)
    y = layer(x)
    assert_bitwise("y", y, torch.zeros_like(x))
    torch.testing.assert_close(layer.running_mean, torch.full((CHANNELS,), 0.3))
    assert_bitwise("running_var", layer.running_var, torch.ones(CHANNELS))
    assert layer.num_batches_tracked == 1


def test_one_element_on_all_ranks_together(ranks):
    """It has no unbiased variance."""
    ranks(2).run(check_one_element)


def check_frozen():
    """Parameters that want no gradient; then the whole layer, in evaluation."""
    rank = dist.get_rank()
    batches = list(make_batches((3, 1), (4, 3), 1.0, 0, torch.float32))
    x, dy = batches[rank]
    layer = with_parameters(batchnorm_ext.SyncBatchNorm(CHANNELS)).requires_grad_(False)
    layer(x.requires_grad_()).backward(dy)
    whole, whole_dy = (torch.cat(t) for t in zip(*batches, strict=True))
    wanted = reference.batch_norm(whole, layer.weight, layer.bias, training=True)
    gradients = reference.batch_norm_backward(whole_dy, whole, layer.weight, wanted.stats, True)
    assert_close("dx", x.grad, gradients.dx.split((3, 1))[rank], 3e-6)
    assert layer.weight.grad is None and layer.bias.grad is None

    layer.eval().requires_grad_(True)
    twin = with_parameters(batchnorm_ext.BatchNorm2d(CHANNELS)).eval()
    twin.load_state_dict(layer.state_dict())
    results = []
    for module in (layer, twin):
        leaf = x.detach().clone().requires_grad_()
        y = module(leaf)
        y.backward(dy)
        results.append((y, leaf.grad, module.weight.grad, module.bias.grad))
    for name, ours, plain in zip(["y", "dx", "dweight", "dbias"], *results, strict=True):
        assert_bitwise(name, ours, plain)


def test_frozen(ranks):
    ranks(2).run(check_frozen)


def test_without_process_group_it_is_batch_norm():
    for training in (True, False):
        layer = with_parameters(batchnorm_ext.SyncBatchNorm(CHANNELS)).train(training)
        twin = with_parameters(batchnorm_ext.BatchNorm2d(CHANNELS)).train(training)
        ((x, dy),) = make_batches((4,), (4, 3), 1.0, 0, torch.float32)
        results = []
        for module in (layer, twin):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            y.backward(dy)
            gradients = [p.grad for p in module.parameters()]
            results.append([y, leaf.grad, *gradients, *module.buffers()])
        for ours, plain in zip(*results, strict=True):
            assert_bitwise("result", ours, plain)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        batchnorm_ext.SyncBatchNorm(CHANNELS)(torch.randn(1, CHANNELS))


def test_one_dimension_is_an_error_as_in_torch():
    for kind in (batchnorm_ext.SyncBatchNorm, torch.nn.SyncBatchNorm):
        with pytest.raises(ValueError, match=r"expected at least 2D input \(got 1D input\)"):
            kind(CHANNELS)._check_input_dim(torch.randn(CHANNELS))
    with pytest.raises(ValueError, match=r"got 1D input"):
        batchnorm_ext.SyncBatchNorm(CHANNELS)(torch.randn(CHANNELS))
