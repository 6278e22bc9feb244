"""A small network, native and converted, for the tests of tools."""

import copy

import pytest
import torch
from torch import nn

import batchnorm_ext

# float32 roundings of two correct implementations, values of order 1, over a few layers and steps
CLOSE = {"rtol": 1e-4, "atol": 1e-5}

conversions = pytest.mark.parametrize(
    "convert", [batchnorm_ext.convert, batchnorm_ext.convert_sync_batchnorm]
)
on_cpu = pytest.mark.only("cpu", reason="a tool of the CPU")


class Net(nn.Module):
    """Each of the layers that batch norm is fused with."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(8 * 36, 5)
        self.bn1d = nn.BatchNorm1d(5, momentum=0.3)

    def forward(self, x):
        return self.bn1d(self.linear(self.flatten(self.relu(self.bn(self.conv(x))))))


def make_pair(convert, device, training=True):
    """A native model with statistics of its own, and the same one converted."""
    native = Net().to(device)
    with torch.no_grad():
        for layer in (native.bn, native.bn1d):
            layer.weight.normal_()
            layer.bias.normal_()
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    native.train(training)
    return native, convert(copy.deepcopy(native))


def make_input(device, batch=4):
    return torch.randn(batch, 3, 8, 8, device=device)


def assert_same_state(actual, expected, close=CLOSE):
    actual, expected = dict(actual), dict(expected)
    assert set(actual) == set(expected)
    for name, value in actual.items():
        torch.testing.assert_close(
            value, expected[name], **close, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_same_step(model, native, x):
    """One training step: outputs, gradients and running statistics."""
    y, expected = model(x), native(x)
    torch.testing.assert_close(y, expected, **CLOSE)
    for output in (y, expected):
        output.pow(3).mean().backward()
    assert_same_state(
        {n: p.grad for n, p in model.named_parameters()},
        {n: p.grad for n, p in native.named_parameters()},
    )
    assert_same_state(model.named_buffers(), native.named_buffers())
