"""What the benchmark of the norms compares computes the same."""

import pytest
import torch
from torch import nn

import norms
from support import assert_within

SHAPES = {
    "BatchNorm": (4, 3, 5, 4),
    "GroupNorm": (2, 64, 5, 4),
    "InstanceNorm": (2, 3, 4, 5, 6),
    "LayerNorm of channels": (2, 6, 4, 5),
    "LayerNorm": (4, 8),
    "RMSNorm": (4, 8),
    "weight_norm": (5, 3, 2, 2),
}


@pytest.mark.parametrize("norm", SHAPES)
def test_contestants_agree(norm):
    x = torch.randn(SHAPES[norm])
    layers = norms.layers(norm, SHAPES[norm])
    for layer in layers.values():
        for number, parameter in enumerate(layer.parameters()):
            nn.init.constant_(parameter, 1.5 + number)
    expected = layers.pop("native")(x)
    for name, layer in layers.items():
        # a few roundings of float32, of values up to about 10
        assert_within(name, layer(x), expected, 1e-5)


@pytest.mark.parametrize(
    "name",
    ["BatchNorm + ReLU", "BatchNorm + add + ReLU", "BatchNorm + Hardswish", "GroupNorm + SiLU"],
)
def test_chains_agree(name):
    x = torch.randn(2, 64, 5, 4)
    native, ours = (norms.chains(name, x)[key] for key in ("native", "ours"))
    if ours.residual is not None:
        ours.residual = native.residual
    assert_within(name, ours(x), native(x), 1e-5)  # a few roundings, as above
