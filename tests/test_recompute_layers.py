"""Layers with ``recompute=True``."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm_ext
from activations import C
from batchnorm_ext import (
    BatchNorm2d,
    BatchNormAct2d,
    GroupNormAct,
    _recompute,
)
from fusing import conv
from keeping import kept_bytes
from recomputing import BYTES, SIZE, everything, logged, step
from support import assert_bitwise

pytestmark = pytest.mark.usefixtures("no_hooks_are_left")


def make_layered(recompute):
    torch.manual_seed(0)
    return nn.Sequential(
        conv(3, C),
        BatchNormAct2d(C, "relu", recompute=recompute),
        conv(C, C),
        GroupNormAct(2, C, "silu", recompute=recompute),
        nn.Flatten(),
        nn.Linear(C * 256, 3),
    )


def test_layers_that_recompute():
    x = torch.randn(4, 3, 16, 16)
    expected = step(make_layered(False), x)
    for name, value in step(make_layered(True), x).items():
        assert_bitwise(name, value, expected[name])
    plain, layered = make_layered(False), make_layered(True)
    given = [x, *plain.state_dict().values(), *layered.state_dict().values()]
    kept = kept_bytes(lambda: plain(x).sum(), given)
    less = kept_bytes(lambda: layered(x).sum(), given)
    assert round((kept - less) / BYTES, 2) == 2
    assert less == kept_bytes(lambda: plain(x).sum(), given, everything)


def test_output_of_a_layer_that_recomputes():
    x, layer = torch.randn(2, C, 6, 6, requires_grad=True), BatchNormAct2d(C, recompute=True)
    y = layer(x)
    assert isinstance(y, torch.Tensor) and isinstance(y, batchnorm_ext._recompute.RecomputedTensor)
    for result in (y + 1, y.detach(), F.relu(y), y.sum(), torch.cat([y, y]), y.chunk(2)[0], y.data):
        assert type(result) is torch.Tensor
    assert type(layer(x.detach().requires_grad_(False).add(y.detach()))) is not torch.Tensor
    assert type(layer.requires_grad_(False)(x.detach())) is torch.Tensor  # has no gradient
    assert repr(y) and "recompute=True" in repr(layer)
    with pytest.raises(RuntimeError, match="must match the size"):
        y + torch.ones(7)
    copied = copy.deepcopy(layer)
    assert copied.recompute and not copy.deepcopy(BatchNormAct2d(C)).recompute


def test_layers_that_recompute_after_each_other():
    """Their outputs go to other norms, to residuals and to what writes to them."""

    def run(recompute):
        torch.manual_seed(0)
        layers = [BatchNormAct2d(C, "silu", recompute=recompute) for _ in range(3)]
        plain, x = BatchNorm2d(C), torch.randn(SIZE, requires_grad=True)
        y = layers[0](x)
        z = layers[1](plain(y), y)
        w = layers[2](z.sin(), y * z)
        w += 1
        gradients = torch.autograd.grad((w * z.exp()).sum(), [x, plain.weight, layers[0].weight])
        return [w, *gradients]

    for actual, expected in zip(run(True), run(False), strict=True):
        assert_bitwise("result", actual.as_subclass(torch.Tensor), expected)
    first, second = (BatchNormAct2d(C, "silu", recompute=True) for _ in range(2))
    for _ in range(5):  # not only some of the outputs, as by default in recompute_activations
        y = second(first(torch.randn(SIZE, requires_grad=True)))
        assert type(y) is batchnorm_ext._recompute.RecomputedTensor


def test_compiled_layers_that_recompute(fresh_dynamo, caplog):
    _recompute.log_kept_once.cache_clear()
    caplog.set_level(logging.DEBUG, logger="batchnorm_ext")
    x = torch.randn(4, 3, 16, 16)
    expected = step(make_layered(False), x)
    model = make_layered(True)
    torch.compile(model, backend="aot_eager", fullgraph=True)(x).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])
    assert len(logged(caplog)) == 1 and "in compiled code" in logged(caplog)[0]
