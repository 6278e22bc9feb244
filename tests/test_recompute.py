"""Outputs of norms that are computed again for backward: the same bits."""

import itertools
import re
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import batchnorm_ext
import fusing
from activations import ACTIVATIONS, INPUTS, NORMS, C, fused, gradients, make_problem
from batchnorm_ext import BatchNormAct2d
from benchmarks import networks
from cases import DTYPES
from fusing import conv
from recomputing import SIZE, assert_same_steps, everything
from support import assert_bitwise, ops

pytestmark = pytest.mark.usefixtures("no_hooks_are_left")


# The operator


@pytest.mark.parametrize("activation", ["", *ACTIVATIONS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_map_gives_the_same_bits(dtype, activation, device):
    name = batchnorm_ext._activations.activation_name(activation)
    for (size, layout), norm, has_residual in itertools.product(INPUTS, NORMS, (False, True)):
        groups = {"instance": C, "group": 2}.get(norm, 0)
        if (len(size) == 2 and groups) or (has_residual and activation == "leaky_relu(-0.5)"):
            continue
        if device.type == "cuda" and dtype == torch.float64 and (name or has_residual):
            continue  # there are no kernels for these
        p = make_problem(size, layout, dtype, has_residual, device)
        training = norm != "batch, evaluation"
        tensors = [p.x, p.weight, p.bias]
        state = [None, None] if training else [p.mean, p.var]
        with torch.no_grad():
            y, stats = ops.batch_norm(
                *tensors, *state, training, 1e-5, groups, True, 1, p.residual, name
            )
            again = ops.batch_norm_map(*tensors, stats, training, groups, p.residual, name)
        assert again.stride() == y.stride()
        assert_bitwise(f"{size}, {layout}, {norm}, residual {has_residual}", again, y)


@pytest.mark.parametrize(
    "scale, centre", [(1, 1e4), (1e-3, 1e6), (3e37, 0), (1e30, 3e38), (1e-38, 0)]
)
def test_the_map_of_extreme_channels(scale, centre, device):
    """Statistics that the forward mends, and centres that depend on the number of elements."""
    x = (
        torch.randn(3, C, 40, 9)
        .double()
        .mul(scale)
        .add(centre)
        .clamp(-3.4e38, 3.4e38)
        .float()
        .to(device)
    )
    for groups in (0, 2, C):
        y, stats = ops.batch_norm(x, None, None, None, None, True, 1e-5, groups)
        assert_bitwise("y", ops.batch_norm_map(x, None, None, stats, True, groups, None, ""), y)


def test_what_the_map_refuses():
    x, stats = torch.randn(5, C), torch.zeros(2, C, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="more than one element per sample and channel"):
        ops.batch_norm_map(x, None, None, stats[:, :5].contiguous(), True, 1, None, "")
    with pytest.raises(RuntimeError, match=r"expected stats to be .* of size \[2, 8\]"):
        ops.batch_norm_map(x, None, None, stats[:, 1:].contiguous(), True, 0, None, "")
    with pytest.raises(RuntimeError, match="expected residual like input"):
        ops.batch_norm_map(x, None, None, stats, True, 0, x[1:], "relu")
    with pytest.raises(NotImplementedError, match="weight should contain 8 elements not 3"):
        ops.batch_norm_map(x, torch.ones(3), None, stats, True, 0, None, "")
    y = ops.batch_norm_map(x.to("meta"), None, None, stats.to("meta"), True, 0, None, "relu")
    assert y.is_meta and y.shape == x.shape


# Gradients


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size, layout", [INPUTS[0], INPUTS[2], INPUTS[4], INPUTS[8]], ids=str)
def test_gradients_are_the_same_bits(size, layout, dtype, activation, device):
    for norm, has_residual in itertools.product(NORMS, (False, True)):
        p = make_problem(size, layout, dtype, has_residual, device)

        def found(context, norm=norm, p=p):
            with context():
                y = fused(p, norm, activation)
                return gradients(y * y.sin(), p)

        expected, actual = found(nullcontext), found(everything)
        for name, value in expected.items():
            assert_bitwise(f"{name}, {norm}, residual {has_residual}", actual[name], value)


@pytest.mark.parametrize("activation", ["relu", "silu", "identity"])
def test_derivatives_of_second_order_and_backward_twice(activation):
    p = make_problem((3, C, 5, 4), "contiguous", torch.float64, True)
    leaves = list(p.leaves.values())

    def found(context):
        with context():
            y = fused(p, "batch, training", activation)
            loss = (y * y.sin()).square().sum()
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        again = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in again), leaves)
        return [*first, *again, *second]

    for actual, expected in zip(found(everything), found(nullcontext), strict=True):
        assert_bitwise("gradient", actual, expected)


NETWORKS = {
    "resnet": fusing.ResNet,
    "resnet50": networks.resnet50,
    "mobilenetv2": networks.mobilenetv2,
    "basic blocks": lambda: nn.Sequential(*(fusing.BasicBlock(3, 3) for _ in range(5))),
    "preactivation": lambda: nn.Sequential(conv(3), *(fusing.PreActivation() for _ in range(3))),
    "plain norms": lambda: nn.Sequential(conv(3), fusing.norm(), fusing.norm(), conv()),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, memory_format, training):
    model = batchnorm_ext.convert(batchnorm_ext.fuse(NETWORKS[name]())).train(training)
    x = torch.randn(2, 3, 32, 32).to(memory_format=memory_format)
    assert_same_steps(model.to(memory_format=memory_format), x)


# Writing to tensors


@pytest.mark.parametrize("write", ["add_", "no_grad", "view"])
def test_outputs_that_are_written_to_are_kept(write):
    x = torch.randn(SIZE, requires_grad=True)
    layer = BatchNormAct2d(C)

    def found(context):
        with context():
            y = layer(x)
            if write == "no_grad":
                with torch.no_grad():
                    y.add_(1)
            else:
                (y if write == "add_" else y.view(-1)).add_(1)
            return torch.autograd.grad((y * y.sin()).sum(), [x, layer.weight])

    for actual, expected in zip(found(everything), found(nullcontext), strict=True):
        assert_bitwise("gradient", actual, expected)


def _written_input(layer, x):
    x = x.sin()
    loss = layer(x).square().sum()
    with torch.no_grad():
        x.add_(1)
    return loss


def _written_weight(layer, x):
    loss = layer(x).square().sum()
    with torch.no_grad():
        layer.weight.add_(1)
    return loss


def _written_factor(layer, x):
    y, factor = layer(x), x.exp()
    loss = (y * factor).sum()
    factor.add_(1)
    return loss


@pytest.mark.parametrize("run", [_written_input, _written_weight, _written_factor])
def test_what_is_needed_and_written_to_raises_as_natively(run):
    messages = []
    for context in (nullcontext, everything):
        layer, x = BatchNormAct2d(C), torch.randn(SIZE, requires_grad=True)
        with context():
            loss = run(layer, x)
        with pytest.raises(RuntimeError, match="modified by an inplace operation") as error:
            loss.backward()
        # which operation made it is not known any more
        messages.append(re.sub(", which is output .*? of .*?, is", " is", str(error.value)))
    assert messages[0] == messages[1]
