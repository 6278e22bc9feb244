"""Every spelling of a norm, an addition and an activation is fused, with the same numbers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm_ext
from fusing import (
    EXACT,
    OF_HARDSIGMOID,
    C,
    assert_fuses,
    assert_same,
    block,
    conv,
    image,
    norm,
    pair,
)

pytestmark = pytest.mark.only("cpu", reason="of forwards alone")

MODULES = {
    "relu": nn.ReLU(),
    "relu, in place": nn.ReLU(inplace=True),
    "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(-0.5, 0.7),
    "leaky_relu": nn.LeakyReLU(0.3, inplace=True),
    "elu": nn.ELU(0.7),
    "silu": nn.SiLU(inplace=True),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "mish": nn.Mish(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
}
FUNCTIONS = {
    "F.relu": F.relu,
    "torch.relu": torch.relu,
    "x.relu": lambda x: x.relu(),
    "x.relu_": lambda x: x.relu_(),
    "torch.relu_": torch.relu_,
    "F.relu, in place": lambda x: F.relu(x, inplace=True),
    "F.relu, in place by position": lambda x: F.relu(x, True),
    "F.relu_": F.relu_,
    "F.relu6": F.relu6,
    "F.hardtanh": lambda x: F.hardtanh(x, -0.5, max_val=0.7),
    "F.hardtanh, defaults": F.hardtanh,
    "F.leaky_relu": lambda x: F.leaky_relu(x, negative_slope=0.3, inplace=True),
    "F.leaky_relu_": lambda x: F.leaky_relu_(x, 0.3),
    "F.elu": lambda x: F.elu(x, 0.7),
    "F.silu": F.silu,
    "F.gelu": F.gelu,
    "F.gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "F.hardswish": F.hardswish,
    "F.hardsigmoid": lambda x: F.hardsigmoid(x, inplace=True),
    "F.mish": F.mish,
    "torch.sigmoid": torch.sigmoid,
    "x.sigmoid": lambda x: x.sigmoid(),
    "x.sigmoid_": lambda x: x.sigmoid_(),
    "torch.tanh": torch.tanh,
    "x.tanh_": lambda x: x.tanh_(),
}


def _iadd(a, b):
    a += b
    return a


ADDITIONS = {
    "+": lambda a, b: a + b,
    "+, turned": lambda a, b: b + a,
    "+=": _iadd,
    "torch.add": torch.add,
    "torch.add, alpha 1": lambda a, b: torch.add(a, b, alpha=1),
    "x.add": lambda a, b: a.add(b),
    "x.add_": lambda a, b: a.add_(b),
}


# Spellings


@pytest.mark.parametrize("name", MODULES)
def test_activations_as_modules(name):
    act, tolerance = MODULES[name], OF_HARDSIGMOID if name == "hardsigmoid" else EXACT
    model = block(lambda m, x: m.act(m.bn1(m.conv1(x))), act=act, bn2=None)
    assert_fuses(model, image(), 1, tolerance=tolerance)
    model = nn.Sequential(conv(), norm(), copy.deepcopy(act))
    assert_fuses(model, image(), 1, tolerance=tolerance)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_activations_as_functions(name):
    act, tolerance = FUNCTIONS[name], OF_HARDSIGMOID if "hardsigmoid" in name else EXACT
    model = block(lambda m, x: act(m.bn1(m.conv1(x))), bn2=None)
    assert_fuses(model, image(), 1, tolerance=tolerance)


@pytest.mark.parametrize("name", ADDITIONS)
def test_additions(name):
    add = ADDITIONS[name]
    run = block(lambda m, x: torch.relu(add(m.bn1(m.conv1(x)), x)), bn2=None)
    assert_fuses(run, image(), 1)
    assert_fuses(block(lambda m, x: F.silu(add(m.bn1(m.conv1(x)), x)), bn2=None), image(), 1)
    assert_fuses(block(lambda m, x: add(m.bn1(m.conv1(x)), x).cos(), bn2=None), image(), 1)


@pytest.mark.parametrize("name", ADDITIONS)
def test_addition_of_two_norms(name):
    """One of them takes the other as its residual."""
    add = ADDITIONS[name]

    def run(m, x):
        return F.leaky_relu(add(m.bn1(m.conv1(x)), m.bn2(m.conv2(x))), 0.2, inplace=True)

    assert_fuses(block(run), image(), 1, 1)


def test_statements_in_place():
    """The name still stands for what has been written to."""

    def run(m, x):
        y = m.bn1(m.conv1(x))
        y.relu_()
        y = m.conv2(y) + y
        return m.bn2(y).cos()

    assert_fuses(block(run), image(), 1, 1)


@pytest.mark.parametrize(
    "layer",
    [
        nn.GroupNorm(2, C),
        nn.InstanceNorm2d(C, affine=True),
        nn.InstanceNorm2d(C),
        batchnorm_ext.BatchNorm2d(C, momentum=None),
        nn.BatchNorm2d(C, affine=False, track_running_stats=False),
    ],
)
def test_norms(layer):
    assert_fuses(block(lambda m, x: F.silu(m.bn1(m.conv1(x)) + x), bn1=layer, bn2=None), image(), 1)
    assert_fuses(nn.Sequential(conv(), copy.deepcopy(layer), nn.Hardswish()), image(), 1)


def test_functions_of_norms():
    def run(m, x):
        bn, training = m.bn1, m.training
        y = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, training, 0.2)
        y = F.relu(y)
        y = F.relu(x + F.group_norm(y, 2, bn.weight, bn.bias))
        return F.instance_norm(y, weight=bn.weight).sigmoid()

    model, fused, report = pair(block(run, bn2=None))
    assert set(report.done) == {"batch_norm", "group_norm", "instance_norm"}
    assert_same(fused, model, image())
    assert_same(fused.eval(), model.eval(), image())
