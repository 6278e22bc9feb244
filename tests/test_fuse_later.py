"""What changes after fusing: rewritten forwards that no longer hold give way to the original."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm_ext
from fusing import assert_fuses, assert_same, block, conv, image, norm, pair

pytestmark = pytest.mark.only("cpu", reason="of forwards alone")


def test_layers_appended_later():
    layers = nn.ModuleList([conv(), conv()])

    def run(m, x):
        for layer in m.layers:
            x = layer(x)
        return m.relu(m.bn1(x))

    model = block(run, bn2=None, layers=layers)
    fused = assert_fuses(model, image(), 1)
    layer = conv().double()
    for each in (model, fused):
        each.layers.append(copy.deepcopy(layer))
    assert_same(fused, model, image())


def _in_place(m, x):
    y = m.conv1(x)
    return m.relu(m.bn1(m.conv2(x))) + m.act(y) + y


def _in_place_between(m, x):
    y = m.conv1(x)
    return F.silu(m.bn1(y) + m.conv2(m.act(y)))


def _by_type(m, x):
    y = m.relu(m.bn1(x))
    return y if isinstance(m.act, nn.ReLU) else y + m.act(y)


def _in_place_no_more(m):
    m.act.inplace = False


def _in_place_from_now_on(m):
    m.act.inplace = True


def _replaced(m):
    m.act = nn.SiLU()


def _hooked(m):
    m.act.register_forward_hook(lambda module, args, output: output * 3)


@pytest.mark.parametrize(
    "run, in_place, change",
    [
        (_in_place, True, _in_place_no_more),
        (_in_place, True, _replaced),
        (_in_place, True, _hooked),
        (_in_place_between, False, _in_place_from_now_on),
        (_by_type, False, _replaced),
    ],
)
def test_layers_around_are_changed_later(run, in_place, change):
    """What is written to, and what a forward asks of its layers, is part of the graph."""
    model, fused, report = pair(block(run, bn2=None, act=nn.ReLU(in_place)))
    assert list(report.done) == ["bn1"]
    for each in (model, fused):
        change(each)
    assert_same(fused, model, image(), backward=False)


def test_hooks_of_all_modules_see_every_layer():
    model = nn.Sequential(nn.Sequential(conv(), norm()), nn.ReLU())
    fused, calls = batchnorm_ext.fuse(copy.deepcopy(model)), []
    hook = nn.modules.module.register_module_forward_hook(lambda *call: calls.append(call[0]))
    try:
        model(torch.randn(2, 6, 4, 4))
        expected = [type(module).__name__ for module in calls]
        calls.clear()
        fused(torch.randn(2, 6, 4, 4))
    finally:
        hook.remove()
    assert [type(module).__name__ for module in calls] == expected


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.modules.batchnorm._BatchNorm, nn.ReLU])
@pytest.mark.parametrize("before", [True, False])
def test_forwards_of_torchs_classes_are_replaced(kind, before, monkeypatch):
    native = kind.forward
    model, fused, _ = pair(
        block(lambda m, x: m.relu(m.bn2(m.conv2(m.relu(m.bn1(m.conv1(x))))) + x))
    )
    monkeypatch.setattr(kind, "forward", lambda layer, x: native(layer, x) * 2)
    if before:
        fused = batchnorm_ext.fuse(copy.deepcopy(model))
    assert_same(fused, model, image())
