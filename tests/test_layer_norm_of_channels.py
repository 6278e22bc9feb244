"""LayerNorm over the channels of images, against the formula that users write, in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import batchnorm_ext
from batchnorm_ext import functional
from family import DTYPES, NAMES, SIZES, arranged, gradients_of, orders
from support import assert_bitwise, assert_within

pytestmark = [
    pytest.mark.only("cpu", reason="test_cuda.py has the one on CUDA"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


def _formula(x, weight, bias, eps):
    """As users write it."""
    rows = x.movedim(1, -1).contiguous()
    return F.layer_norm(rows, rows.shape[-1:], weight, bias, eps).movedim(-1, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@orders([*SIZES, (2, 2500, 5, 7), (2, 96, 56, 56)])
def test_layer_norm_of_channels(size, layout, dtype):
    x, dy = (torch.randn(size) * 2 + 1).to(dtype), torch.randn(size).to(dtype)
    x = arranged(x, layout)
    ours = batchnorm_ext.LayerNorm(size[1], channel_dim=1).to(dtype)
    for parameter in ours.parameters():
        nn.init.uniform_(parameter, -2, 2)
    inputs = [t.detach().double().requires_grad_() for t in (x, ours.weight, ours.bias)]
    y = _formula(*inputs, ours.eps)
    expected = [y, *torch.autograd.grad(y, inputs, dy.double())]
    for name, actual, exact in zip(NAMES, gradients_of(ours, x, dy), expected, strict=True):
        arithmetic = 64 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        bound = exact.abs() * torch.finfo(dtype).eps / 2 + exact.abs().max() * arithmetic
        assert_within(name, actual, exact, bound)
    if layout in ("contiguous", "channels last"):
        assert ours(x).stride() == x.stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_derivatives_of_channels(layout, check):
    x = arranged(torch.randn(2, 4, 3, 2, dtype=torch.float64), layout).requires_grad_()
    weight, bias = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def function(x, weight, bias):
        return functional.layer_norm(x, (4,), weight, bias, channel_dim=1)

    assert check(function, (x, weight, bias))


def test_layer_norm_of_channels_as_a_layer():
    norm = batchnorm_ext.LayerNorm(4, channel_dim=1)
    x = torch.randn(2, 4, 3, 2)
    expected = norm(x)
    assert isinstance(norm, batchnorm_ext.LayerNorm) and "channel_dim=1" in repr(norm)
    assert_bitwise("copy", copy.deepcopy(norm)(x), expected)
    assert_within("script", torch.jit.script(norm)(x), expected, 1e-6)
    assert_within("export", torch.export.export(norm, (x,)).module()(x), expected, 1e-6)
    with pytest.warns(UserWarning, match="not reverted: .*: torch.nn has no such layer"):
        batchnorm_ext.revert(norm)
    for arguments in ((4, 2), ((4, 3), 1)):
        with pytest.raises(ValueError, match="expected channel_dim to be None, or 1 with one size"):
            batchnorm_ext.LayerNorm(arguments[0], channel_dim=arguments[1])
