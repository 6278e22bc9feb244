"""A program may put ours in the place of torch's: nothing calls itself without end."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import batchnorm_ext
from support import assert_bitwise

pytestmark = pytest.mark.only("cpu", reason="says nothing of a device")


def test_function_in_the_place_of_torchs(monkeypatch):
    native, x = F.batch_norm, torch.randn(4, 3, 2, 2)
    arguments = torch.zeros(3), torch.ones(3), None, None, True
    expected = native(x.double(), None, None, training=True)
    refused = native(x[:, :, 0], *arguments)
    monkeypatch.setattr(F, "batch_norm", batchnorm_ext.functional.batch_norm)
    for layer in (nn.BatchNorm2d(3), batchnorm_ext.BatchNorm2d(3)):
        torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=1e-6)
    labelled = torch.Tensor._make_subclass(type("Labelled", (torch.Tensor,), {}), x[:, :, 0])
    y = F.batch_norm(labelled, *arguments)  # goes to torch's own function, and from there to ours
    torch.testing.assert_close(y.as_subclass(torch.Tensor), refused, rtol=0, atol=1e-6)


def test_sync_batch_norm_in_the_place_of_torchs(monkeypatch):
    native = nn.SyncBatchNorm
    monkeypatch.setattr(nn, "SyncBatchNorm", batchnorm_ext.SyncBatchNorm)
    x = torch.randn(4, 3, 2, 2)
    assert_bitwise("y", nn.SyncBatchNorm(3)(x), batchnorm_ext.BatchNorm2d(3)(x))
    assert isinstance(batchnorm_ext.convert(native(3)), native)


def _synchronize():
    layer, x = batchnorm_ext.SyncBatchNorm(3), torch.randn(4, 3)
    expected = layer(x)
    for name in ("batch_norm", "_verify_batch_size"):
        with mock.patch.object(F, name):
            assert_bitwise("y", layer(x), expected)


def test_sync_batch_norm_calls_no_function_that_may_be_replaced(ranks):
    ranks(2).run(_synchronize)


class Twice(batchnorm_ext.BatchNorm2d):
    def forward(self, input):
        return super().forward(input) * 2


def _with_hook():
    layer = batchnorm_ext.BatchNorm2d(3)
    layer.register_forward_hook(lambda module, arguments, output: output * 2)
    return layer


def _with_pre_hook():
    layer = batchnorm_ext.BatchNorm2d(3)
    layer.register_forward_pre_hook(lambda module, arguments: (arguments[0] * 2,))
    return layer


def _with_own_forward():
    layer = batchnorm_ext.BatchNorm2d(3)
    forward = layer.forward
    layer.forward = lambda input: forward(input) * 2
    return layer


@pytest.mark.parametrize("make", [_with_hook, _with_pre_hook, _with_own_forward])
def test_fx_applies_nothing_twice(make):
    """The traced model gave four times the output where eager gave two times."""
    layer = make()
    model = nn.Sequential(layer).eval()
    with pytest.raises(fx.proxy.TraceError, match="call batchnorm_ext.revert"):
        fx.symbolic_trace(model)


def test_fx_of_a_subclass_is_an_error_as_natively():
    with pytest.raises(fx.proxy.TraceError, match="control flow"):
        fx.symbolic_trace(nn.Sequential(Twice(3)))
